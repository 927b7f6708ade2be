"""What surrounds training: torch.compile, activation checkpointing, Trainer and DDP."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from statewright import laws
from statewright.mixers import build_mixer
from statewright.models import StatewrightConfig, StatewrightForCausalLM

V, D, B, T = 13, 8, 2, 11
HYBRID = ["mingru", "minlstm:expansion=2"]


def build(dtype=torch.float64, mixer=HYBRID, **options) -> StatewrightForCausalLM:
    config = StatewrightConfig(
        vocab_size=V, hidden_size=D, num_hidden_layers=2, mlp_ratio=2.0, mixer=mixer, **options
    )
    return StatewrightForCausalLM(config).to(dtype)


def compiled(fn):
    torch.compiler.reset()
    return torch.compile(fn, fullgraph=True, backend="aot_eager", dynamic=False)


@pytest.mark.parametrize("text", ["mingru", "minlstm"])
def test_mixers_compile_with_states_in_and_out(text: str) -> None:
    mixer, x = build_mixer(text, D).double(), torch.randn(B, T, D, dtype=torch.float64)
    state = mixer.random_state(B, torch.Generator())
    mask, reset = torch.rand(2, B, T) < torch.tensor([0.8, 0.2]).view(2, 1, 1)
    call = compiled(mixer)
    for flags in ((), (mask, reset)):
        carried = replace(state, h=state.h.clone().requires_grad_())
        leaves = [carried.h, *mixer.parameters()]
        found = []
        for run in (call, mixer):
            y, end = run(x, carried, *flags)
            loss = y.square().sum() + end.h.square().sum()
            found.append((y, end, torch.autograd.grad(loss, leaves)))
        (y, end, grads), (want_y, want_end, want_grads) = found
        assert type(end) is type(want_end) and laws.error(end, want_end) < 1e-12
        assert laws.error(y, want_y) < 1e-12
        assert max(laws.error(g, w) for g, w in zip(grads, want_grads)) < 1e-12


def test_a_models_step_compiles() -> None:
    model = build().eval()
    step, ids = compiled(model.step), torch.randint(V, (B, 4))
    state = want_state = model.init_state(B)
    with torch.no_grad():
        for t in range(4):
            logits, state = step(ids[:, t], state)
            want, want_state = model.step(ids[:, t], want_state)
            assert laws.error(logits, want) < 1e-12
    assert laws.error(state, want_state) < 1e-12 and state.seen.tolist() == [4] * B


def test_a_models_forward_compiles() -> None:
    model, ids = build(mixer="mingru").eval(), torch.randint(V, (B, T))
    state, forward = model(ids).state, compiled(model)
    got, want = forward(ids, state=state), model(ids, state=state)
    assert laws.error(got.logits, want.logits) < 1e-12
    assert laws.error(got.state, want.state) < 1e-12


@pytest.mark.parametrize("mixer", ["mingru", "minlstm", "lstm"])
def test_checkpointing_changes_no_gradient(mixer: str) -> None:
    """Also not that of a carried state, nor with dropout (the same masks are drawn again)."""
    model, ids = build(mixer=mixer, dropout=0.1).train(), torch.randint(V, (B, T))
    with torch.no_grad():
        start = model(torch.randint(V, (B, 5))).state

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(1)
        state = start.map(lambda t: t.clone().requires_grad_() if t.is_floating_point() else t)
        carried = [t for _, t in state.items() if t.requires_grad]
        first = model(ids, state=state, labels=ids)
        second = model(ids, state=first.state, labels=ids)
        loss = first.loss + second.loss + second.state.layers[0].h.square().sum()
        return list(torch.autograd.grad(loss, [*carried, *model.parameters()], allow_unused=True))

    plain = gradients()
    calls = []
    model.model.layers[0].mixer.register_forward_pre_hook(lambda *_: calls.append(1))
    model.activation_checkpointing_enable()
    checkpointed = gradients()
    assert len(calls) == 4, "each of two calls is computed a second time"
    for got, want in zip(checkpointed, plain, strict=True):
        assert (got is None and want is None) or torch.equal(got, want)
    assert sum(g is not None and bool(g.any()) for g in plain) >= len(plain) - 2


class Lines(torch.utils.data.Dataset):
    """A sequence that counts, modulo the vocabulary."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(T) + index) % V
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_trains_evaluates_and_predicts(checkpointing: bool, tmp_path) -> None:
    model = build(torch.float32)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=3,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        activation_checkpointing=checkpointing,
    )
    seen = []

    def metrics(prediction) -> dict[str, float]:
        seen.append((type(prediction.predictions), prediction.predictions.shape))
        right = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
        return {"accuracy": float(right.mean())}

    trainer = Trainer(
        model, arguments, train_dataset=Lines(12), eval_dataset=Lines(5), compute_metrics=metrics
    )
    trainer.train()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert {shape for _, shape in seen} == {(5, T, V)}
    predicted = trainer.predict(Lines(5)).predictions
    with torch.no_grad():
        ids = torch.stack([Lines(5)[i]["input_ids"] for i in range(5)])
        want = model.eval()(ids).logits
    assert torch.allclose(torch.as_tensor(predicted), want, atol=1e-5)
    loaded = StatewrightForCausalLM.from_pretrained(tmp_path / "checkpoint-3").eval()
    assert torch.allclose(loaded(ids).logits, want, atol=1e-5)
    assert (model.model.gradient_checkpointing, loaded.model.gradient_checkpointing) == (
        checkpointing,
        False,
    )


LENGTHS = (T, T, 1)


def rows_of_text() -> torch.Tensor:
    return torch.randint(V, (2 * B, sum(LENGTHS) + 1), generator=torch.Generator().manual_seed(3))


def train_a_little(model, rows: torch.Tensor) -> None:
    """A step per piece, the state carried (and cut) in between, down to pieces of one token."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    state, at = None, 0
    for length in LENGTHS:
        ids, targets = rows[:, at : at + length], rows[:, at + 1 : at + length + 1]
        out = model(input_ids=ids, state=state)
        optimizer.zero_grad()
        F.cross_entropy(out.logits.flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
        state, at = out.state.detach(), at + length


def one_of_two(rank: int, store: str, weights: dict, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = build()
    model.load_state_dict(weights)
    train_a_little(DistributedDataParallel(model), rows_of_text()[rank * B : (rank + 1) * B])
    torch.save(model.state_dict(), f"{results}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="gloo is not built in")
def test_ddp_is_one_process_on_the_joined_batch(tmp_path) -> None:
    """With a learned initial state, which a carried state must not leave without a gradient."""
    model = build()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # Forked: a new process would spend ten times as long on importing torch.
    arguments = (str(tmp_path / "store"), weights, str(tmp_path))
    mp.start_processes(one_of_two, arguments, nprocs=2, start_method="fork")
    train_a_little(model, rows_of_text())
    learned = [name for name in weights if "init_param" in name]
    assert len(learned) == 2
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, want in model.state_dict().items():
        assert torch.equal(first[name], second[name])
        assert torch.allclose(first[name], want, rtol=1e-9, atol=1e-12), name
    assert all(not torch.equal(first[name], weights[name]) for name in weights)
