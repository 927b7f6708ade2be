"""State collapse and its repairs on real text: tables from one resumable JSON.

    python examples/collapse.py --books DIR --output collapse.json --part table --seeds 3
    python examples/collapse.py --books DIR --output collapse.json --part million
    python examples/collapse.py --books DIR --output collapse.json --part larger
    python examples/collapse.py --books DIR --output collapse.json --part overtrain
    python examples/collapse.py --output collapse.json --markdown

The models are byte-level Mamba-2 of 2 layers; "low-decay" means that A was multiplied by 1e-3 at
initialisation, "official" that it was not. DIR holds *.txt; the first 90 % of each is trained on,
War and Peace (if it is there) is kept for the long readings.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import statewright
from statewright.diagnosis.controls import Control, saved_control
from statewright.diagnosis.passing import pass_states, passing_config
from statewright.diagnosis.prompts import rows_of
from statewright.diagnosis.reading import read
from statewright.diagnosis.repair import try_policy
from statewright.models.calibration import calibrate
from statewright.models.tokenizers import byte_tokenizer
from statewright.train.data import Corpus

LONG_BOOK = "war_and_peace.txt"
POLICIES = (
    "none",
    "statewindow:length={T}",
    "statewindow:length={half}",
    "statenorm:limit=1x:every={T}",
    "statenorm:limit=2x:every={T}",
    "forgetmore:decay={near}",
    "forgetmore:decay=0.99",
    "forgetmore:decay=0.97",
    "forgetmore:decay=0.999",
    "forgetmore:decay=0.9999:write=0.75",
    "deltascale:factor=0.5",
)
MILLION = 1_000_000
LARGER = Control(train_length=512, num_steps=500, num_rows=8, hidden_size=192, learning_rate=2e-3)
OVERTRAINED = (500, 2000, 8000)


class Results:
    """A JSON file of cells; one that is there is not computed again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cells: dict[str, dict] = {}
        if path.exists():
            self.cells = json.loads(path.read_text())["cells"]

    def cell(self, key: str, compute: Callable[[], dict]) -> dict:
        if key not in self.cells:
            self.cells[key] = compute()
            about = {
                "statewright": statewright.__version__,
                "torch": torch.__version__,
                "machine": platform.machine(),
            }
            text = json.dumps({"about": about, "cells": self.cells}, indent=1)
            beside = self.path.with_suffix(".writing")
            beside.write_text(text)
            beside.rename(self.path)
            print(key, self.cells[key].get("text", ""), flush=True)
        return self.cells[key]


def load_books(directory: Path) -> tuple[Corpus, torch.Tensor, torch.Tensor]:
    """Training bytes, held-out bytes, and the long book's."""
    trained, held, long = [], [], None
    for path in sorted(directory.glob("*.txt")):
        tokens = np.frombuffer(path.read_bytes(), np.uint8).astype(np.int32)
        if path.name == LONG_BOOK:
            long = torch.from_numpy(tokens)
            continue
        cut = int(0.9 * len(tokens))
        trained.append(tokens[:cut])
        held.append(tokens[cut:])
    tokens = np.concatenate(trained)
    rest = torch.from_numpy(np.concatenate(held))
    return Corpus(tokens, np.array([0]), len(tokens)), rest, rest if long is None else long


