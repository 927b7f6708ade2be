"""Two processes equal one: rows, shards and tokens divided, other counts resumed, failures told."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_train import TOKENIZER

import statewright
from statewright.laws import TOLERANCES, error
from statewright.models import StatewrightConfig, StatewrightForCausalLM
from statewright.train.checkpoint import checkpoints
from statewright.train.config import TrainConfig
from statewright.train.context_parallel import ContextModel
from statewright.train.data import corpus_of
from statewright.train.distributed import TrainingStopped, World
from statewright.train.loop import Run

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="gloo is not built in")

DOCUMENTS = [f"document {n}: " + f"{n} and {n + 1}, then " * (3 + 5 * n) for n in range(8)]
MIXERS = ["mamba2:state_size=4:head_dim=8", "mingru:expansion=2"]
STEPS = 20
# Adam divides by the gradient's own size: a rounding error counts for more than in one call.
AFTER_ADAM = 100


def make_run(
    directory: Path, dtype: torch.dtype = torch.float64, more: dict | None = None, **options: Any
) -> Run:
    """Four lanes of documents that begin within them; a checkpoint at the tenth step."""
    torch.manual_seed(3)
    config = StatewrightConfig(hidden_size=16, num_hidden_layers=2, mixer=MIXERS, conv_kernel=3)
    model = StatewrightForCausalLM(config).to(dtype)
    whole = dict(num_steps=STEPS, num_lanes=4, length=16, num_warmup_steps=4, learning_rate=3e-3)
    often = dict(eval_every=STEPS, save_every=10, num_checkpoints=3)
    config = TrainConfig(**{**whole, **often, **options, **(more or {})})
    train, valid = corpus_of([[d] for d in DOCUMENTS], TOKENIZER).split(0.1)
    return Run(model, TOKENIZER, train, valid, config, directory)


def child(work: Callable[[Path], None], root: Path, rank: int) -> None:
    try:
        store = f"file://{root}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
        work(root)
        dist.destroy_process_group()
    except Exception:
        (root / f"error-{rank}").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)


def in_two(work: Callable[[Path], None], root: Path) -> list[int]:
    """Run `work` in two processes; how they ended."""
    fork = multiprocessing.get_context("fork")
    root.mkdir(parents=True, exist_ok=True)
    children = [fork.Process(target=child, args=(work, root, rank)) for rank in range(2)]
    for process in children:
        process.start()
    for process in children:
        process.join(timeout=400)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in children]


KINDS: dict[str, dict[str, Any]] = {
    "rows": {"num_accumulation": 2},
    "sharded": {"parallel": "sharded"},
    "context": {"parallel": "context", "checkpointing": True},
}


def config_of(options: dict[str, Any]) -> dict[str, Any]:
    """The same training in one process."""
    return {k: v for k, v in options.items() if k not in ("parallel", "num_accumulation")}


def start_bfloat16(directory: Path, parallel: str) -> Run:
    options = {"dtype": "bfloat16", "checkpointing": True, "parallel": parallel}
    return make_run(directory, torch.float32, options)


def battery(root: Path) -> None:
    for kind, options in KINDS.items():
        make_run(root / kind, **options).train()
    run = start_bfloat16(root / "bf16", "sharded")
    run.train()
    dtypes = {str(t.dtype) for _, t in run.state.items()}
    (root / f"dtypes-{dist.get_rank()}").write_text(" ".join(sorted(dtypes)))
    resumed = make_run(root / "one then two", parallel="sharded")
    resumed.resume()
    resumed.train()
    part = slice(dist.get_rank() * LENGTH // 2, (dist.get_rank() + 1) * LENGTH // 2)
    for name in DIVIDED:
        torch.save(read_divided(name, part), root / f"{name}-{dist.get_rank()}")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that two processes do without failing, in one go: forking is cheap, torch not."""
    root = tmp_path_factory.mktemp("two")
    stop_after(make_run(root / "one then two"), 10)
    ends = in_two(battery, root)
    told = [path.read_text() for path in root.glob("error-*")]
    assert ends == [0, 0], "\n".join(told)
    return root


