"""`statewright eval` over models, tasks and policies, and the file it leaves."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from statewright.cli import main
from statewright.evaluation import Plan, estimate, evaluate, run_plan
from statewright.evaluation import grid as grid_module
from statewright.evaluation.curves import bits_per_byte, loss_by_position
from statewright.hf.bounded import BoundedCache
from statewright.models import StatewrightConfig, StatewrightForCausalLM
from statewright.models.tokenizers import byte_tokenizer

torch.set_num_threads(1)
TOKENIZER = byte_tokenizer()
TEXT = "It was the best of times, it was the worst of times. " * 8


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = dict(hidden_size=16, num_attention_heads=2, intermediate_size=24)
    config = LlamaConfig(vocab_size=257, num_hidden_layers=2, num_key_value_heads=1, **sizes)
    return LlamaForCausalLM(config).eval()


def own(mixer: str = "mingru") -> StatewrightForCausalLM:
    torch.manual_seed(0)
    config = StatewrightConfig(hidden_size=16, num_hidden_layers=2, mixer=mixer, vocab_size=257)
    return StatewrightForCausalLM(config).eval()


MODELS = {"llama": llama, "own": own}


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(TEXT)
    return path


def plan_of(book: Path, **changes) -> Plan:
    tasks = (f"perplexity:length=60:text={book}", "mqar:pairs=2:length=16")
    plan = Plan(("llama", "own"), tasks, ("tova:budget=6",), (0, 1), 3)
    return dataclasses.replace(plan, **changes)


def run(plan: Plan, path: Path | None = None, models=MODELS) -> dict[str, dict]:
    return dict(run_plan(plan, lambda name: (models[name](), TOKENIZER), path, "the command"))


def test_every_combination_with_the_unbounded_model_beside(book: Path, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.json"
    found = run(plan_of(book), path)
    assert len(found) == 2 * 2 * 2 * 2
    kept = json.loads(path.read_text(), parse_constant=lambda c: pytest.fail(c))
    assert kept["about"]["format"] == "statewright-eval-1" and set(kept["cells"]) == set(found)
    rows = [found[key] for key in found]
    assert [r["policy"] for r in rows] == ["none", "tova:budget=6"] * 8
    for none, tova in zip(rows[::2], rows[1::2]):
        assert none["against_none"]["mean"] == 0 and tova["model"] == none["model"]
        differences = [a - b for a, b in zip(tova["per_sample"], none["per_sample"])]
        assert tova["against_none"]["mean"] == pytest.approx(statistics.mean(differences))
        first = next(iter(none["metrics"].values()))
        assert first == pytest.approx(statistics.mean(none["per_sample"]))
        shares = next(iter(none["metrics"])) == "accuracy"
        want = estimate(none["per_sample"], shares).interval
        assert none["interval"] == pytest.approx(want)
    where = kept["about"]["runs"][rows[0]["run"]]
    assert where["command"] == "the command" and where["versions"]["torch"] == torch.__version__
    assert where["hardware"]["threads"] == 1 and len(where["git"] or "x" * 40) >= 40
    direct = evaluate(llama(), TOKENIZER, plan_of(book).tasks[0], "tova:budget=6", 3, 0)
    assert rows[1]["per_sample"] == pytest.approx(direct.per_sample)


def test_state_bytes_tokens_and_curves_are_measured(book: Path) -> None:
    rows = list(run(plan_of(book, seeds=(0,))).values())
    per_token = 2 * 2 * 8 * 4  # layers x (k, v) x head size x float32
    full, bounded, mqar = rows[0], rows[1], rows[2]
    assert full["cost"]["state_bytes"] == 59 * per_token
    model = llama()
    cache = BoundedCache(model, "tova:budget=6")
    with torch.no_grad():
        model(torch.arange(59)[None], past_key_values=cache)
    assert 6 * per_token < bounded["cost"]["state_bytes"] == cache.nbytes < 8 * per_token
    assert mqar["cost"]["state_bytes"] == 16 * per_token
    assert full["cost"]["tokens"] == 3 * 59 and mqar["cost"]["tokens"] == 3 * 16
    mingru = next(r for r in rows if r["model"] == "own")
    assert mingru["cost"]["state_bytes"] == own().init_state(1).nbytes
    for row in rows:
        cost = row["cost"]
        assert cost["tokens_per_second"] == pytest.approx(cost["tokens"] / cost["seconds"])
        assert cost["peak_memory_bytes"] > 10**7
    (curve,) = full["curves"]
    assert (curve["x_unit"], curve["y_unit"]) == ("tokens", "nats per token")
    assert curve["x"] == [float(i + 1) for i in range(59)]
    assert statistics.mean(curve["y"]) == pytest.approx(full["metrics"]["nats"])


def test_position_ranges_and_bits_by_hand() -> None:
    losses = [torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0]), torch.tensor([3.0, 5.0])]
    curve = loss_by_position(losses, points=3)
    assert curve.x == (2, 4, 5) and curve.y == (3, 6, 9)
    # 3 +- t of one degree of freedom, the standard error is 1.
    assert curve.interval == (pytest.approx((3 - 12.7062, 3 + 12.7062), abs=1e-4), None, None)
    assert bits_per_byte(losses, ["abcd\u00e9", "ab"]) == pytest.approx(33 / math.log(2) / 8)


def test_a_killed_run_goes_on_without_repeating(
    book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(plan_of(book))
    path, ran = tmp_path / "results.json", []
    real = grid_module.evaluate_batch

    def killed_at_the_sixth(model, tokenizer, task, batch, bound, *rest):
        if len(ran) == 5:
            raise KeyboardInterrupt
        ran.append(bound)
        return real(model, tokenizer, task, batch, bound, *rest)

    monkeypatch.setattr(grid_module, "evaluate_batch", killed_at_the_sixth)
    with pytest.raises(KeyboardInterrupt):
        run(plan_of(book), path)
    assert len(json.loads(path.read_text())["cells"]) == 5
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    later = []
    monkeypatch.setattr(
        grid_module, "evaluate_batch", lambda *args: later.append(args[4]) or real(*args)
    )
    found = run(plan_of(book), path)
    assert len(later) == 11 and list(found) == list(whole)
    for key in whole:
        assert found[key]["per_sample"] == pytest.approx(whole[key]["per_sample"])
        assert found[key]["against_none"] == pytest.approx(whole[key]["against_none"])
    before = path.read_bytes()
    run(plan_of(book), path)
    assert len(later) == 11 and path.read_bytes() == before
    run(plan_of(book, policies=("window:budget=6",)), path)
    assert later[11:] == ["window:budget=6"] * 8


def test_other_weights_or_data_are_other_results(book: Path, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    plan = plan_of(book, models=("llama",), seeds=(0,), policies=())
    one = run(plan, path)
    retrained = run(plan, path, {"llama": lambda: llama(seed=1)})
    book.write_text(TEXT.upper())
    rewritten = run(plan, path)
    assert len(json.loads(path.read_text())["cells"]) == 2 + 2 + 1
    keys = [next(iter(found)) for found in (one, retrained, rewritten)]
    assert len(set(keys)) == 3 and list(rewritten)[1] == list(one)[1]


def test_a_table_of_positions_ends(book: Path) -> None:
    config = GPT2Config(vocab_size=257, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config).eval()
    with pytest.raises(ValueError, match=r"60 tokens.*transformer.wpe\) ends at 32"):
        evaluate(model, TOKENIZER, f"perplexity:length=60:text={book}", n=1)
    assert evaluate(model, TOKENIZER, f"perplexity:length=30:text={book}", n=1).n == 1


def test_numbers_that_are_not_finite_stay_json(book: Path, tmp_path: Path) -> None:
    def broken():
        model = llama()
        model.lm_head.weight.data.fill_(float("nan"))
        return model

    plan = plan_of(book, models=("llama",), seeds=(0,), tasks=plan_of(book).tasks[:1])
    found = list(run(plan, tmp_path / "r.json", {"llama": broken}).values())
    json.loads((tmp_path / "r.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    assert found[1]["metrics"]["nats"] is None and found[1]["against_none"] is None


def test_the_verb(book: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, make in MODELS.items():
        make().save_pretrained(tmp_path / name)
        TOKENIZER.save_pretrained(tmp_path / name)
    story = {"question_text": "Why?", "responses": [{"response_text": "yes"}]}
    paper = {"title": "t", "abstract": "word " * 100, "full_text": []}
    answer = {"unanswerable": True}
    paper["qas"] = [{"question": "Why?", "answers": [{"answer": answer}]}]
    (tmp_path / "qasper.json").write_text(json.dumps({"1": paper}))
    (tmp_path / "bad.jsonl").write_text(json.dumps({"document": "d", "questions": [story, 3]}))
    out = tmp_path / "results.json"
    verb = ["eval", str(tmp_path / "llama"), str(tmp_path / "own"), "-n", "1"]
    verb += ["--task", f"qasper:data={tmp_path}/qasper.json:length=600:new_tokens=2"]
    verb += ["--task", "copying:length=8:tokens=2", "--policy", "window:budget=9"]
    assert main([*verb, "--output", str(out)]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("1 of 1 inputs were cut to the length") == 2
    assert "state" in shown.out and "accuracy" in shown.out and "f1" in shown.out
    assert len(json.loads(out.read_text())["cells"]) == 8
    assert main([*verb, "--json"]) == 0
    assert [r["policy"] for r in json.loads(capsys.readouterr().out)][:2] == [
        "none",
        "window:budget=9",
    ]
    bad = f"squality:data={tmp_path}/bad.jsonl"
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    for changed, said in (
        (["--task", bad], "line 1, questions[1]: expected an object, got a number"),
        (["--task", "passkye"], "did you mean 'passkey'"),
        (["--task", "mqar", "--policy", "tovva:budget=2"], "did you mean 'tova'"),
        (["--task", "mqar", "--output", str(broken)], "not JSON"),
    ):
        assert main([*verb[:2], *changed]) == (2 if "did you mean" in said else 1)
        said_now = capsys.readouterr().err
        assert said in said_now and said_now.count("\n") == 1, said_now
    assert broken.read_text() == "{"
    for empty in (dict(models=()), dict(tasks=()), dict(seeds=()), dict(num_samples=0)):
        with pytest.raises(ValueError, match="expected at least"):
            plan_of(book, **empty)


def test_without_lm_eval_the_extra_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    llama().save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    capsys.readouterr()
    verb = ["lm-eval", "--model", str(tmp_path), "--policy", "tova:budget=4", "--tasks", "piqa"]
    assert main(verb) == 1
    said = capsys.readouterr().err
    assert "pip install 'statewright[lm-eval]'" in said and said.count("\n") == 1
