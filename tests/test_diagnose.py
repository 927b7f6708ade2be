"""Probes of states and gates against their definitions, and what a reading adds up to."""

from __future__ import annotations

import math
from dataclasses import replace
from pydoc_data.topics import topics

import pytest
import torch

from statewright.diagnosis import diagnose, read, remembrance
from statewright.diagnosis.controls import Control, scale_decay, untrained
from statewright.diagnosis.gates import Recorder, watched
from statewright.diagnosis.heads import (
    QUANTITIES,
    carried_by_head,
    first_not_finite,
    histogram,
    num_groups,
    pooled,
    recurrent_states,
    statistics,
)
from statewright.diagnosis.intervene import retention_by_change
from statewright.diagnosis.prompts import prompt_ids, text_ids
from statewright.diagnosis.remembrance import memory
from statewright.diagnosis.runner import Runner
from statewright.diagnosis.schedule import Schedule, rows_at, schedule_for
from statewright.evaluation import token_losses
from statewright.hf.families import tiny
from statewright.hf.host import as_host
from statewright.intervals import student
from statewright.models import StatewrightConfig, StatewrightForCausalLM, load
from statewright.models.tokenizers import byte_tokenizer
from statewright.policies import build_policy
from statewright.state import MatrixState, ModelState, VectorState
from statewright.tasks.passkey import NEEDLE

TEXT = "\n".join(topics[name] for name in sorted(topics)).encode()
SMALL = Control(hidden_size=32, state_size=8, head_dim=16, num_steps=2)


def ids_of(length: int, rows: int = 1) -> torch.Tensor:
    whole = torch.tensor(list(TEXT[: length * rows]), dtype=torch.int32)
    return whole.view(rows, length)


def model_of(mixer: str, **options) -> StatewrightForCausalLM:
    config = StatewrightConfig(
        vocab_size=257, hidden_size=32, num_hidden_layers=2, mixer=mixer, mlp_ratio=1.0, **options
    )
    return StatewrightForCausalLM(config).eval()


def test_statistics_are_their_definitions() -> None:
    x = torch.randn(3, 4, 50)
    x[:, 2, 7] = 40.0
    found = dict(zip(QUANTITIES, statistics(x)))
    wide = x.double()
    want = {
        "mean": wide.mean(-1),
        "variance": wide.var(-1),
        "rms": wide.square().mean(-1).sqrt(),
        "norm": torch.linalg.vector_norm(wide, dim=-1),
    }
    for name, value in want.items():
        torch.testing.assert_close(found[name].double(), value.mean(0), rtol=1e-5, atol=1e-6)
    assert found["outliers"].tolist() == [0, 0, 1, 0]
    share = (1600 / wide.square().sum(-1))[:, 2].mean()
    assert found["outlier_share"][2].item() == pytest.approx(share.item(), rel=1e-4)


def test_heads_are_what_the_state_carries() -> None:
    S, seen = torch.randn(2, 3, 4, 5), torch.zeros(2, dtype=torch.long)
    matrix = MatrixState(S=S, seen=seen)
    assert torch.equal(carried_by_head(matrix), S.flatten(2))
    vector = VectorState(h=torch.zeros(2, 6), seen=seen)
    cell = torch.randn(2, 6)
    assert torch.equal(carried_by_head(vector.with_extra("c", cell, "batch channel"))[:, 0], cell)
    many = MatrixState(S=torch.randn(1, 96, 2, 1), seen=seen[:1])
    assert carried_by_head(many).shape == (1, 48, 4)
    assert (num_groups(64), num_groups(65), num_groups(67)) == (64, 13, 1)
    assert pooled(torch.arange(96.0))[:2].tolist() == [1.0, 3.0]
    state = ModelState(layers=(vector, (vector, matrix)), seen=seen)
    assert [name for name, _ in recurrent_states(state)] == ["0", "1.0", "1.1"]


def test_histograms_share_their_bins() -> None:
    found = histogram(1, torch.tensor([-1.0, 1.0]), torch.tensor([4.0, 0.5, -4.0]))
    assert found.limit == 4.0 and (sum(found.before), sum(found.after)) == (2, 3)
    assert found.after[0] == found.after[-1] == 1


