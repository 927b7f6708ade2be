"""Datasets on disk: D4RL's HDF5 files and Minari's directories, read; Minari's, written."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from statewright.studies.rl.episodes import Episode, Recording
from statewright.studies.rl.optional import need
from statewright.studies.rl.scores import ControlTask

FIELDS = ("observations", "actions", "rewards", "terminals", "timeouts")


def read(source: str | Path, task: ControlTask) -> Recording:
    """A D4RL file, a Minari dataset's directory, or the id of one that Minari has here.

    Raises ValueError for what is none of these, a missing field, or sizes that are not the task's.
    """
    path = Path(source)
    if path.is_dir():
        return read_minari(path).check(task, str(source))
    if path.is_file():
        return read_d4rl(path).check(task, str(source))
    if path.suffix in (".hdf5", ".h5"):
        raise ValueError(f"{source}: no such file")
    return read_minari(str(source)).check(task, str(source))


def read_d4rl(path: str | Path) -> Recording:
    """D4RL's HDF5 (arXiv:2004.07219): an episode ends at terminals or timeouts.

    Steps after the last end are left out: their return-to-go is not known. Raises ValueError,
    naming the field, if one of `FIELDS` is missing or has another number of steps.
    """
    h5py = need("h5py")
    try:
        with h5py.File(path) as file:
            missing = [name for name in FIELDS if name not in file]
            if missing:
                raise ValueError(
                    f"{path}: has no field {', '.join(map(repr, missing))} (found: "
                    f"{', '.join(sorted(file)) or 'none'})"
                )
            arrays = {name: np.asarray(file[name]) for name in FIELDS}
    except OSError as error:
        raise ValueError(f"{path}: no HDF5 file ({error})") from error
    steps = {name: len(array) for name, array in arrays.items()}
    if len(set(steps.values())) > 1:
        raise ValueError(f"{path}: fields differ in their number of steps: {steps}")
    ends = arrays["terminals"].astype(bool).ravel() | arrays["timeouts"].astype(bool).ravel()
    if not ends.any():
        raise ValueError(f"{path}: no step is marked in 'terminals' or 'timeouts'")
    return Recording.until(
        arrays["observations"], arrays["actions"], arrays["rewards"].ravel(), ends
    )


def read_minari(source: str | Path) -> Recording:
    """A Minari dataset by directory or id; nothing is downloaded.

    Raises ValueError if there is none, or its observations are no vectors.
    """
    minari = need("minari")
    try:
        if isinstance(source, Path):
            inner = source / "data"
            dataset = minari.MinariDataset(inner if inner.is_dir() else source)
        else:
            dataset = minari.load_dataset(source, download=False)
        episodes = [_episode(found) for found in dataset.iterate_episodes()]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{source}: neither a file nor a Minari dataset here ({error})") from error
    return Recording.of(episodes)


def _episode(found: Any) -> Episode:
    for name in ("observations", "actions"):
        if not isinstance(getattr(found, name), np.ndarray):
            raise ValueError(f"{name} are a {type(getattr(found, name)).__name__}, no array")
    return Episode(
        found.observations, found.actions, found.rewards, bool(np.any(found.terminations))
    )


def write_minari(
    dataset_id: str,
    episodes: Sequence[Episode],
    task: ControlTask,
    root: str | Path,
    about: str,
) -> Path:
    """Store episodes as `root/dataset_id`, with D4RL's two returns; the directory.

    Raises ValueError if it is there already.
    """
    minari, gymnasium = need("minari"), need("gymnasium")
    from minari.data_collector import EpisodeBuffer

    place = Path(root) / dataset_id
    if place.exists():
        raise ValueError(f"{place}: is there already")
    buffers = [EpisodeBuffer(id=i, **_fields(episode)) for i, episode in enumerate(episodes)]
    with _datasets_in(root), warnings.catch_warnings():
        # Advice for those who publish: an e-mail address, a permalink.
        warnings.simplefilter("ignore", UserWarning)
        minari.create_dataset_from_buffers(
            dataset_id,
            buffers,
            env=gymnasium.spec(task.environment),
            algorithm_name=about,
            author="statewright",
            ref_min_score=task.random_return,
            ref_max_score=task.expert_return,
            data_format="hdf5",
        )
    return place


def _fields(episode: Episode) -> dict[str, Any]:
    ends = np.arange(len(episode)) == len(episode) - 1
    return {
        "observations": episode.observations,
        "actions": episode.actions,
        "rewards": episode.rewards,
        "terminations": ends & episode.terminated,
        "truncations": ends & (not episode.terminated),
    }


@contextmanager
def _datasets_in(root: str | Path) -> Iterator[None]:
    """Minari looks for its directory in the environment only."""
    name = "MINARI_DATASETS_PATH"
    before = os.environ.get(name)
    Path(root).mkdir(parents=True, exist_ok=True)
    os.environ[name] = str(Path(root).resolve())
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
