"""Resize in memory: what each construction keeps, costs, and can or cannot learn."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from statewright import laws
from statewright.laws import Case, ModelSubject
from statewright.mixers import build_mixer
from statewright.models import StatewrightConfig, StatewrightForCausalLM
from statewright.models.resize import resize
from statewright.ops.ref import matrix_scan

GROWABLE = [
    "mamba2:state_size=16:head_dim=16",
    "mamba2:state_size=4:head_dim=8:num_groups=2:bias=true:conv_bias=false",
    "mamba:state_size=4",
    "gla:num_heads=4",
    "mingru",
    "mingru:expansion=2:bias=false:learned_init=false",
    "minlstm:form=vanilla",
]
MAMBA2 = GROWABLE[0]


def model(mixer: str | list[str], layers: int = 3, width: int = 64) -> StatewrightForCausalLM:
    config = StatewrightConfig(
        vocab_size=97, hidden_size=width, num_hidden_layers=layers, mixer=mixer
    )
    return StatewrightForCausalLM(config).double().eval()


def ids(rows: int = 2, length: int = 70, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(97, (rows, length), generator=generator)


def loss_of(net: StatewrightForCausalLM) -> Tensor:
    return net(ids(), labels=ids()).loss


def changed(before: StatewrightForCausalLM, after: StatewrightForCausalLM) -> set[str]:
    old, new = before.state_dict(), after.state_dict()
    assert old.keys() <= new.keys()
    same = {n for n in old if new[n].shape == old[n].shape and torch.equal(new[n], old[n])}
    return set(new) - same


@pytest.mark.parametrize("mixer", GROWABLE)
def test_zero_preserves_logits_and_learns(mixer: str) -> None:
    """X6: at the start the readers of what is new get gradients; after a step all of it does."""
    base = model(mixer)
    before = {n: t.clone() for n, t in base.state_dict().items()}
    grown = resize(base, 4.0, "every:2", "zero")
    assert all(torch.equal(t, before[n]) for n, t in base.state_dict().items())
    assert laws.error(grown(ids()).logits, base(ids()).logits) < 1e-13
    assert grown.config.mixer_of(1) == base.config.mixer_of(1) or mixer != grown.config.mixer[1]
    reader, writer = grown.train(), _new_parts(base, grown)
    optimizer = torch.optim.SGD(reader.parameters(), lr=0.5)
    loss_of(reader).backward()
    first = {name: part().grad_norm for name, part in writer.items()}
    optimizer.step()
    optimizer.zero_grad()
    loss_of(reader).backward()
    second = {name: part().grad_norm for name, part in writer.items()}
    assert first["reads"] > 0 and first["writes"] == 0
    assert second["reads"] > 0 and second["writes"] > 0


class _Part:
    def __init__(self, parameter: Tensor, at: Tensor) -> None:
        self.grad_norm = float(parameter.grad[at].norm())


def _new_parts(base, grown):
    """Where layer 0 holds what is new: the rows that write to the state and those that read it."""
    old, new = base.model.layers[0].mixer, grown.model.layers[0].mixer
    kind = type(new).__name__
    if kind == "Mamba2":
        G, K, k = new.num_groups, new.key_size, old.key_size
        fresh = (torch.arange(G * K) % K >= k).nonzero().flatten()
        begin = 2 * new.inner_size
        rows = {"writes": begin + fresh, "reads": begin + G * K + fresh}
        return {n: lambda r=r: _Part(new.in_proj.weight, r) for n, r in rows.items()}
    if kind == "Mamba":
        fresh = new.dt_rank + torch.arange(old.key_size, new.key_size)
        rows = {"writes": fresh, "reads": fresh + new.key_size}
        return {n: lambda r=r: _Part(new.x_proj.weight, r) for n, r in rows.items()}
    if kind == "GLA":
        fresh = (torch.arange(new.keys) % new.key_size >= old.key_size).nonzero().flatten()
        parts = {"writes": new.k_proj.weight, "reads": new.q_proj.weight}
        return {n: lambda p=p: _Part(p, fresh) for n, p in parts.items()}
    fresh = torch.arange(old.inner_size, new.inner_size)
    return {
        "writes": lambda: _Part(new.in_proj.weight, fresh),
        "reads": lambda: type(
            "P", (), {"grad_norm": float(new.out_proj.weight.grad[:, fresh].norm())}
        ),
    }


def test_negative_controls_never_learn() -> None:
    """X7: copies stay copies and double zeros stay zero through 50 AdamW steps; zero does not."""
    base = model(MAMBA2, layers=1, width=32)
    k, K, inner = 16, 64, 64

    def rows(net: StatewrightForCausalLM) -> tuple[Tensor, Tensor]:
        weight = net.model.layers[0].mixer.in_proj.weight
        return weight[2 * inner : 2 * inner + K], weight[2 * inner + K : 2 * inner + 2 * K]

    moved = {}
    for init in ("copy", "zero-zero", "zero"):
        net = resize(base, 4.0, "all", init).train()
        start = [t.detach().clone() for t in rows(net)]
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        for _ in range(50):
            optimizer.zero_grad()
            loss_of(net).backward()
            optimizer.step()
        B, C = rows(net)
        moved[init] = min((t[k:] - s[k:]).abs().max().item() for t, s in zip((B, C), start))
        if init == "copy":
            for part in (B, C):
                copies = part.unflatten(0, (4, k))
                # Identical gradients, up to the order in which a product sums its terms.
                assert (copies - copies[:1]).abs().max() < 1e-9
        if init == "zero-zero":
            assert not B[k:].any() and not C[k:].any()
    assert moved["zero"] > 1e-2 and moved["copy"] > 1e-2 and moved["zero-zero"] == 0


def test_merged_heads_hold_the_old_states() -> None:
    """X2: the old states are the diagonal blocks; sqrt(H) x merged output = old + cross terms."""
    torch.manual_seed(1)
    old = build_mixer("gla:num_heads=4", 64).double()
    merged = build_mixer("gla:num_heads=1", 64).double()
    merged.inherit(old, "inherit")
    x = torch.randn(2, 40, 64, dtype=torch.float64)

    def run(mixer):
        q, k, v, log_a = mixer.gates(*mixer.project(x))
        return (q, k, v, log_a), *matrix_scan(q, k, v, log_a, mixer.init_state(2).S)

    (_, k, v, log_a), o, S = run(old)
    (q1, *_), o1, S1 = run(merged)
    blocks = S1[:, 0].unflatten(1, (4, 8)).unflatten(3, (4, 16))
    cross = torch.zeros_like(o)
    for h in range(4):
        assert torch.equal(blocks[:, h, :, h], S[:, h])
        for g in set(range(4)) - {h}:
            q_g = q1.squeeze(2).unflatten(-1, (4, 8))[:, :, g].unsqueeze(2)
            one = [k[:, :, g : g + 1], v[:, :, h : h + 1], log_a[:, :, g : g + 1]]
            cross[:, :, h] += matrix_scan(q_g, *one, S[:, :1] * 0)[0].squeeze(2)
    want = o + 2 * cross
    assert laws.error(2 * o1.squeeze(2).unflatten(-1, (4, 16)), want) < 1e-12
    assert laws.error(2 * o1.squeeze(2).unflatten(-1, (4, 16)), o) > 0.1
    assert torch.equal(merged.g_norm.weight, old.g_norm.weight.repeat(4))


def test_only_the_documented_tensors_change() -> None:
    """X5: bit-identical but for the listed names, in the touched layers alone."""
    wide = {"in_proj.weight", "conv.weight", "conv.bias"}
    released = wide | {"dt_bias", "A_log", "norm.weight"}
    gla = [f"{n}.weight" for n in ("q_proj", "k_proj", "v_proj", "g_proj", "o_proj", "g_norm")]
    gla += ["gk_proj.0.weight", "gk_proj.1.weight", "gk_proj.1.bias"]
    table = [
        (MAMBA2, "zero", wide),
        (MAMBA2, "fresh", wide),
        (MAMBA2, "as-released", released),
        (MAMBA2, "copy", wide),
        ("mamba:state_size=4", "zero", {"x_proj.weight", "A_log"}),
        ("gla", "inherit", {"g_norm.weight"}),
        ("gla", "zero", {"q_proj.weight", "k_proj.weight", "gk_proj.1.weight", "gk_proj.1.bias"}),
        ("gla", "fresh", set(gla)),
        ("mingru", "zero", {"in_proj.weight", "in_proj.bias", "init_param", "out_proj.weight",
                            "out_proj.bias"}),
    ]  # fmt: skip
    for mixer, init, names in table:
        base = model(mixer)
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.add_(torch.rand_like(parameter) + 0.5)
        grown = resize(base, 4.0, [0, 2], init)
        wanted = {f"model.layers.{i}.mixer.{n}" for i in (0, 2) for n in names}
        if (mixer, init) == ("gla", "fresh"):
            wanted |= {f"model.layers.{i}.norm.weight" for i in (0, 2)}
            assert (grown.model.layers[0].norm.weight == 1).all()
        assert changed(base, grown) == wanted, (mixer, init)


def test_old_rows_stay_where_they_belong() -> None:
    """Two groups: the old B and C of each lie first in their group; the rest is as it was."""
    base = model("mamba2:state_size=4:head_dim=8:num_groups=2", layers=1)
    old = base.model.layers[0].mixer
    new = resize(base, 2.0, "all", "zero").model.layers[0].mixer
    inner = old.inner_size
    for begin, name in ((2 * inner, "B"), (2 * inner + 8, "C")):
        mine = new.in_proj.weight[begin if name == "B" else begin + 8 :][:16].unflatten(0, (2, 8))
        its = old.in_proj.weight[begin:][:8].unflatten(0, (2, 4))
        assert torch.equal(mine[:, :4], its)
        assert bool(mine[:, 4:].any()) == (name == "B")
    assert torch.equal(new.in_proj.weight[-old.num_heads :], old.in_proj.weight[-old.num_heads :])
    assert torch.equal(new.in_proj.weight[: 2 * inner], old.in_proj.weight[: 2 * inner])


@pytest.mark.parametrize("init", ["zero", "fresh", "as-released"])
def test_initial_decays(init: str) -> None:
    """X9: an expanded layer remembers as the original did, except in the authors' release."""
    base = model(MAMBA2, layers=1)
    with torch.no_grad():
        base.model.layers[0].mixer.dt_bias.fill_(-4)
    alphas = []
    for net in (base, resize(base, 4.0, "all", init)):
        mixer = net.model.layers[0].mixer
        x = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(3)).double()
        u, rest = mixer.project(x)
        u = F.silu(mixer.conv(u, mixer.conv.init_taps(2))[0])
        alphas.append(mixer.gates(u, rest)[3].exp())
    sane = alphas[1].median() >= 0.85 and torch.equal(*alphas)
    assert sane == (init != "as-released")
    gla = build_mixer("gla:num_heads=1", 64).double()
    decay = gla.gates(*gla.project(torch.randn(2, 50, 64).double()))[3].exp()
    assert decay.median() >= 0.9


