"""Training: stateful lanes, truncated backpropagation through time, exact resume."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from statewright.state import ModelState
from statewright.train.checkpoint import (
    Checkpoint,
    Holder,
    checkpoints,
    publish,
    rotate,
    save_checkpoint,
)
from statewright.train.config import TrainConfig
from statewright.train.context_parallel import ContextModel, suspended
from statewright.train.data import IGNORED, Batch, Corpus
from statewright.train.data_mix import make_batches
from statewright.train.distributed import (
    TrainingStopped,
    World,
    gradient_norm,
    parallelize,
    shard,
    together,
    without_sync,
)
from statewright.train.evaluate import HeldOut, held_out
from statewright.train.optimizer import choose_trained, make_optimizer
from statewright.train.passing import (
    LearnedState,
    Objective,
    begin_step,
    check_passing,
    first_documents,
    join_rows,
)
from statewright.train.signals import noted

Listener = Callable[[dict[str, Any]], None]
Weighted = Sequence[tuple[Corpus, float]]
METRICS = "metrics.jsonl"


class TrainingInterrupted(Exception):
    """Ctrl-C, SIGTERM or SIGUSR1: everything is saved at `checkpoint`.

    exit_code: 128 + the signal's number, as a shell says it: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, checkpoint: Checkpoint, signum: int) -> None:
        super().__init__(f"interrupted after step {checkpoint.step}; saved {checkpoint.path}")
        self.checkpoint, self.exit_code = checkpoint, 128 + signum


