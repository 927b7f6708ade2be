"""Equal bytes as a table, as curves and as a figure, from one file of results."""

from __future__ import annotations

import math
from typing import Any

from statewright.evaluation.curves import Curve
from statewright.intervals import estimate
from statewright.studies.experiment import over_seeds_shown

# task -> candidate -> size meant (None: as it is) -> points over seeds.
Points = dict[str, dict[str, dict[int | None, list[dict[str, Any]]]]]


def points_of(found: dict[str, Any]) -> Points:
    """Every point of every cell, seeds side by side; each knows its cell's parameters."""
    gathered: Points = {}
    for key, cell in found["cells"].items():
        task, name, *_ = key.split("/")
        for point in cell["points"]:
            policy = point.get("policy", "none")
            candidate = name if policy == "none" else f"{name} {policy}"
            sizes = gathered.setdefault(task, {}).setdefault(candidate, {})
            own = {**point, "parameters": cell.get("parameters")}
            sizes.setdefault(point["target"], []).append(own)
    return gathered


def curves(found: dict[str, Any]) -> list[Curve]:
    """Accuracy against measured bytes, a curve per task and candidate; intervals over seeds."""
    made = []
    for task, candidates in points_of(found).items():
        for name, sizes in candidates.items():
            rows = []
            for points in sizes.values():
                reached = [p for p in points if "unreachable" not in p]
                if reached:
                    values = [p["accuracy"] for p in reached]
                    size = math.fsum(p["bytes"] for p in reached) / len(reached)
                    over = estimate(values, shares=True)
                    rows.append((size, over.mean, over.interval if len(values) > 1 else None))
            rows.sort(key=lambda row: row[0])
            x, y, spans = zip(*rows) if rows else ((), (), ())
            made.append(Curve(f"{task} | {name}", x, y, "bytes of state", "accuracy", spans))
    return made


def table(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Per task and candidate: mean accuracy and deviation over seeds at each size."""
    sizes = [None, *found["about"]["settings"]["sizes"]]
    rows = []
    for task, candidates in points_of(found).items():
        for name, own in candidates.items():
            known = [p for points in own.values() for p in points]
            counts = sorted({p["parameters"] for p in known if p["parameters"]})
            shown = [f"{count:,}" for count in dict.fromkeys([*counts[:1], *counts[-1:]])]
            row = {"task": task, "candidate": name, "seeds": max(map(len, own.values()))}
            row["parameters"] = " to\n".join(shown)
            for size in sizes:
                label = "as it is" if size is None else _human(size)
                row[label] = _shown(own.get(size, []))
            rows.append(row)
    return rows


def _shown(points: list[dict[str, Any]]) -> str:
    reached = [p for p in points if "unreachable" not in p]
    if not reached:
        return "-" if points else ""
    size = sum(p["bytes"] for p in reached) / len(reached)
    shown = over_seeds_shown([p["accuracy"] for p in reached], 3)
    return f"{shown}\n({_human(size)})"


def _human(size: float) -> str:
    return f"{size / 1024:.4g} KiB" if size < 2**20 else f"{size / 2**20:.4g} MiB"


def draw_equal_bytes(figure: Any, found: dict[str, Any]) -> None:
    """A panel per task: accuracy over bytes of state; crosses below: sizes out of reach."""
    gathered = points_of(found)
    panels = figure.subplots(1, len(gathered), sharey=True, squeeze=False)[0]
    names = list(dict.fromkeys(name for own in gathered.values() for name in own))
    drawn = {curve.name: curve for curve in curves(found)}
    for axes, (task, candidates) in zip(panels, gathered.items()):
        for name, sizes in candidates.items():
            curve, color = drawn[f"{task} | {name}"], f"C{names.index(name) % 10}"
            style = ("o-", "s--", "^:")[names.index(name) // 10 % 3]
            spans = [span or (y, y) for y, span in zip(curve.y, curve.interval)]
            ends = zip(*((y - low, high - y) for y, (low, high) in zip(curve.y, spans)))
            errors = list(ends) or None
            axes.errorbar(curve.x, curve.y, errors, fmt=style, color=color, label=name, capsize=2)
            out = [t for t, p in sizes.items() if t and all("unreachable" in one for one in p)]
            axes.plot(out, [-0.04 - 0.015 * names.index(name)] * len(out), "x", color=color)
        chance = next(c["chance"] for k, c in found["cells"].items() if k.startswith(f"{task}/"))
        axes.axhline(chance, color="gray", linewidth=1, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set_xlabel("bytes of state (x below: out of reach)")
        axes.set_title(task, fontsize=9)
    panels[0].set_ylabel("accuracy (dotted: chance)")
    panels[0].legend(fontsize=6)
