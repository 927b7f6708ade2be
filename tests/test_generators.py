"""Synthetic tasks: golden hashes, and every answer worked out another way."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest
import torch

from statewright.tasks import CHOMSKY, ListOps, SelectiveCopy, build_task
from statewright.tasks.listops import BLANK, MARKER, WORDS, value_of

# A change here changes everybody's data: raise the task's `version` with it.
GOLDEN = {
    "selective-copy:length=64:tokens=8": "066d17694668e877",
    "selective-copy": "b387ffba50b03c9c",
    "bucket-sort": "dd8ba1e36d1ff13a",
    "missing-duplicate": "f5fdbb3f0a398b1c",
    "cycle-navigation": "dc2f661e2516d4fd",
    "even-pairs": "f758320f5b55c885",
    "majority": "7f8b23227383f9af",
    "majority-count": "b2b0ea8f447f1cc6",
    "listops": "eddb1521558a0dbd",
    "listops:low=100:high=256:arguments=10": "43ac60c32b16b2fd",
}


def answers(sample) -> list[int]:
    return sample.targets[sample.targets >= 0].tolist()


@pytest.mark.parametrize("text", GOLDEN)
def test_data_never_change(text: str) -> None:
    task = build_task(text)
    assert task.version == 1
    digest = hashlib.sha256()
    for sample in task.draw(8, 7, None).samples:
        digest.update(sample.input_ids.numpy().tobytes())
        digest.update(sample.targets.numpy().tobytes())
    assert digest.hexdigest()[:16] == GOLDEN[text]
    first, second = (task.draw(4, seed, None).samples[0].input_ids for seed in (1, 2))
    assert not torch.equal(first, second)
    state = torch.random.get_rng_state()
    task.draw(1, 0, None)
    assert torch.equal(torch.random.get_rng_state(), state), "a draw touches the global generator"


def test_selective_copy_is_the_papers() -> None:
    samples = SelectiveCopy().draw(20, 3).samples
    for sample in samples:
        ids = sample.input_ids.tolist()
        assert len(ids) == 4096 + 16 and ids[4096:] == [0] * 16
        data = [i for i in ids[:4096] if i != 15]
        assert len(data) == 16 and set(data) <= set(range(1, 15))
        assert answers(sample) == data
        assert (sample.targets[:4096] < 0).all()
    places = torch.cat([(s.input_ids[:4096] != 15).nonzero().flatten() for s in samples])
    assert 1800 < places.float().mean() < 2300
    ids = torch.stack([s.input_ids for s in SelectiveCopy(4, 4).draw(9, 0).samples])
    assert torch.equal(ids[:, :4], ids[:, :4].clamp(1, 14)), "no room for noise"


def test_chomsky_answers() -> None:
    for name, kind in CHOMSKY.items():
        task = kind(5, 30)
        lengths = set()
        for seed in range(12):
            for sample in task.draw(5, seed).samples:
                ids = sample.input_ids
                word = ids[: len(ids) - len(answers(sample))].tolist()
                lengths.add(len(word))
                assert answers(sample) == expected(name, word), (name, word)
                assert max(ids.tolist() + answers(sample)) < task.vocab
                assert ids[len(word) :].eq(0).all()
        assert len(lengths) > 3 and max(lengths) <= 30


def expected(name: str, word: list[int]) -> list[int]:
    counts = Counter(word)
    if name == "bucket-sort":
        return sorted(word)
    if name == "missing-duplicate":
        return [word[word.index(3) - len(word) // 2]]
    if name == "cycle-navigation":
        return [(counts[2] - counts[3]) % 5 + 1]
    if name == "even-pairs":
        return [2 if word[0] == word[-1] else 1]
    most = max(counts.values())
    if name == "majority":
        return [max(symbol for symbol, count in counts.items() if count == most)]
    return [most + 1]


def test_listops_is_its_grammar() -> None:
    operations = Counter()
    for task in (ListOps(), ListOps(low=100, high=256, arguments=10)):
        for sample in task.draw(60, 5).samples:
            ids = sample.input_ids.tolist()
            end = ids.index(MARKER)
            assert task.low <= end <= task.high and set(ids[end + 1 :]) <= {BLANK}
            assert answers(sample) == [value_of(ids[:end])]
            assert int(sample.targets[end]) == value_of(ids[:end])
            text = " ".join(WORDS[i] for i in ids[:end])
            assert answers(sample) == [evaluated(text.split())[0]]
            operations.update(WORDS[i] for i in ids[:end])
    assert len(operations) == 15
    for tokens in ([1, 2], [11], [11, 14], [14]):
        with pytest.raises(ValueError, match="not an expression"):
            value_of(tokens)


def evaluated(words: list[str]) -> tuple[int, list[str]]:
    """The value of the first node and what follows it, by recursion."""
    head, *rest = words
    if not head.startswith("["):
        return int(head), rest
    values = []
    while rest[0] != "]":
        value, rest = evaluated(rest)
        values.append(value)
    ordered, middle = sorted(values), len(values) // 2
    median = ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) // 2
    results = {"[MIN": ordered[0], "[MAX": ordered[-1], "[MED": median, "[SM": sum(values) % 10}
    return results[head], rest[1:]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("selective-copy:length=8:tokens=9", "length=8, tokens=9; expected"),
        ("selective-copy:vocab=2", "vocab=2, expected at least 3"),
        ("even-pairs:low=5:high=4", "low=5, high=4"),
        ("listops:low=2", "low=2"),
        ("listops:depth=2:low=30", "do not fit into one operation"),
        ("even-pear", "did you mean 'even-pairs'"),
    ],
)
def test_bad_tasks(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_task(text).draw(1, 0, None)
