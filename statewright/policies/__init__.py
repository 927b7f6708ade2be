"""Policies: one method per file. Adding one is a file and a line of `POLICIES`."""

from __future__ import annotations

import dataclasses

from statewright import spec
from statewright.policies.base import MARK, Eviction, Policy, Slots
from statewright.policies.h2o import H2O
from statewright.policies.key_diff import KeyDiff
from statewright.policies.key_norm import KeyNorm
from statewright.policies.lag_kv import LagKV
from statewright.policies.random import Random
from statewright.policies.tova import TOVA
from statewright.policies.window import Window

POLICIES: dict[str, type[Policy]] = {
    "window": Window,
    "tova": TOVA,
    "h2o": H2O,
    "random": Random,
    "keynorm": KeyNorm,
    "keydiff": KeyDiff,
    "lagkv": LagKV,
}


def build_policy(text: str | Policy | None) -> Policy | None:
    """`build_policy("tova:budget=512:sinks=4")`; "none" and None mean no policy.

    Raises ValueError naming what is unknown, or the smallest legal budget.
    """
    if text is None or isinstance(text, Policy):
        return text
    if text.strip().lower() == "none":
        return None
    return spec.build(text, POLICIES, "policy")


def policy_spec(policy: Policy | None) -> str:
    """The spec string that builds this policy; "none" without one."""
    if policy is None:
        return "none"
    name = next((n for n, cls in POLICIES.items() if cls is type(policy)), None)
    if name is None:
        return repr(policy)
    options = {f.name: getattr(policy, f.name) for f in dataclasses.fields(policy)}
    ordered = {"budget": options.pop("budget"), **options} if "budget" in options else options
    return spec.format_spec(name, ordered, POLICIES[name])


__all__ = [
    "H2O",
    "MARK",
    "POLICIES",
    "TOVA",
    "Eviction",
    "KeyDiff",
    "KeyNorm",
    "LagKV",
    "Policy",
    "Random",
    "Slots",
    "Window",
    "build_policy",
    "policy_spec",
]
