"""Resizing checkpoints on disk: streamed, atomic, the source untouched, every command as before."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from statewright import laws
from statewright.cli import main
from statewright.laws import Case, ModelSubject
from statewright.models import StatewrightConfig, StatewrightForCausalLM, load
from statewright.models.load import save_as
from statewright.models.resize import resize
from statewright.models.resize_file import plan_for, publish, resize_checkpoint
from statewright.models.tokenizers import byte_tokenizer

MAMBA2 = "mamba2:state_size=8:head_dim=16"


def save(path: Path, mixer: str | list[str] = MAMBA2, **options) -> StatewrightForCausalLM:
    values = dict(vocab_size=257, hidden_size=32, num_hidden_layers=3, mixer=mixer) | options
    model = StatewrightForCausalLM(StatewrightConfig(**values)).eval()
    model.save_pretrained(path, max_shard_size="40kB")
    byte_tokenizer().save_pretrained(path)
    return model


def digests(path: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(path.iterdir())}


def ids() -> torch.Tensor:
    return torch.randint(257, (2, 50), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mixer", [MAMBA2, "gla", "mamba:state_size=4", "mingru"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_file_equals_the_model(tmp_path: Path, mixer: str, tied: bool) -> None:
    """Streamed from shards to shards, and the source's bytes are never changed."""
    base = save(tmp_path / "base", mixer, tie_word_embeddings=tied)
    before = digests(tmp_path / "base")
    assert (tmp_path / "base" / "model.safetensors.index.json").exists()
    for max_shard, files in ((10**9, 1), (60_000, 3)):
        target = tmp_path / f"bigger{files}"
        plan = plan_for(tmp_path / "base", key="2x", layers="0,2", init="zero")
        resize_checkpoint(tmp_path / "base", target, plan, seed=3, max_shard=max_shard)
        shards = sorted(target.glob("*.safetensors"))
        assert len(shards) >= files and (len(shards) == 1) == (files == 1)
        want = resize(base, 2.0, "0,2", "zero", seed=3).state_dict()
        read = [load_file(shard) for shard in shards]
        got = {name: tensor for tensors in read for name, tensor in tensors.items()}
        assert got.keys() == want.keys() - ({"lm_head.weight"} if tied else set())
        assert all(torch.equal(tensor, want[name]) for name, tensor in got.items())
        loaded = load(target)
        assert laws.error(loaded(ids()).logits, base(ids()).logits) < 1e-6
        assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert digests(tmp_path / "base") == before


_FRESH = """
import sys, torch
from statewright import Session, laws
from statewright.laws import Case, ModelSubject
from statewright.models import load
model = load(sys.argv[1])
session = Session.load(sys.argv[2], model)
torch.save(session.feed(torch.load(sys.argv[3])), sys.argv[4])
model = model.double()
cases = [Case(batch=2, length=21, splits=(4, 4, 9), flags=f) for f in (False, True)]
found = [law(ModelSubject(model), case) for law in laws.LAWS.values() for case in cases]
assert all(f.ok for f in found), found
"""


