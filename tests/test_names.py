"""One name, one meaning: recurrent policies on every mixer, backends in threads and hybrids."""

from __future__ import annotations

import json
import threading
import warnings

import pytest
import torch

from statewright import laws, ops
from statewright.cli import main
from statewright.mixers import MIXERS, Mixer, build_mixer
from statewright.models import StatewrightConfig, StatewrightForCausalLM
from statewright.names import short_names
from statewright.policies import POLICIES, RecurrentPolicy, build_policy
from statewright.report.evaluation import evaluation

RECURRENT = [name for name, cls in POLICIES.items() if issubclass(cls, RecurrentPolicy)]
LINEAR = [name for name, cls in MIXERS.items() if cls.is_linear]
# statenorm's default is a multiple of a measured norm, which a fresh model has none of.
OPTIONS = {"statenorm": ":limit=0.001:every=1", "statewindow": ":length=2"}
D = 32
NEGATIVE = (torch.zeros(1, 2, 1), -torch.ones(1, 2, 1), torch.zeros(1, 1))


def model(*mixers: str) -> StatewrightForCausalLM:
    torch.manual_seed(0)
    config = StatewrightConfig(
        vocab_size=9, hidden_size=D, num_hidden_layers=len(mixers), mixer=list(mixers)
    )
    return StatewrightForCausalLM(config).eval()


def changes(run, policy: str) -> bool:
    """Whether a policy changes the outputs; its refusal must be a ValueError."""
    with torch.no_grad():
        return not torch.equal(run(None), run(build_policy(policy)))


@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.parametrize("mixer", LINEAR)
def test_a_recurrent_policy_works_or_is_refused(mixer: str, kind: str) -> None:
    policy = kind + OPTIONS.get(kind, ":decay=0.5" if kind == "forgetmore" else "")
    torch.manual_seed(0)
    layer, x = build_mixer(mixer, D), torch.randn(2, 9, D)
    hybrid, ids = model(mixer, "attention:num_heads=2"), torch.arange(9).expand(2, -1)
    refused = kind == "deltascale" and not mixer.startswith("mamba")
    for run in (
        lambda p: layer(x, policy=p)[0],
        lambda p: layer.step(x[:, 0], layer(x)[1], policy=p)[0],
        lambda p: hybrid(ids, policy=p).logits,
    ):
        if refused:
            with pytest.raises(ValueError, match="have a step size"):
                changes(run, policy)
        else:
            assert changes(run, policy)


@pytest.mark.parametrize("mixer", LINEAR)
def test_factors_of_several_layers_are_no_single_layers(mixer: str) -> None:
    with pytest.raises(ValueError, match=r"step size|one number for one layer"):
        build_mixer(mixer, D)(
            torch.randn(1, 3, D), policy=build_policy("deltascale:factor=0.9/0.5")
        )


def test_a_linear_mixer_without_a_scan_refuses_recurrent_policies() -> None:
    class Folded(MIXERS["mingru"]):
        run = Mixer.run

    layer, x = Folded(D), torch.randn(1, 3, D)
    layer(x)
    with pytest.raises(ValueError, match="Folded: policy=ForgetMore"):
        layer(x, policy=build_policy("forgetmore"))


def test_a_backend_is_one_threads_choice() -> None:
    failures: list[Exception] = []

    def other() -> None:
        try:
            ops.vector_scan(*NEGATIVE)
        except ValueError as error:
            failures.append(error)

    with ops.default_backend("log"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        with pytest.raises(ValueError, match="log backend"):
            ops.vector_scan(*NEGATIVE)
    assert not failures


def test_interleaved_blocks_leave_nothing_behind() -> None:
    first, second = ops.default_backend("ref"), ops.default_backend("log")
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    with pytest.raises(ValueError, match="log backend"):
        ops.vector_scan(*NEGATIVE)
    second.__exit__(None, None, None)
    ops.vector_scan(*NEGATIVE)


def test_a_compiled_graph_keeps_the_choice_of_its_trace(monkeypatch) -> None:
    def sevens(log_a, b, h0, reset):
        return b * 0 + 7, h0 * 0 + 7

    monkeypatch.setitem(ops.VECTOR_BACKENDS, "sevens", sevens)
    scan = torch.compile(lambda *x: ops.vector_scan(*x)[1], fullgraph=True, backend="eager")
    with ops.default_backend("sevens"):
        assert scan(*NEGATIVE).item() == 7
    assert scan(*NEGATIVE).item() == 7
    torch.compiler.reset()
    assert scan(*NEGATIVE).item() == -2


@pytest.mark.parametrize("mixer", ["mamba2", "gla"])
def test_a_backend_of_one_kind_of_scan_in_a_hybrid(mixer: str, monkeypatch) -> None:
    hybrid, ids = model(mixer, "mingru"), torch.arange(9).unsqueeze(0)
    ops._announce_kind.cache_clear()
    with torch.no_grad(), ops.default_backend("log"):
        with pytest.warns(UserWarning, match="matrix scans have no backend 'log'"):
            logits = hybrid(ids).logits
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            hybrid(ids)
    with torch.no_grad():
        torch.testing.assert_close(logits, hybrid(ids).logits, rtol=1e-3, atol=1e-3)
    monkeypatch.setitem(ops.MATRIX_BACKENDS, "mine", ops.MATRIX_BACKENDS["ref"])
    with torch.no_grad(), ops.default_backend("mine"), pytest.warns(UserWarning, match="'mine'"):
        hybrid(ids)
    q = torch.zeros(1, 2, 1, 1)
    with pytest.raises(ValueError, match="unknown scan backend 'log'"):
        ops.matrix_scan(q, q, q, q, torch.zeros(1, 1, 1, 1), backend="log")


def test_a_case_without_a_tolerance_names_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"backend 'triton' \(known: torch.float64 on ref"):
        _ = laws.Case(backend="triton").tolerance


def test_models_of_one_last_name_are_two() -> None:
    names = short_names(["runs/x/a", "runs/y/a/", "runs/x/b", "a", "org/c"])
    assert names == {
        "runs/x/a": "x/a",
        "runs/y/a/": "y/a",
        "runs/x/b": "b",
        "a": "a",
        "org/c": "c",
    }
    cost = {"state_bytes": 64, "tokens_per_second": 1}
    result = {"policy": "none", "task": "copy", "metrics": {"accuracy": 0.5}, "n": 4, "cost": cost}
    page = evaluation([{**result, "model": "x/a"}, {**result, "model": "y/a"}], "e")
    assert "x/a" in page and "y/a" in page


def test_a_page_keeps_files_of_one_name_apart(tmp_path) -> None:
    out = tmp_path / "page.html"
    files = [tmp_path / place / "a.json" for place in ("x", "y")]
    for i, file in enumerate(files):
        file.parent.mkdir()
        file.write_text(json.dumps({"cells": {"task": {"score": i + 0.5}}}))
    assert main(["report", *map(str, files), "--out", str(out)]) == 0
    shown = out.read_text(encoding="utf-8")
    assert "x/a.json" in shown and "y/a.json" in shown and str(tmp_path) not in shown
