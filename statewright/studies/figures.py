"""One figure per study, drawn from its one JSON file and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from statewright.intervals import estimate, spread
from statewright.studies import algorithmic, char_lm, selective_copy, train_cost
from statewright.studies.capacity_figure import draw_capacity
from statewright.studies.equal_bytes_table import draw_equal_bytes
from statewright.studies.experiment import over_seeds, read_study

_DATES = {".png": None, ".svg": "Date", ".pdf": "CreationDate"}


def check_drawable(figure: str | Path) -> None:
    """ValueError for a file that cannot be drawn into, or without matplotlib."""
    if Path(figure).suffix not in _DATES:
        raise ValueError(f"{figure}: expected a name that ends in {', '.join(_DATES)}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ValueError('figures need matplotlib: pip install "statewright[plot]"') from error


def draw(results: str | Path, figure: str | Path) -> None:
    """Draw the study in `results` into `figure` (.png, .svg or .pdf).

    Raises ValueError if there is nothing to draw, or matplotlib is not installed.
    """
    check_drawable(figure)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    found = read_study(results)
    study = found["about"].get("study")
    if study not in _FIGURES:
        raise ValueError(f"{results}: no figure is known for the study {study!r}")
    canvas = Figure(figsize=(10, 4.5), layout="constrained")
    _FIGURES[study](canvas, found)
    Path(figure).parent.mkdir(parents=True, exist_ok=True)
    # No date and no random names inside, so that the same results give the same file.
    date = _DATES[Path(figure).suffix]
    with rc_context({"svg.hashsalt": "statewright"}):
        canvas.savefig(figure, dpi=150, metadata={} if date is None else {date: None})


def _selective_copy(figure: Any, found: dict[str, Any]) -> None:
    bars, curves = figure.subplots(1, 2)
    values = over_seeds(found["cells"], lambda r: 100 * r["accuracy"])
    names = list(values)
    for i, name in enumerate(names):
        mean = estimate(values[name]).mean
        bars.bar(i, mean, yerr=spread(values[name]), color=_color(name), capsize=3)
        paper = selective_copy.PAPER.get(name)
        if paper is not None:
            bars.plot([i - 0.4, i + 0.4], [paper, paper], color="black", linewidth=1)
    bars.set_xticks(range(len(names)), names, rotation=60, ha="right")
    bars.set_ylabel("token accuracy (%) over seeds")
    settings = found["about"]["settings"]
    bars.set_title(f"length {settings['length']:,}, {settings['tokens']} tokens")
    _curves(curves, found["cells"], "accuracy", "held-out token accuracy")


def _char_lm(figure: Any, found: dict[str, Any]) -> None:
    axes = figure.subplots()
    for key, result in found["cells"].items():
        name = key.split("/")[0]
        steps = [point["step"] for point in result["curve"]]
        label = f"{key}: {result['best_loss']:.3f} at {result['best_step']}"
        axes.plot(steps, [p["loss"] for p in result["curve"]], color=_color(name), label=label)
        axes.plot(result["best_step"], result["best_loss"], "o", color=_color(name))
    best = min(result["best_loss"] for result in found["cells"].values())
    axes.set_ylim(best - 0.1, best + 1.2)
    axes.set_xlabel("step")
    axes.set_ylabel("held-out loss (nats per character)")
    paper = ", ".join(f"{n} {loss} at {at}" for n, (loss, at) in char_lm.PAPER.items())
    axes.set_title(f"paper (its own size): {paper}", fontsize=8)
    axes.legend(fontsize=8)


def _algorithmic(figure: Any, found: dict[str, Any]) -> None:
    cells, tasks = found["cells"], []
    for key in cells:
        task = key.split("/")[0]
        if task not in tasks:
            tasks.append(task)
    places = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    labels = ["trained", *(f"{low}-{high}" for low, high in algorithmic.BANDS)]
    for axes, task in zip(places, tasks):
        chance = next(r["chance"] for k, r in cells.items() if k.startswith(f"{task}/"))
        for name, points in over_seeds(cells, _points).items():
            if name.startswith(f"{task}/"):
                means = [estimate(column).mean for column in zip(*points)]
                system = name.split("/", 1)[1]
                axes.plot(labels, means, "o-", color=_color(system), label=system)
        axes.axhline(chance, color="gray", linewidth=1, linestyle=":")
        axes.set_title(task, fontsize=9)
        axes.tick_params("x", rotation=60)
    places[0].set_ylabel("accuracy (dotted: chance)")
    places[0].legend(fontsize=8)


def _points(result: dict[str, Any]) -> list[float]:
    return [result["accuracy"], *(band["accuracy"] for band in result["bands"])]


def _train_cost(figure: Any, found: dict[str, Any]) -> None:
    times, ratios, memory = figure.subplots(1, 3)
    curves: dict[str, dict[int, float]] = {}
    peaks: dict[str, dict[int, float]] = {}
    for key, cell in found["cells"].items():
        kind, name = key.split("/")
        if kind == "time":
            for system, values in cell["times"].items():
                curves.setdefault(system, {})[int(name)] = values["best"]
        else:
            peaks[name] = {int(n): count / 2**20 for n, count in cell["peaks"].items()}
    shown = (times, curves), (ratios, train_cost.ratios(found)), (memory, peaks)
    for axes, lines in shown:
        for name, line in lines.items():
            lengths = sorted(line)
            style = "--" if "loop" in name else ":" if "log" in name else "-"
            values = [line[n] for n in lengths]
            axes.plot(lengths, values, style, color=_color(name), marker=".", label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("length (tokens)")
        axes.legend(fontsize=6)
    times.set_title("seconds, forward + loss + backward", fontsize=8)
    ratios.set_title("times slower than ...", fontsize=8)
    memory.set_title("peak memory (MiB)", fontsize=8)
    figure.suptitle(train_cost.NOTE, fontsize=7)


def _curves(axes: Any, cells: dict[str, Any], value: str, label: str) -> None:
    named = set()
    for key, result in cells.items():
        name = key.rpartition("/")[0]
        style = {"1": ":", "2": "--"}.get(name.rpartition("/")[2], "-")
        steps = [point["step"] for point in result["curve"]]
        axes.plot(
            steps,
            [point[value] for point in result["curve"]],
            style,
            color=_color(name),
            linewidth=1,
            label=None if name in named else name,
        )
        named.add(name)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.legend(fontsize=7)


_COLORS = {
    "mingru": "tab:blue",
    "minlstm": "tab:orange",
    "mamba": "tab:green",
    "transformer": "tab:red",
    "lstm": "tab:brown",
    "gru": "tab:purple",
    "s4": "tab:gray",
    "h3": "tab:olive",
    "hyena": "tab:cyan",
}


def _color(name: str) -> str:
    """A system's colour in every figure, whatever its depth and scan."""
    return _COLORS.get(name.split("/")[0].split(" ")[0].split("-")[0], "tab:pink")


_FIGURES: dict[str, Callable[[Any, dict[str, Any]], None]] = {
    selective_copy.NAME: _selective_copy,
    char_lm.NAME: _char_lm,
    "chomsky": _algorithmic,
    "listops": _algorithmic,
    train_cost.NAME: _train_cost,
    "capacity": draw_capacity,
    "equal-bytes": draw_equal_bytes,
}
