"""Each law as a user of the model meets it: a function of a Trial that returns an error.

| check | what is compared |
|---|---|
| fold | a prompt in one call, then token by token, against one call |
| chunk, chunks | two pieces, and many pieces of two or more tokens, against one call |
| positions | continuing without `position_ids` against continuing with them |
| left, right | a row padded on that side, then continued, against the row alone |
| packed | the second document of a row against that document alone |
| fork | two continuations of one prefix through a State, and the State afterwards |
| shared | the same on one cache object, as a user without a State does it |
| gradient | the gradient through the cache against the gradient of one call |
| save | a state written to a file and read again, continued, against the cache continued |
| beams | rows reordered in the cache, continued, against those rows read afresh |
| batch | rows together against each row alone, token by token |
| bf16 | bfloat16 token by token against float32, beyond bfloat16's error in one call |
| session | `Session`: fed, rewound and fed again, against a fresh one and against one call |
| kernel | the fast kernels or the accelerator against the reference on the CPU |

An error is a share of the error made when the state is ignored: 0 is exact, 1 is no memory at all.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from statewright import ops
from statewright.checks.runner import OwnRunner, Unsupported, runner_of
from statewright.precision import device_of, dtype_of
from statewright.session import Session
from statewright.state_file import load_state, save_state

CUT, STEPS, PAD = 20, 6, 5
PIECES = (7, 2, 9, 2, 3, 10)
LENGTH = CUT + sum(PIECES)


def gap(got: Tensor, want: Tensor) -> float:
    """Largest difference; infinite where shapes differ or a value is not a number."""
    if got.shape != want.shape:
        return float("inf")
    found = (got.double() - want.double()).abs().max().item() if got.numel() else 0.0
    return float("inf") if found != found else found


class Trial:
    """A model, ids to try it on, and what several checks need: one call over a whole row."""

    def __init__(self, model: nn.Module, seed: int = 0) -> None:
        self.model, self.run = model.eval(), runner_of(model)
        self.ids = self.run.random_ids(3, LENGTH, seed + 1)
        self.row = self.ids[:1]

    @cached_property
    def whole(self) -> Tensor:
        """Logits (1, T, vocabulary) of the first row in one call."""
        return self.run.read(self.row)[0]

    @cached_property
    def ignored(self) -> float:
        """The error of a reader that forgets everything before the cut."""
        alone, _ = self.run.read(self.row[:, CUT:], None, CUT)
        return max(gap(alone, self.whole[:, CUT:]), 1e-30)

    def share(self, got: Tensor, want: Tensor) -> float:
        return gap(got, want) / self.ignored

    def read(self, ids: Tensor, **options) -> tuple[Tensor, Any]:
        """Logits and the cache after `ids`; a model that returns none cannot be continued."""
        logits, cache = self.run.read(ids, **options)
        if cache is None:
            raise Unsupported("the model returns no cache: its state cannot be passed")
        return logits, cache

    def prefix(self, ids: Tensor) -> Any:
        """A cache that has read `ids`."""
        return self.read(ids)[1]

    def go_on(self, cache: Any, ids: Tensor, sizes, start=CUT, mask=None, positions=True) -> Tensor:
        """Logits of ids (B, T) read after `cache` in pieces of these sizes."""
        outputs, at = [], 0
        for piece in ids.split(list(sizes), dim=1):
            at += piece.shape[1]
            seen = None if mask is None else mask[:, : mask.shape[1] - ids.shape[1] + at]
            first = start + at - piece.shape[1]
            logits, cache = self.run.read(piece, cache, first, seen, positions)
            outputs.append(logits)
        return torch.cat(outputs, 1)

    def steps(self, cache, ids: Tensor, **options) -> Tensor:
        return self.go_on(cache, ids, [1] * ids.shape[1], **options)


def fold(t: Trial) -> float:
    return t.share(t.steps(t.prefix(t.row[:, :CUT]), t.row[:, CUT:]), t.whole[:, CUT:])


def chunk(t: Trial) -> float:
    rest = t.row[:, CUT:]
    return t.share(t.go_on(t.prefix(t.row[:, :CUT]), rest, [rest.shape[1]]), t.whole[:, CUT:])


def chunks(t: Trial) -> float:
    return t.share(t.go_on(t.prefix(t.row[:, :CUT]), t.row[:, CUT:], PIECES), t.whole[:, CUT:])


def positions(t: Trial) -> float:
    worst, rest = 0.0, t.row[:, CUT : CUT + STEPS]
    for sizes in ([STEPS], [1] * STEPS):
        with_them = t.go_on(t.prefix(t.row[:, :CUT]), rest, sizes)
        _, cache = t.read(t.row[:, :CUT], positions=False)
        worst = max(worst, t.share(t.go_on(cache, rest, sizes, positions=False), with_them))
    return worst


def _padded(t: Trial, left: bool) -> float:
    """Row 0 has PAD padding tokens, row 1 none; both go on token by token with one mask."""
    ids, more = t.ids[:2, :CUT].clone(), t.ids[:2, CUT : CUT + STEPS]
    real = t.ids[:1, : CUT - PAD]
    mask = torch.ones(2, CUT + STEPS, dtype=torch.bool, device=ids.device)
    pad = slice(0, PAD) if left else slice(CUT - PAD, CUT)
    mask[0, pad] = False
    ids[:1, mask[0, :CUT]], ids[0, pad] = real, 0
    places = (mask.long().cumsum(1) - 1).clamp(min=0)
    logits, cache = t.read(ids, mask=mask[:, :CUT], positions=places[:, :CUT])
    start = places[:, CUT].clone()
    after = t.steps(cache, more, start=start, mask=mask)
    wanted, alone = t.run.read(real)
    want_after = t.steps(alone, more[:1], start=CUT - PAD)
    inside = logits[:1][:, mask[0, :CUT]]
    return max(t.share(inside, wanted), t.share(after[:1], want_after))


def left(t: Trial) -> float:
    return _padded(t, left=True)


def right(t: Trial) -> float:
    return _padded(t, left=False)


def packed(t: Trial) -> float:
    places = torch.cat([torch.arange(CUT), torch.arange(LENGTH - CUT)])[None].to(t.row.device)
    alone, _ = t.run.read(t.row[:, CUT:])
    return t.share(t.run.packed(t.row, places)[:, CUT:], alone)


def fork(t: Trial) -> float:
    """Continue A, then B, then A again from one State; A and the State must not have changed."""
    cache = t.prefix(t.row[:, :CUT])
    state = t.run.state(cache, CUT)
    before = state.map(torch.clone)
    a, b = t.row[:, CUT : CUT + STEPS], t.ids[1:2, CUT : CUT + STEPS]
    first = t.steps(t.run.cache(state, cache), a)
    t.steps(t.run.cache(state, cache), b)
    again = t.steps(t.run.cache(state, cache), a)
    moved = max(gap(x, y) for (_, x), (_, y) in zip(state.items(), before.items(), strict=True))
    direct = t.steps(cache, a)
    return max(t.share(again, first), t.share(direct, first), float("inf") if moved else 0.0)


def shared(t: Trial) -> float:
    """What happens to a user who continues one cache object twice."""
    a, b = t.row[:, CUT : CUT + STEPS], t.ids[1:2, CUT : CUT + STEPS]
    want = t.steps(t.prefix(t.row[:, :CUT]), b)
    cache = t.prefix(t.row[:, :CUT])
    t.steps(cache, a)
    return t.share(t.steps(cache, b), want)


def gradient(t: Trial) -> float:
    """d(outputs after the cut) / d(inputs before it): through the cache, against one call.

    Of a random combination of the outputs, whose gradient does not vanish where a norm is held.
    """
    t.prefix(t.row[:, :1])
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(t.whole[:, CUT:].shape, generator=generator).to(t.whole)
    with torch.enable_grad():
        found = []
        for pieces in ([LENGTH], [CUT, LENGTH - CUT]):
            embeds = t.run.embed(t.row).detach().requires_grad_()
            outputs, cache, at = [], None, 0
            for piece in embeds.split(pieces, dim=1):
                logits, cache = t.run.read(None, cache, at, embeds=piece)
                outputs.append(logits)
                at += piece.shape[1]
            terms = torch.cat(outputs, 1)[:, CUT:] * weights
            found.append(torch.autograd.grad(terms.sum(), embeds)[0][:, :CUT])
    whole, split = found
    largest = whole.abs().max().item()
    if largest <= torch.finfo(whole.dtype).eps * terms.detach().abs().sum().item():
        raise Unsupported("vacuous: the true gradient is below rounding")
    return gap(split, whole) / largest


def save(t: Trial) -> float:
    more = t.row[:, CUT : CUT + STEPS]
    cache = t.prefix(t.row[:, :CUT])
    state = t.run.state(cache, CUT)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "check.state")
        save_state(state, path)
        loaded = load_state(path).to(t.row.device)
    restored = t.run.cache(loaded, cache)
    sizes = [STEPS // 2, *[1] * (STEPS - STEPS // 2)]
    return t.share(t.go_on(restored, more, sizes), t.go_on(cache, more, sizes))


def beams(t: Trial) -> float:
    order, more = torch.tensor([2, 0, 0], device=t.row.device), t.ids[:, CUT : CUT + 2]
    cache = t.run.reorder(t.prefix(t.ids[:, :CUT]), order)
    want = t.steps(t.prefix(t.ids[order, :CUT]), more)
    return t.share(t.steps(cache, more), want)


def batch(t: Trial) -> float:
    more = t.ids[:, CUT : CUT + STEPS]
    logits, cache = t.read(t.ids[:, :CUT])
    after = t.steps(cache, more)
    worst = 0.0
    for i in range(t.ids.shape[0]):
        alone, cache = t.run.read(t.ids[i : i + 1, :CUT])
        worst = max(worst, t.share(logits[i : i + 1], alone))
        worst = max(worst, t.share(after[i : i + 1], t.steps(cache, more[i : i + 1])))
    return worst


def bf16(t: Trial) -> float:
    """The drift that the carried state adds to what bfloat16 costs anyway, in one call."""
    if dtype_of(t.model) != torch.float32:
        raise Unsupported("the model is not in float32")
    half = Trial(copy.deepcopy(t.model).to(torch.bfloat16))
    with torch.no_grad():
        at_once = t.share(half.run.read(t.row)[0][:, CUT:], t.whole[:, CUT:])
        carried = half.steps(half.prefix(t.row[:, :CUT]), t.row[:, CUT:])
    return max(t.share(carried, t.whole[:, CUT:]) - 2 * at_once, 0.0)


def session(t: Trial) -> float:
    """Feed at 9 | 20 | end, rewind to 15, against a session fed at 9 | 15, bit for bit."""

    def fed(*edges: int) -> Session:
        made = Session(t.model, batch_size=1)
        for begin, end in zip((0, *edges), edges):
            made.feed(t.row[:, begin:end])
        return made

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read = fed(9, CUT, LENGTH)
        except ValueError as error:
            raise Unsupported(str(error)) from error
        error = t.share(read.logits, t.whole[:, -1])
        back, fresh = read.rewind(15), fed(9, 15)
    pairs = zip(back.state.items(), fresh.state.items(), strict=True)
    same = all(torch.equal(x, y) for (_, x), (_, y) in pairs)
    return error if same and torch.equal(back.logits, fresh.logits) else float("inf")


def kernel(t: Trial) -> float:
    device = device_of(t.model)
    if isinstance(t.run, OwnRunner):
        with ops.default_backend("ref"):
            want, _ = t.run.read(t.row)
        return t.share(t.whole, want)
    if device.type == "cpu":
        raise Unsupported("on the CPU transformers runs its reference only")
    reference = Trial(copy.deepcopy(t.model).cpu())
    return t.share(t.whole.cpu(), reference.run.read(t.row.cpu())[0])


CHECKS: dict[str, Callable[[Trial], float]] = {
    check.__name__: check
    for check in (fold, chunk, chunks, positions, left, right, packed, fork, shared, gradient)
    + (save, beams, batch, bf16, session, kernel)
}
