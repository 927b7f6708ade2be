"""Runs that resume, survivors counted, the baseline, and the calculator of memory."""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch
from bounded_models import text, tiny
from transformers import AutoTokenizer, DynamicCache, LlamaConfig

from statewright.bench.perplexity import exact
from statewright.cli import main
from statewright.evaluation import build_bound, evaluate, paired, short_context_losses, token_losses
from statewright.evaluation.decoding import decode, held_bytes
from statewright.hf.bounded import BoundedCache
from statewright.hf.sizing import bounded_sizes
from statewright.models.tokenizers import byte_tokenizer
from statewright.studies.books import MODES, Book, Plan, cells, window_cell
from statewright.studies.books_table import PAPER, markdown
from statewright.studies.cells import Cell, read_cells, run_cells
from statewright.studies.survivors import Survivors, classes_of
from statewright.tasks import build_task

PLAN = Plan(
    length=40,
    budgets=(8, 16),
    few_budgets=(8,),
    windows=2,
    offset=5,
    long_length=60,
    long_budget=8,
    new_tokens=6,
    every=3,
    memory=2**16,
)


def book(name: str = "a", seed: int = 1) -> Book:
    ids = text(1, 200, seed)[0]
    return Book(name, ids, tuple("odd" if i % 2 else "even" for i in ids.tolist()))


def test_a_run_goes_on_where_it_stopped(tmp_path) -> None:
    path, ran = tmp_path / "sub" / "found.json", []

    def cell(name: str) -> Cell:
        def run() -> dict:
            ran.append(name)
            if name == "bad":
                raise RuntimeError("killed")
            return {"value": name}

        return Cell(name, run)

    with pytest.raises(RuntimeError, match="killed"):
        list(run_cells([cell("a"), cell("bad"), cell("b")], path, {"run": 1}))
    assert list(read_cells(path)["cells"]) == ["a"]
    assert [key for key, _ in run_cells([cell("a"), cell("b")], path, {"run": 2})] == ["b"]
    assert ran == ["a", "bad", "b"] and list(run_cells([cell("a")], path, {})) == []
    found = read_cells(path)
    assert found["cells"]["b"]["value"] == "b" and found["about"] == {"run": 2}
    assert [p.name for p in path.parent.iterdir()] == ["found.json"]
    with pytest.raises(ValueError, match="two cells are called 'a'"):
        list(run_cells([cell("a"), cell("a")], path, {}))
    for damaged in ("{", "[]"):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"found\.json"):
            list(run_cells([cell("a")], path, {}))
        assert path.read_text() == damaged


def test_every_table_from_a_tiny_model(tmp_path) -> None:
    model, path = tiny("llama"), tmp_path / "found.json"
    books = [book("a"), book("b", 2)]
    names = ["moby", "windows", "long", "decode", "throughput"]
    results = dict(run_cells(cells(model, books, PLAN, names), path, {}))
    assert results == read_cells(path)["cells"]
    page = markdown(read_cells(path))
    full = results["moby/a/5+40/none"]["nats"][0]
    assert full == pytest.approx(float(token_losses(model, books[0].ids[None, 5:45]).mean()), 1e-5)
    row = next(line for line in page.splitlines() if line.startswith("| TOVA-layer |"))
    tova = token_losses(model, books[0].ids[None, 5:45], "tova:budget=8").mean()
    assert f"| {math.exp(tova):.2f} |" in row and f"| {math.exp(full):.2f} |" in row
    mine, theirs = (
        [v for b in "ab" for v in results[f"windows/{b}/2x40/seed=1/{spec}"]["nats"]]
        for spec in ("h2o:budget=8", "none")
    )
    want = paired(mine, theirs)
    assert f"{want.mean:+.4f} [{want.low:+.4f}, {want.high:+.4f}]" in page
    for part in ("| Window+4, 8 | 0.500 | 1.000 | 1.000 |", "| tokens seen |", "| tokens/s |"):
        assert part in page
    assert all(f"| TOVA-layer, 8 | {mode} |" in page for mode in MODES)
    moved = [results[f"long/a/5+60/{mode}/tova:budget=8"]["nats"][0] for mode in MODES]
    assert len(set(moved)) == 3
    points = results["decode/a/6/tova:budget=8"]["points"]
    assert [point[0] for point in points["none"]] == [11, 14]
    with pytest.raises(ValueError, match="unknown table 'mobby'"):
        list(cells(model, books, PLAN, ["mobby"]))
    with pytest.raises(ValueError, match="200 tokens, expected at least 205"):
        list(cells(model, books, Plan(length=200, offset=5), ["moby"]))


