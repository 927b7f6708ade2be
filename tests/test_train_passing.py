"""State passing, gradients through segments, what is trained, schedules: each against its law."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_train import (  # noqa: F401
    DOCUMENTS,
    TOKENIZER,
    Stop,
    assert_same,
    make_model,
    make_run,
    metrics,
    one_thread,
    stop_at,
)

import statewright
from statewright import Session
from statewright.laws import error
from statewright.models import StatewrightForCausalLM
from statewright.state import KVState, ModelState
from statewright.train.config import TrainConfig
from statewright.train.data import Batch, corpus_of
from statewright.train.loop import Run
from statewright.train.optimizer import decayed_names, make_optimizer
from statewright.train.passing import Objective, begin_step, first_documents, join_rows

MAMBA2 = "mamba2:state_size=4:head_dim=8"
ALL = slice(None)


def carried(model: StatewrightForCausalLM, rows: int) -> ModelState:
    return model.random_state(rows, torch.Generator().manual_seed(1))


def resets(rows: int = 4) -> torch.Tensor:
    flags = torch.zeros(rows, 6, dtype=torch.bool)
    flags[1, 0] = flags[2, 3] = True
    return flags


def begun(model: Any, step: int = 5, rows: slice = ALL, **options: Any):
    config = TrainConfig(num_lanes=4, **options)
    state = carried(model, 4)
    return state, *begin_step(state.rows(rows), resets()[rows], config, step, rows)


def equal(a: ModelState, b: ModelState) -> bool:
    return all(torch.equal(x, y) for (_, x), (_, y) in zip(a.items(), b.items(), strict=True))


def test_what_a_segment_begins_from() -> None:
    model = make_model(MAMBA2)
    before, state, reset = begun(model, initial="previous")
    assert equal(state, before) and torch.equal(reset, resets())
    before, state, reset = begun(model, initial="zero")
    assert reset[:, 0].all() and torch.equal(reset[:, 1:], resets()[:, 1:])
    before, state, reset = begun(model, initial="other")
    assert equal(state, before.rows([1, 0, 3, 2])) and not reset[:, 0].any()
    before, state, reset = begun(model, initial="noise")
    assert not reset[:, 0].any() and torch.equal(state.seen, before.seen)
    for (name, drawn), (_, old) in zip(state.items(), before.items(), strict=True):
        assert (drawn <= old.amax(0)).all() and (drawn >= old.amin(0)).all(), name
        assert not drawn.is_floating_point() or not torch.equal(drawn, old)


def test_noise_is_fitted() -> None:
    """Many rows: the drawn state's mean and deviation are those of the rows, element by element."""
    model = make_model(MAMBA2)
    state = carried(model, 4000)
    scale = torch.rand_like(state.layers[0].S[0]) + 0.5
    shifted = state.map(lambda t: t * scale + 3 if t.shape[1:] == scale.shape else t)
    config = TrainConfig(num_lanes=4000, initial="noise")
    flags = torch.zeros(4000, 2, dtype=torch.bool)
    drawn, _ = begin_step(shifted, flags, config, 1, ALL)
    old, new = shifted.layers[0].S, drawn.layers[0].S
    assert error(new.mean(0), old.mean(0)) < 0.05 and error(new.std(0), old.std(0)) < 0.05
    again, _ = begin_step(shifted, flags, config, 1, ALL)
    other, _ = begin_step(shifted, flags, config, 2, ALL)
    assert equal(drawn, again) and not torch.equal(drawn.layers[0].S, other.layers[0].S)


def test_chains_and_chances() -> None:
    model = make_model()
    for step in range(9):
        reset = begun(model, step, num_segments=6, gradient_segments=2)[2]
        assert reset[:, 0].all() == (step % 3 == 0)
    fresh = [begun(model, step, reset_share=0.25)[2][:, 0] for step in range(400)]
    share = torch.stack(fresh)[:, [0, 2, 3]].float().mean()
    assert 0.2 < share < 0.3
    for initial in ("previous", "other", "noise"):
        whole = begun(model, initial=initial, reset_share=0.5)[2]
        parts = [
            begun(model, initial=initial, reset_share=0.5, rows=r)[2]
            for r in (slice(0, 2), slice(2, 4))
        ]
        assert torch.equal(torch.cat(parts), whole), "what a lane draws is its own"


