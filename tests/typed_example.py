"""The library as a typed user writes against it: mypy reads this file in `make test`."""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import torch
from torch import Tensor

from statewright import (
    TOVA,
    Eviction,
    MatrixState,
    MinGRU,
    ModelState,
    Policy,
    Session,
    State,
    StatewrightConfig,
    StatewrightForCausalLM,
    VectorState,
    build_policy,
    check,
    diagnose,
    evaluate,
    laws,
    load,
    load_state,
    matrix_scan,
    repair,
    resize,
    vector_scan,
)
from statewright.checks.report import Report
from statewright.diagnosis import Diagnosis
from statewright.diagnosis.repair import Repair
from statewright.evaluation import Result


def scans(a: Tensor, b: Tensor, h: Tensor, q: Tensor, S: Tensor) -> None:
    assert_type(vector_scan(a, b, h), tuple[Tensor, Tensor])
    assert_type(matrix_scan(q, q, q, q, S, backend="ref"), tuple[Tensor, Tensor])


def states(path: Path) -> None:
    state = VectorState(h=torch.zeros(1, 4), seen=torch.zeros(1, dtype=torch.long))
    assert_type(state, VectorState)
    assert_type(state.rows(0).detach(), VectorState)
    assert_type(state.h, Tensor)
    assert_type(MatrixState(S=torch.zeros(1, 1, 2, 2), seen=state.seen).nbytes, int)
    assert_type(load_state(path), State)


def layers(x: Tensor) -> None:
    layer = MinGRU(64, expansion=2)
    y, state = layer.forward(x)
    assert_type(y, Tensor)
    assert_type(state, State)
    assert_type(layer.init_state(2), VectorState)


def policies() -> None:
    assert_type(build_policy("tova:budget=512"), Policy | None)
    bound: Eviction = TOVA(budget=512, sinks=4)
    assert_type(bound.budget, int | str)


def models(path: Path) -> None:
    model = load(path)
    assert_type(model, StatewrightForCausalLM)
    assert_type(resize(model, key=2), StatewrightForCausalLM)
    assert_type(model.init_state(1), ModelState)
    config = StatewrightConfig(hidden_size=64, mixer=["mingru", "minlstm"])
    assert_type(config.mixer_of(0), str)
    session = Session(model, "tova:budget=64")
    assert_type(session.generate(20, temperature=0.8), Tensor)
    assert_type(session.fork(), Session)
    assert_type(session.state, State)


def verbs(model: StatewrightForCausalLM, path: Path) -> None:
    assert_type(diagnose(model, path, 64), Diagnosis)
    assert_type(repair(model, path).policy, str)
    assert_type(repair("runs/a", path), Repair)
    assert_type(check("runs/a"), Report)
    assert_type(evaluate(model, None, "mqar").metrics, dict[str, float])
    assert_type(evaluate("runs/a", None, "mqar"), Result)
    assert_type([finding.ok for finding in laws.check(MinGRU(4), laws.Case())], list[bool])
