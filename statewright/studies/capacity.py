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
from torch import Tensor

from statewright.diagnosis.prompts import rows_of
from statewright.diagnosis.repair import try_policy
from statewright.evaluation import evaluate
from statewright.models import StatewrightForCausalLM
from statewright.studies.capacity_keys import (
    answer_length,
    long_rows,
    passkey_rows,
    tokenizer_of,
)
from statewright.studies.capacity_laws import check_lengths
from statewright.studies.capacity_model import build, config_of, state_numbers
from statewright.studies.capacity_passing import PassingFit, passing_settings, schedule
from statewright.studies.capacity_settings import SYSTEMS, CapacitySettings, Shape
from statewright.studies.cells import Cell, read_cells
from statewright.studies.experiment import Place
from statewright.studies.fit import Fit, make_optimizer, scored_logits, training_seed
from statewright.studies.snapshot import load_snapshot, save_snapshot
from statewright.tasks.passkey import Passkey
from statewright.train.data import Corpus, Lanes

NAME = "capacity"


class Study:
    """The grid over one text: `cells(...)` are keyed `system/size/length/seedN`.

    corpus: all bytes (N,), of which the last `held_out_share` are read and the others trained on;
    None if passkey_share is 1: keys alone are trained on, and nothing is read on.
    Raises ValueError for lengths that are no powers of two or do not divide tokens_per_step, and
    for a text that is too short.
    """

    def __init__(
        self,
        settings: CapacitySettings,
        lengths: Sequence[int],
        corpus: Corpus | None,
        place: Place,
    ) -> None:
        self.settings, self.place = settings, place
        self.tokenizer = tokenizer_of(settings.tokens)
        self.lengths = check_lengths(lengths)
        shortest, longest = self.lengths[0], self.lengths[-1]
        if settings.tokens_per_step % longest or shortest < 4:
            raise ValueError(
                f"lengths: {shortest} to {longest}, expected at least 4 and divisors of "
                f"tokens_per_step={settings.tokens_per_step}, so that all cells see equal data"
            )
        if settings.passkey_share and shortest < settings.least_passkey:
            raise ValueError(
                f"passkey_share={settings.passkey_share}: a key needs {settings.least_passkey} "
                f"tokens, but the shortest training length is {shortest}"
            )
        if (corpus is None) != (settings.passkey_share == 1):
            raise ValueError(
                "text: expected one, or passkey_share=1, which trains on keys and nothing else"
            )
        self.corpus = None
        if corpus is not None:
            self._take(corpus, longest)

    def _take(self, corpus: Corpus, longest: int) -> None:
        """Cut the text in two; ValueError if either part is too short."""
        settings = self.settings
        self.corpus, held_out = corpus.joined().split(settings.held_out_share)
        self.held_out = torch.from_numpy(held_out.tokens.astype("int32"))
        reach = settings.reach(longest)
        if reach < 2 * longest:
            raise ValueError(
                f"read_length={settings.read_length}, expected 0 or at least twice the longest "
                f"training length, {longest}"
            )
        need = settings.num_texts * (reach + 1)
        if len(self.held_out) < need:
            raise ValueError(
                f"text: {len(self.held_out):,} held-out tokens, but {settings.num_texts} texts of "
                f"{reach:,} + 1 tokens need {need:,}; give a longer text, fewer texts or times, "
                "or shorter lengths"
            )
        if self.corpus.num_tokens <= settings.tokens_per_step:
            raise ValueError(
                f"text: {self.corpus.num_tokens:,} tokens to train on, expected more than "
                f"tokens_per_step={settings.tokens_per_step}"
            )

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
        waiting = self.place.snapshot(f"{key}.trained")
        found = load_snapshot(waiting, model, make_optimizer(model, self.settings))
        result = found or self._trained(model, shape, length, seed, key)
        if not self.settings.passing_steps or result.get("diverged"):
            return result
        if found is None:
            save_snapshot(waiting, model, make_optimizer(model, self.settings), result)
        passed = self._passed(model, length, seed, key)
        waiting.unlink()
        return {**result, "passed": passed}

    def _trained(
        self, model: StatewrightForCausalLM, shape: Shape, length: int, seed: int, key: str
    ) -> dict[str, Any]:
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
        failed = trained["diverged"]
        if failed:
            result["diverged"] = True
        if self.corpus is not None:
            result |= {"explodes": True} if failed else self.read_on(model, length)
        recalled = self.recall(None if failed else model)
        return {**result, "recall": recalled} if recalled else result

    def _passed(
        self, model: StatewrightForCausalLM, length: int, seed: int, key: str
    ) -> dict[str, Any]:
        """Train on by state passing, and recall again."""
        settings, count = self.settings, self._num_keys(length)
        fit = PassingFit(
            model,
            passing_settings(settings),
            seed,
            lambda step: None,
            lambda m: {},
            self.place.snapshot(f"{key}.passing"),
            lambda point: self.place.listen({"key": f"{key}, passing", **point}),
        )
        # The steps after the first training's, so that no draw is made twice.
        first = settings.num_steps
        fit.texts = lambda step: long_rows(
            length,
            settings.passing_segments,
            count,
            training_seed(seed, first + step),
            self.tokenizer,
        )
        trained = fit.train()
        model.eval()
        kept = {name: trained[name] for name in ("steps", "train_loss", "diverged")}
        return {**kept, "recall": self.recall(None if trained["diverged"] else model)}

    def read_on(self, model: StatewrightForCausalLM, length: int) -> dict[str, Any]:
        """Does it collapse: the worst octave's perplexity over that inside, against `explosion`."""
        texts = rows_of(self.held_out, self.settings.reach(length) + 1, self.settings.num_texts)
        trial = try_policy(model, texts, length, "none")
        worst = max((loss for _, loss in trial.octaves), key=lambda x: (math.isnan(x), x))
        ratio = math.exp(min(worst - trial.inside, 700.0))
        return {
            "inside": trial.inside,
            "octaves": [list(octave) for octave in trial.octaves],
            "ratio": ratio,
            "explodes": not ratio <= self.settings.explosion,
        }

    def recall(self, model: StatewrightForCausalLM | None) -> dict[str, Any]:
        """Passkey accuracy at every length of settings.recall_lengths, over all depths.

        A training that diverged leaves no model, which recalls nothing.
        """
        found = {str(length): 0.0 for length in self.settings.recall_lengths}
        if model is None:
            return found
        for length in self.settings.recall_lengths:
            task = Passkey(length, new_tokens=answer_length(self.tokenizer))
            # Below the seeds of all training data, which begin at 2^32.
            n = self.settings.num_eval
            result = evaluate(model, self.tokenizer, task, n=n, seed=length)
            found[str(length)] = result.metrics["accuracy"]
        return found

    def _numbers(self, shape: Shape) -> int:
        return state_numbers(build("official", shape, self.settings, 0))

    def _num_keys(self, length: int) -> int:
        return round(self.settings.passkey_share * (self.settings.tokens_per_step // length))

    def _rows(self, length: int, seed: int) -> Any:
        rows = self.settings.tokens_per_step // length
        rows -= self._num_keys(length)
        if not rows or self.corpus is None:
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

        def keys(step: int) -> tuple[Tensor, Tensor]:
            left = 1 - step / self.settings.easy_steps if self.settings.easy_steps else 0.0
            return passkey_rows(
                length, count, training_seed(seed, step), self.tokenizer, max(0.0, left)
            )

        return keys


def grid(
    settings: CapacitySettings,
    lengths: Sequence[int],
    corpus: Corpus | None,
    place: Place,
    shapes: Sequence[Shape],
    seeds: Sequence[int],
    systems: Sequence[str],
    controls_at: str,
) -> list[Cell]:
    """A Study's cells, from what can be sent to another process."""
    return Study(settings, lengths, corpus, place).cells(shapes, seeds, systems, controls_at)


def check_same_text(path: str | Path, fingerprint: str) -> None:
    """ValueError if the results in `path` are of another text."""
    found = read_cells(path)["about"].get("text", fingerprint)
    if found != fingerprint:
        raise ValueError(f"{path}: was made with another text; choose another file")


def _bound(study: Study, *arguments: Any) -> Any:
    return lambda: study.run(*arguments)


class CapacityFit(Fit):
    """A Fit whose rate rises and falls, and whose keys count as much as its text."""

    keys: Any = staticmethod(lambda step: None)

    def rate(self, step: int) -> float:
        return schedule(self.settings).rate(step)

    def loss(self, step: int) -> Tensor:
        parts = [part for part in (self.batch(step), self.keys(step)) if part is not None]
        losses = [F.cross_entropy(*scored_logits(self.model, *part)) for part in parts]
        return torch.stack(losses).sum()
