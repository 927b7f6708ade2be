"""Training: stateful lanes, truncated backpropagation through time, exact resume."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from statewright.state import ModelState
from statewright.train.checkpoint import (
    Checkpoint,
    checkpoints,
    publish,
    rotate,
    save_checkpoint,
)
from statewright.train.config import TrainConfig
from statewright.train.data import IGNORED, Batch, Corpus, Lanes
from statewright.train.evaluate import HeldOut, held_out

Listener = Callable[[dict[str, Any]], None]
METRICS = "metrics.jsonl"


class TrainingStopped(Exception):
    """The loss or a gradient is not finite; the message says what was kept."""


class TrainingInterrupted(Exception):
    """Ctrl-C: everything is saved at `checkpoint`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(f"interrupted after step {checkpoint.step}; saved {checkpoint.path}")
        self.checkpoint = checkpoint


@dataclass
class Run:
    """A model being trained on a corpus; `train()` does the rest of its steps.

    The state is carried from chunk to chunk and detached there (truncated backpropagation
    through time). A step depends on the weights, the optimizer, the carried state and its number
    alone (data, learning rate and dropout are functions of seed and step), so that a resumed run
    equals an uninterrupted one bit for bit on the same machine and thread count.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train_corpus: Corpus
    valid_corpus: Corpus | None
    config: TrainConfig
    directory: Path
    about: dict[str, Any] = field(default_factory=dict)
    listen: Listener = lambda event: None

    def __post_init__(self) -> None:
        self.lanes = Lanes(
            self.train_corpus, self.config.num_lanes, self.config.length, self.config.seed
        )
        self.optimizer = make_optimizer(self.model, self.config)
        self.state: ModelState = self.model.init_state(self.config.num_lanes).detach()
        self.step = 0
        self.last: Checkpoint | None = None
        self.seconds = 0.0
        self.valid: HeldOut | None = None

    def resume(self) -> None:
        """Continue from the newest checkpoint; ValueError if there is none or the data differ."""
        found = checkpoints(self.directory)
        if not found:
            raise ValueError(f"{self.directory}: no checkpoint to resume from")
        newest = found[-1]
        if newest.record["data"] != self.train_corpus.fingerprint:
            raise ValueError(f"{newest.path}: was trained on other text; give the same files")
        newest.restore(self.model, self.optimizer)
        self.state = newest.carried(self.state)
        self.step, self.last = newest.step, newest
        self.seconds = newest.record["seconds"]
        self._truncate_metrics(newest.record["metrics_bytes"])

    def train(self) -> None:
        """Run to the last step, save, and put the model at the top of the directory."""
        self.directory.mkdir(parents=True, exist_ok=True)
        rotate(self.directory, self.config.num_checkpoints)
        if self.last is None:
            self._truncate_metrics(0)
        with _interrupts() as interrupted:
            while self.step < self.config.num_steps:
                self._one_step()
                done = self.step == self.config.num_steps
                due = done or self.step % self.config.eval_every == 0
                if self.valid_corpus is not None and due:
                    self._evaluate()
                if interrupted():
                    self.save()
                    raise TrainingInterrupted(self.last)
                if done or self.step % self.config.save_every == 0:
                    self.save()
            self.save()
            publish(self.last.path, self.directory)

    def save(self) -> None:
        """Write a checkpoint of this step, if there is none, and delete those no longer kept."""
        if self.last is not None and self.last.step == self.step:
            return
        metrics = self._metrics_path
        record = {
            "config": asdict(self.config),
            "data": self.train_corpus.fingerprint,
            "seconds": self.seconds,
            "metrics_bytes": metrics.stat().st_size if metrics.exists() else 0,
            **self.about,
        }
        self.last = save_checkpoint(
            self.directory,
            self.step,
            self.model,
            self.optimizer,
            self.state,
            record,
            self.tokenizer.save_pretrained,
        )
        rotate(self.directory, self.config.num_checkpoints)

    def _one_step(self) -> None:
        began = time.perf_counter()
        config = self.config
        self.model.train()
        rate = config.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = self.lanes.batch(self.step)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed * 1_000_003 + self.step)
            loss, state = self._loss(batch)
            loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            raise TrainingStopped(self._not_finite(loss.item(), norm.item()))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.state = state.detach()
        self.step += 1
        seconds = time.perf_counter() - began
        self.seconds += seconds
        self._record(
            event="step",
            step=self.step,
            loss=loss.item(),
            learning_rate=rate,
            gradient_norm=norm.item(),
            tokens_per_second=config.num_lanes * config.length / seconds,
            seconds=self.seconds,
        )

    def _loss(self, batch: Batch) -> tuple[torch.Tensor, ModelState]:
        device = self.model.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            out = self.model(batch.ids.to(device), state=self.state, reset=batch.reset.to(device))
        loss = F.cross_entropy(
            out.logits.flatten(0, 1).float(),
            batch.labels.to(device).flatten(),
            ignore_index=IGNORED,
        )
        return loss, out.state

    def _evaluate(self) -> None:
        self.valid = held_out(self.model, self.valid_corpus, self.config.length)
        self._record(
            event="held_out",
            step=self.step,
            nats=self.valid.nats,
            bits_per_byte=self.valid.bits_per_byte,
            num_tokens=self.valid.num_tokens,
            seconds=self.seconds,
        )

    def _record(self, **event: Any) -> None:
        with self._metrics_path.open("a") as file:
            file.write(json.dumps(event) + "\n")
        self.listen(event)

    def _truncate_metrics(self, num_bytes: int) -> None:
        if self._metrics_path.exists():
            with self._metrics_path.open("r+b") as file:
                file.truncate(num_bytes)

    @property
    def _metrics_path(self) -> Path:
        return self.directory / METRICS

    def _not_finite(self, loss: float, norm: float) -> str:
        kept = f"the last good checkpoint is {self.last.path}" if self.last else "nothing was saved"
        return (
            f"step {self.step + 1}: the loss is {loss:.4g} and the gradient norm {norm:.4g}; "
            f"lower the learning rate ({self.config.rate(self.step):.2g}) or the clip "
            f"({self.config.clip:.2g}); {kept}"
        )


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, weight decay on matrices only (not on embeddings, biases, norms, initial states)."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed, plain = [], []
    for parameter in model.parameters():
        matrix = parameter.dim() >= 2 and id(parameter) not in embeddings
        matrix = matrix and not getattr(parameter, "_no_weight_decay", False)
        (decayed if matrix else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95))


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Ctrl-C waits until a step is done, so that no save is cut; a second one does not wait."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    pressed = []

    def note(signum: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(signum)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
