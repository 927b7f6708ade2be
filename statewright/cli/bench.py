"""`statewright bench`: ratios to physical floors and to peers, as JSON and as a table."""

from __future__ import annotations

import json
from pathlib import Path

import click

_SUITES = ("scans", "layers", "decode", "matrix", "memory")


@click.command()
@click.option("--suite", multiple=True, type=click.Choice(_SUITES), default=_SUITES)
@click.option("--quick", is_flag=True, help="Small shapes, one second each: a smoke test.")
@click.option("--threads", multiple=True, type=int, default=[1, 2], show_default=True)
@click.option("--output-dir", type=click.Path(), help="Write one JSON file per suite there.")
@click.option("--readme", type=click.Path(), help="Update the table in this file.")
def bench(suite, quick: bool, threads, output_dir: str | None, readme: str | None) -> None:
    """Measure scans, layers, decoding and memory; peers that are not installed are left out."""
    from rich.console import Console

    from statewright.bench import decode, layers, matrix, scans
    from statewright.bench.protocol import as_json, environment, measure

    console = Console()
    modules = {"scans": scans, "layers": layers, "decode": decode, "matrix": matrix}
    for name in suite:
        command = f"statewright bench --suite {name}" + (" --quick" if quick else "")
        about = environment(command)
        if name == "memory":
            found = _memory(console, quick)
            about |= {"peak_bytes": {str(size): peak for size, peak in found.items()}}
            rows = []
        else:
            rows = []
            for case in modules[name].cases(quick):
                for count in threads:
                    measured = measure(case, count, seconds=1.0 if quick else 4.0)
                    rows += measured
                    _show(console, measured)
        if output_dir:
            path = Path(output_dir)
            path.mkdir(parents=True, exist_ok=True)
            text = json.dumps(as_json(rows, about), indent=1) + "\n"
            (path / f"{name}.json").write_text(text, encoding="utf-8")
    if readme and output_dir:
        from statewright.bench.table import write_readme

        write_readme(Path(readme), Path(output_dir))


def _memory(console, quick: bool) -> dict[int, int]:
    from statewright.bench.decode import peak_memory

    found = peak_memory((50_000, 200_000) if quick else (100_000, 3_000_000))
    small, large = min(found), max(found)
    console.print(
        f"reading {small:,} and {large:,} bytes: peak memory "
        f"{found[large] / found[small] - 1:+.2%} ({found[small] / 2**20:,.0f} MiB)"
    )
    return found


def _show(console, rows) -> None:
    console.print(f"[bold]{rows[0].case}[/bold], {rows[0].threads} thread(s)")
    for row in rows:
        error = "" if row.error is None else f"   error {row.error:.1e}"
        console.print(
            f"  {row.method:<28} {row.to_floor:8.2f} x floor   "
            f"median {row.median / row.best:.2f} x best of {row.rounds}{error}",
            highlight=False,
        )
