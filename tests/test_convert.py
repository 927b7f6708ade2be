"""Checkpoints of other libraries: equal logits in, equal files out, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from statewright.cli import main
from statewright.models import StatewrightConfig, StatewrightForCausalLM, load
from statewright.models.load import save_as

SIZES = dict(vocab_size=64, hidden_size=32, num_hidden_layers=3)


def mamba2(**options) -> Mamba2ForCausalLM:
    sizes = dict(state_size=16, head_dim=8, num_heads=8, n_groups=2)
    return Mamba2ForCausalLM(Mamba2Config(**{**SIZES, **sizes, **options}))


def mamba(**options) -> MambaForCausalLM:
    return MambaForCausalLM(MambaConfig(**{**SIZES, "state_size": 8, **options}))


def saved(model, directory: Path) -> Path:
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # biases and norms start equal: a swap would not show
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.eval().save_pretrained(directory)
    return directory


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    assert (got - want).abs().max() <= tolerance * want.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("make", [mamba2, mamba])
@pytest.mark.parametrize("tie", [False, True])
def test_logits_of_transformers(make, tie: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = make(tie_word_embeddings=tie)
    ours = load(saved(theirs, tmp_path))
    ids = torch.randint(64, (2, 70))
    want = theirs(ids).logits
    out = ours(ids[:, :41])
    rest = ours(ids[:, 41:], state=out.state)
    close(torch.cat([out.logits, rest.logits], 1), want, 1e-5)
    save_as(ours, "hf", tmp_path / "back")
    back = type(theirs).from_pretrained(tmp_path / "back").eval()
    assert torch.equal(back(ids).logits, want)


@torch.no_grad()
@pytest.mark.parametrize("options", [dict(use_bias=True), dict(time_step_limit=(0.0, 0.02))])
def test_options_of_mamba2(options: dict, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = mamba2(**options)
    ids = torch.randint(64, (2, 20))
    close(load(saved(theirs, tmp_path))(ids).logits, theirs(ids).logits, 1e-5)


@torch.no_grad()
def test_original_names_and_config(tmp_path: Path) -> None:
    """state-spaces: another config.json, `backbone.embedding`, and pickled weights."""
    torch.manual_seed(0)
    theirs = mamba2(n_groups=1, tie_word_embeddings=True, hidden_size=32, vocab_size=64)
    saved(theirs, tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors = {n.replace(".embeddings.", ".embedding."): t for n, t in tensors.items()}
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    old = tmp_path / "old"
    old.mkdir()
    torch.save(tensors, old / "pytorch_model.bin")
    ssm = {"layer": "Mamba2", "d_state": 16, "headdim": 8}
    config = {"d_model": 32, "n_layer": 3, "vocab_size": 60, "ssm_cfg": ssm}
    config |= {"pad_vocab_size_multiple": 16, "tie_embeddings": True, "rms_norm": True}
    (old / "config.json").write_text(json.dumps(config))
    ids = torch.randint(60, (2, 20))
    close(load(old)(ids).logits, theirs(ids).logits, 1e-5)


def gla_oracle(w: dict, config: dict, ids: torch.Tensor) -> torch.Tensor:
    """fla's GLA written down from its equations and key names, one token at a time."""
    x, H = w["model.embeddings.weight"][ids], config["num_heads"]
    eps = config["norm_eps"]

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[name]

    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}.attn."
        y = norm(x, f"model.layers.{i}.attn_norm.weight")
        q, k, v, g = (y @ w[f"{p}{n}_proj.weight"].T for n in "qkvg")
        if config["use_short_conv"]:
            convs = []
            for n, t in zip("qkv", (q, k, v)):
                t = F.pad(t, (0, 0, 3, 0)).unfold(1, 4, 1)
                convs.append(F.silu((t * w[f"{p}{n}_conv1d.weight"][:, 0]).sum(-1)))
            q, k, v = convs
        gk = y @ w[f"{p}gk_proj.0.weight"].T @ w[f"{p}gk_proj.1.weight"].T
        gk = F.logsigmoid(gk + w[f"{p}gk_proj.1.bias"]) / 16
        q, k, v, gk = (t.unflatten(-1, (H, -1)) for t in (q, k, v, gk))
        S, outputs = 0, []
        for t in range(ids.shape[1]):
            S = gk[:, t].exp().unsqueeze(-1) * S + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
            outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * q.shape[-1] ** -0.5, S))
        name = "g_norm_swish_gate" if f"{p}g_norm_swish_gate.weight" in w else "g_norm"
        o = norm(torch.stack(outputs, 1), f"{p}{name}.weight").flatten(2) * F.silu(g)
        x = x + o @ w[f"{p}o_proj.weight"].T
        y = norm(x, f"model.layers.{i}.mlp_norm.weight")
        m = f"model.layers.{i}.mlp."
        y = F.silu(y @ w[f"{m}gate_proj.weight"].T) * (y @ w[f"{m}up_proj.weight"].T)
        x = x + y @ w[f"{m}down_proj.weight"].T
    return norm(x, "model.norm.weight") @ w["lm_head.weight"].T


