"""Environments by task, what they miss told in one line, and frames to a film."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from statewright.studies.rl.optional import need
from statewright.studies.rl.scores import ControlTask


def make_environment(task: ControlTask, render: bool = False) -> Any:
    """The task's gymnasium environment, one that renders frames on request.

    Raises ValueError if it is not installed (naming the extra) or has other sizes than the task.
    """
    gymnasium = need("gymnasium")
    need("mujoco")
    try:
        environment = gymnasium.make(task.environment, render_mode="rgb_array" if render else None)
    except (gymnasium.error.Error, ImportError) as error:
        raise ValueError(
            f"{task.environment} cannot be made ({error}); it comes with the extra [rl]: "
            "pip install 'statewright[rl]'"
        ) from error
    sizes = environment.observation_space.shape, environment.action_space.shape
    if sizes != ((task.observation_size,), (task.action_size,)):
        raise ValueError(
            f"{task.environment}: observations and actions are {sizes}, expected "
            f"({task.observation_size},) and ({task.action_size},)"
        )
    return environment


def frame_of(environment: Any) -> np.ndarray:
    """What the environment looks like now, (height, width, 3); ValueError without a backend."""
    try:
        frame = environment.render()
    except Exception as error:  # every OpenGL backend raises classes of its own
        raise ValueError(_no_backend(error)) from error
    if not isinstance(frame, np.ndarray):
        raise ValueError(_no_backend(f"render() gave {type(frame).__name__}"))
    return frame


def _no_backend(reason: object) -> str:
    return (
        f"no rendering backend ({reason}); set MUJOCO_GL=egl (a GPU or Mesa's libegl1) or "
        "MUJOCO_GL=osmesa (libosmesa6) before the command"
    )


def check_film(path: str | Path) -> str:
    """The film's format, gif or mp4; ValueError for another, or if what writes it is missing."""
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in ("gif", "mp4"):
        raise ValueError(f"{path}: expected a file called .gif or .mp4")
    need("imageio")
    if kind == "mp4":
        need("imageio_ffmpeg")
    return kind


def write_film(frames: Sequence[np.ndarray], path: str | Path, per_second: int = 30) -> None:
    """Write frames as GIF or MP4, replaced as a whole. Raises ValueError as `check_film`."""
    kind, path = check_film(path), Path(path)
    imageio = need("imageio.v2")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".writing.{path.name}")
    options = {"duration": 1000 / per_second, "loop": 0} if kind == "gif" else {"fps": per_second}
    try:
        imageio.mimwrite(scratch, list(frames), format=kind, **options)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
