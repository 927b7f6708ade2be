"""`statewright train`: text files in, a model directory out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from statewright.cli.common import COUNT, options_of
from statewright.train.config import TrainConfig

_HELPS = {
    "num_steps": "Optimizer steps.",
    "num_lanes": "Rows per batch, each a lane of consecutive text.",
    "length": "Tokens per row and step; the state is carried on.",
    "learning_rate": "Peak learning rate.",
    "schedule": "After the warm-up.",
    "num_warmup_steps": "Steps of linear warm-up.",
    "final_rate": "Share of the learning rate left at the end of cosine.",
    "weight_decay": "AdamW's, on matrices only.",
    "clip": "Largest gradient norm.",
    "dtype": "Compute type; weights and states stay float32.",
    "seed": "Of weights, dropout and data.",
    "eval_every": "Steps between held-out evaluations.",
    "save_every": "Steps between checkpoints.",
    "num_checkpoints": "Checkpoints kept.",
}
_OWN = {"text", "output_dir", "resume", "valid_text", "tensorboard"}


@click.command()
@click.option("--text", multiple=True, type=click.Path(), help="A text file; repeat for more.")
@click.option("--output-dir", required=True, type=click.Path(), help="Where the run is written.")
@click.option("--resume", is_flag=True, help="Continue the run in --output-dir, exactly.")
@click.option("--tensorboard", is_flag=True, help="Also write TensorBoard events.")
@click.option("--valid-text", type=click.Path(), help="Held-out text [default: end of --text].")
@click.option("--valid-share", default=0.1, show_default=True, help="Share of --text held out.")
@click.option(
    "--mixer",
    multiple=True,
    default=["mingru"],
    show_default=True,
    help="Mixer spec; repeat to cycle over the layers (see statewright list).",
)
@click.option("--hidden-size", type=COUNT, default=256, show_default=True, help="Width.")
@click.option("--num-layers", type=COUNT, default=4, show_default=True, help="Depth.")
@click.option("--conv-kernel", type=COUNT, default=4, show_default=True, help="0: none.")
@click.option("--mlp-ratio", default=4.0, show_default=True, help="MLP width / width; 0: none.")
@click.option(
    "--norm", type=click.Choice(["rmsnorm", "layernorm"]), default="rmsnorm", show_default=True
)
@click.option("--dropout", default=0.0, show_default=True)
@click.option(
    "--tokenizer",
    default="bytes",
    show_default=True,
    help="bytes, characters, or any Hugging Face tokenizer (path or id).",
)
@options_of(TrainConfig, _HELPS)
@click.pass_context
def train(ctx: click.Context, text: tuple[str, ...], output_dir: str, **options: Any) -> None:
    """Train a language model on text files; Ctrl-C saves, --resume continues exactly.

    Documents are files. Rows of a batch are lanes of consecutive text: the state is carried from
    step to step and reset where a document begins.
    """
    directory = Path(output_dir)
    if options["resume"]:
        _refuse_other_options(ctx)
        run = _resumed(directory, text, options["valid_text"])
    else:
        if not text:
            raise click.UsageError("give at least one --text FILE", ctx)
        if list(directory.glob("checkpoint-*")) or (directory / "config.json").exists():
            raise ValueError(
                f"{directory} already holds a run: --resume continues it, "
                "another --output-dir starts afresh"
            )
        run = _fresh(directory, text, options)
    _train(run, options["tensorboard"])


def _train(run: Any, tensorboard: bool) -> None:
    from rich.console import Console

    from statewright.cli.progress import TrainingBar
    from statewright.cli.tensorboard import TensorBoardListener
    from statewright.train.loop import TrainingInterrupted, TrainingStopped

    console = Console(stderr=True)
    parameters = sum(p.numel() for p in run.model.parameters())
    console.print(
        f"{run.model.config.mixer}, {parameters:,} parameters, "
        f"{run.train_corpus.num_tokens:,} training tokens, state {run.state.rows(0).nbytes:,} bytes"
    )
    bar = TrainingBar(console, run.config.num_steps, run.step)
    board = TensorBoardListener(run.directory) if tensorboard else None
    listeners = [bar] if board is None else [bar, board]
    run.listen = lambda event: [listen(event) for listen in listeners]
    try:
        with bar:
            run.train()
    except TrainingInterrupted as stop:
        click.echo(f"\nstatewright: {stop}", err=True)
        click.echo(f"resume: statewright train --output-dir {run.directory} --resume", err=True)
        raise click.exceptions.Exit(130) from None
    except TrainingStopped as stop:
        raise ValueError(str(stop)) from None
    finally:
        if board is not None:
            board.close()
    if run.valid is not None:
        click.echo(
            f"held-out: {run.valid.nats:.4f} nats/token, {run.valid.bits_per_byte:.4f} bits/byte "
            f"({run.valid.num_tokens:,} tokens)"
        )
    click.echo(f"model: {run.directory}")


def _fresh(directory: Path, text: tuple[str, ...], options: dict[str, Any]) -> Any:
    import torch

    from statewright.cli.common import quiet_libraries
    from statewright.models import StatewrightConfig, StatewrightForCausalLM
    from statewright.models.tokenizers import load_tokenizer
    from statewright.train.data import read_text

    quiet_libraries()
    config = TrainConfig(**{name: options[name] for name in _HELPS})
    if not 0 <= options["valid_share"] < 1:
        raise ValueError(f"valid-share={options['valid_share']}, expected a share below 1")
    whole = "".join("".join(read_text(path)) for path in text)
    tokenizer = load_tokenizer(options["tokenizer"], whole)
    mixer = list(options["mixer"])
    model_config = StatewrightConfig(
        vocab_size=len(tokenizer),
        hidden_size=options["hidden_size"],
        num_hidden_layers=options["num_layers"],
        mixer=mixer[0] if len(mixer) == 1 else mixer,
        conv_kernel=options["conv_kernel"],
        mlp_ratio=options["mlp_ratio"],
        norm=options["norm"],
        dropout=options["dropout"],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = StatewrightForCausalLM(model_config)
    about = {
        "text": [str(Path(path).resolve()) for path in text],
        "valid_text": options["valid_text"] and str(Path(options["valid_text"]).resolve()),
        "valid_share": options["valid_share"],
    }
    return _run(directory, model, tokenizer, config, about)


def _resumed(directory: Path, text: tuple[str, ...], valid_text: str | None) -> Any:
    from statewright.cli.common import quiet_libraries
    from statewright.models import load
    from statewright.models.tokenizers import saved_tokenizer
    from statewright.train.checkpoint import checkpoints

    quiet_libraries()
    found = checkpoints(directory)
    if not found:
        raise ValueError(f"{directory}: no checkpoint to resume from")
    record = found[-1].record
    if "text" not in record:
        raise ValueError(f"{directory}: not made by statewright train, its text is not recorded")
    about = {name: record[name] for name in ("text", "valid_text", "valid_share")}
    if text:
        about["text"] = [str(Path(path).resolve()) for path in text]
    if valid_text:
        about["valid_text"] = str(Path(valid_text).resolve())
    model = load(found[-1].path)
    tokenizer = saved_tokenizer(found[-1].path)
    run = _run(directory, model, tokenizer, TrainConfig(**record["config"]), about)
    run.resume()
    return run


def _run(directory: Path, model: Any, tokenizer: Any, config: TrainConfig, about: dict) -> Any:
    from statewright.train.data import corpus_of, read_text
    from statewright.train.loop import Run

    corpus = corpus_of([read_text(path) for path in about["text"]], tokenizer)
    valid = None
    if about["valid_text"]:
        valid = corpus_of([read_text(about["valid_text"])], tokenizer)
    elif about["valid_share"] > 0:
        corpus, valid = corpus.split(about["valid_share"])
    if valid is not None and valid.num_tokens < 2:
        valid = None
    return Run(model, tokenizer, corpus, valid, config, directory, about)


def _refuse_other_options(ctx: click.Context) -> None:
    given = [
        name
        for name in ctx.params
        if name not in _OWN
        and ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    ]
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise click.UsageError(f"--resume takes the run's own options; leave out {names}", ctx)
