"""The matrix scan in C against a loop over tokens in float64, written here from the definition."""

import shutil
from functools import partial

import pytest
import torch
from loop_gradients import BOTH, differentiate, differentiate_each, error, random
from torch.autograd import forward_ad

from statewright.ops import native, native_matrix
from statewright.ops.native_matrix import matrix_scan

HAS_COMPILER = any(map(shutil.which, ("cc", "gcc", "clang")))
# Largest error over largest value. A bfloat16 sequence is rounded to 8 bits, its state is not.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 2e-2}
NAMES = ("o", "S_T", "dq", "dk", "dv", "dlog_a", "dS0")
# B, T, G, H, K, V: channels (V = 1), partial tiles and vectors, several blocks of heads and keys.
SHAPES = [
    (3, 0, 1, 2, 3, 4), (0, 3, 1, 2, 3, 4), (3, 1, 2, 4, 16, 64), (1, 1, 1, 130, 16, 1),
    (1, 2, 1, 1, 1, 3), (3, 2, 4, 4, 20, 1), (1, 63, 2, 4, 64, 16), (3, 65, 1, 4, 3, 20),
    (1, 65, 1, 11, 70, 3), (1, 65, 1, 130, 16, 1), (3, 63, 2, 6, 1, 1), (1, 300, 2, 2, 20, 64),
    (1, 300, 1, 3, 16, 1), (1, 40, 1, 2, 2100, 1),
]  # fmt: skip

pytestmark = pytest.mark.skipif(not (HAS_COMPILER or native.available()), reason="no C compiler")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def loop(q, k, v, log_a, S0, reset=None):
    S, out, heads = S0, [], v.shape[2] // max(q.shape[2], 1)
    q, k = (x.repeat_interleave(heads, 2) for x in (q, k))
    # Unbound, as the gradient of every x[:, t] is as large as x.
    for t, (q_t, k_t, v_t, log_a_t) in enumerate(zip(*(x.unbind(1) for x in (q, k, v, log_a)))):
        a = log_a_t.exp().unsqueeze(-1)
        if reset is not None:
            a = a * ~reset.bool()[:, t, None, None, None]
        S = a * S + k_t.unsqueeze(-1) * v_t.unsqueeze(-2)
        out.append((q_t.unsqueeze(-2) @ S).squeeze(-2))
    return torch.stack(out, 1) if out else v * 1, S * 1


def inputs_of(B, T, G, H, K, V, dtype=torch.float64, per_key=True, rate=0.3):
    state = torch.promote_types(dtype, torch.float32)
    q, k = random(B, T, G, K, dtype=dtype), random(B, T, G, K, dtype=dtype, seed=1)
    v, S0 = random(B, T, H, V, dtype=dtype, seed=2), random(B, H, K, V, dtype=state, seed=3)
    log_a = -torch.nn.functional.softplus(random(B, T, H, K if per_key else 1, seed=4)) * rate
    return q, k, v, log_a.to(state), S0


def some_resets(B, T):
    reset = torch.rand(B, T, generator=torch.Generator().manual_seed(5)) < 0.1
    reset[:1, :1], reset[1:2, -2:] = True, True
    return reset


