"""PV-ARM: one preference-conditioned autoregressive reward model (a causal LM with PBLoRA adapters) and its training.

Importing this module makes peft know PBLoRA, so that ``PeftModel.from_pretrained`` loads such an adapter.
"""

from prosocial_ext.arm.config import PBLoraConfig
from prosocial_ext.arm.data import PreferencePair, collate, sequence_logprobs
from prosocial_ext.arm.export import export_lora, save_lora
from prosocial_ext.arm.loss import pairwise_loss
from prosocial_ext.arm.model import PBLoraModel, checkpoint_context_fn
from prosocial_ext.arm.peft_type import register
from prosocial_ext.arm.preferences import ATTRIBUTES, as_matrix, one_hot, sample_dirichlet
from prosocial_ext.arm.surgery import SURGERIES, combine_gradients
from prosocial_ext.arm.trainer import ArmTrainingConfig, ArmTrainingLog, pair_accuracy, train_arm

register(PBLoraConfig, PBLoraModel)

__all__ = [
    "ATTRIBUTES",
    "SURGERIES",
    "ArmTrainingConfig",
    "ArmTrainingLog",
    "PBLoraConfig",
    "PBLoraModel",
    "PreferencePair",
    "as_matrix",
    "checkpoint_context_fn",
    "collate",
    "combine_gradients",
    "export_lora",
    "one_hot",
    "pair_accuracy",
    "pairwise_loss",
    "sample_dirichlet",
    "save_lora",
    "sequence_logprobs",
    "train_arm",
]
