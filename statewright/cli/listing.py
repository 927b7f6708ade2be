"""`statewright list`: what can be named in a spec, with its options."""

from __future__ import annotations

from typing import Any

import click

from statewright.cli.show import Column, json_option, show, table

_TOKENIZERS = ("bytes", "characters")


@click.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List mixers, policies, tasks and scan backends, with the options a spec may set.

    \b
    Example: statewright list
    """
    from statewright.catalog import MIXERS, POLICIES, TASKS
    from statewright.hf.pretrained import PRETRAINED
    from statewright.ops import VECTOR_BACKENDS

    registries = {"mixers": MIXERS, "policies": POLICIES, "tasks": TASKS}
    found: dict[str, Any] = {
        title: {
            name: {
                "options": {n: p.default for n, p in registry.options(name).items()},
                "about": registry.summary(name),
            }
            for name in registry
        }
        for title, registry in registries.items()
    }
    found["scan backends"] = list(VECTOR_BACKENDS)
    found["tokenizers"] = list(_TOKENIZERS)
    found["models"] = list(PRETRAINED)
    show(found, as_json, _draw)


def _word(value: Any) -> str:
    """As a spec writes it: true, none."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _draw(console: Any, found: dict[str, Any]) -> None:
    columns = Column("name"), Column("options and defaults", words=True)
    for title in ("mixers", "policies", "tasks"):
        rows = [
            (
                name,
                ", ".join(f"{n}={_word(d)}" for n, d in entry["options"].items()),
                entry["about"],
            )
            for name, entry in found[title].items()
        ]
        heading = f"{title}  (name:option=value:option=value)"
        table(console, heading, [*columns, Column("what it is", words=True)], rows)
        console.print()
    also = {"tokenizers": "any Hugging Face path or id", "models": "any directory or id"}
    for title in ("scan backends", "tokenizers", "models"):
        names = [*found[title], *([also[title]] if title in also else [])]
        console.print(f"{title:<14} {', '.join(names)}")
