"""The X-ray page: what is drawn is what was measured, for any of our files, and nothing escapes."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from statewright.cli import main
from statewright.models import StatewrightConfig, StatewrightForCausalLM
from statewright.report.html import embedded, number, size
from statewright.report.series import MOST, Plot, Series, draw
from statewright.report.trace import trace
from statewright.report.xray import kind_of, page

RESULTS = Path(__file__).parents[1] / "docs" / "results"
EVIL = '</script><script>alert("1")</script>'
_VOID = {"meta", "link", "line", "rect", "circle", "polyline", "path", "br", "input"}


class Reader(HTMLParser):
    """Collects tags, attributes and ids, and insists that what is opened is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.tags, self.ids, self.wanted, self.attributes = [], [], [], [], []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        named = dict(attrs)
        self.attributes += named
        self.ids += [named["id"]] if "id" in named else []
        self.wanted += named.get("aria-labelledby", "").split()
        self.wanted += [named["href"][1:]] if named.get("href", "").startswith("#") else []
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag


def result(task: str, policy: str, right: list[float], held: int, model: str = "m", seed=0) -> dict:
    places = [(i + 0.5) / len(right) for i in range(len(right))]
    return {
        "model": model,
        "task": task,
        "policy": policy,
        "n": len(right),
        "seed": seed,
        "metrics": {"accuracy": sum(right) / len(right)},
        "per_sample": right,
        "places": places,
        "interval": [0.1, 0.9],
        "curves": [
            {
                "name": "score by depth",
                "x": places,
                "y": right,
                "x_unit": "share of the input",
                "y_unit": "accuracy",
                "interval": [],
            }
        ],
        "truncated": {"samples": 1, "tokens": 9} if policy == "none" else {},
        "cost": {"state_bytes": held, "tokens_per_second": 100.0},
    }


def evaluated(model: str = "m") -> dict:
    cells = {}
    for length in (256, 512):
        for policy, held in (("none", 8192), ("tova:budget=32", 1024), ("tova:budget=64", 2048)):
            right = [1.0, 0.0, 1.0, float(held > 1024)]
            spec = f"passkey:length={length}"
            cells[f"{spec}{policy}"] = result(spec, policy, right, held, model)
    return {"about": {"format": "statewright-eval-1", "runs": {}}, "cells": cells}


@pytest.fixture(scope="module")
def traced() -> dict:
    torch.manual_seed(0)
    config = StatewrightConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        mixer=["attention:num_heads=2", "mamba2:state_size=4:head_dim=8"],
    )
    model = StatewrightForCausalLM(config).eval()
    ids = torch.randint(64, (40,), generator=torch.Generator().manual_seed(0))
    tokens = [EVIL, '"', "\\", "\n", *(f" t{i}" for i in range(36))]
    found = trace(model, ids, tokens, ["window:budget=8:sinks=2"], every=4)
    return json.loads(json.dumps({"model": "m", "text": "t.txt", **found}))


def whole(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    assert reader.open == [] and len(set(reader.ids)) == len(reader.ids)
    assert set(reader.wanted) <= set(reader.ids)
    assert not any(name.startswith("on") for name in reader.attributes)
    assert not re.search(r"https?:", text) and "url(" not in text and len(text.encode()) < 2e6
    return reader


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda p: p.stem)
def test_every_file_in_the_docs_is_a_whole_page_and_the_same_again(path) -> None:
    record = json.loads(path.read_text())
    text = page([(path.name, record)])
    reader = whole(text)
    assert "table" in reader.tags
    assert text == page([(path.name, json.loads(json.dumps(record)))])


def test_charts_stand_with_tables_and_labels() -> None:
    text = page([("a.json", evaluated()), ("b.json", evaluated("other"))])
    reader = whole(text)
    assert text.count('<figure class="read">') == text.count("<summary>Values</summary>") == 2
    assert text.count("<svg viewBox") == text.count('role="img"') + text.count("aria-hidden=")
    assert "1 of 4 inputs were cut to the length, 9 tokens in all." in text
    assert {"main", "nav", "header", "footer"} & set(reader.tags) >= {"main", "footer"}