def test_not_finite_names_layer_and_head() -> None:
    S, seen = torch.randn(2, 3, 4, 5), torch.zeros(2, dtype=torch.long)
    good = MatrixState(S=S, seen=seen)
    bad = S.clone()
    bad[1, 2, 0, 0] = float("nan")
    assert first_not_finite(ModelState(layers=(good,), seen=seen)) is None
    state = ModelState(layers=(good, replace(good, S=bad)), seen=seen)
    assert first_not_finite(state) == ("1", 2)
    huge = replace(good, S=torch.full_like(S, 3e38))
    assert first_not_finite(ModelState(layers=(huge,), seen=seen)) is None


@pytest.mark.parametrize(
    "length, train, largest", [(128, 64, 1024), (137, 10, 16), (5000, 7, 33), (2**20, 64, 1024)]
)
def test_calls_tile_the_text(length: int, train: int, largest: int) -> None:
    schedule = Schedule(length, train, largest)
    calls = schedule.calls()
    assert calls[0].begin == 0 and calls[-1].end == length
    assert all(a.end == b.begin for a, b in zip(calls, calls[1:]))
    assert max(c.end - c.begin for c in calls) <= largest
    assert [c.end for c in calls if c.probe] == schedule.probes
    assert {train, length} <= set(schedule.probes) and len(schedule.probes) < 70
    watching = {t for c in calls if c.watch for t in range(c.begin, c.end)}
    assert watching == {t for end in schedule.watches for t in range(end - train, end)}
    for octave in range(schedule.num_octaves):
        begin, end = schedule.octave(octave)
        inside = [c for c in calls if c.octave == octave]
        assert (inside[0].begin, inside[-1].end) == (begin, end)
        assert all(begin <= s and s + train <= end for s in schedule.windows(octave))


