"""QASPER: questions about scientific articles, answered in a phrase, or not answerable."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from statewright.tasks.base import Batch, Tokenizer
from statewright.tasks.reading import Prompt, Question, batch_of, entry, read_data

PROMPT = Prompt(
    "You are given a scientific article and a question. Answer the question as concisely as you "
    "can, using a single phrase or sentence if possible. If the question cannot be answered based "
    'on the information in the article, write "unanswerable". If the question is a yes/no '
    'question, answer "yes", "no", or "unanswerable".\n\nArticle:\n',
    "\n\nQuestion:\n{question}\n\nAnswer:\n",
    "... [The rest of the article is omitted]",
)


@dataclass(frozen=True)
class QASPER:
    """Answers from a paper (arXiv:2105.03011), prompted as in arXiv:2305.14196.

    `data`: a .json of the release (an object per paper: title, abstract, full_text, qas). The
    article is title, abstract and sections, a blank line between. A reference is "unanswerable",
    the extractive spans joined by ", ", the free form, "yes" or "no", in this order of precedence.
    Scored by token F1, the best over references. Raises ValueError for a file of another format,
    naming the field.
    """

    data: str = ""
    length: int = 4096
    new_tokens: int = 64
    version: ClassVar[int] = 1
    metric: ClassVar[str] = "token-f1"

    def draw(self, n: int, seed: int, tokenizer: Tokenizer) -> Batch:
        asked = list(_questions(read_data("qasper", self.data), self.data))
        return batch_of(self, asked, n, seed, PROMPT, tokenizer)


def _questions(text: str, path: str) -> Iterator[Question]:
    try:
        papers = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(papers, dict) or not papers:
        raise ValueError(f"{path}: expected an object with one entry per paper")
    for name, paper in papers.items():
        where = f"{path}, {name}"
        document = _article(paper, where)
        for i, asked in enumerate(entry(paper, "qas", list, where)):
            here = f"{where}.qas[{i}]"
            found = entry(asked, "answers", list, here)
            references = tuple(
                _reference(entry(a, "answer", dict, f"{here}.answers[{j}]"), f"{here}.answers[{j}]")
                for j, a in enumerate(found)
            )
            if not references:
                raise ValueError(f"{here}: field 'answers' is empty, expected a reference")
            yield Question(document, entry(asked, "question", str, here), references)


def _article(paper: Any, where: str) -> str:
    parts = [entry(paper, "title", str, where), entry(paper, "abstract", str, where)]
    for i, section in enumerate(entry(paper, "full_text", list, where)):
        here = f"{where}.full_text[{i}]"
        paragraphs = entry(section, "paragraphs", list, here)
        name = section.get("section_name") or ""  # null for a part without a heading
        parts += [str(part) for part in (name, *paragraphs)]
    return "\n\n".join(part.strip() for part in parts if part.strip())


def _reference(answer: dict[str, Any], where: str) -> str:
    if entry(answer, "unanswerable", bool, where):
        return "unanswerable"
    if spans := entry(answer, "extractive_spans", list, where):
        return ", ".join(map(str, spans))
    if free := entry(answer, "free_form_answer", str, where):
        return free
    return "yes" if entry(answer, "yes_no", bool, where) else "no"
