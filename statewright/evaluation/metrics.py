"""Answers against references: ROUGE and token F1, by name."""

from __future__ import annotations

import difflib
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

ROUGE = ("rouge1", "rouge2", "rougeL")
References = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Scores:
    """metrics: the first is the score, a share of 1; per_sample: their mean is the score."""

    metrics: dict[str, float]
    per_sample: tuple[float, ...]


def score(metric: str, texts: Sequence[str], references: References) -> Scores:
    """Compare each text with its own references. ValueError for an unknown metric."""
    if metric not in METRICS:
        close = difflib.get_close_matches(metric, METRICS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown metric {metric!r}{hint} (known: {', '.join(sorted(METRICS))})")
    if len(texts) != len(references) or not texts or not all(references):
        raise ValueError(
            f"{metric}: {len(texts)} texts and {len(references)} lists of references, expected as "
            "many, at least 1, with a reference for each text"
        )
    return METRICS[metric](texts, references)


def rouge(texts: Sequence[str], references: References) -> Scores:
    """Geometric mean of ROUGE-1, 2 and L (arXiv:2305.14196), by the package rouge-score.

    F-measures without stemming, the best over the references for each of the three; then means
    over samples, then (R1 R2 RL)^(1/3). per_sample is each sample's first-order share of it,
    G/3 sum_m r_m / R_m: their mean is G, so that differences and errors can be taken as of a mean
    (the delta method). Raises ValueError if rouge-score is not installed.
    """
    scorer = _rouge_scorer()
    rows = []
    for text, own in zip(texts, references):
        found = [scorer.score(reference, text) for reference in own]
        rows.append([max(f[name].fmeasure for f in found) for name in ROUGE])
    means = [math.fsum(column) / len(rows) for column in zip(*rows)]
    whole = math.prod(means) ** (1 / 3)
    shares = [0.0] * len(rows)
    if whole:
        shares = [whole / 3 * sum(r / mean for r, mean in zip(row, means)) for row in rows]
    return Scores({"rouge": whole, **dict(zip(ROUGE, means))}, tuple(shares))


def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ValueError(
            "ROUGE needs the package rouge-score: pip install 'statewright[eval]'"
        ) from error
    return RougeScorer(list(ROUGE), use_stemmer=False)


def token_f1(texts: Sequence[str], references: References) -> Scores:
    """Mean of the best token F1 over references, as QASPER and ZeroSCROLLS (arXiv:2105.03011).

    Lower case, without ASCII punctuation and articles; F1 of the bags of words. "yes", "no" and
    "unanswerable" are texts like others.
    """
    values = tuple(max(_f1(text, ref) for ref in own) for text, own in zip(texts, references))
    return Scores({"f1": math.fsum(values) / len(values)}, values)


def _f1(text: str, reference: str) -> float:
    found, wanted = _words(text), _words(reference)
    common = (Counter(found) & Counter(wanted)).total()
    return 2 * common / (len(found) + len(wanted)) if common else 0.0


def _words(text: str) -> list[str]:
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def string_match(texts: Sequence[str], references: References) -> Scores:
    """Mean share of a sample's references that its text contains, in any case.

    RULER's string_match_all (arXiv:2404.06654), for needles that are all asked for.
    """
    pairs = [(text.lower(), own) for text, own in zip(texts, references)]
    values = tuple(math.fsum(r.lower() in text for r in own) / len(own) for text, own in pairs)
    return Scores({"accuracy": math.fsum(values) / len(values)}, values)


METRICS: dict[str, Callable[[Sequence[str], References], Scores]] = {
    "rouge": rouge,
    "token-f1": token_f1,
    "string-match": string_match,
}
