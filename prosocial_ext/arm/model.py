"""The peft tuner: puts `PBLoraLinear` in place of the targets, and holds the preference that they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prosocial_ext.arm.config import PBLoraConfig
from prosocial_ext.arm.layer import PBLoraLinear, PreferenceState
from prosocial_ext.arm.preferences import Preference, as_matrix

__all__ = ["PBLoraModel", "checkpoint_context_fn"]

# PARM's targets, by the names that the architectures give to the attention projections.
_SPLIT = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
_TARGETS = {
    **{name: ["q_proj", "k_proj", "v_proj"] for name in _SPLIT},
    "phi3": ["qkv_proj"],
    "gpt2": ["c_attn"],
    "gpt_neox": ["query_key_value"],
}


class PBLoraModel(BaseTuner):
    """A causal LM with PBLoRA adapters; made by ``peft.get_peft_model(model, PBLoraConfig(...))``."""

    prefix = "pblora_"
    tuner_layer_cls = PBLoraLinear
    target_module_mapping = _TARGETS

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any) -> None:
        self._preference_state = PreferenceState()  # nn.Module.__init__ keeps plain attributes set before it
        super().__init__(model, peft_config, adapter_name, **kwargs)

    def _create_and_replace(
        self,
        peft_config: PBLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if isinstance(target, PBLoraLinear):
            target.update_layer(adapter_name, peft_config)
            return
        if not isinstance(target, (nn.Linear, Conv1D)):
            raise TypeError(
                f"target_modules must name nn.Linear or Conv1D modules, got {type(target).__name__} at {current_key}."
            )
        layer = PBLoraLinear(target, adapter_name, peft_config, self._preference_state)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @property
    def attributes(self) -> list[str]:
        """The names that a preference weighs, in order (those of the active adapter)."""
        return list(self.peft_config[self.active_adapters[0]].attributes)

    @contextmanager
    def preference(self, preference: Preference, rows: Tensor | None = None) -> Iterator[None]:
        """Run the adapter under a preference inside the ``with`` block.

        Args:
            preference: by names, one per call or one per row (see `as_matrix`), or a tensor [k] or [B, k] in order.
            rows: bool [B]; the adapter acts on these rows of the batch only (None: all).

        Raises:
            ValueError: an unknown attribute or a wrong shape.
        """
        state = self._preference_state
        before = state.alpha, state.rows
        device = next(self.parameters()).device
        alpha = as_matrix(preference, self.attributes).to(device)
        state.alpha, state.rows = alpha, None if rows is None else rows.to(device)
        try:
            yield
        finally:
            state.alpha, state.rows = before


def checkpoint_context_fn(model: Any) -> Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]:
    """Return the ``context_fn`` with which gradient checkpointing recomputes under the preference of the forward pass.

    Without it the recompute runs under whatever preference is set at the backward pass: the gradient is silently wrong.

    Args:
        model: a PBLoRA PeftModel. Use it as ``model.gradient_checkpointing_enable({"use_reentrant": False,
            "context_fn": checkpoint_context_fn(model)})``.
    """
    state: PreferenceState = model.base_model._preference_state

    @contextmanager
    def again(alpha: Tensor | None, rows: Tensor | None) -> Iterator[None]:
        before = state.alpha, state.rows
        state.alpha, state.rows = alpha, rows
        try:
            yield
        finally:
            state.alpha, state.rows = before

    return lambda: (nullcontext(), again(state.alpha, state.rows))
