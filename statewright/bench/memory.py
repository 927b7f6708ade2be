"""Peak memory, each measured in a process of its own (Linux)."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_READ = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stderr=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
_PREFILL = """
import ctypes, gc, sys, torch
from statewright.bench.matrix import pair
who, layers, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
ours, theirs = pair(layers)
model = ours if who == "ours" else theirs
del ours, theirs
ids = torch.randint(50000, (1, tokens))
def kilobytes(name):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(x.split()[1] for x in lines if x.startswith(name)))
with torch.no_grad():
    model(ids[:, :8], logits_to_keep=1)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
    before = kilobytes("VmRSS")
    model(ids, logits_to_keep=1, use_cache=True)
print(kilobytes("VmHWM") - before)
"""


def report(quick: bool) -> dict[str, Any]:
    """Bytes: reading texts of two sizes, and a Mamba-2 prefill over the model, ours and theirs."""
    sizes = (50_000, 200_000) if quick else (100_000, 3_000_000)
    layers, T = (2, 512) if quick else (24, 2048)
    return {
        "peak_of_reading": {str(size): peak for size, peak in reading(sizes).items()},
        "peak_of_prefill_over_model": {who: prefill(who, layers, T) for who in ("ours", "theirs")},
        "prefill": {"layers": layers, "tokens": T},
    }


def reading(sizes: tuple[int, ...]) -> dict[int, int]:
    """Peak resident bytes of `generate --max-new-tokens 0` over texts of these sizes."""
    sentence = "It was the best of times, it was the worst of times, and nobody wrote it down. "
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "model"
        _save_small_model(model)
        for size in sizes:
            text = Path(directory) / f"{size}.txt"
            text.write_text((sentence * (size // len(sentence) + 1))[:size])
            read = [sys.executable, "-m", "statewright", "generate", str(model)]
            read += ["--prompt-file", str(text), "--max-new-tokens", "0"]
            found[size] = _run(_READ, *read) * 1024
    return found


def prefill(who: str, layers: int, T: int) -> int:
    """What a prefill adds to the peak of a process that holds the model (Mamba-2, 130M shape).

    Both are built in either process, so what one leaves behind the other starts with as well.
    """
    return _run(_PREFILL, who, str(layers), str(T)) * 1024


def _save_small_model(path: Path) -> None:
    from statewright.models import StatewrightConfig, StatewrightForCausalLM
    from statewright.models.tokenizers import byte_tokenizer

    config = StatewrightConfig(vocab_size=257, hidden_size=128, num_hidden_layers=2)
    StatewrightForCausalLM(config).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)


def _run(code: str, *arguments: str) -> int:
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(json.loads(result.stdout.split()[-1]))
