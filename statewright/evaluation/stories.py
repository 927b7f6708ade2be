"""What can be counted in long generated texts, without a judge."""

from __future__ import annotations

import math
from collections.abc import Sequence

from statewright.evaluation.metrics import Scores

NGRAMS = (1, 2, 3, 4)
_REPEATED = 4


def story_scores(texts: Sequence[str], num_tokens: Sequence[int]) -> Scores:
    """Length, repetition and diversity of n stories; per sample: the length in tokens.

    tokens: mean number up to the end of the text; words: parts between white space, lower case.
    repetition: mean over stories of 1 - distinct / all 4-grams of words within one (seq-rep-4,
    arXiv:1908.04319; 0 for stories below 4 words). distinct_n: distinct / all n-grams of words
    over all stories together (arXiv:1510.03055; 0 if there are none).
    """
    stories = [text.lower().split() for text in texts]
    count = len(stories)
    metrics = {
        "tokens": math.fsum(num_tokens) / count,
        "words": math.fsum(map(len, stories)) / count,
        "repetition": math.fsum(map(_repetition, stories)) / count,
    }
    for n in NGRAMS:
        grams = [gram for story in stories for gram in _ngrams(story, n)]
        metrics[f"distinct_{n}"] = len(set(grams)) / len(grams) if grams else 0.0
    return Scores(metrics, tuple(map(float, num_tokens)))


def _repetition(words: Sequence[str]) -> float:
    grams = _ngrams(words, _REPEATED)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