def test_windows_do_not_overlap() -> None:
    from statewright.studies.books import _starts

    starts = _starts(book(), Plan(length=40, windows=4, offset=5))
    assert all(a + 40 <= b for a, b in zip(starts, starts[1:])) and starts[0] >= 5
    assert starts[-1] + 40 <= 200
    with pytest.raises(ValueError, match="too short for 5 windows of 40"):
        _starts(book(), Plan(length=40, windows=5, offset=5))


def test_survivors_are_counted() -> None:
    """Against a direct reading of the states after every single token."""
    model, ids, k = tiny("llama"), text(1, 33), 8
    cache, survivors = BoundedCache(model, "tova:budget=8:per=head"), Survivors(33, k, 1)
    steps, recent, n = torch.zeros(33), [], 0
    with torch.no_grad():
        for t in range(32):
            model(ids[:, t : t + 1], past_key_values=cache)
            survivors.look(cache.states)
            heads = [set(p.tolist()) - {-1} for s in cache.states for p in s.pos[0]]
            for kept in heads:
                for p in kept:
                    steps[p] += 1 / len(heads)
            if t + 1 > k:
                share = [len([p for p in kept if p > t - k]) / len(kept) for kept in heads]
                recent.append(statistics.mean(share))
    found = survivors.summary(["x"] * 33)
    assert found["recent"] == pytest.approx(statistics.mean(recent), abs=1e-4)
    first = statistics.mean(float(0 in kept) for kept in heads)
    assert found["first"] == pytest.approx(first, abs=1e-4)
    n = 32 - k
    assert found["survival"]["x"] == [n, pytest.approx(float(steps[:n].mean()), abs=0.1)]
    ages = [31 - p for kept in heads for p in kept]
    assert found["mean_age"] == pytest.approx(statistics.mean(ages), abs=0.06)
    window = window_cell(model, ids, "window:budget=8", ["x"] * 33)["survivors"]
    assert window["recent"] == 1.0 and window["first"] == 0.0


def test_classes_of_tokens() -> None:
    class Words:
        decode = staticmethod(
            lambda ids: [".", " word", "ing", " Ahab", "\n", " 7", "“", "--"][ids[0]]
        )

    found = classes_of(torch.arange(8), Words)
    wanted = ["end", "word", "rest of a word", "Name", "newline", "number", "quote", "other mark"]
    assert found == wanted


@pytest.mark.parametrize("length", [1, 7, 16, 39, 40, 100])
def test_short_contexts(length: int) -> None:
    """Token by token: every token is predicted once, from at most `length` tokens."""
    model, ids = tiny("llama"), text(2, 40)
    want = torch.zeros(2, 39)
    with torch.no_grad():
        for t in range(39):
            begin = t // length * length
            logits = model(ids[:, begin : t + 1]).logits[:, -1].float()
            loss = torch.nn.functional.cross_entropy(logits, ids[:, t + 1], reduction="none")
            want[:, t] = loss
    for piece in (16, 1024):
        torch.testing.assert_close(short_context_losses(model, ids, length, piece), want)


def test_the_baseline_is_a_bound(tmp_path) -> None:
    path, tokenizer = tmp_path / "book.txt", byte_tokenizer()
    path.write_text("It was the best of times, it was the worst of times. " * 8)
    model = tiny("llama", vocab_size=257)
    task = build_task(f"perplexity:length=50:text={path}:offset=7")
    assert tokenizer.decode(task.draw(1, 0, tokenizer).samples[0].input_ids).startswith("the best")
    result = evaluate(model, tokenizer, task, "context:length=9", n=2)
    assert result.policy == "context:length=9"
    ids = task.draw(2, 0, tokenizer).samples[1].input_ids.unsqueeze(0)
    assert result.per_sample[1] == pytest.approx(float(short_context_losses(model, ids, 9).mean()))
    answered = evaluate(model, tokenizer, "passkey:length=400", "context:length=50", n=1)
    assert answered.metrics["accuracy"] == 0.0
    for text_, said in (("context", "length=0, expected at least 1"), ("contxt", "unknown policy")):
        with pytest.raises(ValueError, match=said):
            build_bound(text_)
    with pytest.raises(ValueError, match=r"do not fit into 37 tokens after the first 387"):
        build_task(f"perplexity:length=50:text={path}:offset=387").draw(1, 0, tokenizer)


def test_paired_differences() -> None:
    a, b = [1.0, 2.5, 2.0, 4.0], [0.5, 1.0, 2.5, 3.0]
    found = paired(a, b)
    differences = [x - y for x, y in zip(a, b)]
    assert found.mean == statistics.mean(differences) and found.n == 4
    assert found.margin == pytest.approx(3.1824463 * statistics.stdev(differences) / 2)
    assert paired([1.0], [0.0]).interval is None
    with pytest.raises(ValueError, match="2 and 1 samples"):
        paired([1.0, 2.0], [1.0])


