"""Train our Mamba-2 and transformers' from the same weights on the same batches, and compare.

    python examples/same_training.py BOOK.txt --steps 200

Prints the two losses every 20 steps and the largest difference of their running means.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
import torch.nn.functional as F
from transformers import Mamba2Config, Mamba2ForCausalLM

from statewright.models import load
from statewright.models.tokenizers import byte_tokenizer
from statewright.text_file import read_text
from statewright.train.config import TrainConfig
from statewright.train.data import Lanes, corpus_of
from statewright.train.loop import make_optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--layers", type=int, default=2)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    theirs = Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=257,
            hidden_size=128,
            num_hidden_layers=arguments.layers,
            state_size=64,
            head_dim=32,
            num_heads=8,
            n_groups=1,
            chunk_size=64,
        )
    )
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        ours = load(directory)
    corpus = corpus_of([read_text(arguments.text)], byte_tokenizer())
    lanes = Lanes(corpus, num_lanes=8, length=256)
    config = TrainConfig(learning_rate=1e-3, num_steps=arguments.steps)
    pairs = [(model.train(), make_optimizer(model, config)) for model in (ours, theirs)]
    means, worst = [0.0, 0.0], 0.0
    for step in range(arguments.steps):
        batch = lanes.batch(step)
        for i, (model, optimizer) in enumerate(pairs):
            for group in optimizer.param_groups:
                group["lr"] = config.rate(step)
            # transformers' model cannot carry a state in training: both start each row from zero.
            logits = model(batch.ids).logits.flatten(0, 1)
            loss = F.cross_entropy(logits, batch.labels.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            means[i] = loss.item() if step == 0 else 0.9 * means[i] + 0.1 * loss.item()
        worst = max(worst, abs(means[0] - means[1]))
        if step % 20 == 19:
            print(f"step {step + 1}: ours {means[0]:.4f}, transformers {means[1]:.4f}")
    print(f"largest difference of the running means: {worst:.5f} nats")


if __name__ == "__main__":
    main()