@pytest.mark.parametrize("mixer", [*GROWABLE, ["gla", MAMBA2, "mingru:expansion=2"]])
@pytest.mark.parametrize("law", list(laws.LAWS))
def test_resized_models_keep_the_laws(mixer: str | list[str], law: str) -> None:
    """X8: sizes that differ between layers; prefill equals steps, and every other law."""
    grown = resize(model(mixer), 2.0, [0, 2], "fresh")
    finding = laws.LAWS[law](ModelSubject(grown), Case(batch=2, length=33, splits=(5, 5, 20)))
    assert finding.ok, finding


@pytest.mark.parametrize("mixer", [*GROWABLE[:4], "mingru:expansion=3", "minlstm:expansion=3"])
def test_shrinking_finds_what_growing_added(mixer: str) -> None:
    """Keys that are never read have no energy: growing by zero and shrinking is the identity."""
    base = model(mixer)
    grown = resize(base, 4.0, "every:2", "zero")
    back = resize(grown, "0.25x", "every:2", calibration=ids())
    assert laws.error(back(ids()).logits, base(ids()).logits) < 1e-13
    assert back.init_state(1).nbytes == base.init_state(1).nbytes
    half = resize(base, 0.5, "every:2", calibration=ids())
    assert laws.error(half(ids()).logits, base(ids()).logits) > 0
    worst = _least_energy(base, "every:2")
    with torch.no_grad():
        best, least = ((net(ids()).logits - base(ids()).logits).norm() for net in (half, worst))
    assert best < least


