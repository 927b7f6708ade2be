"""Mixers: one paper per file. Adding one is a file and a line of `catalog.MIXERS`."""

from __future__ import annotations

from statewright import spec
from statewright.catalog import MIXERS
from statewright.mixers.aaren import Aaren
from statewright.mixers.attention import Attention
from statewright.mixers.base import Mixer, VectorMixer
from statewright.mixers.conv import CausalConv
from statewright.mixers.gla import GLA
from statewright.mixers.gru import GRU, LSTM
from statewright.mixers.h3 import H3
from statewright.mixers.hyena import Hyena
from statewright.mixers.mamba import Mamba
from statewright.mixers.mamba2 import Mamba2
from statewright.mixers.mingru import MinGRU
from statewright.mixers.minlstm import MinLSTM
from statewright.mixers.s4 import S4
from statewright.mixers.s4d import S4D


def build_mixer(text: str, hidden_size: int) -> Mixer:
    """`build_mixer("mingru:expansion=2:form=vanilla", 256)`; ValueError names what is unknown.

    >>> build_mixer("mingru:expansion=2", 8).init_state(1)
    VectorState(seen (1,), h (1, 16); 72 bytes)
    """
    return spec.build(text, MIXERS, "mixer", hidden_size)


__all__ = [
    "GLA",
    "GRU",
    "H3",
    "LSTM",
    "MIXERS",
    "S4",
    "S4D",
    "Aaren",
    "Attention",
    "CausalConv",
    "Hyena",
    "Mamba",
    "Mamba2",
    "MinGRU",
    "MinLSTM",
    "Mixer",
    "VectorMixer",
    "build_mixer",
]
