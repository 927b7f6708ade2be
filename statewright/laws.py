"""The seven laws of a state, as functions: the product and the test suite.

A law takes a subject (a mixer, or a whole model behind `ModelSubject`) and a `Case`, runs it and
returns a `Finding`: the largest error, the tolerance and what was compared.

| # | law       | what it says                                                              |
|---|-----------|---------------------------------------------------------------------------|
| 1 | fold      | forward(x, s) equals folding step over x, from a random valid s           |
| 2 | chunk     | any split of x gives the same outputs and the same final state            |
| 3 | gradient  | gradients through law 2 agree; state.detach() cuts exactly there          |
| 4 | value     | the state passed in is bit-identical afterwards; forks never meet         |
| 5 | rows      | rows are independent; masked tokens do not exist; a reset starts afresh   |
| 6 | bound     | a recurrent state never grows; a policy's budget holds after every call   |
| 7 | roundtrip | copies, resizes and reloads continue bit-identically                      |

Bits are promised for the same shapes, alignment and threads; beyond, the tolerance table holds.

>>> found = laws.check(MinGRU(4).double(), laws.Case(length=9))
>>> [finding.law for finding in found if not finding.ok]
[]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from statewright.policies import Policy
from statewright.policies.measure import bytes_over, canonical, lists_of, slots_over
from statewright.state import State, cat

# One table, the same on every machine: largest error relative to the largest value.
TOLERANCES: dict[tuple[torch.dtype, str], float] = {
    **{(torch.float64, backend): 1e-12 for backend in ("ref", "torch", "native")},
    **{(torch.float32, backend): 1e-5 for backend in ("ref", "torch", "native")},
    **{(torch.bfloat16, backend): 4e-2 for backend in ("ref", "torch", "native")},
    (torch.float64, "log"): 1e-9,
    (torch.float32, "log"): 1e-3,
}
GRADIENT_FACTOR = 10.0


class Subject(Protocol):
    """What the laws need; every Mixer is one."""

    hidden_size: int

    def init_state(self, batch_size: int) -> State: ...
    def random_state(self, batch_size: int, generator: torch.Generator) -> State: ...
    def step(self, x, state, mask=None, reset=None) -> tuple[Tensor, State]: ...
    def __call__(self, x, state=None, mask=None, reset=None) -> tuple[Tensor, State]: ...
    def parameters(self) -> Iterable[nn.Parameter]: ...


class ModelSubject(nn.Module):
    """A causal LM as a subject: embeddings in, logits out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.hidden_size = model.config.hidden_size
        self.init_state, self.random_state = model.init_state, model.random_state
        self.step = model.step

    def forward(self, x, state=None, mask=None, reset=None, policy=None) -> tuple[Tensor, State]:
        flags = {"attention_mask": mask, "reset": reset}
        # A model without the argument may still be tried as it is.
        bounds = {} if policy is None else {"policy": policy}
        out = self.model(inputs_embeds=x, state=state, **flags, **bounds)
        return out.logits, out.state


class Bounded(nn.Module):
    """A subject under a policy: every call passes it."""

    def __init__(self, subject: nn.Module, policy: Policy) -> None:
        super().__init__()
        self.subject, self.policy = subject, policy
        self.hidden_size = subject.hidden_size
        self.init_state, self.random_state = subject.init_state, subject.random_state

    def step(self, x, state, mask=None, reset=None) -> tuple[Tensor, State]:
        return self.subject.step(x, state, mask, reset, self.policy)

    def forward(self, x, state=None, mask=None, reset=None) -> tuple[Tensor, State]:
        return self.subject(x, state, mask, reset, self.policy)


