"""Models whose disease is known because it was built in: the positive controls of every verdict."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from statewright.mixers.mamba2 import Mamba2
from statewright.models import StatewrightConfig, StatewrightForCausalLM, load
from statewright.models.tokenizers import byte_tokenizer
from statewright.train.checkpoint import replace_directory
from statewright.train.config import TrainConfig
from statewright.train.data import IGNORED, Corpus, Lanes
from statewright.train.loop import make_optimizer

Listener = Callable[[int, float], None]


@dataclass(frozen=True)
class Control:
    """A small byte-level Mamba-2, each row of a batch started from an empty state.

    decay_scale multiplies the initial decay rate A: 1 is the official initialisation; 1e-3 keeps
    everything, which training at 64 tokens never punishes, so that the state collapses beyond
    (the disease of arXiv:2410.07145 in a minute instead of weeks). train_length in tokens.
    """

    decay_scale: float = 1e-3
    train_length: int = 64
    num_steps: int = 500
    num_rows: int = 32
    learning_rate: float = 3e-3
    hidden_size: int = 96
    state_size: int = 64
    head_dim: int = 32
    num_layers: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.decay_scale > 0 and math.isfinite(self.decay_scale)):
            raise ValueError(f"decay_scale={self.decay_scale}, expected a positive number")

    @property
    def training(self) -> TrainConfig:
        """Raises ValueError for options that cannot be trained with."""
        return TrainConfig(
            num_steps=self.num_steps,
            num_lanes=self.num_rows,
            length=self.train_length,
            learning_rate=self.learning_rate,
            num_warmup_steps=min(50, self.num_steps // 4),
            final_rate=0.02,
            seed=self.seed,
        )


def untrained(control: Control) -> StatewrightForCausalLM:
    """The control before its first step; its config says how long its training texts are."""
    config = StatewrightConfig(
        vocab_size=257,
        hidden_size=control.hidden_size,
        num_hidden_layers=control.num_layers,
        mixer=f"mamba2:state_size={control.state_size}:head_dim={control.head_dim}",
        conv_kernel=0,
        mlp_ratio=0.0,
        tie_word_embeddings=True,
        eos_token_id=256,
        train_length=control.train_length,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(control.seed)
        model = StatewrightForCausalLM(config)
        # Tied to the head: torch's N(0, 1) would begin with logits of size sqrt(D).
        nn.init.normal_(model.model.embeddings.weight, std=0.02)
    return scale_decay(model, control.decay_scale)


def train_control(
    control: Control, corpus: Corpus, listen: Listener = lambda step, loss: None
) -> StatewrightForCausalLM:
    """Train on texts of `train_length` tokens; nothing is carried from one to the next.

    `listen(steps done, loss in nats)` after every step. The corpus must be of bytes.
    """
    model, config = untrained(control).train(), control.training
    lanes = Lanes(corpus, config.num_lanes, config.length, config.seed)
    optimizer = make_optimizer(model, config)
    for step in range(config.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = config.rate(step)
        batch = lanes.batch(step)
        logits = model(batch.ids, reset=batch.reset).logits.flatten(0, 1)
        loss = F.cross_entropy(logits, batch.labels.flatten(), ignore_index=IGNORED)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        listen(step + 1, loss.item())
    return model.eval()


def saved_control(
    control: Control,
    corpus: Corpus,
    directory: str | Path,
    listen: Listener = lambda step, loss: None,
) -> StatewrightForCausalLM:
    """As `train_control`, with its tokenizer in `directory`; a model already there is loaded.

    The directory appears whole or not at all. Raises ValueError if it holds another control.
    """
    directory = Path(directory)
    about = repr(control)
    if (directory / "config.json").is_file():
        model = load(directory)
        if getattr(model.config, "control", None) != about:
            raise ValueError(f"{directory}: holds another model than {about}")
        return model
    model = train_control(control, corpus, listen)
    model.config.control = about

    def write(at: Path) -> None:
        model.save_pretrained(at)
        byte_tokenizer().save_pretrained(at)

    replace_directory(directory, write)
    return model


@torch.no_grad()
def scale_decay(model: StatewrightForCausalLM, factor: float) -> StatewrightForCausalLM:
    """A copy whose Mamba-2 layers decay `factor` times as fast (A_log + ln factor).

    After training, a large factor is amnesia. Raises ValueError for a model without Mamba-2.
    """
    model = copy.deepcopy(model)
    mixers = [module for module in model.modules() if isinstance(module, Mamba2)]
    if not mixers:
        raise ValueError("scale_decay: the model has no Mamba-2 layer")
    for mixer in mixers:
        mixer.A_log += math.log(factor)
    return model
