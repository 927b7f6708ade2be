"""The section of `statewright trace`: the text with what is held, maps by layer, norms, bytes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from statewright.report.heat import stacked
from statewright.report.html import details, embedded, facts, number, section, size, table, words
from statewright.report.series import MOST, Plot, Series, draw

Run = Mapping[str, Any]
# A map has at most so many columns and rows; further ones are joined.
_COLUMNS, _ROWS = 128, 64
# Lists whose lives travel with the page; of more, evenly chosen ones.
_MOST_CHARACTERS = 300_000
_SHADES = 4


def held_section(found: Mapping[str, Any], name: str) -> str:
    """A trace: bytes of every run, survivors under every policy, norms of recurrent layers."""
    runs, tokens = found["runs"], found["tokens"]
    model = str(found.get("model", "model"))
    told = facts(
        [
            (f"{len(tokens):,}", f"tokens of {found.get('text', 'a text')}"),
            (size(found["weights_bytes"]), "of weights"),
            *((size(run["state_bytes"][-1]), f"of state, {_name(run)}") for run in runs[:4]),
        ]
    )
    parts = [told, f'<div class="figures">{_bytes(found, name)}{_growth(runs, name)}</div>']
    bounded = [run for run in runs if any(any(map(any, x["left"])) for x in run["lists"])]
    for i, run in enumerate(bounded):
        parts.append(_survivors(run, tokens, f"{name}-s{i}"))
    parts += [_norms(run, f"{name}-r{i}") for i, run in enumerate(runs)]
    return section(name, f"What {model} holds while it reads", parts)


def _name(run: Run) -> str:
    return "unbounded" if run["policy"] == "none" else run["policy"]


def _bytes(found: Mapping[str, Any], name: str) -> str:
    rows = {_name(run): run["kinds"] for run in found["runs"]}
    kinds = list(dict.fromkeys(kind for parts in rows.values() for kind in parts))
    heads = ["run", "weights", *kinds, "state, all"]
    weights = size(found["weights_bytes"])
    said = [
        [run, weights, *(size(p[k]) if k in p else "" for k in kinds), size(sum(p.values()))]
        for run, p in rows.items()
    ]
    drawn = stacked("Bytes of state by kind, at the end of the text", rows, f"{name}-bytes")
    return f"<div>{drawn}{details('Values', table('bytes by kind', heads, said))}</div>"


def _growth(runs: Sequence[Run], name: str) -> str:
    series = tuple(
        Series(
            _name(run),
            tuple((float(x), y / 2**20) for x, y in zip(run["looks"], run["state_bytes"])),
        )
        for run in runs
    )
    plot = Plot("Bytes of state while reading", "tokens read", "MiB", series, zero=True)
    return draw(plot, f"{name}-growth")


def _survivors(run: Run, tokens: Sequence[str], name: str) -> str:
    looks = _Looks(run["looks"])
    lists = [(x["layer"], left) for x in run["lists"] for left in x["left"]]
    lives = [(layer, [looks.code(at) for at in left]) for layer, left in lists]
    most = max(1, _MOST_CHARACTERS // len(tokens))
    chosen = lives[:: -(-len(lives) // most)]
    note = (
        "The thicker the line under a token, the more lists of keys (one per layer and key head) "
        "hold it; bold: nearly all do. Move through the text with the arrow keys, or point at it."
    )
    parts = [
        words(note, "soft"),
        _text(run, tokens, lives, chosen, looks, name),
        _table(tokens, lives, looks),
        _layers(run, lives, looks, len(tokens)),
    ]
    return section(name, f"What survives under {run['policy']}", parts, level=3)


class _Looks:
    """The looks at a run, each with a character of its own."""

    def __init__(self, looks: Sequence[int]) -> None:
        self.at = list(looks)

    def code(self, left: int) -> int:
        """The number of the first look without a token; as many as there are, if it stayed."""
        return bisect_left(self.at, left) if left else len(self.at)

    def character(self, code: int) -> str:
        """As the script reads it: from `#` on, without the backslash."""
        return chr(code + 35 + (code + 35 >= 92))


def _text(
    run: Run, tokens: Sequence[str], lives: Any, chosen: Any, looks: _Looks, name: str
) -> str:
    """The text as it is at the end, with a slider over time where scripts run."""
    ends = [sum(codes[i] == len(looks.at) for _, codes in lives) for i in range(len(tokens))]
    spans = "".join(
        f'<span class="q{-(-5 * held // len(lives))}">{escape(_visible(token))}</span>'
        for token, held in zip(tokens, ends)
    )
    data = {
        "looks": looks.at,
        "tokens": list(tokens),
        "lists": [[layer, "".join(map(looks.character, codes))] for layer, codes in chosen],
    }
    options = "".join(
        f'<option value="{escape(layer)}">layer {escape(layer)}</option>'
        for layer in dict.fromkeys(layer for layer, _ in chosen)
    )
    last = len(looks.at) - 1
    label = f"The text, and what is held of it under {run['policy']}"
    return (
        f'<div class="held">{embedded(f"{name}-data", data)}<div class="controls" hidden>'
        f'<label>Time <input type="range" min="0" max="{last}" value="{last}"></label>'
        f"<output></output>"
        f'<label>Lists <select><option value="">all layers</option>{options}</select></label></div>'
        f'<div class="text" tabindex="0" role="group" aria-label="{escape(label)}">{spans}</div>'
        f'<p class="named" role="status"></p>{_maps(lives, looks, len(tokens), name)}</div>'
    )


def _visible(token: str) -> str:
    """Line ends stay line ends; other control characters are shown by name, not obeyed."""
    return "".join(c if c == "\n" or c.isprintable() else ascii(c)[1:-1] for c in token) or "∅"


def _table(tokens: Sequence[str], lives: Any, looks: _Looks, most: int = 20) -> str:
    """The tokens that live longest: the words of the picture."""
    ends = looks.at + [looks.at[-1] * 2]
    rows = []
    for i, token in enumerate(tokens):
        held = sum(codes[i] == len(looks.at) for _, codes in lives)
        lived = sum(max(0, min(ends[codes[i]], looks.at[-1]) - i) for _, codes in lives)
        rows.append((held, lived / len(lives), i, token))
    # The youngest have not been weighed yet.
    old = [row for row in rows if row[2] < looks.at[-1] - _kept(lives, looks)]
    old.sort(key=lambda row: (-row[0], -row[1], row[2]))
    said = [
        [repr(token), number(i + 1), f"{held} of {len(lives)}", number(round(lived))]
        for held, lived, i, token in old[:most]
    ]
    heads = ["token", "place", "lists that hold it at the end", "tokens it lived, mean"]
    caption = "The longest lived, of tokens that are older than the budget"
    return details("Survivors as a table", table(caption, heads, said)) if said else ""


def _kept(lives: Any, looks: _Looks) -> int:
    return max(sum(code == len(looks.at) for code in codes) for _, codes in lives)


def _layers(run: Run, lives: Any, looks: _Looks, length: int) -> str:
    """Per layer: how much of what is kept is recent, and the oldest."""
    rows, end = [], len(looks.at)
    for layer in dict.fromkeys(layer for layer, _ in lives):
        lists = [codes for name, codes in lives if name == layer]
        held = [[i for i, code in enumerate(codes) if code == end] for codes in lists]
        kept = sum(map(len, held))
        recent = sum(i >= length - len(part) for part in held for i in part)
        ages = sum(length - 1 - i for part in held for i in part)
        first = sum(0 in part for part in held)
        row = [f"layer {layer}", number(kept // len(lists)), f"{recent / max(kept, 1):.0%}"]
        rows.append([*row, number(round(ages / max(kept, 1))), f"{first} of {len(lists)}"])
    heads = ["layer", "kept", "of them the most recent", "mean age", "lists with the first token"]
    return details("Layers as a table", table(f"under {run['policy']}", heads, rows))


def _maps(lives: Any, looks: _Looks, length: int, name: str) -> str:
    """A map per layer: tokens from left to right, time downwards, dark where lists hold it."""
    drawn = []
    for i, layer in enumerate(dict.fromkeys(layer for layer, _ in lives)):
        lists = [codes for found, codes in lives if found == layer]
        title = f"layer {layer}"
        paths = _paths(lists, looks, length)
        drawn.append(
            f'<figure><svg class="map" data-map viewBox="0 0 {_COLUMNS} {_ROWS}" role="img" '
            f'aria-labelledby="{name}-m{i}" preserveAspectRatio="none">'
            f'<title id="{name}-m{i}">{escape(title)}: which tokens are held over time; '
            f"the tables hold its numbers</title>{paths}</svg>"
            f"<figcaption>{escape(title)}</figcaption></figure>"
        )
    caption = words(
        "Every layer through time: the text from left to right, the reading from top to bottom; "
        "dark where the lists of the layer hold a token. A vertical line is a token that stays.",
        "soft",
    )
    return f'{caption}<div class="figures small">{"".join(drawn)}</div>'


def _paths(lists: Sequence[Sequence[int]], looks: _Looks, length: int) -> str:
    """One path per shade; runs of equal cells are one stroke downwards."""
    columns, rows = min(_COLUMNS, length), min(_ROWS, len(looks.at))
    wide, high = _COLUMNS / columns, _ROWS / rows
    strokes: dict[int, list[str]] = {}
    for column in range(columns):
        part = range(column * length // columns, (column + 1) * length // columns)
        shades = [_shade(lists, part, r * len(looks.at) // rows, looks) for r in range(rows)]
        begin = 0
        for row in range(1, rows + 1):
            if row < rows and shades[row] == shades[begin]:
                continue
            if shades[begin]:
                x, y, down = column * wide, begin * high, (row - begin) * high
                stroke = f"M{x:g} {y:.4g}h{wide:g}v{down:.4g}h-{wide:g}z"
                strokes.setdefault(shades[begin], []).append(stroke)
            begin = row
    return "".join(
        f'<path opacity="{shade / _SHADES:g}" d="{"".join(found)}"/>'
        for shade, found in sorted(strokes.items())
    )


def _shade(lists: Sequence[Sequence[int]], part: range, look: int, looks: _Looks) -> int:
    """0 to 4: the share of tokens and lists in a cell that are there."""
    there = sum(codes[i] > look and i < looks.at[look] for codes in lists for i in part)
    return -(-_SHADES * there // (len(lists) * len(part)))


def _norms(run: Run, name: str) -> str:
    """The norm of every recurrent layer's state: the mean over its heads."""
    series = []
    for found in run["norms"]:
        points = zip(run["looks"], found["norm"])
        line = tuple((float(x), sum(norm) / len(norm)) for x, norm in points)
        series.append(Series(f"layer {found['layer']}", line))
    if not series:
        return ""
    note = "" if len(series) <= MOST else "The first layers are drawn."
    title = f"State norm while reading, {_name(run)}"
    plot = Plot(title, "tokens read", "norm, mean over heads", tuple(series), zero=True, note=note)
    return f'<div class="figures">{draw(plot, name)}</div>'
