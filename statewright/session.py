"""A reading and writing model with a memory: the only mutable object.

feed, generate, fork, rewind, save, load. The States inside are immutable, so a fork costs
nothing and a snapshot is a reference; what costs is kept within a byte budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from statewright.hf.arguments import by_name
from statewright.hf.host import ForeignModel, as_host
from statewright.history import History, Snapshot
from statewright.mixers import Attention, Mixer
from statewright.models.sampling import Sampling, whole
from statewright.policies import Policy, build_policy, eviction_of, policy_spec, recurrent_parts
from statewright.shapes import require
from statewright.state import State
from statewright.state_file import StateFile, read_state_file, save_state
from statewright.token_hash import RollingHash

_CHUNK = 1024


class Session:
    """A model, its state, and the way back.

    `feed(ids)` reads in pieces of at most `chunk` tokens; every call and every piece is a
    recorded split point, so that `rewind` and a second reading at the same splits give
    bit-identical logits. `snapshot_bytes` bounds the snapshots that `rewind` starts from.
    `batch_size` is that of `state`, or 1. The model is ours or any transformers causal LM
    (`hf.host.ForeignModel`). `policy`, a Policy or its spec, holds in every call; None is the
    config's default, "none" is none. Raises ValueError for a policy that has nothing to act on,
    and a batch_size that contradicts the state.

    >>> session = Session(StatewrightForCausalLM(StatewrightConfig(hidden_size=8)))
    >>> session.feed(torch.randint(256, (20,))).shape, session.generate(5).shape
    (torch.Size([1, 257]), torch.Size([1, 5]))
    """

    def __init__(
        self,
        model: nn.Module,
        policy: Policy | str | None = None,
        state: State | None = None,
        batch_size: int | None = None,
        chunk: int = _CHUNK,
        snapshot_bytes: int = 64 * 1024**2,
    ) -> None:
        if chunk < 1:
            raise ValueError(f"Session: chunk={chunk}, expected at least 1")
        self.model: Any = as_host(model).eval()
        self.policy = _policy_of(self.model, policy)
        self._donates = _donates(self.model, self.policy)
        self.chunk = chunk
        if state is None:
            state = self.model.init_state(1 if batch_size is None else batch_size)
        elif batch_size not in (None, state.batch_size):
            raise ValueError(
                f"Session: batch_size={batch_size}, but the state has {state.batch_size} rows"
            )
        self.batch_size, self._device = state.batch_size, state.seen.device
        self._state: State | None = state.detach()
        self._owned = False  # whether nobody else can hold the state, so that a call may consume it
        self._logits: Tensor | None = None
        self._hash = RollingHash(state.batch_size)
        self._position = 0
        self._history = History(self._snapshot(), snapshot_bytes)

    @property
    def state(self) -> State:
        """The current state, a value: whatever the session reads next, it stays as it is."""
        self._owned = False
        return self._held()

    @property
    def nbytes(self) -> int:
        """Bytes of the current state alone."""
        return self._held().nbytes

    @property
    def seen(self) -> int:
        """Tokens read by this session and the one it was loaded from."""
        return self._position

    @property
    def reach(self) -> int:
        """The earliest number of tokens that `rewind` can go back to."""
        return self._history.reach

    @property
    def last_ids(self) -> np.ndarray:
        """The last tokens read (B, at most 8): a character may be open in them."""
        return self._hash.last

    @property
    def logits(self) -> Tensor | None:
        """Logits (B, vocabulary) for the next token; None before the first token."""
        return self._logits

    def feed(self, ids: Tensor | list[int]) -> Tensor:
        """Read ids (T,) or (B, T); returns the logits (B, vocabulary) after the last one.

        Raises ValueError for a wrong number of rows, an id beyond the vocabulary, or if nothing
        has been read yet and T = 0.
        """
        ids = self._ids(ids)
        for begin in range(0, ids.shape[1], self.chunk):
            self._read(ids[:, begin : begin + self.chunk])
        if self._logits is None:
            raise ValueError("feed: no tokens read yet, and none given")
        return self._logits

    def stream(
        self,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop: int | None = None,
    ) -> Iterator[Tensor]:
        """Write: yield ids (B,) one token at a time, each already read when it is yielded.

        temperature 0 is greedy. Randomness comes from `seed` and the position alone, so a
        rewound, forked or reloaded session writes the same again. With `stop`, ends once
        every row has written that token. Raises ValueError at once for settings outside their
        ranges (see `Sampling`), and before the first token is read.
        """
        if self._logits is None:
            raise ValueError("generate: nothing has been read yet; feed a prompt first")
        sampling = Sampling(temperature, top_k, top_p, seed)
        return self._written(whole("max_new_tokens", max_new_tokens), sampling, stop)

    def _written(self, max_new_tokens: int, sampling: Sampling, stop: int | None) -> Iterator:
        stopped = torch.zeros(self.batch_size, dtype=torch.bool)
        for _ in range(max_new_tokens):
            assert self._logits is not None  # `stream` has looked
            ids = sampling.draw(self._logits, self._position)
            self._read(ids.unsqueeze(1))
            yield ids
            if stop is not None:
                stopped |= ids.cpu() == stop
                if bool(stopped.all()):
                    return

    def generate(self, max_new_tokens: int, **options: Any) -> Tensor:
        """As `stream`, all at once: ids (B, new tokens)."""
        written = list(self.stream(max_new_tokens, **options))
        if not written:
            return torch.empty(self.batch_size, 0, dtype=torch.long)
        return torch.stack(written, 1)

    def fork(self) -> Session:
        """A second session at the same point; neither ever sees the other's tokens."""
        self._owned = False
        other = Session.__new__(Session)
        other.__dict__.update(self.__dict__)
        other._hash = self._hash.copy()
        other._history = self._history.fork()
        return other

    def rewind(self, to: int) -> Self:
        """Go back to when `to` tokens had been read: nearest snapshot, then the tail again.

        The tail is replayed at its recorded split points, so state and logits are bit-identical
        to those of then. Raises ValueError beyond `reach` or ahead of `seen`.
        """
        if not self.reach <= to <= self._position:
            raise ValueError(
                f"rewind: to={to}, but this session reaches back to {self.reach} "
                f"and has read {self._position} tokens"
            )
        snapshot, pieces = self._history.rewind(to)
        self._state, self._logits, self._owned = snapshot.state, snapshot.logits, False
        self._hash, self._position = snapshot.hash.copy(), snapshot.position
        for piece in pieces:
            self._read(torch.from_numpy(piece).to(self._device))
        return self

    def save(self, path: str | Path, about: dict[str, Any] | None = None) -> None:
        """Write a state file from which `Session.load` continues bit-identically."""
        beside = {} if self._logits is None else {"logits": self._logits}
        entries = {**(about or {}), "position": self._position, "chunk": self.chunk}
        entries["last_ids"] = self.last_ids.tolist()
        save_state(
            self._held(),
            path,
            self.model,
            policy=None if self.policy is None else policy_spec(self.policy),
            tokens_hash=self._hash.text,
            beside=beside,
            about=entries,
        )

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: nn.Module,
        policy: Policy | str | None = None,
        change_policy: bool = False,
        **options: Any,
    ) -> Session:
        """Continue from a file written by `save` under the same model (ValueError otherwise).

        policy None is the file's own; another is refused, unless `change_policy` says that the
        state goes on under it (a smaller budget then holds from the next call on).
        """
        model = as_host(model)
        file = _read_file(path, model, policy, change_policy)
        options.setdefault("chunk", file.about.get("chunk", _CHUNK))
        session = cls(model, file.policy if policy is None else policy, file.state, **options)
        session._logits = file.beside.get("logits")
        last = file.about.get("last_ids")
        session._hash = RollingHash(file.state.batch_size, file.tokens_hash, last)
        session._position = file.about.get("position", int(file.state.seen.max()))
        session._history = History(session._snapshot(), session._history.budget)
        return session

    @property
    def tokens_hash(self) -> str:
        """A hash of all tokens read, whatever the splits."""
        return self._hash.text

    def _snapshot(self, copied: bool = False) -> Snapshot:
        state = self._held().map(torch.clone) if copied else self._held()
        return Snapshot(self._position, state, self._logits, self._hash.copy())

    def _ids(self, ids: Tensor | list[int]) -> Tensor:
        ids = torch.as_tensor(ids, dtype=torch.long, device=self._device)
        ids = ids.unsqueeze(0) if ids.dim() == 1 else ids
        require("feed", "ids", ids, "B T", B=self.batch_size)
        size = self.model.config.get_text_config(decoder=True).vocab_size
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            wrong = next(i for i in ids.flatten().tolist() if not 0 <= i < size)
            raise ValueError(f"feed: id {wrong} is not in the vocabulary of {size:,} tokens")
        return ids

    @torch.no_grad()
    def _read(self, ids: Tensor) -> None:
        """One call of the model, one split point. Nothing changes if the model raises.

        A single token may consume the state that it starts from (`donate`), if no snapshot, fork
        or caller holds it; should that call fail, the way back leads to the state again.
        """
        state, options = self._held(), {}
        if self._owned and self._donates and ids.shape[1] == 1:
            self._state, options = None, {"donate": True}
        out = self._call(ids, state, **options)
        self._state, self._logits = out.state, out.logits[:, -1]
        array = ids.cpu().numpy()
        self._hash.update(array)
        self._position += array.shape[1]
        # Copied, a snapshot leaves the slots at work to the session.
        copied = self._donates and ids.shape[1] == 1
        is_held = self._history.append(array, lambda: self._snapshot(copied))
        # Without tokens a model may return the state that it was given.
        self._owned = ids.shape[1] > 0 and (copied or not is_held)

    def _call(self, ids: Tensor, state: State, **options: Any) -> Any:
        policy = "none" if self.policy is None else self.policy
        if not isinstance(self.model, ForeignModel):
            options |= by_name(self.model)
        return self.model(ids, state=state, logits_to_keep=1, policy=policy, **options)

    @torch.no_grad()
    def _held(self) -> State:
        """The current state, read again from the nearest snapshot if a failed call consumed it."""
        if self._state is None:
            snapshot, pieces = self._history.way(self._position)
            state = snapshot.state
            for piece in pieces:
                state = self._call(torch.from_numpy(piece).to(self._device), state).state
            self._state, self._owned = state, bool(pieces)
        return self._state


