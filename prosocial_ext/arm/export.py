"""PBLoRA at one preference as a plain LoRA adapter: lossless, for peft, vLLM or a merge."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from prosocial_ext.arm.layer import PBLoraLinear
from prosocial_ext.arm.preferences import Preference, as_matrix
from prosocial_ext.reference import check

__all__ = ["export_lora", "save_lora"]


def export_lora(model: Any, preference: Preference, adapter: str | None = None) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Return the LoRA adapter of rank r1 + r2 that equals PBLoRA at ``preference``.

    A stays as it is and B becomes s [B1 W1, B2 W2(alpha)]; lora_alpha = r, so that peft's own scale is 1.

    Args:
        model: a PBLoRA PeftModel.
        preference: one preference (a dict, or a tensor [k]).
        adapter: the adapter's name; the active one by default.

    Returns:
        The config, and the state dict under peft's names ("base_model.model....lora_A.weight").

    Raises:
        ValueError: a preference per row, or a model without PBLoRA layers.
    """
    name = adapter or model.active_adapters[0]
    config = model.peft_config[name]
    alpha = as_matrix(preference, config.attributes)
    if alpha.dim() != 1:
        check.fail("preference", "be one for all rows", f"{alpha.shape[0]} rows", "Export one adapter per preference.")
    state: dict[str, Tensor] = {}
    targets, transposed = [], False
    for key, module in model.base_model.model.named_modules():
        if isinstance(module, PBLoraLinear) and name in module.pblora_A:
            targets.append(key)
            transposed |= isinstance(module.get_base_layer(), Conv1D)
            with torch.no_grad():
                state[f"base_model.model.{key}.lora_A.weight"] = module.pblora_A[name].detach().clone()
                state[f"base_model.model.{key}.lora_B.weight"] = module.lora_b(name, alpha).contiguous()
    if not targets:
        check.fail("model", f"have PBLoRA layers of the adapter {name!r}", "none")
    rank = config.r1 + config.r2
    lora = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules=targets,
        fan_in_fan_out=transposed,
        base_model_name_or_path=config.base_model_name_or_path,
        task_type=config.task_type,
        inference_mode=True,
    )
    return lora, state


def save_lora(model: Any, preference: Preference, folder: str | os.PathLike[str], adapter: str | None = None) -> Path:
    """Write `export_lora` as an adapter folder that ``PeftModel.from_pretrained`` and vLLM load; return the folder."""
    config, state = export_lora(model, preference, adapter)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(path))
    temporary = path / "adapter_model.safetensors.tmp"
    save_file(state, temporary, metadata={"format": "pt"})
    temporary.replace(path / "adapter_model.safetensors")
    return path
