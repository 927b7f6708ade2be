"""What the capacity study may be told; no torch here, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from statewright.studies.settings import Settings, positive

SYSTEMS = ("low-decay", "official", "transformer")
TOKENS = ("bytes", "words")
# A shorter text has no room for the passkey's beginning, question, one line and an answer.
LEAST_PASSKEY = {"bytes": 256, "words": 128}


@dataclass(frozen=True)
class Shape:
    """One state size: `state` numbers per channel (d_state) and `heads` of the study's head_dim.

    heads 0: twice the width over head_dim, as in Mamba-2. width, depth 0: the study's.
    """

    state: int = 64
    heads: int = 0
    width: int = 0
    depth: int = 0

    def __post_init__(self) -> None:
        for name, least in (("state", 1), ("heads", 0), ("width", 0), ("depth", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"size: {name}={getattr(self, name)}, expected at least {least}")

    @classmethod
    def parse(cls, text: str) -> Shape:
        """`16`, or `state=16:heads=3:width=96:depth=2`; ValueError for anything else."""
        from statewright.spec import build

        text = f"state={text.strip()}" if text.strip().isdecimal() else text.strip()
        try:
            return build(f"size:{text}", {"size": cls}, "size")
        except ValueError as error:
            raise ValueError(
                f"size {text!r}: expected 16 or state=16:heads=3:width=96:depth=2 ({error})"
            ) from error

    def __str__(self) -> str:
        said = [f"state={self.state}"]
        said += [f"{n}={getattr(self, n)}" for n in ("heads", "width", "depth") if getattr(self, n)]
        return ":".join(said)


@dataclass(frozen=True)
class CapacitySettings(Settings):
    """A grid of small models: every cell sees `num_steps` x `tokens_per_step` tokens in rows of T.

    decay_scale: of the initial decay rate, low-decay only. times: texts of so many training
    lengths are read, or of read_length tokens if that is not 0. explosion: perplexity beyond the
    training length over that within, a collapse. passkey_share: of the rows, with a key to recall;
    1 needs no text. easy_steps: until a key is said but once. longest_recall: tokens; 0 measures
    none. passing_steps: more steps, on texts of up to passing_segments training lengths, by state
    passing, at passing_rate (0: learning_rate); recall is measured before and after.
    """

    hidden_size: int = 96
    num_layers: int = 2
    head_dim: int = 32
    decay_scale: float = 1e-3
    num_steps: int = 500
    tokens_per_step: int = 2048
    learning_rate: float = 3e-3
    final_rate: float = 0.02
    num_warmup_steps: int = 50
    weight_decay: float = 0.1
    eval_every: int = 100
    save_every: int = 100
    times: int = 32
    read_length: int = 0
    num_texts: int = 4
    held_out_share: float = 0.25
    explosion: float = 2.0
    tokens: Literal["bytes", "words"] = "bytes"
    passkey_share: float = 0.0
    easy_steps: int = 0
    passing_steps: int = 0
    passing_segments: int = 8
    passing_rate: float = 0.0
    longest_recall: int = 0
    num_eval: int = 40
    recall_threshold: float = 0.95
    LEAST: ClassVar[dict[str, int]] = {
        "num_layers": 1, "head_dim": 1, "tokens_per_step": 1, "num_warmup_steps": 0, "times": 2,
        "num_texts": 1, "longest_recall": 0, "read_length": 0,
        "easy_steps": 0, "passing_steps": 0, "passing_segments": 1, "passing_rate": 0,
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in self.LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least {least}")
        positive(self, "decay_scale", "explosion", "recall_threshold")
        if not 0 < self.held_out_share < 1:
            raise ValueError(f"held_out_share={self.held_out_share}, expected between 0 and 1")
        if not 0 <= self.passkey_share <= 1:
            raise ValueError(f"passkey_share={self.passkey_share}, expected a share, 0 to 1")
        for name in ("times", "read_length", "longest_recall"):
            if getattr(self, name) & (getattr(self, name) - 1):
                raise ValueError(f"{name}={getattr(self, name)}, expected a power of two")
        if self.tokens not in TOKENS:
            raise ValueError(f"tokens={self.tokens!r}, expected one of {', '.join(TOKENS)}")
        least = 2 * self.least_passkey
        if 0 < self.longest_recall < least:
            raise ValueError(
                f"longest_recall={self.longest_recall}, expected 0 or at least {least}"
            )
        for name in ("tokens", "passing_steps"):
            if getattr(self, name) not in (0, "bytes") and self.passkey_share != 1:
                raise ValueError(
                    f"{name}={getattr(self, name)} needs passkey_share=1: keys and no other text"
                )

    @classmethod
    def recall_alone(cls) -> CapacitySettings:
        """Keys and nothing else, one token per word: recall before and after state passing."""
        return cls(
            hidden_size=64,
            learning_rate=5e-3,
            passkey_share=1.0,
            tokens="words",
            easy_steps=300,
            passing_steps=300,
            longest_recall=8192,
        )

    def reach(self, length: int) -> int:
        """Tokens that are read on by a model trained at `length`."""
        return self.read_length or self.times * length

    @property
    def least_passkey(self) -> int:
        return LEAST_PASSKEY[self.tokens]

    @property
    def recall_lengths(self) -> tuple[int, ...]:
        """Powers of two that have room for a key, up to longest_recall."""
        found, length = [], self.least_passkey
        while length <= self.longest_recall:
            found.append(length)
            length *= 2
        return tuple(found)
