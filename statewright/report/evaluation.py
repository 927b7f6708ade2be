"""The section of `statewright eval`: tables, scores by length and bytes, curves, heat maps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from statewright.intervals import SHARES, estimate
from statewright.names import short_names
from statewright.report.heat import heat_table
from statewright.report.html import number, section, size, table, words
from statewright.report.series import Plot, Series, Span, draw, said
from statewright.spec import split

Result = Mapping[str, Any]
_BINS = 10
_DEPTH = "score by depth"
_SIZES = ("length", "budget")


def evaluation(
    results: Sequence[Result], name: str, against: Sequence[Mapping[str, Any]] = ()
) -> str:
    """Every task with what was measured on it; results as in the cells of an eval file.

    against: what `eval --bytes` adds to a file, recall against bytes.
    """
    names = short_names(str(result["model"]) for result in results)
    results = [{**result, "model": names[str(result["model"])]} for result in results]
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(_bare(result["task"], "length"), []).append(result)
    parts = []
    for i, (task, found) in enumerate(groups.items()):
        parts.append(_task(task, found, f"{name}-{i}"))
    for i, found in enumerate(against):
        drawn = byte_curves(found["curves"], f"{name}-a{i}")
        missing = _missing(found.get("unreachable", ()))
        parts.append(section(f"{name}-at{i}", "At equal bytes of state", [drawn, missing], level=3))
    return section(name, "Models, tasks and policies", [*parts, _cut(results)])


def byte_curves(curves: Sequence[Mapping[str, Any]], name: str) -> str:
    """Recall against bytes: a chart for each task that the names begin with (`task | who`)."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for curve in curves:
        head, _, who = curve["name"].rpartition(" | ")
        groups.setdefault(head, []).append({**curve, "name": who})
    drawn = []
    for i, (task, found) in enumerate(groups.items()):
        series = tuple(map(_line, found))
        unit, metric = found[0]["x_unit"], found[0]["y_unit"]
        title = f"{task}: {metric} by bytes of state" if task else f"{metric} by bytes of state"
        note = "Measured bytes; bars and brackets are 95 % intervals."
        drawn.append(draw(Plot(title, unit, metric, series, True, True, note=note), f"{name}-{i}"))
    return f'<div class="figures">{"".join(drawn)}</div>' if drawn else ""


def _line(curve: Mapping[str, Any]) -> Series:
    spans = tuple(curve.get("interval") or ())
    return Series(curve["name"], tuple(zip(curve["x"], curve["y"])), spans)


def _missing(points: Sequence[Mapping[str, Any]]) -> str:
    """What could not be had is marked, with the reason."""
    rows = [
        [str(p["model"]), str(p["policy"]), size(p["target"]), str(p.get("reason", ""))]
        for p in points
    ]
    heads = ["model", "policy", "size", "why"]
    return table("points that cannot be reached", heads, rows) if rows else ""


def _bare(spec: str, left_out: str) -> str:
    """The spec without one of its options: what is the same at every length, or budget."""
    try:
        name, options = split(spec)
    except ValueError:  # a task that a judge decides is said in words
        return spec
    kept = [f"{key}={value}" for key, value in options.items() if key != left_out]
    return ":".join([name, *kept])


def _option(spec: str, key: str) -> int:
    from statewright.spec import parse_int

    try:
        found = split(spec)[1].get(key)
        return parse_int(found) if found is not None else 0
    except ValueError:
        return 0


def _task(task: str, found: Sequence[Result], name: str) -> str:
    metric = next(iter(found[0]["metrics"]))
    figures = [
        _over_lengths(found, metric, f"{name}-n"),
        _over_bytes(found, metric, f"{name}-b"),
        *(_curves(found, length, f"{name}-c{length}") for length in _lengths(found)),
    ]
    drawn = "".join(figures)
    parts = [_table(found, metric), f'<div class="figures">{drawn}</div>' if drawn else ""]
    return section(name, task, [*parts, *_heat(found)], level=3)


def _lengths(found: Iterable[Result]) -> list[int]:
    return sorted({_option(result["task"], "length") for result in found})


