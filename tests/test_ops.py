"""The vector scan of every backend against a loop in float64 that is written here."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from statewright import ops
from statewright.ops import default_backend, log_space, native, vector_scan

F32, F64, C128 = torch.float32, torch.float64, torch.complex128
BACKENDS = [b for b in ops.VECTOR_BACKENDS if b != "native" or native.available()]
EXACT = [b for b in BACKENDS if b != "log"]
TOLERANCES = dict.fromkeys(EXACT, 1e-12) | {"log": 1e-9}
LENGTHS = [0, 1, 2, 63, 65, 1000]


def loop(log_a: Tensor, b: Tensor, h0: Tensor, reset: Tensor | None = None):
    """The recurrence by hand, in float64 (or complex128), differentiable."""
    dtype = torch.promote_types(b.dtype, F64)
    decay, b, h = log_a.to(dtype).exp(), b.to(dtype), h0.to(dtype)
    out = []
    for t in range(b.shape[1]):
        if reset is not None:
            h = h * (~reset[:, t : t + 1])
        h = decay[:, t] * h + b[:, t]
        out.append(h)
    return (torch.stack(out, 1) if out else b), h


def draw(batch: int, length: int, channels: int = 5, dtype=F64):
    """Positive b and h0, so that every backend can take them; decays around 1/2."""
    log_a = -torch.nn.functional.softplus(torch.randn(batch, length, channels, dtype=dtype))
    b = torch.rand(batch, length, channels, dtype=dtype) + 0.1
    return log_a, b, torch.rand(batch, channels, dtype=dtype) + 0.1


def resets(batch: int, length: int) -> Tensor:
    """At t = 0, in a row, at the end, and none at all in the last row."""
    reset = torch.rand(batch, length) < 0.1
    reset[0, [0, 1, 2, -1]] = True
    reset[-1] = batch == 1
    return reset


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    if want.numel() == 0:
        return 0.0
    scale = want.abs().max().clamp_min(1e-300)
    return ((got.to(want.dtype) - want).abs().max() / scale).item()


def gradients(scan, inputs, reset=None) -> tuple[Tensor, ...]:
    """Of a random functional of all outputs and of h_T."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    h, h_T = scan(*leaves, reset)
    generator = torch.Generator().manual_seed(1)
    u = torch.randn(h.shape, generator=generator, dtype=F64)
    v = torch.randn(h_T.shape, generator=generator, dtype=F64)
    loss = (h * u).sum() + (h_T * v).sum()
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return tuple(torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves))


def agree(backend: str, inputs, reset: Tensor | None = None) -> None:
    scan, tolerance = partial(vector_scan, backend=backend), TOLERANCES[backend]
    for got, want in zip(scan(*inputs, reset), loop(*inputs, reset)):
        assert error(got, want) <= tolerance
    for got, want in zip(gradients(scan, inputs, reset), gradients(loop, inputs, reset)):
        assert error(got, want) <= 10 * tolerance


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_and_gradients(backend: str, length: int, batch: int) -> None:
    agree(backend, draw(batch, length))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [4, 63, 200])
@pytest.mark.parametrize("backend", BACKENDS)
def test_resets(backend: str, length: int, batch: int) -> None:
    agree(backend, draw(batch, length), resets(batch, length))


@pytest.mark.parametrize("length", [1, 2, 63, 200])
@pytest.mark.parametrize("backend", BACKENDS)
def test_decays_of_exactly_0_and_1(backend: str, length: int) -> None:
    log_a, b, h0 = draw(3, length)
    choice = torch.rand_like(log_a)
    log_a = log_a.masked_fill(choice < 0.3, 0.0).masked_fill(choice > 0.9, -torch.inf)
    log_a[0, 0], log_a[1, -1] = -torch.inf, -torch.inf
    inputs = (log_a, b, h0)
    agree(backend, inputs)
    zero = vector_scan(torch.full_like(log_a, -torch.inf), b, h0, backend=backend)[0]
    assert error(zero, b) <= TOLERANCES[backend]
    one = vector_scan(torch.zeros_like(log_a), b, h0, backend=backend)[0]
    assert error(one, h0.unsqueeze(1) + b.cumsum(1)) <= TOLERANCES[backend]


