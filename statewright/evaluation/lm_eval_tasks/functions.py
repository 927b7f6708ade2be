"""What the YAML files name: data sets drawn by our tasks, and scores of single answers.

Options come from lm-eval's metadata: `tokenizer` (a path; `pretrained` will do), `num_samples`,
`seed`, and the task's own, e.g. length or data.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from statewright.evaluation.metrics import ROUGE, score
from statewright.models.tokenizers import saved_tokenizer
from statewright.tasks import TASKS
from statewright.token_text import text_of


def passkey(**options: Any) -> dict[str, Any]:
    return _data("passkey", options)


def niah(**options: Any) -> dict[str, Any]:
    return _data("niah", options)


def squality(**options: Any) -> dict[str, Any]:
    return _data("squality", options)


def qasper(**options: Any) -> dict[str, Any]:
    return _data("qasper", options)


def contains(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The share of the answers that the text contains: one, or several needles."""
    wanted = list(doc["references"]) or [doc["answer"]]
    return {"acc": score("string-match", [results[0]], [wanted]).metrics["accuracy"]}


def token_f1(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    return {"token_f1": score("token-f1", [results[0]], [doc["references"]]).metrics["f1"]}


def rouge(doc: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    found = score("rouge", [results[0]], [doc["references"]]).metrics
    return {"rouge": [found[name] for name in ROUGE]}


def geometric_mean(rows: Sequence[Sequence[float]]) -> float:
    """Of the means over samples of ROUGE-1, 2 and L."""
    return math.prod(math.fsum(column) / len(rows) for column in zip(*rows)) ** (1 / 3)


def _data(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """{"test": one row per sample}, the prompt as text: lm-eval tokenizes it again."""
    from datasets import Dataset

    known = {f.name for f in dataclasses.fields(TASKS[name])}
    task = TASKS[name](**{key: value for key, value in options.items() if key in known})
    path = options.get("tokenizer") or options.get("pretrained")
    if not path:
        raise ValueError(f"statewright_{name}: give lm-eval the metadata tokenizer, a path")
    tokenizer = saved_tokenizer(path)
    batch = task.draw(int(options.get("num_samples", 20)), int(options.get("seed", 0)), tokenizer)
    rows = [
        {
            "prompt": text_of(tokenizer, sample.input_ids),
            "answer": sample.answer,
            "references": list(sample.references),
            "cut": sample.cut,
        }
        for sample in batch.samples
    ]
    return {"test": Dataset.from_list(rows)}
