"""One page of any result files: which kind each is, and the sections in order."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from statewright.report import cells, diagnosis, evaluation, held
from statewright.report.heat import stacked
from statewright.report.html import document, number, section, size, table, words
from statewright.report.script import SCRIPT

MOST_BYTES = 2_000_000
_TITLE = "Statewright X-ray"
_EVAL, _TRACE = "statewright-eval-1", "statewright-trace-1"
_EXPECTED = (
    "the results of eval, study, capacity, trace, bench, diagnose --json or size --json, "
    "or of an example"
)


def read(path: str | Path) -> Any:
    """The JSON in a file; ValueError if it is missing or no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error


def kind_of(record: Any, name: str) -> str:
    """eval, trace, cells, diagnosis, size, rows or results.

    Raises ValueError, naming file and field, for what none of them is and for an empty set.
    """
    if isinstance(record, list) and record and isinstance(record[0], dict):
        _each({"cells": record}, "cells", "eval", name)
        return "list"
    if not isinstance(record, Mapping):
        raise ValueError(f"{name}: a {type(record).__name__}, expected {_EXPECTED}")
    kind, needed = _by_fields(record, name)
    for field in needed:
        if not record.get(field):
            state = "empty" if field in record else "missing"
            raise ValueError(f"{name}: field {field!r} is {state}; there is nothing to show")
    _each(record, needed[-1], kind, name)
    return kind


def _by_fields(record: Mapping[str, Any], name: str) -> tuple[str, tuple[str, ...]]:
    said = record.get("format", (record.get("about") or {}).get("format"))
    known: dict[Any, tuple[str, tuple[str, ...]]] = {
        _TRACE: ("trace", ("tokens", "runs")),
        _EVAL: ("eval", ("cells",)),
        1: ("diagnosis", ("runs",)),
    }
    if said is not None:
        if not isinstance(said, (str, int)) or said not in known:
            legal = ", ".join(repr(value) for value in known)
            raise ValueError(f"{name}: field 'format' is {said!r}, expected one of {legal}")
        return known[said]
    for field, kind in (("cells", "cells"), ("rows", "rows"), ("results", "results")):
        if field in record:
            return kind, (field,)
    if "state_bytes" in record and "kinds" in record:
        return "size", ("kinds",)
    fields = ", ".join(map(repr, list(record)[:6])) or "none"
    raise ValueError(f"{name}: unknown fields {fields}; expected {_EXPECTED}")


def _each(record: Mapping[str, Any], field: str, kind: str, name: str) -> None:
    """Every entry is an object, with the fields that its kind cannot be shown without."""
    if kind == "size":
        return
    needed = {"eval": ("task", "policy", "model", "metrics"), "trace": ("policy", "looks")}
    entries = record[field]
    if not isinstance(entries, Mapping | list):
        raise ValueError(f"{name}: field {field!r} is a {type(entries).__name__}")
    for key, entry in entries.items() if isinstance(entries, Mapping) else enumerate(entries):
        if not isinstance(entry, Mapping):
            raise ValueError(f"{name}: {field}[{key!r}] is a {type(entry).__name__}, no object")
        for need in needed.get(kind, ()):
            if need not in entry:
                raise ValueError(f"{name}: {field}[{key!r}] has no field {need!r}")


def page(files: Sequence[tuple[str, Any]], title: str | None = None) -> str:
    """The HTML of (name, record) pairs: a pure function of them, at most 2 MB.

    Eval results are put together, whatever file they are in; everything else is a section per
    file, in order. Raises ValueError for no files, an empty or unknown one, and a page too large.
    """
    if not files:
        raise ValueError("report: no result files")
    kinds = [kind_of(record, name) for name, record in files]
    sections: list[tuple[str, str]] = []
    if results := _evaluated(files, kinds):
        against = [
            record["recall_against_bytes"]
            for _, record in files
            if isinstance(record, Mapping) and record.get("recall_against_bytes")
        ]
        sections.append(("Models, tasks and policies", _told(results, against)))
    for i, ((name, record), kind) in enumerate(zip(files, kinds)):
        if kind not in ("eval", "list"):
            label, make = _sections(kind, name, record)
            try:
                sections.append((label, make(f"f{i}")))
            except (KeyError, TypeError, AttributeError, IndexError) as error:
                raise ValueError(f"{name}: read as {kind}, {_wrong(error)}") from error
    text = document(_title(title, sections), _body(title or _TITLE, sections, files, kinds), SCRIPT)
    if len(text.encode()) > MOST_BYTES:
        largest = max(files, key=lambda file: len(json.dumps(file[1])))[0]
        raise ValueError(
            f"report: the page would have {len(text.encode()):,} bytes, more than {MOST_BYTES:,}; "
            f"give fewer files (the largest is {largest})"
        )
    return text


