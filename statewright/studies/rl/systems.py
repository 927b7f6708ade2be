"""Which models the study trains, and their files: weights with everything that acting needs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from statewright.models import StatewrightConfig
from statewright.state_file import write_tensors
from statewright.studies.experiment import System, Systems
from statewright.studies.rl.model import Cloning, DecisionModel, Normalised
from statewright.studies.rl.scores import ControlTask, task_of
from statewright.studies.rl.settings import DecisionSettings

CLONING = "bc"
DEFAULT = ("mingru/3", "minlstm/3", "mamba/3", "s4/3", "aaren/3", "transformer/3", "bc/3")
_RECORD = "statewright_decision"


def systems(settings: DecisionSettings) -> Systems:
    """Mixer and MLP in every block, no convolution: the paper's minRNN -> MLP.

    Mamba and S4 take the mixer's place in the same block (Decision Mamba, Decision S4 and Aaren
    have blocks of their own). The Transformer sees 3 K tokens: K time steps, as in its paper.
    """
    minimal = f"expansion={settings.expansion}"
    return {
        "mingru": {"mixer": f"mingru:{minimal}"},
        "minlstm": {"mixer": f"minlstm:{minimal}"},
        "mamba": {"mixer": "mamba"},
        "mamba2": {"mixer": "mamba2"},
        "gla": {"mixer": "gla"},
        "s4": {"mixer": "s4:state_size=16"},
        "s4d": {"mixer": "s4d:state_size=16"},
        "aaren": {"mixer": "aaren"},
        "gru": {"mixer": "gru"},
        "lstm": {"mixer": "lstm"},
        "transformer": {"mixer": f"attention:window={3 * settings.context}"},
        CLONING: {},
    }


def build(system: System, settings: DecisionSettings, task: ControlTask, seed: int) -> Normalised:
    """The model, its weights drawn from the seed."""
    return _built(_described(system, settings), task, seed)


def _described(system: System, settings: DecisionSettings) -> dict[str, Any]:
    shared = {"hidden_size": settings.hidden_size, "dropout": settings.dropout}
    if system.name == CLONING:
        return {"kind": CLONING, "layers": system.layers, **shared}
    own = systems(settings)[system.name]
    return {"kind": "decision", "num_hidden_layers": system.layers, **shared, **own}


def _built(described: dict[str, Any], task: ControlTask, seed: int) -> Normalised:
    options = dict(described)
    sizes = {"observation_size": task.observation_size, "action_size": task.action_size}
    kind = options.pop("kind")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == CLONING:
            return Cloning(**options, **sizes)
        config = StatewrightConfig(vocab_size=1, conv_kernel=0, mlp_ratio=4.0, **options)
        return DecisionModel(config, **sizes)


@dataclass(frozen=True, eq=False)
class Trained:
    """A model, the dataset's name, and the best return of its training data."""

    model: Normalised
    dataset: str
    best_return: float

    @property
    def task(self) -> ControlTask:
        return task_of(self.dataset)


def save_model(path: Path, trained: Trained, system: System, settings: DecisionSettings) -> None:
    """One safetensors file, replaced as a whole."""
    record = {
        "dataset": trained.dataset,
        "best_return": trained.best_return,
        "model": _described(system, settings),
    }
    tensors = {k: v.detach().cpu().contiguous() for k, v in trained.model.state_dict().items()}
    write_tensors(path, tensors, {_RECORD: json.dumps(record)})


def load_model(path: str | Path) -> Trained:
    """What `save_model` wrote, ready to act; ValueError for any other file."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {})[_RECORD])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        model = _built(record["model"], task_of(record["dataset"]), 0)
        model.load_state_dict(tensors)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: no decision model of this study ({error})") from error
    return Trained(model.eval(), record["dataset"], record["best_return"])
