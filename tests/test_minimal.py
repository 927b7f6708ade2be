"""minGRU and minLSTM against the equations of arXiv:2410.01201, written out here once more."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statewright import ops
from statewright.mixers import GRU, LSTM, CausalConv, MinGRU, MinLSTM, build_mixer
from statewright.mixers.mingru import g, log_g
from statewright.models import StatewrightConfig, StatewrightForCausalLM
from statewright.models.block import Block
from statewright.ops.log_space import log_space_scan

F32, F64 = torch.float32, torch.float64
D = 6
CELLS = ["mingru", "minlstm", "minlstm:normalize=false"]
FORMS = [f"{cell}:form={form}" for cell in CELLS for form in ("log", "vanilla")]


def built(text: str, dtype: torch.dtype = F64, size: int = D):
    return build_mixer(text, size).to(dtype)


def by_the_paper(mixer, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(retained share, candidate, h) of every token, from appendices A and B."""
    parts = F.linear(x, mixer.in_proj.weight, mixer.in_proj.bias).split(mixer.inner_size, -1)
    candidate = parts[-1]
    if mixer.form == "log":
        candidate = torch.where(candidate >= 0, candidate + 0.5, candidate.sigmoid())
    if isinstance(mixer, MinGRU):
        insert = parts[0].sigmoid()
        keep = 1 - insert
    else:
        f, i = parts[0].sigmoid(), parts[1].sigmoid()
        keep, insert = (f / (f + i), i / (f + i)) if mixer.normalize else (f, i)
    out = []
    for t in range(x.shape[1]):
        h = keep[:, t] * h + insert[:, t] * candidate[:, t]
        out.append(h)
    return keep, candidate, torch.stack(out, 1)


