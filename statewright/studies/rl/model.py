"""Decision models: a decoder of ours over returns, observations and actions (arXiv:2106.01345)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from statewright.mixers import Attention
from statewright.models import StatewrightConfig, StatewrightModel
from statewright.models.block import layer_policies
from statewright.policies import Policy, build_policy, eviction_of
from statewright.shapes import require
from statewright.state import ModelState
from statewright.studies.rl.episodes import Recording, Windows

# Returns are divided by it, as in the Decision Transformer, for all three tasks.
RETURN_SCALE = 1000.0


@dataclass(frozen=True, eq=False)
class Memory:
    """What acting carries from step to step, a value: the model's state and two short vectors.

    action (B, A): the last one; togo, target (B,): return still asked for, and asked for at an
    episode's start. A model without a state has None.
    """

    state: ModelState | None
    action: Tensor
    togo: Tensor
    target: Tensor

    def rows(self, index: list[int]) -> Memory:
        """Those rows of the batch alone."""
        state = None if self.state is None else self.state.rows(index)
        return Memory(state, self.action[index], self.togo[index], self.target[index])

    @property
    def nbytes(self) -> int:
        """Bytes of everything carried."""
        tensors = (self.action, self.togo, self.target)
        own = sum(t.numel() * t.element_size() for t in tensors)
        return own + (0 if self.state is None else self.state.nbytes)


class Behaviour(Protocol):
    """Whatever can act in a batch of environments."""

    def begin(self, rows: int, target: float) -> Memory: ...

    def act(
        self, memory: Memory, observation: Tensor, reward: Tensor, starts: Tensor
    ) -> tuple[Tensor, Memory]: ...


class Normalised(nn.Module):
    """Observations in deviations from their training data's mean; both are saved with the model."""

    def __init__(self, observation_size: int, action_size: int) -> None:
        super().__init__()
        self.observation_size, self.action_size = observation_size, action_size
        self.register_buffer("mean", torch.zeros(observation_size))
        self.register_buffer("deviation", torch.ones(observation_size))

    def fit_scale(self, recording: Recording) -> None:
        """Take mean and deviation from the recording."""
        mean, deviation = (torch.from_numpy(a).to(self.mean) for a in recording.scale())
        self.mean.copy_(mean)
        self.deviation.copy_(deviation)

    def normalised(self, observations: Tensor) -> Tensor:
        return (observations.to(self.mean) - self.mean) / self.deviation

    def begin(self, rows: int, target: float) -> Memory:
        """The memory of `rows` environments before their first step, asked for return `target`."""
        wanted = self.mean.new_full((rows,), target)
        action = self.mean.new_zeros(rows, self.action_size)
        return Memory(self.init_state(rows), action, wanted, wanted)

    def init_state(self, batch_size: int) -> ModelState | None:
        return None


