"""What a repair costs in a prefill, against the plain model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from statewright.bench.protocol import Case
from statewright.models import StatewrightConfig, StatewrightForCausalLM

MIXERS = {
    "mamba2": "mamba2:state_size=64:head_dim=64",
    "gla": "gla:num_heads=4",
    "mingru": "mingru:expansion=2",
}


def cases(quick: bool) -> Iterator[Case]:
    """Prefill under each repair for three recurrences."""
    layers, T = (2, 512) if quick else (6, 4096)
    for name, mixer in MIXERS.items():
        yield prefill(name, model_of(mixer, layers), T)


def model_of(mixer: str, num_layers: int) -> StatewrightForCausalLM:
    torch.manual_seed(0)
    config = StatewrightConfig(
        vocab_size=257,
        hidden_size=256,
        num_hidden_layers=num_layers,
        mixer=mixer,
        conv_kernel=0,
        mlp_ratio=0.0 if "mamba2" in mixer else 4.0,
    )
    return StatewrightForCausalLM(config).eval()


def prefill(name: str, model: StatewrightForCausalLM, T: int) -> Case:
    """One text of T tokens, logits of the last; limits that bind, so that nothing is skipped."""
    ids = torch.randint(257, (1, T), generator=torch.Generator().manual_seed(0))
    policies = {
        "floor: plain": "none",
        "forgetmore": "forgetmore:decay=0.999:write=0.75",
        "statenorm every 64": "statenorm:limit=0.01",
        "statewindow 512": "statewindow:length=512",
    }

    def reading(policy: str) -> Callable:
        def run() -> None:
            with torch.no_grad():
                model(ids, policy=policy, logits_to_keep=1)

        return run

    methods = {label: reading(policy) for label, policy in policies.items()}
    return Case(f"{name} prefill of {T} tokens under a repair", "floor: plain", methods)
