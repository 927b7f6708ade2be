"""Packed documents in transformers' words: what a row holds together is what its documents are."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import (
    FORMS,
    LENGTHS,
    SPECS,
    TOLERANCE,
    V,
    build,
    counted,
    documents,
    flattened,
)
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from statewright import laws
from statewright.hf.cache import StateCache
from statewright.models import StatewrightForCausalLM


def gradients(model, logits: Tensor, labels: Tensor) -> list[Tensor]:
    """Of the summed loss, in the logits' dtype (transformers' loss is in float32)."""
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SPECS)
def test_packed_is_apart(name: str, form: str) -> None:
    """Logits, loss, every gradient and the state, from what transformers' collator gives."""
    model, texts = build(SPECS[name]), documents()
    inputs = flattened(form, texts)
    packed = model(**inputs)
    alone = [model(text[None], labels=text[None], num_items_in_batch=1) for text in texts]
    logits = torch.cat([out.logits for out in alone], 1)
    assert laws.error(packed.logits, logits) < TOLERANCE
    assert packed.state.seen.tolist() == LENGTHS[-1:]
    assert laws.error(packed.state, alone[-1].state) < TOLERANCE
    mean = sum(out.loss for out in alone) / sum(n - 1 for n in LENGTHS)
    assert laws.error(packed.loss, mean) < laws.TOLERANCES[torch.float32, "torch"]
    ours = gradients(model, packed.logits, inputs["labels"])
    theirs = gradients(model, logits, inputs["labels"])
    for mine, other in zip(ours, theirs):
        assert laws.error(mine, other) < TOLERANCE * laws.GRADIENT_FACTOR


@pytest.mark.parametrize("name", ["gla", "lstm", "hybrid"])
def test_rows_of_several_documents(name: str) -> None:
    """A batch of packed rows, padded at the end; the state carries the last document."""
    model, lengths = build(SPECS[name]), [[4, 3], [2, 1, 6]]
    rows = [documents(row) for row in lengths]
    T = max(map(sum, lengths))
    ids, mask = torch.zeros(2, T, dtype=torch.long), torch.zeros(2, T, dtype=torch.long)
    positions = torch.ones(2, T, dtype=torch.long)
    for i, row in enumerate(lengths):
        ids[i, : sum(row)], mask[i, : sum(row)] = torch.cat(rows[i]), 1
        positions[i, : sum(row)] = counted(row)
    numbers = (positions == 0).cumsum(1)
    out = model(ids, attention_mask=mask, position_ids=positions, seq_idx=numbers)
    for i, row in enumerate(rows):
        want = torch.cat([model(text[None]).logits[0] for text in row])
        assert laws.error(out.logits[i, : len(want)], want) < TOLERANCE
    more = torch.randint(V, (2, 3), generator=torch.Generator().manual_seed(3))
    next_positions = out.state.seen[:, None] + torch.arange(3)
    assert out.state.seen.tolist() == [3, 6]
    goes_on = model(more, state=out.state, position_ids=next_positions)
    assert torch.equal(goes_on.logits, model(more, state=out.state).logits)
    begins = model(more, state=out.state, position_ids=torch.arange(3)[None])
    assert laws.error(begins.logits, model(more).logits) < TOLERANCE


def test_one_document_costs_nothing(monkeypatch) -> None:
    """Positions that only count on leave the layers without a reset, hence on their fast path."""
    model, ids = build(), documents([9])[0][None]
    resets = []
    layer = model.model.layers[0]
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *a: resets.append(a[3]) or forward(*a))
    model(ids, position_ids=torch.arange(9)[None])
    model(ids, position_ids=torch.arange(3, 12)[None])
    model(ids, seq_idx=torch.zeros(1, 9), cu_seq_lens_q=torch.tensor([0, 9]))
    model.generate(ids, max_new_tokens=3)
    assert len(resets) == 6 and all(reset is None for reset in resets)
    model(ids, reset=torch.ones(1, 9), position_ids=torch.arange(9)[None])
    assert resets[-1].all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_any_packing_in_any_chunks(data) -> None:
    """Rows of documents with masked tokens anywhere, counted as callers do, cut into calls."""
    model = build(["gru", "attention"], num_hidden_layers=2, mlp_ratio=0.0)
    B, T = 2, 12
    flags = st.lists(st.booleans(), min_size=B * T, max_size=B * T)
    mask = torch.tensor(data.draw(flags)).view(B, T)
    numbers = torch.tensor(data.draw(flags)).view(B, T).cumsum(1)
    counts, firsts = torch.zeros(B, T, dtype=torch.long), torch.zeros(B, T, dtype=torch.bool)
    for row in range(B):
        for number in numbers[row].unique():
            own = (numbers[row] == number) & mask[row]
            counts[row, own] = torch.arange(int(own.sum()))
            firsts[row, own.nonzero()[:1]] = True
    counts[~mask] = data.draw(st.integers(-1, 5))
    ids = documents([B * T])[0].view(B, T)
    cuts = sorted({0, T, *data.draw(st.lists(st.integers(0, T), max_size=3))})
    with torch.no_grad():
        want = model(ids, attention_mask=mask, reset=firsts)
        for cached in (False, True):
            before, parts = {}, []
            for begin, end in zip(cuts, cuts[1:]):
                own = slice(begin, end)
                out = model(
                    ids[:, own], attention_mask=mask[:, own], position_ids=counts[:, own], **before
                )
                parts.append(out.logits)
                before = (
                    {"past_key_values": out.past_key_values} if cached else {"state": out.state}
                )
            assert laws.error(torch.cat(parts, 1)[mask], want.logits[mask]) < TOLERANCE
            assert laws.error(out.state, want.state) < TOLERANCE
        whole = model(ids, attention_mask=mask, position_ids=counts, seq_idx=numbers)
        assert torch.equal(whole.logits, want.logits)


