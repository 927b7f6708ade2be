"""Short names for models in tables and legends."""

from __future__ import annotations

from collections.abc import Iterable


def short_names(models: Iterable[str]) -> dict[str, str]:
    """Each model's shortest ending of a path that no other model shares.

    `runs/x/a` and `runs/y/a` become `x/a` and `y/a`; one that is the ending of another stays whole.
    """
    parts = {model: model.rstrip("/").split("/") for model in dict.fromkeys(models)}
    names = {}
    for model, own in parts.items():
        others = [other for m, other in parts.items() if m != model]
        sizes = (n for n in range(1, len(own)) if all(o[-n:] != own[-n:] for o in others))
        n = next(sizes, None)
        names[model] = model if n is None else "/".join(own[-n:])
    return names
