"""Train models with a known disease, diagnose them, and print truth against verdict.

    python examples/verdicts.py BOOK.txt [BOOK.txt ...] --output-dir runs/verdicts

Two small Mamba-2 models are trained per seed (a minute or two each on one core) and kept in the
output directory: a second call only diagnoses, an interrupted one goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from statewright.diagnosis import diagnose
from statewright.diagnosis.cases import cases, confusion
from statewright.diagnosis.controls import Control
from statewright.diagnosis.prompts import rows_of
from statewright.diagnosis.verdict import VERDICTS
from statewright.models.tokenizers import byte_tokenizer
from statewright.text_file import read_text
from statewright.train.data import corpus_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", nargs="+", help="the last tenth of them all is read, not learned")
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    documents = [read_text(path) for path in arguments.text]
    corpus, held_out = corpus_of(documents, byte_tokenizer()).split(0.1)
    tokens = torch.from_numpy(held_out.tokens.astype("int32"))
    ids = rows_of(tokens, arguments.length + 1, arguments.rows)
    pairs, found = [], []
    for seed in range(arguments.seeds):
        control = Control(num_steps=arguments.steps, seed=seed)
        for case in cases(control, corpus, ids, arguments.output_dir, report):
            diagnosis = diagnose(case.model, case.ids, control.train_length)
            verdict = diagnosis.verdict
            pairs.append((case.truth, verdict.name))
            found.append({"seed": seed, "truth": case.truth, **diagnosis.as_dict()})
            wrong = "" if verdict.name == case.truth else "   WRONG"
            print(
                f"seed {seed}: {case.truth:<28} -> {verdict.name:<28} "
                f"in {diagnosis.text.reading.in_window:.2f} nats, worst {verdict.worst:.2f}x, "
                f"safe {verdict.safe_length:,}, memory {verdict.memory}{wrong}",
                flush=True,
            )
    table(confusion(pairs))
    record = {"arguments": vars(arguments), "torch": torch.__version__, "cases": found}
    path = Path(arguments.output_dir) / "verdicts.json"
    path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def report(name: str, step: int, loss: float) -> None:
    if step % 50 == 0:
        print(f"  {name}: step {step}, {loss:.2f} nats", flush=True)


def table(counts: list[list[int]]) -> None:
    width = max(map(len, VERDICTS)) + 2
    print("truth \\ verdict".ljust(width) + "".join(name.rjust(width) for name in VERDICTS))
    for truth, row in zip(VERDICTS, counts):
        print(truth.ljust(width) + "".join(str(count).rjust(width) for count in row))


if __name__ == "__main__":
    main()
