"""The command line, as typed: every verb end to end, and every mistake one clear line."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from pathlib import Path

import pytest
from test_train import one_thread  # noqa: F401

import statewright
from statewright.cli import main, progress
from statewright.state_file import load_state, read_state_file

TEXT = "".join(f"{n} green bottles, standing on a wall; and if one falls, " for n in range(150))
TINY = ["--hidden-size", "16", "--num-layers", "2", "--mlp-ratio", "1", "--dropout", "0.1"]
SHORT = ["--num-steps", "6", "--num-lanes", "2", "--length", "32", "--eval-every", "3"]


class Ran:
    """What a command left behind: its exit code and what it wrote."""

    def __init__(self, capsys, *argv: object) -> None:
        capsys.readouterr()
        self.code = main([str(a) for a in argv])
        self.out, self.err = capsys.readouterr()


@pytest.fixture
def run(capsys):
    return lambda *argv: Ran(capsys, *argv)


def fingerprint(directory: Path) -> dict[str, str]:
    files = [p for p in sorted(directory.rglob("*")) if p.is_file()]
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def assert_refused(ran: Ran, *reasons: str) -> None:
    assert ran.code not in (0, None)
    assert ran.out == ""
    assert ran.err.count("\n") == 1 and ran.err.endswith("\n"), ran.err
    assert ran.err.startswith("statewright: ") and "Traceback" not in ran.err
    for reason in reasons:
        assert reason in ran.err


@pytest.fixture(scope="module")
def home(one_thread, tmp_path_factory) -> Path:  # noqa: F811
    """A directory with a text and a model trained on it for long enough to write letters."""
    home = tmp_path_factory.mktemp("home")
    (home / "book.txt").write_text(TEXT)
    options = ["--num-steps", "60", "--learning-rate", "0.01", "--save-every", "30"]
    argv = ["train", "--text", home / "book.txt", "--output-dir", home / "run", *TINY, *SHORT]
    assert main([*map(str, argv), *options]) == 0
    return home


def test_train_writes_a_model(home: Path, tmp_path: Path, run) -> None:
    ran = run("train", "--text", home / "book.txt", "--output-dir", tmp_path / "r", *TINY, *SHORT)
    assert ran.code == 0 and "nats/token" in ran.out and f"model: {tmp_path / 'r'}" in ran.out
    assert "parameters" in ran.err and "Writing model shards" not in ran.err
    model = statewright.load(tmp_path / "r")
    assert model.config.hidden_size == 16 and model.config.mixer == "mingru"
    lines = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line)["event"] for line in lines]
    assert events.count("step") == 6 and events.count("held_out") == 2


def test_train_options_reach_the_model(home: Path, tmp_path: Path, run) -> None:
    mixers = ["--mixer", "minlstm:expansion=2", "--mixer", "lstm", "--tokenizer", "characters"]
    kind = ["--norm", "layernorm", "--conv-kernel", "0", "--schedule", "constant", "--seed", "3"]
    texts = ["--text", home / "book.txt", "--text", home / "book.txt", "--valid-share", "0"]
    ran = run("train", *texts, "--output-dir", tmp_path, *TINY, *SHORT, *mixers, *kind)
    assert ran.code == 0 and "held-out" not in ran.out
    config = statewright.load(tmp_path).config
    assert config.mixer == ["minlstm:expansion=2", "lstm"] and config.norm == "layernorm"
    assert config.vocab_size == len(set(TEXT)) + 2 and config.conv_kernel == 0
    record = json.loads((tmp_path / "checkpoint-6" / "run.json").read_text())
    assert record["config"]["schedule"] == "constant" and record["config"]["seed"] == 3
    assert record["text"] == [str(home / "book.txt")] * 2


def test_ctrl_c_and_resume(home: Path, tmp_path: Path, run, monkeypatch) -> None:
    whole = ["train", "--text", home / "book.txt", *TINY, *SHORT, "--output-dir"]
    assert run(*whole, tmp_path / "whole").code == 0
    shown = progress.TrainingBar.__call__

    def press(bar, event: dict) -> None:
        shown(bar, event)
        if event["step"] == 4:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(progress.TrainingBar, "__call__", press)
    ran = run(*whole, tmp_path / "cut")
    monkeypatch.undo()
    assert ran.code == 130 and "Traceback" not in ran.err
    assert f"resume: statewright train --output-dir {tmp_path / 'cut'} --resume" in ran.err
    refused = run("generate", tmp_path / "cut")
    assert_refused(refused, "no model there", f"did you mean {tmp_path / 'cut' / 'checkpoint-4'}?")
    refused = run("train", "--output-dir", tmp_path / "cut", "--resume", "--num-steps", "9")
    assert_refused(refused, "leave out --num-steps")
    assert run("train", "--output-dir", tmp_path / "cut", "--resume").code == 0
    name = "model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_generate_writes_the_text_alone(home: Path, run) -> None:
    argv = ["generate", home / "run", "--prompt", "7 green", "--max-new-tokens", "40"]
    ran = run(*argv)
    assert ran.code == 0 and ran.out.startswith("7 green") and ran.out.endswith("\n")
    assert 20 < len(ran.out) <= len("7 green") + 40 + 1
    assert "47 tokens seen" in ran.err
    assert run(*argv).out == ran.out and run(*argv, "--seed", "1").out != ran.out
    greedy = [run(*argv, "--temperature", "0", "--seed", seed).out for seed in (0, 1)]
    assert greedy[0] == greedy[1]
    alone = run("generate", home / "run", "--max-new-tokens", "5")
    assert alone.code == 0 and len(alone.out) <= 6


def test_generate_continues_as_if_unsplit(home: Path, tmp_path: Path, run) -> None:
    """First two pieces of the chunk's length, then the rest in another call; then the writing."""
    (tmp_path / "a.txt").write_text(TEXT[:128])
    (tmp_path / "b.txt").write_text(TEXT[128:228])
    (tmp_path / "ab.txt").write_text(TEXT[:228])
    common = [home / "run", "--chunk", "64", "--temperature", "0.5"]
    saved = [tmp_path / f"{i}.state" for i in range(4)]
    only = ["--max-new-tokens", "0"]
    read = run(
        "generate", *common, "--prompt-file", tmp_path / "a.txt", *only, "--save-state", saved[0]
    )
    assert read.code == 0 and read.out == "" and "128 tokens seen" in read.err
    then = ["--load-state", saved[0], "--prompt-file", tmp_path / "b.txt", "--max-new-tokens", "8"]
    first = run("generate", *common, *then, "--save-state", saved[1])
    last = run(
        "generate",
        *common,
        "--load-state",
        saved[1],
        "--max-new-tokens",
        "9",
        "--save-state",
        saved[2],
    )
    whole = ["--prompt-file", tmp_path / "ab.txt", "--max-new-tokens", "17"]
    unsplit = run("generate", *common, *whole, "--save-state", saved[3])
    assert first.out[:-1] + last.out[:-1] == unsplit.out[:-1]
    assert "continuing after 128 tokens" in first.err
    split, straight = read_state_file(saved[2]), read_state_file(saved[3])
    assert split.tokens_hash == straight.tokens_hash and split.about == straight.about
    assert run("state", "diff", saved[2], saved[3]).code == 0
    assert run("state", "diff", saved[0], saved[3]).code == 1
    assert "228" not in run("state", "show", saved[0]).out