def test_heat_map_holds_the_share_of_right_answers() -> None:
    text = page([("a.json", evaluated())])
    row = re.search(r"tova:budget=32: % right.*?<tbody>(.*?)</tbody>", text)[1].split("</tr>")[1]
    assert re.findall(r"%\">(\d*)</td>", row) == ["", "100", "", "0", "", "", "100", "", "0", ""]
    one = evaluated()["cells"]["passkey:length=512tova:budget=32"]
    again = {**one, "seed": 1, "per_sample": [0.0, 0.0, 1.0, 0.0]}
    cells = {"a": one, "b": again}
    text = page([("a.json", {"about": {"format": "statewright-eval-1"}, "cells": cells})])
    assert ">50</td>" in text and "x 2 seeds" in text


def test_bytes_are_the_axis_of_what_a_method_remembers() -> None:
    text = page([("a.json", evaluated())])
    chart = re.search(r"by bytes of state.*?</figure>", text)[0]
    assert "tova: 0.5 at 1,024 to 0.75 at 2,048" in chart and "none: 0.75 at 8,192" in chart


def test_equal_bytes_are_one_chart_and_what_is_out_of_reach_is_said() -> None:
    curve = {"x": [1024.0, 4096.0], "y": [0.25, 1.0], "x_unit": "bytes of state"}
    curve |= {"y_unit": "accuracy", "interval": [[0.15, 0.35], None]}
    missing = {"model": "m", "policy": "none", "target": 1 << 20, "reason": "it does not grow <so>"}
    names = ("mqar | mingru", "mqar | gla", "copying | gla")
    curves = [{**curve, "name": name} for name in names]
    record = evaluated() | {"recall_against_bytes": {"curves": curves, "unreachable": [missing]}}
    text = page([("a.json", record)])
    whole(text)
    assert text.count("bytes of state.</b>") == 3 and "0.25 [0.15, 0.35]" in text
    assert "<td>1.0 MiB</td><td>it does not grow &lt;so&gt;</td>" in text


def test_studies_show_their_own_table_curves_and_all_cells() -> None:
    points = [{"step": s, "train_loss": 3.0 / s, "accuracy": s / 10} for s in (1, 2, 5)]
    cell = {"parameters": 17, "accuracy": 0.5, "exact": 0.25, "curve": points}
    cells = {f"mingru/{n}/seed{s}": cell for n in (1, 2) for s in (0, 1)}
    about = {"study": "selective-copy", "settings": {}, "command": "a <b"}
    text = page([("a.json", {"about": about, "cells": cells})])
    whole(text)
    assert "a &lt;b" in text and "All 4 cells" in text and "Accuracy in training" in text
    assert "accuracy over step. mingru/1/seed0: 0.1 at 1 to 0.5 at 5" in text
    octaves = [[128, 2.0], [256, 5.0]]
    many = {f"table/{i // 15}/{i}": {"octaves": octaves, "inside": 2.0} for i in range(45)}
    text = page([("a.json", {"about": {}, "cells": many})])
    whole(text)
    assert text.count("<b>Loss by position: table/") == 3


def test_capacity_is_drawn_beside_the_published_laws() -> None:
    cells = {}
    for size_, millions in ((4, 0.9), (8, 1.5), (16, 2.5)):
        for length, explodes in ((1024, True), (4096, False)):
            found = {"millions": millions, "length": length, "parameters": 9, "explodes": explodes}
            found["recall"] = {"256": 1.0, "512": 0.2}
            cells[f"low-decay/state={size_}/{length}/seed0"] = found
    settings = {"explosion": 2.0, "times": 32, "recall_threshold": 0.95, "longest_recall": 512}
    record = {"about": {"study": "capacity", "settings": settings}, "cells": cells}
    text = page([("a.json", record)])
    whole(text)
    assert "low-decay, held at: 4,096 at 0.9" in text and "failed at: 1,024 at 0.9" in text
    assert "published: 5.172 N_S - 4.469 K" in text and "low-decay, at least: 256" in text


def test_a_cell_in_two_files_counts_once() -> None:
    assert page([("a.json", evaluated()), ("a.json", evaluated())]).count("x 2 seeds") == 0


