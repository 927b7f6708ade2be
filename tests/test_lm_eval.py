"""lm-eval's own wrapper on our model and our byte tokenizer, against sums taken by hand."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("lm_eval", reason="the extra 'lm-eval' is not installed")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import LlamaConfig, LlamaForCausalLM

from statewright.cli import main
from statewright.evaluation import token_losses
from statewright.evaluation.harness import harness_model
from statewright.hf.bounded import BoundedCache
from statewright.models import StatewrightConfig, StatewrightForCausalLM
from statewright.models.tokenizers import byte_tokenizer

CONTEXT = 48


@pytest.fixture(scope="module")
def lm() -> HFLM:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = StatewrightConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        mixer=["mingru", "minlstm"],
        eos_token_id=tokenizer.eos_token_id,
    )
    model = StatewrightForCausalLM(config).double().eval()
    return HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=3, max_length=CONTEXT, device="cpu"
    )


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, pair, i) for i, pair in enumerate(arguments)]


@torch.no_grad()
def log_probabilities(lm: HFLM, ids: list[int]) -> torch.Tensor:
    """log p of each token after the first, given those before it."""
    logits = lm.model(torch.tensor([ids])).logits.log_softmax(-1)
    return logits[0, :-1].gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)


def test_loglikelihood_of_rows_of_unequal_length(lm: HFLM) -> None:
    pairs = [
        ("The cat", " sat"),
        ("a", " b c d e"),
        ("Ünï", "cödé"),
        ("long " * 6 + "er", " end"),
        ("", "x"),
    ]
    found = lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    for (context, rest), (score, greedy) in zip(pairs, found, strict=True):
        before = list(context.encode()) or [lm.eot_token_id]
        ids = before + list(rest.encode())
        want = log_probabilities(lm, ids)[len(before) - 1 :].sum()
        assert score == pytest.approx(want.item(), rel=1e-6)
        assert greedy is False


def test_loglikelihood_rolling_over_more_than_the_context(lm: HFLM) -> None:
    """lm-eval cuts the text into windows, each conditioned on one token before it."""
    texts = ["short", "a text that is longer than the context of the model, " * 3]
    found = lm.loglikelihood_rolling(
        requests("loglikelihood_rolling", [(text,) for text in texts]), disable_tqdm=True
    )
    whole = log_probabilities(lm, [lm.eot_token_id, *texts[0].encode()]).sum().item()
    assert found[0] == pytest.approx(whole, rel=1e-6)
    ids, want = list(texts[1].encode()), 0.0
    want += log_probabilities(lm, [lm.eot_token_id, *ids[:CONTEXT]]).sum().item()
    done = CONTEXT
    while done < len(ids):
        end = min(done + CONTEXT, len(ids))
        window = ids[max(end - CONTEXT - 1, 0) : end]
        want += log_probabilities(lm, window)[-(end - done) :].sum().item()
        done = end
    assert found[1] == pytest.approx(want, rel=1e-6)


def test_generate_until_is_greedy_generation_of_each_prompt_alone(lm: HFLM) -> None:
    prompts = ["one", "a longer prompt", "x" * 20]
    options = {"until": ["\n\n"], "max_gen_toks": 9, "do_sample": False}
    found = lm.generate_until(
        requests("generate_until", [(p, dict(options)) for p in prompts]), disable_tqdm=True
    )
    for prompt, text in zip(prompts, found, strict=True):
        ids = torch.tensor([list(prompt.encode())])
        out = lm.model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=256)
        want = lm.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert text == want.split("\n\n")[0] and want


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_attention_heads=2, intermediate_size=24)
    config = LlamaConfig(vocab_size=257, num_hidden_layers=2, num_key_value_heads=1, **sizes)
    return LlamaForCausalLM(config).double().eval()


@pytest.mark.parametrize("policy", ["none", "tova:budget=6", "h2o:budget=6"])
def test_the_policy_holds_in_every_call(
    llama: LlamaForCausalLM, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of unequal length in one batch, against each row alone, token by token."""
    tokenizer = byte_tokenizer()
    lm = harness_model(llama, tokenizer, policy, batch_size=3, max_length=CONTEXT)
    pairs = [("The cat sat on", " the mat"), ("a", " b c d e"), ("long " * 6 + "er", " end")]
    found = lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    for (context, rest), (score, _) in zip(pairs, found, strict=True):
        ids = torch.tensor([list((context + rest).encode())])
        losses = token_losses(llama, ids, policy)[0, len(context) - 1 :]
        assert score == pytest.approx(-losses.double().sum().item(), rel=1e-5)
    prompts = ["one", "a longer prompt", "x" * 20]
    options = {"until": ["\n\n"], "max_gen_toks": 9, "do_sample": False}
    given, generate = [], llama.generate

    def recorded(*args, **kwargs):
        given.append(kwargs.get("past_key_values"))
        return generate(*args, **kwargs)

    monkeypatch.setattr(llama, "generate", recorded)
    texts = lm.generate_until(
        requests("generate_until", [(p, dict(options)) for p in prompts]), disable_tqdm=True
    )
    assert given and all(isinstance(c, BoundedCache) == (policy != "none") for c in given)
    monkeypatch.undo()
    for prompt, text in zip(prompts, texts, strict=True):
        ids = torch.tensor([list(prompt.encode())])
        held = {} if policy == "none" else {"past_key_values": BoundedCache(llama, policy)}
        out = llama.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=256, **held)
        want = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert text == want.split("\n\n")[0] and want


def test_a_policy_changes_scores_and_short_contexts_are_cut(llama: LlamaForCausalLM) -> None:
    pair = requests("loglikelihood", [("It was the best of times, it was", " the worst")])
    scores = [
        harness_model(llama, byte_tokenizer(), name, max_length=CONTEXT).loglikelihood(
            pair, disable_tqdm=True
        )[0][0]
        for name in ("none", "window:budget=4", "context:length=12")
    ]
    assert len({round(value, 6) for value in scores}) == 3


def test_the_verb_runs_our_tasks(lm: HFLM, tmp_path, capsys) -> None:
    lm.model.float().save_pretrained(tmp_path / "model")
    lm.model.double()
    byte_tokenizer().save_pretrained(tmp_path / "model")
    story = {"question_text": "Why?", "responses": [{"response_text": "yes"}]}
    story = {"document": "word " * 50, "questions": [story]}
    (tmp_path / "dev.jsonl").write_text(json.dumps(story))
    verb = ["lm-eval", "--model", str(tmp_path / "model"), "--set", "num_samples=1"]
    verb += ["--set", "length=600", "--max-length", "700", "--output", str(tmp_path / "r.json")]
    verb += ["--set", f"data={tmp_path}/dev.jsonl"]
    assert main([*verb, "--tasks", "statewright_passkey,statewright_squality"]) == 0
    shown = capsys.readouterr().out
    assert "statewright_passkey" in shown and "acc" in shown and "rouge" in shown
    kept = json.loads((tmp_path / "r.json").read_text())
    assert kept["results"]["statewright_passkey"]["acc,none"] == 0
    assert kept["about"]["policy"] == "none" and kept["about"]["versions"]["torch"]
    capsys.readouterr()
    assert main([*verb, "--tasks", "statewright_paskey"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "unknown lm-eval task 'statewright_paskey'; did you mean statewright_passkey" in said
