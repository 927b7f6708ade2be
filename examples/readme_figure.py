"""The README's picture, from results files alone: collapse and its repair, and a bounded list.

    python examples/readme_figure.py --output docs/img/effects.svg

Left: docs/results/collapse.json, a Mamba-2 trained on texts of 64 bytes (mean and range of three
seeds). Right: docs/results/bounded_books.json, SmolLM2-135M on 4,096 tokens of a novel. Needs
matplotlib (the extra `plot`).
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

RESULTS = Path(__file__).parent.parent / "docs" / "results"
REPAIRS = {
    "none": ("as trained", "#b3261e"),
    "forgetmore:decay=0.984375": ("forgetmore", "#1b6ca8"),
    "statewindow:length=64": ("statewindow", "#2e7d32"),
}
POLICIES = {
    "window:budget={}": ("window", "#b3261e"),
    "window:budget={}:sinks=4": ("window:sinks=4", "#1b6ca8"),
    "tova:budget={}": ("tova", "#2e7d32"),
}
BUDGETS = (64, 128, 256, 512, 1024, 2048)


def cells(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())["cells"]


def collapse(axes: Any) -> None:
    found = cells("collapse.json")
    for policy, (label, colour) in REPAIRS.items():
        runs = [found[f"table/64/{seed}/low-decay/{policy}"] for seed in (0, 1, 2)]
        ends = [64, *(end for end, _ in runs[0]["octaves"])]
        losses = [[run["inside"], *(loss for _, loss in run["octaves"])] for run in runs]
        columns = list(zip(*losses))
        axes.fill_between(
            ends, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.2
        )
        axes.plot(ends, [sum(c) / 3 for c in columns], "o-", ms=3, color=colour, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks([64, 256, 1024, 4096], ["64", "256", "1,024", "4,096"])
    axes.set(title="Mamba-2 that never learned to forget", xlabel="bytes read (trained on 64)")
    axes.set_ylabel("nats per byte")


def bounded(axes: Any) -> None:
    found = cells("bounded_books.json")
    head = "moby/moby_dick/8192+4096/"
    for spec, (label, colour) in POLICIES.items():
        values = [math.exp(found[head + spec.format(b)]["nats"][0]) for b in BUDGETS]
        axes.plot(BUDGETS, values, "o-", ms=3, color=colour, label=label)
    full = math.exp(found[head + "none"]["nats"][0])
    axes.axhline(full, color="#555555", lw=1, ls="--", label="all 4,096")
    axes.set_xscale("log", base=2)
    axes.set_xticks(BUDGETS, [f"{b:,}" for b in BUDGETS])
    axes.set(title="A Transformer that keeps so many tokens", xlabel="tokens kept")
    axes.set_ylabel("perplexity")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="docs/img/effects.svg")
    given = parser.parse_args()
    # The same file from the same numbers: no date, no random identifiers.
    pyplot.rcParams.update({"svg.hashsalt": "statewright", "font.size": 9, "svg.fonttype": "path"})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.1), facecolor="white")
    collapse(left)
    bounded(right)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(given.output, metadata={"Date": None})


if __name__ == "__main__":
    main()