@dataclass(frozen=True)
class Case:
    """How to try a law: B rows of T tokens, drawn from `seed`, in `dtype` on `backend`."""

    batch: int = 3
    length: int = 65
    seed: int = 0
    splits: tuple[int, ...] = (20, 33)
    flags: bool = False
    dtype: torch.dtype = torch.float64
    backend: str = "torch"

    @property
    def tolerance(self) -> float:
        """Of this dtype and backend, relative; ValueError where the table has none."""
        key = self.dtype, self.backend
        if key not in TOLERANCES:
            known = ", ".join(f"{dtype} on {backend}" for dtype, backend in TOLERANCES)
            raise ValueError(f"no tolerance for {key[0]} on backend {key[1]!r} (known: {known})")
        return TOLERANCES[key]

    def draw(self, subject: Subject) -> tuple[Tensor, State, Tensor | None, Tensor | None]:
        """Input (B, T, D), a random valid state, and with `flags` a random mask and reset."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.batch, self.length)
        x = torch.randn(*shape, subject.hidden_size, generator=generator).to(self.dtype)
        state = subject.random_state(self.batch, generator)
        if not self.flags:
            return x, state, None, None
        mask = torch.rand(shape, generator=generator) < 0.8
        return x, state, mask, torch.rand(shape, generator=generator) < 0.1


@dataclass(frozen=True)
class Finding:
    """A law's outcome: `ok` within the tolerance, unless `vacuous`: the truth is rounding."""

    law: str
    error: float
    tolerance: float
    compared: str
    vacuous: bool = False

    @property
    def ok(self) -> bool:
        return not self.vacuous and self.error <= self.tolerance


def error(got: Tensor | State, want: Tensor | State, floor: float = 0.0) -> float:
    """Largest difference over the largest value (or a larger floor); inf if shapes differ."""
    if isinstance(want, State):
        pairs, wanted = dict(canonical(got).items()), dict(canonical(want).items())
        if pairs.keys() != wanted.keys():
            return float("inf")
        return max(error(pairs[name], tensor, floor) for name, tensor in wanted.items())
    if got.shape != want.shape:
        return float("inf")
    if not (want.is_floating_point() or want.is_complex()):
        return 0.0 if torch.equal(got, want) else float("inf")
    if want.numel() == 0:
        return 0.0
    scale = max(want.abs().max().item(), floor, torch.finfo(want.dtype).tiny)
    relative = (got - want).abs().max().item() / scale
    return float("inf") if relative != relative else relative


def fold(subject: Subject, case: Case) -> Finding:
    """Law 1: forward equals folding step, outputs and state, from a random state."""
    x, state, mask, reset = case.draw(subject)
    y, end = subject(x, state, mask, reset)
    outputs, folded = [], state
    for t in range(case.length):
        flags = [None if f is None else f[:, t] for f in (mask, reset)]
        y_t, folded = subject.step(x[:, t], folded, *flags)
        outputs.append(y_t)
    stepped = torch.stack(outputs, 1) if outputs else torch.empty_like(y)
    worst = max(error(*_visible(y, stepped, mask)), error(end, folded))
    return Finding("fold", worst, case.tolerance, "forward against steps")


def chunk(subject: Subject, case: Case) -> Finding:
    """Law 2: the case's splits (empty and one-token pieces included) equal one call."""
    x, state, mask, reset = case.draw(subject)
    y, end = subject(x, state, mask, reset)
    pieces, last = _in_pieces(subject, case, x, state, mask, reset)
    worst = max(error(*_visible(pieces, y, mask)), error(last, end))
    return Finding("chunk", worst, case.tolerance, f"split at {case.splits} against one call")


