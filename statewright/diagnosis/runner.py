"""A model being read: called on pieces of a text, its gates watched where they can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from statewright.diagnosis.gates import Recorder, linear_layers, watched
from statewright.diagnosis.schedule import LARGEST_LOGITS
from statewright.evaluation.losses import nats
from statewright.hf.arguments import by_name
from statewright.models import StatewrightForCausalLM
from statewright.policies import Policy, build_policy
from statewright.precision import device_of
from statewright.state import ModelState

_LARGEST_BATCH = 2**14


class Runner:
    """Calls a host model on pieces of a text, with a policy where it is one of ours."""

    def __init__(self, host: Any, policy: Policy | str | None = None) -> None:
        self.host, self.ours = host, isinstance(host, StatewrightForCausalLM)
        if not self.ours and build_policy(policy) is not None:
            raise ValueError(
                "policy: recurrent policies act on our own models; `statewright convert` makes "
                "one of a Mamba, Mamba-2 or GLA checkpoint"
            )
        if self.ours:
            policy = host.config.policy if policy is None else policy
        self.policy = build_policy(policy)
        self.recorder = Recorder()
        self.names = linear_layers(host.model.layers) if self.ours else []
        self._probed = watched(self.policy, self.recorder) if self.names else None
        self.device = device_of(host)

    def __call__(self, ids: Tensor, state: ModelState | None = None, watch: bool = False) -> Any:
        ids = ids.to(self.device, torch.long)
        if not self.ours:
            return self.host(ids, state)
        policy = self._probed if watch and self._probed is not None else self.policy
        policy = "none" if policy is None else policy
        return self.host(ids, state=state, policy=policy, **by_name(self.host))

    def windows(self, ids: Tensor, look: Callable[[ModelState], None] | None = None) -> Tensor:
        """Losses of windows (rows, L + 1) from an empty state: (rows, L), a few rows at a time.

        `look` is shown the states after them."""
        losses = []
        for rows in ids.split(self.batch_of(ids.shape[1] - 1)):
            out = self(rows[:, :-1])
            losses.append(nats(out.logits, rows[:, 1:]).cpu())
            if look is not None:
                look(out.state)
        return torch.cat(losses)

    def batch_of(self, length: int) -> int:
        """Rows of that many tokens that are read at once, by the size of their logits."""
        return max(1, min(_LARGEST_BATCH, LARGEST_LOGITS // self.vocab_size) // length)

    @property
    def vocab_size(self) -> int:
        return self.host.config.get_text_config(decoder=True).vocab_size
