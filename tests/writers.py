"""A scripted stand-in for a model that writes, for tests of tasks and of `evaluate`."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from statewright.models.tokenizers import byte_tokenizer

TOKENIZER = byte_tokenizer()


class Writer(nn.Module):
    """Continues every prompt with what `reply(text)` says."""

    def __init__(self, reply) -> None:
        super().__init__()
        self.reply, self.device, self.calls = reply, torch.device("cpu"), 0
        text = SimpleNamespace(vocab_size=257)
        self.config = SimpleNamespace(get_text_config=lambda: text)

    def generate(self, ids, **options):
        self.calls += 1
        texts = [TOKENIZER.encode(self.reply(TOKENIZER.decode(row))) for row in ids]
        longest = max(map(len, texts))
        padded = [[*text, *[32] * (longest - len(text))] for text in texts]
        return torch.cat([ids, torch.tensor(padded)], 1)