def write_gla(directory: Path, short_conv: bool, gate_name: str) -> tuple[dict, dict]:
    """A random checkpoint with fla's keys; D = 12, two heads, K_tot = 6, V_tot = 12."""
    torch.manual_seed(0)
    D, K, V, inner = 12, 6, 12, 256
    w = {"model.embeddings.weight": torch.randn(30, D), "model.norm.weight": torch.rand(D) + 0.5}
    w["lm_head.weight"] = torch.randn(30, D) / 4
    for i in range(2):
        p = f"model.layers.{i}."
        for name, size in (("attn_norm", D), ("mlp_norm", D), (f"attn.{gate_name}", V // 2)):
            w[f"{p}{name}.weight"] = torch.rand(size) + 0.5
        shapes = {"q": (K, D), "k": (K, D), "v": (V, D), "g": (V, D), "o": (D, V)}
        for name, shape in shapes.items():
            w[f"{p}attn.{name}_proj.weight"] = torch.randn(shape) / 3
        w[f"{p}attn.gk_proj.0.weight"] = torch.randn(16, D) / 3
        w[f"{p}attn.gk_proj.1.weight"] = torch.randn(K, 16)
        w[f"{p}attn.gk_proj.1.bias"] = torch.randn(K)
        for name, shape in (("gate", (inner, D)), ("up", (inner, D)), ("down", (D, inner))):
            w[f"{p}mlp.{name}_proj.weight"] = torch.randn(shape) / 8
        if short_conv:
            for name, size in (("q", K), ("k", K), ("v", V)):
                w[f"{p}attn.{name}_conv1d.weight"] = torch.randn(size, 1, 4)
    config = dict(model_type="gla", hidden_size=D, num_hidden_layers=2, num_heads=2)
    config |= dict(vocab_size=30, expand_k=0.5, expand_v=1, hidden_ratio=4, norm_eps=1e-6)
    config |= dict(use_short_conv=short_conv, conv_size=4, hidden_act="swish", feature_map=None)
    config |= dict(use_output_gate=True, attn=None, tie_word_embeddings=False)
    directory.mkdir(parents=True)
    save_file(w, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return w, config


@torch.no_grad()
@pytest.mark.parametrize("gate_name", ["g_norm_swish_gate", "g_norm"])
@pytest.mark.parametrize("short_conv", [False, True])
def test_gla_of_fla(short_conv: bool, gate_name: str, tmp_path: Path) -> None:
    w, config = write_gla(tmp_path / "a", short_conv, gate_name)
    ids = torch.randint(30, (2, 37))
    model = load(tmp_path / "a", dtype=torch.float64)
    want = gla_oracle({n: t.double() for n, t in w.items()}, config, ids)
    close(model(ids).logits, want, 1e-10)
    save_as(load(tmp_path / "a"), "fla", tmp_path / "b")
    back = load_file(tmp_path / "b" / "model.safetensors")
    same = {n.replace("attn.g_norm.", "attn.g_norm_swish_gate."): t for n, t in w.items()}
    assert back.keys() == same.keys() and all(torch.equal(back[n], same[n]) for n in back)
    close(load(tmp_path / "b", dtype=torch.float64)(ids).logits, want, 1e-10)


def edited(path: Path, **changes) -> Path:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    return path


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model_type="rwkv"), "'rwkv' is not supported"),
        (dict(num_heads=4), "num_heads=4 x head_dim=8"),
        (dict(hidden_act="gelu"), "hidden_act='gelu'"),
        (dict(state_size=32), "expected .* from the config"),
        (dict(num_hidden_layers=4), "missing weights"),
        (dict(num_hidden_layers=2), "unexpected weights"),
        (dict(hidden_size=None), "lacks hidden_size"),
    ],
)
def test_refused_configs(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load(edited(saved(mamba2(), tmp_path), **changes))


def test_refused_weights(tmp_path: Path) -> None:
    file = saved(mamba2(), tmp_path) / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "backbone.norm_f.weight": torch.ones(32).half()}, file)
    with pytest.raises(ValueError, match="mixed dtypes"):
        load(tmp_path)
    assert load(tmp_path, dtype="float64").dtype == torch.float64
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="damaged"):
        load(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="no weights"):
        load(tmp_path)


def test_what_a_format_cannot_express(tmp_path: Path) -> None:
    specs = ["mamba2:state_size=8:head_dim=8", "mamba2:state_size=16:head_dim=8"]
    options = dict(**SIZES, conv_kernel=0, mlp_ratio=0.0, norm_eps=1e-5)
    for config, target, message in (
        (StatewrightConfig(**options, mixer=specs), "hf", "layers differ"),
        (StatewrightConfig(**options, mixer="mingru"), "hf", "no format for 'mingru'"),
        (StatewrightConfig(**options, mixer=specs[0]), "fla", "no format for 'mamba2'"),
        (StatewrightConfig(**{**options, "conv_kernel": 4}, mixer=specs[0]), "hf", "conv_kernel"),
    ):
        with pytest.raises(ValueError, match=message):
            save_as(StatewrightForCausalLM(config), target, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    saved(mamba2(), tmp_path / "a")
    command = ["convert", str(tmp_path / "a"), "--to"]
    assert main([*command, "statewright", "--output-dir", str(tmp_path / "b")]) == 0
    assert (
        main(["convert", str(tmp_path / "b"), "--to", "hf", "--output-dir", str(tmp_path / "c")])
        == 0
    )
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in "ac")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    capsys.readouterr()
    assert main([*command, "fla", "--output-dir", str(tmp_path / "d")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow
@torch.no_grad()
def test_shape_of_130m(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=50288, hidden_size=768, num_hidden_layers=24, state_size=128, n_groups=1,
        num_heads=24, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    theirs = Mamba2ForCausalLM(config)
    ids = torch.randint(50000, (1, 300))
    ours = load(saved(theirs, tmp_path))
    found, want = ours(ids).logits.double(), theirs(ids).logits.double()
    exact = ours.double()(ids).logits
    close(found, exact, 5e-5)
    # transformers' own rounding: 2.5e-4 on an AMD EPYC.
    close(want, exact, 5e-4)
