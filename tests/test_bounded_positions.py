"""Positions of kept tokens: original, renumbered (StreamingLLM) and compressed, against oracles."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from bounded_models import CONFIGS, GROUPED, TYPES, WIDE, random_model, text, tiny
from torch import Tensor
from transformers import CohereConfig, Gemma3TextConfig, GlmConfig, LlamaConfig, SmolLM3Config

from statewright import laws
from statewright.hf.bounded import BoundedCache
from statewright.mixers import build_mixer
from statewright.mixers.kv import announce_turns
from statewright.mixers.rope import Turn
from statewright.policies import build_policy
from statewright.policies.placement import Placement

torch.set_num_threads(1)
MODES = ["renumbered", "compressed"]
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
BASES = {
    "sliding_attention": dict(rope_type="default", rope_theta=100.0),
    "full_attention": dict(rope_type="linear", factor=8.0, rope_theta=1e6),
}
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=32)
# What rotates in another way: scaled, interleaved, partial, two bases, layers without positions.
ROTARY = {
    "llama3": lambda: LlamaConfig(**GROUPED, rope_parameters=LLAMA3),
    "yarn": lambda: LlamaConfig(**GROUPED, rope_parameters=YARN),
    "cohere": lambda: CohereConfig(**GROUPED),
    "glm": lambda: GlmConfig(**WIDE),
    "nope": lambda: SmolLM3Config(**GROUPED, no_rope_layers=[1, 0]),
    "two_bases": lambda: Gemma3TextConfig(
        **WIDE, sliding_window=100, layer_types=TYPES, rope_parameters=BASES
    ),
    **{n: CONFIGS[n] for n in ("qwen3", "gemma2", "gpt_neox", "phi", "olmo2", "gpt_oss")},
}


@pytest.fixture(autouse=True)
def quietly():
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def model_of(name: str):
    return tiny(name) if name == "gpt_oss" else random_model(ROTARY[name]())


def feed(model, ids: Tensor, cache: BoundedCache, sizes: list[int]) -> Tensor:
    return torch.cat([model(p, past_key_values=cache).logits for p in ids.split(sizes, 1)], 1)


def survivors(cache: BoundedCache) -> list[Tensor]:
    return [s.pos.sort(-1).values for s in cache.states if s is not None]


@pytest.mark.parametrize("name", ROTARY)
def test_nothing_moves_until_something_leaves(name: str) -> None:
    model, ids = model_of(name), text(2, 24)
    before = model(ids, use_cache=False).logits
    want = model(ids, past_key_values=BoundedCache(model, "tova:budget=64")).logits
    for mode in MODES:
        for sizes in ([24], [7, 1, 16]):
            cache = BoundedCache(model, "tova:budget=64", positions=mode)
            got = feed(model, ids, cache, sizes)
            assert (got - want).abs().max() < 2e-6 * want.abs().max()
    assert torch.equal(model(ids, use_cache=False).logits, before)


def rotated(x: Tensor, place: float, model) -> Tensor:
    """x (..., Dh) by complex numbers: channel i is the real, i + Dh/2 the imaginary part."""
    real, imaginary = x.chunk(2, -1)
    angle = place * model.model.rotary_emb.inv_freq.double()
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1)


def placed(kept: list[int], mode: str) -> list[float]:
    if mode == "renumbered":
        return [float(n) for n in range(len(kept))]
    found = [0.0]
    for a, b in zip(kept, kept[1:]):
        gap = b - a
        found.append(found[-1] + (gap if gap <= 10 else math.log(math.log(gap))))
    return found


class Oracle:
    """A Llama in plain Python, float64: lists of un-rotated keys, every rotation from scratch."""

    def __init__(self, model, mode: str, budget: int, choose) -> None:
        self.model, self.mode, self.budget, self.choose = model, mode, budget, choose
        self.kept = [[] for _ in model.model.layers]
        self.rows = [{} for _ in model.model.layers]
        self.mass = [{} for _ in model.model.layers]

    def attend(self, layer: int, x: Tensor, t: int) -> Tensor:
        attention = self.model.model.layers[layer].self_attn
        q = attention.q_proj(x).view(4, 8)
        self.rows[layer][t] = attention.k_proj(x).view(2, 8), attention.v_proj(x).view(2, 8)
        kept = self.kept[layer]
        kept.append(t)
        places, weights, out = placed(kept, self.mode), [], []
        for head in range(4):
            keys = torch.stack([self.rows[layer][j][0][head // 2] for j in kept])
            keys = torch.stack([rotated(k, p, self.model) for k, p in zip(keys, places)])
            logits = keys @ rotated(q[head], places[-1], self.model) / 8**0.5
            weights.append(logits.softmax(0))
            values = torch.stack([self.rows[layer][j][1][head // 2] for j in kept])
            out.append(weights[-1] @ values)
        for n, j in enumerate(kept):
            seen = self.mass[layer].get(j, 0.0)
            self.mass[layer][j] = seen + sum(w[n].item() for w in weights)
        if len(kept) > self.budget:
            mean = [sum(w[n].item() for w in weights) / 4 for n in range(len(kept))]
            kept.remove(self.choose(kept, mean, self.mass[layer]))
        return attention.o_proj(torch.cat(out))

    def __call__(self, ids: Tensor) -> Tensor:
        logits = []
        for t, token in enumerate(ids[0]):
            x = self.model.model.embed_tokens(token)
            for n, block in enumerate(self.model.model.layers):
                x = x + self.attend(n, block.input_layernorm(x), t)
                x = x + block.mlp(block.post_attention_layernorm(x))
            logits.append(self.model.lm_head(self.model.model.norm(x)))
        return torch.stack(logits).unsqueeze(0)


CHOICES = {
    "tova:budget=7": lambda kept, mean, mass: kept[mean.index(min(mean))],
    "h2o:budget=7:recent=3:per=layer": lambda kept, mean, mass: min(kept[:-3], key=mass.get),
    "window:budget=7:sinks=2": lambda kept, mean, mass: kept[2],
}


@pytest.mark.parametrize("policy", CHOICES)
@pytest.mark.parametrize("mode", ["renumbered", "compressed"])
def test_places_are_those_of_an_oracle(mode: str, policy: str) -> None:
    """Logits and survivors, in one call, in pieces and token by token."""
    model, ids = model_of("llama3"), text(1, 44)
    oracle = Oracle(model, mode, 7, CHOICES[policy])
    want = oracle(ids)
    for sizes in ([44], [9, 20, 1, 14], [1] * 44):
        cache = BoundedCache(model, policy, positions=mode)
        got = feed(model, ids, cache, sizes)
        # float32 norms and angles, as in transformers.
        assert (got - want).abs().max() < 1e-5 * want.abs().max()
        for mine, theirs in zip(survivors(cache), oracle.kept, strict=True):
            assert mine[0].tolist() == [theirs, theirs]
    longest = max(b - a for kept in oracle.kept for a, b in zip(kept, kept[1:]))
    assert longest > 10 or "window" not in policy


def test_a_plain_window_is_the_same_wherever_it_stands() -> None:
    """Rotations see distances only, and a plain window keeps neighbours."""
    model, ids = model_of("llama3"), text(2)
    want = feed(model, ids, BoundedCache(model, "window:budget=9"), [40])
    for mode in MODES:
        got = feed(model, ids, BoundedCache(model, "window:budget=9", positions=mode), [12, 28])
        assert (got - want).abs().max() < 1e-5 * want.abs().max()
    sinks = BoundedCache(model, "window:budget=9:sinks=2")
    moved = BoundedCache(model, "window:budget=9:sinks=2", positions="renumbered")
    assert (feed(model, ids, sinks, [40]) - feed(model, ids, moved, [40])).abs().max() > 1e-3


@pytest.mark.parametrize("sinks", [0, 3])
def test_one_layer_renumbered_is_the_model_on_the_kept_text(sinks: int) -> None:
    config = LlamaConfig(**(GROUPED | dict(num_hidden_layers=1)))
    model, ids, budget = random_model(config, "sdpa"), text(1, 30), 8
    cache = BoundedCache(model, f"window:budget={budget}:sinks={sinks}", positions="renumbered")
    got = feed(model, ids, cache, [30])
    for t in range(30):
        recent = range(max(sinks, t - (budget - sinks)), t + 1)
        seen = ids[:, [*range(min(sinks, t + 1)), *recent]]
        want = model(seen, use_cache=False).logits[:, -1]
        assert (got[:, t] - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("policy", ["tova:budget=6", "h2o:budget=6", "keydiff:budget=6"])
def test_padding_copies_and_generate(policy: str, mode: str) -> None:
    model, ids, lengths = model_of("phi"), text(3, 17), [17, 4, 11]
    mask = torch.arange(17) >= 17 - torch.tensor(lengths).unsqueeze(1)
    ids = ids.masked_fill(~mask, 0)
    options = dict(max_new_tokens=10, min_new_tokens=10, do_sample=False, pad_token_id=0)
    cache = BoundedCache(model, policy, positions=mode)
    together = model.generate(ids, attention_mask=mask.long(), past_key_values=cache, **options)
    for row, length in enumerate(lengths):
        alone = BoundedCache(model, policy, positions=mode)
        want = model.generate(ids[row : row + 1, -length:], past_key_values=alone, **options)
        assert torch.equal(together[row, 17:], want[0, length:])
    fork, new = copy.deepcopy(alone), text(1, 5, seed=7)
    assert torch.equal(feed(model, new, alone, [3, 2]), feed(model, new, fork, [3, 2]))
    alone.reset()
    again = model.generate(ids[2:, -11:], past_key_values=alone, **options)
    assert torch.equal(again, want)


def test_a_bfloat16_key_is_stored_before_any_rotation() -> None:
    """The first layer's keys are bit for bit what the projection gave, however long ago."""
    model = random_model(LlamaConfig(**GROUPED), "sdpa", torch.bfloat16)
    ids = text(1, 90)
    cache = BoundedCache(model, "tova:budget=9:sinks=2", positions="renumbered")
    assert feed(model, ids, cache, [20] + [1] * 70).isfinite().all()
    block, state = model.model.layers[0], cache.states[0]
    keys = block.self_attn.k_proj(block.input_layernorm(model.model.embed_tokens(ids)))
    keys = keys.view(1, 90, 2, 8).transpose(1, 2)
    assert torch.equal(state.k, keys.gather(2, state.pos.unsqueeze(-1).expand_as(state.k)))


