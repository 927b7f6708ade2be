"""lm-eval's tasks on a model under a policy: HFLM, with the policy in every call."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from statewright.evaluation.context import Bound, ShortContext, build_bound
from statewright.hf.arguments import CACHE
from statewright.hf.bounded import BoundedCache
from statewright.models import StatewrightForCausalLM

TASKS_DIRECTORY = Path(__file__).parent / "lm_eval_tasks"
_OURS = "statewright_"


@dataclass(frozen=True)
class Harness:
    """How lm-eval runs. `options` go to our own tasks (length, data, num_samples, seed);
    limit: samples per task, None for all; max_length: tokens of context that HFLM keeps, None
    for what it finds in the config."""

    tasks: tuple[str, ...]
    policy: str = "none"
    prefill: str = "exact"
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 1
    max_length: int | None = None
    include_path: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def harness_model(
    model: PreTrainedModel,
    tokenizer: Any,
    policy: Bound | str = "none",
    prefill: str = "exact",
    batch_size: int = 1,
    max_length: int | None = None,
) -> Any:
    """An HFLM whose every call, scoring or generating, is under the policy, from an empty list.

    `context:length=512` is the model as it is, with `max_length` 512. Rows of a batch are padded
    on the right without a mask when lm-eval scores; no policy looks ahead, so scores are those of
    single rows. Raises ValueError without lm-eval and for a model that the policy cannot bound.
    """
    HFLM = _require().models.huggingface.HFLM
    bound = build_bound(policy)
    if isinstance(bound, ShortContext):
        bound, max_length = None, bound.length

    def call_options() -> dict[str, Any]:
        if isinstance(model, StatewrightForCausalLM):
            return {"policy": "none" if bound is None else bound}
        return {} if bound is None else {CACHE: BoundedCache(model, bound, prefill)}

    class Bounded(HFLM):
        def _model_call(
            self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
        ) -> Tensor:
            with torch.no_grad():
                return self.model(inps, **call_options()).logits

        def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kw: Any):
            return super()._model_generate(context, max_length, stop, **call_options(), **kw)

    call_options()  # what cannot be bounded is refused before the first sample
    return Bounded(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        max_length=max_length,
        device=str(model.device),
    )


def run_harness(
    model: PreTrainedModel, tokenizer: Any, harness: Harness, tokenizer_path: str = ""
) -> dict[str, Any]:
    """lm-eval's own results (results, versions, configs, n-samples, ...), without the samples.

    Raises ValueError for unknown tasks and without lm-eval.
    """
    lm_eval = _require()
    options = {"tokenizer": tokenizer_path, **harness.options}
    own = [str(TASKS_DIRECTORY), *([harness.include_path] if harness.include_path else [])]
    manager = lm_eval.tasks.TaskManager(
        include_path=own,
        include_defaults=not all(name.startswith(_OURS) for name in harness.tasks),
        metadata=options,
    )
    _check_tasks(harness.tasks, manager)
    lm = harness_model(
        model, tokenizer, harness.policy, harness.prefill, harness.batch_size, harness.max_length
    )
    return lm_eval.simple_evaluate(
        lm,
        tasks=list(harness.tasks),
        num_fewshot=harness.num_fewshot,
        limit=harness.limit,
        task_manager=manager,
        log_samples=False,
        metadata=options,
    )


def _check_tasks(names: Sequence[str], manager: Any) -> None:
    if not names:
        raise ValueError("tasks: none given, expected names of lm-eval's or ours (statewright_*)")
    for name in names:
        if not manager.match_tasks([name]):
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise ValueError(f"unknown lm-eval task {name!r}{hint}")


def _require() -> Any:
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise ValueError(
            "this needs the package lm-eval: pip install 'statewright[lm-eval]'"
        ) from error
    return lm_eval
