"""What each extra of pyproject is for, as commands that run where nothing else is installed."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

from environment import HOME, ROOT, Environment

_SIZES = "--hidden-size 16 --num-layers 1 --num-steps 2 --num-lanes 2 --length 32"
_COPY = "study selective-copy --length 8 --tokens 2 --num-steps 2 --num-eval 8 --system mingru/1"
_TRAINER = """
import torch
from transformers import Trainer, TrainingArguments
from statewright.models import StatewrightConfig, StatewrightForCausalLM
model = StatewrightForCausalLM(StatewrightConfig(hidden_size=16, num_hidden_layers=1))
rows = [{"input_ids": ids, "labels": ids} for ids in torch.arange(64).view(4, 16)]
options = dict(max_steps=2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True)
Trainer(model, TrainingArguments("trainer", **options), train_dataset=rows).train()
"""
_EVENTS = """
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from pathlib import Path
(file,) = Path("runs/track").rglob("events.out.tfevents*")
events = EventAccumulator(str(file.parent)).Reload()
assert events.Tags()["scalars"]
"""
# Ray itself would add its dashboard; the workers import our wheel.
_RAY = """
import ray, sys
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
from statewright.cli import main
sys.exit(main(sys.argv[1:]))
"""


def _cli(line: str) -> list[str]:
    return ["-m", "statewright", *line.split()]


VERBS: dict[str, list[list[str]]] = {
    "trainer": [["-c", _TRAINER]],
    "track": [
        _cli(f"train --text book.txt --output-dir runs/track {_SIZES} --tensorboard"),
        ["-c", _EVENTS],
    ],
    "plot": [_cli(f"{_COPY} --output plot.json --figure plot.png")],
    "sweep": [["-c", _RAY, *f"{_COPY} --output ray.json --seed 0 --seed 1 --parallel ray".split()]],
    "data": [_cli("data --dataset rows.csv --output-dir tokens")],
    "eval": [_cli("eval runs/base --task squality:data=dev.jsonl:length=200 -n 1")],
    "lm-eval": [
        _cli("lm-eval --model runs/base --tasks statewright_passkey --set length=256 --limit 2")
    ],
    "rl": [
        _cli("study rl collect hopper --root rl --steps 256 --max-steps 2048 --medium-score 0"),
        _cli(
            "study rl train --data rl/statewright/hopper/medium-v0 --output rl.json --seed 0"
            " --system mingru/1 --num-steps 2 --eval-every 2 --num-eval 4 --hidden-size 8"
        ),
        _cli("study rl evaluate rl.json --episodes 1 --rows 1"),
    ],
    "docs": [
        ["-m", "mkdocs", "build", "--strict", "-f", f"{ROOT}/mkdocs.yml", "-d", "{work}/site"]
    ],
    "smollm": [
        _cli("models get smollm2-135m"),
        [*_cli("generate smollm2-135m --max-new-tokens 8 --prompt"), "The capital of France is"],
    ],
    "dev": [["-m", "pytest", "-n", "0", f"{ROOT}/tests/test_spec.py"]],
}

# Commands that ask for an extra; without it they end with a line that names it.
WITHOUT: dict[str, list[str]] = {
    **{name: VERBS[name][0] for name in ("track", "plot", "data", "eval", "lm-eval", "rl")},
    "sweep": _cli(f"{_COPY} --output never.json --parallel ray"),
    "smollm": VERBS["smollm"][1],
}


def setup(environment: Environment, work: Path) -> None:
    """A text, a model and rows of data in `work`, made without any extra."""
    work.mkdir(parents=True)
    (work / "book.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    rows = "".join(f"document {i} says {i * i}\n" for i in range(20))
    (work / "rows.csv").write_text(f"text\n{rows}")
    reply = {"uid": "1", "response_text": "A fox jumps."}
    asked = {"question_text": "What happens?", "responses": [reply]}
    story = {"document": "A fox jumps over a dog. " * 40, "questions": [asked]}
    (work / "dev.jsonl").write_text(json.dumps(story) + "\n")
    environment.run(*_cli(f"train --text book.txt --output-dir runs/base {_SIZES}"), cwd=work)


def check_extra(name: str, wheel: str, torch: str, ready: Path, *bases: Environment) -> None:
    """Run what the extra is for over `bases`, the first of which has no extra, and it alone.

    Works in a copy of `ready`, which `setup` made. Raises CalledProcessError if a command fails,
    ValueError if a command that lacks the extra does not end with one line that names it.
    """
    work = HOME / "work"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(ready, work)
    told = {"HF_HUB_OFFLINE": "1", "STATEWRIGHT_HOME": str(work)}
    if name in WITHOUT:
        said = last_line(bases[0], WITHOUT[name], work, told)
        if not (said.startswith("statewright: ") and f"statewright[{name}]" in said):
            raise ValueError(f"where it is not installed: {said}")
    environment = Environment(f"extra-{name}", *bases)
    environment.install(f"{wheel}[{name}]", torch)
    for command in VERBS[name]:
        words = [word.replace("{work}", str(work)) for word in command]
        environment.run(*words, cwd=work, **told)
    shutil.rmtree(environment.home)
    shutil.rmtree(work)


def last_line(bare: Environment, command: list[str], work: Path, told: dict[str, str]) -> str:
    """What a command ends with on stderr, or its traceback's first line; it has to fail."""
    try:
        bare.run(*command, cwd=work, quiet=True, **told)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["no message"]
        return next((line for line in lines if line.startswith("Traceback")), lines[-1])
    return "no error"
