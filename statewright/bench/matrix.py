"""The matrix scan and whole Mamba-2 models against transformers' torch path."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statewright import ops
from statewright.bench.protocol import Case, error_of
from statewright.ops.ref import matrix_scan as definition

# Mamba-2 130M: 24 heads, one group, K = d_state 128, V = head_dim 64; GLA as in the paper's 340M.
MAMBA2, GLA = (1, 24, 128, 64), (4, 4, 64, 128)


def cases(quick: bool) -> Iterator[Case]:
    """Scans alone, then prefill, decoding and training of a Mamba-2 of the 130M shape."""
    for T in (512,) if quick else (512, 2048):
        yield scan("mamba2", T, *MAMBA2, backward=False)
        yield scan("mamba2", T, *MAMBA2, backward=True)
    yield scan("gla", 512 if quick else 2048, *GLA, backward=False)
    yield scan("gla", 512 if quick else 2048, *GLA, backward=True)
    layers = 2 if quick else 24
    for T in (512,) if quick else (512, 2048):
        yield prefill(layers, T)
    yield decode(layers)
    yield training(2 if quick else 4, 512)


def scan(kind: str, T: int, G: int, H: int, K: int, V: int, backward: bool) -> Case:
    """One scan, batch 1; the peer is transformers' chunk scan, or a token loop for GLA."""
    q, k, v, log_a, S0, dt, A = _inputs(T, G, H, K, V, per_key=kind == "gla")
    leaves = [q, k, v, log_a]
    g = torch.randn(1, T, H, V)

    def wrapped(call: Callable[[], Tensor]) -> Callable:
        if not backward:
            return torch.no_grad()(call)
        return lambda: torch.autograd.grad(call(), leaves, g, allow_unused=True)

    calls: dict[str, Callable[[], Tensor]] = {}
    for name in ops.MATRIX_BACKENDS:
        if name != "ref":
            run = partial(ops.matrix_scan, q, k, v, log_a, S0, backend=name)
            calls[name] = lambda run=run: run()[0]
    if kind == "mamba2":
        from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

        calls["transformers"] = lambda: mamba2_chunk_scan(v / dt.unsqueeze(-1), dt, A, k, q, 256)
        if backward:  # its inputs are x, dt, B, C; x alone carries the gradient of v and more
            x = (v / dt.unsqueeze(-1)).detach().requires_grad_()
            step = dt.clone().requires_grad_()
            peer = [x, step, k, q]
            grad = partial(torch.autograd.grad, inputs=peer, grad_outputs=g)
            calls.pop("transformers")
            theirs = lambda: grad(mamba2_chunk_scan(x, step, A, k, q, 256))  # noqa: E731
    else:
        calls["token loop"] = lambda: definition(q, k, v, log_a, S0)[0]
    wide = [t.detach().double() for t in (q, k, v, log_a, S0)]
    with torch.no_grad():
        want = ops.matrix_scan(*wide, backend="torch")[0]
        errors = {name: error_of(call(), want) for name, call in calls.items()}
    methods = {name: wrapped(call) for name, call in calls.items()}
    if backward and kind == "mamba2":
        methods["transformers"] = theirs
    limits = {"torch": 5e-6, "native": 5e-7}
    tolerance = {name: limits[name] for name in errors if name in limits}
    direction = "forward+backward" if backward else "forward"
    name = f"{kind} scan {direction}, T {T}, {H} heads, K {K}, V {V}"
    floor = "native" if "native" in methods else "torch"
    return Case(name, floor, methods, errors, tolerance)