def _who(result: Result, several: bool) -> str:
    """A series' name: the policy, and the model if there is more than one."""
    policy = result["policy"]
    if not several:
        return policy
    return result["model"] if policy == "none" else f"{result['model']} · {policy}"


def _several(found: Sequence[Result]) -> bool:
    return len({result["model"] for result in found}) > 1


def _by(found: Iterable[Result], *fields: str) -> dict[tuple, list[Result]]:
    groups: dict[tuple, list[Result]] = {}
    for result in found:
        groups.setdefault(tuple(result[field] for field in fields), []).append(result)
    return groups


def _mean(values: Sequence[float | None]) -> float | None:
    whole = [v for v in values if v is not None and math.isfinite(v)]
    return math.fsum(whole) / len(whole) if whole and len(whole) == len(values) else None


def _interval(found: Sequence[Result], metric: str) -> Span | None:
    """Over seeds where there are several, else over the samples of the one."""
    values = [result["metrics"].get(metric) for result in found]
    if len(values) > 1 and _mean(values) is not None:
        return estimate(values, metric in SHARES).interval
    first = next(iter(found[0]["metrics"]))
    return found[0].get("interval") if metric == first else None


def _table(found: Sequence[Result], metric: str) -> str:
    metrics = list(dict.fromkeys(name for result in found for name in result["metrics"]))
    several, lengths = _several(found), len(_lengths(found)) > 1
    heads = ["model and policy" if several else "policy", *(["length"] if lengths else [])]
    heads += [*(name.replace("_", " ") for name in metrics), "state", "tokens/s", "samples"]
    rows = []
    for group in _by(found, "model", "task", "policy").values():
        first = group[0]
        values = [_mean([r["metrics"].get(name) for r in group]) for name in metrics]
        spans = [_interval(group, name) for name in metrics]
        shown = ["–" if v is None else said(v, span) for v, span in zip(values, spans)]
        length = [number(_option(first["task"], "length"))] if lengths else []
        costs = [r.get("cost") or {} for r in group]
        state = max((c.get("state_bytes", 0) for c in costs), default=0)
        speed = _mean([c.get("tokens_per_second") for c in costs])
        seeds = f" x {len(group)} seeds" if len(group) > 1 else ""
        rows.append(
            [
                _who(first, several),
                *length,
                *shown,
                size(state) if state else "",
                number(None if speed is None else round(speed)),
                f"{first['n']}{seeds}",
            ]
        )
    model = "" if several else f"{found[0]['model']}; "
    return table(f"{model}in brackets: 95 % intervals", heads, rows)


def _over_lengths(found: Sequence[Result], metric: str, name: str) -> str:
    if len(_lengths(found)) < 2:
        return ""
    series = []
    for group in _by(found, "model", "policy").values():
        points, spans = [], []
        for part in _by(group, "task").values():
            mean = _mean([r["metrics"].get(metric) for r in part])
            if mean is not None:
                points.append((float(_option(part[0]["task"], "length")), mean))
                spans.append(_interval(part, metric))
        series.append(Series(_who(group[0], _several(found)), tuple(points), tuple(spans)))
    title = f"{metric.replace('_', ' ').capitalize()} by length"
    return draw(
        Plot(title, "tokens", metric, tuple(series), True, True, metric == "accuracy"), name
    )


def _over_bytes(found: Sequence[Result], metric: str, name: str) -> str:
    """Who remembers best for a number of bytes: a line through the budgets of one method."""
    longest = [r for r in found if _option(r["task"], "length") == _lengths(found)[-1]]
    methods: dict[str, list[tuple[float, float]]] = {}
    for group in _by(longest, "model", "policy").values():
        mean = _mean([r["metrics"].get(metric) for r in group])
        held = max((r.get("cost") or {}).get("state_bytes", 0) for r in group)
        if mean is None or not held:
            continue
        bare = {**group[0], "policy": _method(group[0]["policy"])}
        methods.setdefault(_who(bare, _several(found)), []).append((float(held), mean))
    if len({x for points in methods.values() for x, _ in points}) < 2:
        return ""
    series = tuple(Series(who, tuple(sorted(points))) for who, points in methods.items())
    length = _lengths(found)[-1]
    title = f"{metric.replace('_', ' ').capitalize()} by bytes of state"
    note = f"At length {length:,}: the most one sequence held." if length else ""
    zero = metric == "accuracy"
    return draw(Plot(title, "bytes of state", metric, series, True, True, zero, note), name)


