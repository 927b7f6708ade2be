"""Make the models that come with the package: `demo:collapsed`, `demo:transformer`, `demo:recall`.

    python examples/demo_models.py BOOKS --output statewright/demos

BOOKS holds david_copperfield.txt, great_expectations.txt, middlemarch.txt and war_and_peace.txt
(Project Gutenberg, header and footer removed). One thread, about half an hour; `--only NAME` makes
one. The demos' text, the beginning of Moby-Dick, is read by none of them. Weights are written in
bfloat16, with about.json beside them: the command, the seed, the data and both digests.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from statewright.cli.quickstart.recall import PAIRS, tasks
from statewright.diagnosis.controls import Control, train_control
from statewright.models import StatewrightConfig, StatewrightForCausalLM
from statewright.models.tokenizers import byte_tokenizer
from statewright.tasks import MQAR
from statewright.tasks.base import IGNORED
from statewright.train.data import Corpus

BOOKS = ("david_copperfield", "great_expectations", "middlemarch", "war_and_peace")
SEED = 0
# Bytes of a text of the Transformer's, and tokens of a row of pairs.
CONTEXT, ROW = 512, 128


def collapsed(text: np.ndarray) -> nn.Module:
    """A Mamba-2 of 269 thousand parameters that starts out keeping everything, on 64 bytes."""
    control = Control(num_steps=2000, hidden_size=128, seed=SEED)
    corpus = Corpus(text.astype(np.int32), np.array([0]), len(text))
    model = train_control(control, corpus, said("collapsed", control.num_steps))
    model.config.control = repr(control)
    return model


def transformer(text: np.ndarray) -> nn.Module:
    """A Llama of 2 x 128 on texts of 512 bytes, 2,500 steps of 8."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=256,
    )
    ids = torch.from_numpy(text.astype(np.int64))

    def batch(step: int) -> tuple[Tensor, Tensor, None]:
        generator = torch.Generator().manual_seed(step)
        starts = torch.randint(len(ids) - CONTEXT, (8,), generator=generator).tolist()
        rows = torch.stack([ids[s : s + CONTEXT + 1] for s in starts])
        return rows[:, :-1], rows[:, 1:], None

    def rate(step: int) -> float:
        falling = 0.02 + 0.49 * (1 + math.cos(math.pi * step / 2500))
        return 3e-3 * min(1.0, (step + 1) / 100) * falling

    model = LlamaForCausalLM(config)
    return fit(model, batch, rate, 2500, 0.05, said("transformer", 2500))


def recall(text: np.ndarray) -> nn.Module:
    """A GLA of 2 layers with 2 heads of 4 keys, on up to 30 pairs and their look-ups; no text."""
    torch.manual_seed(SEED)
    config = StatewrightConfig(
        vocab_size=257,
        hidden_size=64,
        num_hidden_layers=2,
        mixer="gla:num_heads=2:expand_k=0.125",
        conv_kernel=4,
        mlp_ratio=1.0,
    )
    steps = 1200
    easy = [MQAR(pairs=p, length=4 * p, power=1.0, vocab=64, first=128) for p in (2, 4)]
    every = [*easy, *tasks()]

    def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
        # The harder ones join one by one in the first half, without which nothing is learned.
        joined = every[: 2 + int(len(PAIRS) * min(1, 2 * step / steps))]
        rows = [packed(joined[i % len(joined)], step * 100 + i) for i in range(8)]
        return tuple(torch.stack(parts) for parts in zip(*rows))  # type: ignore[return-value]

    def rate(step: int) -> float:
        warm = steps // 20
        falling = (1 + math.cos(math.pi * max(0, (step - warm) / (steps - warm)))) / 2
        return 1e-2 * min((step + 1) / warm, falling)

    model = StatewrightForCausalLM(config)
    return fit(model, batch, rate, steps, 0.1, said("recall", steps))


def packed(task: MQAR, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """As many samples as fit into a row, each behind a reset; the rest is ignored."""
    ids, targets = torch.full((ROW,), task.first), torch.full((ROW,), IGNORED)
    reset = torch.zeros(ROW, dtype=torch.bool)
    for i, sample in enumerate(task.draw(ROW // task.length, seed).samples):
        here = slice(i * task.length, (i + 1) * task.length)
        ids[here], targets[here], reset[here.start] = sample.input_ids, sample.targets, True
    return ids, targets, reset


def fit(
    model: Any,
    batch: Callable[[int], tuple[Tensor, Tensor, Tensor | None]],
    rate: Callable[[int], float],
    steps: int,
    weight_decay: float,
    listen: Callable[[int, float], None],
) -> nn.Module:
    """AdamW, gradients clipped at 1; every step's data are a function of its number."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=weight_decay)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        ids, targets, reset = batch(step)
        options = {} if reset is None else {"reset": reset}
        logits = model(input_ids=ids, **options).logits.flatten(0, 1)
        loss = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        listen(step + 1, loss.item())
    return model.eval()


def said(name: str, steps: int) -> Callable[[int, float], None]:
    def listen(step: int, loss: float) -> None:
        if step % 100 == 0 or step == steps:
            print(f"{name} {step}/{steps} {loss:.3f}", flush=True)

    return listen


def pack(model: Any, directory: Path, about: dict[str, Any]) -> None:
    """Weights in bfloat16, config, tokenizer and how it was made."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        config = json.loads((Path(scratch) / "config.json").read_text())
        weights = load_file(Path(scratch) / "model.safetensors")
    config.pop("auto_map", None)
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in weights.items()}
    file = directory / "model.safetensors"
    save_file(weights, file, {"format": "pt"})
    about = about | {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    for name, found in (("config", config | {"dtype": "bfloat16"}), ("about", about)):
        text = json.dumps(found, indent=2, sort_keys=True) + "\n"
        (directory / f"{name}.json").write_text(text)
    byte_tokenizer().save_pretrained(directory)
    print(directory, f"{file.stat().st_size:,} bytes")


MAKERS = {"collapsed": collapsed, "transformer": transformer, "recall": recall}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("books", type=Path, help="a directory with the four novels")
    parser.add_argument("--output", type=Path, default=Path("statewright/demos"))
    parser.add_argument("--only", choices=MAKERS, help="one of them")
    given = parser.parse_args()
    torch.set_num_threads(1)
    raw = b"".join((given.books / f"{name}.txt").read_bytes() for name in BOOKS)
    text = np.frombuffer(raw, np.uint8)
    for name in [given.only] if given.only else MAKERS:
        about = {"command": f"python examples/demo_models.py BOOKS --only {name}", "seed": SEED}
        if name == "recall":
            about["data"] = "pairs and their look-ups, drawn from the step (MQAR)"
        else:
            about["data"] = f"{', '.join(BOOKS)} (Project Gutenberg)"
            about["data_sha256"] = hashlib.sha256(raw).hexdigest()
        about["torch"] = torch.__version__
        pack(MAKERS[name](text), given.output / name, about)


if __name__ == "__main__":
    main()