def stop_after(run: Run, steps: int) -> None:
    class Stop(Exception):
        pass

    def listen(event: dict[str, Any]) -> None:
        if (event["event"], event["step"]) == ("step", steps + 1):
            raise Stop

    run.listen = listen
    with pytest.raises(Stop):
        run.train()


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return statewright.load(directory).state_dict()


def logged(directory: Path, name: str) -> list[float]:
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if line["event"] == "step"]


def assert_close(two: Path, one: Path, tolerance: float) -> None:
    ours, theirs = weights(two), weights(one)
    assert ours.keys() == theirs.keys()
    worst = max(error(ours[name].double(), theirs[name].double()) for name in ours)
    assert worst < tolerance
    # AdamW hides a gradient's scale; its norm does not.
    for name in ("loss", "gradient_norm"):
        assert logged(two, name) == pytest.approx(logged(one, name), rel=tolerance)
    assert len(logged(two, "loss")) == STEPS


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(both: Path, kind: str, tmp_path: Path) -> None:
    """After 20 steps of AdamW with carried states, resets and a learned initial state."""
    make_run(tmp_path, **config_of(KINDS[kind])).train()
    assert_close(both / kind, tmp_path, AFTER_ADAM * TOLERANCES[torch.float64, "torch"])


def in_float32(root: Path) -> None:
    make_run(root / "two", torch.float32, parallel="sharded").train()


@pytest.mark.slow
def test_sharded_float32_equals_one(tmp_path: Path) -> None:
    assert in_two(in_float32, tmp_path) == [0, 0]
    make_run(tmp_path / "one", torch.float32).train()
    tolerance = AFTER_ADAM * TOLERANCES[torch.float32, "torch"]
    assert_close(tmp_path / "two", tmp_path / "one", tolerance)


def test_sharded_bfloat16_equals_one(both: Path, tmp_path: Path) -> None:
    """With checkpointing; the states that pass through FSDP's forward stay float32."""
    start_bfloat16(tmp_path, "rows").train()
    assert_close(both / "bf16", tmp_path, TOLERANCES[torch.bfloat16, "torch"])
    for rank in range(2):
        assert (both / f"dtypes-{rank}").read_text() == "torch.float32 torch.int64"


@pytest.mark.parametrize("kind", ["rows", "sharded", "context"])
def test_two_then_one(both: Path, kind: str, tmp_path: Path) -> None:
    """A checkpoint of two processes goes on in one: same data, same state, same optimizer."""
    copytree(both / kind / "checkpoint-10", tmp_path / "run" / "checkpoint-10")
    lines = (both / kind / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(lines))
    run = make_run(tmp_path / "run", parallel=KINDS[kind].get("parallel", "rows"))
    run.resume()
    assert run.step == 10 and run.state.batch_size == 4
    run.train()
    make_run(tmp_path / "whole").train()
    assert_close(
        tmp_path / "run", tmp_path / "whole", AFTER_ADAM * TOLERANCES[torch.float64, "torch"]
    )


def test_one_then_two(both: Path, tmp_path: Path) -> None:
    make_run(tmp_path).train()
    assert_close(both / "one then two", tmp_path, AFTER_ADAM * TOLERANCES[torch.float64, "torch"])


DIVIDED = {
    "mingru": "mingru:form=vanilla",
    "minlstm": "minlstm",
    "mamba2": "mamba2:state_size=4:head_dim=8:num_groups=2",
    "mamba": "mamba:state_size=4",
    "gla": "gla:num_heads=2",
}
LENGTH = 26