def specs(T: int) -> list[str]:
    return [p.format(T=T, half=T // 2, near=f"{1 - 1 / T:.8g}") for p in POLICIES]


class Study:
    def __init__(self, results: Results, books: Path, models: Path) -> None:
        self.results, self.models = results, models
        self.corpus, self.held, self.long = load_books(books)

    def model(self, control: Control) -> statewright.StatewrightForCausalLM:
        kind = "low" if control.decay_scale < 1 else "official"
        name = f"{kind}-{control.train_length}-{control.num_steps}-{control.seed}"
        model = saved_control(control, self.corpus, self.models / name)
        rows = rows_of(self.held, control.train_length, 64)
        calibrate(model, rows.long())
        return model

    def passed(
        self, control: Control, steps: int, rate: float
    ) -> statewright.StatewrightForCausalLM:
        directory = self.models / f"passed-{control.train_length}-{steps}-{control.seed}"
        if not (directory / "config.json").exists():
            config = replace(passing_config(control.train_length, steps, rate), seed=control.seed)
            pass_states(self.model(control), byte_tokenizer(), self.corpus, config, directory)
        return statewright.load(directory)

    def row(self, key: str, model, policy: str, ids: torch.Tensor, T: int) -> None:
        def compute() -> dict:
            found = try_policy(model, ids, T, policy)
            last = found.octaves[-1][1]
            return {
                "policy": policy,
                "inside": found.inside,
                "octaves": found.octaves,
                "text": f"inside {found.inside:.3f}, last {last:.3f}",
            }

        self.results.cell(key, compute)

    def table(self, control: Control, octaves: int = 7, rows: int = 6) -> None:
        """Every remedy on held-out texts of 2^octaves training lengths."""
        T = control.train_length
        ids = rows_of(self.held, T * 2**octaves + 1, rows)
        name = f"{T}/{control.seed}"
        for policy in specs(T):
            self.row(f"table/{name}/low-decay/{policy}", self.model(control), policy, ids, T)
        for steps, rate in ((100, 1e-3), (500, 2e-3)):
            key = f"table/{name}/passed {steps}/none"
            if key not in self.results.cells:
                self.row(key, self.passed(control, steps, rate), "none", ids, T)
        official = replace(control, decay_scale=1.0)
        self.row(f"table/{name}/official/none", self.model(official), "none", ids, T)

    def million(self, control: Control) -> None:
        """One reading of a million bytes: loss by bucket, head norms, peak memory on the way."""
        T, ids = control.train_length, self.long[: MILLION + 1].unsqueeze(0)
        wanted = [specs(T)[i] for i in (0, 1, 3, 5)]
        cases = [("low-decay", p, lambda: self.model(control)) for p in wanted]
        cases += [("passed 500", "none", lambda: self.passed(control, 500, 2e-3))]
        cases += [("official", "none", lambda: self.model(replace(control, decay_scale=1.0)))]
        for kind, policy, make in cases:
            self.results.cell(
                f"million/{T}/{control.seed}/{kind}/{policy}",
                lambda make=make, policy=policy: reading_of(make(), ids, T, policy),
            )

    def overtrain(self, seed: int) -> None:
        """Does collapse arise by itself: official initialisation, short texts, ever more steps."""
        for steps in OVERTRAINED:
            control = Control(decay_scale=1.0, num_steps=steps, seed=seed)
            ids = rows_of(self.held, 64 * 128 + 1, 6)

            def compute(control: Control = control, ids: torch.Tensor = ids) -> dict:
                found = read(self.model(control), ids, 64)
                retention = max(max(layer.retention) for layer in found.layers)
                last = found.buckets[-1].nats
                return {
                    "inside": found.in_window,
                    "octaves": [(b.end, b.nats) for b in found.buckets[1:]],
                    "retention": retention,
                    "text": f"inside {found.in_window:.3f}, last {last:.3f}, kept {retention:.3f}",
                }

            self.results.cell(f"overtrain/{seed}/{steps}", compute)


def reading_of(model, ids: torch.Tensor, T: int, policy: str) -> dict:
    peaks, seen = [], [0]

    def advance(tokens: int) -> None:
        seen[0] += tokens
        if seen[0] >= 2 ** (16 + len(peaks)) or seen[0] == ids.shape[1] - 1:
            peaks.append((seen[0], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))

    found = read(model, ids, T, policy, advance)
    norms = [
        (tokens, max(max(layer.statistics["norm"][i]) for layer in found.layers))
        for i, tokens in enumerate(found.probes)
    ]
    return {
        "policy": policy,
        "inside": found.in_window,
        "octaves": [(b.end, b.nats) for b in found.buckets[1:]],
        "norms": norms,
        "peak_bytes": peaks,
        "text": f"inside {found.in_window:.3f}, last {found.buckets[-1].nats:.3f}",
    }


def markdown(cells: dict[str, dict]) -> str:
    """A table per part; means over seeds, the spread after a sign."""
    groups: dict[tuple[str, str], dict[str, list[dict]]] = {}
    for key, cell in cells.items():
        part, *rest = key.split("/")
        if part == "overtrain":
            place, row = (part, "64"), f"{rest[1]} steps"
        else:
            place, row = (part, rest[0]), " / ".join(rest[2:])
        groups.setdefault(place, {}).setdefault(row, []).append(cell)
    lines = []
    for (part, length), rows in groups.items():
        ends = [end for end, _ in next(iter(rows.values()))[0]["octaves"]]
        lines += [f"### {part}, training length {length}", ""]
        lines += ["| model / policy | inside | " + " | ".join(f"{e:,}" for e in ends) + " |"]
        lines += ["|---|" + "---|" * (len(ends) + 1)]
        for row, found in rows.items():
            columns = [[c["inside"] for c in found]]
            columns += [[c["octaves"][i][1] for c in found] for i in range(len(ends))]
            lines.append(f"| {row} | " + " | ".join(map(_cell, columns)) + " |")
        lines.append("")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.2f}"
    return f"{mean:.2f} ± {(max(values) - min(values)) / 2:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--books", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--part", choices=["table", "million", "larger", "overtrain"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    results = Results(options.output)
    if options.markdown:
        print(markdown(results.cells))
        return
    study = Study(results, options.books, options.output.with_suffix(""))
    for seed in range(options.seeds):
        if options.part == "table":
            study.table(Control(seed=seed))
        elif options.part == "million":
            study.million(Control(seed=seed))
        elif options.part == "larger":
            study.table(replace(LARGER, seed=seed), octaves=5, rows=3)
        else:
            study.overtrain(seed)


if __name__ == "__main__":
    main()