def segments(rows: int, lengths: list[int]) -> list[Batch]:
    ids = torch.randint(257, (rows, sum(lengths) + 1), generator=torch.Generator().manual_seed(4))
    reset = torch.rand(rows, sum(lengths), generator=torch.Generator().manual_seed(5)) < 0.1
    whole = Batch(ids[:, :-1], ids[:, 1:], reset)
    edges = torch.tensor([0, *lengths]).cumsum(0).tolist()
    return [whole.columns(slice(a, b)) for a, b in zip(edges, edges[1:])]


@pytest.mark.parametrize("mixer", ["mingru", MAMBA2, "lstm"])
def test_tbptt(mixer: str) -> None:
    """S11: a then b from a's detached state is [a; b] forward; no gradient of b reaches a."""
    model = make_model(mixer, dropout=0.0).double()
    a, b = segments(3, [9, 7])
    first = model.model(
        inputs_embeds=(x := model.model.embeddings(a.ids).detach().requires_grad_())
    )
    second = model(b.ids, state=first.state.detach(), reset=b.reset)
    ids, flags = torch.cat([a.ids, b.ids], 1), torch.cat([torch.zeros_like(a.reset), b.reset], 1)
    assert error(second.logits, model(ids, reset=flags).logits[:, 9:]) < 1e-12
    second.logits.square().sum().backward()
    assert x.grad is None
    model(b.ids, state=first.state, reset=b.reset).logits.square().sum().backward()
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize("mixer", ["mingru", MAMBA2])
def test_gradients_through_segments_are_those_of_one(mixer: str) -> None:
    """Cut into segments or not: the same loss, state and gradients, also of the state before."""
    model = make_model(mixer, dropout=0.0).double()
    objective, found = Objective(model, TrainConfig(), None), []
    for lengths in ([16], [5, 1, 10]):
        state = carried(model, 3).map(lambda t: t.requires_grad_() if t.is_floating_point() else t)
        leaves = [t for _, t in state.items() if t.requires_grad] + list(model.parameters())
        loss, after = objective(segments(3, lengths), state)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        found.append((loss, after, grads))
    (loss, after, grads), (loss2, after2, grads2) = found
    assert error(loss, loss2) < 1e-12 and error(after, after2) < 1e-12
    assert max(error(g, h) for g, h in zip(grads, grads2)) < 1e-11


HARD = {
    "other": dict(initial="other", reset_share=0.3, num_lanes=4, train_only="mixers:1"),
    "noise": dict(initial="noise", reset_share=0.3, num_accumulation=3, checkpointing=True),
    "chains": dict(num_segments=4, gradient_segments=2, length=8, curriculum="12@5,16@9"),
    "state": dict(train_only="state", initial="zero", schedule="wsd"),
}


@pytest.mark.parametrize("kind", HARD)
def test_killed_and_resumed_equals_whole(kind: str, tmp_path: Path) -> None:
    whole = make_run(tmp_path / "whole", MAMBA2, **HARD[kind])
    whole.train()
    with pytest.raises(Stop):
        make_run(tmp_path / "cut", MAMBA2, listen=stop_at(8), **HARD[kind]).train()
    run = make_run(tmp_path / "cut", MAMBA2, **HARD[kind])
    run.resume()
    assert run.step == 6
    run.train()
    assert_same(run, whole)
    if run.initial is not None:
        assert equal(run.initial.state().detach(), whole.initial.state().detach())


def test_accumulated_parts_are_one_step(tmp_path: Path) -> None:
    runs = []
    for parts in (1, 3):
        model = make_model(MAMBA2, dropout=0.0).double()
        runs.append(make_run(tmp_path / f"{parts}", model=model, num_accumulation=parts))
        runs[-1].train()
    a, b = runs
    for (name, x), (_, y) in zip(a.model.state_dict().items(), b.model.state_dict().items()):
        assert error(x, y) < 1e-10, name
    assert error(a.state, b.state) < 1e-10


