"""Which disease: one rule, its thresholds, and the words for it.

The literature points both ways (long contexts fail because the memory decays too fast, or because
it never does), and the remedies push in opposite directions; so both losses and states are heard.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from statewright.diagnosis.reading import Bucket, Comparison, Reading
from statewright.diagnosis.remembrance import Remembrance, memory

HEALTHY = "healthy"
COLLAPSE = "collapse (does not forget)"
AMNESIA = "amnesia (forgets too fast)"
SHIFT = "data or position shift"
VERDICTS = (HEALTHY, COLLAPSE, AMNESIA, SHIFT)

# What is carried does harm where the same tokens have, beyond doubt (95 % intervals), this many
# times the perplexity that they have from an empty state. Half as much loss again is reported too,
# but decides nothing: it means little where the loss is high, and everything where it is low.
PERPLEXITY_FACTOR = 2.0
LOSS_FACTOR = 1.5
# A head does not forget if its variance has grown this many times and a training length leaves
# this share of what it held.
GROWTH = 4.0
RETENTION = 0.5
# A model forgets too fast if this share of its training length decides the next token, up to this
# share of what one token alone misses, and no head's half-life is longer than that.
MEMORY_SHARE = 1 / 8
FORGOTTEN = 0.01


@dataclass(frozen=True)
class Head:
    """A head to blame: how much its variance grew, and what a training length leaves of it."""

    layer: str
    head: int
    growth: float
    retention: float | None


@dataclass(frozen=True)
class Verdict:
    """cause: what fails first, "carried", "text", or None. safe_length: tokens up to which it does
    not (at least that many without a cause). loss_limit_at, perplexity_limit_at: where 1.5 times
    the loss and twice the perplexity inside the training length are first exceeded, whatever the
    cause. worst: the highest loss beyond, as a multiple. memory: tokens that decide the next."""

    name: str
    cause: str | None
    safe_length: int
    loss_limit_at: int | None
    perplexity_limit_at: int | None
    worst: float
    blamed: tuple[Head, ...]
    memory: int | None
    longest_half_life: float | None


def judge(reading: Reading, remembered: Sequence[Remembrance] = ()) -> Verdict:
    """The rule.

    Where what is carried does harm, it is collapse if some head does not forget, else a shift (of
    positions, or in lists of keys and values). Where the same text costs twice the perplexity of
    its beginning from an empty state too, it is a shift of data. Otherwise it is amnesia if a
    small part of the training length decides every next token and the decays agree; else healthy.
    """
    harmed = [c.begin for c in reading.comparisons if _harmful(c)]
    harder = [c.begin for c in reading.comparisons if _harder(c, reading)]
    blamed = unforgetting(reading)
    span = memory(tuple(remembered), FORGOTTEN) if remembered else None
    longest = _longest_half_life(reading)
    short = MEMORY_SHARE * reading.train_length
    if harmed:
        name, cause, safe = COLLAPSE if blamed else SHIFT, "carried", harmed[0]
    elif harder:
        name, cause, safe = SHIFT, "text", harder[0]
    elif span is not None and span <= short and (longest is None or longest <= short):
        name, cause, safe = AMNESIA, None, reading.length
    else:
        name, cause, safe = HEALTHY, None, reading.length
    return Verdict(
        name=name,
        cause=cause,
        safe_length=safe,
        loss_limit_at=_first(reading, LOSS_FACTOR * reading.in_window),
        perplexity_limit_at=_first(reading, perplexity_limit(reading)),
        worst=max(b.nats for b in _beyond(reading)) / max(reading.in_window, 1e-9),
        blamed=blamed if name == COLLAPSE else (),
        memory=span,
        longest_half_life=longest,
    )


def _harmful(c: Comparison) -> bool:
    """Whether what is carried costs too much on an octave's tokens."""
    return c.carried - c.fresh - c.error > math.log(PERPLEXITY_FACTOR)


def _harder(c: Comparison, reading: Reading) -> bool:
    """Whether an octave's text is harder than the beginning, whatever is carried."""
    doubt = math.hypot(c.fresh_error, reading.in_window_error)
    return c.fresh - doubt > perplexity_limit(reading)


