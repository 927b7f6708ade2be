"""Quickstart's step on state collapse: a model that never learned to forget, and its repair."""

from __future__ import annotations

from typing import Any

from statewright.cli.quickstart.screen import Screen

_READ, _SEARCHED = 8192, 4096


def collapse(screen: Screen, text: bytes) -> dict[str, Any]:
    """Read 8,192 bytes with `demo:collapsed`, say the verdict, and search repairs on the next
    4,096: about 15 s on one core. The report is on bytes that the search has not read."""
    import torch

    from statewright.demos import locate
    from statewright.diagnosis import diagnose
    from statewright.diagnosis.repair import repair
    from statewright.models import load

    model = load(locate("demo:collapsed"))
    length = model.config.train_length
    read = min(_READ + 1, len(text) // 2)
    ids = torch.tensor(list(text[:read])).unsqueeze(0)
    search = torch.tensor(list(text[read : read + _SEARCHED + 1])).unsqueeze(0)
    verdict = diagnose(model, ids, length, name="demo:collapsed").verdict
    found = repair(model, search, ids, length, ("forgetmore", "statewindow"))
    before, after = found.before, found.after
    screen.say(f"verdict: [bold red]{verdict.name}[/bold red]" if verdict.cause else verdict.name)
    ends = [end for end, _ in before.octaves][::-2][::-1]
    rows = [
        [name, f"{trial.inside:.2f}", *(f"{dict(trial.octaves)[end]:.2f}" for end in ends)]
        for name, trial in (("as it is", before), (found.policy, after))
    ]
    screen.table(["nats per byte", f"to {length}", *(f"{end:,}" for end in ends)], rows)
    return {
        "verdict": verdict.name,
        "policy": found.policy,
        "tried": len(found.trials) - 1,
        "inside": before.inside,
        "before": before.octaves[-1][1],
        "after": after.octaves[-1][1],
    }