def read_divided(name: str, part: slice) -> dict[str, Any]:
    """What a model makes of its part of two sequences, and every gradient of its own losses.

    Resets lie everywhere around the cut at 13, in the reach of the convolutions' taps and before.
    """
    torch.manual_seed(5)
    options = dict(hidden_size=16, num_hidden_layers=2, conv_kernel=4, vocab_size=31)
    model = StatewrightForCausalLM(StatewrightConfig(mixer=DIVIDED[name], **options)).double()
    state = model.random_state(4, torch.Generator().manual_seed(1))
    state = state.map(lambda t: t.requires_grad_() if t.is_floating_point() else t)
    ids = torch.randint(31, (4, LENGTH), generator=torch.Generator().manual_seed(2))
    reset = torch.zeros(4, LENGTH, dtype=torch.bool)
    for row, column in [(1, 13), (1, 5), (2, 11), (2, 12), (3, 14), (3, 25)]:
        reset[row, column] = True
    called = ContextModel(model) if dist.is_initialized() else model
    first = called(ids[:, part], state=state, reset=reset[:, part])
    # Once more, from the state after both parts: gradients also come back through it.
    second = called(ids[:, part], state=first.state, reset=None)
    targets = ids.roll(1, 1)[:, part].flatten()
    logits = [out.logits.flatten(0, 1) for out in (first, second)]
    loss = sum(F.cross_entropy(each, targets, reduction="sum") for each in logits)
    leaves = [t for _, t in state.items() if t.requires_grad] + list(model.parameters())
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return {
        "logits": torch.stack([out.logits for out in (first, second)]).detach(),
        "state": {n: t.detach() for n, t in second.state.items()},
        "gradients": gradients,
    }


@pytest.mark.parametrize("name", DIVIDED)
def test_one_sequence_over_two_processes(both: Path, name: str) -> None:
    """Outputs, the state (taps and `seen` too) and all gradients, that of the state included."""
    parts = [torch.load(both / f"{name}-{rank}") for rank in range(2)]
    whole = read_divided(name, slice(None))
    logits = torch.cat([part["logits"] for part in parts], 2)
    assert error(logits, whole["logits"]) < 1e-12
    for part in parts:
        assert part["state"].keys() == whole["state"].keys()
        for key, want in whole["state"].items():
            assert error(part["state"][key], want) < 1e-12, key
    summed = [a + b for a, b in zip(*(part["gradients"] for part in parts))]
    assert sum(bool(want.any()) for want in whole["gradients"]) > 10
    for got, want in zip(summed, whole["gradients"], strict=True):
        assert error(got, want) < 1e-11


def test_what_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    config = StatewrightConfig(hidden_size=16, num_hidden_layers=2, mixer=["mingru", "lstm"])
    with pytest.raises(ValueError, match="layer 1 is LSTM"):
        ContextModel(StatewrightForCausalLM(config))
    for wrong in ({"policy": "statenorm:limit=2.0"}, {"train_only": "state", "initial": "zero"}):
        with pytest.raises(ValueError, match="context"):
            TrainConfig(parallel="context", **wrong)
    with pytest.raises(ValueError, match="do not divide num_lanes=5"):
        World(0, 2).share(5, "num_lanes")


def fails_at(step: int, how: Callable[[], None]) -> Callable[[Path], None]:
    """Process 1 fails in the middle of a step."""

    def work(root: Path) -> None:
        run = make_run(root, save_every=3)
        backward = run._backward

        def failing() -> Any:
            if run.step == step and dist.get_rank() == 1:
                how()
            return backward()

        run._backward = failing
        try:
            run.train()
        except TrainingStopped as stop:
            (root / "told").write_text(str(stop))

    return work


def out_of_memory() -> None:
    raise MemoryError("no memory left for a batch")


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("how", [out_of_memory, killed])
def test_a_process_that_dies_stops_the_other(how: Callable[[], None], tmp_path: Path) -> None:
    ends = in_two(fails_at(7, how), tmp_path)
    assert ends[0] == 0 and ends[1] != 0
    told = (tmp_path / "told").read_text()
    reason = "process 1 of 2 failed: no memory left" if how is out_of_memory else "without a"
    assert reason in told and "checkpoint-6" in told and "\n" not in told
    assert [c.step for c in checkpoints(tmp_path)] == [3, 6]
    run = make_run(tmp_path)
    run.resume()
    run.train()
    assert run.step == STEPS
