"""Streams, samples that share a call, and what is said of bad input."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)
from writers import TOKENIZER, Writer

from statewright.bench import evaluation
from statewright.cli import main
from statewright.evaluation import Plan, evaluate, evaluate_batch, run_plan, score, token_losses
from statewright.evaluation.answers import Manner, answers, rows_of, takes_padding, until_end
from statewright.models import StatewrightConfig, StatewrightForCausalLM
from statewright.tasks import TASKS, build_task, digest
from statewright.tasks.base import Batch, Sample

torch.set_num_threads(1)
HAY = "It rains. The sun is out. We go home."
TEXT = topics["assignment"]


def llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = dict(hidden_size=16, num_attention_heads=2, intermediate_size=24)
    config = LlamaConfig(vocab_size=257, num_hidden_layers=2, num_key_value_heads=1, **sizes)
    for name, value in changes.items():
        setattr(config, name, value)
    return LlamaForCausalLM(config).eval()


def own(mixer: str = "mingru") -> StatewrightForCausalLM:
    torch.manual_seed(0)
    config = StatewrightConfig(hidden_size=16, num_hidden_layers=2, mixer=mixer, vocab_size=257)
    return StatewrightForCausalLM(config).eval()


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(TEXT[:700], encoding="utf-8")
    return path


@pytest.mark.parametrize("policy", ["none", "tova:budget=12", "context:length=40"])
def test_a_stream_carries_what_it_keeps_over_the_whole_text(policy: str, book: Path) -> None:
    task, model = build_task(f"stream:text={book}"), llama()
    batch = task.draw(7, 3, TOKENIZER)
    assert len(batch.samples) == 1 and digest(batch) == digest(task.draw(1, 0, TOKENIZER))
    ids = batch.samples[0].input_ids
    assert TOKENIZER.decode(ids) == TEXT[:700]
    result = evaluate(model, TOKENIZER, task, policy, n=7, seed=3)
    if policy.startswith("context"):
        rows = [ids[max(0, t - (t - 1) % 40 - 1) : t + 1] for t in range(1, len(ids))]
        steps = [token_losses(model, row[None])[0, -1] for row in rows[:130]]
        got = result.curves[0].y[: len(steps) // 11]
        want = torch.stack(steps).split(11)
        assert got == pytest.approx([float(part.mean()) for part in want[: len(got)]], rel=1e-4)
        return
    whole = token_losses(model, ids[None], policy, piece=64)[0]
    assert result.metrics["nats"] == pytest.approx(float(whole.mean()), rel=1e-5)
    assert result.metrics["perplexity"] == pytest.approx(float(whole.mean().exp()), rel=1e-5)
    bits = float(whole.sum()) / math.log(2) / len(TEXT[1:700].encode())
    assert result.metrics["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    windows = evaluate(model, TOKENIZER, f"perplexity:length=100:text={book}", policy, n=7)
    assert windows.metrics["nats"] != pytest.approx(result.metrics["nats"], abs=1e-4)


def test_a_stream_through_a_recurrent_model_is_one_state(book: Path) -> None:
    model, task = own(), build_task(f"stream:text={book}:offset=50:length=300")
    sample = task.draw(1, 0, TOKENIZER).samples[0]
    assert TOKENIZER.decode(sample.input_ids) == TEXT[50:350] and sample.cut == 700 - 350
    state, losses = model.init_state(1), []
    with torch.no_grad():
        for t in range(299):
            logits, state = model.step(sample.input_ids[t : t + 1], state)
            losses.append(-logits.log_softmax(-1)[0, sample.input_ids[t + 1]])
    result = evaluate(model, TOKENIZER, task)
    assert result.metrics["nats"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    assert result.truncated == {"samples": 1, "tokens": 350}


MIXED = Batch(
    tuple(
        Sample(torch.randint(97, 122, (n,), generator=torch.Generator().manual_seed(i)), "a")
        for i, n in enumerate([9, 12, 9, 9, 12, 5])
    ),
    6,
)


@pytest.mark.parametrize("policy", ["none", "tova:budget=4"])
@pytest.mark.parametrize("make", [llama, lambda: own("attention:num_heads=2"), own])
def test_rows_that_share_a_call_do_not_meet(make, policy: str) -> None:
    """Texts, losses and targets, with rows of three lengths, in the order of the samples."""
    model = make()
    losses = Batch(tuple(Sample(s.input_ids) for s in MIXED.samples))
    scored = Batch(tuple(Sample(s.input_ids, targets=s.input_ids) for s in MIXED.samples))
    for batch in (MIXED, losses, scored):
        one, two, many = (
            answers(
                model, TOKENIZER, batch, Manner(policy, rows=rows, padded=rows != 1), batch is MIXED
            )
            for rows in (1, 2, 0)
        )
        for a, b, c in zip(one, two, many, strict=True):
            assert a.text == b.text == c.text and a.tokens == c.tokens and a.value == c.value
            if a.losses is not None:
                torch.testing.assert_close(a.losses, b.losses)
                torch.testing.assert_close(a.losses, c.losses)
    assert len(answers(model, TOKENIZER, MIXED, Manner(rows=0))) == 6
    with pytest.raises(ValueError, match="rows=-1, expected"):
        answers(model, TOKENIZER, MIXED, Manner(rows=-1))


def test_who_may_be_padded_is_measured() -> None:
    assert takes_padding(llama()) and takes_padding(own()) and not takes_padding(Writer(str))
    config = MambaConfig(vocab_size=257, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = MambaForCausalLM(config).eval()
    assert not takes_padding(model)
    batch, calls = Batch(MIXED.samples, 3), []

    def note(module, args, kwargs) -> None:
        if "input_ids" in kwargs:
            calls.append(len(kwargs["input_ids"]))

    model.register_forward_pre_hook(note, with_kwargs=True)
    result = evaluate_batch(model, TOKENIZER, build_task("passkey"), batch, rows=0)
    assert result.cost.tokens == sum(len(s.input_ids) + 2 for s in batch.samples)
    assert sorted(calls) == [1] * 3 + [2] * 3 + [3] * 3, "rows of one length, and no others"


def test_calls_are_as_large_as_they_may_be() -> None:
    writer = Writer(lambda text: "a")
    evaluate(writer, TOKENIZER, "passkey:length=500", n=6, rows=0)
    assert writer.calls == 1
    assert rows_of(writer, 1 << 14) == 1 and rows_of(writer, 128) == 128
    wide = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=1 << 16))
    assert rows_of(SimpleNamespace(config=wide), 256) == 4


def test_a_text_ends_at_its_end() -> None:
    assert until_end(torch.tensor([5, 6, 2, 7, 2]), {2, 3}).tolist() == [5, 6]
    assert until_end(torch.tensor([5, 6]), set()).tolist() == [5, 6]
    writer = Writer(lambda text: "one\x02 two" if len(text) == 9 else "one two\x03")
    batch = Batch(MIXED.samples[:2], 12)
    free = answers(writer, TOKENIZER, batch, Manner(rows=0), textual=True)
    assert [a.tokens for a in free] == [8, 8]
    for ends, wanted in (([2, 3], ["one", "one two"]), (3, ["one\x02 two", "one two"])):
        writer.generation_config = SimpleNamespace(eos_token_id=ends)
        ended = answers(writer, TOKENIZER, batch, Manner(rows=0), textual=True)
        assert [a.text for a in ended] == wanted
        assert [a.tokens for a in ended] == [len(text) for text in wanted]


def test_the_state_is_measured_per_row(book: Path) -> None:
    task = build_task("mqar:pairs=2:length=16")
    batch = task.draw(5, 0, TOKENIZER)
    one, many = (
        evaluate_batch(llama(), TOKENIZER, task, batch, "window:budget=5", rows=r) for r in (1, 0)
    )
    assert one.cost.state_bytes == many.cost.state_bytes > 0 and many.cost.tokens == 5 * 16


def test_what_is_wrong_is_said_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    empty, binary = tmp_path / "empty.jsonl", tmp_path / "binary.txt"
    few, letter = tmp_path / "few.jsonl", tmp_path / "letter.txt"
    empty.write_text("\n")
    few.write_text('{"document": "a", "questions": []}')
    letter.write_text("a")
    binary.write_bytes(b"\xff\xfe\x00")
    llama().save_pretrained(tmp_path / "m")
    TOKENIZER.save_pretrained(tmp_path / "m")
    config = GPT2Config(vocab_size=257, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    TOKENIZER.save_pretrained(tmp_path / "gpt2")
    capsys.readouterr()
    for model, task, said in (
        ("m", f"squality:data={empty}", "empty.jsonl: the file is empty"),
        ("m", f"squality:data={few}", "n=1 questions asked for, the file has 0"),
        ("m", f"perplexity:text={binary}", "binary.txt: UTF-16 text, expected UTF-8"),
        ("m", f"stream:text={binary}", "binary.txt: UTF-16 text, expected UTF-8"),
        ("m", "stream", "text='' is not a file: stream:text=PATH"),
        (
            "m",
            f"stream:length=9:text={letter}",
            "has 1 tokens after the first 0, expected at least",
        ),
        ("m", "stream:length=-1", "length=-1, offset=0; expected"),
        ("m", f"niah:text={tmp_path}", "is not a file: niah:text=PATH"),
        ("m", f"stories:prompts={empty}", "empty.jsonl: the file is empty"),
        ("m", "stories:style=chat", "no chat template"),
        ("m", "stories:new_tokens=0", "new_tokens=0, temperature=0.0; expected"),
        ("m", "storys", "did you mean 'stories'"),
        ("gpt2", "mqar:pairs=4:length=64", "64 tokens, answer included"),
    ):
        code = 2 if "did you mean" in said else 1
        assert main(["eval", str(tmp_path / model), "--task", task, "-n", "1"]) == code
        told = capsys.readouterr().err
        assert said in told and told.count("\n") == 1, told
    with pytest.raises(ValueError, match="stories: n=21 asked for, there are 20 premises"):
        build_task("stories").draw(21, 0, TOKENIZER)
    with pytest.raises(ValueError, match="has no samples, expected at least 1"):
        evaluate_batch(llama(), TOKENIZER, build_task("mqar"), Batch(()))
    with pytest.raises(ValueError, match="unknown metric 'storie'"):
        score("storie", ["a"], [["b"]])


def test_five_tasks_take_seconds() -> None:
    """The smoke run: five tasks, with a policy beside, on a small model."""
    tasks = ("passkey:length=500", "mqar:pairs=4:length=32", "copying:length=16:tokens=4")
    tasks += (f"niah:length=700:values=2:hay={HAY}", "stories:new_tokens=8:style=plain")
    plan = Plan(("small",), tasks, ("tova:budget=64",), num_samples=4)
    began = time.perf_counter()
    found = dict(run_plan(plan, lambda name: (llama(), TOKENIZER)))
    assert len(found) == 10 and time.perf_counter() - began < 60
    assert {r["task"].partition(":")[0] for r in found.values()} <= set(TASKS)


def test_weights_of_another_type_are_another_result(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    llama().save_pretrained(tmp_path / "m")
    TOKENIZER.save_pretrained(tmp_path / "m")
    out = tmp_path / "r.json"
    verb = ["eval", str(tmp_path / "m"), "--task", "mqar:pairs=2:length=16", "-n", "2"]
    for dtype in ("float32", "bfloat16"):
        assert main([*verb, "--output", str(out), "--dtype", dtype]) == 0
    cells = list(json.loads(out.read_text())["cells"].values())
    full, half = (cell["cost"]["state_bytes"] for cell in cells)
    assert len(cells) == 2 and full == 2 * half
    assert main([*verb, "--dtype", "int3"]) != 0 and "int3" in capsys.readouterr().err


@pytest.mark.parametrize(
    "make",
    [
        lambda: evaluation.recall("mingru", 2),
        lambda: evaluation.losses(1, 1),
        lambda: evaluation.answers(1, 2),
    ],
)
def test_the_benchmark_passes_its_gate(make) -> None:
    case = make()
    case.check()
    assert case.floor in case.methods and evaluation.OURS in case.tolerance
