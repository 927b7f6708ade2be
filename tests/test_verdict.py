"""The rule, its positive controls, and the command that tells the user."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pydoc_data.topics import topics

import pytest
import torch

from statewright.cli import main
from statewright.diagnosis import diagnose, judge
from statewright.diagnosis.cases import cases, confusion, into_digits
from statewright.diagnosis.controls import Control, saved_control, scale_decay, untrained
from statewright.diagnosis.gates import GateReport
from statewright.diagnosis.prompts import rows_of
from statewright.diagnosis.reading import Comparison, Reading
from statewright.diagnosis.remembrance import Remembrance
from statewright.diagnosis.stream import Bucket, Layer
from statewright.diagnosis.train_length import known_train_length, train_length_of
from statewright.diagnosis.verdict import AMNESIA, COLLAPSE, HEALTHY, SHIFT, VERDICTS, words
from statewright.models.tokenizers import byte_tokenizer
from statewright.train.data import corpus_of

MANUAL = "\n\n".join(topics[name].strip() for name in sorted(topics))
SMALL = Control(hidden_size=32, state_size=8, head_dim=16, num_steps=2)
T, N = 64, 64 * 16


def reading(
    carried: float = 2.0,
    fresh: float = 2.0,
    growth: float = 1.0,
    kept: float | None = 0.9,
    half_life: float = 400.0,
    kind: str = "MatrixState",
    has_attention: bool = False,
    error: float = 0.01,
) -> Reading:
    """16 training lengths; 2 nats inside and up to 4 T; `carried` and `fresh` beyond."""
    octaves = [(T * 2**i, T * 2 ** (i + 1)) for i in range(4)]
    after = [(2.0, 2.0), (2.0, 2.0), (carried, fresh), (carried, fresh)]
    pairs = [(*o, c, f, error, error, 99) for o, (c, f) in zip(octaves, after)]
    gates = [] if kept is None else [GateReport((kept,), (half_life,), (1.0,))]
    layer = Layer("1", kind, 1, 1, {}, [growth], None if kept is None else [kept], gates)
    return Reading(
        policy="none",
        train_length=T,
        length=N,
        num_rows=1,
        in_window=2.0,
        in_window_error=0.01,
        inside=(),
        buckets=(
            Bucket(0, T, 2.0, 0.1, 64),
            *(Bucket(*o, c, 0.1, 99) for o, (c, _) in zip(octaves, after)),
        ),
        comparisons=tuple(Comparison(*pair) for pair in pairs),
        probes=(),
        watches=(),
        layers=(layer,),
        has_attention=has_attention,
    )


def remembering(distance_at_8: float) -> tuple[Remembrance, ...]:
    return tuple(
        Remembrance(c, T, d) for c, d in ((1, 0.5), (2, 0.3), (4, 0.1), (8, distance_at_8))
    )


LN2 = math.log(2)


@pytest.mark.parametrize(
    "found, truth",
    [
        (reading(), HEALTHY),
        (reading(growth=30.0), HEALTHY),  # grows, forgets nothing, and does no harm
        (reading(carried=2.0 + LN2 - 0.01, growth=30.0), HEALTHY),
        (reading(carried=2.0 + LN2 + 0.03, growth=30.0), COLLAPSE),
        (reading(carried=2.0 + LN2 + 0.03, growth=30.0, error=0.1), HEALTHY),  # not beyond doubt
        (reading(carried=4.0, growth=30.0, kept=None), COLLAPSE),  # gates unseen
        (reading(carried=4.0, growth=3.9), SHIFT),  # the states show nothing
        (reading(carried=4.0, growth=30.0, kept=0.4), SHIFT),
        (reading(carried=4.0, growth=1.0, kind="VectorState"), COLLAPSE),  # it cannot grow
        (reading(carried=4.0, growth=1.0, kind="VectorState", has_attention=True), SHIFT),
        (reading(carried=4.0, fresh=4.0), SHIFT),
        (reading(carried=4.0, fresh=4.0, growth=30.0), SHIFT),  # as bad from an empty state
        (reading(carried=5.0, fresh=4.0, growth=30.0), COLLAPSE),  # both: the state comes first
    ],
)
def test_the_rule(found: Reading, truth: str) -> None:
    verdict = judge(found, remembering(0.02))
    assert verdict.name == truth
    assert verdict.safe_length == (N if truth == HEALTHY else 4 * T)
    assert verdict.blamed == () or truth == COLLAPSE
    assert len(words(found, verdict)) > 80


def test_amnesia_needs_both_witnesses() -> None:
    short = reading(half_life=2.0)
    assert judge(short, remembering(0.004)).name == AMNESIA
    assert judge(short, remembering(0.006)).name == HEALTHY
    assert judge(reading(half_life=9.0), remembering(0.004)).name == HEALTHY
    assert judge(reading(kept=None), remembering(0.004)).name == AMNESIA
    assert judge(short).name == HEALTHY
    assert judge(replace(short, comparisons=reading(carried=4.0).comparisons)).name == SHIFT


def test_where_the_limits_are_first_exceeded() -> None:
    verdict = judge(reading(carried=2.95, growth=30.0))
    assert (verdict.perplexity_limit_at, verdict.loss_limit_at) == (4 * T, None)
    assert judge(reading(carried=3.5)).loss_limit_at == 4 * T
    assert verdict.worst == pytest.approx(2.95 / 2)
    assert verdict.blamed[0].layer == "1" and verdict.blamed[0].growth == 30.0


def test_confusion_counts_truth_by_row() -> None:
    counts = confusion([(HEALTHY, HEALTHY), (SHIFT, HEALTHY), (SHIFT, SHIFT)])
    assert counts[VERDICTS.index(SHIFT)] == [1, 0, 0, 1] and sum(map(sum, counts)) == 3


def test_into_digits() -> None:
    ids = torch.tensor([list(MANUAL.encode()[:300])])
    changed = into_digits(ids, 100)
    assert torch.equal(changed[:, :100], ids[:, :100])
    assert set(changed[0, 100:].tolist()) <= set(b"0123456789abcdef")


def test_rows_come_from_different_places() -> None:
    tokens = torch.arange(100)
    assert rows_of(tokens, 30, 1).tolist() == [list(range(30))]
    assert rows_of(tokens, 30, 3)[:, 0].tolist() == [0, 35, 70]
    with pytest.raises(ValueError, match="4 rows of 30 tokens do not fit"):
        rows_of(tokens, 30, 4)


def test_a_control_is_trained_once(tmp_path) -> None:
    corpus = corpus_of([[MANUAL[:20_000]]], byte_tokenizer())
    steps = []
    first = saved_control(SMALL, corpus, tmp_path / "a", lambda step, loss: steps.append(step))
    again = saved_control(SMALL, corpus, tmp_path / "a", lambda step, loss: steps.append(step))
    assert steps == [1, 2] and known_train_length(again.config) == (64, "config.json")
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    with pytest.raises(ValueError, match="holds another model than Control"):
        saved_control(replace(SMALL, seed=1), corpus, tmp_path / "a")
    faster = scale_decay(first, 8.0)
    for old, new in zip(first.model.layers, faster.model.layers):
        torch.testing.assert_close(new.mixer.A_log.exp(), 8 * old.mixer.A_log.exp())


def test_the_control_of_the_specification() -> None:
    assert untrained(Control()).num_parameters() == 164_900
    low, official = untrained(Control()), untrained(Control(decay_scale=1.0))
    assert low.model.layers[0].mixer.A_log.exp().max() < 0.017
    assert official.model.layers[0].mixer.A_log.exp().min() > 0.99
    with pytest.raises(ValueError, match="decay_scale=0"):
        Control(decay_scale=0)


def test_the_training_length_is_recorded_or_asked_for(tmp_path) -> None:
    config = untrained(SMALL).config
    assert train_length_of(None, config, None) == 64 and train_length_of(8, config, None) == 8
    del config.train_length
    with pytest.raises(ValueError, match="give train_length=N"):
        train_length_of(None, config, tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"config": {"length": 128}}))
    assert known_train_length(config, tmp_path) == (128, "run.json")
    record = {"config": {"length": 32}, "data": "", "seconds": 0, "metrics_bytes": 0}
    run = tmp_path / "runs"
    for step in (9, 10):
        (run / f"checkpoint-{step}").mkdir(parents=True)
        record["config"]["length"] = step
        (run / f"checkpoint-{step}" / "run.json").write_text(json.dumps(record))
    assert train_length_of(None, config, run) == 10


@pytest.fixture(scope="module")
def model_and_text(tmp_path_factory):
    directory = tmp_path_factory.mktemp("diagnose")
    corpus = corpus_of([[MANUAL[:20_000]]], byte_tokenizer())
    saved_control(SMALL, corpus, directory / "model")
    (directory / "book.txt").write_text(MANUAL[:1200])
    return str(directory / "model"), str(directory / "book.txt")


def test_the_command(model_and_text, tmp_path, capsys) -> None:
    model, text = model_and_text
    page = tmp_path / "report.html"
    chain = "forgetmore:decay=0.97"
    assert main(["diagnose", model, "--text", text, "--policy", chain, "--report", str(page)]) == 0
    said = capsys.readouterr().out
    assert "loss by position" in said and "newlines" in said and f"under {chain}" in said
    assert page.read_text().startswith("<!DOCTYPE html>")
    options = ["--length", "512", "--json", "--rows", "2", "--prompts", "text,random"]
    assert main(["diagnose", model, "--text", text, *options]) == 0
    record = json.loads(capsys.readouterr().out)
    run = record["runs"][0]
    assert (run["text"]["reading"]["length"], run["text"]["reading"]["num_rows"]) == (512, 2)
    assert [other["prompt"] for other in run["others"]] == ["random"]
    assert run["text"]["verdict"]["name"] in VERDICTS
    assert json.loads(json.dumps(record, allow_nan=False)) == record


@pytest.mark.parametrize(
    "options, message",
    [
        (["--length", "128k"], "fewer than 1 x 131,072"),
        (["--train-length", "2k"], "two training lengths and one more"),
        (["--prompts", "text,poem"], "prompt 'poem'"),
        (["--policy", "forgetmor"], "unknown policy 'forgetmor'"),
        (["--rows", "0"], "'--rows': 0, expected at least 1"),
    ],
)
def test_mistakes_are_one_line(model_and_text, capsys, options, message) -> None:
    model, text = model_and_text
    # What is wrong in itself is a mistake of usage, and told before anything is loaded.
    usage = options[0] in ("--prompts", "--policy", "--rows")
    assert main(["diagnose", model, "--text", text, *options]) == (2 if usage else 1)
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1


def test_an_unknown_training_length_is_asked_for(model_and_text, tmp_path, capsys) -> None:
    model = untrained(SMALL)
    del model.config.train_length
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert main(["diagnose", str(tmp_path), "--text", model_and_text[1]]) == 1
    assert "give --train-length" in capsys.readouterr().err


@pytest.mark.slow
def test_every_verdict_has_a_control_that_gets_it(tmp_path) -> None:
    """The confusion of examples/verdicts.py, one seed, trained more briefly, on Python's manual."""
    train, rest = corpus_of([[MANUAL]], byte_tokenizer()).split(0.25)
    # Several places: one of them alone is a chapter, and chapters differ.
    ids = rows_of(torch.from_numpy(rest.tokens.astype("int32")), 4097, 8)
    control = Control(num_steps=100, learning_rate=4e-3)
    for case in cases(control, train, ids, tmp_path):
        assert diagnose(case.model, case.ids, 64).verdict.name == case.truth
