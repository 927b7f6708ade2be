"""Every law on every mixer, scan backend and dtype, and on whole models. A new mixer is a line."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statewright import laws, ops
from statewright.mixers import build_mixer
from statewright.models import StatewrightConfig, StatewrightForCausalLM
from statewright.models.block import Block

MIXERS = [
    "mingru",
    "mingru:form=vanilla:expansion=2:learned_init=false",
    "mingru:expansion=1.5:forget_bias=2",
    "minlstm",
    "minlstm:form=vanilla:expansion=2",
    "minlstm:normalize=false:learned_init=false",
    "gru",
    "lstm:expansion=2",
    "mamba2:state_size=5:head_dim=4",
    "mamba2:state_size=4:head_dim=4:num_groups=3:dt_max=0.01",
    "gla:num_heads=3:expand_k=1",
    "gla:num_heads=2:conv_kernel=4:feature_map=elu:output_gate=false:expand_k=1",
    "mamba:state_size=3",
    "attention:num_heads=4:num_kv_heads=2:head_dim=4",
    "attention:num_heads=3:window=6:head_dim=4:qk_norm=true:qkv_bias=true",
    "s4:state_size=6",
    "s4d:state_size=4",
    "h3:state_size=4:head_dim=2:shift_size=5",
    "hyena:filter_length=64",
    "aaren:num_heads=3",
]
SCANNED = [m for m in MIXERS if "min" in m]
MATRIX = [m for m in MIXERS if m.startswith(("mamba", "gla"))]
BLOCKS = [
    dict(mixer="mingru:expansion=2", conv_kernel=4, mlp_ratio=4.0),
    dict(mixer="lstm", conv_kernel=3, mlp_ratio=0.0, norm="layernorm"),
]
D = 6


def mixer(text: str, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    return build_mixer(text, D).to(dtype)


def block(options: dict):
    torch.manual_seed(0)
    config = StatewrightConfig(vocab_size=11, hidden_size=D, num_hidden_layers=1, **options)
    return Block(config, 0).double().eval()


def model(dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    config = StatewrightConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=4, mixer=["mingru", "minlstm", "lstm"]
    )
    return laws.ModelSubject(StatewrightForCausalLM(config).to(dtype).eval())


def holds(finding: laws.Finding) -> None:
    assert finding.ok, finding


@pytest.mark.parametrize("law", laws.LAWS)
@pytest.mark.parametrize("flags", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("text", MIXERS)
def test_mixers_obey(text: str, law: str, flags: bool) -> None:
    holds(laws.LAWS[law](mixer(text), laws.Case(flags=flags)))


@pytest.mark.parametrize("law", laws.LAWS)
@pytest.mark.parametrize("flags", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("options", BLOCKS, ids=["mingru", "lstm"])
def test_blocks_obey(options: dict, law: str, flags: bool) -> None:
    holds(laws.LAWS[law](block(options), laws.Case(flags=flags)))


@pytest.mark.parametrize("law", laws.LAWS)
@pytest.mark.parametrize("flags", [False, True], ids=["plain", "masked"])
def test_models_obey(law: str, flags: bool) -> None:
    holds(laws.LAWS[law](model(), laws.Case(flags=flags)))


@pytest.mark.parametrize("law", ["fold", "chunk", "gradient", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("backend", ops.VECTOR_BACKENDS)
@pytest.mark.parametrize("text", SCANNED)
def test_backends_obey(text: str, backend: str, dtype: torch.dtype, law: str) -> None:
    if backend == "log" and "vanilla" in text:
        with pytest.raises(ValueError, match="log backend"), ops.default_backend("log"):
            mixer(text, dtype)(torch.randn(1, 9, D, dtype=dtype))
        return
    case = laws.Case(flags=True, dtype=dtype, backend=backend)
    with ops.default_backend(backend):
        holds(laws.LAWS[law](mixer(text, dtype), case))


@pytest.mark.parametrize("law", ["fold", "chunk", "gradient", "rows"])
@pytest.mark.parametrize("backend", [b for b in ops.MATRIX_BACKENDS if b != "torch"])
@pytest.mark.parametrize("text", MATRIX)
def test_matrix_backends_obey(text: str, backend: str, law: str) -> None:
    with ops.default_backend(backend):
        holds(laws.LAWS[law](mixer(text), laws.Case(flags=True, backend=backend)))


@pytest.mark.parametrize("law", ["fold", "chunk", "gradient", "value", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("text", MIXERS)
def test_dtypes_obey(text: str, dtype: torch.dtype, law: str) -> None:
    if law == "gradient" and dtype == torch.bfloat16:
        law = "chunk"
    holds(laws.LAWS[law](mixer(text, dtype), laws.Case(flags=True, dtype=dtype)))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 63, 65, 1000])
@pytest.mark.parametrize(
    "text",
    ["mingru", "minlstm", "gru", "mamba2:state_size=5:head_dim=4", "gla:num_heads=3:expand_k=1"],
)
def test_odd_lengths(text: str, length: int, batch: int) -> None:
    case = laws.Case(batch=batch, length=length, splits=(0, 1, length // 3), flags=True)
    for finding in laws.check(mixer(text), case, ["fold", "chunk"]):
        holds(finding)


@given(
    splits=st.lists(st.integers(0, 40), max_size=6),
    flags=st.booleans(),
    seed=st.integers(0, 99),
    text=st.sampled_from(MIXERS),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_split(splits: list[int], flags: bool, seed: int, text: str) -> None:
    case = laws.Case(length=40, splits=tuple(splits), flags=flags, seed=seed)
    holds(laws.chunk(mixer(text), case))


@pytest.mark.parametrize("law", ["fold", "chunk"])
def test_blocks_of_conv_with_short_pieces(law: str) -> None:
    """Pieces shorter than the convolution must still hand on all of its taps."""
    for seed in range(3):
        case = laws.Case(length=12, splits=(1, 2, 3, 5, 7, 8), flags=True, seed=seed)
        holds(laws.LAWS[law](block(BLOCKS[0]), case))


def test_every_token_masked_leaves_the_state() -> None:
    for text in MIXERS:
        m = mixer(text)
        x, state, _, _ = laws.Case(length=7).draw(m)
        none = torch.zeros(3, 7, dtype=torch.bool)
        _, end = m(x, state, none, torch.ones_like(none))
        assert laws.error(end, state) == 0.0
