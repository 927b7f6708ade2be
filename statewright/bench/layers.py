"""minGRU and minLSTM layers against the projection alone, torch's fused RNNs and mingru-pytorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from statewright import ops
from statewright.bench import peers
from statewright.bench.protocol import Case, error_of
from statewright.mixers import build_mixer

SHAPES = [(16, T, 64) for T in (512, 1024, 2048, 4096)] + [(64, 1024, 128), (8, 4096, 256)]


def cases(quick: bool) -> Iterator[Case]:
    """Forward+backward of one layer, B x T x D, float32, the same x for all."""
    for shape in SHAPES[:1] if quick else SHAPES:
        for kind in ("mingru", "minlstm"):
            yield layer(kind, *shape)


def layer(kind: str, B: int, T: int, D: int) -> Case:
    torch.manual_seed(0)
    x, g = torch.randn(B, T, D, requires_grad=True), torch.randn(B, T, D)
    # Without a learned initial state and biases it is the peer's layer.
    ours = build_mixer(f"{kind}:learned_init=false:bias=false:expansion=1", D)
    projection, wide_g = ours.in_proj, torch.randn(B, T, ours.in_proj.out_features)
    methods: dict[str, Callable] = {
        "floor: projection": _both(projection, x, wide_g),
        "ours": _both(ours, x, g),
        "nn.GRU": _both(nn.GRU(D, D, batch_first=True), x, g),
        "nn.LSTM": _both(nn.LSTM(D, D, batch_first=True), x, g),
    }
    peer = peers.minimal_layer(kind, D)
    if peer is not None:
        methods["mingru-pytorch"] = _both(peer, x, g)
    wide = build_mixer(f"{kind}:learned_init=false:bias=false:expansion=1", D).double()
    wide.load_state_dict(ours.state_dict())
    with torch.no_grad(), ops.default_backend("torch"):
        error = error_of(ours(x)[0], wide(x.double())[0])
    name = f"{kind} layer {B}x{T}x{D}"
    return Case(name, "floor: projection", methods, {"ours": error}, {"ours": 2e-6})


def _both(module: nn.Module, x: Tensor, g: Tensor) -> Callable[[], None]:
    leaves = [x, *module.parameters()]

    def run() -> None:
        y = module(x)
        y = y if isinstance(y, Tensor) else y[0]
        torch.autograd.grad(y, leaves, g)

    return run