def test_text_cannot_break_out(traced) -> None:
    inside = embedded("n", [EVIL, "&lt;"]).removesuffix("</script>").partition(">")[2]
    assert json.loads(inside) == [EVIL, "&lt;"] and not set(inside) & set("<>&")
    text = page([("<b>.json", traced)], EVIL)
    reader = whole(text)
    assert reader.tags.count("script") == 2 and "b" in reader.tags and "alert(&quot;1" in text
    evil = evaluated(EVIL)
    for cell in evil["cells"].values():
        cell["task"], cell["policy"] = cell["task"] + ":text=" + EVIL, f'"{EVIL}'
    assert whole(page([("a.json", evil)])).tags.count("script") == 1


def test_a_trace_knows_when_a_token_left(traced) -> None:
    """The survivors of a window are known: 2 sinks and the last 6, looked at every 4 tokens."""
    bounded, free = traced["runs"][1], traced["runs"][0]
    assert free["policy"] == "none" and free["lists"][0]["left"] == [[0] * 40]
    held = bounded["lists"][0]
    assert (held["layer"], held["heads"], len(held["left"])) == ("0", 2, 1)
    assert held["left"][0][:2] == [0, 0] and held["left"][0][34:] == [0] * 6
    # Token i is gone once i + 7 tokens have been read: seen at the next multiple of 4.
    assert held["left"][0][2:34] == [-(-(i + 7) // 4) * 4 for i in range(2, 34)]
    assert bounded["looks"] == list(range(4, 41, 4)) and len(bounded["norms"][0]["norm"]) == 10
    norms = [run["norms"][0]["norm"] for run in (bounded, free)]
    assert bounded["norms"][0]["layer"] == "1" and norms[0][:2] == norms[1][:2] != norms[0][2:4]
    for run in (bounded, free):
        assert sum(run["kinds"].values()) == run["state_bytes"][-1]
    assert {"keys", "values", "positions", "recurrent state", "convolution"} <= set(free["kinds"])


def test_survivors_are_drawn_as_traced(traced) -> None:
    text = page([("trace.json", traced)])
    spans = re.findall(r'<span class="(q\d)">', text)
    assert spans == ["q5"] * 2 + ["q0"] * 32 + ["q5"] * 6
    data = re.search(r'type="application/json"[^>]*>(.*?)</script>', text)[1]
    lists = json.loads(data)["lists"]
    # Never gone is the character of 10 looks; token 2 is gone at the third look, number 2.
    assert lists[0][1][0] == chr(35 + 10) and lists[0][1][2] == chr(35 + 2)
    assert "1 of 1" in text and "State norm while reading" in text


def test_a_trace_refuses_what_it_cannot_follow(traced) -> None:
    model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="3 ids and 2 tokens"):
        trace(model, torch.zeros(3, dtype=torch.long), ["a", "b"], [])
    with pytest.raises(ValueError, match=r"every=1: 100 tokens .* choose at least 2"):
        trace(model, torch.zeros(100, dtype=torch.long), ["a"] * 100, [], every=1)


def test_series_beyond_what_can_be_told_apart_stay_in_the_table() -> None:
    lines = tuple(
        Series(f"n{i}", ((1.0, i), (2.0, float("nan")), (4.0, i))) for i in range(MOST + 2)
    )
    text = draw(Plot("t", "x", "y", lines, True, True), "n")
    assert "2 more are in the table only" in text and text.count("<polyline") == 2 * MOST
    assert text.count("data-s=") == MOST + 2 and "nan" not in text
    kinds = re.findall(r'<polyline class="([^"]+)"', draw(Plot("t", "x", "y", lines), "n"))[:MOST]
    assert len(set(kinds)) == MOST
    assert draw(Plot("t", "x", "y", ()), "n") == ""


def test_numbers_are_said_shortly() -> None:
    said = [number(v) for v in (None, True, 12345, 0.123456, 12345.6, 2.0, "x")]
    assert said == ["", "yes", "12,345", "0.1235", "12,346", "2", "x"]
    assert [size(n) for n in (0, 1023, 1536, 3 * 2**20, 2**40)] == [
        "0 B", "1,023 B", "1.5 KiB", "3.0 MiB", "1,024.0 GiB",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ([], "a list"),
        ({}, "unknown fields none"),
        ({"colour": 1}, "unknown fields 'colour'"),
        ({"cells": {}}, "field 'cells' is empty"),
        ({"format": 1, "runs": []}, "field 'runs' is empty"),
        ({"format": 1}, "field 'runs' is missing"),
        (
            {"format": "statewright-eval-9", "cells": {"a": {}}},
            "field 'format' is 'statewright-eval-9'",
        ),
        ({"format": [1]}, r"field 'format' is \[1\]"),
        ({"cells": {"a": 3}}, r"cells\['a'\] is a int"),
        (
            {"about": {"format": "statewright-eval-1"}, "cells": {"a": {}}},
            r"\['a'\] has no field 'task'",
        ),
        ({"rows": [1]}, r"rows\[0\] is a int"),
        ([{"task": "x"}], r"cells\[0\] has no field 'policy'"),
        ({"format": 1, "runs": [{"model": "m"}]}, "read as diagnosis, field 'text' is missing"),
    ],
)
def test_unknown_files_are_refused_with_the_field(record, said) -> None:
    with pytest.raises(ValueError, match=f"^a.json: .*{said}"):
        page([("a.json", record)])


