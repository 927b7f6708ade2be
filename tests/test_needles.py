"""Needles in a haystack of every kind that RULER has, and who finds them."""

from __future__ import annotations

import re

import pytest
import torch
from writers import TOKENIZER, Writer

from statewright.evaluation import evaluate, score
from statewright.tasks import NIAH, build_task, digest
from statewright.tasks.niah import NAMES

torch.set_num_threads(1)
HAY = "It rains. The sun is out. We go home."
NEEDLES = {
    "single": dict(keys=1),
    "noise": dict(filler="noise"),
    "multi-key": dict(keys=4),
    "all needles": dict(keys=2, filler="needles"),
    "multi-value": dict(values=4),
    "multi-query": dict(keys=6, queries=3),
    "both": dict(keys=3, queries=2, values=2),
}
GOLDEN = {
    "niah:length=900:filler=noise": "0d9af7974e19",
    "niah:length=1200:keys=2:filler=needles": "d568a42718b4",
    f"niah:length=1100:values=4:hay={HAY}": "e7fbcc536f62",
    f"niah:length=1300:keys=6:queries=3:hay={HAY}": "04c9a94b9a19",
    "stories": "e37b6b35541f",
    "stories:style=plain:new_tokens=9": "409dc39cc4d4",
}


def needles(**options) -> NIAH:
    return NIAH(length=1500, hay=HAY, **options)


def asked_keys(text: str) -> list[str]:
    question = text.rpartition("\nWhat ")[2].partition(" mentioned in the text?")[0]
    return [name for name in NAMES if re.search(rf"\b{name}\b", question)]


def knows(text: str) -> str:
    """Every number that the text gives to an asked key."""
    found = [re.findall(rf"numbers for {key} is: (\d+)\.", text) for key in asked_keys(text)]
    return ", ".join(number for numbers in found for number in numbers)


@pytest.mark.parametrize("task", GOLDEN)
def test_data_of_a_seed_never_change(task: str) -> None:
    assert digest(build_task(task).draw(3, 7, TOKENIZER))[:12] == GOLDEN[task]


@pytest.mark.parametrize("name", NEEDLES)
def test_who_knows_is_right_and_who_guesses_has_chance(name: str) -> None:
    task = needles(**NEEDLES[name])
    assert evaluate(Writer(knows), TOKENIZER, task, n=5).metrics["accuracy"] == 1
    assert evaluate(Writer(lambda text: "1234567"), TOKENIZER, task, n=5).metrics["accuracy"] == 0
    if task.chance is None or task.num_keys == task.queries:
        return

    def first_needles(text: str) -> str:
        """As many needles as are asked, whatever was asked."""
        named: dict[str, list[str]] = {}
        for key, number in re.findall(r"numbers for (\S+) is: (\d+)\.", text):
            named.setdefault(key, []).append(number)
        chosen = sorted(named)[: task.queries]
        return ", ".join(number for key in chosen for number in named[key])

    guess = evaluate(Writer(first_needles), TOKENIZER, task, n=100).metrics
    assert guess["accuracy"] == pytest.approx(guess["chance"], abs=0.13)


def test_needles_are_rulers() -> None:
    for name, options in NEEDLES.items():
        task = needles(**options)
        batch = task.draw(4, 3, TOKENIZER)
        assert batch.new_tokens == 16 * task.asked
        for i, sample in enumerate(batch.samples):
            text = TOKENIZER.decode(sample.input_ids)
            wanted = sample.references or (sample.answer,)
            assert len(sample.input_ids) <= 1500 and sample.place == (i + 0.5) / 4
            assert len(wanted) == task.asked and len(asked_keys(text)) == task.queries
            assert knows(text) == ", ".join(sorted(wanted, key=knows(text).index))
            body = text.rpartition("\nWhat ")[0]
            total = len(re.findall(r"is: \d+\.", body))
            least = task.num_keys * task.values
            assert total > least if name == "all needles" else total == least
            assert text.endswith(" are" if task.asked > 1 else " is")
        if name == "noise":
            assert "The grass is green. The sky is blue." in text
    with pytest.raises(ValueError, match="values=0, expected at least 1"):
        needles(values=0).draw(1, 0, TOKENIZER)
    with pytest.raises(ValueError, match="queries=0, expected 1 to"):
        needles(queries=0).draw(1, 0, TOKENIZER)
    with pytest.raises(ValueError, match="filler='hay', expected 'book' or 'noise' or 'needles'"):
        build_task("niah:filler=hay")


def test_a_share_of_the_needles_is_a_share_of_the_score() -> None:
    task = needles(values=4)
    half = evaluate(
        Writer(lambda text: ", ".join(knows(text).split(", ")[:2])), TOKENIZER, task, n=4
    )
    assert half.metrics["accuracy"] == 0.5 and half.per_sample == (0.5,) * 4
    assert len(half.texts) == 4 and half.interval == pytest.approx((0.269, 0.731), abs=1e-3)
    found = score("string-match", ["Yes, FOO and bar", ""], [["foo", "bar", "baz"], ["x"]])
    assert found.per_sample == pytest.approx((2 / 3, 0))


def test_lm_eval_counts_every_needle() -> None:
    from statewright.evaluation.lm_eval_tasks.functions import contains

    assert contains({"answer": "12", "references": []}, ["so 12"]) == {"acc": 1}
    assert contains({"answer": "", "references": ["12", "34"]}, ["so 12"]) == {"acc": 0.5}