def _least_energy(base: StatewrightForCausalLM, layers: str) -> StatewrightForCausalLM:
    """As a shrink, but it keeps the keys with least energy."""
    turned = copy.deepcopy(base)
    for block in turned.model.layers:
        energy = block.mixer.energy
        block.mixer.energy = lambda x, part, energy=energy: -energy(x, part)
    return resize(turned, 0.5, layers, calibration=ids())


@pytest.mark.parametrize("mixer", ["gla:num_heads=4", "gla:num_heads=4:conv_kernel=4"])
def test_heads_that_add_nothing_can_go(mixer: str) -> None:
    """Two heads whose outputs are not read are found and left out: the function stays."""
    base = model(mixer)
    with torch.no_grad():
        for block in base.model.layers:
            block.mixer.o_proj.weight[:, 16:32] = 0
            block.mixer.o_proj.weight[:, 48:] = 0
    half = resize(base, heads="0.5x", layers="every:2", calibration=ids())
    changes = {"num_heads=2", "expand_k=0.25", "expand_v=0.5"}
    assert changes <= set(half.config.mixer_of(0).split(":"))
    assert laws.error(half(ids()).logits, base(ids()).logits) < 1e-13
    quarter = resize(base, heads=0.25, layers="all", calibration=ids())
    assert laws.error(quarter(ids()).logits, base(ids()).logits) > 1e-3


def test_seeds_and_dtypes() -> None:
    base = model(MAMBA2).float()
    first, again, other = (resize(base, 4.0, "all", "fresh", seed=s) for s in (0, 0, 1))
    assert not changed(first, again) and changed(first, other)
    half = resize(base.bfloat16(), 2.0, "all", "zero")
    assert half.dtype == torch.bfloat16
    assert torch.equal(half(ids()).logits, base(ids()).logits)