def test_no_tokens_and_no_documents() -> None:
    model, ids = build(), documents([5])[0][None]
    state = model(ids).state
    none = model(ids[:, :0], state=state, position_ids=torch.zeros(1, 0, dtype=torch.long))
    assert none.logits.shape == (1, 0, V) and laws.error(none.state, state) == 0
    bounds = torch.tensor([0, 0, 2, 2, 5, 5], dtype=torch.int32)
    got = model(ids, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=3, max_length_k=3)
    assert laws.error(got.logits[:, 2:], model(ids[:, 2:]).logits) < TOLERANCE


@pytest.mark.parametrize("form", ["position_ids", "all"])
def test_compiled_code_packs_without_a_break(form: str) -> None:
    model, inputs = build(num_hidden_layers=1), flattened(form, documents())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert laws.error(compiled(**inputs).logits, model(**inputs).logits) < TOLERANCE


MISTAKES = [
    (dict(position_ids=torch.tensor([[0, 1, 2, 4]])), r"\[0, 3\] is 4, expected 3 .* or 0"),
    (dict(position_ids=torch.tensor([[0, 1, 1, 2]])), r"\[0, 2\] is 1, expected 2"),
    (dict(position_ids=torch.tensor([[3, 2, 1, 0]])), r"\[0, 1\] is 2, expected 4"),
    (dict(position_ids=torch.zeros(3, 1, 4)), r"position_ids is \(3, 1, 4\), expected \(B, T\)"),
    (dict(position_ids=torch.arange(5)[None]), r"\(1, 5\), expected \(B, T\) = \(1, 4\)"),
    (dict(seq_idx=torch.zeros(2, 4)), r"seq_idx is \(2, 4\)"),
    (dict(cu_seq_lens_q=torch.tensor([0, 3])), r"is \[0, 3\], expected it to rise from 0 to 4"),
    (dict(cu_seq_lens_k=torch.tensor([0, 3, 2, 4])), "cu_seq_lens_k is .* expected it to rise"),
    (dict(cu_seq_lens_q=torch.tensor([1, 4])), "rise from 0 to 4"),
    (dict(cu_seq_lens_q=torch.tensor([[0, 4]])), r"\(1, 2\) for 1 rows"),
    (
        dict(cu_seq_lens_q=torch.tensor([0, 1, 4]), cu_seq_lens_k=torch.tensor([0, 2, 4])),
        "cu_seq_lens_q and cu_seq_lens_k disagree",
    ),
    (
        dict(position_ids=torch.tensor([[0, 1, 0, 1]]), seq_idx=torch.tensor([[0, 0, 0, 1]])),
        "seq_idx and position_ids disagree about where documents begin",
    ),
]


@pytest.mark.parametrize(("keywords", "message"), MISTAKES)
def test_what_is_no_packing_is_refused(keywords: dict, message: str) -> None:
    model, ids = build(), documents([4])[0][None]
    with pytest.raises(ValueError, match=message):
        model(ids, **keywords)


def test_what_does_not_say_where_a_state_belongs_is_refused() -> None:
    model, ids = build(), documents([4])[0][None]
    state = model(ids).state
    packed = dict(cu_seq_lens_q=torch.tensor([0, 2, 4]))
    with pytest.raises(ValueError, match=r"cu_seq_lens_q does not say .* give position_ids"):
        model(ids, state=state, **packed)
    with pytest.raises(ValueError, match="does not say"):
        model(ids, past_key_values=StateCache(state), seq_idx=torch.tensor([[0, 0, 1, 1]]))
    with pytest.raises(ValueError, match=r"\[0, 0\] is 9, expected 4"):
        model(ids, state=state, position_ids=torch.arange(9, 13)[None])
    with pytest.raises(ValueError, match="for 2 rows, expected"):
        model(ids.expand(2, 4), **packed)
    positions = torch.tensor([[4, 5, 0, 1]])
    model(ids, state=state, position_ids=positions, **packed)


def flat(model) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def padded(texts: list[dict]) -> dict:
    """The same documents a row each; a document's first token is nobody's target."""
    rows = [torch.tensor(text["input_ids"]) for text in texts]
    ids = pad_sequence(rows, batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_trainer_learns_the_same_from_packed_documents(tmp_path) -> None:
    """Three steps of transformers' Trainer: the losses it logs, and the weights.

    A data set's own column survives because Trainer finds its name in forward's signature.
    """
    pytest.importorskip("accelerate")
    assert "position_ids" in inspect.signature(StatewrightForCausalLM.forward).parameters
    texts = [
        {"input_ids": text.tolist()} for text in documents([5, 3, 9, 2, 4, 7, 6, 3, 8, 2, 5, 4])
    ]
    ends = []
    for collate in (DataCollatorWithFlattening(return_tensors="pt"), padded):
        model = build(["mingru", "attention", "gla"])
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            max_steps=3,
            learning_rate=0.05,
            optim="sgd",
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, data_collator=collate, train_dataset=texts)
        trainer.train()
        logs = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        ends.append((torch.tensor(logs), flat(model)))
    (losses, weights), (apart, others) = ends
    assert len(losses) == 3 and laws.error(losses, apart) < laws.TOLERANCES[torch.float32, "torch"]
    assert laws.error(weights, others) < laws.TOLERANCES[torch.float32, "torch"]
    assert laws.error(weights, flat(build(["mingru", "attention", "gla"]))) > 1e-3
