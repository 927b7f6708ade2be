"""The page of `statewright diagnose`: a pure function of what its --json prints."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from statewright.report import figures
from statewright.report.html import document, section, table
from statewright.report.svg import Chart, count

_TONES = {"healthy": ("good", "✓"), "collapse": ("bad", "✗"), "amnesia": ("bad", "✗")}
_FRESH = "the same text from an empty state"


def page(record: dict[str, Any]) -> str:
    """One HTML file: no network, no script, the same bytes for the same record.

    record: as of --json; with two runs, the second is the model under a policy. Raises
    ValueError for a record of another format.
    """
    if record.get("format") != 1 or not record.get("runs"):
        raise ValueError("report: expected what `statewright diagnose --json` prints, format 1")
    run = record["runs"][0]
    title = f"{run['text']['verdict']['name']}: {run['model']}"
    heading = f"<h1>statewright diagnose · {escape(run['model'])}</h1>"
    inner = "\n".join(_sections(record, ""))
    return document(title, f"<main>\n{heading}\n{inner}\n</main>")


def as_section(record: dict[str, Any], name: str) -> str:
    """The same as one section of a page of many; `name` is the page's only one."""
    parts = [
        part.replace("<h2>", "<h3>").replace("</h2>", "</h3>") for part in _sections(record, name)
    ]
    return section(name, f"Diagnosis of {record['runs'][0]['model']}", parts)


def _sections(record: dict[str, Any], name: str) -> list[str]:
    runs = record["runs"]
    suffixes = [_suffix(run, runs[0]) for run in runs]
    return [
        *(_verdict(run, suffix) for run, suffix in zip(runs, suffixes)),
        _facts(runs[0]),
        _loss(runs, suffixes, name),
        _prompts(runs[0]),
        *(_states(run, f"{name}{i}", suffixes[i]) for i, run in enumerate(runs)),
        _half_lives(runs[0]),
        _remembrance(runs[0], name),
        _footer(record),
    ]


def _suffix(run: dict[str, Any], first: dict[str, Any]) -> str:
    """What distinguishes a run: its policy, or another model's name."""
    policy = run["text"]["reading"]["policy"]
    if policy != "none":
        return f" under {policy}"
    return "" if run["model"] == first["model"] else f" in {run['model']}"


def _verdict(run: dict[str, Any], suffix: str) -> str:
    name = run["text"]["verdict"]["name"]
    tone, mark = _TONES.get(name.split()[0], ("odd", "≠"))
    return (
        f'<section class="verdict {tone}"><strong>{mark} {escape(name + suffix)}</strong>'
        f"<p>{escape(run['text']['words'])}</p></section>"
    )


def _facts(run: dict[str, Any]) -> str:
    reading, verdict = run["text"]["reading"], run["text"]["verdict"]
    more = "" if verdict["cause"] else "at least "
    facts = [
        (f"{reading['train_length']:,}", "tokens of a training text"),
        (f"{reading['length']:,}", "tokens read"),
        (f"{reading['in_window']:.2f}", "nats per token inside the training length"),
        (f"{verdict['worst']:.2f}x", "that at worst beyond"),
        (f"{more}{verdict['safe_length']:,}", "tokens are safe"),
    ]
    if verdict["memory"] is not None:
        whole = verdict["memory"] >= reading["train_length"]
        facts.append((f"{'all ' if whole else ''}{verdict['memory']:,}", "last tokens decide"))
    if verdict["longest_half_life"] is not None:
        facts.append((_tokens(verdict["longest_half_life"]), "tokens, the longest half-life"))
    items = "".join(f"<li><b>{value}</b><span>{label}</span></li>" for value, label in facts)
    return f'<ul class="facts">{items}</ul>'


def _tokens(value: float) -> str:
    if value >= 1e8:
        return "∞"
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _loss(runs: Sequence[dict[str, Any]], suffixes: Sequence[str], name: str) -> str:
    readings = [run["text"]["reading"] for run in runs]
    names = [f"read on{suffix}" for suffix in suffixes]
    marks = [*zip(("before", "after"), names), ("fresh", _FRESH)]
    chart = figures.loss_chart(readings)
    return (
        "<section><h2>Loss by position</h2>"
        f"{_key(marks)}{_figure(chart, f'{name}loss', _LOSS_CAPTION, 'wide')}"
        f"{_loss_table(readings, names)}"
        "</section>"
    )


_LOSS_CAPTION = (
    "Inside the training length: the mean over many short texts. Beyond it: one long reading. "
    "Where the two lines part, what is carried does harm; where they rise together, the text is "
    "harder."
)