def folded(mixer, x: Tensor, state):
    outputs = []
    for t in range(x.shape[1]):
        y, state = mixer.step(x[:, t], state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


@pytest.mark.parametrize("text", FORMS)
def test_the_papers_equations(text: str) -> None:
    """A fresh start, and a carried state: never passed through g again."""
    mixer, x = built(text), torch.randn(3, 40, D, dtype=F64)
    p = mixer.init_param.detach().expand(3, -1)
    start = mixer.init_state(3)
    assert torch.allclose(start.h, (p + 0.5).where(p >= 0, p.sigmoid()) if "log" in text else p)
    for state in (start, replace(start, h=torch.rand(3, D, dtype=F64) * 2 + 0.1)):
        _, _, want = by_the_paper(mixer, x, state.h)
        y, end = mixer(x, state)
        assert torch.allclose(y, want, rtol=1e-12) and torch.allclose(end.h, want[:, -1])
        assert torch.allclose(folded(mixer, x, state)[0], want, rtol=1e-12)


@pytest.mark.parametrize("text", CELLS)
def test_the_papers_log_space_listing(text: str) -> None:
    """Appendix B in logarithms throughout, with log h_0 = log_g(p) for the learned parameter."""
    mixer, x = built(text), torch.randn(3, 60, D, dtype=F64)
    parts = mixer.in_proj(x).split(D, -1)
    if text == "mingru":
        log_a, log_z = -F.softplus(parts[0]), -F.softplus(-parts[0])
    elif "false" in text:
        log_a, log_z = -F.softplus(-parts[0]), -F.softplus(-parts[1])
    else:
        difference = F.softplus(-parts[0]) - F.softplus(-parts[1])
        log_a, log_z = -F.softplus(difference), -F.softplus(-difference)
    log_h0 = log_g(mixer.init_param).expand(3, -1)
    want = log_space_scan(log_a, log_z + log_g(parts[-1]), log_h0).exp()
    assert torch.allclose(mixer(x)[0], want, rtol=1e-10)


def test_minlstm_shares_are_f_and_i_over_their_sum() -> None:
    """Also far beyond 20, where torch's softplus turns linear and is off by 2e-9."""
    mixer, x = built("minlstm"), 40 * torch.randn(3, 50, D, dtype=F64)
    f, i = (p.sigmoid() for p in mixer.in_proj(x).split(D, -1)[:2])
    log_a, b = mixer.gates(x)
    assert torch.allclose(log_a, (f / (f + i)).log(), rtol=1e-12, atol=1e-15)
    candidate = mixer.candidate(mixer.in_proj(x).split(D, -1)[2])
    assert torch.allclose(b / candidate, i / (f + i), rtol=1e-12, atol=1e-15)


def test_g_is_continuous_and_has_its_logarithm() -> None:
    x = torch.linspace(-30, 30, 6001, dtype=F64).requires_grad_()
    values, logs = g(x), log_g(x)
    assert torch.allclose(logs, values.log(), rtol=1e-12, atol=1e-14)
    assert (values.diff() > 0).all() and values.diff().max() < 0.0101
    assert g(torch.zeros(())).item() == 0.5
    for fn in (g, log_g):
        tiny = torch.tensor([-1e-9, 0.0, 1e-9], dtype=F64)
        assert torch.allclose(fn(tiny), fn(torch.zeros(1, dtype=F64)), atol=1e-8)
    (grad,) = torch.autograd.grad(log_g(z := torch.zeros((), requires_grad=True)), z)
    assert grad.item() == 2.0
    far = torch.tensor([-1e4, -200.0, 200.0, 1e4], requires_grad=True)
    (grad,) = torch.autograd.grad(log_g(far).sum(), far)
    assert log_g(far).isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("text", FORMS)
def test_gradients_are_those_of_the_loop(text: str) -> None:
    mixer, x = built(text), torch.randn(2, 65, D, dtype=F64, requires_grad=True)
    leaves = [x, *mixer.parameters()]

    def gradients(run) -> list[Tensor]:
        y, end = run(x, mixer.init_state(2))
        return torch.autograd.grad(y.square().sum() + end.h.sin().sum(), leaves)

    fast, slow = gradients(mixer), gradients(lambda x, s: folded(mixer, x, s))
    for got, want in zip(fast, slow):
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("at", [0, 5, 19])
@pytest.mark.parametrize("text", ["mingru", "minlstm", "gru", "lstm", "block"])
def test_causality(text: str, at: int) -> None:
    mixer = Block(StatewrightConfig(hidden_size=D), 0).double() if text == "block" else built(text)
    x = torch.randn(2, 20, D, dtype=F64)
    other = x.clone()
    other[:, at] += 1.0
    before, after = mixer(x)[0], mixer(other)[0]
    assert torch.equal(before[:, :at], after[:, :at])
    assert (before[:, at : at + 3] != after[:, at : at + 3]).any(-1).all()


@pytest.mark.parametrize("width", [2, 4])
def test_convolution_is_torchs_and_streams(width: int) -> None:
    conv, x = CausalConv(D, width).double(), torch.randn(3, 17, D, dtype=F64)
    padded = F.pad(x.transpose(1, 2), (width - 1, 0))
    want = F.conv1d(padded, conv.weight.unsqueeze(1), conv.bias, groups=D).transpose(1, 2)
    y, end = conv(x, conv.init_taps(3))
    assert torch.allclose(y, want, rtol=1e-12)
    assert torch.equal(end, x[:, -(width - 1) :])
    taps, streamed = conv.init_taps(3), []
    for t in range(17):
        y_t, taps = conv.update(x[:, t], taps)
        streamed.append(y_t)
        assert taps.shape == (3, width - 1, D)
    assert torch.allclose(torch.stack(streamed, 1), want, rtol=1e-12) and torch.equal(taps, end)
    with pytest.raises(ValueError, match="width=1"):
        CausalConv(D, 1)


@pytest.mark.parametrize("text", FORMS)
def test_states_stay_between_the_old_state_and_the_candidate(text: str) -> None:
    mixer, x = built(text), 3 * torch.randn(3, 80, D, dtype=F64)
    _, candidate, h = by_the_paper(mixer, x, mixer.init_state(3).h)
    h = mixer(x)[0]
    before = torch.cat([mixer.init_state(3).h.unsqueeze(1), h[:, :-1]], 1)
    low, high = torch.minimum(before, candidate), torch.maximum(before, candidate)
    inside = ((h >= low - 1e-12) & (h <= high + 1e-12)).all()
    assert inside == ("normalize=false" not in text)
    assert (h > 0).all() == ("form=log" in text)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("learned_init", [True, False])
@pytest.mark.parametrize(("cell", "gates"), [(MinGRU, 2), (MinLSTM, 3)])
@pytest.mark.parametrize("alpha", [1, 1.5, 4])
def test_parameter_counts(cell, gates: int, alpha: float, learned_init: bool, bias: bool) -> None:
    mixer = cell(8, expansion=alpha, learned_init=learned_init, bias=bias)
    inner = int(8 * alpha)
    want = gates * inner * (8 + bias) + learned_init * inner
    want += 0 if inner == 8 else 8 * (inner + bias)
    assert sum(p.numel() for p in mixer.parameters()) == want


@pytest.mark.parametrize(
    ("alpha", "gru", "lstm"), [(1, 33, 38), (2, 22, 25), (3, 17, 19), (4, 13, 15)]
)
def test_the_papers_parameter_ratios(alpha: int, gru: int, lstm: int) -> None:
    """Percent of GRU and LSTM, without biases and down-projections (section 3)."""

    def weights(mixer: nn.Module) -> int:
        named = mixer.named_parameters()
        return sum(p.numel() for n, p in named if p.dim() == 2 and "out_proj" not in n)

    def percent(small: nn.Module, large: nn.Module) -> float:
        return 100 * weights(small) / weights(large)

    # The paper rounds 12.5 + 1/6 % up and 37.5 % up; half a percent is the table's resolution.
    assert percent(MinGRU(8, alpha), GRU(8, alpha)) == pytest.approx(gru, abs=0.5)
    assert percent(MinLSTM(8, alpha), LSTM(8, alpha)) == pytest.approx(lstm, abs=0.5)


@pytest.mark.parametrize("scale", [200.0, -200.0, 1e4])
@pytest.mark.parametrize("backend", ["auto", "torch", "ref"])
@pytest.mark.parametrize("text", FORMS)
def test_extreme_preactivations(text: str, backend: str, scale: float) -> None:
    """Gates at 0 and 1 in float32: finite, and forward is still the fold of step."""
    mixer = built(text, F32)
    with torch.no_grad():
        mixer.in_proj.weight.copy_(torch.randn_like(mixer.in_proj.weight).sign())
        mixer.in_proj.bias.zero_()
    x = (torch.nn.functional.one_hot(torch.arange(24) % D, D).float() * scale).expand(2, -1, -1)
    x = x.clone().requires_grad_()
    leaves = [x, *mixer.parameters()]

    def run(fn) -> tuple[Tensor, tuple[Tensor, ...]]:
        y, _ = fn(x, mixer.init_state(2))
        return y, torch.autograd.grad(y.sum(), leaves)

    with ops.default_backend(backend):
        y, grads = run(mixer)
    want, wanted_grads = run(lambda x, s: folded(mixer, x, s))
    for got, exact in zip((y, *grads), (want, *wanted_grads)):
        assert got.isfinite().all() and exact.isfinite().all()
        assert (got - exact).abs().max() <= 1e-5 * exact.abs().max().clamp_min(1e-30)


@pytest.mark.parametrize("text", CELLS)
@pytest.mark.parametrize("length", [1, 9])
def test_a_float64_state_stays(text: str, length: int) -> None:
    mixer, x = built(text, F32), torch.randn(2, length, D)
    state = mixer.random_state(2, torch.Generator()).to(F64)
    y, end = mixer(x, state)
    want, last = folded(mixer, x, state)
    assert (y.dtype, end.h.dtype, last.h.dtype) == (F32, F64, F64)
    assert torch.allclose(y, want, rtol=1e-5) and torch.allclose(end.h, last.h, rtol=1e-5)


@pytest.mark.parametrize("text", FORMS)
@pytest.mark.parametrize("length", [1, 2, 9])
def test_a_learned_initial_state_learns(text: str, length: int) -> None:
    mixer, x = built(text), torch.randn(2, length, D, dtype=F64)
    (grad,) = torch.autograd.grad(mixer(x)[0].sum(), mixer.init_param)
    assert (grad != 0).all()
    reset = torch.zeros(2, length, dtype=torch.bool)
    reset[:, -1] = True
    carried = mixer.random_state(2, torch.Generator())
    (grad,) = torch.autograd.grad(mixer(x, carried, None, reset)[0].sum(), mixer.init_param)
    assert (grad != 0).all()


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("text", CELLS)
def test_a_carried_state_keeps_the_initial_one_in_the_graph(text: str, length: int) -> None:
    """DDP stops at a parameter without a gradient: it must be zero, not None."""
    mixer, x = built(text), torch.randn(2, length, D, dtype=F64)
    carried = mixer.random_state(2, torch.Generator())
    (grad,) = torch.autograd.grad(mixer(x, carried)[0].sum(), mixer.init_param)
    assert (grad == 0).all()


FORGETFUL = [
    ("minlstm:forget_bias=7", 7.0),
    ("minlstm:forget_bias=7:learned_init=false", 7.0),
    ("minlstm", 3.0),
    ("mingru:forget_bias=7", -7.0),
    ("mingru:forget_bias=7:learned_init=false", -7.0),
    ("mingru", 0.0),
    ("minlstm:forget_bias=0", 0.0),
]


def gate_bias(mixer) -> Tensor:
    return mixer.in_proj.bias.detach()[: mixer.inner_size]


@pytest.mark.parametrize(("text", "offset"), FORGETFUL)
def test_the_forget_bias_is_added_once(text: str, offset: float, tmp_path) -> None:
    """At construction, after transformers' own initialisation, and not again when loading."""
    bound = 16**-0.5
    alone = build_mixer(text, 16)
    config = StatewrightConfig(vocab_size=5, hidden_size=16, num_hidden_layers=2, mixer=text)
    model = StatewrightForCausalLM(config)
    for mixer in (alone, *(layer.mixer for layer in model.model.layers)):
        assert (gate_bias(mixer) - offset).abs().max() <= bound + 1e-6
        assert (mixer.in_proj.bias.detach()[mixer.inner_size :]).abs().max() <= bound
    model.save_pretrained(tmp_path)
    loaded = StatewrightForCausalLM.from_pretrained(tmp_path)
    for mine, theirs in zip(model.model.layers, loaded.model.layers):
        assert torch.equal(gate_bias(mine.mixer), gate_bias(theirs.mixer))