@pytest.mark.parametrize("length", [1, 64, 65, 200])
@pytest.mark.parametrize("backend", EXACT)
def test_signed_values(backend: str, length: int) -> None:
    log_a, b, h0 = draw(3, length)
    agree(backend, (log_a, torch.randn_like(b), torch.randn_like(h0)), resets(3, length + 4)[:, 4:])


@pytest.mark.parametrize("width", [1, 2100])
@pytest.mark.parametrize("backend", EXACT)
def test_narrow_and_wide_rows(backend: str, width: int) -> None:
    """The torch backend takes another path for wide rows."""
    agree(backend, draw(2, 70, width), resets(2, 70))


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_that_are_views(backend: str) -> None:
    log_a, b, h0 = draw(3, 33, 8)
    views = (log_a.transpose(0, 1).contiguous().transpose(0, 1), b.flip(2).flip(2)[..., ::2])
    agree(backend, (views[0][..., 1::2], views[1], h0[:, ::2]))
    agree(backend, (log_a[:, :1].expand(3, 33, 8), b, h0[:1].expand(3, 8)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_are_fresh(backend: str) -> None:
    for length in (0, 1, 9):
        inputs = draw(2, length)
        kept = [t.clone() for t in inputs]
        outputs = vector_scan(*inputs, backend=backend)
        for out in outputs:
            out.fill_(7.0)
        assert all(torch.equal(t, k) for t, k in zip(inputs, kept))
        h, h_T = vector_scan(*inputs, backend=backend)
        h.fill_(7.0)
        assert not (h_T == 7.0).any()


@pytest.mark.parametrize("backend", [b for b in EXACT if b != "ref"])
def test_hundred_thousand_tokens_in_float32(backend: str) -> None:
    """Memories of 1 to 100 tokens; slower decays are limited by exp(log_a) in float32 itself."""
    log_a, b, h0 = draw(1, 100_000, 16, F32)
    log_a = log_a * torch.logspace(-2, 0.5, 16)
    inputs = (log_a, torch.randn_like(b), torch.randn_like(h0))
    exact = vector_scan(*(t.double() for t in inputs), backend="torch")
    assert (
        error(exact[0][:, :500], loop(*(t[:, :500] for t in inputs[:2]), h0=inputs[2])[0]) < 1e-12
    )
    got = vector_scan(*inputs, backend=backend)
    assert all(t.dtype == F32 for t in got)
    assert max(error(g, e) for g, e in zip(got, exact)) <= 2e-6
    grads = gradients(partial(vector_scan, backend=backend), inputs)
    wanted = gradients(partial(vector_scan, backend="torch"), [t.double() for t in inputs])
    assert max(error(g, w) for g, w in zip(grads, wanted)) <= 2e-6


@pytest.mark.parametrize("dtype", [F64, C128], ids=["real", "complex"])
@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("backend", ["torch", "ref"])
def test_gradcheck_twice(backend: str, with_reset: bool, dtype: torch.dtype) -> None:
    log_a, b, h0 = (t.to(dtype) for t in draw(2, 7, 2))
    if dtype.is_complex:
        log_a, b, h0 = (t + 0.5j * torch.randn_like(t.real) for t in (log_a, b, h0))
    inputs = [t.requires_grad_() for t in (log_a, b, h0)]
    reset = resets(2, 7) if with_reset else None
    scan = partial(vector_scan, reset=reset, backend=backend)
    assert torch.autograd.gradcheck(scan, inputs)
    assert torch.autograd.gradgradcheck(scan, inputs)
    assert error(scan(*inputs)[0], loop(*inputs, reset)[0]) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_carries_float32(backend: str) -> None:
    log_a, b, h0 = draw(3, 300, dtype=F32)
    low = (log_a.bfloat16(), b.bfloat16(), h0)
    h, h_T = vector_scan(*low, backend=backend)
    assert (h.dtype, h_T.dtype) == (torch.bfloat16, F32)
    exact_h, exact_T = loop(*low)
    assert error(h, exact_h) <= 2**-8
    assert error(h_T, exact_T) <= (1e-6 if backend != "log" else 1e-4)
    assert torch.equal(h[:, -1], h_T.bfloat16())


@pytest.mark.parametrize("backend", ["auto", "torch", "ref"])
def test_mixed_dtypes_lose_nothing(backend: str) -> None:
    """A float64 state of a float32 model stays; float32 decays stay beside bfloat16 values."""
    log_a, b, h0 = draw(2, 40, dtype=F32)
    h, h_T = vector_scan(log_a, b, h0.double(), backend=backend)
    assert (h.dtype, h_T.dtype) == (F32, F64)
    assert error(h_T, loop(log_a, b, h0)[1]) <= 1e-12
    low = (log_a, b.bfloat16(), h0)
    h, h_T = vector_scan(*low, backend=backend)
    assert (h.dtype, h_T.dtype) == (torch.bfloat16, F32)
    assert error(h_T, loop(*low)[1]) <= 1e-6


def test_the_log_backend_loses_accuracy_with_length() -> None:
    """As the module says: its error grows with |sum log a|, the linear scan's does not."""
    short, long = [], []
    for length, errors in ((64, short), (4096, long)):
        inputs = draw(1, length, 32, F32)
        exact = loop(*inputs)[0]
        errors += [error(vector_scan(*inputs, backend=b)[0], exact) for b in ("log", "torch")]
    assert long[0] > 10 * short[0] and long[0] > 20 * long[1]
    assert long[0] < 1e-2 and long[1] < 1e-6


def test_log_space_scan_is_the_papers_form() -> None:
    log_a, b, h0 = draw(2, 50)
    log_h = log_space.log_space_scan(log_a, b.log(), h0.log())
    assert error(log_h.exp(), loop(log_a, b, h0)[0]) < 1e-9


@pytest.mark.parametrize("where", ["b", "h0"])
def test_the_log_backend_refuses_signs(where: str) -> None:
    log_a, b, h0 = draw(2, 5)
    (b if where == "b" else h0)[0, 0] = -1.0
    with pytest.raises(ValueError, match=r"b >= 0 and h0 >= 0.*backend='torch'"):
        vector_scan(log_a, b, h0, backend="log")


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3, 4), (2, 3), (2, 4)), r"b is \(2, 3\), expected \(B, T, D\)"),
        (((2, 5, 4), (2, 3, 4), (2, 4)), r"log_a is \(2, 5, 4\), .* = \(2, 3, 4\)"),
        (((2, 3, 1), (2, 3, 4), (2, 4)), r"log_a is \(2, 3, 1\)"),
        (((2, 3, 4), (2, 3, 4), (1, 4)), r"h0 is \(1, 4\), expected \(B, D\) = \(2, 4\)"),
        (((2, 3, 4), (2, 3, 4), (2, 3, 4)), r"h0 is \(2, 3, 4\)"),
        (((2, 3, 4), (2, 3, 4), (2, 4), (2, 4)), r"reset is \(2, 4\), .* = \(2, 3\)"),
    ],
)
def test_shapes_that_do_not_fit(shapes, message: str) -> None:
    tensors = [torch.zeros(s, dtype=torch.bool if i == 3 else F32) for i, s in enumerate(shapes)]
    with pytest.raises(ValueError, match=f"^vector_scan: {message}"):
        vector_scan(*tensors)