class DecisionModel(Normalised):
    """a_t = tanh(W h_t), h_t read off at s_t in the stream R_0 s_0 a_0 R_1 s_1 a_1 ...

    R is the return-to-go, s the observation, a the action (arXiv:2106.01345, sec. 3), each a token
    of width D from a linear map of its own, and the mixer is any of ours. An episode's first R
    resets the state. Differs from the Decision Transformer: no embedding of the time step, which
    would end acting at its last row, and acting goes on from a state instead of reading the last K
    steps again; a Transformer's list has a window of 3 K tokens instead.
    """

    def __init__(self, config: StatewrightConfig, observation_size: int, action_size: int) -> None:
        super().__init__(observation_size, action_size)
        self.config, D = config, config.hidden_size
        self.embed_return = nn.Linear(1, D)
        self.embed_observation = nn.Linear(observation_size, D)
        self.embed_action = nn.Linear(action_size, D)
        self.trunk = StatewrightModel(config)
        self.trunk.set_input_embeddings(nn.Identity())  # there are no ids
        self.head = nn.Linear(D, action_size)

    def init_state(self, batch_size: int) -> ModelState:
        return self.trunk.init_state(batch_size)

    def forward(
        self, windows: Windows, state: ModelState | None = None
    ) -> tuple[Tensor, ModelState]:
        """Whole windows at once: actions (B, T, A) and the state after the last action.

        Raises ValueError for sizes that are not this model's.
        """
        B, T, _ = require(
            "DecisionModel", "observations", windows.observations, "B T O", O=self.observation_size
        )
        require("DecisionModel", "actions", windows.actions, "B T A", B=B, T=T, A=self.action_size)
        tokens = [
            self._return_token(windows.togo),
            self.embed_observation(self.normalised(windows.observations)),
            self.embed_action(windows.actions.to(self.mean)),
        ]
        reset = torch.zeros(B, T, 3, dtype=torch.bool, device=self.mean.device)
        reset[..., 0] = windows.starts
        reset = reset.flatten(1) if bool(windows.starts.any()) else None
        out = self.trunk(
            inputs_embeds=torch.stack(tokens, 2).flatten(1, 2), state=state, reset=reset
        )
        return self.head(out.last_hidden_state[:, 1::3]).tanh(), out.state

    @torch.no_grad()
    def act(
        self,
        memory: Memory,
        observation: Tensor,
        reward: Tensor,
        starts: Tensor,
        policy: Policy | str | None = None,
    ) -> tuple[Tensor, Memory]:
        """One time step of B environments: actions (B, A) and the memory to go on from.

        observation (B, O); reward (B,), what the last action brought; starts (B,) bool: rows in
        which an episode begins, whose past is forgotten. Three tokens are read: the last action
        (masked where there is none), the return-to-go and the observation.
        """
        B, _ = require(
            "act", "observation", observation, "B O", B=len(memory.togo), O=self.observation_size
        )
        starts = starts.to(self.mean.device)
        togo = torch.where(starts, memory.target, memory.togo - reward.to(memory.togo))
        tokens = torch.stack(
            [
                self.embed_action(memory.action),
                self._return_token(togo),
                self.embed_observation(self.normalised(observation)),
            ],
            1,
        )
        flags: dict[str, Any] = {}
        if bool(starts.any()):
            no, yes = torch.zeros_like(starts), torch.ones_like(starts)
            flags["attention_mask"] = torch.stack([~starts, yes, yes], 1)
            flags["reset"] = torch.stack([no, starts, no], 1)
        out = self.trunk(inputs_embeds=tokens, state=memory.state, policy=policy, **flags)
        action = self.head(out.last_hidden_state[:, -1]).tanh()
        return action, replace(memory, state=out.state, action=action, togo=togo)

    def check_policy(self, policy: Policy | str) -> None:
        """ValueError for a policy that has nothing to act on in this model."""
        chosen = build_policy(policy)
        lists = any(isinstance(block.mixer, Attention) for block in self.trunk.layers)
        if eviction_of(chosen) is not None and not lists:
            raise ValueError(
                f"policy={policy!r} bounds lists of keys and values, but this model has none"
            )
        layer_policies(self.trunk.layers, chosen)

    def _return_token(self, togo: Tensor) -> Tensor:
        return self.embed_return((togo.to(self.mean) / RETURN_SCALE).unsqueeze(-1))


class Cloning(Normalised):
    """Behaviour cloning: an MLP from the observation to the action, without past or return."""

    def __init__(
        self, hidden_size: int, layers: int, dropout: float, observation_size: int, action_size: int
    ) -> None:
        super().__init__(observation_size, action_size)
        parts: list[nn.Module] = []
        size = observation_size
        for _ in range(layers):
            parts += [nn.Linear(size, hidden_size), nn.ReLU(), nn.Dropout(dropout)]
            size = hidden_size
        self.layers = nn.Sequential(*parts, nn.Linear(size, action_size), nn.Tanh())

    def forward(self, windows: Windows, state: None = None) -> tuple[Tensor, None]:
        return self.layers(self.normalised(windows.observations)), None

    @torch.no_grad()
    def act(
        self, memory: Memory, observation: Tensor, reward: Tensor, starts: Tensor
    ) -> tuple[Tensor, Memory]:
        return self.layers(self.normalised(observation)), memory


class RandomActions(Normalised):
    """Actions drawn evenly from [-1, 1], from a generator of its own."""

    def __init__(self, observation_size: int, action_size: int, seed: int) -> None:
        super().__init__(observation_size, action_size)
        self.generator = torch.Generator().manual_seed(seed)

    def act(
        self, memory: Memory, observation: Tensor, reward: Tensor, starts: Tensor
    ) -> tuple[Tensor, Memory]:
        drawn = torch.rand(memory.action.shape, generator=self.generator)
        return 2 * drawn - 1, memory