def frozen(run: Run, other: dict[str, torch.Tensor]) -> set[str]:
    return {n for n, t in run.model.state_dict().items() if torch.equal(t, other[n])}


def test_the_initial_state_alone(tmp_path: Path) -> None:
    """No weight changes by a bit; the exported state goes on as any state file, and it helps."""
    text = ["yes and no, yes and no, " * 60]
    options = dict(train_only="state", initial="zero", num_steps=40, num_warmup_steps=2, length=12)
    model = make_model(MAMBA2, dropout=0.0)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    steps = dict(eval_every=40, save_every=40, learning_rate=0.1)
    run = make_run(tmp_path, model=model, documents=text, **{**options, **steps})
    run.train()
    assert frozen(run, before) == before.keys()
    losses = [m["loss"] for m in metrics(tmp_path) if m["event"] == "step"]
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.05 * 5
    session = Session.load(tmp_path / "initial.state", statewright.load(tmp_path))
    assert equal(session.state, run.initial.state().detach()) and session.seen == 0
    batch = run.lanes.batch(50)
    labels, model = batch.labels.flatten(), model.eval()
    rows = session.state.rows([0] * 3)
    ours, plain = (model(batch.ids, state=s).logits.flatten(0, 1) for s in (rows, None))
    assert F.cross_entropy(ours, labels) < F.cross_entropy(plain, labels)


def test_later_documents_do_not_count_for_a_learned_state() -> None:
    first, second = segments(3, [6, 6])
    reset = torch.zeros(3, 12, dtype=torch.bool)
    reset[:, 0], reset[1, 4], reset[2, 9] = True, True, True
    given = [Batch(b.ids, b.labels, r) for b, r in zip((first, second), reset.split(6, 1))]
    kept = torch.cat([b.labels != -100 for b in first_documents(given)], 1)
    assert kept.sum(1).tolist() == [12, 4, 9]
    flags = torch.cat([b.reset for b in first_documents(given)], 1)
    assert not flags[:, 0].any() and torch.equal(flags[:, 1:], reset[:, 1:])


def test_some_mixers_alone(tmp_path: Path) -> None:
    model = make_model([MAMBA2, "mingru"])
    before = {n: t.clone() for n, t in model.state_dict().items()}
    run = make_run(tmp_path, model=model, train_only="mixers:1", num_steps=3)
    run.train()
    assert before.keys() - frozen(run, before) == {
        n for n in before if n.startswith("model.layers.1.mixer.")
    }
    with pytest.raises(ValueError, match="there is no layer 2, expected 0 to 1"):
        make_run(tmp_path / "other", train_only="mixers:2")


def test_under_a_policy(tmp_path: Path) -> None:
    """Attention trains within its budget; lists of unequal length are resumed and joined."""
    options = dict(policy="window:budget=7", num_accumulation=3, num_steps=5, length=12)
    hybrid = "attention:num_heads=2"
    whole = make_run(tmp_path / "whole", hybrid, **options)
    whole.train()
    assert all(isinstance(layer, KVState) for layer in whole.state.layers)
    assert all(layer.k.shape[2] <= 7 for layer in whole.state.layers)
    with pytest.raises(Stop):
        make_run(tmp_path / "cut", hybrid, listen=stop_at(4), **options).train()
    run = make_run(tmp_path / "cut", hybrid, **options)
    run.resume()
    run.train()
    assert_same(run, whole)
    make_run(tmp_path / "free", hybrid, **{**options, "policy": "none", "num_steps": 2}).train()
    assert metrics(tmp_path / "free")[1] != metrics(tmp_path / "whole")[1]