def test_size_is_measured(home: Path, tmp_path: Path, run) -> None:
    ran = run("size", home / "run", "--context", "2k", "--batch", "3", "--json")
    report = json.loads(ran.out)
    state = statewright.load(home / "run").init_state(3)
    assert report["state_bytes"] == state.nbytes and report["context"] == 2048
    assert [layer["bytes"] for layer in report["layers"]] == [s.nbytes for s in state.layers]
    assert report["transformer_bytes"] == 2 * 2 * 16 * 4 * 2048 * 3
    assert report["crossover_tokens"] * 2 * 2 * 16 * 4 * 3 >= state.nbytes
    path = tmp_path / "a.state"
    assert run("generate", home / "run", "--prompt", "x", "--save-state", path).code == 0
    alone = json.loads(run("size", home / "run", "--json").out)
    assert load_state(path).nbytes == alone["state_bytes"]
    table = run("size", home / "run", "--batch", "3")
    assert table.code == 0 and f"{state.layers[0].nbytes:,}" in table.out
    assert "VectorState" in table.out and "crossover" in table.out


def test_list_names_everything(run) -> None:
    from statewright.mixers import MIXERS
    from statewright.ops import VECTOR_BACKENDS

    ran = run("list")
    assert ran.code == 0 and ran.err == ""
    for name in (*MIXERS, *VECTOR_BACKENDS, "expansion=", "bytes", "characters"):
        assert name in ran.out


TEXTS = {
    "empty": (b"", "the file is empty"),
    "binary": (bytes(range(256)) * 40, "not UTF-8"),
    "nul": (b"abc\0" * 999, "binary"),
    "short": (b"too short", "fewer lanes"),
    "missing": (None, "no such file"),
}


@pytest.mark.parametrize("content, reason", TEXTS.values(), ids=TEXTS.keys())
def test_bad_texts(content: bytes | None, reason: str, tmp_path: Path, home: Path, run) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    ran = run("train", "--text", path, "--output-dir", tmp_path / "out", *TINY, *SHORT)
    assert_refused(ran, reason)
    assert not (tmp_path / "out").exists()
    if reason != "fewer lanes":
        assert_refused(run("generate", home / "run", "--prompt-file", path), reason)


