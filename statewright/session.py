"""A reading and writing model with a memory: the only mutable object.

feed, generate, fork, rewind, save, load. The States inside are immutable, so a fork costs
nothing and a snapshot is a reference; what costs is kept within a byte budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from statewright.hf.host import as_host
from statewright.history import History, Snapshot
from statewright.shapes import require
from statewright.state import State
from statewright.state_file import read_state_file, save_state
from statewright.token_hash import RollingHash

_CHUNK = 1024


class Session:
    """A model, its state, and the way back.

    `feed(ids)` reads in pieces of at most `chunk` tokens; every call and every piece is a
    recorded split point, so that `rewind` and a second reading at the same splits give
    bit-identical logits. `snapshot_bytes` bounds the snapshots that `rewind` starts from.
    `batch_size` is that of `state`, or 1; ValueError if it contradicts the state. The model is
    ours or any transformers causal LM (`hf.host.ForeignModel`).
    """

    def __init__(
        self,
        model: nn.Module,
        state: State | None = None,
        batch_size: int | None = None,
        chunk: int = _CHUNK,
        snapshot_bytes: int = 64 * 1024**2,
    ) -> None:
        if chunk < 1:
            raise ValueError(f"Session: chunk={chunk}, expected at least 1")
        self.model = model = as_host(model).eval()
        self.chunk = chunk
        if state is None:
            state = model.init_state(1 if batch_size is None else batch_size)
        elif batch_size not in (None, state.batch_size):
            raise ValueError(
                f"Session: batch_size={batch_size}, but the state has {state.batch_size} rows"
            )
        self._state = state.detach()
        self._logits: Tensor | None = None
        self._hash = RollingHash(state.batch_size)
        self._position = 0
        self._history = History(self._snapshot(), snapshot_bytes)

    @property
    def state(self) -> State:
        return self._state

    @property
    def nbytes(self) -> int:
        """Bytes of the current state alone."""
        return self._state.nbytes

    @property
    def seen(self) -> int:
        """Tokens read by this session and the one it was loaded from."""
        return self._position

    @property
    def reach(self) -> int:
        """The earliest number of tokens that `rewind` can go back to."""
        return self._history.reach

    @property
    def logits(self) -> Tensor | None:
        """Logits (B, vocabulary) for the next token; None before the first token."""
        return self._logits

    def feed(self, ids: Tensor | list[int]) -> Tensor:
        """Read ids (T,) or (B, T); returns the logits (B, vocabulary) after the last one.

        Raises ValueError for a wrong number of rows or if nothing has been read yet and T = 0.
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
        every row has written that token. Raises ValueError before the first token is read.
        """
        if self._logits is None:
            raise ValueError("generate: nothing has been read yet; feed a prompt first")
        if temperature < 0:
            raise ValueError(f"generate: temperature={temperature}, expected at least 0")
        warp = _warpers(temperature, top_k, top_p)
        stopped = torch.zeros(self._state.batch_size, dtype=torch.bool)
        for _ in range(max_new_tokens):
            ids = self._sample(warp, temperature, seed)
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
            return torch.empty(self._state.batch_size, 0, dtype=torch.long)
        return torch.stack(written, 1)

    def fork(self) -> Session:
        """A second session at the same point; neither ever sees the other's tokens."""
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
        self._state, self._logits = snapshot.state, snapshot.logits
        self._hash, self._position = snapshot.hash.copy(), snapshot.position
        for piece in pieces:
            self._read(torch.from_numpy(piece).to(self._device))
        return self

    def save(self, path: str | Path, about: dict[str, Any] | None = None) -> None:
        """Write a state file from which `Session.load` continues bit-identically."""
        beside = {} if self._logits is None else {"logits": self._logits}
        entries = {**(about or {}), "position": self._position, "chunk": self.chunk}
        save_state(
            self._state,
            path,
            self.model,
            tokens_hash=self._hash.text,
            beside=beside,
            about=entries,
        )

    @classmethod
    def load(cls, path: str | Path, model: nn.Module, **options: Any) -> Session:
        """Continue from a file written by `save` under the same model (ValueError otherwise)."""
        model = as_host(model)
        file = read_state_file(path, model)
        options.setdefault("chunk", file.about.get("chunk", _CHUNK))
        budget = options.get("snapshot_bytes", 64 * 1024**2)
        session = cls(model, file.state, **options)
        session._logits = file.beside.get("logits")
        session._hash = RollingHash(file.state.batch_size, file.tokens_hash)
        session._position = file.about.get("position", int(file.state.seen.max()))
        session._history = History(session._snapshot(), budget)
        return session

    @property
    def tokens_hash(self) -> str:
        """A hash of all tokens read, whatever the splits."""
        return self._hash.text

    @property
    def _device(self) -> torch.device:
        return self._state.seen.device

    def _snapshot(self) -> Snapshot:
        return Snapshot(self._position, self._state, self._logits, self._hash.copy())

    def _ids(self, ids: Tensor | list[int]) -> Tensor:
        ids = torch.as_tensor(ids, dtype=torch.long, device=self._device)
        ids = ids.unsqueeze(0) if ids.dim() == 1 else ids
        require("feed", "ids", ids, "B T", B=self._state.batch_size)
        return ids

    @torch.no_grad()
    def _read(self, ids: Tensor) -> None:
        """One call of the model, one split point. Nothing changes if the model raises."""
        out = self.model(ids, state=self._state, logits_to_keep=1)
        self._state, self._logits = out.state, out.logits[:, -1]
        array = ids.cpu().numpy()
        self._hash.update(array)
        self._position += array.shape[1]
        self._history.append(array, self._snapshot())

    def _sample(self, warp: LogitsProcessorList, temperature: float, seed: int) -> Tensor:
        logits = self._logits.float()
        if temperature == 0:
            return logits.argmax(-1)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + self._position)
        probabilities = warp(None, logits).softmax(-1).cpu()
        drawn = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        return drawn.to(logits.device)


def _warpers(temperature: float, top_k: int | None, top_p: float | None) -> LogitsProcessorList:
    warp = LogitsProcessorList()
    if temperature not in (0, 1):
        warp.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        warp.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1:
        warp.append(TopPLogitsWarper(top_p))
    return warp
