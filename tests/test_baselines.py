"""S4, S4D, H3, Hyena and Aaren against their papers' equations, written out another way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from statewright import laws
from statewright.mixers import H3, S4, Aaren, Hyena, build_mixer
from statewright.mixers.s4 import LowRankSpace, legs
from statewright.mixers.s4d import DiagonalSpace
from statewright.models import StatewrightConfig, StatewrightForCausalLM
from statewright.state_file import load_state, save_state

SPACES = {"s4": LowRankSpace, "s4d": DiagonalSpace}
BASELINES = ["s4", "s4d", "h3", "hyena", "aaren:num_heads=2"]


def space(name: str, state_size: int = 64, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    return SPACES[name](5, state_size, 1e-3, 1e-1).to(dtype)


@pytest.mark.parametrize("length", [1, 2, 63, 65, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("name", SPACES)
def test_convolution_is_recurrence(name: str, dtype: torch.dtype, length: int) -> None:
    """The kernel (S4: Cauchy sums at the roots of unity) against one step after the other."""
    ssm = space(name, dtype=dtype)
    u = torch.randn(2, length, 5, dtype=dtype)
    y, end = ssm(u, ssm.empty(2))
    x, outputs = ssm.empty(2), []
    for t in range(length):
        out, x = ssm.update(u[:, t], x)
        outputs.append(out)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    assert laws.error(y, torch.stack(outputs, 1)) < tolerance
    assert laws.error(end, x) < tolerance


def hippo(N: int) -> tuple[np.ndarray, np.ndarray]:
    """HiPPO-LegS entry by entry (arXiv:2111.00396, eq. 2)."""
    A = np.zeros((N, N))
    for n in range(N):
        for k in range(n + 1):
            A[n, k] = -math.sqrt((2 * n + 1) * (2 * k + 1)) if n > k else -(n + 1)
    return A, np.array([math.sqrt(2 * n + 1) for n in range(N)])


def test_legs_is_hippo() -> None:
    """The low-rank form's transfer function c (s - A)^-1 b is that of the matrix itself."""
    A, b = hippo(16)
    L, p, half_b = (t.numpy() for t in legs(16))
    L, p, mode_b = (np.concatenate([t, t.conj()]) for t in (L, p, half_b))
    modes = np.diag(L) - np.outer(p, p.conj())
    assert np.allclose(np.trace(modes), np.trace(A))
    for s in (1.0, 3j, 0.2 + 1j):
        want = np.linalg.solve(s * np.eye(16) - A, b)
        got = np.linalg.solve(s * np.eye(16) - modes, mode_b)
        # Both are the same vector in two orthonormal bases.
        assert np.vdot(b, want) == pytest.approx(np.vdot(mode_b, got), rel=1e-8)
        assert np.vdot(want, want) == pytest.approx(np.vdot(got, got), rel=1e-8)


def test_s4_is_the_bilinear_discretisation_of_a_dense_matrix() -> None:
    """A = diag(L) - p p^* as one dense complex matrix, inverted by torch."""
    ssm = space("s4", 6)
    system = ssm.system()
    for h in range(5):
        L, p, b, c = (
            torch.cat([t[h], t[h].conj()]) for t in (system.L, system.p, system.b, system.c)
        )
        A = torch.diag(L) - torch.outer(p, p.conj())
        dt, eye = system.dt[h], torch.eye(6, dtype=torch.complex128)
        left = torch.linalg.inv(eye - dt / 2 * A)
        step, enter = left @ (eye + dt / 2 * A), left @ (dt * b)
        kernel, x = [], enter
        for _ in range(20):
            kernel.append((c * x).sum().real)
            x = step @ x
        torch.testing.assert_close(
            system.kernel(20)[h], torch.stack(kernel), rtol=1e-10, atol=1e-12
        )


def test_s4d_is_the_zero_order_hold() -> None:
    ssm = space("s4d", 6)
    dt = ssm.log_dt.exp().unsqueeze(-1)
    A = -ssm.log_decay.exp() + 1j * ssm.frequency
    assert torch.allclose(A.imag[0], torch.tensor([0, math.pi, 2 * math.pi], dtype=torch.float64))
    C = torch.view_as_complex(ssm.C.detach())
    t = torch.arange(9)
    terms = (C * (torch.exp(dt * A) - 1) / A).unsqueeze(-1) * torch.exp((dt * A).unsqueeze(-1) * t)
    torch.testing.assert_close(ssm.system().kernel(9), 2 * terms.sum(1).real)


def test_h3_by_hand() -> None:
    """head_dim 1: q_t times the S4D kernel over shifted k times v."""
    torch.manual_seed(0)
    mixer = H3(4, state_size=6, shift_size=3).double()
    x = torch.randn(2, 11, 4, dtype=torch.float64)
    q, k, v = mixer.in_proj(x).chunk(3, -1)
    shifted = torch.zeros_like(k)
    for lag in range(3):
        shifted[:, lag:] += mixer.shift.weight[:, 2 - lag] * k[:, : 11 - lag]
    kernel, kv = mixer.ssm.system().kernel(11), shifted * v
    memory = torch.stack(
        [sum(kernel[:, t - s] * kv[:, s] for s in range(t + 1)) for t in range(11)], 1
    )
    want = mixer.out_proj(q * (memory + mixer.ssm.D * kv))
    torch.testing.assert_close(mixer(x)[0], want)


