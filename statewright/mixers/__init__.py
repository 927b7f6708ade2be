"""Mixers: one paper per file. Adding one is a file and a line of `MIXERS`."""

from __future__ import annotations

from statewright import spec
from statewright.mixers.attention import Attention
from statewright.mixers.base import Mixer, VectorMixer
from statewright.mixers.conv import CausalConv
from statewright.mixers.gla import GLA
from statewright.mixers.gru import GRU, LSTM
from statewright.mixers.mamba import Mamba
from statewright.mixers.mamba2 import Mamba2
from statewright.mixers.mingru import MinGRU
from statewright.mixers.minlstm import MinLSTM

MIXERS: dict[str, type[Mixer]] = {
    "mingru": MinGRU,
    "minlstm": MinLSTM,
    "gru": GRU,
    "lstm": LSTM,
    "mamba2": Mamba2,
    "gla": GLA,
    "mamba": Mamba,
    "attention": Attention,
}


def build_mixer(text: str, hidden_size: int) -> Mixer:
    """`build_mixer("mingru:expansion=2:form=vanilla", 256)`; ValueError names what is unknown."""
    return spec.build(text, MIXERS, "mixer", hidden_size)


__all__ = [
    "GLA",
    "GRU",
    "LSTM",
    "MIXERS",
    "Attention",
    "CausalConv",
    "Mamba",
    "Mamba2",
    "MinGRU",
    "MinLSTM",
    "Mixer",
    "VectorMixer",
    "build_mixer",
]
