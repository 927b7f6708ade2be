"""Policies by themselves: choices against plain Python, budgets, ties, spec strings, errors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

from statewright.mixers.kv import empty_list, extend
from statewright.policies import (
    POLICIES,
    TOVA,
    Eviction,
    KeyDiff,
    Slots,
    Window,
    build_policy,
    policy_spec,
)
from statewright.policies.base import victims
from statewright.policies.simulate import Rule
from statewright.policies.timeline import Timeline

torch.set_num_threads(1)
H, R, DH, T = 2, 2, 4, 40
RULE = Rule(scale=0.5)
SPECS = [
    "window:budget=6",
    "window:budget=6:sinks=2",
    "tova:budget=6",
    "tova:budget=6:sinks=1",
    "tova:budget=6:per=head",
    "h2o:budget=6",
    "h2o:budget=6:recent=1:per=layer",
    "keynorm:budget=6:sinks=1",
    "keydiff:budget=6",
    "lagkv:budget=14:sinks=2:lag=4",
]


def draw(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, H * R, T, DH), (1, H, T, DH), (1, H, T, DH)]
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)


def run(policy: Eviction | None, q, k, v, block: int = 1):
    state = empty_list(1, H, DH, DH, k.dtype, k.device)
    timeline = Timeline.of(state.pos, state.seen, q.shape[2], None, None)
    return extend(q, k, v, state, timeline, RULE, policy, block)


def plain_python(policy, q, k, v) -> list[list[int]]:
    """The papers' rules on lists of positions, one query after the other, head by head."""
    kept, mass, lag = ([[] for _ in range(H)], [{} for _ in range(H)], [{} for _ in range(H)])
    name = type(policy).__name__
    for t in range(T):
        rows = []
        for h in range(H):
            kept[h].append(t)
            logits = (q[0, h * R : h * R + R, t] @ k[0, h, kept[h]].T) * RULE.scale
            rows.append(logits.softmax(-1))
            for n, j in enumerate(kept[h]):
                mass[h][j] = mass[h].get(j, 0.0) + rows[h][:, n].sum().item()
            if name == "LagKV":
                lag_scores(policy, k[0, h], v[0, h], t + 1, lag[h])
        scores = [one_score(policy, h, kept, rows, mass, lag, k, t) for h in range(H)]
        if getattr(policy, "per", "head") == "layer":
            mean = [sum(s[n] for s in scores) / H for n in range(len(kept[0]))]
            scores = [mean] * H
        for h in range(H):
            while len(kept[h]) > policy.budget:
                kept[h].pop(min(range(len(kept[h])), key=lambda n: scores[h][n]))
    return kept


def lag_scores(policy, k, v, seen: int, found: dict[int, float]) -> None:
    start = policy.sinks
    while start + 2 * policy.lag <= seen:
        own, after = (
            range(start, start + policy.lag),
            range(start + policy.lag, start + 2 * policy.lag),
        )
        if start not in found:
            parts = []
            for x in (k, v):
                lo, hi = x[list(after)].amin(0), x[list(after)].amax(0)
                scaled = (x[list(own)] - lo) / (hi - lo)
                parts.append(scaled.std(-1, correction=0).softmax(0))
            for n, j in enumerate(own):
                found[j] = (parts[0][n] + parts[1][n]).item() / 2
        start += policy.lag


