"""The adapted linear layer: y = W0 x + s B blockdiag(W1, W2(alpha)) A x, never as a dense matrix.

A preference is an input of the forward pass, one per call or one per row; it reaches the layers through a state that
they share (`PreferenceState`), set by ``model.preference(...)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prosocial_ext.arm.config import PBLoraConfig

__all__ = ["PBLoraLinear", "PreferenceState"]


@dataclass
class PreferenceState:
    """The preference in force: ``alpha`` [k] or [B, k], and which rows of the batch take the adapter (None: all)."""

    alpha: Tensor | None = None
    rows: Tensor | None = None

    def required(self) -> Tensor:
        """Return alpha, or raise where none is set: there is no default preference."""
        if self.alpha is None:
            raise RuntimeError(
                "no preference is set. Run the model inside `with model.preference({...}):`, "
                "or inside `with model.disable_adapter():` for the base model."
            )
        return self.alpha


class PBLoraLinear(nn.Module, BaseTunerLayer):
    """A linear layer (nn.Linear or GPT-2's Conv1D) with PBLoRA adapters."""

    # Of BaseTunerLayer, which type checkers see only through peft.
    get_base_layer: Callable[[], Any]
    set_adapter: Callable[..., None]
    _move_adapter_to_device_of_base_layer: Callable[[str], None]
    active_adapters: list[str]

    adapter_layer_names = ("pblora_A", "pblora_B", "pblora_W1", "pblora_P")
    other_param_names = ("pblora_r1", "pblora_r2", "pblora_scale", "pblora_dropout")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: PBLoraConfig, state: PreferenceState) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.state = state
        if isinstance(base_layer, Conv1D):
            self.in_features, self.out_features = base_layer.weight.shape
        else:
            self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.pblora_A, self.pblora_B = nn.ParameterDict(), nn.ParameterDict()
        self.pblora_W1, self.pblora_P = nn.ParameterDict(), nn.ParameterDict()
        self.pblora_dropout = nn.ModuleDict()
        self.pblora_r1: dict[str, int] = {}
        self.pblora_r2: dict[str, int] = {}
        self.pblora_scale: dict[str, float] = {}
        self._merged_deltas: dict[str, Tensor] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: PBLoraConfig) -> None:
        """Add an adapter: B = 0, so that dW = 0; A, W1, P kaiming-uniform with a = sqrt(5), as in PARM."""
        r1, r2, k = config.r1, config.r2, len(config.attributes)
        self.pblora_r1[adapter_name], self.pblora_r2[adapter_name] = r1, r2
        self.pblora_scale[adapter_name] = config.lora_alpha / r2
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
        self.pblora_dropout[adapter_name] = dropout
        self.pblora_A[adapter_name] = nn.Parameter(torch.empty(r1 + r2, self.in_features))
        self.pblora_B[adapter_name] = nn.Parameter(torch.zeros(self.out_features, r1 + r2))
        self.pblora_W1[adapter_name] = nn.Parameter(torch.empty(r1, r1))
        self.pblora_P[adapter_name] = nn.Parameter(torch.empty(k, r2 * r2))
        for parameters in (self.pblora_A, self.pblora_W1, self.pblora_P):
            nn.init.kaiming_uniform_(parameters[adapter_name], a=math.sqrt(5))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def core(self, adapter: str, alpha: Tensor) -> Tensor:
        """Return W2(alpha): [r2, r2] for alpha [k], [B, r2, r2] for alpha [B, k]."""
        r2, projection = self.pblora_r2[adapter], self.pblora_P[adapter]
        return (alpha.to(projection.dtype).to(projection.device) @ projection).reshape(*alpha.shape[:-1], r2, r2)

    def lora_b(self, adapter: str, alpha: Tensor) -> Tensor:
        """Return s [B1 W1, B2 W2(alpha)], [out, r1 + r2]: with A, the plain LoRA that this is at a fixed alpha [k]."""
        b, r1 = self.pblora_B[adapter], self.pblora_r1[adapter]
        shared, steered = b[:, :r1] @ self.pblora_W1[adapter], b[:, r1:] @ self.core(adapter, alpha)
        return self.pblora_scale[adapter] * torch.cat([shared, steered], dim=1)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return dW(alpha) in the base weight's layout, at the preference in force, which must be one for all rows."""
        alpha = self.state.required()
        if alpha.dim() != 1:
            raise ValueError("merging needs one preference for all rows, got a preference per row.")
        delta = self.lora_b(adapter, alpha) @ self.pblora_A[adapter]
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add dW(alpha) of the active adapters to the base weight, at the preference in force."""
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.pblora_A:
                continue
            weight = self.get_base_layer().weight
            delta = self.get_delta_weight(adapter).to(weight.dtype)
            if safe_merge and not bool((weight + delta).isfinite().all()):
                raise ValueError(f"the merged weights are not finite: the adapter {adapter!r} seems to be broken")
            weight.data += delta
            self._merged_deltas[adapter] = delta.detach()
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Subtract what `merge` added, whatever preference is in force by now."""
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            self.get_base_layer().weight.data -= self._merged_deltas.pop(adapter)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base layer's output plus the adapters', [B, ..., out]."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        out = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return out
        for adapter in self.active_adapters:
            if adapter in self.pblora_A:
                out = out + self._adapted(adapter, x).to(out.dtype)
        return out

    def _adapted(self, adapter: str, x: Tensor) -> Tensor:
        alpha, a, r1 = self.state.required(), self.pblora_A[adapter], self.pblora_r1[adapter]
        z = self.pblora_dropout[adapter](x.to(a.dtype)) @ a.T
        core = self.core(adapter, alpha)
        if alpha.dim() == 1:
            steered = z[..., r1:] @ core.T
        else:
            if alpha.shape[0] != x.shape[0]:
                raise ValueError(f"preference has {alpha.shape[0]} rows, the batch has {x.shape[0]}.")
            rows = z[..., r1:].reshape(x.shape[0], -1, self.pblora_r2[adapter])
            steered = (rows @ core.transpose(1, 2)).reshape(*z.shape[:-1], -1)
        mixed = torch.cat([z[..., :r1] @ self.pblora_W1[adapter].T, steered], dim=-1)
        out = self.pblora_scale[adapter] * (mixed @ self.pblora_B[adapter].T)
        if self.state.rows is not None:
            mask = self.state.rows.to(out.device).reshape(-1, *([1] * (out.dim() - 1)))
            out = torch.where(mask, out, 0.0)
        return out

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether peft's own ``convert_to_lora`` may read `get_delta_weight`."""
        return True