def compare(inputs, tolerance, reset=None, uses=(BOTH,)):
    truths = differentiate_each(partial(loop, reset=reset), inputs, uses, torch.float64)
    for use, truth in zip(uses, truths):
        ours = differentiate(partial(matrix_scan, reset=reset), inputs, use)
        dtypes = (inputs[2].dtype, inputs[4].dtype, *(x.dtype for x in inputs))
        assert tuple(x.dtype for x in ours) == dtypes
        errors = {name: error(x, y) for name, x, y in zip(NAMES, ours, truth)}
        assert max(errors.values()) <= tolerance, errors
        assert errors["S_T"] <= TOLERANCE[inputs[4].dtype], errors


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("per_key", [False, True], ids=["per-head", "per-key"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_loop(shape, per_key, dtype):
    inputs = inputs_of(*shape, dtype, per_key)
    compare(inputs, TOLERANCE[dtype], some_resets(*shape[:2]))
    compare(inputs, TOLERANCE[dtype], None, (BOTH, (0,), (1,)))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("per_key", [False, True], ids=["per-head", "per-key"])
@pytest.mark.parametrize("sizes", [(2, 4, 20, 5), (1, 30, 16, 1)], ids=str)
def test_decays_of_zero_and_one(sizes, per_key, dtype):
    q, k, v, log_a, S0 = inputs_of(3, 65, *sizes, dtype, per_key)
    kinds = (log_a * 1000).long() % 5
    log_a = torch.tensor([-torch.inf, 0.0, -100.0, -1e-3, -1000.0])[kinds].to(S0.dtype)
    compare((q, k, v, log_a, S0), TOLERANCE[dtype], some_resets(3, 65))
    compare((q, k, v, torch.zeros_like(log_a), S0), TOLERANCE[dtype])
    log_a[:, 0] = -torch.inf
    compare((q, k, v, log_a, S0 * 1e30), TOLERANCE[dtype])
    one = [x[:, :1] for x in (q, k, v, log_a)]
    for part in ([q, k, v, log_a], one):
        clean = matrix_scan(*part, S0)[0]
        assert torch.equal(matrix_scan(*part, S0 * torch.inf)[0], clean)
        dirty = differentiate(matrix_scan, (*part, S0 * 1e30))
        assert all(x.isfinite().all() for x in dirty)
        assert not dirty[5][:, 0].any() and not dirty[6].any()
        assert matrix_scan(q, k, v, log_a * torch.nan, S0)[0].isnan().all()


@pytest.mark.parametrize("per_key", [False, True], ids=["per-head", "per-key"])
def test_strong_decays_split_chunks(per_key):
    for rate in (3.0, 10.0, 25.0):
        inputs = inputs_of(1, 130, 1, 3, 20, 17, torch.float64, per_key, rate)
        compare(inputs, 1e-11)
        ours = differentiate(matrix_scan, [x.float() for x in inputs])
        truth = differentiate(loop, inputs)
        # dlog_a is a difference of what is read and written: small against them, less exact.
        tolerances = [2e-6] * 5 + [3e-4, 2e-6]
        assert all(error(x, y) <= e for x, y, e in zip(ours, truth, tolerances))


@pytest.mark.parametrize("shape", [(1, 2048, 1, 1, 128, 64), (1, 512, 2, 2, 64, 128)], ids=str)
def test_float32_is_within_5e_7_forward_and_2e_6_backward(shape):
    inputs = inputs_of(*shape, torch.float32, per_key=shape[2] == 2)
    ours = differentiate(matrix_scan, inputs)
    truth = differentiate(loop, inputs, dtype=torch.float64)
    errors = {name: error(x, y) for name, x, y in zip(NAMES, ours, truth)}
    assert max(errors["o"], errors["S_T"]) <= 5e-7, errors
    assert max(errors.values()) <= 2e-6, errors


@pytest.mark.parametrize("sizes", [(1, 1, 3, 2), (1, 2, 2, 1)], ids=str)
@pytest.mark.parametrize("per_key", [False, True], ids=["per-head", "per-key"])
def test_a_hundred_thousand_tokens(sizes, per_key):
    inputs = inputs_of(1, 100_000, *sizes, torch.float32, per_key)
    ours = differentiate(matrix_scan, inputs)
    truth = differentiate(matrix_scan, inputs, dtype=torch.float64)
    assert max(map(error, ours, truth)) <= 1e-6
    end = slice(99_700, None)
    recent = [x[:, end].double() for x in inputs[:4]]
    o, S_T = loop(*recent, inputs[4].double() * 0)  # the older tokens are forgotten by then
    assert max(error(truth[0][:, -100:], o[:, -100:]), error(truth[1], S_T)) <= 1e-12


@pytest.mark.parametrize("sizes", [(1, 20, 70, 40), (2, 4, 64, 128), (1, 400, 16, 1)], ids=str)
@pytest.mark.parametrize("per_key", [False, True], ids=["per-head", "per-key"])
def test_threads_change_nothing(sizes, per_key):
    inputs, results = inputs_of(1, 130, *sizes, torch.float32, per_key), []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(differentiate(partial(matrix_scan, reset=some_resets(1, 130)), inputs))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("V", [5, 1])
@pytest.mark.parametrize("T", [65, 1])
def test_inputs_need_not_be_contiguous_and_are_left_alone(T, V):
    inputs = (*inputs_of(3, T, 2, 4, 6, V, torch.float32), some_resets(3, T))
    scattered = [torch.stack([x, x], -1)[..., 0] for x in inputs]
    wide = torch.cat([x.flatten(2) for x in inputs[:3]], -1)
    parts = wide.split([12, 12, 4 * V], -1)
    sliced = [x.unflatten(2, (h, -1)) for x, h in zip(parts, (2, 2, 4))] + list(inputs[3:])
    assert not any(native_matrix._tokens(x) is not x for x in sliced[:3])
    copies = [x.clone() for x in inputs]
    for other in (scattered, sliced):
        assert all(map(torch.equal, matrix_scan(*inputs), matrix_scan(*other)))
        results = [differentiate(partial(matrix_scan, reset=x[5]), x[:5]) for x in (inputs, other)]
        assert all(map(torch.equal, *results))
    assert all(map(torch.equal, inputs, copies)) and all(map(torch.equal, inputs, scattered))


def test_outputs_are_fresh_when_there_is_no_token():
    *sequences, S0 = inputs_of(3, 0, 1, 2, 3, 4, torch.float32)
    o, S_T = matrix_scan(*sequences, S0)
    assert o.shape == (3, 0, 2, 4) and torch.equal(S_T, S0) and S_T.data_ptr() != S0.data_ptr()


@pytest.mark.parametrize("V", [3, 1])
@pytest.mark.parametrize("per_key", [False, True], ids=["per-head", "per-key"])
def test_gradcheck(per_key, V):
    inputs = [x.requires_grad_() for x in inputs_of(2, 4, 1, 2, 3, V, per_key=per_key)]
    reset = torch.tensor([[0, 0, 1, 0], [0, 1, 0, 0]], dtype=torch.uint8)
    assert torch.autograd.gradcheck(lambda *x: matrix_scan(*x, reset), inputs)


def test_what_is_not_differentiable_raises():
    inputs = [x.requires_grad_() for x in inputs_of(2, 4, 1, 2, 3, 2)]
    grads = torch.autograd.grad(matrix_scan(*inputs)[0].square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd"):
        sum(g.sum() for g in grads).backward()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        q = inputs[0].detach()
        matrix_scan(forward_ad.make_dual(q, q), *inputs[1:])


@pytest.mark.parametrize(("V", "dtype"), [(4, torch.float32), (1, torch.bfloat16)], ids=str)
def test_opcheck(V, dtype):
    inputs, reset = inputs_of(2, 5, 1, 2, 3, V, dtype), some_resets(2, 5)
    leaves = [x.clone().requires_grad_() for x in inputs]
    torch.library.opcheck(native_matrix.matrix_op, (*leaves, reset))
    torch.library.opcheck(native_matrix.matrix_op, (*leaves, None))
    o, S_T = matrix_scan(*inputs)
    for grads in ((o, S_T), (None, S_T), (o, None)):
        torch.library.opcheck(native_matrix.matrix_backward_op, (*grads, *inputs, reset))


def test_compiles_without_a_graph_break():
    inputs = inputs_of(2, 5, 1, 2, 3, 4, torch.float32)
    compiled = torch.compile(matrix_scan, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, *(differentiate(f, inputs) for f in (matrix_scan, compiled))))


def test_log_a_may_have_the_dtype_of_the_sequences():
    q, k, v, log_a, S0 = inputs_of(2, 5, 1, 2, 3, 4, torch.bfloat16)
    rounded = log_a.bfloat16()
    leaf = rounded.clone().requires_grad_()
    o, S_T = matrix_scan(q, k, v, leaf, S0)
    assert torch.equal(o, matrix_scan(q, k, v, rounded.float(), S0)[0])
    assert torch.autograd.grad(S_T.sum(), leaf)[0].dtype == torch.bfloat16


def test_what_it_does_not_take_raises():
    q, k, v, log_a, S0 = inputs_of(2, 5, 1, 2, 3, 4, torch.float32)
    reset = torch.zeros(2, 5, dtype=torch.int32)
    others = [(q.half(), k.half(), v.half(), log_a, S0), (q.double(), k, v, log_a, S0)]
    others += [(q, k, v, log_a, S0.double()), (q, k, v, log_a.double(), S0)]
    others += [(q, k, v, log_a, S0.to("meta")), (q, k, v, log_a, S0, reset)]
    for arguments in others:
        assert not native_matrix.supports(*arguments)
        with pytest.raises(ValueError, match="matrix_scan: the C kernel does not take"):
            matrix_scan(*arguments)


def test_groups_are_never_expanded(monkeypatch):
    inputs = inputs_of(1, 256, 1, 64, 64, 4, torch.float32, per_key=False)
    allocated, empty = [], torch.Tensor.new_empty

    def counted(self, *args, **kwargs):
        allocated.append(empty(self, *args, **kwargs))
        return allocated[-1]

    monkeypatch.setattr(torch.Tensor, "new_empty", counted)
    differentiate(matrix_scan, inputs)
    expanded = inputs[0].nbytes * 64
    # The largest is the gradient of q for 8 heads at a time.
    assert allocated and max(x.nbytes for x in allocated) <= expanded / 8


def test_denormals_are_left_alone():
    torch.set_num_threads(2)
    differentiate(matrix_scan, inputs_of(1, 65, 1, 8, 64, 64, torch.float32))
    assert (torch.full((1 << 20,), 1e-39) * 0.5 > 0).all()  # on every thread of the pool
