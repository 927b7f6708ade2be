"""Long inputs from files: a document, a question, and as much of the document as fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from statewright.tasks.base import Batch, Sample, Tokenizer, encode
from statewright.text_file import whole_text


@dataclass(frozen=True)
class Question:
    """One question about a document, with every reference answer."""

    document: str
    question: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Prompt:
    """What stands before and after a document, and where the document was cut."""

    before: str
    after: str
    cut: str

    def sample(self, asked: Question, document: list[int], length: int, tokenizer: Any) -> Sample:
        """At most `length` tokens: the document's end is cut, never the question.

        As ZeroSCROLLS (arXiv:2305.14196), but the parts are tokenized one by one, so
        that the question's tokens do not depend on the cut. `Sample.cut` counts the tokens lost.
        """
        before = encode(tokenizer, self.before)
        after = encode(tokenizer, self.after.format(question=asked.question))
        lost = 0
        if len(before) + len(document) + len(after) > length:
            mark = encode(tokenizer, self.cut)
            room = length - len(before) - len(mark) - len(after)
            if room < 1:
                raise ValueError(
                    f"length={length}, expected at least {length - room + 1} tokens: the "
                    "instruction and the question are never cut"
                )
            lost = len(document) - room
            document = [*document[:room], *mark]
        ids = torch.tensor([*before, *document, *after])
        return Sample(ids, references=asked.references, cut=lost)


def draw_questions(
    asked: Sequence[Question],
    n: int,
    seed: int,
    prompt: Prompt,
    length: int,
    tokenizer: Tokenizer,
) -> tuple[Sample, ...]:
    """The first n questions for seed 0, else n drawn without replacement."""
    if n > len(asked):
        raise ValueError(f"n={n} questions asked for, the file has {len(asked)}")
    order = list(range(len(asked)))
    if seed:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(asked), generator=generator).tolist()
    documents: dict[str, list[int]] = {}
    samples = []
    for i in order[:n]:
        text = asked[i].document
        if text not in documents:
            documents[text] = encode(tokenizer, text)
        samples.append(prompt.sample(asked[i], documents[text], length, tokenizer))
    return tuple(samples)


def batch_of(
    task: Any, asked: Sequence[Question], n: int, seed: int, prompt: Prompt, tokenizer: Tokenizer
) -> Batch:
    """`draw_questions` for a task with `length` and `new_tokens`; its name leads the errors."""
    try:
        samples = draw_questions(asked, n, seed, prompt, task.length, tokenizer)
    except ValueError as error:
        raise ValueError(f"{type(task).__name__.lower()}: {error}") from error
    return Batch(samples, task.new_tokens)


def read_data(task: str, path: str, option: str = "data") -> str:
    """The file's text, as `read_text` reads it; ValueError if there is none."""
    if not path or not Path(path).is_file():
        raise ValueError(f"{task}: {option}={path!r} is not a file: {task}:{option}=PATH")
    return whole_text(path)


def entry(holder: Any, key: str, kind: type, where: str) -> Any:
    """holder[key] of a JSON object, which must be of `kind`; ValueError names place and field."""
    if not isinstance(holder, dict):
        raise ValueError(f"{where}: expected an object, got {_named(holder)}")
    if key not in holder:
        raise ValueError(f"{where}: field {key!r} is missing (there: {', '.join(holder)})")
    if not isinstance(holder[key], kind):
        expected = {str: "a text", list: "a list", dict: "an object", bool: "true or false"}[kind]
        raise ValueError(f"{where}: field {key!r} is {_named(holder[key])}, expected {expected}")
    return holder[key]


def _named(value: Any) -> str:
    names = {str: "a text", list: "a list", dict: "an object", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")