def _loss_table(readings: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    T = readings[0]["train_length"]
    fresh = {c["begin"]: c["fresh"] for c in readings[0]["comparisons"]}
    heads = ["tokens", *names, "from an empty state"]
    rows = []
    beyond = [[b for b in r["buckets"] if b["begin"] >= T] for r in readings]
    for buckets in zip(*beyond):
        begin, end = buckets[0]["begin"], buckets[0]["end"]
        cells = [f"{count(begin)} to {count(end)}", *(f"{b['nats']:.2f}" for b in buckets)]
        rows.append([*cells, f"{fresh[begin]:.2f}" if begin in fresh else ""])
    inside = f"{readings[0]['in_window']:.2f}"
    first = [f"up to {count(T)}", *(f"{r['in_window']:.2f}" for r in readings), inside]
    return table("nats per token", heads, [first, *rows])


def _prompts(run: dict[str, Any]) -> str:
    if not run["others"]:
        return ""
    rows = []
    for examined in (run["text"], *run["others"]):
        reading, verdict = examined["reading"], examined["verdict"]
        grown = max(max(layer["growth"]) for layer in reading["layers"])
        safe = f"{verdict['safe_length']:,}" if verdict["cause"] else "all"
        rows.append(
            [
                examined["prompt"],
                f"{reading['in_window']:.2f}",
                f"{verdict['worst']:.2f}x",
                safe,
                f"{grown:,.0f}x",
                verdict["name"],
            ]
        )
    heads = ["prompt", "in window", "worst", "safe up to", "variance grew", "by itself"]
    note = (
        "<p>The text decides. A model may stay calm on repeated newlines or random tokens and "
        "still fail on text, or the other way round.</p>"
    )
    return f"<section><h2>Four prompts</h2>{note}{table('', heads, rows)}</section>"


def _states(run: dict[str, Any], number: str, suffix: str) -> str:
    """Norms, retention and histograms of the layers that grew most."""
    reading, verdict = run["text"]["reading"], run["text"]["verdict"]
    layers = figures.shown_layers(reading)
    title = escape(f"States by layer and head{suffix}")
    parts = [f"<section><h2>{title}</h2><p>{_states_words(reading)}</p>"]
    if verdict["blamed"]:
        parts.append(_key_of_heads())
    for layer in layers:
        blamed = {h["head"] for h in verdict["blamed"] if h["layer"] == layer["name"]}
        name = f"{number}-{layer['name'].replace('.', '-')}"
        charts = [(figures.norm_chart(reading, layer, blamed), f"norm-{name}")]
        if layer["gates"]:
            charts.append((figures.retention_chart(reading, layer, blamed), f"kept-{name}"))
        charts.append((figures.histogram_chart(reading, layer), f"values-{name}"))
        drawn = "".join(_figure(chart, n, chart.title) for chart, n in charts)
        parts.append(f'<div class="pair">{drawn}</div>')
    return "".join(parts) + "</section>"


def _states_words(reading: dict[str, Any]) -> str:
    layers = reading["layers"]
    found = [f"{len(layers)} recurrent layer{'s' * (len(layers) > 1)}"]
    if len(layers) > figures.MOST_LAYERS:
        found.append(f"the {figures.MOST_LAYERS} that grew most are shown")
    if any(layer["heads_per_curve"] > 1 for layer in layers):
        most = max(layer["heads_per_curve"] for layer in layers)
        found.append(f"up to {most} neighbouring heads are one curve")
    text = "; ".join(found) + ". Retention: what is left of a state after one more training length."
    text += " Histograms: dashed at the training length, solid at the end."
    if not any(layer["gates"] for layer in layers):
        kept = [max(layer["retention"]) for layer in layers if layer["retention"]]
        if kept:
            text += f" By changing states, {max(kept):.1%} is kept at most; gates are not visible."
    return text


def _half_lives(run: dict[str, Any]) -> str:
    """Tokens after which half of a state is left, per layer over its heads, and what is kept."""
    reading = run["text"]["reading"]
    rows = []
    for layer in reading["layers"]:
        if not layer["gates"]:
            continue
        last, norm = layer["gates"][-1], layer["statistics"]["norm"][-1]
        lives = sorted(last["half_life"])
        rows.append(
            [
                layer["name"],
                *(_tokens(lives[i]) for i in (0, len(lives) // 2, -1)),
                f"{max(last['retention']):.1%}",
                f"{max(norm):.3g}",
            ]
        )
    if not rows:
        return ""
    heads = ["layer", "shortest", "median", "longest", "most kept", "largest norm"]
    caption = "tokens of half-life over heads; kept after one more training length; at the end"
    return f"<section><h2>Half-lives</h2>{table(caption, heads, rows)}</section>"


def _remembrance(run: dict[str, Any], name: str) -> str:
    chart = figures.remembrance_chart(run["remembrance"], run["text"]["verdict"]["memory"])
    caption = "How much the prediction changes if only the last tokens are given."
    return (
        "<section><h2>How far it remembers</h2>"
        f'<div class="pair">{_figure(chart, f"{name}memory", caption)}</div></section>'
    )


def _figure(chart: Chart, name: str, caption: str, kind: str = "") -> str:
    opened = f'<figure class="{kind}">' if kind else "<figure>"
    return f"{opened}{chart.render(name)}<figcaption>{escape(caption)}</figcaption></figure>"


def _swatch(kind: str, label: str) -> str:
    line = f'<polyline class="{kind}" points="0,5 28,5"/>'
    return f'<li><svg viewBox="0 0 28 10" aria-hidden="true">{line}</svg>{escape(label)}</li>'


def _key(marks: Sequence[tuple[str, str]]) -> str:
    return f'<ul class="key">{"".join(_swatch(kind, label) for kind, label in marks)}</ul>'


def _key_of_heads() -> str:
    items = _swatch("head blamed", "a head that does not forget") + _swatch("head", "other heads")
    return f'<ul class="key">{items}</ul>'


def _footer(record: dict[str, Any]) -> str:
    run, reading = record["runs"][0], record["runs"][0]["text"]["reading"]
    versions = ", ".join(
        f"{name} {version}" for name, version in sorted(record["versions"].items())
    )
    return (
        f"<footer>{run['parameters']:,} parameters; text {escape(str(record.get('text', '')))}, "
        f"{reading['num_rows']} row{'s' * (reading['num_rows'] > 1)}; {escape(versions)}.</footer>"
    )
