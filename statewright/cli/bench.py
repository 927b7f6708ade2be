"""`statewright bench`: ratios to physical floors and to peers, as JSON and as a table."""

from __future__ import annotations

import json
from pathlib import Path

import click

SUITES = ("scans", "layers", "decode", "matrix", "bounded")
SUITES += ("perplexity", "evaluation", "probes", "repairs", "resize", "training", "memory")


@click.command()
@click.option("--suite", multiple=True, type=click.Choice(SUITES), default=SUITES)
@click.option("--quick", is_flag=True, help="Small shapes, one second each: a smoke test.")
@click.option("--threads", multiple=True, type=int, default=[1, 2], show_default=True)
@click.option("--output-dir", type=click.Path(), help="Write one JSON file per suite there.")
@click.option(
    "--page",
    type=click.Path(exists=True, dir_okay=False),
    help="Write the tables into this file, from --output-dir (docs/speed.md has places for them).",
)
def bench(suite, quick: bool, threads, output_dir: str | None, page: str | None) -> None:
    """Measure scans, layers, decoding and memory; peers that are not installed are left out."""
    if page:
        from statewright.bench.table import check_places, write_tables

        if not output_dir:
            raise click.UsageError("--page takes its tables from the files in --output-dir")
        check_places(Path(page), suite)
    from rich.console import Console

    from statewright.bench import (
        bounded,
        decode,
        evaluation,
        layers,
        matrix,
        perplexity,
        probes,
        repairs,
        resize,
        scans,
        training,
    )
    from statewright.bench.protocol import as_json, environment, measure

    console = Console()
    modules = {"scans": scans, "layers": layers, "decode": decode, "matrix": matrix}
    modules |= {"bounded": bounded, "perplexity": perplexity, "repairs": repairs, "resize": resize}
    modules |= {"training": training, "probes": probes, "evaluation": evaluation}
    for name in suite:
        command = f"statewright bench --suite {name}" + (" --quick" if quick else "")
        about = environment(command)
        if name == "memory":
            about |= _memory(console, quick)
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
    if page and output_dir:
        write_tables(Path(page), Path(output_dir))


def _memory(console, quick: bool) -> dict:
    from statewright.bench.memory import report

    found = report(quick)
    small, large = sorted(found["peak_of_reading"].items(), key=lambda entry: int(entry[0]))
    over = found["peak_of_prefill_over_model"]
    console.print(
        f"reading {int(small[0]):,} and {int(large[0]):,} bytes: peak memory "
        f"{large[1] / small[1] - 1:+.2%} ({small[1] / 2**20:,.0f} MiB)\n"
        f"Mamba-2 prefill {found['prefill']}: over the model ours {over['ours'] / 2**20:,.0f} MiB, "
        f"transformers {over['theirs'] / 2**20:,.0f} MiB"
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
