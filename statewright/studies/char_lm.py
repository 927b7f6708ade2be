"""Character language modelling, figure 2 of "Were RNNs All We Needed?" (arXiv:2410.01201)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from statewright.models import StatewrightForCausalLM
from statewright.studies.cells import Cell
from statewright.studies.experiment import Place, System, Systems
from statewright.studies.fit import Fit, training_seed
from statewright.studies.settings import CharLMSettings
from statewright.text_file import whole_text

NAME = "char-lm"
DEFAULT = ("mingru/3", "minlstm/3", "mamba/3", "transformer/3")
# Test loss (nats per character) and about the step of it, in the paper.
PAPER = {
    "mingru": (1.548, "575"),
    "minlstm": (1.555, "625"),
    "mamba": (1.575, "400"),
    "transformer": (1.547, "2000+"),
}


def systems(settings: CharLMSettings) -> Systems:
    """Conv4, minimal RNN, MLP for the minimal ones, as the paper says; the others as they are.

    Mamba has its own convolution and gate, hence neither here (the paper does not say). The
    Transformer is ours: rotary positions and RMSNorm where nanoGPT has learned ones and LayerNorm.
    """
    minimal = {"conv_kernel": 4, "mlp_ratio": 4.0}
    return {
        "mingru": {"mixer": f"mingru:expansion={settings.expansion}", **minimal},
        "minlstm": {"mixer": f"minlstm:expansion={settings.expansion}", **minimal},
        "mamba": {"mixer": "mamba:state_size=16:expand=2", "conv_kernel": 0, "mlp_ratio": 0.0},
        "transformer": {
            "mixer": f"attention:num_heads={settings.num_heads}",
            "conv_kernel": 0,
            "mlp_ratio": 4.0,
        },
        "lstm": {"mixer": f"lstm:expansion={settings.expansion}", **minimal},
        "gru": {"mixer": f"gru:expansion={settings.expansion}", **minimal},
    }


@dataclass(frozen=True, eq=False)
class Characters:
    """A text as ids of its sorted characters; the first 90 % train, the rest is held out."""

    train: Tensor
    held_out: Tensor
    vocab: int
    digest: str

    @classmethod
    def of(cls, path: str | Path, context: int) -> Characters:
        """nanoGPT's split. ValueError if the file is no text or too short for one window."""
        text = whole_text(path)
        number = {c: i for i, c in enumerate(sorted(set(text)))}
        ids = torch.tensor([number[c] for c in text])
        cut = int(len(ids) * 0.9)
        if len(ids) - cut < context + 1:
            raise ValueError(
                f"{path}: {len(ids)} characters are too few for a held-out window of {context}"
            )
        return cls(ids[:cut], ids[cut:], len(number), hashlib.sha256(text.encode()).hexdigest())

    def batch(self, seed: int, rows: int, context: int) -> tuple[Tensor, Tensor]:
        """Windows at random places of the training text, and the characters that follow each."""
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(self.train) - context, (rows,), generator=generator)
        at = starts.unsqueeze(1) + torch.arange(context + 1)
        return self.train[at[:, :-1]], self.train[at[:, 1:]]

    def windows(self, most: int, context: int) -> tuple[Tensor, Tensor]:
        """Windows that follow each other through the held-out text, at most so many."""
        count = min(most, (len(self.held_out) - 1) // context)
        part = self.held_out[: count * context + 1]
        return part[:-1].view(count, context), part[1:].view(count, context)


@torch.no_grad()
def held_out_loss(
    model: StatewrightForCausalLM, ids: Tensor, targets: Tensor, batch_size: int
) -> dict[str, float]:
    """Mean nats per character, every window from an empty state."""
    model.eval()
    total = 0.0
    for some, wanted in zip(ids.split(batch_size), targets.split(batch_size)):
        logits = model(some.to(model.device)).logits.flatten(0, 1).float()
        total += F.cross_entropy(logits, wanted.flatten().to(model.device), reduction="sum").item()
    return {"loss": total / targets.numel()}


def cells(
    settings: CharLMSettings,
    chosen: Sequence[str],
    seeds: Sequence[int],
    place: Place,
    text: str = "",
) -> list[Cell]:
    """One per system and seed; each holds the digest of the text it was trained on."""
    if not text:
        raise ValueError("char-lm: give a text (the paper's is Tiny Shakespeare)")
    known, data = systems(settings), Characters.of(text, settings.context)
    windows = data.windows(settings.num_eval, settings.context)

    def run(system: System, seed: int, key: str) -> dict[str, Any]:
        model = system.build(
            known,
            seed,
            place.device,
            vocab_size=data.vocab,
            hidden_size=settings.hidden_size,
            dropout=settings.dropout,
        )

        def batch(step: int) -> tuple[Tensor, Tensor]:
            return data.batch(training_seed(seed, step), settings.batch_size, settings.context)

        result = Fit(
            model,
            settings,
            seed,
            batch,
            lambda m: held_out_loss(m, *windows, settings.batch_size),
            place.snapshot(key),
            lambda point: place.listen({"key": key, **point}),
        ).train()
        best = min(result["curve"], key=lambda point: point["loss"])
        return {**result, "best_loss": best["loss"], "best_step": best["step"], "text": data.digest}

    parsed = [System.parse(name, known) for name in chosen]
    keyed = [(s, seed, f"{s}/seed{seed}") for s in parsed for seed in seeds]
    return [Cell(key, lambda s=s, n=n, key=key: run(s, n, key)) for s, n, key in keyed]


def table(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Per run: the best held-out loss and its step, and the paper's."""
    rows = []
    for key, result in found["cells"].items():
        loss, step = PAPER.get(key.split("/")[0], ("", ""))
        rows.append(
            {
                "run": key,
                "parameters": f"{result['parameters']:,}",
                "best loss": f"{result['best_loss']:.3f}",
                "at step": result["best_step"],
                "paper's loss": loss,
                "paper's step": step,
            }
        )
    return rows