def test_a_fresh_process_loads_it_and_keeps_the_laws(tmp_path: Path) -> None:
    """Resize, save, load in a new process, continue a state file there: bit-identical."""
    from statewright import Session

    save(tmp_path / "base", [MAMBA2, "gla"], num_hidden_layers=3)
    plan = plan_for(tmp_path / "base", key="2x", layers="every:2", init="fresh")
    resize_checkpoint(tmp_path / "base", tmp_path / "bigger", plan)
    session = Session(load(tmp_path / "bigger"))
    session.feed(ids()[:1])
    session.save(tmp_path / "book.state")
    more = ids()[1:]
    torch.save(more, tmp_path / "more.pt")
    want = session.feed(more)
    paths = [str(tmp_path / n) for n in ("bigger", "book.state", "more.pt", "logits.pt")]
    done = subprocess.run([sys.executable, "-c", _FRESH, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    got = torch.load(tmp_path / "logits.pt")
    assert torch.equal(got, want)


def test_other_libraries_formats(tmp_path: Path, capsys) -> None:
    """From transformers' and fla's layouts; back only where sizes are the same in all layers."""
    bare = dict(conv_kernel=0, mlp_ratio=0.0, norm_eps=1e-5)
    swiglu = dict(conv_kernel=0, mlp="swiglu", mlp_size=64, norm_eps=1e-5)
    for mixer, target, init, key, options in (
        (MAMBA2, "hf", "zero", "2x", bare),
        ("gla:num_heads=4:conv_kernel=4", "fla", "inherit", "all", swiglu),
    ):
        model = save(tmp_path / f"{target}-ours", mixer, **options)
        save_as(model, target, tmp_path / target)
        for layers, said in (("all", None), ("every:2", "layers differ")):
            out = tmp_path / f"{target}-{said is None}"
            argv = ["--key", key, "--layers", layers, "--init", init, "--output-dir", str(out)]
            assert main(["resize", str(tmp_path / target), *argv]) == 0
            if init == "zero":
                assert laws.error(load(out)(ids()).logits, model(ids()).logits) < 1e-6
            back = tmp_path / f"{target}-{said is None}-back"
            code = main(["convert", str(out), "--to", target, "--output-dir", str(back)])
            assert code == (0 if said is None else 1)
            if said is None:
                assert torch.equal(load(back)(ids()).logits, load(out)(ids()).logits)
            else:
                assert said in capsys.readouterr().err


def test_dry_run_needs_a_config_alone(tmp_path: Path, capsys) -> None:
    """X4 from the command line: eight layers of Mamba-2 1.3B, nothing written."""
    config = StatewrightConfig(
        vocab_size=50288, hidden_size=2048, num_hidden_layers=48, mixer="mamba2",
        conv_kernel=0, mlp_ratio=0.0, tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "base")
    assert main(["resize", str(tmp_path / "base"), "--dry-run"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "layers 0, 6, 12, 18, 24, 30, 36, 42 -> mamba2:state_size=512, init zero" in text
    assert "+12,613,632" in text and "+0.94%" in text and "1.49 x" in text
    assert main(["resize", str(tmp_path / "base"), "--dry-run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["parameters"][1] - report["parameters"][0] == 8 * 1_576_704
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_shrink_on_a_text(tmp_path: Path, capsys) -> None:
    model = save(tmp_path / "base")
    text = tmp_path / "book.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 40)
    argv = ["--key", "0.5x", "--layers", "all", "--text", str(text), "--length", "64", "--json"]
    out = str(tmp_path / "smaller")
    assert main(["resize", str(tmp_path / "base"), *argv, "--output-dir", out]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["init"] == "energy" and report["nats"][0] != report["nats"][1]
    small = load(out)
    assert small.config.mixer == "mamba2:state_size=4:head_dim=16"
    assert small.init_state(1).nbytes < model.init_state(1).nbytes
    assert byte_tokenizer().get_vocab() == _tokenizer(out).get_vocab()
    length, rows = (["--length", "1"], "expected at least 2"), (["--rows", "99"], "64 need more")
    for code, (bad, said) in ((2, length), (1, rows)):
        again = [*argv, *bad, "--output-dir", str(tmp_path / "no")]
        assert main(["resize", str(tmp_path / "base"), *again]) == code
        assert said in capsys.readouterr().err and not (tmp_path / "no").exists()
    assert main(["resize", str(tmp_path / "base"), "--key", "0.5x", "--output-dir", out + "2"]) == 2
    assert "--text" in capsys.readouterr().err


def _tokenizer(path: str):
    from statewright.models.tokenizers import saved_tokenizer

    return saved_tokenizer(path)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--layers", "7"], "the model has 3 layers, 0 to 2"),
        (["--key", "1.3x"], "expected a whole number from 1 on"),
        (["--init", "inherit"], "expected one of zero, fresh, as-released, copy, zero-zero"),
        (["--key", "wide"], "expected a factor such as 4x or 0.5x"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, capsys, argv: list[str], said: str) -> None:
    save(tmp_path / "base")
    out = tmp_path / "out"
    assert main(["resize", str(tmp_path / "base"), *argv, "--output-dir", str(out)]) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not out.exists()


def test_damage_is_refused_and_leaves_nothing(tmp_path: Path, capsys) -> None:
    save(tmp_path / "base")
    base, out = tmp_path / "base", tmp_path / "out"
    shard = sorted(base.glob("*.safetensors"))[-1]
    whole = shard.read_bytes()
    damages = {
        "reaches beyond its end": whole[:-1],
        "no header": b"\xff" * 64,
        "damaged or of an unknown dtype": whole.replace(b'"F32"', b'"X99"', 1),
    }
    for said, data in damages.items():
        shard.write_bytes(data)
        assert main(["resize", str(base), "--output-dir", str(out)]) == 1
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    shard.unlink()
    assert main(["resize", str(base), "--output-dir", str(out)]) == 1
    assert "a shard of the checkpoint is missing" in capsys.readouterr().err
    shard.write_bytes(whole)
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    assert main(["resize", str(base), "--output-dir", str(out)]) == 1
    assert "not empty" in capsys.readouterr().err and (out / "mine.txt").read_text() == "keep"
    assert main(["resize", str(base)]) == 2

    def fails(at: Path) -> None:
        (at / "half").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        publish(tmp_path / "never", fails)
    assert {p.name for p in tmp_path.iterdir()} == {"base", "out"}


_PEAK = """
import resource, sys
from pathlib import Path
from statewright.models.resize_file import plan_for, resize_checkpoint
source = Path(sys.argv[1])
plan = plan_for(source, key="4x", layers="every:2", init="zero")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
resize_checkpoint(source, Path(sys.argv[2]), plan)
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def test_peak_memory_is_a_layer(tmp_path: Path) -> None:
    """A checkpoint in three shards: what is resident grows by less than a shard and a layer."""
    config = StatewrightConfig(
        vocab_size=257, hidden_size=512, num_hidden_layers=9, mixer="mamba2", conv_kernel=0,
        mlp_ratio=0.0,
    )  # fmt: skip
    with torch.device("meta"):
        model = StatewrightForCausalLM(config)
    model.to_empty(device="cpu").save_pretrained(tmp_path / "base", max_shard_size="25MB")
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    total = sum(p.nbytes for p in model.parameters())
    shards = sorted((tmp_path / "base").glob("*.safetensors"))
    assert len(shards) >= 3 and total > 60e6
    del model
    argv = [sys.executable, "-c", _PEAK, str(tmp_path / "base"), str(tmp_path / "bigger")]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, shard = int(done.stdout), max(s.stat().st_size for s in shards)
    assert peak <= shard + layer, (peak / 1e6, shard / 1e6, layer / 1e6)
    assert peak <= 4 * layer


def test_laws_hold_on_disk_sizes(tmp_path: Path) -> None:
    """`check` needs nothing new: per-layer sizes are in the config."""
    save(tmp_path / "base", ["gla", MAMBA2])
    out = tmp_path / "bigger"
    argv = ["--key", "2x", "--layers", "first:1", "--output-dir", str(out)]
    assert main(["resize", str(tmp_path / "base"), *argv]) == 0
    assert main(["check", str(out)]) == 0
    found = laws.check(ModelSubject(load(out).double()), Case(batch=2, length=17), ["fold"])
    assert found[0].ok


@pytest.mark.parametrize(("mixer", "init"), [("mamba2", "zero"), ("gla", "inherit")])
def test_the_benchmark_compares_like_with_like(mixer: str, init: str) -> None:
    from statewright.bench import resize as bench

    case = bench.prefill(mixer, init, 2, 70)
    case.check()
    for method in case.methods.values():
        method()
    shown = float(case.name.rpartition(" ")[2])
    assert 1.0 < shown < 1.6


@pytest.mark.slow
def test_the_example_runs_and_goes_on(tmp_path: Path) -> None:
    """A smoke run of every arm; the second call finds everything done."""
    from pydoc_data.topics import topics

    text = tmp_path / "book.txt"
    text.write_text("\n".join(topics.values()))
    script = Path(__file__).parents[1] / "examples" / "statex.py"
    argv = [sys.executable, str(script), "--text", str(text), "--quick", "--seeds", "1"]
    argv += ["--json", str(tmp_path / "r.json"), "--markdown", str(tmp_path / "r.md")]
    for _ in range(2):
        done = subprocess.run(argv, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert len(results) == 14 and done.stdout.count("{") == 0
    for result in results:
        if result["arm"].startswith("zero"):
            base = next(r for r in results if (r["family"], r["arm"]) == (result["family"], "base"))
            assert result["start"] == pytest.approx(base["scores"], abs=1e-4)
    assert "| gla | zero-all |" in (tmp_path / "r.md").read_text()
