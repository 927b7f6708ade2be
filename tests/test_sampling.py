"""Settings of generation: refused at once outside of their ranges, taken at their ends."""

from __future__ import annotations

import math

import numpy as np
import pytest
from test_session import MODELS, fed, text

WRONG = {
    "temperature": [math.nan, math.inf, -0.1, "hot", True],
    "top_k": [-1, 2.5, True],
    "top_p": [0, -0.5, 1.5, math.nan, "most"],
    "seed": [-1, 2**63, 0.5],
    "max_new_tokens": [-3, 1.5, None],
}


@pytest.mark.parametrize("name, value", [(n, v) for n, values in WRONG.items() for v in values])
def test_settings_out_of_range_are_refused_at_once(name: str, value: object) -> None:
    session = fed(MODELS["mingru"], text(3), [])
    options = {"max_new_tokens": 2, name: value}
    for write in (session.generate, session.stream):  # also of the iterator nobody has begun
        with pytest.raises(ValueError, match=f"generate: {name}=.*expected"):
            write(**options)
    assert session.seen == 3


def test_settings_at_their_ends() -> None:
    session = fed(MODELS["mingru"], text(3), [])
    assert session.generate(0).shape == (1, 0)
    ends = dict(temperature=1e-3, top_k=0, top_p=1.0, seed=2**63 - 1)
    assert session.fork().generate(np.int64(2), **ends).shape == (1, 2)
    assert session.fork().generate(1, top_p=1e-9, temperature=np.float64(0.5)).shape == (1, 1)