def gradient(subject: Subject, case: Case) -> Finding:
    """Law 3: gradients of inputs, initial state and weights; and detach cuts exactly there.

    Of a random combination of outputs and state, as a sum of squares is constant where a norm is
    held; 100 roundings of the largest gradient count as 0.
    """
    x, state, mask, reset = case.draw(subject)
    x = x.requires_grad_()
    state = state.map(lambda t: t.requires_grad_() if t.is_floating_point() else t)
    leaves = [x, *(t for _, t in state.items() if t.requires_grad), *subject.parameters()]

    def gradients(y: Tensor, end: State) -> tuple[list[Tensor], float]:
        loss, size = _combination(y if mask is None else y * mask.unsqueeze(-1), end, case.seed)
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, leaves)], size

    whole, size = gradients(*subject(x, state, mask, reset))
    split, _ = gradients(*_in_pieces(subject, case, x, state, mask, reset))
    largest, eps = max(g.abs().max().item() for g in whole if g.numel()), torch.finfo(x.dtype).eps
    worst = max(error(a, b, 100 * eps * largest) for a, b in zip(split, whole))
    cut = case.length // 2
    _, middle = subject(x[:, :cut], state)
    for carried, connected in ((middle, True), (middle.detach(), False)):
        loss, _ = _combination(*subject(x[:, cut:], carried), case.seed)
        (grad,) = torch.autograd.grad(loss, x, retain_graph=True)
        worst = worst if bool(grad[:, :cut].any()) == connected else float("inf")
    limit = case.tolerance * GRADIENT_FACTOR
    return Finding("gradient", worst, limit, "split against one call", largest <= eps * size)


def value(subject: Subject, case: Case) -> Finding:
    """Law 4: nothing writes into a state, and two forks of one prefix never see each other."""
    x, state, mask, reset = case.draw(subject)
    before = state.map(torch.clone)
    half = case.length // 2
    first, _ = subject(x[:, :half], state)
    subject(x[:, half:], state, *(None if f is None else f[:, half:] for f in (mask, reset)))
    subject.step(x[:, 0], state)
    again, _ = subject(x[:, :half], state)
    same = torch.equal(first, again) and _identical(state, before)
    return Finding("value", 0.0 if same else float("inf"), 0.0, "a state used four times")


def rows(subject: Subject, case: Case) -> Finding:
    """Law 5: a row alone, a row among padding (left, right, holes), a row reset in a batch."""
    x, state, _, _ = case.draw(subject)
    generator = torch.Generator().manual_seed(case.seed + 1)
    mask = torch.rand(x.shape[:2], generator=generator) < 0.7
    if case.batch > 1 and case.length > 4:
        mask[0, :3], mask[1, -3:] = False, False
    y, end = subject(x, state, mask)
    worst, middle = 0.0, case.length // 2
    reset = torch.zeros(x.shape[:2], dtype=torch.bool)
    reset[:, middle] = True
    whole, after = subject(x, state, None, reset)
    for i in range(case.batch):
        alone, alone_end = subject(x[i : i + 1, mask[i]], state.rows(i))
        fresh, fresh_end = subject(x[i : i + 1, middle:], None)
        worst = max(
            worst,
            error(y[i : i + 1, mask[i]], alone),
            error(end.rows(i), alone_end),
            error(whole[i : i + 1, middle:], fresh),
            error(after.rows(i), fresh_end),
        )
    return Finding("rows", worst, case.tolerance, "each row alone, padded and reset")


def bound(subject: Subject, case: Case) -> Finding:
    """Law 6: a recurrent state's bytes never change; lists obey their budget after every call.

    What a recurrent policy remembers comes in whole with the first token.
    """
    x, state, mask, reset = case.draw(subject)
    if lists_of(state):
        return _bound_of_lists(subject, case)
    bare = getattr(subject, "policy", None) is None
    sizes = {subject.init_state(case.batch).nbytes, state.nbytes} if bare else set()
    for length in (1, case.length):
        flags = (None if f is None else f[:, :length] for f in (mask, reset))
        sizes.add(subject(x[:, :length], state, *flags)[1].nbytes)
    growth = float(max(sizes) - min(sizes))
    return Finding("bound", growth, 0.0, "bytes after 0, 1 and all tokens")