def test_the_paper_s_gaps_literally() -> None:
    place = Placement("compressed", lambda x, places: x).places
    for gap, want in ((1, 1), (10, 10), (11, 0.875), (4096, 2.118), (70_000, 2.412)):
        found = place(torch.tensor([[[5, -1, 5 + gap, 6 + gap]]]))
        assert found[0, 0].tolist() == pytest.approx([0, 0, want, want + 1], abs=1e-3)


def test_refusals_say_why() -> None:
    for name in ("gpt2", "opt"):
        with pytest.raises(ValueError, match=r"no rotary positions .learned ones are part of"):
            BoundedCache(tiny(name), "tova:budget=6", positions="renumbered")
    dynamic = dict(rope_type="dynamic", rope_theta=1e4, factor=4.0)
    model = random_model(LlamaConfig(**GROUPED, rope_parameters=dynamic))
    with pytest.raises(ValueError, match="'dynamic' rotary scaling, whose frequencies change"):
        BoundedCache(model, "tova:budget=6", positions="compressed")
    with pytest.raises(ValueError, match="positions='shifted', expected one of original, "):
        BoundedCache(tiny("llama"), "tova:budget=6", positions="shifted")
    with pytest.raises(ValueError, match="attention: positions='shifted'"):
        build_mixer("attention:positions=shifted", 8)
    model = copy.deepcopy(tiny("llama"))
    with pytest.raises(ValueError, match=r"call model\.eval"):
        BoundedCache(model.train(), "tova:budget=6", positions="renumbered")


