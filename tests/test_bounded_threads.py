"""BoundedCache beside plain calls: in threads, interrupted, without use_cache."""

from __future__ import annotations

import copy
import sys
import threading

import pytest
import torch
from bounded_models import CONFIGS, text, tiny

from statewright.hf.bounded import BoundedCache

POLICIES = ("tova:budget=6", "window:budget=5:sinks=1")


def implementations(model) -> list:
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return [vars(c).get("_attn_implementation_internal") for c in configs.values()]


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_bounded_and_plain_side_by_side(name: str) -> None:
    model, ids = tiny(name), text(1, 12)
    jobs = [lambda: model(ids, use_cache=False).logits]
    jobs += [
        lambda policy=policy: model(ids, past_key_values=BoundedCache(model, policy)).logits
        for policy in POLICIES
    ]
    jobs[1]()
    wanted, before = [job() for job in jobs], implementations(model)
    assert not torch.equal(wanted[0], wanted[1])
    failed: list = []
    start = threading.Barrier(len(jobs))

    def repeat(job, want) -> None:
        start.wait()
        try:
            with torch.no_grad():
                failed.extend("differs" for _ in range(12) if not torch.equal(job(), want))
        except Exception as error:
            failed.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=repeat, args=pair) for pair in zip(jobs, wanted)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failed and implementations(model) == before


@torch.no_grad()
def test_an_interrupted_call_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = copy.deepcopy(tiny("llama")), text(1, 8)
    plain = model(ids, use_cache=False).logits
    bounded = model(ids, past_key_values=BoundedCache(model, POLICIES[0])).logits
    for error in (KeyboardInterrupt, RuntimeError):
        with monkeypatch.context() as patch:

            def stop(*args, error=error, **kwargs):
                raise error

            patch.setattr(model.model.layers[1].mlp, "forward", stop)
            with pytest.raises(error):
                model(ids, past_key_values=BoundedCache(model, POLICIES[0]))
        assert torch.equal(model(ids, use_cache=False).logits, plain)
        with monkeypatch.context() as patch:
            patch.setattr(model.model.layers[1].mlp, "forward", stop)
            with pytest.raises(error):
                model(ids, past_key_values=BoundedCache(model, POLICIES[0]))
        again = model(ids, past_key_values=BoundedCache(model, POLICIES[0])).logits
        assert torch.equal(again, bounded)


def test_without_use_cache_it_is_refused() -> None:
    model, ids = tiny("llama"), text(1, 8)
    with pytest.raises(ValueError, match="use_cache=False would feed all tokens again"):
        cache = BoundedCache(model, POLICIES[0])
        model.generate(ids, past_key_values=cache, use_cache=False, max_new_tokens=3)


def test_a_shorter_second_prompt_is_refused() -> None:
    model, cache = tiny("llama"), BoundedCache(tiny("llama"), POLICIES[0])
    model.generate(text(1, 8), past_key_values=cache, max_new_tokens=4, do_sample=False)
    with pytest.raises(ValueError, match=r"5 tokens in 1 rows.*has seen 11 in 1.*cache.reset"):
        model.generate(text(1, 5, seed=3), past_key_values=cache, max_new_tokens=2)


def test_the_config_is_saved_as_it_was(tmp_path) -> None:
    model = copy.deepcopy(tiny("llama"))
    before = model.config.to_dict()
    with torch.no_grad():
        model(text(1, 8), past_key_values=BoundedCache(model, POLICIES[0]))
    assert copy.deepcopy(model).config.to_dict() == model.config.to_dict() == before
