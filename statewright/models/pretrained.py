"""What both models share with transformers: initialisation, checkpointing, saving and loading."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from statewright.hf.loading import align_weights
from statewright.models.calibration import read_norms, write_norms
from statewright.models.config import StatewrightConfig


class StatewrightPreTrainedModel(PreTrainedModel):
    """Base of our models. policy.safetensors goes with the weights, wherever these come from."""

    config_class = StatewrightConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Every module knows its own initialisation; ours is torch's default, as the paper's."""
        own = list(module.parameters(recurse=False))
        fresh = [p for p in own if not getattr(p, "_is_hf_initialized", False)]
        if fresh and hasattr(module, "reset_parameters"):
            module.reset_parameters()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict | None = None, **kw: Any
    ) -> None:
        kwargs = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if kwargs["use_reentrant"]:
            raise ValueError(
                "gradient checkpointing with use_reentrant=True gives wrong gradients for a "
                "state, without any error; use use_reentrant=False"
            )
        super().gradient_checkpointing_enable(kwargs, **kw)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """As transformers'. With adapters (PEFT) these alone are written, norms with the base."""
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            self._save_norms(save_directory)

    def _upload_modified_files(self, working_dir: str | os.PathLike, *args: Any, **kw: Any) -> Any:
        """`save_pretrained(push_to_hub=True)` pushes before it returns: the norms go with it."""
        self._save_norms(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kw)

    def _save_norms(self, directory: str | os.PathLike) -> None:
        if not self._hf_peft_config_loaded:
            write_norms(self.base_model.norms, directory)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any
    ) -> Any:
        """As transformers'; the norms are looked for where the weights were found."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = align_weights(loaded[0] if isinstance(loaded, tuple) else loaded)
        if pretrained_model_name_or_path is not None:
            # Of a directory of adapters the config names the base, where the weights came from.
            model.base_model.norms = read_norms(model.config.name_or_path, **kwargs)
        return loaded
