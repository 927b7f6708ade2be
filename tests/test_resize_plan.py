"""Plans: which layers, what it costs at the papers' shapes, and what cannot be done."""

from __future__ import annotations

import pytest

from statewright.models import StatewrightConfig, StatewrightForCausalLM
from statewright.models.resize import choose_layers, plan_resize, resize

MAMBA2 = "mamba2:state_size=16:head_dim=16"

GLA_13B = StatewrightConfig(
    vocab_size=32000, hidden_size=2048, num_hidden_layers=24, mixer="gla", conv_kernel=0,
    mlp="swiglu", mlp_size=5632,
)  # fmt: skip
MAMBA2_13B = StatewrightConfig(
    vocab_size=50288, hidden_size=2048, num_hidden_layers=48, mixer="mamba2", conv_kernel=0,
    mlp_ratio=0.0, tie_word_embeddings=True,
)  # fmt: skip


def test_counts_at_the_papers_shapes() -> None:
    """X3, X4: exact integers at 1.3B, on the meta device."""
    gla = plan_resize(GLA_13B, "all", "every:6", "fresh")
    assert gla.layers == (0, 6, 12, 18) and gla.factor == 4
    assert gla.parameters[1] - gla.parameters[0] == 4 * 1536
    seen = 8 * (24 + 1)
    assert gla.state_bytes == (24 * 524288 * 4 + seen, (20 * 524288 + 4 * 2097152) * 4 + seen)
    mamba2 = plan_resize(MAMBA2_13B, "4x", "every:6", "zero")
    assert len(mamba2.layers) == 8
    assert mamba2.parameters[1] - mamba2.parameters[0] == 8 * 1_576_704
    taps, grown = 3 * (4096 + 256) * 4, 3 * (4096 + 1024) * 4
    assert mamba2.state_bytes[0] == 48 * (524288 * 4 + taps + 8) + 8
    assert mamba2.state_bytes[1] == 40 * (524288 * 4 + taps + 8) + 8 * (2097152 * 4 + grown + 8) + 8
    everywhere = plan_resize(MAMBA2_13B, "4x", "all", "as-released")
    assert everywhere.parameters[1] - everywhere.parameters[0] == 48 * 1_576_704
    assert everywhere.after.mixer == "mamba2:state_size=512"


def test_layer_rules() -> None:
    assert choose_layers("every:6", 24) == (0, 6, 12, 18)
    assert choose_layers("last:4", 6) == (2, 3, 4, 5)
    assert choose_layers("first:2", 6) == (0, 1)
    assert choose_layers("5, 1,1", 6) == (1, 5) == choose_layers([5, 1], 6)
    assert choose_layers("all", 2) == (0, 1)
    for rule in ("sixth", "every:0", "last:-1", "every:x", "1;2", "last"):
        with pytest.raises(ValueError, match=r"expected all, every:N, first:N, last:N or numbers"):
            choose_layers(rule, 6)
    for rule in ("6", "last:7", [-1], "0,9"):
        with pytest.raises(ValueError, match="out of range, the model has 6 layers, 0 to 5"):
            choose_layers(rule, 6)


@pytest.mark.parametrize(
    ("mixer", "options", "said"),
    [
        ("gla:num_heads=4", dict(key=3, init="fresh"), "layer 0: gla: 3 does not divide 4 heads"),
        ("gla:num_heads=1", dict(key=4, init="inherit"), "zero' widens the keys instead"),
        ("gla:num_heads=1", dict(key="all", init="fresh"), "merges the heads of a GLA"),
        ("gla:conv_kernel=4", dict(key=4), "expected one of fresh, inherit, as-released"),
        ("gla:feature_map=elu", dict(key=4), "without convolution and feature map"),
        (MAMBA2, dict(key="1.3x"), "16 keys x 1.3 is 20.8, expected a whole number"),
        (MAMBA2, dict(key="2.5x", init="copy"), "copy needs a whole factor"),
        (MAMBA2, dict(key=4, init="inherit"), "expected one of zero, fresh, as-released"),
        (MAMBA2, dict(key="all"), "'all' merges the heads"),
        (MAMBA2, dict(key="large"), "expected a factor such as 4x"),
        (MAMBA2, dict(key=0), "positive and not 1"),
        (MAMBA2, dict(key="1x"), "positive and not 1"),
        (MAMBA2, dict(key="0.01x"), "expected a whole number from 1 on"),
        (MAMBA2, dict(key=0.5), "needs calibration"),
        (MAMBA2, dict(heads=0.5), "heads can be left out of GLA only"),
        ("gla", dict(heads=2), "below 1: heads can be left out; key merges them"),
        ("gla", dict(heads=0.3), "4 heads x 0.3 is 1.2"),
        ("mingru:expansion=2", dict(key=0.5), "128 channels x 0.5|model's width"),
        ("attention:num_heads=4", dict(key=4), "has no construction .known: mingru, minlstm, "),
        ([MAMBA2, "gru"], dict(key=4, layers="all"), "layer 1 is 'gru', which has no"),
        (["gla:num_heads=2", "gla"], dict(key="all", layers="all", init="fresh"), "different fact"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said(mixer, options, said: str) -> None:
    config = StatewrightConfig(vocab_size=97, hidden_size=64, num_hidden_layers=3, mixer=mixer)
    model = StatewrightForCausalLM(config)
    with pytest.raises(ValueError, match=said):
        resize(model, **options)
