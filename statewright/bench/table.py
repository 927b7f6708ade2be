"""The tables of docs/speed.md, made from benchmarks/results/*.json and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

OURS = ("native", "ours", "floor: ours", "torch")
_PLACE = re.compile(r"(?<=<!-- bench: )(\w+)( -->\n)(.*?)(?=<!-- bench end -->)", re.S)
_HEAD = ["| case | threads | floor | ours / floor | peers / ours |", "|---|---|---|---|---|"]


def check_places(page: Path, suites: Iterable[str]) -> None:
    """ValueError unless `page` has a place for the table of every suite."""
    found = {name for name, *_ in _PLACE.findall(page.read_text(encoding="utf-8"))}
    for name in suites:
        if name not in found:
            raise ValueError(
                f"{page} has no place for the suite {name}: expected the lines "
                f"'<!-- bench: {name} -->' and '<!-- bench end -->'"
            )


def write_tables(page: Path, results: Path) -> bool:
    """Write each results file's table into its place in `page`; returns whether anything changed.

    A place whose suite has no file in `results` stays as it is.
    """
    files = {file.stem: file for file in sorted(results.glob("*.json"))}
    check_places(page, files)
    text = page.read_text(encoding="utf-8")

    def filled(place: re.Match) -> str:
        name, end, old = place.groups()
        return name + end + (markdown(files[name]) if name in files else old)

    new = _PLACE.sub(filled, text)
    if new != text:
        page.write_text(new, encoding="utf-8")
    return new != text


def markdown(file: Path) -> str:
    """One line per case: its floor, ours to the floor, and each peer to ours."""
    found = json.loads(file.read_text(encoding="utf-8"))
    about = found["environment"]
    if "peak_of_reading" in about:
        lines = _memory(about)
    else:
        lines = [*_HEAD, *(_line(*key, rows) for key, rows in _by_case(found["rows"]).items())]
    return "\n".join(["", *lines, "", _source(file.name, about), "", ""])


def _by_case(rows: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, dict[str, Any]]]:
    cases: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault((row["case"], row["threads"]), {})[row["method"]] = row
    return cases


def _line(case: str, threads: int, rows: dict[str, dict[str, Any]]) -> str:
    """A case whose floor is our own method has no floor to show, hence no ratio to it."""
    floor = min(rows, key=lambda name: (rows[name]["to_floor"] != 1, not name.startswith("floor")))
    best = next((name for name in OURS if name in rows), None)
    beside = {n: r for n, r in rows.items() if n not in (floor, best) and n[:6] != "floor:"}
    ways = {n.partition(", ")[2]: r for n, r in beside.items() if n.startswith(("native", "ours"))}
    peers = {n: r for n, r in beside.items() if not n.startswith(("native", "ours"))}
    if best is None:
        # Ways of ours beside one floor, and no peer.
        ways, peers = peers, {}
    ratios = [] if best is None else [f"{rows[best]['to_floor']:.2f}"]
    ratios += [f"{name} {row['to_floor']:.2f}" for name, row in ways.items()]
    cells = [case, str(threads), floor.removeprefix("floor: "), ", ".join(ratios)]
    if floor == best:
        cells[2:] = "-", "-"
    cells.append(", ".join(f"{n} {r['best'] / rows[best]['best']:.1f}x" for n, r in peers.items()))
    return f"| {' | '.join(cells)} |"


def _memory(about: dict[str, Any]) -> list[str]:
    reading, over = about["peak_of_reading"], about["peak_of_prefill_over_model"]
    layers, tokens = about["prefill"]["layers"], about["prefill"]["tokens"]
    cells = {f"reading a text of {int(n):,} bytes": peak for n, peak in reading.items()}
    for who, name in (("ours", "ours"), ("theirs", "transformers")):
        case = f"Mamba-2 prefill, {layers} layers, {tokens:,} tokens, over the model: {name}"
        cells[case] = over[who]
    lines = [f"| {case} | {peak / 2**20:,.1f} |" for case, peak in cells.items()]
    return ["| case | peak, MiB |", "|---|---|", *lines]


def _source(name: str, environment: dict[str, Any]) -> str:
    versions = ", ".join(f"{n} {v}" for n, v in environment["versions"].items() if v)
    return (
        f"`{environment['command']}`: {environment['processor']}, {environment['cores']} cores, "
        f"{versions}, {environment['date']}; `benchmarks/results/{name}`."
    )
