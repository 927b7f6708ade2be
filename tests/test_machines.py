"""What holds on this machine holds on others: other rounding, threads, alignment and kernels."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from bounded_models import tiny
from rounding import OtherRounding, misaligned
from test_laws import MATRIX, MIXERS, SCANNED, holds
from test_recurrent_policies import MIXERS as LINEAR

import statewright
from statewright import laws
from statewright.hf.bounded import BoundedCache
from statewright.hf.loading import align_weights, load_causal_lm
from statewright.mixers import build_mixer
from statewright.models import StatewrightConfig, StatewrightForCausalLM
from statewright.ops import native_library
from statewright.policies import POLICIES, build_policy
from statewright.policies.base import Eviction
from statewright.policies.measure import canonical, lists_of

OPS = Path(native_library.__file__).parent
COMPILER = shutil.which(os.environ.get("CC", "cc"))
KERNELS = {"native_v3": 'target("arch=x86-64-v3")', "native_baseline": "unused"}


@contextlib.contextmanager
def library(opened, reason: str | None) -> Iterator[None]:
    """Within the block the C kernels come from `opened`."""
    real = native_library.library
    replaced = functools.cache(lambda: (opened, reason))
    modules = [m for m in sys.modules.values() if getattr(m, "library", None) is real]
    for module in modules:
        module.library = replaced
    native_library.kernel.cache_clear()
    try:
        yield
    finally:
        for module in modules:
            module.library = real
        native_library.kernel.cache_clear()


@functools.cache
def built(clone: str):
    """The kernels for one kind of processor only, whatever this one would choose."""
    folder = Path(tempfile.mkdtemp())
    digest = native_library.source_digest(OPS / "csrc")
    flags = [
        *(OPS / "csrc/flags.txt").read_text().split(),
        "-std=c11",
        "-fopenmp",
        "-shared",
        "-O2",
    ]
    defines = [f"-Dtarget_clones(...)={clone}", f'-DSW_DIGEST="{digest}"', "-fPIC", "-shared"]
    source, target = str(OPS / "csrc/statewright.c"), str(folder / "kernels.so")
    subprocess.run([COMPILER, *flags, *defines, source, "-o", target], check=True)
    opened, reason = native_library.open_library(folder / "kernels.so", OPS / "csrc")
    assert reason is None
    shutil.rmtree(folder)
    return opened


@contextlib.contextmanager
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(before)


MACHINES: dict[str, Callable] = {
    "rounding": OtherRounding,
    "rounding_per_call": functools.partial(OtherRounding, per_call=True),
    "this": contextlib.nullcontext,
    "misaligned": contextlib.nullcontext,
    "two_threads": two_threads,
    "no_kernels": functools.partial(library, None, "as if never built"),
    **{name: lambda clone=clone: library(built(clone), None) for name, clone in KERNELS.items()},
}
# In a process whose BLAS takes another path, that is the machine to try.
NAMES = ["this"] if "MKL_CBWR" in os.environ else [n for n in MACHINES if n != "this"]
ROUNDING = [n for n in NAMES if not n.startswith(("no_", "native_", "two_", "mis"))]


@contextlib.contextmanager
def machine(name: str) -> Iterator[Callable]:
    """As that machine, within the block; gives what places a module's weights as it would."""
    if name in KERNELS and COMPILER is None:
        pytest.skip("no C compiler")
    with warnings.catch_warnings(), MACHINES[name]():
        warnings.simplefilter("ignore")
        yield misaligned if name == "misaligned" else align_weights


