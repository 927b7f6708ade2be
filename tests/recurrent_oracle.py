"""Token loops in plain float64, written from the formulas: what every repair must equal."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from statewright import laws
from statewright.mixers import build_mixer
from statewright.models import StatewrightConfig, StatewrightForCausalLM
from statewright.policies import build_policy
from statewright.policies.recurrent import Gates
from statewright.state import MatrixState, VectorState

D = 6


def loop(tokens: dict[str, Tensor], kind: str, h0: Tensor, **options) -> tuple[Tensor, Tensor]:
    """One recurrence over (B, T): kind is "forgetmore", "statenorm", "statewindow" or "plain".

    Matrix: q, k, log_a (B, T, H, K), v (B, T, H, V). Vector: v, log_a (B, T, D).
    """
    carried, inserted, outputs = h0.clone(), [], []
    T = tokens["v"].shape[1]
    for t in range(T):
        log_a, new = tokens["log_a"][:, t], written(tokens, t)
        if kind == "forgetmore":
            log_a = log_a + math.log(options["decay"])
            new = new * options["write"]
        if kind == "deltascale":
            log_a, new = log_a * options["factor"], new * options["factor"]
        carried = spread(log_a, h0).exp() * carried + new
        if kind == "statenorm" and (options["seen"] + t + 1) % options["every"] == 0:
            axes = tuple(range(1 if h0.dim() == 2 else 2, h0.dim()))
            norm = torch.linalg.vector_norm(carried, dim=axes, keepdim=True)
            carried = torch.where(
                norm > options["limit"], carried * options["limit"] / norm, carried
            )
        read = carried
        inserted.append(new)
        if kind == "statewindow":
            read = banded(tokens, inserted, t, options["length"], h0)
        outputs.append(
            read if h0.dim() == 2 else torch.einsum("bhkv,bhk->bhv", read, tokens["q"][:, t])
        )
    return torch.stack(outputs, 1), carried


def banded(
    tokens: dict[str, Tensor], inserted: list[Tensor], t: int, r: int, like: Tensor
) -> Tensor:
    """The last r insertions, each decayed by what came after it."""
    total = torch.zeros_like(like)
    for i in range(max(0, t - r + 1), t + 1):
        later = sum((spread(tokens["log_a"][:, j], like) for j in range(i + 1, t + 1)), 0 * like)
        total = total + later.exp() * inserted[i]
    return total


def written(tokens: dict[str, Tensor], t: int) -> Tensor:
    v = tokens["v"][:, t]
    if "k" not in tokens:
        return v
    return tokens["k"][:, t].unsqueeze(-1) * v.unsqueeze(-2)


def spread(log_a: Tensor, like: Tensor) -> Tensor:
    return log_a if like.dim() == 2 else log_a.unsqueeze(-1)


def bounded(text: str, policy: str, dtype: torch.dtype = torch.float64) -> laws.Bounded:
    torch.manual_seed(0)
    return laws.Bounded(build_mixer(text, D).to(dtype), build_policy(policy))


def recurrence(kind: str, T: int = 23, seed: int = 0) -> tuple[dict, Gates, object]:
    """Random gates of one recurrence: tokens for the oracle, Gates and a state for us."""
    g = torch.Generator().manual_seed(seed)
    B, H, K, V = 2, 3, 4, 5
    seen = torch.full((B,), 11)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    if kind == "vector":
        v, log_a = draw(B, T, K), -draw(B, T, K).abs()
        gates = Gates(v, log_a, seen, has_delta=True)
        return {"v": v, "log_a": log_a}, gates, VectorState(h=draw(B, K), seen=seen)
    q, k, v = draw(B, T, H, K), draw(B, T, H, K), draw(B, T, H, V)
    log_a = -draw(B, T, H, 1 if kind == "head" else K).abs()
    tokens = {"q": q, "k": k, "v": v, "log_a": log_a.expand(B, T, H, K)}
    gates = Gates(v, log_a, seen, q, k, has_delta=True)
    return tokens, gates, MatrixState(S=draw(B, H, K, V), seen=seen)


def model(num_layers: int, policy: str | None = None, **options) -> StatewrightForCausalLM:
    torch.manual_seed(0)
    config = StatewrightConfig(
        vocab_size=97,
        hidden_size=16,
        num_hidden_layers=num_layers,
        mixer="mamba2:state_size=8:head_dim=8",
        conv_kernel=0,
        mlp_ratio=0,
        policy=policy,
        **options,
    )
    return StatewrightForCausalLM(config).double().eval()
