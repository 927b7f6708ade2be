"""`statewright check`: the table of families is as known, and every mistake one clear line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bridge import model_of
from test_check_planted import Around, own
from test_cli import assert_refused, run  # noqa: F401
from test_train import one_thread  # noqa: F401

from statewright.checks.checks import CHECKS
from statewright.checks.page import markdown
from statewright.checks.peak import reading_peak
from statewright.checks.report import OK, RAISES, UNSUPPORTED, WRONG, Cell, Report, check, words
from statewright.hf.families import FAMILIES, tiny

PAGE = Path(__file__).parents[1] / "docs" / "check.md"


# What is not ok, beyond `shared`, which no cache of transformers holds; (WRONG, raises).
HYBRID = ({"right", "packed"}, set())
DELTA = ({"right", "packed"}, {"gradient"})
MAMBA = ({"chunk", "chunks", "right", "packed", "gradient"}, set())
KNOWN: dict[str, tuple[set[str], set[str]]] = {
    "llama": (set(), set()),
    "gpt2": (set(), set()),
    "mistral": ({"right"}, set()),
    "qwen3": (set(), set()),
    "gemma3_text": ({"right"}, set()),
    "deepseek_v3": (set(), set()),
    "mamba": MAMBA,
    "falcon_mamba": MAMBA,
    "mamba2": HYBRID,
    "jamba": MAMBA,
    "zamba": MAMBA,
    "zamba2": HYBRID,
    "bamba": ({"positions", "right", "packed"}, set()),
    "granitemoehybrid": HYBRID,
    "falcon_h1": HYBRID,
    "nemotron_h": HYBRID,
    "qwen3_next": DELTA,
    "qwen3_5_text": DELTA,
    "olmo_hybrid": DELTA,
    "kimi_linear": DELTA,
    "bailing_hybrid": DELTA,
    "zaya": HYBRID,
    "lfm2": HYBRID,
    "minimax": (MAMBA[0] | {"positions", "left", "beams"}, set()),
    "xlstm": ({"left", "right", "packed"}, {"gradient"}),
    "rwkv": ({"left", "right", "packed", "batch"}, {"gradient"}),
    "recurrent_gemma": ({"packed"}, set()),
}
FEW = ("llama", "mamba", "mamba2", "bamba", "rwkv")


@pytest.mark.parametrize(
    "family",
    [*FEW, *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f not in FEW)],
)
def test_what_is_known_of_a_family(family: str) -> None:
    found = check(tiny(family), family)
    wrong = {n for n, cell in found.cells.items() if cell.verdict == WRONG} - {"shared"}
    raises = {n for n, cell in found.cells.items() if cell.verdict == RAISES}
    assert (wrong, raises) == KNOWN[family], found.cells
    lacks = {n for n, cell in found.cells.items() if cell.verdict == UNSUPPORTED}
    if family == "recurrent_gemma":
        assert {"fold", "chunk", "fork", "save", "session"} <= lacks
    else:
        assert lacks <= {"kernel", "beams"} and found.cells["shared"].verdict == WRONG
    assert _row(markdown([found]), family) == _row(PAGE.read_text(), family)


def _row(page: str, family: str) -> list[str]:
    """A family's verdicts in the table, without the numbers."""
    line = next(line for line in page.splitlines() if line.startswith(f"| {family} |"))
    return [cell.split()[0] for cell in line.strip("|").split("|")]


def test_the_page_has_every_family_that_is_known() -> None:
    page = PAGE.read_text()
    assert KNOWN.keys() == FAMILIES.keys() and len(FAMILIES) >= 20
    assert all(f"| {family} |" in page for family in FAMILIES)
    assert all(f"| {name}" in page for name in CHECKS)


def test_ours_holds_everything() -> None:
    model = own()
    found = check(model, "ours")
    assert {cell.verdict for cell in found.cells.values()} == {OK}, found.cells
    assert "safe to serve and to train" in words(found)
    model.train()
    check(model, "ours", ["fold"])
    assert model.training


def test_words_say_what_to_do() -> None:
    cells = dict.fromkeys(CHECKS, Cell(OK, 0.0))
    cells |= {"chunk": Cell(WRONG, 0.3), "gradient": Cell(RAISES), "beams": Cell(UNSUPPORTED)}
    text = words(Report("x", "XForCausalLM", cells))
    assert text.startswith("x (XForCausalLM): silently wrong in chunk. If you serve it: do not")
    assert "no TBPTT" in text and text.endswith("Not offered by the model: beams.")
    assert cells["chunk"].text == "WRONG 0.3" and Cell(OK, 4e-4).text == "ok 0.0004"