@dataclass
class Run:
    """A model being trained on a corpus, or on several with weights; `train()` does its steps.

    The state is carried from step to step and detached there (truncated backpropagation through
    time). A step depends on the weights, the optimizer, the carried state and its number alone
    (data, learning rate and dropout are functions of seed and step), so that a resumed run equals
    an uninterrupted one bit for bit on the same machine, processes and threads. Under torchrun
    every process has a Run of its own, of the same model, and a share of the lanes.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train_corpus: Corpus | Weighted
    valid_corpus: Corpus | None
    config: TrainConfig
    directory: Path
    about: dict[str, Any] = field(default_factory=dict)
    listen: Listener = lambda event: None

    def __post_init__(self) -> None:
        config, model, self.world = self.config, self.model, World.current()
        self.lanes = make_batches(self._corpora, config.num_lanes, config.lengths, config.seed)
        self._divide()
        num_rows = self.rows.stop - self.rows.start
        if num_rows % config.num_accumulation:
            raise ValueError(
                f"num_accumulation={config.num_accumulation} does not divide the {num_rows} lanes "
                "of a process"
            )
        choose_trained(model, config.train_only)
        if config.checkpointing:
            model.gradient_checkpointing_enable()
        # Before the weights are sharded: a shard cannot say what the whole begins with.
        self.state: ModelState = model.init_state(num_rows).detach()
        check_passing(self.state, config, num_rows)
        self.initial = LearnedState(model) if config.train_only == "state" else None
        if config.parallel == "sharded" and self.world.size > 1:
            shard(model)
        self.optimizer = make_optimizer(model, config, self.initial)
        called = ContextModel(model) if self.columns.size > 1 else model
        objective = Objective(called, config, self.initial)
        self.objective = parallelize(objective, config.parallel, self.world)
        self.step, self.evaluated = 0, 0
        self.last: Checkpoint | None = None
        self.seconds = 0.0
        self.valid: HeldOut | None = None

    def _divide(self) -> None:
        """Which lanes, and which tokens of each, are this process's."""
        config, world = self.config, self.world
        self.rows, self.columns = slice(0, config.num_lanes), World()
        if config.parallel == "context":
            for _, length in config.lengths:
                world.share(length, "length")
            self.columns = world
        else:
            self.rows = world.share(config.num_lanes, "num_lanes")

    @property
    def _corpora(self) -> Weighted:
        given = self.train_corpus
        pairs = [(given, 1.0)] if isinstance(given, Corpus) else given
        if self.config.documents == "reset":
            return pairs
        return [(corpus.joined(), weight) for corpus, weight in pairs]

    @property
    def num_tokens(self) -> int:
        return sum(corpus.num_tokens for corpus, _ in self._corpora)

    @property
    def fingerprint(self) -> str:
        """Of the data: of the one corpus, or of all and their weights."""
        if isinstance(self.train_corpus, Corpus):
            return self.train_corpus.fingerprint
        parts = [f"{corpus.fingerprint} {weight}" for corpus, weight in self.train_corpus]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def resume(self) -> None:
        """Continue from the newest checkpoint; ValueError if there is none or the data differ."""
        found = checkpoints(self.directory)
        if not found:
            raise ValueError(f"{self.directory}: no checkpoint to resume from")
        newest = found[-1]
        if newest.record["data"] != self.fingerprint:
            raise ValueError(f"{newest.path}: was trained on other text; give the same files")
        newest.restore(self.model, self.optimizer, self.initial)
        self.state = newest.carried(self.state, self.rows)
        self.step, self.last = newest.step, newest
        self.seconds = newest.record["seconds"]
        self.evaluated = newest.record.get("evaluated", newest.step)
        if self.world.rank == 0:
            self._truncate_metrics(newest.record["metrics_bytes"])

    def train(self) -> None:
        """Run to the last step, save, and put the model at the top of the directory."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.world.rank == 0:
            rotate(self.directory, self.config.num_checkpoints)
            if self.last is None:
                self._truncate_metrics(0)
        self._note_length()
        with together(self.world, self.directory), noted() as came:
            while True:
                if self._owes_evaluation:
                    self._evaluate()
                    self._heed(came())
                if self.step >= self.config.num_steps:
                    break
                if self.step and self.step % self.config.save_every == 0:
                    self.save()
                self._one_step()
                # Before an evaluation, which may outlast what a scheduler waits.
                self._heed(came())
            self.save()
            if self.world.rank == 0:
                publish(self.last.path, self.directory)
            self.world.barrier()

    @property
    def _owes_evaluation(self) -> bool:
        """Whether this step's is due and not done: a run may have been interrupted before it."""
        done = self.step == self.config.num_steps
        due = self.step > 0 and (done or self.step % self.config.eval_every == 0)
        return due and self.evaluated != self.step and self.valid_corpus is not None

    def _heed(self, signum: int) -> None:
        """Stop every process if one got a signal."""
        signum = self.world.max(signum, self.model.device)
        if signum:
            self.save()
            raise TrainingInterrupted(self.last, signum)

    def save(self) -> None:
        """Write a checkpoint of this step, if there is none, and delete those no longer kept."""
        if self.last is not None and self.last.step == self.step:
            return
        metrics = self._metrics_path
        record = {
            "config": asdict(self.config),
            "data": self.fingerprint,
            "seconds": self.seconds,
            "metrics_bytes": metrics.stat().st_size if metrics.exists() else 0,
            "num_processes": self.world.size,
            "evaluated": self.evaluated,
            **self.about,
        }
        holder = Holder(
            self.model,
            self.optimizer,
            self.initial,
            self.tokenizer.save_pretrained,
            self.world,
            replicated=self.columns.size > 1,
        )
        self.last = save_checkpoint(self.directory, self.step, holder, self.state, record)
        if self.world.rank == 0:
            rotate(self.directory, self.config.num_checkpoints)

    def _note_length(self) -> None:
        """In the config: the tokens a gradient spanned and a state was carried over, at most."""
        if self.initial is not None:
            return
        corpora = [corpus for corpus, _ in self._corpora]
        longest = max(min(c.longest, c.num_tokens // self.config.num_lanes) for c in corpora)
        self.model.config.train_length = self.config.train_length
        self.model.config.train_context = self.config.train_context(longest)

    def _one_step(self) -> None:
        config, began = self.config, time.perf_counter()
        self.model.train()
        rate = config.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        device = self.model.device
        with torch.random.fork_rng([] if device.type == "cpu" else [device]):
            loss, num_tokens = self._backward()
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = gradient_norm(trained, config.clip)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingStopped(self._not_finite(loss, norm))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        seconds = time.perf_counter() - began
        self.seconds += seconds
        self._record(
            event="step",
            step=self.step,
            loss=loss,
            learning_rate=rate,
            gradient_norm=norm,
            tokens_per_second=num_tokens / seconds,
            seconds=self.seconds,
        )

    def _backward(self) -> tuple[float, int]:
        """Gradients of a step, part by part; the mean loss, and tokens read by all processes."""
        segments, state = self._segments()
        num_tokens = self.config.num_lanes * sum(b.ids.shape[1] for b in segments)
        segments = [b.columns(self.columns.share(b.ids.shape[1], "length")) for b in segments]
        labels = sum(int((b.labels != IGNORED).sum()) for b in segments)
        labels = max(1.0, self.world.sum(labels, self.model.device))
        num_parts, each = self.config.num_accumulation, state.batch_size
        each = each // num_parts
        total, states = 0.0, []
        for part in range(num_parts):
            rows = slice(part * each, (part + 1) * each)
            seed = self.config.seed * 1_000_003 + self.step
            torch.manual_seed(seed + ((self.world.rank * num_parts + part) << 40))
            with without_sync(self.objective, last=part == num_parts - 1):
                mine = state if num_parts == 1 else state.rows(rows)
                loss, after = self.objective([b.rows(rows) for b in segments], mine)
                # Gradients are averaged over the processes, of sums over each one's own tokens.
                (loss * (self.world.size / labels)).backward()
            total += loss.item()
            states.append(after.detach())
        self.state = join_rows(states)
        return self.world.sum(total, self.model.device) / labels, num_tokens

    def _segments(self) -> tuple[list[Batch], ModelState]:
        """This process's lanes of the step's segments, and the state before them."""
        config, device = self.config, self.model.device
        first = self.step * config.gradient_segments
        indices = range(first, first + config.gradient_segments)
        segments = [self.lanes.batch(i, self.rows).to(device) for i in indices]
        state, reset = begin_step(self.state, segments[0].reset, config, self.step, self.rows)
        segments[0] = replace(segments[0], reset=reset)
        if self.initial is not None:
            segments = first_documents(segments)
        return segments, state

    def _evaluate(self) -> None:
        with suspended(self.model):
            self.valid = held_out(
                self.model, self.valid_corpus, self.config.length, self.config.policy
            )
        self.evaluated = self.step
        self._record(
            event="held_out",
            step=self.step,
            nats=self.valid.nats,
            bits_per_byte=self.valid.bits_per_byte,
            num_tokens=self.valid.num_tokens,
            seconds=self.seconds,
        )

    def _record(self, **event: Any) -> None:
        if self.world.rank:
            return
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
