"""Training: it learns, resumes bit for bit, stops in time, and never loses a checkpoint."""

from __future__ import annotations

import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

import statewright
from statewright.models import StatewrightConfig, StatewrightForCausalLM
from statewright.models.tokenizers import byte_tokenizer
from statewright.train.checkpoint import checkpoints
from statewright.train.config import TrainConfig
from statewright.train.data import corpus_of
from statewright.train.evaluate import held_out
from statewright.train.loop import Run, TrainingInterrupted, TrainingStopped, make_optimizer

TOKENIZER = byte_tokenizer()
DOCUMENTS = [f"document {n}: " + f"{n} and {n + 1}, then " * (3 + 5 * n) for n in range(8)]
TIMES = ("seconds", "tokens_per_second")


def make_model(mixer: str | list[str] = "mingru", **options: Any) -> StatewrightForCausalLM:
    torch.manual_seed(3)
    options = {"dropout": 0.1, "conv_kernel": 3, **options}
    config = StatewrightConfig(hidden_size=16, num_hidden_layers=2, mixer=mixer, **options)
    return StatewrightForCausalLM(config)


def make_run(directory: Path, mixer: str = "mingru", documents=DOCUMENTS, **options: Any) -> Run:
    """A run of 13 steps; evaluation every 4 and checkpoints every 3 steps divide neither."""
    model, listen = options.pop("model", None), options.pop("listen", lambda event: None)
    steps = dict(num_steps=13, eval_every=4, save_every=3, num_warmup_steps=4)
    lanes = dict(num_lanes=3, length=24, learning_rate=1e-2)
    config = TrainConfig(**{**steps, **lanes, **options})
    train, valid = corpus_of([[d] for d in documents], TOKENIZER).split(0.1)
    return Run(
        model or make_model(mixer), TOKENIZER, train, valid, config, directory, listen=listen
    )


def metrics(directory: Path) -> list[dict]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def everything(run: Run) -> dict[str, Any]:
    """Weights, optimizer, carried state and what was logged: all that must be equal."""
    found: dict[str, Any] = {f"weight {n}": t for n, t in run.model.state_dict().items()}
    for name, parameter in run.model.named_parameters():
        found |= {f"{kind} {name}": t for kind, t in run.optimizer.state[parameter].items()}
    found |= {f"state {n}": t for n, t in run.state.items()}
    return found | {"metrics": metrics(run.directory)}


def assert_same(run: Run, other: Run) -> None:
    a, b = everything(run), everything(other)
    assert a.keys() == b.keys()
    different = [n for n in a if not (torch.equal(a[n], b[n]) if n != "metrics" else a[n] == b[n])]
    assert different == []


class Stop(Exception):
    """Stands for a kill: nothing of the run is saved from here on."""


def stop_at(step: int, event: str = "step", how=None):
    def listen(entry: dict) -> None:
        if (entry["event"], entry["step"]) == (event, step):
            if how is None:
                raise Stop
            how()

    return listen


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny tensors on several threads take ten times as long while other tests run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(one_thread, tmp_path_factory) -> dict[str, Run]:
    """Uninterrupted runs."""
    runs = {}
    for mixer in ("mingru", "lstm"):
        runs[mixer] = make_run(tmp_path_factory.mktemp(mixer), mixer)
        runs[mixer].train()
    return runs


def test_loss_falls(tmp_path: Path) -> None:
    run = make_run(tmp_path, num_steps=60, eval_every=60, save_every=60, model=make_model())
    run.train()
    losses = [m["loss"] for m in metrics(tmp_path) if m["event"] == "step"]
    assert len(losses) == 60
    assert abs(losses[0] - math.log(257)) < 0.5
    assert sum(losses[-5:]) / 5 < 2.5 and run.valid.nats < 2.5
    assert run.valid.bits_per_byte == pytest.approx(run.valid.nats / math.log(2), rel=0.02)


