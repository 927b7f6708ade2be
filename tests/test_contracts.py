"""What transformers' users may expect of a model, and what is refused by name instead."""

from __future__ import annotations

import inspect
import weakref
from types import SimpleNamespace

import pytest
import torch
import transformers
from huggingface_hub import constants
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache

from statewright import laws
from statewright.hf.cache import StateCache
from statewright.models import StatewrightConfig, StatewrightForCausalLM, StatewrightModel
from statewright.models.calibration import FILE, calibrate
from statewright.state import ModelState

V, B, T, L = 23, 2, 7, 3
BOTH = pytest.mark.parametrize("whole", [True, False], ids=["lm", "body"])


def build(mixer="mingru", **options) -> StatewrightForCausalLM:
    torch.manual_seed(0)
    sizes = dict(vocab_size=V, hidden_size=8, num_hidden_layers=L, mlp_ratio=2.0)
    return StatewrightForCausalLM(StatewrightConfig(mixer=mixer, **sizes, **options)).eval()


def tokens(length: int = T) -> Tensor:
    return torch.randint(V, (B, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def calibrated() -> StatewrightForCausalLM:
    model = build(["mamba2:head_dim=8", "mingru"])
    calibrate(model, tokens())
    return model


def same_norms(model: PreTrainedModel, other: PreTrainedModel) -> bool:
    ours, theirs = model.base_model.norms, other.base_model.norms
    return theirs is not None and all(torch.equal(a, b) for a, b in zip(ours, theirs))


def same(model: PreTrainedModel, other: PreTrainedModel) -> bool:
    return torch.equal(model(tokens())[0], other(tokens())[0])


def test_loading_has_transformers_signature() -> None:
    theirs = inspect.signature(PreTrainedModel.from_pretrained).parameters
    ours = inspect.signature(StatewrightForCausalLM.from_pretrained).parameters
    assert next(iter(ours)) == next(iter(theirs)) == "pretrained_model_name_or_path"
    theirs = list(inspect.signature(PreTrainedModel.save_pretrained).parameters)
    ours = list(inspect.signature(StatewrightForCausalLM.save_pretrained).parameters)
    assert ours[:3] == theirs[:3] == ["self", "save_directory", "is_main_process"]


def test_loading_by_name_from_a_subfolder_and_from_memory(calibrated, tmp_path) -> None:
    calibrated.save_pretrained(tmp_path / "inner")
    for loader in (StatewrightForCausalLM, AutoModelForCausalLM):
        named = loader.from_pretrained(pretrained_model_name_or_path=tmp_path / "inner")
        inside = loader.from_pretrained(str(tmp_path), subfolder="inner")
        for loaded in (named, inside):
            assert same(loaded, calibrated) and same_norms(calibrated, loaded)
    loaded, info = StatewrightModel.from_pretrained(
        tmp_path, subfolder="inner", output_loading_info=True
    )
    assert same_norms(calibrated, loaded) and not info["missing_keys"]
    config, weights = calibrated.config, calibrated.state_dict()
    loaded = StatewrightForCausalLM.from_pretrained(None, config=config, state_dict=weights)
    assert same(loaded, calibrated) and loaded.model.norms is None


def in_cache(model: PreTrainedModel, cache, name: str) -> str:
    """What the hub's client leaves behind after a download of `name` at one commit."""
    commit = "0123456789" * 4
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    model.save_pretrained(folder / "snapshots" / commit)
    return commit


@pytest.mark.parametrize("pinned", [False, True])
def test_loading_an_id_from_the_hubs_cache(calibrated, tmp_path, monkeypatch, pinned) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = in_cache(calibrated, tmp_path, "somebody/model")
    where = dict(cache_dir=tmp_path, **(dict(revision=commit) if pinned else {}))
    for loader in (StatewrightForCausalLM, AutoModelForCausalLM):
        loaded = loader.from_pretrained("somebody/model", **where)
        assert same(loaded, calibrated) and same_norms(calibrated, loaded)
    (tmp_path / "models--somebody--model" / "snapshots" / commit / FILE).unlink()
    loaded = StatewrightForCausalLM.from_pretrained("somebody/model", **where)
    assert same(loaded, calibrated) and loaded.model.norms is None


def test_what_is_pushed_is_whole(calibrated, tmp_path, monkeypatch) -> None:
    """From a directory that holds an older copy, too: only what changed is pushed."""
    calibrated.save_pretrained(tmp_path / "model")
    calibrated.model.norms = tuple(norm + 1 for norm in calibrated.model.norms)
    pushed = []

    class Hub:
        def create_repo(self, name, **options):
            return SimpleNamespace(repo_id=name)

        def create_commit(self, operations, **options):
            pushed.append({operation.path_in_repo for operation in operations})

    for module in (transformers.modeling_utils, transformers.utils.hub):
        monkeypatch.setattr(module, "hf_api", Hub)
    calibrated.save_pretrained(tmp_path / "model", push_to_hub=True)
    assert {FILE, "config.json", "model.safetensors"} <= pushed[0]
    again = StatewrightForCausalLM.from_pretrained(tmp_path / "model")
    assert same_norms(calibrated, again)


@BOTH
@pytest.mark.parametrize("configured", [False, True])
def test_tuples(whole: bool, configured: bool) -> None:
    model, ids = build(), tokens()
    part = model if whole else model.model
    asked = {} if configured else dict(return_dict=False)
    want = part(ids, output_hidden_states=True).to_tuple()
    part.config.return_dict = not configured
    for extra in ({}, dict(labels=ids)) if whole else ({},):
        got = part(ids, output_hidden_states=True, **asked, **extra)
        assert type(got) is tuple and len(got) == len(want) + len(extra)
        assert torch.equal(got[len(extra)], want[0])
        assert isinstance(got[len(extra) + 1], ModelState) and len(got[-1]) == L + 1
    assert not isinstance(part(ids, return_dict=True), tuple)
    if whole:
        assert torch.equal(model.generate(ids, max_new_tokens=2), model.generate(ids, max_length=9))


@BOTH
def test_attention_weights_are_refused_with_the_reason(whole: bool) -> None:
    model, ids = build("attention"), tokens()
    part = model if whole else model.model
    with pytest.raises(ValueError, match=r"output_attentions=True is not supported: .*slots"):
        part(ids, output_attentions=True)
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions"):
        part(ids)
    assert (
        torch.equal(part(ids, output_attentions=False)[0], build("attention")(ids)[0]) or not whole
    )
    model.config.output_attentions = False
    with pytest.raises(ValueError, match="output_attentions"):
        model.generate(ids, max_new_tokens=1, output_attentions=True, return_dict_in_generate=True)


def test_hidden_states_are_kept_only_if_asked_for() -> None:
    """Otherwise every layer's input would live as long as the call."""
    model, refs, alive = build(), [], []

    def watch(module, args):
        refs.append(weakref.ref(args[0]))
        alive.append(sum(ref() is not None for ref in refs))

    for layer in model.model.layers:
        layer.register_forward_pre_hook(watch)
    with torch.no_grad():
        model(tokens())
        assert alive == [1, 1, 1]
        out = model(tokens(), output_hidden_states=True)
    assert len(out.hidden_states) == L + 1


@BOTH
def test_use_cache_of_the_call_comes_before_the_configs(whole: bool) -> None:
    model, ids = build(), tokens()
    part = model if whole else model.model
    assert isinstance(part(ids).past_key_values, StateCache)
    assert part(ids, use_cache=False).past_key_values is None
    part.config.use_cache = False
    assert part(ids).past_key_values is None
    cache = part(ids, use_cache=True).past_key_values
    assert cache.get_seq_length() == T and part(ids).state is not None


@pytest.mark.parametrize("kind", ["static", "offloaded", "quantized", "offloaded_static"])
def test_cache_implementations_are_refused_by_name(kind: str) -> None:
    model, ids = build(), tokens()
    for options in (
        dict(cache_implementation=kind),
        dict(cache_implementation=kind, use_cache=False),
    ):
        with pytest.raises(ValueError, match=f"cache_implementation.*{kind}|{kind}.*cache_impl"):
            model.generate(ids, max_new_tokens=2, **options)
    want = model.generate(ids, max_new_tokens=2)
    assert torch.equal(model.generate(ids, max_new_tokens=2, cache_implementation="dynamic"), want)


def test_continuous_batching_is_refused() -> None:
    with pytest.raises(ValueError, match="generate_batch: continuous batching pages lists"):
        build("attention").generate_batch([[1, 2, 3]])


def test_the_cache_answers_what_transformers_asks() -> None:
    model, ids = build(), tokens()
    empty, cache = StateCache(), model(ids).past_key_values
    assert (len(empty), empty.batch_size, empty.is_initialized) == (0, -1, False)
    assert (len(cache), cache.batch_size, cache.is_initialized) == (L, B, True)
    for box, fed in ((empty, 0), (cache, T)):
        assert box.get_seq_length() == box.get_seq_length(1) == fed
        assert box.get_query_offset() == fed and box.get_mask_sizes(3, 1) == (fed + 3, 0)
        assert box.get_max_length() == -1 and box.has_previous_state() is (fed > 0)
        assert f"{fed} tokens" in repr(box) and not box.is_compileable
    again = torch.utils._pytree.tree_map(lambda leaf: leaf, cache)
    assert again.get_seq_length() == T and laws.error(again.state, cache.state) == 0
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 2 * B and cache.state.batch_size == 2 * B
    cache.reset()
    assert (len(cache), cache.get_seq_length()) == (0, 0)


def test_every_method_of_a_cache_is_ours_or_says_why_not() -> None:
    """A newer transformers' method would meet no layers: it must be decided on here."""
    decided = {"get_query_offset", "is_sliding", "is_linear", "is_dummy"}
    theirs = {name for name in vars(Cache) if not name.startswith("_")}
    assert theirs - vars(StateCache).keys() <= decided
    cache = build()(tokens()).past_key_values
    x = torch.zeros(B, 1, 1, 8)
    assert cache.is_recording_past(0) is False
    for name in ("update", "update_conv_state", "update_indexer", "get_recurrent_state"):
        with pytest.raises(ValueError, match=rf"StateCache.{name}: .*cache.state.layers"):
            getattr(cache, name)(x, x, 0)


def test_saving_from_the_first_process_alone(calibrated, tmp_path) -> None:
    calibrated.save_pretrained(tmp_path / "whole")
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {"config.json", "model.safetensors", "modeling_statewright.py", FILE} <= names
    calibrated.save_pretrained(tmp_path / "rank1", False)
    assert not any((tmp_path / "rank1").glob("*"))
    calibrated.config.save_pretrained(tmp_path / "config")
    assert (tmp_path / "config" / "modeling_statewright.py").is_file()
