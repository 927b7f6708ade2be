"""Every mixer with quantised layers: dtype and device come from no Linear's weight."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from statewright.mixers import MIXERS, build_mixer
from statewright.models import StatewrightConfig, StatewrightForCausalLM

D = 64
SPECS = {"attention": "attention:num_heads=2"}


class Weightless(nn.Module):
    """What any quantiser may put in a Linear's place: no weight, no bias, no parameter."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = [linear.weight.detach(), linear.bias]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, *self.packed)


def weightless(module: nn.Module) -> nn.Module:
    module = copy.deepcopy(module)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Weightless(child))
    return module


def dynamic(module: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization")
@pytest.mark.parametrize("way, slack", [(weightless, 0.0), (dynamic, 0.1)])
@pytest.mark.parametrize("name", MIXERS)
def test_a_quantised_mixer_runs(name: str, way, slack: float) -> None:
    torch.manual_seed(0)
    plain = build_mixer(SPECS.get(name, name), D).eval()
    mixer, x = way(plain), torch.randn(2, 7, D)
    mask, reset = torch.ones(2, 7, dtype=torch.bool), torch.zeros(2, 7, dtype=torch.bool)
    mask[0, :2], reset[1, 4] = False, True
    with torch.no_grad():
        wanted = plain(x, mask=mask, reset=reset)[0]
        got, _ = mixer(x, mixer.init_state(2), mask=mask, reset=reset)
        y, state = mixer.step(x[:, 0], mixer.init_state(2))
        first, _ = mixer(x[:, :1])
    for a, b in ((got[mask], wanted[mask]), (y, first[:, 0])):
        assert (a - b).norm() <= (slack + 1e-5) * b.norm()
    assert state.seen.tolist() == [1, 1]


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization")
@pytest.mark.parametrize("way", [weightless, dynamic])
@pytest.mark.parametrize("name", MIXERS)
def test_a_quantised_model_generates(name: str, way) -> None:
    torch.manual_seed(0)
    config = StatewrightConfig(
        vocab_size=31, hidden_size=D, num_hidden_layers=1, mixer=SPECS.get(name, name)
    )
    model = way(StatewrightForCausalLM(config).eval())
    out = model.generate(torch.arange(5).unsqueeze(0), max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 9)


@pytest.mark.parametrize("name", MIXERS)
def test_states_follow_a_mixer_without_weights(name: str) -> None:
    mixer = weightless(build_mixer(SPECS.get(name, name), D).to(torch.bfloat16))
    state = mixer.init_state(1)
    wide = weightless(build_mixer(SPECS.get(name, name), D).double()).init_state(1)
    for got, other in zip(dict(state.items()).values(), dict(wide.items()).values()):
        if got.is_floating_point():
            assert other.dtype == torch.float64 and got.dtype in (torch.bfloat16, torch.float32)
    meta = weightless(build_mixer(SPECS.get(name, name), D)).to("meta")
    assert meta.like.device.type == "meta"


@pytest.mark.parametrize("name", MIXERS)
def test_a_mixer_made_on_meta_moves_once_its_weights_are_assigned(name: str) -> None:
    text = SPECS.get(name, name)
    with torch.device("meta"):
        late = build_mixer(text, D)
    late.load_state_dict(build_mixer(text, D).state_dict(), assign=True)
    assert late.to("cpu", torch.float64).init_state(1).seen.device.type == "cpu"
    assert late.like.dtype == torch.float64
