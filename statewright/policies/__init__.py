"""Policies: one method per file. Adding one is a file and a line of `catalog.POLICIES`."""

from __future__ import annotations

import dataclasses

from statewright import spec
from statewright.catalog import POLICIES
from statewright.policies.base import MARK, Eviction, Policy, Slots
from statewright.policies.delta_scale import DeltaScale
from statewright.policies.forget_more import ForgetMore
from statewright.policies.h2o import H2O
from statewright.policies.key_diff import KeyDiff
from statewright.policies.key_norm import KeyNorm
from statewright.policies.lag_kv import LagKV
from statewright.policies.random import Random
from statewright.policies.recurrent import Chain, RecurrentPolicy, eviction_of, recurrent_parts
from statewright.policies.state_norm import StateNorm
from statewright.policies.state_window import StateWindow
from statewright.policies.tova import TOVA
from statewright.policies.window import Window


def build_policy(text: str | Policy | None) -> Policy | None:
    """`build_policy("tova:budget=512:sinks=4")`; "none" and None mean no policy.

    "forgetmore:decay=0.999+statenorm:limit=2x" is a chain, the first part outermost;
    "package.module:Class:budget=64" a class of the user's own whose module is imported. Raises
    ValueError naming what is unknown, or the smallest legal budget.

    >>> build_policy("tova:budget=512:sinks=4")
    TOVA(every=1, budget=512, sinks=4, per='layer')
    """
    if text is None or isinstance(text, Policy):
        return text
    if text.strip().lower() == "none":
        return None
    parts = [spec.build(part, POLICIES, "policy") for part in POLICIES.parts(text)]
    return parts[0] if len(parts) == 1 else Chain(tuple(parts))


def policy_spec(policy: Policy | None) -> str:
    """The spec string that builds this policy; "none" without one.

    >>> policy_spec(TOVA(budget=512, sinks=4))
    'tova:budget=512:sinks=4'
    """
    if policy is None:
        return "none"
    if isinstance(policy, Chain):
        return "+".join(policy_spec(part) for part in policy.parts)
    name = POLICIES.name_of(type(policy))
    known = [f.name for f in dataclasses.fields(policy) if f.metadata.get("spec", True)]
    options = {name: getattr(policy, name) for name in known}
    if "budget" in options:
        options = {"budget": options.pop("budget"), **options}
    else:
        options["every"] = options.pop("every")
    return spec.format_spec(name, options, type(policy))


__all__ = [
    "H2O",
    "MARK",
    "POLICIES",
    "TOVA",
    "Chain",
    "DeltaScale",
    "Eviction",
    "ForgetMore",
    "KeyDiff",
    "KeyNorm",
    "LagKV",
    "Policy",
    "Random",
    "RecurrentPolicy",
    "Slots",
    "StateNorm",
    "StateWindow",
    "Window",
    "build_policy",
    "eviction_of",
    "policy_spec",
    "recurrent_parts",
]