@pytest.mark.parametrize("mixer", ["mingru", "lstm"])
@pytest.mark.parametrize("stop", [(4, "step"), (8, "held_out"), (9, "step"), (13, "held_out")])
def test_killed_and_resumed_equals_whole(whole, mixer: str, stop, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        make_run(tmp_path, mixer, listen=stop_at(*stop)).train()
    run = make_run(tmp_path, mixer, model=make_model(mixer, dropout=0.1))
    run.resume()
    assert run.step == (stop[0] - 1) // 3 * 3
    torch.manual_seed(99)
    run.train()
    assert_same(run, whole[mixer])


def test_resumed_again_and_again_equals_whole(whole, tmp_path: Path) -> None:
    with pytest.raises(TrainingInterrupted):
        make_run(tmp_path, listen=stop_at(1, how=ctrl_c)).train()
    for step in (2, 3, 7, 8, 12, 13):
        run = make_run(tmp_path, listen=stop_at(step, how=ctrl_c))
        run.resume()
        assert run.step == checkpoints(tmp_path)[-1].step < step
        with pytest.raises(TrainingInterrupted):
            run.train()
    run = make_run(tmp_path)
    run.resume()
    run.train()
    assert_same(run, whole["mingru"])


@pytest.mark.parametrize("stop", [(5, "step"), (8, "step"), (8, "held_out")])
def test_ctrl_c_saves_and_continues(whole, stop, tmp_path: Path) -> None:
    """Also at a step whose evaluation is due: it is logged once, as without Ctrl-C."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingInterrupted, match=f"after step {stop[0]}; saved") as caught:
        make_run(tmp_path, listen=stop_at(*stop, how=ctrl_c)).train()
    assert signal.getsignal(signal.SIGINT) is before
    assert caught.value.checkpoint.path == tmp_path / f"checkpoint-{stop[0]}"
    run = make_run(tmp_path)
    run.resume()
    run.train()
    assert_same(run, whole["mingru"])


def test_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    def twice() -> None:
        ctrl_c()
        ctrl_c()

    with pytest.raises(KeyboardInterrupt):
        make_run(tmp_path, listen=stop_at(5, how=twice)).train()
    assert [c.step for c in checkpoints(tmp_path)] == [3]


def test_resuming_a_finished_run_changes_nothing(whole, tmp_path: Path) -> None:
    shutil.copytree(whole["mingru"].directory, tmp_path / "run")
    run = make_run(tmp_path / "run")
    run.resume()
    run.train()
    assert_same(run, whole["mingru"])


def test_what_is_published(whole) -> None:
    run = whole["mingru"]
    model = statewright.load(run.directory)
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert AutoTokenizer.from_pretrained(run.directory).get_vocab() == TOKENIZER.get_vocab()
    assert [c.step for c in checkpoints(run.directory)] == [12, 13]
    assert list(run.directory.glob(".*")) == []
    assert not (run.directory / "run.json").exists()


@pytest.mark.parametrize("keep", [1, 3])
def test_rotation(keep: int, tmp_path: Path) -> None:
    litter = tmp_path / ".checkpoint-1.writing"
    litter.mkdir(parents=True)
    most = []
    run = make_run(tmp_path, save_every=1, num_checkpoints=keep)
    run.listen = lambda event: most.append(len(checkpoints(tmp_path)))
    run.train()
    assert [c.step for c in checkpoints(tmp_path)] == list(range(14 - keep, 14))
    assert max(most) == keep and not litter.exists()


def test_resume_needs_the_same_text(tmp_path: Path) -> None:
    make_run(tmp_path, num_steps=2).train()
    with pytest.raises(ValueError, match="other text"):
        make_run(tmp_path, documents=[d.replace("3", "4") for d in DOCUMENTS]).resume()
    with pytest.raises(ValueError, match="no checkpoint"):
        make_run(tmp_path / "elsewhere").resume()


def poison(run: Run) -> Any:
    """From step 8 on the weights hold a NaN."""

    def listen(event: dict) -> None:
        if event["step"] == 7:
            run.model.lm_head.weight.data[0, 0] = math.nan

    return listen


@pytest.mark.parametrize("kind", ["rate", "weights"])
def test_a_loss_that_is_not_finite_stops(kind: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, **({"learning_rate": 1e30} if kind == "rate" else {}))
    if kind == "weights":
        run.listen = poison(run)
        run.config = TrainConfig(num_steps=13, num_lanes=3, length=24, save_every=3)
    with pytest.raises(TrainingStopped, match="lower the learning rate") as caught:
        run.train()
    assert "\n" not in str(caught.value)
    if kind == "rate":
        assert "nothing was saved" in str(caught.value)
        return
    assert "checkpoint-6" in str(caught.value)
    found = checkpoints(tmp_path)
    assert [c.step for c in found] == [3, 6]
    weights = statewright.load(found[-1].path).state_dict()
    assert all(torch.isfinite(t).all() for t in weights.values())
    again = make_run(tmp_path)
    again.resume()
    again.train()
    assert again.step == 13


def test_a_stopped_run_leaves_no_metrics_to_the_next(tmp_path: Path) -> None:
    with pytest.raises(TrainingStopped):
        make_run(tmp_path, learning_rate=1e30).train()
    make_run(tmp_path, num_steps=2).train()
    assert [m["step"] for m in metrics(tmp_path) if m["event"] == "step"] == [1, 2]


def test_state_is_carried_detached_and_reset(tmp_path: Path) -> None:
    """A step's loss is that of the row's own document, read from its beginning."""
    run = make_run(tmp_path, model=make_model(dropout=0.0), learning_rate=1e-12)
    run.train()
    assert not any(t.requires_grad for _, t in run.state.items())
    assert (run.state.seen > 24).any()
    run.model.eval()
    steps = [m for m in metrics(tmp_path) if m["event"] == "step"]
    for entry in steps[: run.lanes.steps_per_pass]:
        total, count = 0.0, 0
        for row in range(3):
            for nats in row_losses(run, row, entry["step"] - 1):
                total, count = total + nats, count + 1
        assert entry["loss"] == pytest.approx(total / count, abs=2e-4)


def row_losses(run: Run, row: int, step: int) -> list[float]:
    """Losses of a row's targets in one step, every document read alone from where it begins."""
    batches = [run.lanes.batch(i) for i in range(step + 1)]
    ids, labels, reset = (
        torch.cat([getattr(b, n)[row] for b in batches]) for n in ("ids", "labels", "reset")
    )
    losses = torch.zeros(len(ids))
    edges = [*reset.nonzero()[:, 0].tolist(), len(ids)]
    for begin, end in zip(edges, edges[1:]):
        logits = run.model(ids[None, begin:end]).logits[0]
        losses[begin:end] = F.cross_entropy(logits, labels[begin:end], reduction="none")
    kept = (labels != -100) & (torch.arange(len(ids)) >= step * run.config.length)
    return losses[kept].tolist()


def test_bfloat16_is_close(whole, tmp_path: Path) -> None:
    run = make_run(tmp_path, dtype="bfloat16")
    run.train()
    pairs = list(zip(metrics(tmp_path), metrics(whole["mingru"].directory)))
    losses = [(a["loss"], b["loss"]) for a, b in pairs if a["event"] == "step"]
    assert any(a != b for a, b in losses)
    assert all(a == pytest.approx(b, rel=0.02) for a, b in losses)
    dtypes = {t.dtype for t in run.model.parameters()} | {t.dtype for _, t in run.state.items()}
    assert dtypes == {torch.float32, torch.int64}


@pytest.mark.parametrize("length, rows", [(256, 1), (7, 16)])
def test_held_out_is_the_loss_of_the_text(length: int, rows: int) -> None:
    """With one row the mean over every document; with several, of as many fresh starts."""
    model = make_model("lstm").train()
    corpus = corpus_of([[d] for d in DOCUMENTS], TOKENIZER)
    found = held_out(model, corpus, length)
    assert model.training
    model.eval()
    stretch = -(-(corpus.num_tokens - 1) // rows)
    starts = sorted({*corpus.starts.tolist(), *range(0, corpus.num_tokens - 1, stretch)})
    ids = torch.from_numpy(corpus.tokens.astype("int64"))
    total, count = 0.0, 0
    for begin, end in zip(starts, [*starts[1:], corpus.num_tokens]):
        inner = begin if end in corpus.starts or end == corpus.num_tokens else -1
        stop = end if inner >= 0 else end + 1
        logits = model(ids[None, begin : stop - 1]).logits[0]
        losses = F.cross_entropy(logits, ids[begin + 1 : stop], reduction="sum")
        total, count = total + losses.item(), count + stop - 1 - begin
    assert found.num_tokens == count == corpus.num_tokens - len(DOCUMENTS)
    assert found.nats == pytest.approx(total / count, rel=1e-5)
    per_byte = total / count * corpus.num_tokens / corpus.num_bytes / math.log(2)
    assert found.bits_per_byte == pytest.approx(per_byte, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.nats))


def test_weight_decay_is_for_matrices() -> None:
    model = make_model(["mingru:expansion=2", "lstm"])
    optimizer = make_optimizer(model, TrainConfig(weight_decay=0.3))
    names = {p: n for n, p in model.named_parameters()}
    decayed, plain = ([names[p] for p in g["params"]] for g in optimizer.param_groups)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.0]
    assert sorted(decayed + plain) == sorted(names.values())
    assert all("weight" in n and "norm" not in n and "embeddings" not in n for n in decayed)
    assert any("init_param" in n for n in plain) and "model.embeddings.weight" in plain
    assert all(("bias" in n) or ("norm" in n) or ("embed" in n) or ("init" in n) for n in plain)


def test_rate() -> None:
    config = TrainConfig(num_steps=100, num_warmup_steps=10, learning_rate=2.0, final_rate=0.1)
    rates = [config.rate(step) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0 and rates[55] == pytest.approx(1.1) and rates[100] == pytest.approx(0.2)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))
    constant = TrainConfig(num_warmup_steps=0, schedule="constant", learning_rate=2.0)
    assert {constant.rate(step) for step in range(2000)} == {2.0}


WRONG = [
    ("num_steps", 0), ("num_lanes", 0), ("length", -1), ("eval_every", 0), ("save_every", 0),
    ("num_checkpoints", 0), ("learning_rate", math.nan), ("learning_rate", 0.0), ("clip", 0.0),
    ("learning_rate", math.inf), ("final_rate", 1.5), ("num_warmup_steps", -1),
    ("weight_decay", -0.1), ("dtype", "float16"), ("schedule", "linear"),
]  # fmt: skip


@pytest.mark.parametrize("name, value", WRONG)
def test_wrong_options(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        TrainConfig(**{name: value})
