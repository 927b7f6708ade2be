"""The studies of the minimal-RNN paper: reproducible, resumable, one file of results each."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from statewright.cli import main
from statewright.studies import (
    algorithmic,
    char_lm,
    chomsky,
    figures,
    listops,
    selective_copy,
    train_cost,
)
from statewright.studies.cells import Cell, run_cells
from statewright.studies.experiment import (
    Place,
    System,
    about,
    check_resumable,
    over_seeds,
    over_seeds_shown,
    read_study,
)
from statewright.studies.fit import (
    HELD_OUT,
    Fit,
    accuracy,
    make_optimizer,
    stacked,
    training_seed,
)
from statewright.studies.settings import (
    CharLMSettings,
    ChomskySettings,
    ListOpsSettings,
    SelectiveCopySettings,
    TrainCostSettings,
)

CPU = torch.device("cpu")
TINY = dict(hidden_size=8, num_steps=6, batch_size=4, eval_every=2, num_eval=8)
COPY = SelectiveCopySettings(length=8, tokens=2, dropout=0.1, **TINY)
TEXT = "To be, or not to be, that is the question:\n" * 40


def copies(tmp_path, systems=("mingru/1",), seeds=(0,), settings=COPY) -> dict[str, dict]:
    cells = selective_copy.cells(settings, systems, seeds, Place(tmp_path, CPU, lambda point: None))
    return {cell.key: cell.run() for cell in cells}


def test_a_seed_is_reproduced(tmp_path) -> None:
    torch.manual_seed(1)
    first = copies(tmp_path, seeds=(0, 1))
    torch.manual_seed(2)
    again = copies(tmp_path, seeds=(0, 1))
    assert first == again
    assert first["mingru/1/seed0"]["curve"] != first["mingru/1/seed1"]["curve"]
    assert [point["step"] for point in first["mingru/1/seed0"]["curve"]] == [2, 4, 6]


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path) -> None:
    settings = SelectiveCopySettings(length=8, tokens=2, dropout=0.1, save_every=3, **TINY)
    whole = copies(tmp_path / "a", settings=settings)
    points = []

    def stop(point: dict) -> None:
        points.append(point)
        if point["step"] == 4:
            raise KeyboardInterrupt

    (cell,) = selective_copy.cells(settings, ["mingru/1"], [0], Place(tmp_path / "b", CPU, stop))
    with pytest.raises(KeyboardInterrupt):
        cell.run()
    assert list((tmp_path / "b").rglob("*.safetensors"))
    place = Place(tmp_path / "b", CPU, points.append)
    (cell,) = selective_copy.cells(settings, ["mingru/1"], [0], place)
    assert cell.run() == whole["mingru/1/seed0"]
    assert [p["step"] for p in points] == [2, 4, 4, 6], "steps 1 to 3 are not done twice"
    assert not list((tmp_path / "b").rglob("*.safetensors"))
    work = tmp_path / "b" / "mingru/1/seed0.safetensors"
    work.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not where this run stood"):
        cell.run()


def test_every_system_of_every_study_learns_a_step(tmp_path) -> None:
    names = [f"{name}/1" for name in selective_copy.systems(COPY)]
    assert all(math.isfinite(r["train_loss"]) for r in copies(tmp_path, names).values())
    assert {s.split("/")[0] for s in selective_copy.DEFAULT} < set(selective_copy.systems(COPY))


def test_accuracy_counts_tokens_and_sequences(tmp_path) -> None:
    """A model that always says 1 is right where the answer is 1."""
    task = selective_copy.SelectiveCopy(8, 2, vocab=4)
    model = System("mingru", 1).build(
        selective_copy.systems(COPY), 0, CPU, vocab_size=16, hidden_size=8, conv_kernel=0
    )

    class One(torch.nn.Module):
        def forward(self, hidden):
            return torch.eye(16)[1].expand(*hidden.shape[:-1], 16)

    model.lm_head = One()
    answers = []
    for i in range(4):
        answers += [s.targets[8:].tolist() for s in task.draw(64, HELD_OUT + i).samples]
    found = accuracy(model, [task], 256, 64)
    flat = [a for answer in answers for a in answer]
    assert found["accuracy"] == pytest.approx(sum(a == 1 for a in flat) / 512)
    assert found["exact"] == pytest.approx(sum(a == [1, 1] for a in answers) / 256)
    assert 0 < found["exact"] < found["accuracy"] < 0.6


def test_a_run_ends_early(tmp_path) -> None:
    easy = SelectiveCopySettings(length=8, tokens=2, stop_at=0.0, **TINY)
    assert copies(tmp_path, settings=easy)["mingru/1/seed0"]["steps"] == 2
    fit = Fit(None, CharLMSettings(patience=2), 0, None, None, tmp_path)
    losses = [3.0, 2.0, 2.5, 2.0]
    over = [fit._is_over([{"loss": v} for v in losses[: n + 1]]) for n in range(4)]
    assert over == [False, False, False, True]


def test_training_data_are_never_held_out_data() -> None:
    assert training_seed(10**6, 2**32 - 1) < HELD_OUT
    assert training_seed(0, 2**32 - 1) < training_seed(1, 0)


def test_weight_decay_spares_what_the_authors_spare() -> None:
    model = System("mingru", 1).build(
        selective_copy.systems(COPY), 0, CPU, vocab_size=16, hidden_size=8, conv_kernel=0
    )
    decayed, plain = (group["params"] for group in make_optimizer(model, COPY).param_groups)
    mixer = model.model.layers[0].mixer
    assert any(p is mixer.out_proj.weight for p in decayed)
    for spared in (mixer.in_proj.weight, mixer.init_param, model.model.embeddings.weight):
        assert any(p is spared for p in plain)


def test_selective_copying_is_learned() -> None:
    """Two layers of minGRU at a tiny size: far above chance, within seconds."""
    settings = SelectiveCopySettings(
        length=6, tokens=1, num_steps=150, hidden_size=32, expansion=1.0, learning_rate=1e-2
    )
    model = System("mingru", 1).build(
        selective_copy.systems(settings), 0, CPU, vocab_size=16, hidden_size=32, conv_kernel=0,
        mlp_ratio=0.0,
    )  # fmt: skip
    task = selective_copy.SelectiveCopy(6, 1)
    result = Fit(
        model,
        settings,
        0,
        lambda step: stacked(task.draw(32, training_seed(0, step))),
        lambda m: accuracy(m, [task], 256, 64),
        Path("never-written"),
    ).train()
    assert result["accuracy"] > 0.9


def test_paper_settings_are_the_papers() -> None:
    copy, language = SelectiveCopySettings.paper(), CharLMSettings.paper()
    assert (copy.length, copy.tokens, copy.expansion, copy.num_steps) == (4096, 16, 6.0, 400_000)
    assert (copy.hidden_size, copy.learning_rate, copy.dropout) == (64, 3e-4, 0.1)
    assert (language.hidden_size, language.expansion, language.clip) == (384, 2.0, 0.25)
    assert (language.num_steps, language.batch_size, language.eval_every) == (5000, 64, 25)
    assert ChomskySettings.paper().num_steps == 500_000
    assert ListOpsSettings.paper().num_steps == 250_000
    assert TrainCostSettings().lengths == [64, 128, 256, 512, 1024, 2048, 4096]


def test_characters_are_nanogpts_split(tmp_path) -> None:
    path = tmp_path / "book.txt"
    path.write_text(TEXT)
    data = char_lm.Characters.of(path, 16)
    assert data.vocab == len(set(TEXT))
    letters = sorted(set(TEXT))
    joined = "".join(letters[i] for i in torch.cat([data.train, data.held_out]))
    assert joined == TEXT and len(data.train) == int(len(TEXT) * 0.9)
    ids, targets = data.batch(5, 3, 16)
    assert torch.equal(ids[:, 1:], targets[:, :-1])
    assert torch.equal(ids, data.batch(5, 3, 16)[0])
    ids, targets = data.windows(10**6, 16)
    assert torch.equal(ids.flatten()[1:], targets.flatten()[:-1])
    assert len(ids) == (len(data.held_out) - 1) // 16
    with pytest.raises(ValueError, match="too few for a held-out window of 400"):
        char_lm.Characters.of(path, 400)


def test_algorithmic_cells(tmp_path) -> None:
    settings = ChomskySettings(**{**TINY, "num_eval": 16, "num_steps": 2})
    place = Place(tmp_path, CPU, lambda point: None)
    (cell,) = chomsky.cells(settings, ["lstm/1"], [0], place, ["majority"])
    result = cell.run()
    assert cell.key == "majority/lstm/1/seed0" and result["chance"] == 1 / 64
    assert [(b["low"], b["high"]) for b in result["bands"]][0::3] == [(41, 64), (193, 256)]
    settings = ListOpsSettings(**{**TINY, "num_eval": 16, "num_steps": 2})
    (cell,) = listops.cells(settings, ["mingru/1"], [0], place)
    assert cell.key == "listops/mingru/1/seed0" and cell.run() == cell.run()


def finished(tmp_path) -> dict[str, str]:
    """Small results of every study, made by the command line."""
    (tmp_path / "book.txt").write_text(TEXT)
    tiny = ["--num-steps", "2", "--eval-every", "1", "--num-eval", "8", "--hidden-size", "8"]
    words = {
        "selective-copy": [*tiny, "--length", "8", "--tokens", "2", "--seed", "0", "--seed", "1"],
        "char-lm": [*tiny, "--text", str(tmp_path / "book.txt"), "--context", "16"],
        "chomsky": [*tiny, "--task", "even-pairs", "--task", "majority"],
        "listops": tiny,
    }
    system = {"listops": "mingru/1", "chomsky": "mingru/1"}
    paths = {}
    for name, options in words.items():
        paths[name] = str(tmp_path / f"{name}.json")
        chosen = ["--system", system.get(name, "minlstm/1")]
        assert main(["study", name, "--output", paths[name], *chosen, *options]) == 0
    return paths


def test_the_command_line_runs_resumes_and_draws(tmp_path, capsys) -> None:
    paths = finished(tmp_path)
    found = read_study(paths["selective-copy"], "selective-copy")
    assert list(found["cells"]) == ["minlstm/1/seed0", "minlstm/1/seed1"]
    assert found["about"]["settings"]["length"] == 8 and found["about"]["versions"]["torch"]
    assert not list(tmp_path.glob(".*")), "nothing is left of the runs"
    before = json.loads((tmp_path / "listops.json").read_text())
    again = ["study", "listops", "--output", paths["listops"], "--num-steps", "2"]
    again += ["--eval-every", "1", "--num-eval", "8", "--hidden-size", "8", "--system"]
    assert main([*again, "mingru/1"]) == 0
    assert main([*again, "gru/1"]) == 0
    after = json.loads((tmp_path / "listops.json").read_text())
    assert list(after["cells"]) == ["listops/mingru/1/seed0", "listops/gru/1/seed0"]
    assert after["cells"]["listops/mingru/1/seed0"] == before["cells"]["listops/mingru/1/seed0"]
    capsys.readouterr()
    refused = ["study", "listops", "--output", paths["listops"]]
    assert main(refused) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--num-steps=2 (now 2000)" in error
    pytest.importorskip("matplotlib")
    _write_train_cost(tmp_path / "train-cost.json")
    for name in [*paths, "train-cost"]:
        source = tmp_path / f"{name}.json"
        figures.draw(source, tmp_path / "a.png")
        assert (tmp_path / "a.png").stat().st_size > 4000
        copy = tmp_path / "elsewhere" / "copy.json"
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(source.read_bytes())
        assert main(["study", "figure", str(copy), str(tmp_path / "b.png")]) == 0
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def _write_train_cost(path) -> None:
    times = {name: {"best": 0.1 * i + 0.1} for i, name in enumerate(train_cost.CURVES)}
    cells = [
        *(Cell(f"time/{n}", lambda: {"times": times}) for n in (64, 128)),
        Cell("memory/mingru", lambda: {"peaks": {"64": 2**20, "128": 2**21}}),
    ]
    list(run_cells(cells, path, about("train-cost", TrainCostSettings(), "", CPU)))


def test_figures_say_what_they_miss(tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"ends in \.png"):
        figures.check_drawable("figure.jpg")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r'pip install "statewright\[plot\]"'):
        figures.draw(tmp_path / "none.json", tmp_path / "a.png")


def test_settings_of_a_file_are_kept(tmp_path) -> None:
    path = tmp_path / "a.json"
    check_resumable(path, "chomsky", ChomskySettings())
    list(run_cells([Cell("a", dict)], path, about("chomsky", ChomskySettings(), "", CPU)))
    check_resumable(path, "chomsky", ChomskySettings())
    with pytest.raises(ValueError, match="holds the study 'chomsky', not 'listops'"):
        check_resumable(path, "listops", ListOpsSettings())
    with pytest.raises(ValueError, match=r"other settings: learning_rate=0.003 \(now 0.1\)"):
        check_resumable(path, "chomsky", ChomskySettings(learning_rate=0.1))
    written = json.loads(path.read_text())
    del written["about"]["settings"]["dtype"]  # as before there was such an option
    path.write_text(json.dumps(written))
    check_resumable(path, "chomsky", ChomskySettings())
    with pytest.raises(ValueError, match=r"dtype=float32 \(now bfloat16\)"):
        check_resumable(path, "chomsky", ChomskySettings(dtype="bfloat16"))


def test_bfloat16_is_of_the_products_alone(tmp_path, monkeypatch) -> None:
    curves, casts, measure = [], [], algorithmic.measure

    def watched(*arguments, **options):
        casts.append(torch.is_autocast_enabled("cpu"))
        return measure(*arguments, **options)

    monkeypatch.setattr(algorithmic, "measure", watched)
    for dtype in ("float32", "bfloat16"):
        options = ["--num-steps", "3", "--eval-every", "1", "--num-eval", "8", "--dtype", dtype]
        path = str(tmp_path / f"{dtype}.json")
        argv = ["study", "chomsky", "--output", path, "--system", "mingru/1", "--task", "majority"]
        assert main([*argv, *options]) == 0
        found = read_study(path)["cells"]["majority/mingru/1/seed0"]
        curves.append(torch.tensor([point["train_loss"] for point in found["curve"]]))
    assert not torch.equal(*curves) and torch.allclose(*curves, rtol=0.02)
    assert casts == [False] * 4 + [True] * 4, "every measurement as the training, the last too"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["selective-copy", "--length", "3"], "length=3 is below the 4 tokens to copy"),
        (["selective-copy", "--system", "mingro/2"], "did you mean 'mingru'"),
        (["selective-copy", "--system", "mingru"], "expected a name and a depth"),
        (["chomsky", "--task", "parity"], "unknown task 'parity'"),
        (["char-lm", "--text", "no-such-file"], "no-such-file: no such file"),
        (["train-cost", "--system", "rwkv"], "unknown system 'rwkv'"),
        (["train-cost", "--longest", "8"], "--shortest=64, --longest=8"),
        (["listops", "--num-steps", "0"], "--num-steps=0, expected at least 1"),
        (["listops", "--device", "nowhere"], "--device nowhere: cannot be used here"),
        (["listops", "--figure", "a.jpg"], "expected a name that ends in .png"),
    ],
)
def test_mistakes_are_one_line(argv, said, tmp_path, capsys) -> None:
    assert main(["study", *argv, "--output", str(tmp_path / "a.json")]) not in (0, None)
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and said in err and "Traceback" not in err
    assert not (tmp_path / "a.json").exists()


def test_figures_of_nothing(tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "a.json"
    with pytest.raises(ValueError, match="no such file"):
        figures.draw(path, tmp_path / "a.png")
    list(run_cells([Cell("a", dict)], path, {"study": "books"}))
    with pytest.raises(ValueError, match="no figure is known for the study 'books'"):
        figures.draw(path, tmp_path / "a.png")


def test_means_over_seeds() -> None:
    cells = {"a/1/seed0": {"x": 1.0}, "b/1/seed0": {"x": 5.0}, "a/1/seed1": {"x": 3.0}}
    gathered = over_seeds(cells, lambda r: r["x"])
    assert gathered == {"a/1": [1.0, 3.0], "b/1": [5.0]}
    assert over_seeds_shown(gathered["a/1"]) == "2.0 ± 1.4"
    assert over_seeds_shown([5.0], 2) == "5.00"
