"""Expand the state of a trained model, and ask what that bought (StateX, 2026.findings-acl.1073).

Small GLA and Mamba-2 learn recall (MQAR), in-context classification and a book at once. Then each
goes on for the same tokens as it is (`lpt`, the control) and with a state four times as large, in
one layer or in all: `fresh` (the paper's re-initialisation) and `zero` (preserves the function).
`large` has the large state of `fresh-all` from the start and gets all the tokens. Every finished
part is in the JSON file: run the same command again to go on.

    python examples/statex.py --text book.txt --json statex.json --markdown statex.md
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from statewright.models import StatewrightConfig, StatewrightForCausalLM, load
from statewright.models.resize import plan_resize, resize
from statewright.tasks import MQAR, InContext
from statewright.tasks.base import IGNORED, Sample

FAMILIES = {
    "mamba2": dict(mixer="mamba2:state_size=8:head_dim=32", conv_kernel=0, mlp_ratio=0.0),
    "gla": dict(mixer="gla:num_heads=4:expand_k=0.25", conv_kernel=4, mlp_ratio=1.0),
}
PAIRS, SHOTS = (2, 4, 8, 15), (4, 8, 16)
IDS = {"vocab": 32, "first": 128}
# As the paper, from layer 0 on with a stride (of two layers, one), and everywhere.
EXPANSIONS = {
    "fresh": ("fresh", "every:2"),
    "zero": ("zero", "every:2"),
    "fresh-all": ("fresh", "all"),
    "zero-all": ("zero", "all"),
}
ARMS = ("base", "lpt", *EXPANSIONS, "large")


@dataclass(frozen=True)
class Setting:
    """All a result depends on but the text; rows of `length` tokens of recall, labels and book."""

    width: int = 64
    layers: int = 2
    length: int = 64
    rows: tuple[int, int, int] = (8, 3, 3)
    pretrain: int = 2000
    posttrain: int = 700
    rate: float = 1e-2
    post_rate: float = 3e-3
    factor: int = 4
    tested: int = 64


def batch(setting: Setting, text: Tensor, seed: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids, targets, resets (rows, length): packed samples of recall and labels, then the book.

    Recall of each number of pairs fills as many rows, and so as many tokens; numbers above 4 join
    one by one in the first half of the pretraining, without which nothing is learned for long.
    """
    rows, turn = [], seed * 1_000_003 + step
    (recall, labels, book), T = setting.rows, setting.length
    joined = PAIRS[: 2 + int((len(PAIRS) - 2) * min(1, 2 * step / setting.pretrain))]
    for i in range(recall):
        pairs = joined[i % len(joined)]
        task = MQAR(pairs=pairs, length=4 * pairs, power=1.0, **IDS)
        rows.append(pack(task.draw(T // (4 * pairs), turn * 100 + i).samples, T))
    for i in range(labels):
        shots = SHOTS[i % len(SHOTS)]
        task = InContext(shots=shots, classes=4, features=1, queries=shots // 2, **IDS)
        rows.append(pack(task.draw(T // (3 * shots), turn * 100 + 50 + i).samples, T))
    generator = torch.Generator().manual_seed(turn)
    for start in torch.randint(len(text) - T, (book,), generator=generator).tolist():
        reset = torch.zeros(T, dtype=torch.bool)
        rows.append((text[start : start + T], text[start + 1 : start + T + 1], reset))
    return tuple(torch.stack(parts) for parts in zip(*rows))


def pack(samples: tuple[Sample, ...], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Samples one after the other, each behind a reset, the rest ignored."""
    ids, targets = torch.full((length,), IDS["first"]), torch.full((length,), IGNORED)
    reset, at = torch.zeros(length, dtype=torch.bool), 0
    for sample in samples:
        end = at + len(sample.input_ids)
        ids[at:end], targets[at:end], reset[at] = sample.input_ids, sample.targets, True
        at = end
    return ids, targets, reset


def train(
    model: StatewrightForCausalLM,
    setting: Setting,
    text: Tensor,
    seed: int,
    steps: range,
    rate: float,
) -> float:
    """Steps with warm-up, cosine to zero, decay on matrices only; returns the seconds."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
    warm, began = max(1, len(steps) // 20), time.perf_counter()
    model.train()
    for n, step in enumerate(steps):
        progress = max(0.0, (n - warm) / max(1, len(steps) - warm))
        for group in optimizer.param_groups:
            group["lr"] = rate * min((n + 1) / warm, (1 + math.cos(math.pi * progress)) / 2)
        ids, targets, reset = batch(setting, text, seed, step)
        logits = model(ids, reset=reset).logits
        losses = F.cross_entropy(logits.mT, targets, ignore_index=IGNORED, reduction="none")
        scored = targets != IGNORED
        parts = zip(losses.split(setting.rows), scored.split(setting.rows))
        sum(found.sum() / known.sum() for found, known in parts).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()
    return time.perf_counter() - began


@torch.no_grad()
def measure(model: StatewrightForCausalLM, setting: Setting, held_out: Tensor) -> dict[str, float]:
    """Accuracy at every number of pairs and shots, and nats per byte of unseen text."""
    found, n = {}, setting.tested
    for pairs in PAIRS:
        task = MQAR(pairs=pairs, length=4 * pairs, power=1.0, **IDS)
        found[f"mqar {pairs}"] = accuracy(model, task.draw(n, 10**9).samples)
    for shots in SHOTS:
        task = InContext(shots=shots, classes=4, features=1, queries=4, **IDS)
        found[f"shots {shots}"] = accuracy(model, task.draw(4 * n, 10**9).samples)
    ids = held_out[: 16 * 1024].view(16, 1024)
    found["book"] = float(model(ids, labels=ids).loss)
    return found


def accuracy(model: StatewrightForCausalLM, samples: tuple[Sample, ...]) -> float:
    ids = torch.stack([sample.input_ids for sample in samples])
    targets = torch.stack([sample.targets for sample in samples])
    right = model(ids).logits.argmax(-1) == targets
    return float(right[targets != IGNORED].double().mean())


def build(setting: Setting, options: dict, seed: int) -> StatewrightForCausalLM:
    config = StatewrightConfig(
        vocab_size=257, hidden_size=setting.width, num_hidden_layers=setting.layers,
        **options,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return StatewrightForCausalLM(config)


def run(family: str, arm: str, seed: int, setting: Setting, text: Tensor, models: Path) -> dict:
    """One arm: its accuracies, the seconds it took, its state and parameters."""
    before, after = range(setting.pretrain), setting.pretrain + setting.posttrain
    options, path = FAMILIES[family], models / f"{family}-{seed}"
    book, held_out = text[: -(1 << 16)], text[-(1 << 16) :]
    steps, rate = range(setting.pretrain, after), setting.post_rate
    if arm == "base":
        model, steps, rate = build(setting, options, seed), before, setting.rate
    elif arm == "large":
        base = build(setting, options, seed).config
        grown = plan_resize(base, setting.factor, "all", "fresh").after.mixer
        model, rate = build(setting, {**options, "mixer": grown}, seed), setting.rate
        steps = range(after)
    else:
        model = load(path)
        if arm in EXPANSIONS:
            init, layers = EXPANSIONS[arm]
            model = resize(model, setting.factor, layers, init, seed)
    found = {"start": measure(model, setting, held_out)} if arm in EXPANSIONS else {}
    seconds = train(model, setting, book, seed, steps, rate)
    if arm == "base":
        model.save_pretrained(path)
    return found | {
        "family": family,
        "arm": arm,
        "seed": seed,
        "scores": measure(model, setting, held_out),
        "seconds": round(seconds, 1),
        "tokens": len(steps) * sum(setting.rows) * setting.length,
        "state_bytes": model.init_state(1).nbytes,
        "parameters": model.num_parameters(),
    }


def table(results: list[dict], setting: Setting) -> str:
    """One row per family and arm, mean and standard deviation over seeds, in percent and nats."""
    names = [f"mqar {p}" for p in PAIRS] + [f"shots {s}" for s in SHOTS] + ["book"]
    head = [n.replace("mqar", "pairs") for n in names[:-1]] + ["book, nats/byte"]
    chance = [1 / p for p in PAIRS] + [0.25] * len(SHOTS)
    lines = [
        f"| model | arm | state, bytes | parameters | {' | '.join(head)} | s |",
        f"|---|---|---|---|{'---|' * len(names)}---|",
        f"| chance | | | | {' | '.join(f'{100 * c:.0f}' for c in chance)} | | |",
    ]
    for family in FAMILIES:
        for arm in ARMS:
            runs = [r for r in results if (r["family"], r["arm"]) == (family, arm)]
            if not runs:
                continue
            scale = [100] * (len(names) - 1) + [1]
            cells = [spread([r["scores"][n] * k for r in runs], k) for n, k in zip(names, scale)]
            seconds = statistics.mean(r["seconds"] for r in runs)
            sizes = f"{runs[0]['state_bytes']:,} | {runs[0]['parameters']:,}"
            row = " | ".join(cells)
            lines.append(f"| {family} | {arm} | {sizes} | {row} | {seconds:.0f} |")
    tokens = sum(setting.rows) * setting.length
    lines += [
        "",
        f"Accuracy in %, mean ± standard deviation of {len({r['seed'] for r in results})} seeds; "
        f"base: {setting.pretrain * tokens:,} tokens, the next five arms "
        f"{setting.posttrain * tokens:,} more, large: all of them from the start. s: seconds of "
        "training, of that arm alone, on one thread of a shared machine.",
    ]
    return "\n".join(lines) + "\n"


def spread(values: list[float], scale: int) -> str:
    digits = 0 if scale == 100 else 3
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True, help="a book, plain text")
    parser.add_argument("--json", default="statex.json", help="results, read again to go on")
    parser.add_argument("--markdown", help="write the table there as well")
    parser.add_argument("--models", help="where pretrained models are kept [default: beside json]")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a smoke test: minutes become seconds")
    given = parser.parse_args()
    torch.set_num_threads(1)
    setting = Setting(pretrain=4, posttrain=2, tested=4) if given.quick else Setting()
    raw = Path(given.text).read_text(encoding="utf-8").encode("ascii", "ignore")
    text, path = torch.tensor(list(raw)), Path(given.json)
    models = Path(given.models) if given.models else path.with_suffix(".models")
    saved = json.loads(path.read_text()) if path.exists() else {"results": []}
    if saved["results"] and saved["setting"] != json.loads(json.dumps(asdict(setting))):
        raise SystemExit(f"{path} holds another setting; choose another --json")
    results = saved["results"]
    done = {(r["family"], r["arm"], r["seed"]) for r in results}
    for seed in range(given.seeds):
        for family in FAMILIES:
            for arm in ARMS:
                if (family, arm, seed) in done:
                    continue
                results.append(run(family, arm, seed, setting, text, models))
                beside = path.with_name(f".{path.name}.writing")
                beside.write_text(json.dumps({"setting": asdict(setting), "results": results}))
                beside.replace(path)
                print(json.dumps(results[-1]), flush=True)
    print(table(results, setting))
    if given.markdown:
        Path(given.markdown).write_text(table(results, setting))


if __name__ == "__main__":
    main()
