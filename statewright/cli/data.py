"""`statewright data`: text in, a token file out, for `statewright train --data`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import click

from statewright.cli.show import json_option, show
from statewright.cli.types import COUNT, TEXT, TOKENIZER


@click.command()
@click.argument("text", nargs=-1, type=TEXT)
@click.option("--dataset", help="Hugging Face dataset (id or id:config), or a jsonl/parquet file.")
@click.option("--split", default="train", show_default=True, help="Part of the dataset.")
@click.option("--column", default="text", show_default=True, help="Its column of text.")
@click.option("--stream", is_flag=True, help="Read the dataset while downloading it.")
@click.option("--num-documents", type=COUNT, help="Stop after that many.")
@click.option("--boundary", help="Also cut TEXT files here, e.g. '<|endoftext|>'.")
@click.option(
    "--min-length", type=COUNT, default=0, show_default=True, help="Shortest document, in tokens."
)
@click.option(
    "--tokenizer",
    type=TOKENIZER,
    default="bytes",
    show_default=True,
    help="bytes, or any Hugging Face tokenizer (path or id).",
)
@click.option("--output-dir", required=True, type=click.Path(), help="Must not be there yet.")
@json_option
def data(
    text: tuple[str, ...],
    dataset: str | None,
    num_documents: int | None,
    boundary: str | None,
    min_length: int,
    tokenizer: str,
    output_dir: str,
    as_json: bool,
    **source: str | bool,
) -> None:
    """Tokenize TEXT files or a dataset once; `train --data` maps the result, of any size.

    \b
    Example: statewright data book.txt --output-dir tokens

    Every file or row is a document and ends with the end-of-text token. A literal
    <|endoftext|> in a text is text, unless --boundary names it.
    """
    from itertools import islice

    from statewright.cli.common import quiet_libraries
    from statewright.models.tokenizers import load_tokenizer
    from statewright.train.data_files import dataset_documents, text_documents, write_tokens

    if bool(text) == bool(dataset):
        raise click.UsageError("give TEXT files or --dataset", click.get_current_context())
    if dataset and boundary:
        raise click.UsageError("--boundary is for TEXT files", click.get_current_context())
    if tokenizer == "characters":
        raise ValueError("tokenizer 'characters' knows its text first; use train --text")
    quiet_libraries()

    def documents() -> Iterator[Iterable[str]]:
        if dataset:
            yield from dataset_documents(dataset, **source)
        for path in text:
            yield from text_documents(path, boundary)

    chosen = islice(documents(), num_documents)
    kept = write_tokens(chosen, load_tokenizer(tokenizer), output_dir, min_length)
    found = {**vars(kept), "output_dir": output_dir}
    show(found, as_json, lambda to, _: to.print(f"{kept}\ndata: {output_dir}", soft_wrap=True))
