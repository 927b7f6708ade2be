"""MQAR, needles in a haystack and in-context classification: pure, seeded, scored as they say."""

from __future__ import annotations

import hashlib
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from statewright.evaluation import evaluate
from statewright.models.tokenizers import byte_tokenizer
from statewright.tasks import MQAR, NIAH, InContext, build_task
from statewright.tasks.base import IGNORED, Batch
from statewright.tasks.niah import NAMES

TOKENIZER = byte_tokenizer()
HAY = "\n".join(topics[name] for name in sorted(topics)[:40])


def digest(batch: Batch) -> str:
    found = hashlib.sha256()
    for sample in batch.samples:
        found.update(sample.input_ids.numpy().tobytes())
        if sample.targets is not None:
            found.update(sample.targets.numpy().tobytes())
        found.update(sample.answer.encode())
    return found.hexdigest()[:16]


GOLDEN = {
    "mqar": "d25d008a9485ee37",
    "mqar:pairs=4:length=16:vocab=11:first=0": "ba5afb4af288bc14",
    "in-context": "ec4b0ced1a5cda6f",
    "in-context:shots=9:classes=3:features=1:noise=0": "269b1f2d50184ee8",
}


@pytest.mark.parametrize("task", GOLDEN)
def test_golden(task: str) -> None:
    """A version's data never change; seeds do, and a longer draw begins with a shorter one."""
    assert digest(build_task(task).draw(4, 7)) == GOLDEN[task]
    chosen = build_task(task)
    longer = chosen.draw(9, 7)
    assert digest(Batch(longer.samples[:4])) == GOLDEN[task] != digest(chosen.draw(4, 8))


def test_golden_needles() -> None:
    hay = " ".join(f"Sentence {i} says little." for i in range(300))
    assert digest(NIAH(length=700, keys=2, hay=hay).draw(4, 7, TOKENIZER)) == "cec153e2148863bf"


def test_every_key_is_asked_once_and_answered() -> None:
    task = MQAR(pairs=12, length=100, vocab=40, first=50)
    for sample in task.draw(50, 3).samples:
        ids, targets = sample.input_ids, sample.targets
        keys, values = ids[:24:2], ids[1:24:2]
        assert len(set(keys.tolist())) == len(set(values.tolist())) == 12
        assert int(keys.min()) > 50 and int(keys.max()) <= 69 < int(values.min())
        assert int(ids.max()) <= 88 and len(ids) == 100
        scored = (targets != IGNORED).nonzero().flatten()
        pairs = dict(zip(keys.tolist(), values.tolist()))
        assert sorted(ids[scored].tolist()) == sorted(keys.tolist()) and int(scored.min()) >= 24
        for at in scored.tolist():
            assert pairs[int(ids[at])] == int(targets[at]) == int(ids[at + 1])
        asked = set(scored.tolist()) | {at + 1 for at in scored.tolist()}
        rest = [int(ids[i]) for i in range(24, 100) if i not in asked]
        assert set(rest) == {50}
    near = [
        float((s.targets != IGNORED).nonzero().float().mean()) for s in task.draw(50, 3).samples
    ]
    even = MQAR(pairs=12, length=100, vocab=40, first=50, power=1.0).draw(50, 3).samples
    far = [float((s.targets != IGNORED).nonzero().float().mean()) for s in even]
    assert sum(near) < sum(far) - 50


def test_classes_are_learned_in_context() -> None:
    task = InContext(shots=10, classes=5, features=3, noise=0.0, queries=2, vocab=40, first=3)
    for sample in task.draw(30, 1).samples:
        rows = sample.input_ids.view(12, 4)
        assert len(set(rows[:10, 3].tolist())) == 5
        meaning = {tuple(row[:3].tolist()): int(row[3]) for row in rows[:10]}
        asked = (sample.targets != IGNORED).nonzero().flatten().tolist()
        assert asked == [42, 46]
        for row in rows[10:]:
            assert meaning[tuple(row[:3].tolist())] == int(row[3])
        assert [int(sample.targets[i]) for i in asked] == rows[10:, 3].tolist()
        assert rows[:, :3].max() < 23 <= rows[:, 3].min() and rows.min() >= 3
    noisy = InContext(shots=40, classes=2, features=4, noise=0.3, vocab=100, first=0).draw(20, 1)
    kinds = [len({tuple(r[:4].tolist()) for r in s.input_ids.view(-1, 5)}) for s in noisy.samples]
    assert min(kinds) > 10