def test_rotations_that_are_not_known_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that turn with the positions, and a rotation by another rule."""
    from transformers.models.llama import modeling_llama

    model, real = random_model(LlamaConfig(**GROUPED)), modeling_llama.apply_rotary_pos_emb

    def backwards(q, k, cos, sin, **kwargs):
        return real(q, k, cos, -sin, **kwargs)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", backwards)
    with pytest.raises(ValueError, match="in a way that is not known"):
        BoundedCache(model, "tova:budget=6", positions="renumbered")
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", real)

    class Leaky(torch.nn.Module):
        def __init__(self, inner) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, position_embeddings=None, **kwargs):
            out, weights = self.inner(position_embeddings=position_embeddings, **kwargs)
            return out + position_embeddings[1].sum(-1, keepdim=True), weights

    model.model.layers[1].self_attn = Leaky(model.model.layers[1].self_attn)
    with pytest.raises(ValueError, match="for more than queries and keys"):
        BoundedCache(model, "tova:budget=6", positions="renumbered")


def test_taking_tokens_one_by_one_is_announced_once() -> None:
    model, ids = tiny("llama", "sdpa"), text(1, 20)
    announce_turns.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model(ids, past_key_values=BoundedCache(model, "tova:budget=6", positions="renumbered"))
    assert sum("one by one" in str(w.message) for w in caught) == 1


@pytest.mark.parametrize("law", laws.LAWS)
@pytest.mark.parametrize("flags", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize(
    "options, policy",
    [
        ("num_heads=4:num_kv_heads=2:positions=renumbered", "tova:budget=7"),
        ("num_heads=4:num_kv_heads=2:positions=compressed", "h2o:budget=6:every=3"),
        ("num_heads=4:positions=compressed:window=9", "keynorm:budget=5:sinks=1"),
        ("num_heads=4:positions=renumbered:window=9", None),
    ],
)
def test_the_mixer_obeys(options: str, policy: str | None, flags: bool, law: str) -> None:
    torch.manual_seed(0)
    mixer = build_mixer(f"attention:head_dim=4:{options}", 6).double()
    subject = mixer if policy is None else laws.Bounded(mixer, build_policy(policy))
    case = laws.Case(flags=flags, length=27, splits=(8, 9, 20))
    with torch.enable_grad():
        finding = laws.LAWS[law](subject, case)
    assert finding.ok, finding
    if law == "chunk":
        assert (finding := laws.chunk(subject, case)).ok, finding


def test_turns_agree_with_the_mixer_s_rotation() -> None:
    from statewright.mixers.rope import frequencies, rotate, turn_by

    x, pos = torch.randn(2, 3, 5, 8).double(), torch.arange(5).expand(2, 5)
    want = rotate(x, pos, frequencies(8, 1e4, "none", x.device))
    places = pos.double().unsqueeze(1).expand(2, 3, 5)
    assert (turn_by(8, 1e4, "none")(x, places) - want).abs().max() < 1e-6
    pairs = Turn(turn_by(8, 1e4, "none").angles, interleaved=True)
    mixed = x.unflatten(-1, (2, 4)).transpose(-1, -2).flatten(-2)
    back = pairs(mixed, places).unflatten(-1, (4, 2)).transpose(-1, -2).flatten(-2)
    assert (back - want).abs().max() < 1e-6