def test_exit_codes_and_json(run) -> None:  # noqa: F811
    ran = run("check", "--family", "mamba", "--only", "fold,chunk", "--json")
    found = json.loads(ran.out)["models"][0]
    assert ran.code == 1 and found["failed"] == ["chunk"] and ran.err == ""
    assert list(found["checks"]) == ["fold", "chunk"]
    assert found["checks"]["chunk"]["error"] > 1e-3
    assert run("check", "--family", "mamba", "--only", "fold", "--require", "save").code == 0
    ran = run("check", "--family", "recurrent_gemma", "--only", "save")
    assert ran.code == 1 and "not met: save" in ran.out


def test_a_checkpoint_and_a_page(run, tmp_path) -> None:  # noqa: F811
    model_of("mamba2").save_pretrained(tmp_path / "m")
    own().save_pretrained(tmp_path / "own")
    for name in ("m", "own"):
        page = tmp_path / f"{name}.md"
        ran = run("check", tmp_path / name, "--only", "fold,chunk,save", "--markdown", page)
        said = " ".join(ran.out.split())
        assert ran.code == 0 and "What was tried is safe to serve" in said, said + ran.err
        assert f"| {tmp_path / name} | ok | ok | ok |" in page.read_text()
    ran = run("size", tmp_path / "m", "--context", "2k", "--batch", "3", "--json")
    sized = json.loads(ran.out)
    assert sized["kinds"].keys() == {"recurrent", "conv"} and not sized["grows"]
    again = run("size", "--family", "mamba2", "--context", "40", "--batch", "3", "--json").out
    assert json.loads(again)["state_bytes"] == sized["state_bytes"]
    ran = run("size", "--family", "jamba", "--context", "40", "--measure")
    assert ran.code == 0 and "peak" in ran.out and "fed token by token" in ran.err


def checkpoint(directory: Path, **config: Any) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_bad_input_is_one_line(run, tmp_path) -> None:  # noqa: F811
    assert_refused(run("check", "--family", "mambo"), "did you mean 'mamba'")
    assert_refused(run("check"), "exactly one of")
    assert_refused(run("check", "--family", "llama", "--all"), "exactly one of")
    assert_refused(run("check", "--family", "llama", "--only", "folds"), "unknown check 'folds'")
    assert_refused(run("check", tmp_path / "nothing"), "no such directory")
    assert_refused(run("check", tmp_path), "no config.json")
    assert_refused(run("check", "--family", "llama", "--device", "nowhere"), "nowhere")
    assert_refused(run("size", "--family", "recurrent_gemma"), "returns no cache")
    assert_refused(
        run("size", "--family", "llama", "--context", "0"), "--context': 0, expected at least 1"
    )
    remote = checkpoint(
        tmp_path / "a", model_type="newthing", auto_map={"AutoConfig": "code.Config"}
    )
    odd = checkpoint(tmp_path / "b", model_type="mamba9")
    image = checkpoint(tmp_path / "c", model_type="vit")
    for verb in ("check", "size"):
        assert_refused(run(verb, remote), str(remote), "--trust-remote-code")
        assert_refused(run(verb, odd), "transformers 5", "no such family", "mamba9")
        assert_refused(run(verb, image), "not a causal language model")
    model = tiny("mamba2")
    model.save_pretrained(tmp_path / "d", state_dict={"backbone.norm_f.weight": torch.ones(32)})
    assert_refused(run("check", tmp_path / "d"), "weights are missing")
    (tmp_path / "d" / "model.safetensors").write_bytes(b"\x00" * 40)
    assert_refused(run("check", tmp_path / "d"), str(tmp_path / "d"))


class Small(Around):
    """A machine with room for a few tokens."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def call(self, T, call):
        cache = call["past_key_values"]
        if T + (0 if cache is None else cache.get_seq_length()) > self.room:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return super().call(T, call)


def test_out_of_memory_says_what_fits() -> None:
    with pytest.raises(
        ValueError, match="out of memory reading 3 rows of 53 tokens; 26 tokens fit"
    ):
        check(Small(30), "small")
    with pytest.raises(ValueError, match=r"after 32 of 64 tokens; --context 32 fits"):
        reading_peak(Small(40), 64, 1, chunk=16)


def test_a_crash_is_a_finding() -> None:
    class Crashes(Around):
        def call(self, T, call):
            if T == 1:
                raise IndexError("boom")
            return super().call(T, call)

    cells = check(Crashes(), "crashes", ["fold", "chunk"]).cells
    assert cells["fold"] == Cell(RAISES, None, "IndexError: boom") and cells["chunk"].verdict == OK
