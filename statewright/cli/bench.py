"""`statewright bench`: ratios to physical floors and to peers, as JSON and as a table."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from statewright.cli.show import console, counted, emit, json_option, plain
from statewright.cli.types import Count

SUITES = ("scans", "layers", "decode", "matrix", "bounded")
SUITES += ("perplexity", "evaluation", "probes", "repairs", "resize", "training", "memory")


@click.command()
@click.option("--suite", multiple=True, type=click.Choice(SUITES), default=SUITES)
@click.option("--quick", is_flag=True, help="Small shapes, one second each: a smoke test.")
@click.option("--threads", multiple=True, type=Count(1), default=[1, 2], show_default=True)
@click.option("--output-dir", type=click.Path(), help="Write one JSON file per suite there.")
@click.option(
    "--page",
    type=click.Path(exists=True, dir_okay=False),
    help="Write the tables into this file, from --output-dir (docs/speed.md has places for them).",
)
@json_option
def bench(
    suite: tuple[str, ...],
    quick: bool,
    threads: tuple[int, ...],
    output_dir: str | None,
    page: str | None,
    as_json: bool,
) -> None:
    """Measure scans, layers, decoding and memory; peers that are not installed are left out.

    \b
    Example: statewright bench --suite scans --quick
    """
    if page:
        from statewright.bench.table import check_places, write_tables

        if not output_dir:
            raise click.UsageError("--page takes its tables from the files in --output-dir")
        check_places(Path(page), suite)
    from statewright.bench.protocol import as_json as record
    from statewright.bench.protocol import environment

    to, found = console(stderr=as_json), {}
    for name in suite:
        about = environment(f"statewright bench --suite {name}" + (" --quick" if quick else ""))
        rows: list[Any] = []
        if name == "memory":
            about |= _memory(to, quick)
        else:
            rows = _measured(to, name, quick, threads)
        found[name] = record(rows, about)
        if output_dir:
            path = Path(output_dir)
            path.mkdir(parents=True, exist_ok=True)
            text = json.dumps(plain(found[name]), indent=1) + "\n"
            (path / f"{name}.json").write_text(text, encoding="utf-8")
    if page and output_dir:
        write_tables(Path(page), Path(output_dir))
    if as_json:
        emit(found)


def _measured(to: Any, name: str, quick: bool, threads: Sequence[int]) -> list[Any]:
    from statewright.bench.protocol import measure

    rows: list[Any] = []
    for case in importlib.import_module(f"statewright.bench.{name}").cases(quick):
        for count in threads:
            measured = measure(case, count, seconds=1.0 if quick else 4.0)
            rows += measured
            _show(to, measured)
    return rows


def _memory(to: Any, quick: bool) -> dict[str, Any]:
    from statewright.bench.memory import report

    found = report(quick)
    small, large = sorted(found["peak_of_reading"].items(), key=lambda entry: int(entry[0]))
    over = found["peak_of_prefill_over_model"]
    to.print(
        f"reading {int(small[0]):,} and {int(large[0]):,} bytes: peak memory "
        f"{large[1] / small[1] - 1:+.2%} ({small[1] / 2**20:,.0f} MiB)\n"
        f"Mamba-2 prefill {found['prefill']}: over the model ours {over['ours'] / 2**20:,.0f} MiB, "
        f"transformers {over['theirs'] / 2**20:,.0f} MiB"
    )
    return found


def _show(to: Any, rows: Sequence[Any]) -> None:
    to.print(f"{rows[0].case}, {counted(rows[0].threads, 'thread')}", style="bold")
    for row in rows:
        error = "" if row.error is None else f"   error {row.error:.1e}"
        to.print(
            f"  {row.method:<28} {row.to_floor:8.2f} x floor   "
            f"median {row.median / row.best:.2f} x best of {row.rounds}{error}",
            soft_wrap=True,
        )