@pytest.mark.parametrize("keys", [1, 4])
def test_needles_are_where_they_should(keys: int) -> None:
    task = NIAH(length=1500, keys=keys, hay=HAY)
    for i, sample in enumerate(task.draw(6, 2, TOKENIZER).samples):
        text = TOKENIZER.decode(sample.input_ids)
        assert 1100 < len(sample.input_ids) <= 1500 and text.count(sample.answer) == 1
        assert text.count("special magic numbers for") == keys
        asked = text.rpartition("number for ")[2].split()[0]
        assert asked in NAMES and f"numbers for {asked} is: {sample.answer}." in text
        body = text[: text.rindex("\nWhat is")]
        assert sample.place == (i + 0.5) / 6
        assert abs(body.index(sample.answer) / len(body) - sample.place) < 0.35
    book = task.draw(2, 2, TOKENIZER).samples
    assert digest(Batch(book)) == digest(task.draw(2, 2, TOKENIZER))


def test_the_hay_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text(HAY)
    got = build_task(f"niah:length=1k:text={path}").draw(3, 1, TOKENIZER)
    assert digest(got) == digest(NIAH(length=1024, hay=HAY).draw(3, 1, TOKENIZER))


class Oracle(nn.Module):
    """Answers the first `right` of a sample's targets, and a wrong token after them."""

    def __init__(self, batch: Batch, right: int, vocabulary: int = 300) -> None:
        super().__init__()
        self.device, self.right, self.rest = torch.device("cpu"), right, list(batch.samples)
        self.config = SimpleNamespace(
            vocab_size=vocabulary, get_text_config=lambda: SimpleNamespace(vocab_size=vocabulary)
        )

    def forward(self, ids: Tensor) -> SimpleNamespace:
        sample = self.rest.pop(0)
        assert torch.equal(ids[0], sample.input_ids)
        logits = torch.zeros(1, ids.shape[1], 300)
        scored = (sample.targets != IGNORED).nonzero().flatten()
        for n, at in enumerate(scored.tolist()):
            token = int(sample.targets[at]) if n < self.right else 0
            logits[0, at, token] = 1
        return SimpleNamespace(logits=logits)


def test_targets_are_scored_in_one_pass_and_chance_is_told() -> None:
    task = MQAR(pairs=8, length=64)
    batch = task.draw(5, 3)
    for right in (0, 2, 8):
        result = evaluate(Oracle(batch, right), None, task, n=5, seed=3)
        assert result.metrics == {"accuracy": right / 8, "chance": 1 / 8}
        assert result.per_sample == (right / 8,) * 5
    assert result.task == "mqar:pairs=8:length=64"
    assert NIAH(keys=4).chance == 0.25 and NIAH().chance < 1e-6
    assert InContext(classes=5).chance == 0.2
    with pytest.raises(ValueError, match="reach beyond the model's 200"):
        evaluate(Oracle(batch, 8, 200), None, task, n=5, seed=3)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("mqar:pairs=64", "pairs=64, expected 1 to 63 for 128 ids"),
        ("mqar:pairs=0", "pairs=0, expected 1 to"),
        ("mqar:pairs=40", "length=128, expected at least 160 for 40"),
        ("in-context:shots=3", "shots=3, classes=4"),
        ("in-context:classes=70:shots=70", "expected vocab >= 2 x classes"),
        ("in-context:noise=1", "noise=1.0, expected a probability below 1"),
        ("niah", "text='' is not a file"),
        ("niah:keys=0", "keys=0, expected 1 to"),
    ],
)
def test_mistakes(task: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_task(task).draw(1, 0, TOKENIZER)
    with pytest.raises(ValueError, match=r"length=100, expected at least \d+ tokens"):
        NIAH(length=100, hay=HAY).draw(1, 0, TOKENIZER)
    with pytest.raises(ValueError, match="holds no sentence"):
        NIAH(hay="no end").draw(1, 0, TOKENIZER)