def test_kinds() -> None:
    assert (
        kind_of(evaluated(), "a") == "eval"
        and kind_of([*evaluated()["cells"].values()], "a") == "list"
    )
    with pytest.raises(ValueError, match="no result files"):
        page([])


def test_a_page_too_large_is_refused_with_the_file() -> None:
    cells = {f"{i}/{'x' * 900}": {"a": 1.5} for i in range(2500)}
    with pytest.raises(ValueError, match=r"more than 2,000,000; .* \(the largest is big.json\)"):
        page([("small.json", evaluated()), ("big.json", {"cells": cells})])


def test_the_verbs(tmp_path, capsys, traced) -> None:
    (tmp_path / "t.json").write_text(json.dumps(traced))
    out = tmp_path / "pages" / "r.html"
    assert main(["report", str(tmp_path / "t.json"), "--out", str(out)]) == 0
    assert out.read_text(encoding="utf-8") == page([("t.json", traced)])
    (tmp_path / "bad.json").write_text("{")
    assert main(["report", str(tmp_path / "bad.json"), "--out", str(out)]) == 1
    assert main(["report", str(tmp_path / "none.json"), "--out", str(out)]) == 2
    assert main(["report", "--out", str(out)]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 3 and "not JSON" in err[0] and "no such file" in err[1]
    assert out.read_text(encoding="utf-8") == page([("t.json", traced)])


def test_the_trace_verb(tmp_path, capsys) -> None:
    from statewright.models.tokenizers import byte_tokenizer

    config = StatewrightConfig(
        vocab_size=257, hidden_size=16, num_hidden_layers=1, mixer="attention"
    )
    StatewrightForCausalLM(config).save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    (tmp_path / "t.txt").write_text("<b>x</b> &" * 9, encoding="utf-8")
    arguments = ["trace", str(tmp_path / "m"), "--text", str(tmp_path / "t.txt")]
    bounded = ["--policy", "tova:budget=8", "--length", "64"]
    out = str(tmp_path / "o.json")
    assert main([*arguments, *bounded, "--output", out]) == 0
    found = json.loads(Path(out).read_text())
    assert "".join(found["tokens"]) == ("<b>x</b> &" * 9)[:64] and found["versions"]["torch"]
    assert sum(at == 0 for at in found["runs"][1]["lists"][0]["left"][0]) == 8
    whole(page([("o.json", found)]))
    capsys.readouterr()
    for wrong, said, ends in (
        (["--policy", "tovva:budget=8"], "unknown policy 'tovva'", 2),
        (["--length", "1"], "--length", 2),
        (["--length", "64", "--every", "0k"], "", 0),
        (["--policy", "forgetmore:decay=0.9"], "forgetmore", 1),
    ):
        code = main([*arguments, *wrong, "--output", str(tmp_path / "p.json")])
        err = capsys.readouterr().err
        assert code == ends and said in err and err.count("\n") <= 1