def test_default_backend_holds_within_the_block() -> None:
    negative = (torch.zeros(1, 2, 1), -torch.ones(1, 2, 1), torch.zeros(1, 1))
    with pytest.raises(ValueError, match="log backend"), default_backend("log"):
        vector_scan(*negative)
    vector_scan(*negative)
    with default_backend("log"):
        assert vector_scan(*negative, backend="ref")[1].item() == -2.0
        with default_backend("ref"):
            vector_scan(*negative)
        with pytest.raises(ValueError, match="log backend"):
            vector_scan(*negative)
    vector_scan(*negative)
    with pytest.raises(ValueError, match=r"'fast' \(known: auto, "), default_backend("fast"):
        pass
    with pytest.raises(ValueError, match="unknown scan backend 'fast'"):
        vector_scan(*negative, backend="fast")


@pytest.mark.parametrize("backend", ["auto", *(b for b in EXACT if b != "ref")])
def test_compiles_without_a_break(backend: str) -> None:
    inputs, reset = draw(2, 21), resets(2, 21)
    scan = partial(vector_scan, backend=backend)
    torch.compiler.reset()
    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager", dynamic=False)
    for flags in (None, reset):
        for got, want in zip(compiled(*inputs, flags), scan(*inputs, flags)):
            assert error(got, want) <= 1e-12
    for got, want in zip(gradients(compiled, inputs, reset), gradients(scan, inputs, reset)):
        assert error(got, want) <= 1e-12
