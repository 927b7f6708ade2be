"""Small models of every mixer, documents, and transformers' four ways to say where they begin."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening

from statewright import laws
from statewright.mixers import MIXERS
from statewright.models import StatewrightConfig, StatewrightForCausalLM

V, D = 23, 16
LENGTHS = [5, 1, 9, 2]
SPECS = {name: name for name in MIXERS} | {
    "mamba2": "mamba2:head_dim=8",
    "placed": "attention:positions=renumbered",
    "hybrid": ["mingru", "attention:window=4", "mamba"],
}
FORMS = {
    "position_ids": dict(return_position_ids=True),
    "seq_idx": dict(return_position_ids=False, return_seq_idx=True),
    "cu_seq_lens": dict(return_position_ids=False, return_flash_attn_kwargs=True),
    "all": dict(return_seq_idx=True, return_flash_attn_kwargs=True),
}
TOLERANCE = laws.TOLERANCES[torch.float64, "torch"]


def build(mixer="mingru", dtype=torch.float64, **options) -> StatewrightForCausalLM:
    torch.manual_seed(0)
    sizes = dict(vocab_size=V, hidden_size=D, num_hidden_layers=3, mlp_ratio=2.0) | options
    return StatewrightForCausalLM(StatewrightConfig(mixer=mixer, **sizes)).to(dtype).eval()


def documents(lengths=LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(V, (n,), generator=generator) for n in lengths]


def flattened(form: str, texts: list[Tensor]) -> dict:
    collate = DataCollatorWithFlattening(return_tensors="pt", **FORMS[form])
    return dict(collate([{"input_ids": text.tolist()} for text in texts]))


def counted(lengths=LENGTHS) -> Tensor:
    return torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