def _wrong(error: Exception) -> str:
    return f"field {error} is missing" if isinstance(error, KeyError) else f"but {error}"


def _told(results: Sequence[Any], against: Sequence[Any]) -> str:
    try:
        return evaluation.evaluation(results, "e", against)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"report: read as results of eval, {_wrong(error)}") from error


def _evaluated(files: Sequence[tuple[str, Any]], kinds: Sequence[str]) -> list[Mapping[str, Any]]:
    """The results of every eval file; the same cell in two files counts once."""
    found: dict[str, Mapping[str, Any]] = {}
    for (name, record), kind in zip(files, kinds):
        if kind == "eval":
            found |= record["cells"]
        elif kind == "list":
            found |= {f"{name} {i}": entry for i, entry in enumerate(record)}
    return list(found.values())


def _sections(kind: str, name: str, record: Any) -> tuple[str, Callable[[str], str]]:
    """A label for the list of contents, and what makes the section."""
    stem = name.removesuffix(".json").replace("_", " ")
    if kind == "trace":
        label = f"What {record.get('model', 'a model')} holds"
        return label, lambda at: held.held_section(record, at)
    if kind == "cells":
        study = (record.get("about") or {}).get("study")
        label = f"{study}: {stem}" if study and study != stem else stem
        return label, lambda at: cells.cells_section(record, at, label)
    if kind == "diagnosis":
        label = f"Diagnosis of {record['runs'][0].get('model', 'a model')}"
        return label, lambda at: diagnosis.as_section(record, at)
    if kind == "size":
        return f"State: {stem}", lambda at: _size(record, at, f"State: {stem}")
    return stem, lambda at: cells.rows_section(record, kind, at, stem)


def _size(record: Mapping[str, Any], at: str, title: str) -> str:
    heads = ["layer", "kind", "bytes"]
    rows = [
        [str(i), layer["kind"], number(layer["bytes"])] for i, layer in enumerate(record["layers"])
    ]
    bars = {
        "this model": record["kinds"],
        "a Transformer's keys and values": {"kv": record["transformer_bytes"]},
    }
    told = f"{size(record['state_bytes'])} after {record['context']:,} tokens, "
    told += f"{record['batch']} row(s)."
    drawn = stacked("Bytes of state by kind", bars, f"{at}-size")
    return section(
        at, title, [words(told), f'<div class="figures">{drawn}</div>', table("", heads, rows)]
    )


def _title(title: str | None, sections: Sequence[tuple[str, str]]) -> str:
    """What the browser's tab says."""
    return title or f"{_TITLE}: {', '.join(label for label, _ in sections)}"


def _body(
    title: str, sections: Sequence[tuple[str, str]], files: Sequence[tuple[str, Any]], kinds: Any
) -> str:
    links = ""
    if len(sections) > 1:
        ids = (text.split('aria-labelledby="', 1)[1].split('"', 1)[0] for _, text in sections)
        items = "".join(
            f'<li><a href="#{at}">{escape(label)}</a></li>' for at, (label, _) in zip(ids, sections)
        )
        links = f'<nav aria-label="Contents"><ul>{items}</ul></nav>'
    named = ", ".join(name for name, _ in files)
    runs = [run for _, record in files for run in _runs(record)]
    made = "".join(f"<p>{escape(run)}</p>" for run in dict.fromkeys(runs))
    return (
        f'<main class="page"><header><p class="soft brand"><span>statewright report</span></p>'
        f"<h1>{escape(title)}</h1>{links}</header>\n"
        + "\n".join(text for _, text in sections)
        + f"\n<footer><p>Drawn from {escape(named)} by <code>statewright report</code>.</p>{made}"
        "</footer></main>"
    )


def _runs(record: Any) -> list[str]:
    """Command, versions and hardware of eval results and traces."""
    if not isinstance(record, Mapping):
        return []
    about = record.get("about") or {}
    runs = list((about.get("runs") or {}).values())
    runs += [record] if record.get("format") == _TRACE else []
    said = []
    for run in runs:
        versions = ", ".join(f"{n} {v}" for n, v in (run.get("versions") or {}).items() if v)
        place = run.get("hardware") or {}
        device = f"{place.get('device')}, {place.get('threads')} thread(s)" if place else ""
        parts = (run.get("command"), versions, device, run.get("git") and f"git {run['git'][:12]}")
        said.append("; ".join(part for part in parts if part))
    return said
