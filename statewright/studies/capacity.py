"""What a state can hold (arXiv:2410.07145): state sizes x training lengths x seeds, resumable.

T_forget of a size is the least training length at which reading on does no harm, T_recall the
longest text from which it recalls a key. Every cell trains one model and measures both.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statewright.diagnose.diagnosis import rows_of
from statewright.diagnose.repair import try_policy
from statewright.evaluate import evaluate
from statewright.models import StatewrightForCausalLM
from statewright.models.tokenizers import byte_tokenizer
from statewright.studies.capacity_laws import check_lengths
from statewright.studies.capacity_model import build, config_of, state_numbers
from statewright.studies.capacity_settings import LEAST_PASSKEY, SYSTEMS, CapacitySettings, Shape
from statewright.studies.cells import Cell, read_cells
from statewright.studies.experiment import Place
from statewright.studies.fit import HELD_OUT, Fit, scored_logits, training_seed
from statewright.tasks.base import IGNORED
from statewright.tasks.passkey import Passkey
from statewright.train.config import TrainConfig
from statewright.train.data import Corpus, Lanes

NAME = "capacity"
# A space and five digits, one token each.
_ANSWER = 6
_DRAWN = 32


class Study:
    """The grid over one text: `cells(...)` are keyed `system/size/length/seedN`.

    corpus: all bytes (N,), of which the last `held_out_share` are read and the others trained on.
    Raises ValueError for lengths that are no powers of two or do not divide tokens_per_step, and
    for a text that is too short.
    """

    def __init__(
        self,
        settings: CapacitySettings,
        lengths: Sequence[int],
        corpus: Corpus,
        place: Place,
    ) -> None:
        self.settings, self.place, self.fingerprint = settings, place, corpus.fingerprint
        self.corpus, held_out = corpus.joined().split(settings.held_out_share)
        self.held_out = torch.from_numpy(held_out.tokens.astype("int32"))
        self.lengths = check_lengths(lengths)
        shortest, longest = self.lengths[0], self.lengths[-1]
        if settings.tokens_per_step % longest or shortest < 4:
            raise ValueError(
                f"lengths: {shortest} to {longest}, expected at least 4 and divisors of "
                f"tokens_per_step={settings.tokens_per_step}, so that all cells see equal data"
            )
        need = settings.num_texts * (settings.times * longest + 1)
        if len(self.held_out) < need:
            raise ValueError(
                f"text: {len(self.held_out):,} held-out tokens, but {settings.num_texts} texts of "
                f"{settings.times} x {longest} + 1 tokens need {need:,}; give a longer text, fewer "
                "texts or times, or shorter lengths"
            )
        if self.corpus.num_tokens <= settings.tokens_per_step:
            raise ValueError(
                f"text: {self.corpus.num_tokens:,} tokens to train on, expected more than "
                f"tokens_per_step={settings.tokens_per_step}"
            )
        if settings.passkey_share and shortest < LEAST_PASSKEY:
            raise ValueError(
                f"passkey_share={settings.passkey_share}: a key needs {LEAST_PASSKEY} tokens, "
                f"but the shortest training length is {shortest}"
            )
        self.tokenizer = byte_tokenizer()

    def cells(
        self,
        shapes: Sequence[Shape],
        seeds: Sequence[int],
        systems: Sequence[str] = SYSTEMS,
        controls_at: str = "largest",
    ) -> list[Cell]:
        """The first system at every size; the others, `controls_at` the largest size, or all."""
        sized = sorted(shapes, key=self._numbers)
        chosen = [(systems[0], shape) for shape in sized]
        controls = sized if controls_at == "all" else sized[-1:]
        chosen += [(system, shape) for system in systems[1:] for shape in controls]
        for pair in chosen:  # one that cannot be built is refused before anything runs
            config_of(*pair, self.settings)
        found = []
        for seed in seeds:  # a whole grid of one seed comes before the next
            for system, shape in chosen:
                for length in self.lengths:
                    key = f"{system}/{shape}/{length}/seed{seed}"
                    found.append(Cell(key, _bound(self, system, shape, length, seed, key)))
        return found

    def run(self, system: str, shape: Shape, length: int, seed: int, key: str) -> dict[str, Any]:
        """Train one model on texts of `length` tokens, then read on, and recall."""
        model = build(system, shape, self.settings, seed).to(self.place.device)
        fit = CapacityFit(
            model,
            self.settings,
            seed,
            self._rows(length, seed),
            lambda m: {},
            self.place.snapshot(key),
            lambda point: self.place.listen({"key": key, **point}),
        )
        fit.keys = self._keys(length, seed)
        began = time.perf_counter()
        trained = fit.train()
        trained_seconds = time.perf_counter() - began
        model.eval()
        of_mamba = build("official", shape, self.settings, 0)
        result = {
            "parameters": trained["parameters"],
            "steps": trained["steps"],
            "tokens": trained["steps"] * self.settings.tokens_per_step,
            "train_loss": trained["train_loss"],
            "trained_seconds": round(trained_seconds, 3),
            "millions": state_numbers(of_mamba) / 1e6,
            "length": length,
        }
        if trained["diverged"]:
            return {**result, "diverged": True, "explodes": True}
        return {**result, **self.read_on(model, length), **self.recall(model)}

    def read_on(self, model: StatewrightForCausalLM, length: int) -> dict[str, Any]:
        """Does it collapse: the worst octave's perplexity over that inside, against `explosion`."""
        texts = rows_of(self.held_out, self.settings.times * length + 1, self.settings.num_texts)
        trial = try_policy(model, texts, length, "none")
        worst = max((loss for _, loss in trial.octaves), key=lambda x: (math.isnan(x), x))
        ratio = math.exp(min(worst - trial.inside, 700.0))
        return {
            "inside": trial.inside,
            "octaves": [list(octave) for octave in trial.octaves],
            "ratio": ratio,
            "explodes": not ratio <= self.settings.explosion,
        }

    def recall(self, model: StatewrightForCausalLM) -> dict[str, Any]:
        """Passkey accuracy at every length of settings.recall_lengths, over all depths."""
        found = {}
        for length in self.settings.recall_lengths:
            task = Passkey(length, new_tokens=_ANSWER)
            n, seed = self.settings.num_eval, HELD_OUT + length
            result = evaluate(model, self.tokenizer, task, n=n, seed=seed)
            found[str(length)] = result.metrics["accuracy"]
        return {"recall": found} if found else {}

    def _numbers(self, shape: Shape) -> int:
        return state_numbers(build("official", shape, self.settings, 0))

    def _num_keys(self, length: int) -> int:
        return round(self.settings.passkey_share * (self.settings.tokens_per_step // length))

    def _rows(self, length: int, seed: int) -> Any:
        rows = self.settings.tokens_per_step // length
        rows -= self._num_keys(length)
        if not rows:
            return lambda step: None
        # A phase of its own: every seed's text begins elsewhere, not with the first byte.
        lanes = Lanes(self.corpus, rows, length, seed, phase=seed + 1)

        def batch(step: int) -> tuple[Tensor, Tensor]:
            found = lanes.batch(step)
            return found.ids, found.labels

        return batch

    def _keys(self, length: int, seed: int) -> Any:
        count = self._num_keys(length)
        if not count:
            return lambda step: None
        return lambda step: passkey_rows(length, count, training_seed(seed, step), self.tokenizer)


def check_same_text(path: str | Path, fingerprint: str) -> None:
    """ValueError if the results in `path` are of another text."""
    found = read_cells(path)["about"].get("text", fingerprint)
    if found != fingerprint:
        raise ValueError(f"{path}: was made with another text; choose another file")


def _bound(study: Study, *arguments: Any) -> Any:
    return lambda: study.run(*arguments)


def passkey_rows(length: int, count: int, seed: int, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """ids and targets (count, length): keys at depths drawn from the seed; the answer is scored.

    The needle says the key twice; its second mention can be known as well, and is scored too.
    """
    drawn = Passkey(length).draw(_DRAWN, seed, tokenizer).samples
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(_DRAWN, generator=generator)
    ids = torch.full((count, length), 256)
    targets = torch.full((count, length), IGNORED)
    for row in range(count):
        sample = drawn[int(chosen[row % _DRAWN])]
        answer = torch.tensor(tokenizer.encode(f" {sample.answer}", add_special_tokens=False))
        text = torch.cat([sample.input_ids, answer])
        ids[row, : len(text) - 1] = text[:-1]
        for begin in _mentions(text, answer)[1:]:
            end = begin + len(answer)
            targets[row, begin - 1 : end - 1] = text[begin:end]
    return ids, targets


def _mentions(text: Tensor, answer: Tensor) -> list[int]:
    return (text.unfold(0, len(answer), 1) == answer).all(1).nonzero().flatten().tolist()


class CapacityFit(Fit):
    """A Fit whose rate rises and falls, and whose keys count as much as its text."""

    keys: Any = staticmethod(lambda step: None)

    def _one_step(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        for group in optimizer.param_groups:
            group["lr"] = self._schedule.rate(step)
        self.model.train()
        parts = [part for part in (self.batch(step), self.keys(step)) if part is not None]
        loss = sum(F.cross_entropy(*scored_logits(self.model, *part)) for part in parts)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    @property
    def _schedule(self) -> TrainConfig:
        settings = self.settings
        return TrainConfig(
            num_steps=settings.num_steps,
            learning_rate=settings.learning_rate,
            num_warmup_steps=min(settings.num_warmup_steps, settings.num_steps // 4),
            final_rate=settings.final_rate,
        )