WITHIN = ("fold", "chunk", "gradient", "rows")
BITS = ("value", "roundtrip")
# What is tried where: everything under other rounding, elsewhere what the machine can break.
TRIED = {
    "this": {torch.float64: (*WITHIN, *BITS)},
    "rounding": {
        torch.float64: tuple(laws.LAWS),
        torch.float32: WITHIN,
        torch.bfloat16: ("fold", "chunk", "rows"),
    },
    "rounding_per_call": {torch.float32: ("fold", "chunk", "rows")},
    "misaligned": {torch.float32: ("fold", "rows", *BITS)},
    "two_threads": {torch.float64: ("chunk", "rows", *BITS)},
    "no_kernels": {torch.float32: WITHIN},
    **{name: {torch.float32: WITHIN} for name in KERNELS},
}


@pytest.mark.parametrize("text", MIXERS)
@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("no_kernels", *KERNELS)])
def test_mixers_obey(name: str, text: str) -> None:
    obeys(name, text)


@pytest.mark.skipif("MKL_CBWR" in os.environ, reason="the kernels do not call the BLAS")
@pytest.mark.parametrize("name", ["no_kernels", *KERNELS])
def test_kernels_of_other_processors(name: str) -> None:
    for text in (*SCANNED, *MATRIX):
        obeys(name, text)


def obeys(name: str, text: str) -> None:
    # Threads share a product only where it is large.
    size, length = (48, 90) if name == "two_threads" else (6, 33)
    for dtype, chosen in TRIED[name].items():
        case = laws.Case(flags=True, length=length, splits=(9, 20), dtype=dtype)
        torch.manual_seed(0)
        with machine(name) as place:
            subject = place(build_mixer(text, size).to(dtype))
            for law in chosen:
                holds(laws.LAWS[law](subject, case))


@pytest.mark.parametrize("policy", ["statenorm:limit=0.2:every=1", "statewindow:length=7"])
@pytest.mark.parametrize("text", LINEAR)
def test_mixers_obey_under_a_repair(text: str, policy: str) -> None:
    case = laws.Case(length=33, splits=(7, 20), flags=True)
    with machine("rounding"):
        subject = laws.Bounded(build_mixer(text, 6).double(), build_policy(policy))
        for law in ("fold", "gradient", "rows"):
            holds(laws.LAWS[law](subject, case))


EVICTIONS = {
    "window": "window:budget=6:sinks=1",
    "tova": "tova:budget=6:sinks=1",
    "h2o": "h2o:budget=7:recent=2:every=4",
    "keynorm": "keynorm:budget=5:every=5",
    "keydiff": "keydiff:budget=6:sinks=1",
    "lagkv": "lagkv:budget=10:sinks=2:lag=4",
    "random": "random:budget=6",
}


def test_every_eviction_is_tried() -> None:
    bounding = {n for n, kind in POLICIES.items() if issubclass(kind, Eviction)}
    assert bounding == set(EVICTIONS)


def few_words(count: int, length: int = 16) -> torch.Tensor:
    """Rows (3, T) of few distinct tokens: the same keys again and again."""
    generator = torch.Generator().manual_seed(count)
    return torch.randint(1, 1 + count, (3, length), generator=generator)


def kept(state) -> list[torch.Tensor]:
    return [layer.pos for layer in lists_of(canonical(state))]


def same_choice(got, want) -> bool:
    return all(torch.equal(a, b) for a, b in zip(kept(got), kept(want), strict=True))


@pytest.mark.parametrize("policy", EVICTIONS.values(), ids=EVICTIONS)
@pytest.mark.parametrize("positions", ["original", "renumbered"])
@pytest.mark.parametrize("name", ROUNDING)
@torch.no_grad()
def test_victims_of_few_words(name: str, positions: str, policy: str) -> None:
    """Prefill, steps, and a row alone or padded in a batch choose alike, in every layer."""
    torch.manual_seed(0)
    mixer = f"attention:num_heads=4:num_kv_heads=2:head_dim=8:positions={positions}"
    config = StatewrightConfig(vocab_size=9, hidden_size=24, num_hidden_layers=2, mixer=mixer)
    model = StatewrightForCausalLM(config).eval()
    for words, dtype in ((1, torch.float32), (3, torch.float64)):
        model, ids = model.to(dtype), few_words(words)
        lengths = (16, 13, 11)
        mask = torch.stack([torch.arange(16) >= 16 - n for n in lengths])
        with machine(name):
            state = None
            for token in ids.split(1, 1):
                state = model(token, state=state, policy=policy).state
            assert same_choice(model(ids, policy=policy).state, state)
            padded = model(ids * mask, attention_mask=mask.long(), policy=policy)
            for row, n in enumerate(lengths):
                alone = model(ids[row : row + 1, 16 - n :], policy=policy)
                assert same_choice(padded.state.rows(row), alone.state)
                close = laws.error(padded.logits[row : row + 1, 16 - n :], alone.logits)
                assert close < laws.TOLERANCES[dtype, "torch"]