def _method(policy: str) -> str:
    for key in _SIZES:
        policy = _bare(policy, key)
    return policy


def _curves(found: Sequence[Result], length: int, name: str) -> str:
    """Curves of one length; the seeds of a curve are averaged where they have the same places."""
    chosen = [r for r in found if _option(r["task"], "length") == length and r.get("curves")]
    drawn = []
    for i, (kind, x_unit, y_unit) in enumerate(_curve_kinds(chosen)):
        if kind == _DEPTH and len(_lengths(found)) > 1:  # the heat maps say it at once
            continue
        series = []
        for group in _by(chosen, "model", "policy").values():
            lines = [c for r in group for c in r["curves"] if c["name"] == kind]
            if lines:
                series.append(_averaged(lines, _who(group[0], _several(found))))
        at = f", length {length:,}" if length and len(_lengths(found)) > 1 else ""
        title = f"{kind.capitalize()}{at}"
        zero = y_unit == "accuracy"
        drawn.append(draw(Plot(title, x_unit, y_unit, tuple(series), zero=zero), f"{name}-{i}"))
    return "".join(drawn)


def _curve_kinds(found: Sequence[Result]) -> list[tuple[str, str, str]]:
    curves = (curve for result in found for curve in result["curves"])
    return list(dict.fromkeys((c["name"], c["x_unit"], c["y_unit"]) for c in curves))


def _averaged(lines: Sequence[Mapping[str, Any]], who: str) -> Series:
    values: dict[float, list[float | None]] = {}
    for line in lines:
        for x, y in zip(line["x"], line["y"]):
            values.setdefault(float(x), []).append(y)
    points = tuple((x, m) for x, ys in sorted(values.items()) if (m := _mean(ys)) is not None)
    if len(lines) == 1 and lines[0].get("interval") and len(points) <= 16:
        return Series(who, points, tuple(lines[0]["interval"]))
    return Series(who, points)


def _heat(found: Sequence[Result]) -> list[str]:
    """Length x depth for every model and policy that answered at more than one depth."""
    shown = []
    for group in _by(found, "model", "policy").values():
        places = [p for r in group for p in r.get("places", ())]
        if len(set(places)) < 2 or any(c["name"] != _DEPTH for c in _all_curves(group)):
            continue
        rows = []
        for part in sorted(
            _by(group, "task").values(), key=lambda g: _option(g[0]["task"], "length")
        ):
            length = _option(part[0]["task"], "length")
            rows.append((f"{length:,}" if length else part[0]["task"], _depths(part)))
        who = f"{group[0]['model']} · {group[0]['policy']}"
        heads = [str(100 * i // _BINS) for i in range(_BINS)]
        shown.append(heat_table(f"{who}: % right", "length, depth", heads, rows))
    told = (
        "Heat maps: rows by length in tokens, columns by the depth of the answer, from that per "
        f"cent of the input to {100 // _BINS} more. An empty cell had no sample there."
    )
    note = words(told, "soft") if shown else ""
    return [f'<div class="figures">{"".join(shown)}</div>', note] if shown else []


def _all_curves(found: Iterable[Result]) -> list[Mapping[str, Any]]:
    return [curve for result in found for curve in result.get("curves", ())]


def _depths(found: Sequence[Result]) -> list[float | None]:
    cells: list[list[float]] = [[] for _ in range(_BINS)]
    for result in found:
        for place, value in zip(result["places"], result["per_sample"]):
            if value is not None:
                cells[min(int(place * _BINS), _BINS - 1)].append(value)
    return [math.fsum(c) / len(c) if c else None for c in cells]


def _cut(results: Sequence[Result]) -> str:
    """What was truncated is said, never silent."""
    lines = {}
    for result in results:
        if cut := result.get("truncated"):
            key = (result["task"], cut["samples"], result["n"], cut["tokens"])
            lines[key] = (
                f"{key[0]}: {cut['samples']} of {result['n']} inputs were cut to the length, "
                f"{cut['tokens']:,} tokens in all."
            )
    return "".join(words(text, "soft") for text in lines.values())
