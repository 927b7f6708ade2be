"""State files: safetensors with a header that says whose state it is, and refuses all else.

The header holds the format version, the structure and axes of the state, a fingerprint of the
model (config and every weight), the policy, the tokens seen, a hash of those tokens that does not
depend on how they were split, and a digest of the whole content. Nothing is unpickled, and a file
appears under its name only when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from statewright import state as states
from statewright.precision import device_of
from statewright.state import State

FORMAT = 1
_KEY = "statewright"
_STATE, _BESIDE = "state.", "beside."
# What a config says about where and how it was saved, not about the model.
_VOLATILE = {"_name_or_path", "transformers_version", "auto_map", "architectures", "dtype"}


@dataclass(frozen=True, eq=False)
class StateFile:
    """What a file holds: the state, tensors saved beside it, and the header's entries."""

    state: State
    beside: dict[str, Tensor]
    fingerprint: str | None
    policy: str | None
    tokens_hash: str | None
    about: dict[str, Any] = field(default_factory=dict)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the model's config and of every parameter and buffer, dtype included."""
    config: Any = getattr(model, "config", None)
    # Without the defaults: a release that adds an option must not orphan the files of the last.
    entries = config.to_diff_dict() if hasattr(config, "to_diff_dict") else {}
    kept = {k: v for k, v in entries.items() if k not in _VOLATILE}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        _digest_tensor(digest, name, tensor)
    return digest.hexdigest()


def save_state(
    state: State,
    path: str | Path,
    model: nn.Module | None = None,
    *,
    policy: str | None = None,
    tokens_hash: str | None = None,
    beside: Mapping[str, Tensor] | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write a state file; the old file, if any, stays until the new one is complete.

    With `model`, only that model (same config, same weights) can load it. `beside` are tensors
    to keep with the state, `about` entries for JSON. Raises OSError if it cannot be written.

    >>> layer = MinGRU(4)
    >>> save_state(layer.init_state(1), "book.state", layer)
    """
    path = Path(path)
    tensors = {_STATE + name: tensor for name, tensor in state.items()}
    tensors |= {_BESIDE + name: tensor for name, tensor in (beside or {}).items()}
    tensors = {name: _packed(t.detach().cpu()) for name, t in tensors.items()}
    header = {
        "format": FORMAT,
        "structure": _structure(state),
        "axes": {name: list(axes) for name, _, axes in state.named()},
        "seen": state.seen.tolist(),
        "fingerprint": None if model is None else fingerprint(model),
        "policy": policy,
        "tokens_hash": tokens_hash,
        "about": dict(about or {}),
    }
    header["digest"] = _digest(header, tensors)
    write_tensors(path, tensors, {_KEY: json.dumps(header, sort_keys=True)})


def load_state(
    path: str | Path, model: nn.Module | None = None, *, policy: str | None = None
) -> State:
    """The state in a file, for this model; see `read_state_file` for what is refused.

    >>> layer = MinGRU(4)
    >>> save_state(layer.init_state(1), "book.state", layer)
    >>> load_state("book.state", layer)
    VectorState(seen (1,), h (1, 4); 24 bytes)
    """
    return read_state_file(path, model, policy=policy).state


def read_state_file(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    policy: str | None = None,
    any_policy: bool = False,
) -> StateFile:
    """Read and verify a state file. Without `model` anything sound is read (to look at it).

    Raises ValueError, in one line, for a missing, truncated or altered file, a newer format,
    and with `model` for another model's state or, without `any_policy`, another policy than the
    file was made under.
    """
    header, tensors = _read(Path(path))
    if model is not None:
        if header["fingerprint"] != fingerprint(model):
            raise ValueError(
                f"{path}: the state of another model (config or weights differ from this one's)"
            )
        if header["policy"] != policy and not any_policy:
            raise ValueError(
                f"{path}: made under policy {header['policy'] or 'none'}, not {policy or 'none'}"
            )
    state = _rebuild(header["structure"], tensors, _STATE)
    if model is not None:
        device = device_of(model)
        state = state.to(device)
    beside = {n.removeprefix(_BESIDE): t for n, t in tensors.items() if n.startswith(_BESIDE)}
    return StateFile(
        state,
        beside,
        header["fingerprint"],
        header["policy"],
        header["tokens_hash"],
        header["about"],
    )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[_KEY])
            if header["format"] > FORMAT:
                raise ValueError(
                    f"{path}: written by a newer statewright (format {header['format']}, "
                    f"this one reads up to {FORMAT}); update to read it"
                )
            # Copies: what safetensors returns is mapped, and would change with the file.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except KeyError as error:
        raise ValueError(f"{path}: a safetensors file, but not a state file") from error
    except (SafetensorError, UnicodeDecodeError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a state file, or damaged ({error})") from error
    digest = header.pop("digest", None)
    if digest != _digest(header, tensors):
        raise ValueError(f"{path}: damaged or altered (its content does not match its digest)")
    return header, tensors


def _structure(state: Any) -> Any:
    """The tree of types; the tensors' names follow from it."""
    if isinstance(state, tuple):
        return [_structure(inner) for inner in state]
    node: dict[str, Any] = {"type": type(state).__name__}
    node["tensors"] = [n for n, t in vars(state).items() if isinstance(t, Tensor)]
    node["extra"] = {name: list(axes) for name, axes in state.extra_axes.items()}
    for name, value in vars(state).items():
        if isinstance(value, tuple):
            node[name] = _structure(value)
    return node


def _rebuild(node: Any, tensors: Mapping[str, Tensor], prefix: str) -> Any:
    if isinstance(node, list):
        return tuple(_rebuild(inner, tensors, f"{prefix}{i}.") for i, inner in enumerate(node))
    cls = getattr(states, node["type"], None)
    if not (isinstance(cls, type) and issubclass(cls, State)):
        raise ValueError(f"unknown type of state {node['type']!r}")
    extra = {name: tensors[f"{prefix}extra.{name}"] for name in node["extra"]}
    values = {name: tensors[prefix + name] for name in node["tensors"]}
    if "layers" in node:
        values["layers"] = _rebuild(node["layers"], tensors, f"{prefix}layers.")
    axes = {name: tuple(axes) for name, axes in node["extra"].items()}
    return cls(**values, extra=extra, extra_axes=axes)


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        _digest_tensor(digest, name, tensors[name])
    return digest.hexdigest()


def _digest_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    flat = tensor.detach().cpu().reshape(-1)
    flat = flat if flat.stride() == (1,) else _packed(flat)
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy().data)


def _packed(tensor: Tensor) -> Tensor:
    """A fresh copy with the strides of its shape (`contiguous` skips axes of size 1)."""
    return tensor.clone(memory_format=torch.contiguous_format)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, replaced as a whole; OSError if it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        try:
            save_file(tensors, beside, metadata)
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written ({error})") from error
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(beside, 0o666 & ~_umask())
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