@pytest.mark.parametrize("mixer", ["mamba2:state_size=8:head_dim=16", "gla:num_heads=2", "mingru"])
def test_a_reading_adds_up(mixer: str) -> None:
    """Losses by position, in windows and in comparisons are those of the model called plainly."""
    model, ids = model_of(mixer), ids_of(301, 2)
    found = read(model, ids, 20)
    whole = token_losses(model, ids.long())
    for bucket in found.buckets:
        part = whole[:, bucket.begin : bucket.end]
        assert bucket.tokens == part.numel()
        assert bucket.nats == pytest.approx(part.mean().item(), abs=2e-5)
        n = part.numel()
        error = student(n - 1) * part.std().item() / n**0.5
        assert bucket.error == pytest.approx(error, rel=1e-3)
    starts = Schedule(300, 20).first_windows()
    fresh = token_losses(model, rows_at(ids, starts, 21).long())
    assert found.in_window == pytest.approx(fresh.mean().item(), abs=2e-5)
    assert sum(b.tokens for b in found.inside) == fresh.numel()
    for c in found.comparisons:
        starts = Schedule(300, 20).windows((c.begin // 20).bit_length() - 1)
        at = torch.tensor(starts)[:, None] + torch.arange(10, 20)
        assert c.carried == pytest.approx(whole[:, at].mean().item(), abs=2e-5)
        alone = token_losses(model, rows_at(ids, starts, 21).long())[:, 10:]
        assert c.fresh == pytest.approx(alone.mean().item(), abs=2e-5)


def test_states_at_the_probes_are_the_models() -> None:
    model, ids = untrained(SMALL).eval(), ids_of(301)
    found = read(model, ids, 20)
    for i in (0, 3, -1):
        with torch.no_grad():
            state = model(ids[:, : found.probes[i]].long()).state
        for layer, (name, part) in zip(found.layers, recurrent_states(state)):
            want = dict(zip(QUANTITIES, statistics(carried_by_head(part)).tolist()))
            assert layer.name == name
            assert layer.statistics["norm"][i] == pytest.approx(want["norm"], rel=1e-3)
            assert layer.statistics["variance"][i] == pytest.approx(want["variance"], rel=2e-3)
    assert not found.has_attention
    assert sum(found.layers[0].histogram.after) == 8 * 16


@torch.no_grad()
def test_retention_and_half_life_of_known_decays() -> None:
    """A decay that does not depend on the token: everything is known in closed form."""
    model = untrained(replace(SMALL, decay_scale=1.0)).double().eval()
    rates = torch.tensor([0.001, 0.01, 0.1, 0.5], dtype=torch.float64)
    for layer in model.model.layers:
        layer.mixer.in_proj.weight[-4:] = 0
        layer.mixer.dt_bias.fill_(math.log(math.e - 1))  # softplus of it is 1
        layer.mixer.A_log.copy_(rates.log())
    found = read(model, ids_of(401), 100)
    for layer in found.layers:
        for gates in layer.gates:
            want = (-100 * rates).exp().tolist()
            assert gates.retention == pytest.approx(want, rel=1e-9)
            assert gates.half_life == pytest.approx((math.log(2) / rates).tolist(), rel=1e-9)
            assert min(gates.insertion) > 0
    assert found.watches == (100, 200, 400) and len(found.layers[0].gates) == 3
    more = read(model, ids_of(401), 100, "forgetmore:decay=0.99").layers[1].gates[0]
    assert more.retention == pytest.approx([0.99**100 * r for r in want], rel=1e-9)


@pytest.mark.parametrize("mixer", ["mamba2:state_size=8:head_dim=16", "mingru", "gla:num_heads=2"])
def test_a_probe_changes_nothing(mixer: str) -> None:
    model, ids, recorder = model_of(mixer).double(), ids_of(50).long(), Recorder()
    with torch.no_grad():
        plain, seen = model(ids), model(ids, policy=watched(None, recorder))
    torch.testing.assert_close(seen.logits, plain.logits, rtol=0, atol=1e-12)
    assert sorted(recorder.take()) == [0, 1] and recorder.take() == {}


def test_the_probe_stands_behind_the_policy() -> None:
    chain = watched("forgetmore:decay=0.9+statewindow:length=8", Recorder())
    assert [part.label for part in chain.parts] == ["forgetmore", "gateprobe", "statewindow"]


def test_insertion_is_the_norm_of_what_is_written() -> None:
    """From an empty state one token writes the whole state."""
    model, recorder = model_of("mamba2:state_size=8:head_dim=16").double(), Recorder()
    with torch.no_grad():
        out = model(ids_of(1).long(), policy=watched(None, recorder))
    for number, report in recorder.take().items():
        norms = out.state.layers[number].S.flatten(2).norm(dim=-1)[0]
        assert report.insertion == pytest.approx(norms.tolist(), rel=1e-6)


def test_retention_by_change_is_that_of_the_gates() -> None:
    """Two ways to the same number: the decays as the scan saw them, and a changed state."""
    model, ids = untrained(SMALL).double().eval(), ids_of(90).long()
    run = Runner(model)
    state = run(ids[:, :50]).state
    run(ids[:, 50:], state, watch=True)
    gates = run.recorder.take()
    found = retention_by_change(run, state, ids[:, 50:], ["0", "1"])
    for number, name in enumerate(("0", "1")):
        assert found[name] == pytest.approx(gates[number].retention, rel=1e-5)


def test_a_foreign_model_is_read_like_its_copy_of_ours(tmp_path) -> None:
    """transformers' Mamba-2 through the bridge: losses, states and retention are those of ours."""
    theirs = tiny("mamba2").eval()
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    ids = ids_of(129) % ours.config.vocab_size
    a, b = read(as_host(theirs), ids, 16), read(ours, ids, 16)
    assert a.in_window == pytest.approx(b.in_window, abs=1e-4)
    for got, want in zip(a.buckets, b.buckets):
        assert got.nats == pytest.approx(want.nats, abs=1e-4)
    for got, want in zip(a.layers, b.layers):
        assert got.name == want.name and got.gates == []
        norms = zip(got.statistics["norm"], want.statistics["norm"])
        assert all(x == pytest.approx(y, rel=1e-3) for x, y in norms)
        assert got.retention == pytest.approx(want.gates[1].retention, rel=1e-2, abs=1e-4)
    with pytest.raises(ValueError, match="statewright convert"):
        read(as_host(theirs), ids, 16, "forgetmore:decay=0.9")


def test_a_hybrid_and_a_vector_model() -> None:
    hybrid = model_of(["mingru", "attention:num_heads=2"])
    found = read(hybrid, ids_of(90), 16)
    assert [layer.name for layer in found.layers] == ["0"] and found.has_attention
    assert found.layers[0].kind == "VectorState"
    lstm = read(model_of("lstm"), ids_of(90), 16)
    assert lstm.layers[0].gates == [] and len(lstm.layers[0].retention) == 1


def test_remembrance_ends_where_the_memory_does() -> None:
    """Without decay everything counts; with a sudden one, two convolutions of four tokens do."""
    model, windows = untrained(replace(SMALL, decay_scale=1e-3)).eval(), ids_of(32, 40)
    slow = remembrance(model, windows)
    fast = remembrance(scale_decay(model, 1e9), windows)
    assert [r.context for r in slow] == [1, 2, 4, 8, 16] and slow[0].whole == 32
    assert slow[-1].distance > 1e-5 and memory(slow, 1e-3) == 32
    assert fast[2].distance > 1e-6 and fast[3].distance < 1e-6
    assert memory(fast, 0.01) == 8


def test_prompts() -> None:
    tokenizer = byte_tokenizer()
    newlines = prompt_ids("newlines", 50, tokenizer, 257)
    assert newlines.unique().tolist() == [10] and newlines.shape == (1, 50)
    drawn = prompt_ids("random", 5000, tokenizer, 257)
    assert 256 not in drawn and drawn.unique().numel() == 256
    assert torch.equal(drawn, prompt_ids("random", 5000, tokenizer, 257))
    text = bytes(prompt_ids("passkey", 900, tokenizer, 257)[0].tolist()).decode()
    assert NEEDLE.format(key="72498") in text and text.count("The grass is green.") > 5
    with pytest.raises(ValueError, match="expected one of text, newlines"):
        prompt_ids("poem", 50, tokenizer, 257)


def test_text_is_read_only_as_far_as_needed(tmp_path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(TEXT[:100_000] + b"\xff")
    assert text_ids(path, byte_tokenizer(), 500).tolist() == list(TEXT[:500])
    with pytest.raises(ValueError, match="not UTF-8"):
        text_ids(path, byte_tokenizer())


def test_bad_input() -> None:
    model = untrained(SMALL).eval()
    with pytest.raises(ValueError, match="has 128 tokens, but two training lengths and one more"):
        read(model, ids_of(128), 64)
    with pytest.raises(ValueError, match="train_length=2, expected at least 4"):
        read(model, ids_of(128), 2)
    with pytest.raises(ValueError, match=r"no recurrent layer.*statewright eval MODEL"):
        read(model_of("attention:num_heads=2"), ids_of(90), 16)
    with pytest.raises(ValueError, match=r"no recurrent layer.*statewright eval MODEL"):
        read(as_host(tiny("llama")), ids_of(90) % 64, 16)
    with pytest.raises(ValueError, match="prompt 'poem'"):
        diagnose(model, ids_of(90), 16, prompts=("text", "poem"))


@torch.no_grad()
def test_states_that_are_not_finite_are_located() -> None:
    model, ids = untrained(SMALL).eval(), ids_of(200)
    model.model.layers[1].mixer.conv.weight[2 * 16] = float("inf")
    with pytest.raises(ValueError, match=r"state of layer 1, head 2 is not finite from token 1 "):
        read(model, ids, 16)
    model, ids = model_of("mamba2:state_size=8:head_dim=16"), ids.clone()
    ids[0, 150] = 200
    model.model.embeddings.weight[200] = float("nan")
    with pytest.raises(ValueError, match=r"layer 0, head 0 .* token 151 \(id 200\)"):
        read(model, ids, 16)
    model = untrained(replace(SMALL, seed=1)).eval()
    model.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"loss after token 1 .* although the states are"):
        read(model, ids, 16)


def test_calls_fit_their_logits_in_memory() -> None:
    assert schedule_for(ids_of(200), 16, 250_000).largest == 134
    assert schedule_for(ids_of(200), 16, 257).largest == 1024


def test_a_configs_policy_holds_unless_another_is_given() -> None:
    model = model_of("mingru")
    model.config.policy = "forgetmore:decay=0.5"
    assert Runner(model).policy == build_policy("forgetmore:decay=0.5")
    assert Runner(model, "none").policy is None
