"""Stories under policies against the unbounded model's, as cells like any other result."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

from statewright.cells import Cell
from statewright.evaluation.judge import Verdicts, judge
from statewright.evaluation.measure import metered
from statewright.evaluation.run import Result, spec_of
from statewright.state_file import fingerprint
from statewright.tasks import Batch, Task
from statewright.token_text import text_of

# Changes whenever the same texts would get another verdict from the same model.
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Judge:
    """The model that judges, by its name in results."""

    name: str
    model: Any
    tokenizer: Any

    def cells(
        self, task: Task, batch: Batch, results: Sequence[dict[str, Any]], tokenizer: Any
    ) -> list[Cell]:
        """One per policy: its stories against those of the first of the results.

        `tokenizer` made the batch. A key names both writers' texts and the judge's weights by a
        digest.
        """
        prompts = [
            text_of(tokenizer, sample.input_ids, skip_special_tokens=True)
            for sample in batch.samples
        ]
        first, *others = results
        weights, cells = fingerprint(self.model), []
        for result in others:
            told = json.dumps([weights, prompts, result["texts"], first["texts"]])
            key = (
                f"{result['model']} | {spec_of(task)} v{task.version} | {result['policy']} | "
                f"judged by {self.name} v{VERSION} | n {result['n']}, seed {result['seed']} | "
                f"{hashlib.sha256(told.encode()).hexdigest()[:12]}"
            )
            cells.append(Cell(key, partial(self._run, task, prompts, result, first)))
        return cells

    def _run(
        self, task: Task, prompts: list[str], result: dict[str, Any], first: dict[str, Any]
    ) -> dict[str, Any]:
        texts, references = result["texts"], first["texts"]
        with metered(self.model) as meter:
            found = judge(self.model, self.tokenizer, prompts, texts, references)
            cost = meter.cost(self.model.device)
        told = Result(
            f"{spec_of(task)} judged by {self.name}",
            VERSION,
            result["policy"],
            found.n,
            result["seed"],
            metrics_of(found),
            found.per_sample,
            (0.0,) * found.n,
            found.interval,
            truncated={"samples": found.n, "tokens": found.cut} if found.cut else {},
            cost=cost,
        )
        entry = {name: result[name] for name in ("model", "run", "prefill")}
        return {**entry, **dataclasses.asdict(told)}


def metrics_of(found: Verdicts) -> dict[str, float]:
    """A judge's verdicts as the metrics of a result, the win rate first."""
    names = ("win_rate", "wins", "ties", "losses", "identical", "preference", "position_bias")
    metrics = {name: float(getattr(found, name)) for name in names}
    if found.preference_interval is not None:
        metrics |= dict(zip(("preference_low", "preference_high"), found.preference_interval))
    return metrics | {f"verdict_{name}": share for name, share in found.letters.items()}
