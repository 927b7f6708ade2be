"""Adapters (PEFT) on every mixer: trained, saved, loaded, merged; the base is left as it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION

import statewright
from statewright import laws
from statewright.mixers import MIXERS
from statewright.models import StatewrightConfig, StatewrightForCausalLM
from statewright.models.calibration import FILE, calibrate

# An older one is refused by transformers itself.
peft = pytest.importorskip("peft", minversion=MIN_PEFT_VERSION)

V = 23
SPECS = {name: name for name in MIXERS} | {
    "mamba2": "mamba2:head_dim=8",
    "hybrid": ["mingru", "attention"],
}
LORA = dict(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)


def build(mixer="mingru") -> StatewrightForCausalLM:
    torch.manual_seed(0)
    sizes = dict(vocab_size=V, hidden_size=16, num_hidden_layers=2, mlp_ratio=2.0)
    return StatewrightForCausalLM(StatewrightConfig(mixer=mixer, **sizes)).eval()


def tokens() -> Tensor:
    return torch.randint(V, (2, 7), generator=torch.Generator().manual_seed(1))


def adapted(mixer="mingru") -> StatewrightForCausalLM:
    model = build(mixer)
    torch.manual_seed(2)
    model.add_adapter(peft.LoraConfig(**LORA))
    return model.eval()


@pytest.mark.parametrize("name", SPECS)
def test_every_adapter_learns_in_training_and_decoding_alike(name: str) -> None:
    """A scan and a step read the same adapted layers, and every adapter has a gradient."""
    model, ids = adapted(SPECS[name]).double(), tokens()
    out = model(ids, labels=ids)
    assert laws.error(out.logits, build(SPECS[name]).double()(ids).logits) > 1e-3
    out.loss.backward()
    adapters = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert adapters and all(p.grad is not None and p.grad.any() for p in adapters.values())
    assert all(p.grad is None for n, p in model.named_parameters() if n not in adapters)
    state = model.init_state(2)
    for t in range(ids.shape[1]):
        logits, state = model.step(ids[:, t], state)
    assert laws.error(logits, out.logits[:, -1]) < 1e-11
    assert model.generate(ids, max_new_tokens=2).shape == (2, 9)


def test_saving_adapters_writes_them_alone_and_whole(tmp_path) -> None:
    base = build(["mingru", "attention"])
    calibrate(base, tokens())
    base.save_pretrained(tmp_path / "base")
    model = StatewrightForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(2)
    model.add_adapter(peft.LoraConfig(**LORA))
    want = model.eval()(tokens()).logits
    model.save_pretrained(tmp_path / "adapters")
    written = {path.name for path in (tmp_path / "adapters").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= written
    assert not written & {"config.json", "model.safetensors", "modeling_statewright.py", FILE}

    again = StatewrightForCausalLM.from_pretrained(tmp_path / "base")
    again.load_adapter(str(tmp_path / "adapters"))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "adapters")
    beside = peft.PeftModel.from_pretrained(
        StatewrightForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapters"
    )
    for loaded in (again, whole, beside):
        assert torch.equal(loaded.eval()(tokens()).logits, want)
    for loaded in (again, whole):
        assert all(torch.equal(a, b) for a, b in zip(loaded.model.norms, base.model.norms))


def test_adapters_of_peft_are_merged_into_a_model_of_ours(tmp_path) -> None:
    torch.manual_seed(2)
    wrapped = peft.get_peft_model(build(), peft.LoraConfig(**LORA)).eval()
    ids = tokens()
    out = wrapped(ids, labels=ids)
    first = wrapped(ids[:, :3])
    goes_on = wrapped(ids[:, 3:], state=first.state).logits
    assert torch.allclose(goes_on, out.logits[:, 3:], atol=1e-5)
    wrapped.save_pretrained(tmp_path / "adapters")
    again = peft.PeftModel.from_pretrained(build(), tmp_path / "adapters").eval()
    assert torch.equal(again(ids).logits, out.logits)
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = statewright.load(tmp_path / "merged")
    assert torch.allclose(merged(ids).logits, out.logits, atol=1e-5)