def _bound_of_lists(subject: Subject, case: Case) -> Finding:
    """N <= budget + (seen mod every) after each call; a budget never reached changes nothing."""
    x, _, mask, reset = case.draw(subject)
    policy, excess = getattr(subject, "policy", None), 0.0
    state, begin = subject.init_state(case.batch), 0
    for end in [*range(1, case.length // 2), case.length]:
        flags = (None if f is None else f[:, begin:end] for f in (mask, reset))
        _, state = subject(x[:, begin:end], state, *flags)
        begin = end
        for layer in lists_of(state):
            excess = max(excess, slots_over(layer, policy, end))
        if policy is not None and isinstance(policy.budget, str):
            excess = max(excess, max(bytes_over(state.rows(i), policy) for i in range(case.batch)))
    compared = "slots after every call"
    if excess > 0 or policy is None:
        return Finding("bound", excess, 0.0, compared)
    free = Bounded(subject.subject, replace(policy, budget=case.length + policy.smallest))
    idle, unbounded = free(x, None, mask, reset)[0], subject.subject(x, None, mask, reset)[0]
    difference = error(*_visible(idle, unbounded, mask))
    return Finding("bound", difference, case.tolerance, f"{compared}, and an idle budget")


def roundtrip(
    subject: Subject, case: Case, reload: Callable[[Subject], Subject] | None = None
) -> Finding:
    """Law 7: copied, joined, grown-and-cut states and a reloaded subject continue bit-equally.

    `reload` saves and loads the subject (weights through a file); None leaves that part out.
    """
    x, state, mask, reset = case.draw(subject)
    y, end = subject(x, state, mask, reset)
    sizes = {name: t.shape[names.index(name)] for _, t, names in state.named() for name in names}
    grown = state.resize(**{n: s + 3 for n, s in sizes.items() if n == "channel"})
    same_rows = cat([state.rows(i) for i in range(case.batch)])
    copies = [state.to(torch.device("cpu")), state.map(torch.clone), same_rows]
    if len({t.shape[n.index("channel")] for _, t, n in state.named() if "channel" in n}) == 1:
        copies.append(grown.resize(channel=sizes["channel"]))
    leaves, spec = pytree.tree_flatten(state)
    copies.append(pytree.tree_unflatten([t.clone() for t in leaves], spec))
    runs = [(subject, copy) for copy in copies]
    if reload is not None:
        runs.append((reload(subject), state))
    again = [who(x, start, mask, reset) for who, start in runs]
    same = all(torch.equal(y, y2) and _identical(end, end2) for y2, end2 in again)
    return Finding("roundtrip", 0.0 if same else float("inf"), 0.0, f"{len(runs)} copies")


LAWS: dict[str, Callable[[Subject, Case], Finding]] = {
    law.__name__: law for law in (fold, chunk, gradient, value, rows, bound, roundtrip)
}


def check(subject: Subject, case: Case, laws: Iterable[str] = tuple(LAWS)) -> list[Finding]:
    """Run the named laws on one case."""
    return [LAWS[law](subject, case) for law in laws]


def _in_pieces(subject, case, x, state, mask, reset) -> tuple[Tensor, State]:
    edges = [0, *sorted(min(s, case.length) for s in case.splits), case.length]
    outputs = []
    for begin, end in zip(edges, edges[1:]):
        flags = (None if f is None else f[:, begin:end] for f in (mask, reset))
        y, state = subject(x[:, begin:end], state, *flags)
        outputs.append(y)
    return torch.cat(outputs, 1), state


def _combination(y: Tensor, end: State, seed: int) -> tuple[Tensor, float]:
    """A random linear combination of outputs and final state, and the sum of its terms' sizes."""
    generator = torch.Generator().manual_seed(seed + 2)
    floats = [y, *(t for _, t in end.items() if t.is_floating_point())]
    terms = [t * torch.randn(t.shape, generator=generator).to(t) for t in floats]
    return sum(t.sum() for t in terms), sum(t.detach().abs().sum().item() for t in terms)


def _visible(got: Tensor, want: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    return (got, want) if mask is None else (got[mask], want[mask])


def _identical(a: State, b: State) -> bool:
    return all(torch.equal(s, t) for (_, s), (_, t) in zip(a.items(), b.items(), strict=True))
