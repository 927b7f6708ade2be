"""Long generation: stories from a premise, as long as a model will write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from statewright.tasks.base import Batch, Sample, Tokenizer, encode
from statewright.tasks.reading import read_data

PREMISES = (
    "A lighthouse keeper receives letters from a ship that sank thirty years ago.",
    "Two rival bakers must share one oven through the longest winter of their town.",
    "A map maker finds that the country she has drawn by mistake is real.",
    "The last train of the night stops at a station that is on no timetable.",
    "A clock maker's apprentice repairs a watch that counts towards something.",
    "Three sisters inherit a circus, a debt and an elephant who trusts only the youngest.",
    "A village votes to move itself, house by house, away from a rising lake.",
    "A translator at a peace conference changes one word on purpose.",
    "A boy who collects sounds records a voice that knows his name.",
    "The gardener of a palace plants a hedge maze that nobody, not even she, can leave.",
    "A retired thief is asked to return everything that he ever stole.",
    "A crew on the way to a distant moon learns that their harvest has begun to sing.",
    "A teacher walks across four countries to deliver one examination paper.",
    "The river changes its course overnight, and with it the border between two kingdoms.",
    "A blind painter is accused of forging pictures that only he could describe.",
    "A message in a bottle is answered, and the answer is answered, for sixty years.",
    "The night watchman of a museum plays chess with a visitor who leaves no footprints.",
    "A mountain guide must bring home a party of strangers who all lied about their names.",
    "An island without birds wakes up to find ten thousand of them waiting.",
    "A printer discovers that the novel he is setting tells his next day, page by page.",
)
ASKED = (
    "Write a very long story, of at least 4,000 words. It has at least twenty characters with "
    "names, it visits three countries and nine cities, it has at least ten chapters, and its plot "
    "turns many times. It begins like this: {premise}"
)
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that completes it.\n\n"
    "### Instruction:\n{asked}\n\n### Response:\n"
)
_STYLES = ("alpaca", "chat", "plain")


@dataclass(frozen=True)
class Stories:
    """Write on from n premises for up to `new_tokens` tokens (arXiv:2401.06104, section 5.3).

    `prompts`: a UTF-8 file, a premise per line; else twenty of our own. The first n for seed 0,
    else n drawn without replacement. style: "alpaca", the paper's kind of instruction; "chat", the
    tokenizer's own template; "plain", the premise alone. temperature 0: greedy, else sampled, by
    the seed alone. Scored by length in tokens, repetition and distinct n-grams (`story_scores`);
    pairs of stories go to a judge. Raises ValueError for a file without premises, more stories
    than premises, and a tokenizer without a template.
    """

    new_tokens: int = 1024
    prompts: str = ""
    style: Literal["alpaca", "chat", "plain"] = "alpaca"
    temperature: float = 0.0
    version: ClassVar[int] = 1
    metric: ClassVar[str] = "story"
    judged: ClassVar[bool] = True

    def draw(self, n: int, seed: int, tokenizer: Tokenizer) -> Batch:
        if self.new_tokens < 1 or not self.temperature >= 0:
            raise ValueError(
                f"stories: new_tokens={self.new_tokens}, temperature={self.temperature}; expected "
                "at least 1 token and a temperature of 0 or more"
            )
        premises = self._premises()
        if n > len(premises):
            raise ValueError(f"stories: n={n} asked for, there are {len(premises)} premises")
        order = list(range(len(premises)))
        if seed:
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(premises), generator=generator).tolist()
        drawn = [Sample(self._prompt(premises[i], tokenizer)) for i in order[:n]]
        return Batch(tuple(drawn), self.new_tokens)

    def _premises(self) -> list[str]:
        if not self.prompts:
            return list(PREMISES)
        lines = read_data("stories", self.prompts, "prompts").split("\n")
        return [line.strip() for line in lines if line.strip()]

    def _prompt(self, premise: str, tokenizer: Any) -> torch.Tensor:
        if self.style == "plain":
            return torch.tensor(encode(tokenizer, premise))
        asked = ASKED.format(premise=premise)
        if self.style == "alpaca":
            return torch.tensor(encode(tokenizer, _ALPACA.format(asked=asked)))
        if self.style != "chat":
            raise ValueError(f"stories: style={self.style!r}, expected {', '.join(_STYLES)}")
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("stories: style='chat', but the tokenizer has no chat template")
        messages = [{"role": "user", "content": asked}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return torch.tensor(encode(tokenizer, text))
