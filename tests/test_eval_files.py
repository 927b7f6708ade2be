"""Tasks from files and on token ids: their data, their scores, and what is said of bad files."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from statewright.evaluation import evaluate, score
from statewright.models import StatewrightConfig, StatewrightForCausalLM
from statewright.models.tokenizers import byte_tokenizer
from statewright.tasks import build_task, digest

torch.set_num_threads(1)
TOKENIZER = byte_tokenizer()
needs_rouge = pytest.mark.skipif(
    importlib.util.find_spec("rouge_score") is None, reason="the extra 'eval' is not installed"
)
STORY = "Once there was a lighthouse. " * 30
STORIES = [
    {
        "document": STORY + str(i),
        "questions": [
            {
                "question_text": f"What happens in part {j}?",
                "responses": [{"response_text": f"Reply {i} {j} {k}"} for k in range(2)],
            }
            for j in range(2)
        ],
    }
    for i in range(2)
]


def paper(**answer) -> dict:
    whole = {"unanswerable": False, "extractive_spans": [], "yes_no": None, "free_form_answer": ""}
    return {
        "title": "A title",
        "abstract": "An abstract",
        "full_text": [{"section_name": "Method", "paragraphs": ["First.", "", "Second."]}],
        "qas": [{"question": "What is it?", "answers": [{"answer": {**whole, **answer}}]}],
    }


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    path = tmp_path / "dev.jsonl"
    path.write_text("\n".join(map(json.dumps, STORIES)) + "\n")
    return path


class Scripted(nn.Module):
    """A model whose most likely next token is what `choose(ids)` says."""

    def __init__(self, choose, vocab: int = 300) -> None:
        super().__init__()
        self.choose, self.vocab = choose, vocab
        self.weight = nn.Parameter(torch.zeros(1))
        self.device = self.weight.device
        text = SimpleNamespace(vocab_size=vocab)
        self.config = SimpleNamespace(get_text_config=lambda: text)

    def forward(self, ids, **options):
        return SimpleNamespace(logits=nn.functional.one_hot(self.choose(ids), self.vocab).float())

    def generate(self, ids, **options):
        reply = torch.tensor([TOKENIZER.encode(self.choose(TOKENIZER.decode(ids[0])))])
        return torch.cat([ids, reply], 1)


GOLDEN = {
    "copying:length=20:tokens=4": ("443465653765", "8b9805df9ca9"),
    "selective-copy:length=20:tokens=4": ("6e8e60e27059", "e487f26c9591"),
    "mqar:pairs=4:length=32": ("34fa74ea0718", "bfc6073eeeb0"),
    "passkey:length=600": ("198c17f591fd", "e92197bac09b"),
    "niah:length=700:keys=2:hay=It rains. The sun is out. We go home.": (
        "cf5bf4e2bf35",
        "affbc4a16be6",
    ),
    "newline:length=50": ("199fb9764b57", "199fb9764b57"),
}


@pytest.mark.parametrize("task", GOLDEN)
def test_data_of_a_seed_never_change(task: str) -> None:
    found = tuple(digest(build_task(task).draw(3, seed, TOKENIZER))[:12] for seed in (0, 1))
    assert found == GOLDEN[task]


@pytest.mark.parametrize("name", ["copying", "selective-copy"])
def test_copying_is_solved_by_the_definition_alone(name: str) -> None:
    task = build_task(f"{name}:length=30:tokens=6:vocab=6")

    def oracle(ids):
        row = ids[0]
        data = row[(row != 0) & (row != 5)]
        return torch.cat([torch.zeros(30, dtype=torch.long), data])[None]

    assert evaluate(Scripted(oracle), None, task, n=20).metrics == {"accuracy": 1, "chance": 0.25}
    constant = evaluate(Scripted(lambda ids: torch.full_like(ids, 3)), None, task, n=300)
    assert constant.metrics["accuracy"] == pytest.approx(0.25, abs=0.03)
    assert constant.interval is not None and constant.interval[1] - constant.interval[0] < 0.08
    sample = task.draw(1, 5).samples[0]
    if name == "copying":
        assert (sample.input_ids[:6] == sample.targets[30:]).all()
        assert (sample.input_ids[6:30] == 5).all()


def test_newlines_are_one_repeated_id() -> None:
    batch = build_task("newline:length=40").draw(20, 3, TOKENIZER)
    assert len(batch.samples) == 1 and batch.samples[0].input_ids.tolist() == [10] * 40
    config = StatewrightConfig(hidden_size=8, num_hidden_layers=1, vocab_size=257)
    result = evaluate(StatewrightForCausalLM(config).eval(), TOKENIZER, "newline:length=40")
    assert result.n == 1 and result.metrics["perplexity"] > 1 and result.interval is None


def test_a_story_is_cut_at_its_end_and_the_question_never(stories: Path) -> None:
    task = build_task(f"squality:data={stories}:length=400")
    batch = task.draw(4, 0, TOKENIZER)
    for i, sample in enumerate(batch.samples):
        text, (a, b) = TOKENIZER.decode(sample.input_ids), divmod(i, 2)
        assert len(sample.input_ids) == 400
        assert text.startswith("You are given a story and a question. Answer the question in a")
        assert text.endswith(f"\n\nQuestion:\nWhat happens in part {b}?\n\nAnswer:\n")
        kept, _, _ = text.partition("... [The rest of the story is omitted]\n\nQuestion:")
        kept = kept.partition("Story:\n")[2]
        assert STORY.startswith(kept) and sample.cut == len(STORY) + 1 - len(kept) > 0
        assert sample.references == (f"Reply {a} {b} 0", f"Reply {a} {b} 1")
    whole = build_task(f"squality:data={stories}:length=4k").draw(4, 0, TOKENIZER)
    text = TOKENIZER.decode(whole.samples[3].input_ids)
    assert all(s.cut == 0 for s in whole.samples) and f"{STORY}1\n\nQuestion" in text
    drawn = [task.draw(2, seed, TOKENIZER) for seed in (1, 1, 4)]
    assert digest(drawn[0]) == digest(drawn[1]) != digest(drawn[2])
    with pytest.raises(ValueError, match="squality: n=5 questions asked for, the file has 4"):
        task.draw(5, 0, TOKENIZER)
    with pytest.raises(ValueError, match=r"length=100, expected at least \d+ tokens"):
        build_task(f"squality:data={stories}:length=100").draw(1, 0, TOKENIZER)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ({"unanswerable": True, "free_form_answer": "x"}, "unanswerable"),
        ({"extractive_spans": ["a b", "c"]}, "a b, c"),
        ({"free_form_answer": "A vocabulary"}, "A vocabulary"),
        ({"yes_no": True}, "yes"),
        ({"yes_no": False}, "no"),
    ],
)
def test_qasper_answers(answer: dict, reference: str, tmp_path: Path) -> None:
    path = tmp_path / "dev.json"
    path.write_text(json.dumps({"1909": paper(**answer)}))
    task = build_task(f"qasper:data={path}")
    sample = task.draw(1, 0, TOKENIZER).samples[0]
    assert sample.references == (reference,)
    article = (
        "Article:\nA title\n\nAn abstract\n\nMethod\n\nFirst.\n\nSecond.\n\nQuestion:\nWhat is it?"
    )
    assert article in TOKENIZER.decode(sample.input_ids)
    oracle = Scripted(lambda text: reference)
    assert evaluate(oracle, TOKENIZER, task, n=1).metrics == {"f1": 1}
    assert evaluate(Scripted(lambda text: "zzz"), TOKENIZER, task, n=1).metrics == {"f1": 0}


def bad_story(change) -> str:
    stories = json.loads(json.dumps(STORIES))
    change(stories[1])
    return "\n".join(map(json.dumps, stories))


BAD_STORIES = {
    "line 2: not JSON": '{"document": "a", "questions": []}\n{"docum',
    "line 1: expected an object, got a list": "[]",
    "line 2: field 'document' is missing": bad_story(lambda s: s.pop("document")),
    "line 2: field 'questions' is a text, expected a list": bad_story(
        lambda s: s.update(questions="all")
    ),
    r"line 2, questions\[1\].responses\[0\]: field 'response_text' is null": bad_story(
        lambda s: s["questions"][1]["responses"][0].update(response_text=None)
    ),
    r"line 2, questions\[0\]: field 'responses' is empty": bad_story(
        lambda s: s["questions"][0].update(responses=[])
    ),
}


@pytest.mark.parametrize("said", BAD_STORIES)
def test_a_bad_story_file_is_told_by_line_and_field(said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(BAD_STORIES[said])
    with pytest.raises(ValueError, match=said) as caught:
        build_task(f"squality:data={path}").draw(1, 0, TOKENIZER)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_bad_paper_file_is_told_by_field(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    task = build_task(f"qasper:data={path}")
    with pytest.raises(ValueError, match=r"bad.json' is not a file: qasper:data=PATH"):
        task.draw(1, 0, TOKENIZER)
    for content, said in (
        ('{\n"a": }', "not JSON .*line 2"),
        ("{}", "one entry per paper"),
        (json.dumps({"19": paper()}), r"19.qas\[0\].answers\[0\]: field 'yes_no' is null"),
        (json.dumps({"19": {**paper(), "full_text": [3]}}), r"full_text\[0\]: .*got a number"),
        (json.dumps({"19": {**paper(), "qas": None}}), "19: field 'qas' is null"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=said):
            task.draw(1, 0, TOKENIZER)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="UTF-16 text, expected UTF-8"):
        task.draw(1, 0, TOKENIZER)


def test_token_f1_by_hand() -> None:
    cases = [
        ("The seed lexicon!", ["a seed lexicon"], 1.0),
        ("a vocabulary of words", ["vocabulary", "words words"], 2 / 4),
        ("Yes.", ["no", "yes"], 1.0),
        ("red red blue", ["red green"], 2 / 5),
        ("", ["unanswerable"], 0.0),
    ]
    found = score("token-f1", [c[0] for c in cases], [c[1] for c in cases])
    assert found.per_sample == pytest.approx([c[2] for c in cases])
    assert found.metrics["f1"] == pytest.approx(sum(c[2] for c in cases) / 5)
    with pytest.raises(ValueError, match="unknown metric 'tokn-f1'; did you mean 'token-f1'"):
        score("tokn-f1", ["a"], [["a"]])
    with pytest.raises(ValueError, match="1 texts and 2 lists"):
        score("token-f1", ["a"], [["a"], ["b"]])


@needs_rouge
def test_rouge_is_the_package_and_the_hand() -> None:
    """the cat sat / the cat ran: unigrams 2 of 3, bigrams 1 of 2, longest common subsequence 2."""
    one = score("rouge", ["the cat sat"], [["a dog", "the cat ran"]])
    assert one.metrics == pytest.approx(
        {"rouge": (2 / 3 * 1 / 2 * 2 / 3) ** (1 / 3), "rouge1": 2 / 3, "rouge2": 1 / 2}
        | {"rougeL": 2 / 3}
    )
    texts = ["the cat sat", "on a mat he sleeps", "nothing"]
    references = [["the cat ran"], ["he sleeps on a mat", "a mat"], ["else"]]
    many = score("rouge", texts, references)
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    product = 1.0
    for name in ("rouge1", "rouge2", "rougeL"):
        best = [
            scorer.score_multi(own, text)[name].fmeasure for text, own in zip(texts, references)
        ]
        assert many.metrics[name] == pytest.approx(sum(best) / 3)
        product *= sum(best) / 3
    assert many.metrics["rouge"] == pytest.approx(product ** (1 / 3))
    assert sum(many.per_sample) / 3 == pytest.approx(many.metrics["rouge"])
    assert score("rouge", ["x"], [["y"]]).metrics["rouge"] == 0


@needs_rouge
def test_an_oracle_answers_every_story(stories: Path) -> None:
    task = build_task(f"squality:data={stories}:length=500")

    def oracle(text: str) -> str:
        assert "omitted]" in text
        return f"reply 0 {text.partition('in part ')[2][0]} 1"

    result = evaluate(Scripted(oracle), TOKENIZER, task, n=2)
    assert result.metrics["rouge"] == pytest.approx(1) and result.texts[1] == "reply 0 1 1"
    assert result.truncated["samples"] == 2 and result.truncated["tokens"] > 800


def test_without_rouge_score_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ValueError, match=r"pip install 'statewright\[eval\]'"):
        score("rouge", ["a"], [["a"]])
