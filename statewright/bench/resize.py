"""What a larger state costs: prefill of an expanded Mamba-2 or GLA against its added FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from statewright.bench.protocol import Case, error_of
from statewright.models import StatewrightConfig, StatewrightForCausalLM
from statewright.models.resize import resize

_CHUNK = 64


def cases(quick: bool) -> Iterator[Case]:
    """The 130M shape of Mamba-2 and GLA, every sixth layer with a state four times as large."""
    layers, length = (6, 256) if quick else (24, 2048)
    for mixer, init in (("mamba2", "zero"), ("gla", "inherit")):
        yield prefill(mixer, init, layers, length)


def prefill(mixer: str, init: str, layers: int, length: int) -> Case:
    """Both models on the same ids; the case's name says what the FLOPs alone would allow."""
    torch.manual_seed(0)
    options = {"conv_kernel": 0, "mlp_ratio": 0.0} if mixer == "mamba2" else {"mlp_ratio": 2.0}
    config = StatewrightConfig(
        vocab_size=1024, hidden_size=768, num_hidden_layers=layers, mixer=mixer, **options
    )
    small = StatewrightForCausalLM(config).eval()
    large = resize(small, 4.0, "every:6", init)
    ids = torch.randint(1024, (1, length))
    allowed = flops(large, length) / flops(small, length)
    with torch.no_grad():
        got, want = large(ids).logits, (large if init != "zero" else small)(ids).logits
        split = torch.cat([(out := large(ids[:, :100])).logits,
                           large(ids[:, 100:], state=out.state).logits], 1)  # fmt: skip
    errors = {"expanded": max(error_of(got, want), error_of(split, got))}
    name = f"{mixer} prefill, {layers} layers, T {length}, expanded: FLOPs x {allowed:.3f}"
    methods = {"base": _reader(small, ids), "expanded": _reader(large, ids)}
    return Case(name, "base", methods, errors, {"expanded": 1e-4})


def flops(model: StatewrightForCausalLM, length: int) -> float:
    """Multiply-adds of a prefill of one row: projections, and the chunked scan of each layer."""
    total = 0.0
    for block in model.model.layers:
        mixer = block.mixer
        H, K, V = mixer.num_heads, mixer.key_size, mixer.value_size
        groups = getattr(mixer, "num_groups", H)
        chunk = min(_CHUNK, length)
        scores = groups * chunk * K + H * chunk * V
        total += length * (scores + 2 * H * K * V)
    matrices = (p for n, p in model.named_parameters() if p.dim() == 2 and "embeddings" not in n)
    return total + length * sum(p.numel() for p in matrices)


def _reader(model: StatewrightForCausalLM, ids: torch.Tensor) -> Callable[[], None]:
    @torch.no_grad()
    def run() -> None:
        model(ids)

    return run