def test_eval_shows_the_difference(tmp_path, capsys) -> None:
    model = tiny("llama", vocab_size=257)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    book_ = tmp_path / "book.txt"
    book_.write_text("It was the best of times, it was the worst of times. " * 8)
    verb = ["eval", str(tmp_path / "model"), "--task", f"perplexity:length=60:text={book_}"]
    verb += ["-n", "3", "--policy", "tova:budget=6", "--policy", "context:length=20"]
    assert main([*verb, "--json"]) == 0
    none, tova, short = json.loads(capsys.readouterr().out)
    assert none["against_none"] == {"mean": 0.0, "low": None, "high": None, "n": 3}
    want = paired(tova["per_sample"], none["per_sample"])
    assert tova["against_none"]["mean"] == want.mean != 0
    assert tova["against_none"]["low"] == want.low < want.mean
    assert short["policy"] == "context:length=20"
    assert main(verb) == 0
    shown = capsys.readouterr().out
    assert f"{want.mean:+.4f} " in shown
    assert f"[{want.low:+.4f}, {want.high:+.4f}]" in shown
    assert AutoTokenizer.from_pretrained(tmp_path / "model").encode("a")


def test_the_papers_memory() -> None:
    """Table 1 (LLaMA-2-7B, float16) within 8 %, the rounding of its two decimals granted."""
    names = {k: f"tova:budget={k}" for k in PAPER}
    sizes = bounded_sizes(LlamaConfig(), list(names.values()), 4096, torch.float16)
    for k, (gigabytes, batch, _) in PAPER.items():
        ours = sizes.bounded[names[k]] / 1e9
        assert max(abs(ours - gigabytes) - 0.005, 0) <= 0.08 * gigabytes, (k, ours)
        largest = sizes.largest_batch(32 * 2**30, names[k])
        assert batch <= largest <= batch * 1.15, (k, largest)
    assert sizes.full == 2 * 32 * 4096 * 2 * 4096
    assert sizes.largest_batch(2**30) == 0


@pytest.mark.parametrize(
    "policy", ["window:budget=9:sinks=1", "tova:budget=9", "h2o:budget=9", "tova:budget=8KiB"]
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_the_calculator_is_what_is_held(family: str, policy: str) -> None:
    model = tiny(family)
    calculated = bounded_sizes(model.config, [policy], 50, torch.float64).bounded[policy]
    points = list(decode(model, text(1, 30), policy, num_tokens=20, every=10))
    assert [point.tokens for point in points] == [40, 50]
    for point in points:  # beside it, a few numbers per layer that do not grow with the budget
        assert calculated <= point.cache_bytes + 16 and point.cache_bytes <= calculated + 400
    if "KiB" in policy:
        assert calculated <= 8 * 1024 * 1.3


def test_the_benchmark_compares_the_same_losses() -> None:
    case = exact("tova:budget=8", 1, 64)
    case.check()
    ours, slow = (case.methods[name]() for name in ("ours", "token by token"))
    torch.testing.assert_close(ours, slow, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(case.methods[case.floor](), ours, atol=1e-2)


def test_held_bytes_sees_through_views() -> None:
    big = torch.zeros(1000)
    assert held_bytes({"a": big[:3], "b": [big[3:5]]}) == 4000
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4), 0)
    assert held_bytes(cache) == 2 * 2 * 5 * 4 * 4


def test_size_with_policies(capsys) -> None:
    verb = ["size", "--family", "llama", "--policy", "tova:budget=8", "--context", "40"]
    assert main([*verb, "--memory", "1MiB", "--batch", "2", "--measure", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    none, tova = report["rows"]
    assert none["policy"] == "none" and tova["bytes"] == 2 * tova["row_bytes"] < none["bytes"]
    assert tova["largest_batch"] == (2**20 - report["weights_bytes"]) // tova["row_bytes"]
    assert tova["measured_bytes"] < 1.2 * tova["bytes"] and tova["tokens_per_second"] > 0
    assert main(verb) == 0 and "tova" in capsys.readouterr().out
    for wrong, said in (
        (["size", "--family", "llama", "--memory", "1GiB"], "--memory needs a --policy"),
        (["size", "--family", "llama", "--policy", "tova"], "budget=0, expected at least 1"),
        ([*verb, "--memory", "lots"], "'lots' is not a size such as 512MiB"),
    ):
        assert main(wrong) != 0
        said_ = capsys.readouterr().err
        assert said in said_ and said_.count("\n") == 1