OPTIONS = {
    "mixer": (["--mixer", "mingruu"], "did you mean 'mingru'?"),
    "mixer option": (["--mixer", "mingru:expansio=2"], "did you mean 'expansion'?"),
    "mixer type": (["--mixer", "mingru:expansion=wide"], "expected a number"),
    "mixer value": (["--mixer", "mingru:form=odd"], "'vanilla'"),
    "option": (["--hidden-sise", "8"], "--hidden-size"),
    "type": (["--num-steps", "many"], "not a count"),
    "choice": (["--schedule", "linear"], "'cosine'"),
    "range": (["--learning-rate", "-1"], "--learning-rate=-1.0, exp"),
    "zero": (["--num-lanes", "0"], ": --num-lanes=0"),
    "width": (["--hidden-size", "0"], "'--hidden-size': 0, expected at least 1"),
    "share": (["--valid-share", "1"], "valid-share"),
    "dropout": (["--dropout", "2"], "dropout"),
    "tokenizer": (["--tokenizer", "no-such"], "tokenizer"),
    "conv": (["--conv-kernel", "1"], "--conv-kernel=1"),
    "resume": (["--resume", "--text", __file__], "leave out"),
}


@pytest.mark.parametrize("argv, reason", OPTIONS.values(), ids=OPTIONS.keys())
def test_bad_options(argv: list[str], reason: str, home: Path, tmp_path: Path, run) -> None:
    out = tmp_path / "out"
    common = ["--text", home / "book.txt", "--output-dir", out, *TINY, *SHORT]
    assert_refused(run("train", *common, *argv), reason)
    assert not out.exists()


def test_runs_are_not_overwritten(home: Path, tmp_path: Path, run) -> None:
    before = fingerprint(home)
    argv = ["train", "--text", home / "book.txt", "--output-dir", home / "run", *TINY, *SHORT]
    assert_refused(run(*argv), "already holds a run", "--resume continues it")
    assert fingerprint(home) == before
    for nothing in (tmp_path, tmp_path / "none"):
        assert_refused(run("train", "--output-dir", nothing, "--resume"), "no checkpoint")
    assert_refused(run("train", "--output-dir", tmp_path / "new"), "--text")
    assert_refused(run("train", "--text", home / "book.txt"), "--output-dir")


def test_a_loss_that_explodes(home: Path, tmp_path: Path, run) -> None:
    argv = ["train", "--text", home / "book.txt", "--output-dir", tmp_path / "r", *TINY, *SHORT]
    ran = run(*argv, "--learning-rate", "1e30", "--num-warmup-steps", "0")
    assert ran.code == 1 and "Traceback" not in ran.err
    last = ran.err.splitlines()[-1]
    assert last.startswith("statewright: step ") and "lower the learning rate" in last
    assert run(*argv).code == 0


def damaged(home: Path, target: Path, damage: str) -> Path:
    if damage == "missing":
        return target / "nowhere"
    shutil.copytree(home / "run", target, dirs_exist_ok=True)
    name, _, how = damage.partition(" ")
    file = target / name
    content = file.read_bytes()
    if how == "gone":
        file.unlink()
    elif how == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        file.write_bytes(content[:9] + bytes([content[9] ^ 255]) + content[10:])
    else:
        file.write_text(how)
    return target


DAMAGES = [
    "missing", "model.safetensors cut", "model.safetensors flipped", "model.safetensors gone",
    "model.safetensors text", "config.json cut", "config.json gone", "config.json []",
    'config.json {"model_type": "llama"}', "tokenizer.json cut", "tokenizer.json gone",
    'config.json {"model_type": "statewright", "hidden_size": 24}',
    'config.json {"model_type": "statewright", "hidden_size": "wide"}',
    'config.json {"model_type": "statewright", "mixer": "nothing"}',
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_models(damage: str, home: Path, tmp_path: Path, run) -> None:
    target = damaged(home, tmp_path, damage)
    before = fingerprint(tmp_path)
    assert_refused(run("generate", target, "--prompt", "x"), str(target))
    if "tokenizer" not in damage and "llama" not in damage:
        assert_refused(run("size", target), str(target))
    assert fingerprint(tmp_path) == before


def test_bad_states(home: Path, tmp_path: Path, run) -> None:
    other, path = tmp_path / "other", tmp_path / "a.state"
    train = ["train", "--text", home / "book.txt", "--output-dir", other, *TINY, *SHORT]
    assert run(*train, "--seed", "5").code == 0
    assert run("generate", other, "--prompt", "x", "--save-state", path).code == 0
    before = fingerprint(tmp_path)
    common = ["generate", home / "run", "--load-state"]
    assert_refused(run(*common, path, "--save-state", path), "the state of another model")
    assert_refused(run(*common, other / "config.json"), "not a state file")
    assert_refused(run(*common, tmp_path / "none.state"), "no such file")
    assert_refused(run("generate", home / "run", "--chunk", "0"), "chunk")
    assert_refused(run("size", home / "run", "--batch", "0"), "batch")
    assert_refused(run("sise", home / "run"), "sise")
    assert fingerprint(tmp_path) == before
    unwritable = run("generate", home / "run", "--save-state", path / "b", "--prompt", "x")
    assert unwritable.code == 1 and "Traceback" not in unwritable.err


def test_no_arguments_show_the_help(run) -> None:
    ran, asked = run(), run("--help")
    assert asked.code == 0 and ran.out + ran.err == asked.out
