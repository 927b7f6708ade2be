"""The README's table, made from benchmarks/results/*.json and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def write_readme(readme: Path, results: Path) -> bool:
    """Replace the text between the markers; returns whether anything changed."""
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    new = f"{before}{BEGIN}\n{markdown(results)}{END}{after}"
    if new != text:
        readme.write_text(new, encoding="utf-8")
    return new != text


def markdown(results: Path) -> str:
    """One line per case: ours to the floor, and each peer to ours."""
    lines, sources = [], []
    for file in sorted(results.glob("*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        cases = _by_case(found["rows"])
        if not cases:
            continue
        lines += ["", "| case | threads | ours / floor | peers / ours |", "|---|---|---|---|"]
        lines += [_line(case, threads, rows) for (case, threads), rows in cases.items()]
        sources.append(_source(file.name, found["environment"]))
    head = "<details><summary>Every measured row: ratios of best times</summary>"
    return "\n".join([head, *lines, "", *sources, "", "</details>", ""])


def _by_case(rows: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, dict[str, Any]]]:
    cases: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault((row["case"], row["threads"]), {})[row["method"]] = row
    return cases


def _line(case: str, threads: int, rows: dict[str, dict[str, Any]]) -> str:
    ours = next((rows[n] for n in ("native", "ours", "floor: ours", "torch") if n in rows), None)
    own = ("native", "ours", "floor")
    others = {n: r for n, r in rows.items() if not n.startswith(own)}
    if ours is None:
        # Ways of ours beside one floor, and no peer.
        listed = ", ".join(f"{name} {row['to_floor']:.2f}" for name, row in others.items())
        return f"| {case} | {threads} | {listed} | |"
    listed = ", ".join(f"{name} {row['best'] / ours['best']:.1f}x" for name, row in others.items())
    return f"| {case} | {threads} | {ours['to_floor']:.2f} | {listed} |"


def _source(name: str, environment: dict[str, Any]) -> str:
    versions = ", ".join(f"{n} {v}" for n, v in environment["versions"].items() if v)
    return (
        f"`{environment['command']}` ({environment['processor']}, {environment['cores']} cores, "
        f"{versions}, {environment['date']}; best of interleaved rounds; "
        f"[{name}](benchmarks/results/{name}))  "
    )
