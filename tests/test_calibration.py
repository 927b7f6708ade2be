"""Norms measured at the training length travel with the model and give `StateNorm` its limits."""

from __future__ import annotations

import pytest
import torch

import statewright
from statewright import laws
from statewright.models import StatewrightConfig, StatewrightForCausalLM
from statewright.models.calibration import FILE, calibrate
from statewright.policies.recurrent import carried
from statewright.session import Session

POLICY = "statenorm:limit=1x:every=4"


def hybrid(policy: str | None = None) -> StatewrightForCausalLM:
    torch.manual_seed(0)
    config = StatewrightConfig(
        vocab_size=17,
        hidden_size=16,
        num_hidden_layers=4,
        mixer=["mamba2:state_size=4:head_dim=8", "attention:num_heads=2", "mingru", "gla"],
        policy=policy,
    )
    return StatewrightForCausalLM(config).eval()


def ids(length: int = 12) -> torch.Tensor:
    return torch.randint(17, (2, length), generator=torch.Generator().manual_seed(1))


def test_measured_limits_hold_and_double() -> None:
    model = hybrid()
    norms = calibrate(model, ids(4))
    assert [n.shape for n in norms] == [(4,), (1,), (4,)]
    for multiple in (1, 2):
        state = model(ids(16), policy=f"statenorm:limit={multiple}x:every=4").state
        for i, n in zip((0, 2, 3), norms):
            value = carried(state.layers[i])
            heads = value.unsqueeze(1) if value.dim() == 2 else value.flatten(2)
            assert bool((heads.norm(dim=-1) <= multiple * n * (1 + 1e-5)).all())


def test_limits_survive_saving(tmp_path) -> None:
    model = hybrid()
    calibrate(model, ids(4))
    want = model(ids(), policy=POLICY).logits
    model.config.policy = POLICY
    model.save_pretrained(tmp_path)
    for load in (statewright.load, StatewrightForCausalLM.from_pretrained):
        with pytest.warns(UserWarning, match="bounds this model by default"):
            again = load(tmp_path).eval()
        assert torch.equal(again(ids()).logits, want)
        assert not torch.equal(again(ids(), policy="none").logits, want)
    session = Session(again)
    session.feed(ids()[0])
    assert laws.error(session.logits, want[:1, -1]) < 1e-5


def test_a_damaged_file_is_one_line(tmp_path) -> None:
    model = hybrid()
    model.save_pretrained(tmp_path)
    assert not (tmp_path / FILE).exists()
    (tmp_path / FILE).write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=f"{FILE}: damaged"):
        statewright.load(tmp_path)


def test_what_was_not_measured_is_asked_for() -> None:
    with pytest.raises(ValueError, match="no record of"):
        hybrid()(ids(), policy=POLICY)
