"""The tables of "Transformers are Multi-State RNNs" for a small model, on books of yours.

    python examples/bounded_books.py run moby_dick.txt war_and_peace.txt middlemarch.txt \
        --output books.json --tables moby,windows,long,decode,throughput
    python examples/bounded_books.py table books.json

Each result is written as soon as it is there; the same command again goes on where it stopped.
`--short` is the same on texts of 256 tokens, in a minute.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

TABLES = "moby,windows,long,decode,throughput"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(required=True)
    run = verbs.add_parser("run", help="fill the JSON file")
    run.add_argument("books", nargs="+", help="text files; the first is the single-book tables'")
    run.add_argument("--model", default="smollm2-135m")
    run.add_argument("--output", default="bounded_books.json")
    run.add_argument("--tables", default=TABLES)
    run.add_argument("--only", default="", help="only cells whose key contains this")
    run.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float64"])
    run.add_argument("--short", action="store_true")
    run.set_defaults(verb=fill)
    table = verbs.add_parser("table", help="the JSON file as Markdown")
    table.add_argument("results")
    table.set_defaults(verb=show)
    arguments = parser.parse_args()
    arguments.verb(arguments)


def fill(arguments: argparse.Namespace) -> None:
    from statewright.bench.protocol import environment
    from statewright.cli.common import quiet_libraries
    from statewright.hf.pretrained import locate
    from statewright.models.any_model import load_any
    from statewright.models.tokenizers import saved_tokenizer
    from statewright.studies.books import Book, Plan, cells
    from statewright.studies.cells import run_cells

    quiet_libraries()
    directory = locate(arguments.model)
    model = load_any(str(directory), getattr(torch, arguments.dtype))
    tokenizer = saved_tokenizer(directory)
    files = [Path(file) for file in arguments.books]
    books = [Book.read(f.stem, f.read_text(encoding="utf-8"), tokenizer) for f in files]
    plan = Plan()
    if arguments.short:
        plan = Plan(256, (16, 64), (16,), 2, long_length=512, long_budget=64, new_tokens=32)
        plan = Plan(**{**vars(plan), "every": 8, "memory": 2**24})
    names = " ".join(f.name for f in files)
    about = environment(f"python examples/bounded_books.py run {names} --model {arguments.model}")
    about |= {"model": arguments.model, "dtype": arguments.dtype}
    about["threads"] = int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads()))
    wanted = cells(model, books, plan, arguments.tables.split(","))
    chosen = [cell for cell in wanted if arguments.only in cell.key]
    print(f"{len(chosen)} cells in {arguments.output}", flush=True)
    for key, found in run_cells(chosen, arguments.output, about):
        nats = " ".join(f"{value:.4f}" for value in found.get("nats", ()))
        print(f"{key}: {nats} ({found['seconds']:.0f} s)", flush=True)


def show(arguments: argparse.Namespace) -> None:
    from statewright.studies.books_table import markdown
    from statewright.studies.cells import read_cells

    print(markdown(read_cells(arguments.results)))


if __name__ == "__main__":
    main()