def unforgetting(reading: Reading) -> tuple[Head, ...]:
    """Heads that grew and forget nothing, worst first.

    A bounded recurrence (minGRU) cannot grow: where nothing but recurrent states is carried, a
    head that keeps its content is evidence enough of why what is carried does harm.
    """
    found = []
    for layer in reading.layers:
        for head, growth in enumerate(layer.growth):
            kept = None if layer.retention is None else layer.retention[head]
            grown = growth > GROWTH and (kept is None or kept > RETENTION)
            bounded = layer.kind == "VectorState" and not reading.has_attention
            if grown or (bounded and kept is not None and kept > RETENTION):
                found.append(Head(layer.name, head, growth, kept))
    return tuple(sorted(found, key=lambda h: -h.growth))


def perplexity_limit(reading: Reading) -> float:
    """The loss at twice the perplexity inside the training length, in nats."""
    return reading.in_window + math.log(PERPLEXITY_FACTOR)


def _beyond(reading: Reading) -> list[Bucket]:
    return [b for b in reading.buckets if b.begin >= reading.train_length]


def _first(reading: Reading, limit: float) -> int | None:
    over = (b for b in _beyond(reading) if b.nats - b.error > limit)
    return next((b.begin for b in over), None)


def _longest_half_life(reading: Reading) -> float | None:
    """Of any head while texts of the training length were read; None if no gate is seen."""
    gates = [layer.gates[0] for layer in reading.layers if layer.gates]
    return max((max(g.half_life) for g in gates), default=None)


def words(reading: Reading, verdict: Verdict) -> str:
    """The verdict in a few sentences for somebody who has not read any of this."""
    T, name = reading.train_length, verdict.name
    times = reading.length / T
    base = f"{reading.in_window:.2f} nats per token inside the training length of {T:,}"
    if name == HEALTHY:
        more = max(0.0, *(c.carried - c.fresh for c in reading.comparisons))
        return (
            f"The model reads {reading.length:,} tokens, {times:,.0f} training lengths, without "
            f"harm: {base}, and beyond it at most {more:.2f} nats more than the same text costs "
            "from an empty state."
        )
    if name == AMNESIA:
        return (
            f"The model is told the same by its last {verdict.memory:,} tokens as by all {T:,} it "
            f"was trained to use{_half_life_words(verdict)}. Its loss is flat ({base}), because "
            "nothing from further back arrives. More forgetting would make this worse."
        )
    fresh = _comparison(reading, verdict)
    if verdict.cause == "text":
        return (
            f"The text is to blame, not what is carried: from {verdict.safe_length:,} tokens on it "
            f"is harder for this model, read on or afresh ({fresh}; {base} at the beginning)."
        )
    rise = (
        f"What is carried does harm from {verdict.safe_length:,} tokens on: {fresh} ({base}, at "
        f"worst {verdict.worst:.1f} times that). "
    )
    if name == SHIFT:
        return (
            rise + "But no recurrent state grows or holds on: look at positions, and at lists of "
            "keys and values."
        )
    head = verdict.blamed[0]
    kept = "whose"
    if head.retention is not None:
        kept = f"which keeps {head.retention:.1%} of its content over one training length and whose"
    return (
        rise + f"The state never learned to forget: {_count(verdict.blamed)}, most of all layer "
        f"{head.layer}, head {head.head}, {kept} variance grew {head.growth:,.0f}-fold."
    )


def _comparison(reading: Reading, verdict: Verdict) -> str:
    pairs: list[Comparison] = [c for c in reading.comparisons if c.begin >= verdict.safe_length]
    worst = max(pairs, key=lambda c: c.carried)
    return (
        f"after {worst.begin:,} tokens the same text costs {worst.carried:.2f} nats read on and "
        f"{worst.fresh:.2f} from an empty state"
    )


def _half_life_words(verdict: Verdict) -> str:
    if verdict.longest_half_life is None:
        return ""
    return f"; its slowest head has a half-life of {verdict.longest_half_life:.1f} tokens"


def _count(heads: Sequence[Head]) -> str:
    layers = sorted({h.layer for h in heads}, key=lambda name: [int(n) for n in name.split(".")])
    return f"{len(heads)} heads in layer{'s' * (len(layers) > 1)} {', '.join(layers)}"
