"""A causal LM of transformers from a directory or an id, every refusal in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    __version__,
)
from transformers.utils import logging

_ALIGNMENT = 64


def load_config(path: str | Path, trust_remote_code: bool = False) -> Any:
    """The config of a causal LM, in a directory or of a cached id.

    Raises ValueError where there is none, where it needs code from the checkpoint, for a family
    that the installed transformers lacks, and for one that is no causal LM.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: {_reason(error, path)}") from error
    if not hasattr(config, "auto_map") and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{path}: {config.model_type} is not a causal language model")
    return config


def load_causal_lm(
    path: str | Path, dtype: torch.dtype | None = torch.float32, trust_remote_code: bool = False
) -> Any:
    """The model in evaluation mode, in `dtype` (None: the checkpoint's); outputs have names.

    Raises ValueError, besides what `load_config` refuses, for a model that is no causal LM, for
    damaged weights and for weights that are missing (transformers would draw them at random).
    """
    config = load_config(path, trust_remote_code)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype="auto" if dtype is None else dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path}: {_reason(error, path)}") from error
    except Exception as error:
        # safetensors raises a class of its own for a truncated file.
        if type(error).__name__ != "SafetensorError":
            raise
        raise ValueError(f"{path}: damaged weights ({error})") from error
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} weights are missing, the first {missing[0]!r}; "
            "transformers would draw them at random"
        )
    model.config.return_dict = True  # tuples are for those who call the model themselves
    return align_weights(model).eval()


def align_weights(model: nn.Module) -> nn.Module:
    """The model itself, with every weight on the CPU at an address as torch would allocate it.

    Weights that are mapped from a file lie at any multiple of 8 bytes, where matrix products may
    round differently, so that a reloaded model would not continue bit for bit.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()
    return model


def _reason(error: BaseException, path: str | Path) -> str:
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return "runs code that comes with the checkpoint; if you trust it, --trust-remote-code"
    if "does not recognize this architecture" in text or isinstance(error, KeyError):
        return f"transformers {__version__} has no such family ({text.split(' but ')[0][:120]})"
    if isinstance(error, OSError) and not Path(path).exists():
        return "no such directory, and not in the local Hugging Face cache"
    return text[:300]
