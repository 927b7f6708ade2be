"""What a spec can name: a line for every policy, mixer and task. Needs neither torch nor them."""

from __future__ import annotations

from statewright.registry import Registry

_POLICY = "statewright.policies.base:Policy"

POLICIES = Registry(
    "policy",
    {
        "window": "statewright.policies.window:Window",
        "tova": "statewright.policies.tova:TOVA",
        "h2o": "statewright.policies.h2o:H2O",
        "random": "statewright.policies.random:Random",
        "keynorm": "statewright.policies.key_norm:KeyNorm",
        "keydiff": "statewright.policies.key_diff:KeyDiff",
        "lagkv": "statewright.policies.lag_kv:LagKV",
        "forgetmore": "statewright.policies.forget_more:ForgetMore",
        "statenorm": "statewright.policies.state_norm:StateNorm",
        "statewindow": "statewright.policies.state_window:StateWindow",
        "deltascale": "statewright.policies.delta_scale:DeltaScale",
    },
    base=_POLICY,
    joint="+",
)
"""Policies by the names that specs use: `"tova:budget=512"`; `build_policy` builds one."""

# What an evaluation compares: policies, and the whole model on short contexts.
BOUNDS = Registry(
    "policy",
    {**POLICIES.homes, "context": "statewright.evaluation.context:ShortContext"},
    base=_POLICY,
    joint="+",
)

MIXERS = Registry(
    "mixer",
    {
        "mingru": "statewright.mixers.mingru:MinGRU",
        "minlstm": "statewright.mixers.minlstm:MinLSTM",
        "gru": "statewright.mixers.gru:GRU",
        "lstm": "statewright.mixers.gru:LSTM",
        "mamba2": "statewright.mixers.mamba2:Mamba2",
        "gla": "statewright.mixers.gla:GLA",
        "mamba": "statewright.mixers.mamba:Mamba",
        "attention": "statewright.mixers.attention:Attention",
        "s4": "statewright.mixers.s4:S4",
        "s4d": "statewright.mixers.s4d:S4D",
        "h3": "statewright.mixers.h3:H3",
        "hyena": "statewright.mixers.hyena:Hyena",
        "aaren": "statewright.mixers.aaren:Aaren",
    },
    base="statewright.mixers.base:Mixer",
)
"""Mixers by the names that specs use: `"mingru:expansion=2"`; `build_mixer` builds one."""

TASKS = Registry(
    "task",
    {
        "passkey": "statewright.tasks.passkey:Passkey",
        "perplexity": "statewright.tasks.perplexity:Perplexity",
        "stream": "statewright.tasks.stream:Stream",
        "newline": "statewright.tasks.newline:Newline",
        "mqar": "statewright.tasks.mqar:MQAR",
        "niah": "statewright.tasks.niah:NIAH",
        "in-context": "statewright.tasks.in_context:InContext",
        "copying": "statewright.tasks.copying:Copying",
        "selective-copy": "statewright.tasks.selective_copy:SelectiveCopy",
        "squality": "statewright.tasks.squality:SQuALITY",
        "qasper": "statewright.tasks.qasper:QASPER",
        "stories": "statewright.tasks.stories:Stories",
        "bucket-sort": "statewright.tasks.chomsky:BucketSort",
        "missing-duplicate": "statewright.tasks.chomsky:MissingDuplicate",
        "cycle-navigation": "statewright.tasks.chomsky:CycleNavigation",
        "even-pairs": "statewright.tasks.chomsky:EvenPairs",
        "majority": "statewright.tasks.chomsky:Majority",
        "majority-count": "statewright.tasks.chomsky:MajorityCount",
        "listops": "statewright.tasks.listops:ListOps",
    },
    base="draw",
)
"""Tasks by the names that specs use: `"passkey:length=4k"`; `build_task` builds one."""
