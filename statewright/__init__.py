"""Statewright: build, train, bound, check, repair, resize, save and measure the state of any
causal sequence model. Names are loaded on first use, so `import statewright` costs nothing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

# Every public name, by the group of the API reference and the module that holds it.
GROUPS: dict[str, dict[str, str]] = {
    "states": {
        "state": "State VectorState MatrixState KVState OpaqueState ModelState cat",
        "state_file": "save_state load_state",
    },
    "scans": {"ops": "vector_scan matrix_scan default_backend"},
    "mixers": {
        "catalog": "MIXERS",
        "mixers": "build_mixer Mixer VectorMixer MinGRU MinLSTM GRU LSTM Mamba2 GLA Mamba "
        "Attention S4 S4D H3 Hyena Aaren",
    },
    "policies": {
        "catalog": "POLICIES",
        "policies": "build_policy policy_spec Policy Eviction Window TOVA H2O Random "
        "KeyNorm KeyDiff LagKV RecurrentPolicy ForgetMore StateNorm StateWindow DeltaScale Chain",
    },
    "models": {
        "models": "StatewrightConfig StatewrightForCausalLM StatewrightModel StatewrightOutput",
        "session": "Session",
        "hf.bounded": "BoundedCache",
        "hf.cache": "StateCache",
        "models.tokenizers": "byte_tokenizer character_tokenizer",
    },
    "verbs": {
        "models.load": "load save_as",
        "models.resize": "resize",
        "checks.report": "check",
        "evaluation": "evaluate",
        "diagnosis": "diagnose",
        "diagnosis.repair": "repair",
    },
    "tasks": {"catalog": "TASKS", "tasks": "Task build_task"},
    "laws": {"laws": "laws"},
}
_HOMES = {
    name: home
    for homes in GROUPS.values()
    for home, names in homes.items()
    for name in names.split()
}
__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    # The same names again: a type checker reads no table.
    from statewright import laws as laws
    from statewright.catalog import MIXERS as MIXERS
    from statewright.catalog import POLICIES as POLICIES
    from statewright.catalog import TASKS as TASKS
    from statewright.checks.report import check as check
    from statewright.diagnosis import diagnose as diagnose
    from statewright.diagnosis.repair import repair as repair
    from statewright.evaluation import evaluate as evaluate
    from statewright.hf.bounded import BoundedCache as BoundedCache
    from statewright.hf.cache import StateCache as StateCache
    from statewright.mixers import GLA as GLA
    from statewright.mixers import GRU as GRU
    from statewright.mixers import H3 as H3
    from statewright.mixers import LSTM as LSTM
    from statewright.mixers import S4 as S4
    from statewright.mixers import S4D as S4D
    from statewright.mixers import Aaren as Aaren
    from statewright.mixers import Attention as Attention
    from statewright.mixers import Hyena as Hyena
    from statewright.mixers import Mamba as Mamba
    from statewright.mixers import Mamba2 as Mamba2
    from statewright.mixers import MinGRU as MinGRU
    from statewright.mixers import MinLSTM as MinLSTM
    from statewright.mixers import Mixer as Mixer
    from statewright.mixers import VectorMixer as VectorMixer
    from statewright.mixers import build_mixer as build_mixer
    from statewright.models import StatewrightConfig as StatewrightConfig
    from statewright.models import StatewrightForCausalLM as StatewrightForCausalLM
    from statewright.models import StatewrightModel as StatewrightModel
    from statewright.models import StatewrightOutput as StatewrightOutput
    from statewright.models.load import load as load
    from statewright.models.load import save_as as save_as
    from statewright.models.resize import resize as resize
    from statewright.models.tokenizers import byte_tokenizer as byte_tokenizer
    from statewright.models.tokenizers import character_tokenizer as character_tokenizer
    from statewright.ops import default_backend as default_backend
    from statewright.ops import matrix_scan as matrix_scan
    from statewright.ops import vector_scan as vector_scan
    from statewright.policies import H2O as H2O
    from statewright.policies import TOVA as TOVA
    from statewright.policies import Chain as Chain
    from statewright.policies import DeltaScale as DeltaScale
    from statewright.policies import Eviction as Eviction
    from statewright.policies import ForgetMore as ForgetMore
    from statewright.policies import KeyDiff as KeyDiff
    from statewright.policies import KeyNorm as KeyNorm
    from statewright.policies import LagKV as LagKV
    from statewright.policies import Policy as Policy
    from statewright.policies import Random as Random
    from statewright.policies import RecurrentPolicy as RecurrentPolicy
    from statewright.policies import StateNorm as StateNorm
    from statewright.policies import StateWindow as StateWindow
    from statewright.policies import Window as Window
    from statewright.policies import build_policy as build_policy
    from statewright.policies import policy_spec as policy_spec
    from statewright.session import Session as Session
    from statewright.state import KVState as KVState
    from statewright.state import MatrixState as MatrixState
    from statewright.state import ModelState as ModelState
    from statewright.state import OpaqueState as OpaqueState
    from statewright.state import State as State
    from statewright.state import VectorState as VectorState
    from statewright.state import cat as cat
    from statewright.state_file import load_state as load_state
    from statewright.state_file import save_state as save_state
    from statewright.tasks import Task as Task
    from statewright.tasks import build_task as build_task


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'statewright' has no attribute {name!r}")
    home = importlib.import_module(f"statewright.{_HOMES[name]}")
    return home if name == _HOMES[name] else getattr(home, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
