"""The C kernels against a loop over tokens in float64, written here from the papers' equations."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from loop_gradients import BOTH, differentiate, differentiate_each, error, random
from torch.autograd import forward_ad
from torch.nn.functional import logsigmoid

from statewright.ops import native, native_ops
from statewright.ops.native_library import open_library

OPS = Path(native.__file__).parent
HAS_COMPILER = any(map(shutil.which, ("cc", "gcc", "clang")))
# Largest error over largest value. A bfloat16 sequence is rounded to 8 bits, its state is not.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 2e-2}
SHAPES = [(3, 0, 5), (3, 1, 64), (1, 1, 1030), (3, 2, 5), (1, 2, 1), (3, 63, 64), (1, 65, 1030)]
SHAPES += [(3, 65, 1), (1, 1000, 5), (0, 3, 4)]

pytestmark = pytest.mark.skipif(not (HAS_COMPILER or native.available()), reason="no C compiler")


@pytest.fixture(autouse=True)
def one_thread():
    # Threads that wait for a busy core at every operator make these tests five times slower.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def scan_loop(log_a, b, h0, flags=None):
    h, out = h0, []
    # Unbound, as the gradient of every x[:, t] is as large as x.
    for t, (log_a_t, b_t) in enumerate(zip(log_a.unbind(1), b.unbind(1))):
        if flags is not None:
            h = torch.where(flags[:, t, None] & 2 != 0, torch.zeros_like(h), h)
        out.append(h := log_a_t.exp() * h + b_t)
    return torch.stack([h, *out], 1)[:, 1:], h


def gated_loop(p, h0, init=None, flags=None, positive=True, normalize=True):
    D, h, out = h0.shape[1], h0, []
    init = torch.zeros_like(h0) if init is None else init.expand_as(h0)
    for t, p_t in enumerate(p.unbind(1)):
        *gates, c = p_t.split(D, -1)
        cand = torch.where(c >= 0, c + 0.5, torch.sigmoid(c)) if positive else c
        if len(gates) == 1:
            write, keep = torch.sigmoid(gates[0]), torch.sigmoid(-gates[0])
        elif normalize:
            difference = logsigmoid(gates[0]) - logsigmoid(gates[1])
            keep, write = torch.sigmoid(difference), torch.sigmoid(-difference)
        else:
            keep, write = map(torch.sigmoid, gates)
        flag = torch.zeros(1, dtype=torch.uint8) if flags is None else flags[:, t, None]
        h = torch.where(flag & 2 != 0, init, h)
        out.append(h := torch.where(flag & 1 != 0, h, keep * h + write * cand))
    return torch.stack([h, *out], 1)[:, 1:], h


class Scan:
    def inputs(self, B, T, D, dtype):
        state = torch.promote_types(dtype, torch.float32)
        log_a = logsigmoid(random(B, T, D)).to(dtype)
        return log_a, random(B, T, D, dtype=dtype, seed=1), random(B, D, dtype=state, seed=2)

    required = inputs

    def run(self, log_a, b, h0, flags=None):
        return native.vector_scan(log_a, b, h0, None if flags is None else flags >= 2)

    loop = staticmethod(scan_loop)


class Gated:
    def __init__(self, function, parts, **options):
        self.function, self.parts, self.options = function, parts, options

    def inputs(self, B, T, D, dtype):
        state = torch.promote_types(dtype, torch.float32)
        p = random(B, T, self.parts * D, dtype=dtype)
        return p, random(B, D, dtype=state, seed=1), random(D, dtype=state, seed=2)

    def required(self, *shape_and_dtype):
        return self.inputs(*shape_and_dtype)[:2]

    def run(self, p, h0, init=None, flags=None):
        return self.function(p, h0, init, flags, **self.options)

    def loop(self, p, h0, init=None, flags=None):
        return gated_loop(p, h0, init, flags, **self.options)


KERNELS = {
    "scan": Scan(),
    "mingru": Gated(native.mingru, 2, positive=False),
    "mingru-positive": Gated(native.mingru, 2, positive=True),
    "minlstm": Gated(native.minlstm, 3, positive=False, normalize=True),
    "minlstm-positive": Gated(native.minlstm, 3, positive=True, normalize=True),
    "minlstm-plain": Gated(native.minlstm, 3, positive=False, normalize=False),
    "minlstm-plain-positive": Gated(native.minlstm, 3, positive=True, normalize=False),
}
every_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def some_flags(B, T):
    """Masks and resets: alone, together, in runs, and on the first tokens."""
    flags = torch.randint(4, (B, T), generator=torch.Generator().manual_seed(4)).to(torch.uint8)
    flags[:, T // 4 : T // 2] = 0
    flags[:1, :2], flags[1:2, :2], flags[2:3, :3] = 2, 1, 3
    return flags


def compare(kernel, inputs, tolerance, flags=None, uses=(BOTH,)):
    with_flags = {} if flags is None else {"flags": flags}
    loop = lambda *x: kernel.loop(*x, **with_flags)  # noqa: E731
    for use, truth in zip(uses, differentiate_each(loop, inputs, uses, torch.float64)):
        ours = differentiate(lambda *x: kernel.run(*x, **with_flags), inputs, use)
        assert all(x.dtype == y.dtype for x, y in zip(ours, (inputs[0], inputs[-1], *inputs)))
        errors = [error(x, y) for x, y in zip(ours, truth)]
        assert max(errors) <= tolerance, errors
        assert errors[1] <= TOLERANCE[inputs[-1].dtype], errors


def test_kernels_are_built_wherever_there_is_a_compiler():
    assert native.available() and native.why_unavailable() is None, native.why_unavailable()


@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_kernel
def test_matches_the_loop(kernel, shape, dtype):
    inputs, flags = kernel.required(*shape, dtype), some_flags(*shape[:2])
    for some in (kernel.inputs(*shape, dtype), inputs):
        compare(kernel, some, TOLERANCE[dtype], flags)
    compare(kernel, inputs, TOLERANCE[dtype], None, (BOTH, (0,), (1,)))


@every_dtype
def test_decays_of_zero_and_one(dtype):
    _, b, h0 = KERNELS["scan"].inputs(3, 65, 64, dtype)
    kinds = (random(*b.shape, seed=3).abs() * 2).long() % 5
    log_a = torch.tensor([-torch.inf, 0.0, -100.0, -1e-3, -1000.0])[kinds].to(dtype)
    compare(KERNELS["scan"], (log_a, b, h0), TOLERANCE[dtype], some_flags(3, 65))
    log_a[:, :1] = -torch.inf
    compare(KERNELS["scan"], (log_a, b, h0 * 1e30), TOLERANCE[dtype])
    assert torch.equal(native.vector_scan(log_a, b, h0 * torch.inf)[0][:, 0], b[:, 0])
    assert native.vector_scan(log_a * torch.nan, b, h0)[0].isnan().all()


@every_dtype
@pytest.mark.parametrize("name", list(KERNELS)[1:])
def test_saturated_gates(name, dtype):
    kernel = KERNELS[name]
    p, h0 = kernel.required(3, 65, 64, dtype)
    levels = torch.tensor([-1000.0, -100.0, -90.0, -20.0, -1.0, 0.0, 3.0, 30.0, 100.0, 1000.0])
    kinds = torch.randint(10, p.shape, generator=torch.Generator().manual_seed(2))
    p = levels[kinds].to(dtype)
    compare(kernel, (p, h0), TOLERANCE[dtype])
    p[..., -64:] = p[..., -64:].clamp(-20, 3)
    compare(kernel, (p, h0), TOLERANCE[dtype], some_flags(3, 65))


@every_kernel
def test_float32_is_within_5e_7_of_float64(kernel):
    compare(kernel, kernel.required(2, 512, 64, torch.float32), 5e-7)


# A decay of 0.9999 remembers, and adds up the rounding of, ten thousand tokens.
@pytest.mark.parametrize(("bias", "tolerance"), [(0.0, 1e-6), (9.0, 1e-5)])
def test_a_hundred_thousand_tokens(bias, tolerance):
    inputs = KERNELS["scan"].inputs(1, 100_000, 5, torch.float32)
    inputs = (logsigmoid(inputs[0] + bias), *inputs[1:])
    ours = differentiate(native.vector_scan, inputs)
    log_a, b, h = (x[0].double().numpy() for x in inputs)
    dh, g = random(1, 100_000, 5, seed=20)[0].numpy(), random(1, 5, seed=21)[0].numpy()
    a, states, dlog_a, db = np.exp(log_a), [h], np.empty_like(b), np.empty_like(b)
    for t in range(len(a)):
        states.append(a[t] * states[-1] + b[t])
    for t in reversed(range(len(a))):
        g = db[t] = dh[t] + g
        g = a[t] * g
        dlog_a[t] = g * states[t]
    truth = map(torch.from_numpy, (np.stack(states[1:]), states[-1], dlog_a, db, g))
    assert max(error(x[0], y) for x, y in zip(ours, truth)) <= tolerance


@every_dtype
@every_kernel
def test_any_split_gives_the_same_bits(kernel, dtype):
    *sequences, h = kernel.required(3, 65, 70, dtype)
    flags = some_flags(3, 65)
    whole, h_T = kernel.run(*sequences, h, flags=flags)
    for part in (slice(0, 1), slice(1, 1), slice(1, 34), slice(34, 65)):
        out, h = kernel.run(*(x[:, part] for x in sequences), h, flags=flags[:, part])
        assert torch.equal(out, whole[:, part])
    assert torch.equal(h, h_T)


@pytest.mark.parametrize("shape", [(1, 700, 64), (3, 65, 1030), (1, 40, 1030)], ids=str)
@every_kernel
def test_threads_change_nothing(kernel, shape):
    inputs, flags, results = kernel.inputs(*shape, torch.float32), some_flags(*shape[:2]), []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(differentiate(lambda *x: kernel.run(*x, flags=flags), inputs))
    assert all(map(torch.equal, *results))


@every_kernel
def test_inputs_need_not_be_contiguous_and_are_left_alone(kernel):
    inputs = (*kernel.inputs(3, 65, 64, torch.float32), some_flags(3, 65))
    scattered = [torch.stack([x, x], -1)[..., 0] for x in inputs]
    for call in (lambda *x: kernel.run(*x), torch.no_grad()(kernel.run)):
        assert all(map(torch.equal, call(*inputs), call(*scattered)))
    run = lambda *x: kernel.run(*x, inputs[3])  # noqa: E731
    assert all(map(torch.equal, *(differentiate(run, x[:3]) for x in (inputs, scattered))))
    assert all(map(torch.equal, inputs, scattered))
    negated = (torch._neg_view(inputs[0]), *inputs[1:])
    assert all(map(torch.equal, kernel.run(*negated), kernel.run(-inputs[0], *inputs[1:])))


def test_outputs_are_fresh_when_there_is_no_token():
    log_a, b, h0 = KERNELS["scan"].inputs(3, 0, 5, torch.float32)
    for h, h_T in (native.vector_scan(log_a, b, h0), native.mingru(b.repeat(1, 1, 2), h0)):
        assert h.shape == (3, 0, 5) and torch.equal(h_T, h0) and h_T.data_ptr() != h0.data_ptr()


@every_kernel
def test_gradcheck(kernel):
    inputs = [x.requires_grad_() for x in kernel.inputs(2, 5, 3, torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: kernel.run(*x, flags=some_flags(2, 5)), inputs)


@every_kernel
def test_what_is_not_differentiable_raises(kernel):
    inputs = [x.requires_grad_() for x in kernel.inputs(2, 5, 3, torch.float64)]
    grads = torch.autograd.grad(kernel.run(*inputs)[1].square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd"):
        sum(g.sum() for g in grads).backward()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        kernel.run(forward_ad.make_dual(inputs[0].detach(), inputs[0].detach()), *inputs[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    check = torch.library.opcheck
    flags = some_flags(3, 6)
    log_a, b, h0 = KERNELS["scan"].inputs(3, 6, 5, dtype)
    for reset in (None, flags >= 2):
        leaves = [x.clone().requires_grad_() for x in (log_a, b, h0)]
        check(native_ops.scan_op, (*leaves, reset))
        h, h_T = native.vector_scan(log_a, b, h0, reset)
        for dh, dh_T in ((h, h_T), (None, h_T), (h, None)):
            check(native_ops.scan_backward_op, (dh, dh_T, log_a, h, h0, reset))
    for cell, name in ((native_ops.POSITIVE, "mingru"), (native_ops.LSTM | 2, "minlstm")):
        p, h0, init = KERNELS[name].inputs(3, 6, 5, dtype)
        leaves = [x.clone().requires_grad_() for x in (p, h0, init)]
        check(native_ops.gated_op, (*leaves, flags, cell, 0.9, 0.75))
        check(native_ops.gated_op, (*leaves[:2], None, None, cell))
        h, h_T = native_ops.gated_op(p, h0, init, flags, cell)
        check(native_ops.gated_backward_op, (h, h_T, p, h, h0, init, flags, cell, 0.9, 0.75))
        check(native_ops.gated_backward_op, (None, h_T, p, h, h0, None, None, cell))


def test_compiles_without_a_graph_break():
    inputs = KERNELS["minlstm"].inputs(2, 6, 5, torch.float32)
    compiled = torch.compile(native.minlstm, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, *(differentiate(f, inputs) for f in (native.minlstm, compiled))))
    assert all(map(torch.equal, native.minlstm(*inputs), torch.no_grad()(compiled)(*inputs)))


def test_wrong_arguments_are_named():
    log_a, b, h0 = KERNELS["scan"].inputs(2, 5, 4, torch.float32)
    p, flags = torch.cat([b, b], -1), torch.zeros(2, 5, dtype=torch.uint8)
    for argument, call in [
        ("log_a", lambda: native.vector_scan(log_a[:, :4], b, h0)),
        ("b", lambda: native.vector_scan(log_a, b[0], h0)),
        ("h0", lambda: native.vector_scan(log_a, b, h0.double())),
        ("reset", lambda: native.vector_scan(log_a, b, h0, flags[:1])),
        ("p", lambda: native.mingru(p.half(), h0)),
        ("init", lambda: native.mingru(p, h0, h0)),
        ("flags", lambda: native.mingru(p, h0, None, flags.int())),
        ("p", lambda: native.minlstm(p, h0)),
    ]:
        with pytest.raises(ValueError, match=rf": {argument} is \("):
            call()
    assert native.supports(log_a, h0, b.bfloat16(), h0.double())
    others = (h0.half(), h0.to("meta"), torch.complex(h0, h0))
    assert not any(native.supports(log_a, x) for x in others)


def test_denormals_are_left_alone():
    torch.set_num_threads(2)
    native.vector_scan(*KERNELS["scan"].inputs(4, 65, 512, torch.float32))
    assert (torch.full((1 << 20,), 1e-39) * 0.5 > 0).all()  # on every thread of the pool


def test_a_library_of_other_sources_is_refused(tmp_path):
    sources, library = tmp_path / "csrc", OPS / "libstatewright.so"
    shutil.copytree(OPS / "csrc", sources)
    assert open_library(library, sources)[1] is None
    (sources / "scan.h").write_text((sources / "scan.h").read_text() + "\n")
    broken, absent = tmp_path / "broken.so", tmp_path / "absent.so"
    broken.write_text("not a library")
    for path, why in ((library, "stale"), (broken, "cannot be used"), (absent, "not built")):
        opened, reason = open_library(path, sources)
        assert opened is None and why in reason and path.name in reason


def test_a_failing_compiler_leaves_no_library_and_no_error(tmp_path, monkeypatch):
    ops = tmp_path / "statewright" / "ops"
    shutil.copytree(OPS / "csrc", ops / "csrc")
    shutil.copy(OPS / "native_digest.py", ops)
    shutil.copy(Path(__file__).parents[1] / "setup.py", tmp_path)
    (ops / "libstatewright.so").write_text("the previous build")
    monkeypatch.setenv("CC", "false")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    build = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert build.returncode == 0 and "torch path" in build.stdout + build.stderr
    assert not (ops / "libstatewright.so").exists()