def one_score(policy, h, kept, rows, mass, lag, k, t) -> list[float]:
    name, js = type(policy).__name__, kept[h]
    keys = k[0, h, js]
    recent = policy.budget // 2 if getattr(policy, "recent", None) is None else policy.recent
    unit = keys / keys.norm(dim=-1, keepdim=True)
    by_name = {
        "Window": lambda: [float(j) for j in js],
        "TOVA": lambda: rows[h].mean(0).tolist(),
        "H2O": lambda: [math.inf if j > t - recent else mass[h][j] for j in js],
        "KeyNorm": lambda: (-keys.norm(dim=-1)).tolist(),
        "KeyDiff": lambda: (-torch.cosine_similarity(keys, unit.mean(0), dim=-1)).tolist(),
        "LagKV": lambda: [lag[h].get(j, math.inf) for j in js],
    }
    scores = by_name[name]()
    return [math.inf if j < getattr(policy, "sinks", 0) else s for j, s in zip(js, scores)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("text", SPECS)
def test_choices_are_the_papers(text: str, seed: int) -> None:
    policy, (q, k, v) = build_policy(text), draw(seed)
    _, state = run(policy, q, k, v)
    want = plain_python(policy, q, k, v)
    assert state.pos[0].sort(-1).values.tolist() == [sorted(js) for js in want]
    at = state.pos.unsqueeze(-1).expand(-1, -1, -1, DH)
    assert torch.equal(state.k, k.gather(2, at)) and torch.equal(state.v, v.gather(2, at))


def test_random_is_pure_and_uniform() -> None:
    q, k, v = draw()
    a, b, other = (
        run(build_policy(f"random:budget=8:seed={s}"), q, k, v)[1].pos for s in (1, 1, 2)
    )
    assert torch.equal(a, b) and not torch.equal(a, other)
    assert torch.equal(a[:, 0], a[:, 1])
    # At its own step a token leaves with probability 1/9, whatever the seed.
    short, left = [t[:, :, :12] for t in (q, k, v)], 0
    for seed in range(150):
        left += 11 not in run(build_policy(f"random:budget=8:seed={seed}"), *short)[1].pos
    assert abs(left / 150 - 1 / 9) < 0.08


def choose(score, pos, excess, policy=None) -> list:
    """The positions that `victims` names, sorted."""
    score = torch.tensor([[score]], dtype=torch.float64)
    pos = torch.tensor([[pos]])
    empty = score.new_zeros(1, 1, len(pos[0, 0]), 0)
    peak = score.new_zeros(1, 1)
    slots = Slots(empty, empty, pos, pos.amax(-1)[:, 0] + 1, None, pos[:, 0, 0] * 0, {}, peak)
    chosen = victims(policy or Window(budget=1), slots, score, torch.tensor([[excess]]))
    return sorted(pos[chosen].tolist())


def test_ties_leave_oldest_first_and_never_empty_slots() -> None:
    pos, score = [7, -1, 3, 5, 9], [1.0, 0.0, 1.0, 1.0, float("inf")]
    for excess, gone in ((0, []), (1, [3]), (2, [3, 5]), (3, [3, 5, 7]), (4, [3, 5, 7, 9])):
        assert choose(score, pos, excess) == gone
    assert choose(score, pos, 9) == [3, 5, 7, 9]


def test_where_a_score_is_no_number_the_oldest_leaves() -> None:
    nan = float("nan")
    assert choose([1.0, nan, 0.5, nan], [4, 2, 1, -1], 1) == [1]
    assert choose([0.5, nan, 1.0, 0.7], [4, 1, 3, 2], 2) == [1, 4]
    assert choose([nan] * 3, [2, 0, 1], 2) == [0, 1]


def one_by_one(score: list, pos: list, excess: int, reach: float) -> list:
    """The definition: the oldest within reach of the present minimum, then again."""
    left, gone = {p: s for s, p in zip(score, pos) if p >= 0}, []
    for _ in range(min(excess, len(left))):
        least = min(left.values())
        near = [p for p, s in left.items() if s <= least + (reach if s != least else 0)]
        gone.append(min(near))
        del left[min(near)]
    return sorted(gone)


@pytest.mark.parametrize("spread", [0.0, 3.0, 9.0, 40.0], ids=["equal", "tie", "chain", "apart"])
def test_victims_are_chosen_one_after_the_other(spread: float) -> None:
    """Scores some roundings apart: ties, chains that are no ties, and both kinds of neighbours."""
    policy, eps = KeyDiff(budget=1), torch.finfo(torch.float64).eps
    generator = torch.Generator().manual_seed(int(spread))
    for _ in range(60):
        steps = torch.randint(0, 9, (12,), generator=generator) * spread / 4
        score = (-1 + steps.double() * eps).tolist()
        pos = (torch.randperm(14, generator=generator)[:12] - 1).tolist()
        for excess in (1, 2, 5, 11, 12):
            want = one_by_one(score, pos, excess, 8 * eps)
            assert choose(score, pos, excess, policy) == want, (score, pos, excess)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_scores_are_wide_and_detached(dtype: torch.dtype) -> None:
    q, k, v = (t.to(dtype).requires_grad_() for t in draw())
    out, state = run(build_policy("h2o:budget=6"), q, k, v)
    mass = state.extra["policy_mass"]
    assert mass.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not mass.requires_grad and state.k.dtype == dtype and out.requires_grad


def test_a_budget_in_bytes_holds_positions_and_scores() -> None:
    q, k, v = draw()
    for text in ("window:budget=1000B", "h2o:budget=1KiB", "tova:budget=1KiB:every=3"):
        policy = build_policy(text)
        for num_layers in (1, 3):
            own = policy.for_layer(0, num_layers)
            if own.in_bytes < 400:
                continue
            state = run(own, q, k, v)[1]
            assert state.nbytes + 8 <= own.in_bytes == policy.in_bytes // num_layers
            spare = own.in_bytes - state.nbytes - 8
            assert spare < own.every * own.slot_bytes(k, v)
    with pytest.raises(ValueError, match="hold 0 tokens of 144 bytes; expected at least 160 bytes"):
        run(build_policy("window:budget=159B"), q, k, v)
    assert run(build_policy("window:budget=160B"), q, k, v)[1].pos.shape[-1] == 1


def test_layers_may_have_their_own_budgets() -> None:
    @dataclass(frozen=True)
    class Pyramid(TOVA):
        def for_layer(self, layer: int, num_layers: int) -> TOVA:
            return TOVA(self.budget * (num_layers - layer) // num_layers)

    from bounded_models import text, tiny

    from statewright.hf.bounded import BoundedCache

    cache = BoundedCache(tiny("llama"), Pyramid(8))
    with torch.no_grad():
        tiny("llama")(text(), past_key_values=cache)
    assert [s.pos.shape[-1] for s in cache.states] == [8, 4]


def test_chunks_evict_at_their_ends_and_dense_once() -> None:
    q, k, v = draw()
    full, _ = run(None, q, k, v)
    dense, state = run(TOVA(6), q, k, v, block=T)
    assert (dense - full).abs().max() < 1e-12 and state.pos.shape[-1] == 6
    chunked, _ = run(Window(6), q, k, v, block=8)
    for begin in range(0, T, 8):
        seen = [*range(max(begin - 6, 0), begin)]
        for t in range(begin, min(begin + 8, T)):
            index = [*seen, *range(begin, t + 1)]
            weights = (q[0, :R, t] @ k[0, 0, index].T * RULE.scale).softmax(-1)
            assert (chunked[0, :R, t] - weights @ v[0, 0, index]).abs().max() < 1e-12


@pytest.mark.parametrize("name", [n for n, c in POLICIES.items() if issubclass(c, Eviction)])
def test_spec_strings_round_trip(name: str) -> None:
    policy = build_policy(f"{name}:budget=300:every=2")
    assert policy_spec(policy) == f"{name}:budget=300:every=2"
    assert build_policy(policy_spec(replace(policy, budget="64KiB"))).budget == "64KiB"
    assert hash(policy) == hash(build_policy(policy_spec(policy)))
    with pytest.raises(ValueError, match="expected at least"):
        build_policy(name)


def test_errors_name_the_smallest_budget() -> None:
    for text, said in {
        "tova:budget=0": "tova: budget=0, expected at least 1 tokens",
        "tova:budget=-3": "budget=-3",
        "window:budget=4:sinks=4": "expected at least 5 tokens",
        "h2o:budget=3:recent=4": "expected at least 4 tokens",
        "h2o:budget=3:recent=-1": "recent=-1, expected 0 or more",
        "lagkv:budget=100": "expected at least 260 tokens",
        "tova:budget=half": "budget='half', expected tokens such as 512 or bytes",
        "tova:budget=4:every=0": "every=0, expected at least 1",
        "tova:budget=4:per=row": "per='row', expected 'layer' or 'head'",
        "tovaa:budget=4": "did you mean 'tova'",
    }.items():
        with pytest.raises(ValueError, match=said):
            build_policy(text)
    assert build_policy("none") is None and build_policy(None) is None
    assert policy_spec(None) == "none"


@pytest.mark.parametrize("text", SPECS)
def test_equal_scores_leave_in_one_order_on_every_path(text: str) -> None:
    """C.1, check 12: zero queries and keys, so that all that a query sees weighs the same."""
    q, k, v = (torch.zeros_like(t) for t in draw())
    policy = build_policy(text)
    kept = run(policy, q, k, v)[1].pos.sort(-1).values
    state = run(policy, q[:, :, :20], k[:, :, :20], v[:, :, :20])[1]
    for t in range(20, T):
        at = slice(t, t + 1)
        timeline = Timeline.of(state.pos, state.seen, 1, None, None)
        state = extend(q[:, :, at], k[:, :, at], v[:, :, at], state, timeline, RULE, policy)[1]
    assert torch.equal(state.pos.sort(-1).values, kept)
    sinks = getattr(policy, "sinks", 0)
    if text.startswith("h2o"):
        # What was seen by more queries has more mass: the oldest stay, and the recent ones.
        recent = 3 if policy.recent is None else policy.recent
        want = [*range(policy.budget - recent), *range(T - recent, T)]
    else:
        want = [*range(sinks), *range(T - policy.budget + sinks, T)]
    if not text.startswith("lagkv"):
        assert kept.tolist() == [[want] * H]