def _policy_of(model: Any, policy: Policy | str | None) -> Policy | None:
    """The policy that holds; ValueError if the model's state has nothing that it acts on."""
    if not isinstance(policy, (str, Policy, type(None))):
        raise ValueError(f"Session: policy={policy!r}, expected a Policy or its spec")
    if isinstance(model, ForeignModel):
        return model.checked(policy)
    chosen = build_policy(getattr(model.config, "policy", None) if policy is None else policy)
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    eviction, recurrent = eviction_of(chosen), recurrent_parts(chosen)
    if eviction is not None and not any(isinstance(mixer, Attention) for mixer in mixers):
        raise ValueError(
            f"policy {policy_spec(chosen)}: {eviction.label} bounds lists of keys and values, but "
            "this model has none: its state does not grow"
        )
    if recurrent and not any(mixer.is_linear for mixer in mixers):
        raise ValueError(
            f"policy {policy_spec(chosen)}: {recurrent[0].label} acts on the state of a linear "
            "recurrence, but this model has none"
        )
    return chosen


def _read_file(path: Any, model: Any, policy: Policy | str | None, change: bool) -> StateFile:
    """The file, its `policy` now the one to go on under."""
    file = read_state_file(path, model, any_policy=True)
    made = file.policy or "none"
    wanted = made if policy is None else policy_spec(build_policy(policy))
    try:
        build_policy(made if policy is None else None)
    except ValueError as error:
        raise ValueError(f"{path}: made under --policy {made}: {error}") from error
    if wanted != made and not change:
        raise ValueError(
            f"{path}: made under policy {made}, not {wanted}; to go on all the same, change_policy "
            "(--change-policy)"
        )
    if wanted == "none" != made and isinstance(model, ForeignModel):
        raise ValueError(
            f"{path}: made under policy {made}; a transformers model cannot go on without one from "
            "lists that have lost tokens (under a large budget it can)"
        )
    return replace(file, policy=wanted)


def _donates(model: Any, policy: Policy | None) -> bool:
    """Whether a call that consumes its state saves a copy and changes no bit.

    Only lists of keys and values are written in place; those of a window without a policy would
    stand in another order than in a call that does not.
    """
    if isinstance(model, ForeignModel):
        return False
    windows = [module.window for module in model.modules() if isinstance(module, Attention)]
    return bool(windows) and (eviction_of(policy) is not None or not any(windows))