def test_hyena_by_hand_and_its_state_is_the_whole_past() -> None:
    torch.manual_seed(0)
    mixer = Hyena(4, order=2, filter_length=8, conv_kernel=2).double()
    x = torch.randn(2, 11, 4, dtype=torch.float64)
    parts = mixer.in_proj(x)
    before = torch.cat([torch.zeros_like(parts[:, :1]), parts[:, :-1]], 1)
    parts = parts * mixer.conv.weight[:, 1] + before * mixer.conv.weight[:, 0] + mixer.conv.bias
    v, *gates = parts.chunk(3, -1)
    h = mixer.filter(11).unflatten(1, (2, 4))
    for i, gate in enumerate(gates):
        long = torch.stack([sum(h[t - s, i] * v[:, s] for s in range(t + 1)) for t in range(11)], 1)
        v = gate * (long + mixer.skip[i] * v)
    y, state = mixer(x)
    torch.testing.assert_close(y, mixer.out_proj(v))
    assert state.k.shape == (2, 2, 11, 4) and state.v.numel() == 0
    sizes = [mixer(x[:, :n])[1].nbytes for n in (1, 2, 3)]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] == 2 * 2 * (4 * 8 + 8)
    longer = torch.randn(2, 40, 4, dtype=torch.float64)
    assert mixer(longer)[0].isfinite().all(), "filters go on beyond filter_length"


def test_the_others_carry_a_constant_number_of_bytes() -> None:
    for text in ("s4", "s4d", "h3", "aaren:num_heads=2"):
        mixer = build_mixer(text, 4)
        assert mixer(torch.randn(1, 3, 4))[1].nbytes == mixer(torch.randn(1, 90, 4))[1].nbytes


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_aaren_is_softmax_attention_for_its_query(scale: float) -> None:
    """Against torch's softmax attention, every prefix, scores up to some hundreds included."""
    torch.manual_seed(0)
    mixer = Aaren(8, num_heads=2).double()
    x = torch.randn(3, 33, 8, dtype=torch.float64) * scale
    k, v = mixer.in_proj(x).unflatten(-1, (2, 2, 4)).permute(2, 0, 3, 1, 4)
    q = mixer.query.view(1, 2, 1, 4).expand(3, 2, 33, 4)
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    want = mixer.out_proj(o.transpose(1, 2).flatten(2))
    y, state = mixer(x)
    torch.testing.assert_close(y, want)
    assert state.numel == 3 * (8 + 2 + 2) + 3
    for leaf in (mixer.query, mixer.in_proj.weight):
        (got,) = torch.autograd.grad(y.square().sum(), leaf, retain_graph=True)
        (wanted,) = torch.autograd.grad(want.square().sum(), leaf, retain_graph=True)
        torch.testing.assert_close(got, wanted)


def test_aaren_with_scores_far_below_zero() -> None:
    mixer = Aaren(4, num_heads=1)
    with torch.no_grad():
        mixer.in_proj.bias[:4] = -1e4 * mixer.query.flatten().sign()
    y, _ = mixer(torch.randn(1, 5, 4))
    assert y.isfinite().all() and bool(y.std() > 0)


@pytest.mark.parametrize("text", BASELINES)
def test_models_and_their_states_survive_a_file(text: str, tmp_path) -> None:
    config = StatewrightConfig(vocab_size=11, hidden_size=8, num_hidden_layers=2, mixer=text)
    model = StatewrightForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    again = StatewrightForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = torch.randint(11, (2, 30))
    with torch.no_grad():
        out = model(ids[:, :20])
        save_state(out.state, tmp_path / "state", model)
        state = load_state(tmp_path / "state", again)
        want = model(ids[:, 20:], state=out.state).logits
        assert torch.equal(again(ids[:, 20:], state=state).logits, want)
    assert laws.error(want, model(ids).logits[:, 20:]) < 1e-5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("s4:state_size=5", "state_size=5, expected an even number"),
        ("s4d:dt_min=0.2", "expected 0 < dt_min <= dt_max"),
        ("h3:head_dim=3", "head_dim=3 does not divide 8"),
        ("hyena:order=0", "order=0, expected at least 1"),
        ("aaren:num_heads=3", "num_heads=3 does not divide 8"),
    ],
)
def test_bad_sizes(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_mixer(text, 8)


def test_bad_states() -> None:
    x, other = torch.randn(2, 3, 8), build_mixer("mingru", 8).init_state(2)
    for text in BASELINES:
        with pytest.raises(ValueError, match="state is"):
            build_mixer(text, 8)(x, other)
    with pytest.raises(ValueError, match=r"expected \(B, H, K, V\) = \(2, 8, 32, 2\)"):
        S4(8)(x, S4(8, state_size=6).init_state(2))
