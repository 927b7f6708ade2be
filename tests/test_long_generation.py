"""Stories: prompts, what is counted in them, and the judge of two."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from statewright.cli import main
from statewright.evaluation import Plan, evaluate, judge, run_plan, story_scores
from statewright.evaluation import judged as judged_module
from statewright.evaluation.judge import BEFORE, FIRST, REPLY, SECOND
from statewright.models import StatewrightConfig, StatewrightForCausalLM
from statewright.models.tokenizers import byte_tokenizer
from statewright.tasks import build_task
from statewright.tasks.stories import ASKED, PREMISES

torch.set_num_threads(1)
TOKENIZER = byte_tokenizer()
A, B, C = 65, 66, 67


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = dict(hidden_size=16, num_attention_heads=2, intermediate_size=24)
    config = LlamaConfig(vocab_size=257, num_hidden_layers=2, num_key_value_heads=1, **sizes)
    return LlamaForCausalLM(config).eval()


def writer(seed: int = 0) -> LlamaForCausalLM:
    """Writes letters, and other ones after other premises."""
    model = llama(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    model.generation_config.suppress_tokens = [*range(97), *range(123, 257)]
    return model


class Critic(nn.Module):
    """Its logits of A, B and C are what `likes(first, second)` says."""

    def __init__(self, likes) -> None:
        super().__init__()
        self.likes, self.device, self.seen = likes, torch.device("cpu"), []

    def forward(self, ids: Tensor) -> SimpleNamespace:
        text = TOKENIZER.decode(ids[0])
        assert text.startswith(BEFORE) and text.endswith(REPLY)
        first, _, rest = text.partition(FIRST)[2].partition(SECOND)
        second = rest.partition("\n\nWhich answer")[0]
        self.seen.append((first, second))
        logits = torch.full((1, ids.shape[1], 257), -9.0)
        logits[0, -1, [A, B, C]] = torch.tensor(self.likes(first, second))
        return SimpleNamespace(logits=logits)


def longer(first: str, second: str) -> list[float]:
    if len(first) == len(second):
        return [0.0, 0.0, 1.0]
    return [2.0, 0.0, 0.0] if len(first) > len(second) else [0.0, 2.0, 0.0]


def test_twenty_premises_and_their_styles() -> None:
    assert len(set(PREMISES)) == 20
    batch = build_task("stories:new_tokens=5").draw(20, 0, TOKENIZER)
    assert batch.new_tokens == 5 and len(batch.samples) == 20
    for premise, sample in zip(PREMISES, batch.samples):
        text = TOKENIZER.decode(sample.input_ids)
        assert ASKED.format(premise=premise) in text and text.endswith("### Response:\n")
    for asked in ("4,000 words", "twenty characters", "three countries", "nine cities"):
        assert asked in ASKED
    plain = build_task("stories:style=plain").draw(3, 5, TOKENIZER)
    drawn = [TOKENIZER.decode(sample.input_ids) for sample in plain.samples]
    assert len(set(drawn)) == 3 and set(drawn) <= set(PREMISES) and drawn != list(PREMISES[:3])
    chat = byte_tokenizer()
    chat.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<me>{% endif %}"
    )
    text = TOKENIZER.decode(build_task("stories:style=chat").draw(1, 0, chat).samples[0].input_ids)
    assert text == f"<user>{ASKED.format(premise=PREMISES[0])}<me>"


def test_premises_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "premises.txt"
    path.write_text("One day.\n\n  Two nights. \n", encoding="utf-8")
    batch = build_task(f"stories:prompts={path}:style=plain").draw(2, 0, TOKENIZER)
    assert [TOKENIZER.decode(s.input_ids) for s in batch.samples] == ["One day.", "Two nights."]


def test_what_is_counted_by_hand() -> None:
    """a b a b a b: 4-grams abab baba abab; together with c: 7 words, 5 pairs."""
    found = story_scores(["a b A  b a\nb", "c"], [9, 2])
    assert found.per_sample == (9, 2) and found.metrics["tokens"] == 5.5
    assert found.metrics["words"] == 3.5
    assert found.metrics["repetition"] == pytest.approx((1 - 2 / 3) / 2)
    assert found.metrics["distinct_1"] == pytest.approx(3 / 7)
    assert found.metrics["distinct_2"] == pytest.approx(2 / 5)
    assert found.metrics["distinct_3"] == pytest.approx(2 / 4)
    assert found.metrics["distinct_4"] == pytest.approx(2 / 3)
    assert set(story_scores([""], [0]).metrics.values()) == {0.0}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_seed_writes_the_same_stories(temperature: float) -> None:
    model = writer()
    task = f"stories:style=plain:new_tokens=20:temperature={temperature}"

    def texts(seed: int, rows: int = 1, n: int = 3) -> tuple[str, ...]:
        torch.manual_seed(rows)
        return evaluate(model, TOKENIZER, task, "tova:budget=16", n, seed, rows=rows).texts

    before = torch.random.get_rng_state()
    first = texts(0)
    assert len(first) == 3 and first == texts(0, rows=0)
    torch.random.set_rng_state(before)
    evaluate(model, TOKENIZER, task, n=1)
    assert torch.equal(torch.random.get_rng_state(), before), "the global generator was used"
    assert first != texts(1)
    if temperature:
        assert first[:2] == texts(0, n=2), "a sample depends on how many there are"
        assert first != evaluate(model, TOKENIZER, task.replace("0.8", "0.4"), n=3).texts


def test_the_length_is_the_metric_that_is_compared() -> None:
    found = evaluate(llama(), TOKENIZER, "stories:style=plain:new_tokens=20", n=2)
    assert found.per_sample == (20, 20) and next(iter(found.metrics)) == "tokens"
    assert set(found.metrics) >= {"words", "repetition", "distinct_1", "distinct_4"}


def test_verdicts_by_hand() -> None:
    """Two wins, a loss, a tie by C, and one pair that is the same text."""
    texts = ["long text", "longer text", "x", "ab", "same"]
    references = ["short", "short", "longest", "cd", "same"]
    critic = Critic(longer)
    found = judge(critic, TOKENIZER, ["p"] * 5, texts, references)
    assert (found.wins, found.losses, found.ties, found.identical) == (2, 1, 2, 1)
    assert found.per_sample == (1, 1, 0, 0.5, 0.5) and found.win_rate == 0.6
    # Bonett and Price: a win and a loss more, of 7 pairs.
    more, z = [*found.per_sample, 1, 0], 1.959964
    middle = sum(more) / 7
    width = z * math.sqrt(sum((v - middle) ** 2 for v in more) / 7 / 7)
    assert found.interval == pytest.approx((middle - width, middle + width))
    assert found.letters == {"A": 3 / 8, "B": 3 / 8, "C": 2 / 8} and found.position_bias == 0
    sure = math.exp(2) / (1 + math.exp(2))
    assert found.preference == pytest.approx((2 * sure + (1 - sure) + 0.5 + 0.5) / 5)
    assert critic.seen[:2] == [("long text", "short"), ("short", "long text")]
    assert len(critic.seen) == 8


def test_who_swaps_places_gets_the_opposite() -> None:
    texts, references = ["aaa", "b", "cc"], ["a", "bbb", "cc!"]
    there = judge(Critic(longer), TOKENIZER, ["p"] * 3, texts, references)
    back = judge(Critic(longer), TOKENIZER, ["p"] * 3, references, texts)
    assert there.win_rate + back.win_rate == pytest.approx(1)
    assert there.preference + back.preference == pytest.approx(1)
    assert there.wins == back.losses == 1


def test_a_judge_that_looks_at_the_place_only_says_nothing() -> None:
    blind = judge(
        Critic(lambda first, second: [3.0, 1.0, 0.0]), TOKENIZER, ["p"] * 4, ["a"] * 4, ["b"] * 4
    )
    assert (blind.ties, blind.win_rate, blind.position_bias) == (4, 0.5, 1)
    assert (
        blind.preference == pytest.approx(0.5) and blind.interval[0] < 0.3 < 0.7 < blind.interval[1]
    )


def test_long_texts_are_cut_alike_and_counted() -> None:
    critic = Critic(longer)
    found = judge(critic, TOKENIZER, ["p"], ["x" * 900], ["y" * 300], length=700)
    first, second = critic.seen[0]
    assert len(first) == len(second) and set(first) == {"x"} and set(second) == {"y"}
    assert found.cut == 900 + 300 - 2 * len(first) and found.ties == 1
    with pytest.raises(ValueError, match=r"length=100, expected at least \d+ tokens"):
        judge(critic, TOKENIZER, ["p"], ["x"], ["y"], length=100)
    with pytest.raises(ValueError, match="1 prompts, 2 texts and 1 references"):
        judge(critic, TOKENIZER, ["p"], ["x", "y"], ["y"])
    merged = SimpleNamespace(encode=lambda text, add_special_tokens: [1, 2])
    with pytest.raises(ValueError, match="no single tokens for A, B and C"):
        judge(critic, merged, ["p"], ["x"], ["y"])


def test_any_model_judges(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = StatewrightConfig(hidden_size=16, num_hidden_layers=1, vocab_size=257)
    for model in (llama(), StatewrightForCausalLM(config).eval()):
        found = judge(model, TOKENIZER, ["p", "q"], ["a story", "b"], ["one", "b"])
        assert found.n == 2 and found.identical == 1 and 0 < found.preference < 1


STORIES = "stories:style=plain:new_tokens=12"


def plan(**changes) -> Plan:
    options = dict(policies=("tova:budget=8", "window:budget=8"), num_samples=3, judge="critic")
    return Plan(("writer",), (STORIES, "mqar:pairs=2:length=16"), **{**options, **changes})


def test_verdicts_are_cells_of_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, models = tmp_path / "r.json", {"writer": writer(), "critic": llama(seed=1)}
    load = lambda name: (models[name], TOKENIZER)  # noqa: E731
    found = dict(run_plan(plan(), load, path))
    kept = json.loads(path.read_text())["cells"]
    assert set(kept) == set(found) and len(found) == 3 + 2 + 3
    told = [r for r in found.values() if r["task"].endswith("judged by critic")]
    assert [r["policy"] for r in told] == ["tova:budget=8", "window:budget=8"]
    stories = [r for r in found.values() if r["task"] == STORIES]
    for verdict, own in zip(told, stories[1:]):
        direct = judge(
            models["critic"], TOKENIZER, list(PREMISES[:3]), own["texts"], stories[0]["texts"]
        )
        assert verdict["per_sample"] == list(direct.per_sample)
        assert verdict["metrics"]["preference"] == pytest.approx(direct.preference)
        assert (
            verdict["metrics"]["win_rate"]
            == direct.win_rate
            == 0.5 + (verdict["against_none"]["difference"])
        )
    ran = []
    monkeypatch.setattr(judged_module, "judge", lambda *args: ran.append(1))
    before = path.read_bytes()
    assert dict(run_plan(plan(), load, path)) == found and not ran
    assert path.read_bytes() == before
    monkeypatch.undo()
    models["critic"] = llama(seed=2)
    assert len(dict(run_plan(plan(), load, path))) == 8
    assert len(json.loads(path.read_text())["cells"]) == 10, "another judge, other verdicts"
    with pytest.raises(ValueError, match="no task is judged, expected stories"):
        plan().__class__(("writer",), ("mqar",), judge="critic")


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    writer().save_pretrained(tmp_path / "m")
    TOKENIZER.save_pretrained(tmp_path / "m")
    capsys.readouterr()
    verb = ["eval", str(tmp_path / "m"), "--policy", "tova:budget=8", "-n", "2"]
    judged = [*verb, "--task", STORIES, "--judge", str(tmp_path / "m")]
    assert main(judged) == 0
    shown = capsys.readouterr().out
    assert "judged by" in shown and "win_rate" in shown and "distinct_4" in shown
    for code, more, said in (
        (1, ["--task", "mqar", "--judge", str(tmp_path / "m")], "no task is judged"),
        (2, ["--task", STORIES, "--judge", str(tmp_path / "none")], "none"),
    ):
        assert main([*verb, *more]) == code
        told = capsys.readouterr().err
        assert said in told and told.count("\n") == 1, told
