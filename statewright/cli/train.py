"""`statewright train`: text files in, a model directory out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from statewright.cli.common import mixers_of, options_of
from statewright.cli.presets import preset_option
from statewright.cli.resume import changes, given, is_begun, located, refuse_other_options
from statewright.cli.show import console
from statewright.cli.types import COUNT, MIXER, MODEL, POSITIVE, TEXT, TOKENIZER
from statewright.train.config import TrainConfig

_HELPS = {
    "num_steps": "Optimizer steps.",
    "num_lanes": "Rows per batch, each a lane of consecutive text.",
    "length": "Tokens per row and segment; the state is carried on.",
    "curriculum": "Longer rows later: 1k@500,4k@2k is 1,024 tokens from step 500 on.",
    "documents": "Reset the state where a document begins, or join them.",
    "initial": "What a row's state is before each step.",
    "num_segments": "Segments a state is carried over; 0: the whole document.",
    "reset_share": "Chance that a row begins from zero all the same.",
    "gradient_segments": "Segments per step that gradients go through.",
    "learning_rate": "Peak learning rate.",
    "schedule": "After the warm-up; wsd: constant, then linear decay.",
    "num_warmup_steps": "Steps of linear warm-up.",
    "decay_share": "Share of the steps in wsd's decay.",
    "final_rate": "Share of the learning rate left at the end.",
    "beta1": "AdamW's.",
    "beta2": "AdamW's.",
    "weight_decay": "AdamW's, on matrices only.",
    "clip": "Largest gradient norm.",
    "dtype": "Compute type; weights and states stay float32.",
    "num_accumulation": "Parts in which a step's rows are computed.",
    "checkpointing": "Compute activations again instead of keeping them.",
    "train_only": "all, state, mixers, or mixers:0,6 of some layers.",
    "policy": "Train under a policy, e.g. tova:budget=512.",
    "parallel": "What torchrun's processes divide: rows, rows and weights, or tokens.",
    "seed": "Of weights, dropout and data.",
    "eval_every": "Steps between held-out evaluations.",
    "save_every": "Steps between checkpoints.",
    "num_checkpoints": "Checkpoints kept.",
}
# Held-out tokens of data files, at most: a share of a large one would take longer than training.
_HELD_OUT = 1_000_000


@click.command()
@click.option("--text", multiple=True, type=TEXT, help="A text file; repeat for more.")
@click.option("--data", multiple=True, help="Made by statewright data; DIR=2 weighs it twice.")
@click.option("--model", type=MODEL, help="Go on from this model, instead of afresh.")
@click.option("--device", default="cpu", show_default=True, help="cuda: one GPU per process.")
@click.option("--output-dir", required=True, type=click.Path(), help="Where the run is written.")
@click.option(
    "--resume",
    type=click.Choice(["exact", "auto"]),
    is_flag=False,
    flag_value="exact",
    help="Continue the run in --output-dir, exactly; auto: begin it, continue it, or extend it to "
    "more steps: one command for all.",
)
@click.option("--tensorboard", is_flag=True, help="Also write TensorBoard events.")
@click.option("--valid-text", type=TEXT, help="Held-out text [default: end of --text].")
@click.option("--valid-share", default=0.1, show_default=True, help="Share of --text held out.")
@click.option(
    "--mixer",
    type=MIXER,
    multiple=True,
    default=["mingru"],
    show_default=True,
    help="Mixer spec; repeat to cycle over the layers (see statewright list).",
)
@click.option("--hidden-size", type=POSITIVE, default=256, show_default=True, help="Width.")
@click.option("--num-layers", type=POSITIVE, default=4, show_default=True, help="Depth.")
@click.option("--conv-kernel", type=COUNT, default=4, show_default=True, help="0: none.")
@click.option("--mlp-ratio", default=4.0, show_default=True, help="MLP width / width; 0: none.")
@click.option(
    "--norm", type=click.Choice(["rmsnorm", "layernorm"]), default="rmsnorm", show_default=True
)
@click.option("--dropout", default=0.0, show_default=True)
@click.option(
    "--tokenizer",
    type=TOKENIZER,
    default="bytes",
    show_default=True,
    help="bytes, characters, or any Hugging Face tokenizer (path or id).",
)
@preset_option
@options_of(TrainConfig, _HELPS)
@click.pass_context
def train(ctx: click.Context, output_dir: str, **options: Any) -> None:
    """Train a language model on text or token files; --resume continues exactly.

    \b
    Example: statewright train --text book.txt --output-dir run

    Documents are files, or those of the token file. Rows of a batch are lanes of consecutive
    text: the state is carried from step to step and reset where a document begins. Under
    torchrun, several processes share a step. Ctrl-C, SIGTERM and SIGUSR1 save after the step and
    end with 128 + the signal's number.
    """
    directory, sources = Path(output_dir), bool(options["text"]) + bool(options["data"])
    going_on = options["resume"]
    if going_on == "auto" and not is_begun(directory):
        going_on = None
    if going_on is None:
        config = TrainConfig(**{name: options[name] for name in _HELPS})
    if going_on == "exact":
        refuse_other_options(ctx)
    elif going_on is None and sources != 1:
        raise click.UsageError("give at least one --text FILE, or --data DIR", ctx)
    elif going_on is None and _holds_a_run(directory):
        raise ValueError(
            f"{directory} already holds a run: --resume continues it, "
            "another --output-dir starts afresh"
        )
    if not 0 <= options["valid_share"] < 1:
        raise ValueError(f"valid-share={options['valid_share']}, expected a share below 1")
    # Not before: it loads torch, and what is wrong above is said at once.
    from statewright.train.distributed import joined

    with joined():
        if going_on:
            run = _resumed(directory, {**options, "output_dir": output_dir}, given(ctx))
        else:
            run = _fresh(directory, config, options)
        _train(run, options["tensorboard"])


def _holds_a_run(directory: Path) -> bool:
    return any(directory.glob("checkpoint-*")) or (directory / "config.json").exists()


def _train(run: Any, tensorboard: bool) -> None:
    from statewright.cli.progress import TrainingBar
    from statewright.cli.tensorboard import TensorBoardListener
    from statewright.train.loop import TrainingInterrupted, TrainingStopped

    first = run.world.rank == 0
    to = console(stderr=True, quiet=not first)
    parameters = sum(p.numel() for p in run.model.parameters())
    together = f"{run.world.size} processes, " if run.world.size > 1 else ""
    to.print(
        f"{mixers_of(run.model.config)}, {parameters:,} parameters, {run.num_tokens:,} training "
        f"tokens, {together}state {run.state.rows(0).nbytes:,} bytes"
    )
    if run.step == run.config.num_steps:
        to.print(f"its {run.step:,} steps are done; a higher --num-steps extends it")
    bar = TrainingBar(to, run.config.num_steps, run.step)
    board = TensorBoardListener(run.directory) if tensorboard and first else None
    listeners = [bar] if board is None else [bar, board]
    run.listen = lambda event: [listen(event) for listen in listeners]
    try:
        with bar:
            run.train()
    except TrainingInterrupted as stop:
        click.echo(f"\nstatewright: {stop}", err=True)
        click.echo(f"resume: statewright train --output-dir {run.directory} --resume", err=True)
        raise click.exceptions.Exit(stop.exit_code) from None
    except TrainingStopped as stop:
        raise ValueError(str(stop)) from None
    finally:
        if board is not None:
            board.close()
    if not first:
        return
    if run.valid is not None:
        click.echo(
            f"held-out: {run.valid.nats:.4f} nats/token, {run.valid.bits_per_byte:.4f} bits/byte "
            f"({run.valid.num_tokens:,} tokens)"
        )
    click.echo(f"model: {run.directory}")


def _fresh(directory: Path, config: TrainConfig, options: dict[str, Any]) -> Any:
    from statewright.cli.common import quiet_libraries
    from statewright.models import load
    from statewright.models.tokenizers import saved_tokenizer

    quiet_libraries()
    valid_text = options["valid_text"]
    about = {
        "text": [str(Path(path).resolve()) for path in options["text"]],
        "data": [list(_weighted(entry)) for entry in options["data"]],
        "valid_text": valid_text and str(Path(valid_text).resolve()),
        "valid_share": options["valid_share"],
        "tokenizer": options["tokenizer"],
        "model": located(options["model"]),
    }
    if options["model"]:
        model, tokenizer = load(options["model"]), saved_tokenizer(options["model"])
    else:
        tokenizer = _tokenizer(options)
        model = _new_model(options, tokenizer, config.seed)
    return _run(directory, _placed(model, options["device"]), tokenizer, config, about)


def _placed(model: Any, device: str) -> Any:
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {' '.join(str(error).split())[:120]}") from error


def _tokenizer(options: dict[str, Any]) -> Any:
    from statewright.models.tokenizers import load_tokenizer, saved_tokenizer
    from statewright.text_file import whole_text

    if options["data"]:
        return saved_tokenizer(_weighted(options["data"][0])[0])
    name, whole = options["tokenizer"], ""
    if name == "characters":
        whole = "".join(map(whole_text, options["text"]))
    return load_tokenizer(name, whole)


def _weighted(entry: str) -> tuple[str, float]:
    """`DIR` or `DIR=weight`."""
    path, equals, weight = entry.rpartition("=")
    try:
        path, number = (path, float(weight)) if equals else (entry, 1.0)
    except ValueError:
        path, number = entry, 1.0
    return str(Path(path).resolve()), number


def _new_model(options: dict[str, Any], tokenizer: Any, seed: int) -> Any:
    import torch

    from statewright.models import StatewrightConfig, StatewrightForCausalLM

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
        torch.manual_seed(seed)
        return StatewrightForCausalLM(model_config)


def _resumed(directory: Path, options: dict[str, Any], names: set[str]) -> Any:
    """The run that is there; names: of the options that were given."""
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
    about = {n: record[n] for n in ("text", "valid_text", "valid_share")}
    about |= {n: record[n] for n in ("tokenizer", "model") if n in record}
    about["data"] = record.get("data_files", [])
    if options["text"]:
        about["text"] = [str(Path(path).resolve()) for path in options["text"]]
    if options["data"]:
        about["data"] = [list(_weighted(entry)) for entry in options["data"]]
    if options["valid_text"]:
        about["valid_text"] = str(Path(options["valid_text"]).resolve())
    model, tokenizer = load(found[-1].path), saved_tokenizer(found[-1].path)
    changed = changes(names, options, record, model.config)
    config = TrainConfig(**{**record["config"], **changed})
    run = _run(directory, _placed(model, options["device"]), tokenizer, config, about)
    run.resume()
    return run


def _run(directory: Path, model: Any, tokenizer: Any, config: TrainConfig, about: dict) -> Any:
    from statewright.text_file import read_text
    from statewright.train.data import corpus_of
    from statewright.train.data_mix import hold_out
    from statewright.train.loop import Run

    about = dict(about)
    # A record's "data" is the fingerprint.
    files, weights, most = about.pop("data"), [1.0], _HELD_OUT
    about["data_files"] = files
    if files:
        corpora, weights = _token_files([path for path, _ in files], tokenizer), []
        weights = [weight for _, weight in files]
    else:
        corpora = [corpus_of([read_text(path) for path in about["text"]], tokenizer)]
        most = corpora[0].num_tokens
    valid = None
    if about["valid_text"]:
        valid = corpus_of([read_text(about["valid_text"])], tokenizer)
    elif about["valid_share"] > 0:
        corpora, valid = hold_out(corpora, about["valid_share"], most)
    if valid is not None and valid.num_tokens < 2:
        valid = None
    given = corpora[0] if len(corpora) == 1 else list(zip(corpora, weights))
    return Run(model, tokenizer, given, valid, config, directory, about)


def _token_files(paths: list[str], tokenizer: Any) -> list[Any]:
    from statewright.token_text import same_tokens
    from statewright.train.data_files import read_tokens

    corpora = []
    for path in paths:
        corpus, theirs = read_tokens(path)
        if not same_tokens(theirs, tokenizer):
            raise ValueError(f"{path}: made with another tokenizer than the model's")
        corpora.append(corpus)
    return corpora
