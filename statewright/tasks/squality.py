"""SQuALITY: questions about short stories, each answered in a paragraph."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from statewright.tasks.base import Batch, Tokenizer
from statewright.tasks.reading import Prompt, Question, batch_of, entry, read_data

PROMPT = Prompt(
    "You are given a story and a question. Answer the question in a paragraph.\n\nStory:\n",
    "\n\nQuestion:\n{question}\n\nAnswer:\n",
    "... [The rest of the story is omitted]",
)


@dataclass(frozen=True)
class SQuALITY:
    """Summaries that answer a question (arXiv:2205.11465), prompted as in arXiv:2305.14196.

    `data`: a .jsonl of the release (v1.3: document, questions, responses). A prompt has at most
    `length` tokens; the story's end is cut, and the cut is reported. Scored by the geometric mean
    of ROUGE-1, 2 and L against all references. Raises ValueError for a file of another format,
    with line and field.
    """

    data: str = ""
    length: int = 4096
    new_tokens: int = 256
    version: ClassVar[int] = 1
    metric: ClassVar[str] = "rouge"

    def draw(self, n: int, seed: int, tokenizer: Tokenizer) -> Batch:
        asked = list(_questions(read_data("squality", self.data), self.data))
        return batch_of(self, asked, n, seed, PROMPT, tokenizer)


def _questions(text: str, path: str) -> Iterator[Question]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            story = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON ({error})") from error
        document = entry(story, "document", str, where)
        for i, asked in enumerate(entry(story, "questions", list, where)):
            here = f"{where}, questions[{i}]"
            replies = entry(asked, "responses", list, here)
            references = tuple(
                entry(reply, "response_text", str, f"{here}.responses[{j}]")
                for j, reply in enumerate(replies)
            )
            if not references:
                raise ValueError(f"{here}: field 'responses' is empty, expected a reference")
            yield Question(document, entry(asked, "question_text", str, here), references)
