"""The decoder as a Hugging Face model: saving, loading, forward's arguments, configuration."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from statewright import laws
from statewright.hf.cache import StateCache
from statewright.models import StatewrightConfig, StatewrightForCausalLM, StatewrightModel

V, D, B, T = 29, 8, 3, 12
MIXERS = ["mingru", ["minlstm:expansion=2", "gru", "mingru:form=vanilla"]]
KINDS_OF_CHECKPOINTING = [
    kind
    for kind in ("gradient", "activation")
    if hasattr(PreTrainedModel, f"{kind}_checkpointing_enable")
]
each = pytest.mark.parametrize("mixer", MIXERS, ids=["mingru", "hybrid"])


def config_of(mixer="mingru", **options) -> StatewrightConfig:
    sizes = dict(vocab_size=V, hidden_size=D, num_hidden_layers=3, mlp_ratio=2.0)
    return StatewrightConfig(mixer=mixer, **{**sizes, **options})


def build(mixer="mingru", dtype=torch.float64, **options) -> StatewrightForCausalLM:
    return StatewrightForCausalLM(config_of(mixer, **options)).to(dtype).eval()


def tokens(batch: int = B, length: int = T) -> Tensor:
    return torch.randint(V, (batch, length))


def near(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and laws.error(a, b) < 1e-12


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_are_bit_equal(mixer, dtype: torch.dtype, tmp_path) -> None:
    model, ids = build(mixer, dtype), tokens()
    model.save_pretrained(tmp_path)
    loaded = StatewrightForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    assert loaded.dtype == dtype and not loaded.training
    mine, theirs = model(ids), loaded(ids)
    assert torch.equal(mine.logits, theirs.logits) and laws.error(mine.state, theirs.state) == 0
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_auto_classes_and_the_headless_model(tmp_path) -> None:
    model, ids = build("mingru", torch.float32), tokens()
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), StatewrightConfig)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is StatewrightForCausalLM
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    headless = AutoModel.from_pretrained(tmp_path)
    assert type(headless) is StatewrightModel
    assert torch.equal(headless(ids).last_hidden_state, model.model(ids).last_hidden_state)
    assert type(AutoModelForCausalLM.from_config(config_of())) is StatewrightForCausalLM


def test_trust_remote_code_finds_the_installed_package(tmp_path) -> None:
    """The checkpoint names our classes: nobody has to import statewright first."""
    model = build(["mingru", "lstm"], torch.float32, num_hidden_layers=2)
    model.save_pretrained(tmp_path / "model")
    ids = torch.arange(9).unsqueeze(0)
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM
assert "statewright" not in sys.modules
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code=True)
torch.save(model(torch.arange(9).unsqueeze(0)).logits, {str(tmp_path / "logits.pt")!r})
model.save_pretrained({str(tmp_path / "again")!r})
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    want = model(ids).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), want)
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["auto_map"]["AutoModelForCausalLM"].endswith(".StatewrightForCausalLM")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(reloaded(ids).logits, want)


@each
def test_step_is_the_definition(mixer) -> None:
    model, ids = build(mixer), tokens()
    state, stepped = model.init_state(B), []
    for t in range(T):
        logits, state = model.step(ids[:, t], state)
        stepped.append(logits)
    out = model(ids)
    assert near(torch.stack(stepped, 1), out.logits) and laws.error(state, out.state) < 1e-12
    assert out.state.seen.tolist() == [T] * B


@each
def test_a_state_continues(mixer) -> None:
    model, ids = build(mixer), tokens()
    first = model(ids[:, :5])
    rest = model(ids[:, 5:], state=first.state)
    assert near(torch.cat([first.logits, rest.logits], 1), model(ids).logits)
    cached = model(ids[:, :5], use_cache=True).past_key_values
    assert cached.get_seq_length() == 5
    assert near(model(ids[:, 5:], past_key_values=cached).logits, rest.logits)
    assert cached.get_seq_length() == T and laws.error(cached.state, rest.state) < 1e-12


@each
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_the_rows_alone(mixer, side: str) -> None:
    """Also when they continue, with a mask that covers the old tokens as well."""
    model, ids, more = build(mixer), tokens(), tokens(B, 4)
    lengths, mask = [T, 7, 1], torch.zeros(B, T, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, slice(T - length, T) if side == "left" else slice(0, length)] = 1
    padded = model(ids, attention_mask=mask)
    longer = torch.cat([mask, torch.ones_like(more)], 1)
    continued = model(more, state=padded.state, attention_mask=longer)
    assert padded.state.seen.tolist() == lengths
    for row in range(B):
        alone = ids[row : row + 1, mask[row].bool()]
        whole = model(torch.cat([alone, more[row : row + 1]], 1))
        got = torch.cat([padded.logits[row, mask[row].bool()], continued.logits[row]])
        assert near(got, whole.logits[0])
        assert laws.error(continued.state.rows(row), whole.state) < 1e-12


def test_documents_packed_in_one_row() -> None:
    model, ids = build(MIXERS[1]), tokens()
    reset = torch.zeros(B, T, dtype=torch.bool)
    reset[:, 5] = True
    packed = model(ids, reset=reset)
    assert near(packed.logits[:, 5:], model(ids[:, 5:]).logits)
    assert near(packed.logits[:, :5], model(ids[:, :5]).logits)


def test_loss_is_the_shifted_cross_entropy() -> None:
    model, ids = build(), tokens()
    labels = ids.clone()
    labels[0, 3:6] = -100
    out = model(ids, labels=labels)
    want = F.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    assert torch.allclose(out.loss, want.to(out.loss.dtype), rtol=1e-6)
    summed = model(ids, labels=labels, num_items_in_batch=100).loss
    assert torch.allclose(summed * 100, out.loss * (labels[:, 1:] != -100).sum(), rtol=1e-6)
    assert model(ids).loss is None


def test_inputs_embeds_and_logits_to_keep() -> None:
    model, ids = build(), tokens()
    logits = model(ids).logits
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, logits)
    assert near(model(ids, logits_to_keep=1).logits, logits[:, -1:])
    assert near(model(ids, logits_to_keep=3).logits, logits[:, -3:])
    assert near(model(ids, logits_to_keep=torch.tensor([0, 7])).logits, logits[:, [0, 7]])


def test_hidden_states_are_those_of_hugging_face() -> None:
    """Embeddings, the layers, and last what the head sees."""
    model, ids = build(), tokens()
    assert model(ids).hidden_states is None
    hidden = model(ids, output_hidden_states=True).hidden_states
    assert len(hidden) == 4 and torch.equal(hidden[0], model.get_input_embeddings()(ids))
    assert torch.equal(model.lm_head(hidden[-1]), model(ids).logits)
    assert torch.equal(model.model(ids, output_hidden_states=True).hidden_states[-1], hidden[-1])
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == 4


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings(tied: bool, tmp_path) -> None:
    model = build(dtype=torch.float32, tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embeddings.weight) is tied
    assert model.num_parameters() == sum(p.numel() for p in set(model.parameters()))
    model.save_pretrained(tmp_path)
    loaded = StatewrightForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embeddings.weight) is tied
    ids = tokens()
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_resize_token_embeddings(tied: bool) -> None:
    model, ids = build(tie_word_embeddings=tied), tokens()
    before = model(ids).logits
    model.resize_token_embeddings(V + 6, mean_resizing=False)
    out = model(ids, labels=ids)
    assert out.logits.shape == (B, T, V + 6) and model.config.vocab_size == V + 6
    assert near(out.logits[..., :V], before) and out.loss.isfinite()
    assert (model.lm_head.weight is model.model.embeddings.weight) is tied


@pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")
@pytest.mark.parametrize("kind", KINDS_OF_CHECKPOINTING)
def test_reentrant_checkpointing_is_refused(kind: str) -> None:
    """By the name transformers 5 has used and by its successor."""
    model = build()
    enable = getattr(model, f"{kind}_checkpointing_enable")
    with pytest.raises(ValueError, match="use_reentrant=False"):
        enable({"use_reentrant": True})
    assert not model.model.gradient_checkpointing
    enable()
    assert model.model.gradient_checkpointing
    assert model.model._gradient_checkpointing_func.keywords["use_reentrant"] is False
    getattr(model, f"{kind}_checkpointing_disable")()
    assert not model.model.gradient_checkpointing


def narrower(state):
    return state.resize(channel=D - 1)


def fewer_taps(state):
    return state.resize(tap=2)


MISTAKES = [
    (lambda m, ids: m(), "exactly one of input_ids and inputs_embeds"),
    (lambda m, ids: m(ids, inputs_embeds=torch.zeros(B, T, D)), "exactly one"),
    (lambda m, ids: m(ids[0]), r"inputs is \(12, 8\), expected \(B, T, D\)"),
    (lambda m, ids: m(inputs_embeds=torch.zeros(B, T, D + 1)), r"\(3, 12, 9\), expected"),
    (
        lambda m, ids: m(ids, past_key_values=DynamicCache()),
        "a DynamicCache, expected a StateCache",
    ),
    (lambda m, ids: m(ids, state=m.init_state(2)), "state has 2 rows, the input 3"),
    (lambda m, ids: m(ids, past_key_values=StateCache(m.init_state(2))), "has 2 rows, the input 3"),
    (
        lambda m, ids: m(ids, state=m.init_state(B), past_key_values=StateCache(m.init_state(B))),
        "a state or a cache that holds one, not both",
    ),
    (lambda m, ids: m(ids, state=m.init_state(B).layers[0]), "expected a ModelState of 3 layers"),
    (
        lambda m, ids: m(ids, state=build("mingru", num_hidden_layers=2).init_state(B)),
        "of 3 layers",
    ),
    (lambda m, ids: m(ids, state=build("lstm:expansion=2").init_state(B)), "state.h is"),
    (lambda m, ids: m(ids, state=build(conv_kernel=0).init_state(B)), "conv taps"),
    (lambda m, ids: m(ids, state=build(conv_kernel=3).init_state(B)), "taps"),
    (lambda m, ids: m(ids, state=narrower(m.init_state(B))), "state.h is|taps"),
    (lambda m, ids: m(ids, state=fewer_taps(m.init_state(B))), "taps"),
    (lambda m, ids: m(ids, attention_mask=torch.ones(B, T - 1)), r"attention_mask is \(3, 11\)"),
    (lambda m, ids: m(ids, attention_mask=torch.ones(B, 1, T, T)), "attention_mask is"),
    (lambda m, ids: m(ids, reset=torch.zeros(B, T + 1)), "reset is"),
    (lambda m, ids: StateCache(m.init_state(B)).crop(3), "cannot forget its last tokens"),
]


@pytest.mark.parametrize(("call", "message"), MISTAKES)
def test_mistakes_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(build(), tokens())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(mixer=""), "mixer"),
        (dict(mixer=[]), "mixer"),
        (dict(mixer="mingrue"), "unknown mixer 'mingrue'; did you mean 'mingru'"),
        (
            dict(mixer=["mingru", "minlstm:expand=2"]),
            "no option 'expand'; did you mean 'expansion'",
        ),
        (dict(norm="batchnorm"), "norm"),
        (dict(num_hidden_layers=0), "num_hidden_layers=0, expected at least 1"),
        (dict(hidden_size=0), "hidden_size=0"),
        (dict(vocab_size=0), "vocab_size=0"),
        (dict(conv_kernel=1), "conv_kernel=1, expected 0 or at least 2"),
        (dict(conv_kernel=-4), "conv_kernel=-4"),
        (dict(mlp_ratio=-1.0), "mlp_ratio=-1.0"),
        (dict(dropout=1.5), "dropout"),
    ],
)
def test_configuration_mistakes_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_configuration_round_trip() -> None:
    config = config_of(MIXERS[1], conv_kernel=0, norm="layernorm", eos_token_id=3)
    again = StatewrightConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
    assert [config.mixer_of(i) for i in range(4)] == [*MIXERS[1], MIXERS[1][0]]
