"""A keyword that is not known is ignored at its default and refused by name at any other value."""

import pytest
import torch

from statewright.models import StatewrightConfig, StatewrightForCausalLM
from statewright.models.keywords import split_keywords

IDS = torch.arange(12).view(2, 6)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return StatewrightForCausalLM(StatewrightConfig(vocab_size=16, hidden_size=8)).eval()


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    "keyword", [{"of_2027": None}, {"of_2027": False}, {"return_dict": True}, {"return_dict": None}]
)
def test_a_keyword_at_its_default_changes_nothing(model, whole: bool, keyword) -> None:
    part = model if whole else model.model
    assert torch.equal(part(IDS, **keyword)[0], part(IDS)[0])


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("value", [True, 0, "", torch.zeros(2), torch.ones(2, 6), [0, 1]])
def test_any_other_is_refused_by_name(model, whole: bool, value) -> None:
    part = model if whole else model.model
    with pytest.raises(ValueError, match=r"forward: unknown keyword of_2027; .*donate"):
        part(IDS, of_2027=value, of_2028=None)


def test_the_body_knows_no_keywords_of_the_loss(model) -> None:
    with pytest.raises(ValueError, match="num_items_in_batch"):
        model.model(IDS, num_items_in_batch=3)


def test_the_loss_gets_its_keywords(model) -> None:
    mean, count = model(IDS, labels=IDS).loss, 2 * 5
    total = model(IDS, labels=IDS, num_items_in_batch=torch.tensor(1)).loss
    assert torch.allclose(total, count * mean)
    fewer = model(IDS, labels=IDS, ignore_index=11).loss
    masked = IDS.masked_fill(IDS == 11, -100)
    assert torch.equal(fewer, model(IDS, labels=masked).loss) and fewer != mean
    shifted = torch.cat([IDS[:, 1:], torch.full((2, 1), -100)], 1)
    assert torch.equal(model(IDS, labels=IDS, shift_labels=shifted).loss, mean)


def test_groups() -> None:
    given = dict(a=1, b=None, c=False, d=None)
    assert split_keywords("f", given, ("a", "c"), ("b",)) == ({"a": 1, "c": False}, {"b": None})
    with pytest.raises(ValueError, match=r"f: unknown keyword a, e; .* b, c"):
        split_keywords("f", dict(e=2, a=1), ("b",), ("c",))
