"""Tasks as pure functions, and a model that knows the answer scored through `evaluate`."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from statewright.evaluation import evaluate, perplexity, token_losses
from statewright.hf.bounded import BoundedCache
from statewright.models import StatewrightConfig, StatewrightForCausalLM
from statewright.models.tokenizers import byte_tokenizer
from statewright.policies import build_policy
from statewright.tasks import Passkey, build_task, by_depth, recall_length

torch.set_num_threads(1)
TOKENIZER = byte_tokenizer()


def llama(dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
    )
    model = LlamaForCausalLM(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


def test_passkey_is_the_papers() -> None:
    task = Passkey(length=1000)
    batch = task.draw(20, 7, TOKENIZER)
    # A space and five digits; the paper's 5 where the tokenizer needs fewer, or as told.
    assert len(batch.samples) == 20 and batch.new_tokens == 6
    assert Passkey(length=1000, new_tokens=9).draw(2, 7, TOKENIZER).new_tokens == 9
    for i, sample in enumerate(batch.samples):
        text = TOKENIZER.decode(sample.input_ids)
        lines = text.splitlines()
        assert 850 < len(sample.input_ids) <= 1000
        assert text.count(sample.answer) == 2 and len(sample.answer) == 5
        assert lines[-1] == "What is the passkey? The passkey is"
        filler = lines[1:-1]
        assert len([line for line in filler if line.startswith("The grass is green")]) == 8
        depth = (i + 0.5) / 20
        assert sample.place == depth
        assert f"The passkey is {sample.answer}." in filler[int(depth * 8)]
    again, other = task.draw(20, 7, TOKENIZER), task.draw(20, 8, TOKENIZER)
    answers = [[s.answer for s in b.samples] for b in (batch, again, other)]
    assert answers[0] == answers[1] != answers[2]
    with pytest.raises(ValueError, match=r"length=100, expected at least \d+ tokens"):
        Passkey(length=100).draw(1, 0, TOKENIZER)


def test_depth_bins_and_recall_length() -> None:
    places = [(i + 0.5) / 200 for i in range(200)]
    assert by_depth(places, [p < 0.5 for p in places]) == [1.0] * 5 + [0.0] * 5
    assert math.isnan(by_depth([0.05], [True])[9])
    assert recall_length({1024: 1.0, 2048: 0.95, 4096: 0.94}) == 2048
    assert recall_length({1024: 0.5}) == 0


def test_windows_of_a_text(tmp_path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("".join(chr(97 + i % 26) for i in range(500)))
    task = build_task(f"perplexity:length=100:text={path}")
    ids = torch.cat([s.input_ids for s in task.draw(5, 0, TOKENIZER).samples])
    assert TOKENIZER.decode(ids) == path.read_text()
    first, second = (task.draw(3, seed, TOKENIZER).samples[0].input_ids for seed in (1, 2))
    assert not torch.equal(first, second)
    assert torch.equal(first, task.draw(3, 1, TOKENIZER).samples[0].input_ids)
    with pytest.raises(ValueError, match="6 windows of 100 tokens do not fit into 500"):
        task.draw(6, 0, TOKENIZER)
    for text, said in (("perplexity", "text is empty"), ("passkye", "did you mean 'passkey'")):
        with pytest.raises(ValueError, match=said):
            build_task(text).draw(1, 0, TOKENIZER)


@pytest.mark.parametrize("policy", ["tova:budget=9", "h2o:budget=8", "window:budget=9:sinks=1"])
def test_exact_perplexity_is_cached_decoding(policy: str) -> None:
    model, ids = llama(), torch.randint(0, 256, (2, 60), generator=torch.Generator().manual_seed(1))
    cache, logits = BoundedCache(model, policy), []
    with torch.no_grad():
        for t in range(59):
            logits.append(model(ids[:, t : t + 1], past_key_values=cache).logits)
    logits = torch.cat(logits, 1).float()
    want = torch.nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none")
    for piece in (59, 17):
        torch.testing.assert_close(token_losses(model, ids, policy, piece=piece), want)
    full = token_losses(model, ids)
    assert (full - want).abs().max() > 1e-3
    direct = model(ids, labels=ids, use_cache=False).loss
    assert perplexity(full) == pytest.approx(math.exp(direct), rel=1e-5)
    survivors = BoundedCache(model, policy)
    with torch.no_grad():
        model(ids[:, :59], past_key_values=survivors)
    for a, b in zip(survivors.states, cache.states, strict=True):
        assert torch.equal(a.pos.sort(-1).values, b.pos.sort(-1).values)


def test_a_model_of_ours_and_its_policy(tmp_path) -> None:
    torch.manual_seed(0)
    config = StatewrightConfig(hidden_size=16, num_hidden_layers=2, mixer="attention:num_heads=2")
    model = StatewrightForCausalLM(config).eval()
    path = tmp_path / "book.txt"
    path.write_text("It was the best of times, it was the worst of times. " * 8)
    task = f"perplexity:length=120:text={path}"
    full = evaluate(model, TOKENIZER, task, n=3)
    bound = evaluate(model, TOKENIZER, task, "tova:budget=4", n=3)
    assert full.metrics["perplexity"] != bound.metrics["perplexity"]
    assert (full.policy, bound.policy) == ("none", "tova:budget=4")
    assert full.task == task and len(bound.per_sample) == 3
    idle = evaluate(model, TOKENIZER, task, "tova:budget=1k", n=3)
    assert idle.per_sample == pytest.approx(full.per_sample, rel=1e-5)


def test_answers_are_read_from_the_continuation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that copies the key for shallow needles only gets exactly those right."""
    model, seen = llama(torch.float32), []

    def oracle(ids, past_key_values=None, **options):
        seen.append(past_key_values)
        text = TOKENIZER.decode(ids[0])
        key = text.split("The passkey is ")[1][:5]
        early = text.index(key) < 400
        return torch.cat(
            [ids, torch.tensor([TOKENIZER.encode(f" {key if early else 'no...'}")])], 1
        )

    monkeypatch.setattr(model, "generate", oracle)
    task = Passkey(length=1000, new_tokens=6)
    result = evaluate(model, TOKENIZER, task, "tova:budget=64", n=10)
    right = by_depth(result.places, [v == 1 for v in result.per_sample], bins=2)
    assert right[0] > right[1] and result.metrics["accuracy"] == sum(result.per_sample) / 10
    assert all(isinstance(cache, BoundedCache) for cache in seen)
    assert result.task == "passkey:length=1000:new_tokens=6"
    monkeypatch.undo()
    real = evaluate(model, TOKENIZER, "passkey:length=400", build_policy("h2o:budget=16"), n=2)
    assert real.metrics["accuracy"] == 0.0