@pytest.mark.parametrize("name", ROUNDING)
@pytest.mark.parametrize("policy", EVICTIONS.values(), ids=EVICTIONS)
@torch.no_grad()
def test_victims_in_a_model_of_transformers(name: str, policy: str) -> None:
    model, ids = tiny("llama"), few_words(2)
    mask = torch.stack([torch.arange(16) >= 16 - n for n in (16, 13, 9)])
    with machine(name):
        cache = BoundedCache(model, policy, positions="renumbered")
        model(ids * mask, attention_mask=mask.long(), past_key_values=cache)
        for row, n in enumerate((16, 13, 9)):
            alone = BoundedCache(model, policy, positions="renumbered")
            for token in ids[row : row + 1, 16 - n :].split(1, 1):
                model(token, past_key_values=alone)
            for together, state in zip(cache.states, alone.states, strict=True):
                own = canonical(together.rows(row))
                assert torch.equal(own.pos, canonical(state).pos)


LOADERS: dict[str, Callable] = {
    "from_pretrained": lambda path: StatewrightForCausalLM.from_pretrained(path),
    "statewright.load": lambda path: statewright.load(path),
    "load_causal_lm": lambda path: load_causal_lm(path, torch.float32),
    "AutoModel": lambda path: __import__("transformers").AutoModelForCausalLM.from_pretrained(path),
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
@torch.no_grad()
def test_a_reloaded_model_gives_the_same_bits(load: Callable, tmp_path) -> None:
    """Weights in a mapped file lie at 8 mod 16, where this machine rounds otherwise."""
    config = StatewrightConfig(
        vocab_size=11, hidden_size=24, num_hidden_layers=2, mixer=["mingru", "attention"]
    )
    model, ids = StatewrightForCausalLM(config).eval(), few_words(9)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path).eval()
    assert all(p.data_ptr() % 64 == 0 for p in loaded.parameters())
    with machine("rounding"):
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert not torch.equal(misaligned(loaded)(ids).logits, model(ids).logits)


# MKL reads its mode at its first product, so each is a child of a process that has only imported.
_IN_EACH_MODE = """
import os, sys
import pytest, bounded_models, test_laws, test_recurrent_policies

for mode in ("COMPATIBLE", "AVX2"):
    child = os.fork()
    if child == 0:
        os.environ["MKL_CBWR"] = mode
        os._exit(pytest.main(sys.argv[1:]))
    assert os.waitpid(child, 0)[1] == 0, mode
"""


@pytest.mark.skipif("MKL_CBWR" in os.environ, reason="this process is such a machine")
def test_other_code_paths_of_the_blas() -> None:
    """The tests above in MKL's other modes."""
    options = ["-q", "-n0", "-p", "no:cacheprovider", "-k", "not repair and not words"]
    here = Path(__file__).parent
    path = os.pathsep.join(filter(None, [str(here), os.environ.get("PYTHONPATH")]))
    ran = subprocess.run(
        [sys.executable, "-c", _IN_EACH_MODE, *options, __file__],
        env=os.environ | {"PYTHONPATH": path},
        cwd=here.parent,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0 and ran.stdout.count("[100%]") == 2, ran.stdout[-3000:]