def _inputs(T: int, G: int, H: int, K: int, V: int, per_key: bool) -> list[Tensor]:
    """Decays as at initialisation: Mamba-2's dt and A, or GLA's logsigmoid / 16."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, k, x = normal(1, T, G, K), normal(1, T, G, K), normal(1, T, H, V)
    dt = torch.rand(1, T, H, generator=generator) * 0.099 + 0.001
    A = -(1 + 15 * torch.rand(H, generator=generator))
    log_a = F.logsigmoid(normal(1, T, H, K)) / 16 if per_key else (dt * A).unsqueeze(-1)
    v = x if per_key else x * dt.unsqueeze(-1)
    leaves = [t.requires_grad_() for t in (q, k, v, log_a)]
    return [*leaves, torch.zeros(1, H, K, V), dt, A]


def pair(layers: int) -> tuple[nn.Module, nn.Module]:
    """A random Mamba-2 of the 130M shape in transformers, and ours with its weights."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    from statewright.models import load

    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=50288,
        hidden_size=768,
        num_hidden_layers=layers,
        state_size=128,
        head_dim=64,
        num_heads=24,
        n_groups=1,
        tie_word_embeddings=True,
    )
    theirs = Mamba2ForCausalLM(config).eval()
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        return load(directory), theirs


def _projections(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """The matrix products alone: the floor of any implementation."""

    def run() -> None:
        for layer in model.model.layers:
            mixer = layer.mixer
            mixer.in_proj(x)
            mixer.out_proj(x.repeat(1, 1, 2))
        model.lm_head(x[:, -1:])

    return torch.no_grad()(run)


def _gate(ours: nn.Module, theirs: nn.Module) -> tuple[dict[str, float], dict[str, float]]:
    ids = torch.randint(50000, (1, 100))
    with torch.no_grad():
        return {"ours": error_of(ours(ids).logits, theirs(ids).logits)}, {"ours": 2e-4}


def prefill(layers: int, T: int) -> Case:
    ours, theirs = pair(layers)
    ids, x = torch.randint(50000, (1, T)), torch.randn(1, T, 768)
    half = copy.deepcopy(ours).to(torch.bfloat16)
    methods: dict[str, Callable[[], Any]] = {
        "floor: projections": _projections(ours, x),
        "ours": torch.no_grad()(lambda: ours(ids, logits_to_keep=1)),
        "ours, bfloat16": torch.no_grad()(lambda: half(ids, logits_to_keep=1)),
        "transformers": torch.no_grad()(lambda: theirs(ids, logits_to_keep=1, use_cache=True)),
    }
    name = f"Mamba-2 prefill, {layers} layers, width 768, T {T}"
    return Case(name, "floor: projections", methods, *_gate(ours, theirs))


def decode(layers: int) -> Case:
    """Ten tokens, one by one, from the state after 64."""
    from statewright.hf.arguments import cache_argument, cache_in

    ours, theirs = pair(layers)
    ids, x = torch.randint(50000, (1, 64)), torch.randn(1, 1, 768)
    token = ids[:, :1]
    with torch.no_grad():
        state = ours(ids).state
        cache = cache_in(theirs(ids, use_cache=True))

    def run_ours() -> None:
        s = state
        for _ in range(10):
            s = ours(token, state=s).state

    def run_theirs() -> None:
        given = {cache_argument(theirs): cache}
        for _ in range(10):
            theirs(token, use_cache=True, **given)

    floor = _projections(ours, x)
    methods = {
        "floor: projections": lambda: [floor() for _ in range(10)],
        "ours": torch.no_grad()(run_ours),
        "transformers": torch.no_grad()(run_theirs),
    }
    name = f"Mamba-2 decode, {layers} layers, width 768, 10 tokens"
    return Case(name, "floor: projections", methods, *_gate(ours, theirs))


def training(layers: int, T: int) -> Case:
    """Forward, loss and backward."""
    ours, theirs = pair(layers)
    gate = _gate(ours, theirs)
    ids = torch.randint(50000, (1, T))

    def step(model: nn.Module) -> Callable:
        def run() -> None:
            model.train()
            logits = model(ids).logits
            F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
            model.zero_grad(set_to_none=True)
            model.eval()

        return run

    methods = {"ours": step(ours), "transformers": step(theirs)}
    return Case(f"Mamba-2 training step, {layers} layers, width 768, T {T}", "ours", methods, *gate)