def test_joined_rows_pad_lists() -> None:
    model = make_model("attention:num_heads=2").eval()
    ids = torch.randint(257, (2, 9))
    states = [model(ids[:, :n]).state for n in (3, 9)]
    joined = join_rows(states)
    assert joined.batch_size == 4 and joined.layers[0].k.shape[2] == 9
    assert (joined.layers[0].pos[:2, :, 3:] == -1).all()
    want = torch.cat([model(ids[:, :4], state=s).logits for s in states])
    got = model(ids[:, :4].repeat(2, 1), state=joined).logits
    assert error(got, want) < 1e-5


def test_documents_can_be_joined(tmp_path: Path) -> None:
    corpus = corpus_of([[d] for d in DOCUMENTS], TOKENIZER)
    config = TrainConfig(num_lanes=2, length=8, documents="join")
    run = Run(make_model(), TOKENIZER, corpus, None, config, tmp_path)
    assert run.lanes.corpus.starts.tolist() == [0] and len(corpus.starts) == len(DOCUMENTS)


def test_rates_and_steps_do_not_decay() -> None:
    model = make_model([MAMBA2, "mamba:state_size=4"])
    names = decayed_names(model)
    assert names == {
        n
        for n, p in model.named_parameters()
        if p.dim() >= 2 and "A_log" not in n and "embeddings" not in n
    }
    groups = make_optimizer(model, TrainConfig(beta1=0.8, beta2=0.9)).param_groups
    assert {g["betas"] for g in groups} == {(0.8, 0.9)}


def test_wsd() -> None:
    config = TrainConfig(
        num_steps=100, num_warmup_steps=10, learning_rate=2.0, schedule="wsd", final_rate=0.0
    )
    rates = [config.rate(step) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert set(rates[10:91]) == {2.0}
    assert rates[90:] == pytest.approx([0.2 * i for i in range(10, -1, -1)])


def test_the_recipe_of_statex_can_be_said() -> None:
    """X10: 3e-4 after a warm-up of 1,000 steps, cosine to exactly 0 at 20,000."""
    config = TrainConfig(
        num_steps=20_000, num_warmup_steps=1000, learning_rate=3e-4, final_rate=0.0,
        num_lanes=8, length=64 * 1024,
    )  # fmt: skip
    assert config.rate(1000) == 3e-4 and config.rate(20_000) == 0.0
    assert (config.beta1, config.beta2, config.weight_decay, config.clip) == (0.9, 0.95, 0.1, 1.0)


LENGTHS = [
    (dict(), 24, 49),
    (dict(initial="zero"), 24, 24),
    (dict(initial="zero", gradient_segments=2), 48, 48),
    (dict(num_segments=2), 24, 48),
    (dict(initial="noise", curriculum="32@2"), 32, 32),
]


@pytest.mark.parametrize("options, length, context", LENGTHS)
def test_the_training_length_is_recorded(options, length, context, tmp_path: Path) -> None:
    make_run(tmp_path, documents=["x" * 48] * 8, num_steps=3, **options).train()
    for config in (tmp_path / "config.json", tmp_path / "checkpoint-3" / "config.json"):
        entries = json.loads(config.read_text())
        assert (entries["train_length"], entries["train_context"]) == (length, context)
    assert statewright.load(tmp_path).config.train_length == length


WRONG = [
    (dict(num_segments=3, gradient_segments=2), "multiple of"),
    (dict(num_segments=3, initial="zero"), "initial=zero"),
    (dict(train_only="state"), "initial=zero"),
    (dict(train_only="heads"), "train_only"),
    (dict(num_lanes=4, num_accumulation=3), "num_accumulation=3"),
    (dict(curriculum="1k"), "curriculum"),
    (dict(policy="window:budgt=3"), "budget"),
    (dict(reset_share=1.5), "reset_share"),
    (dict(beta2=1.0), "beta2"),
    (dict(parallel="sharded", train_only="state", initial="zero"), "sharded"),
]


@pytest.mark.parametrize("options, reason", WRONG)
def test_wrong_options(options: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        TrainConfig(**options)


def test_states_that_cannot_be_passed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="in pairs"):
        make_run(tmp_path, initial="other")
    with pytest.raises(ValueError, match="no vector"):
        make_run(tmp_path, "attention:num_heads=2", initial="noise")
