"""Directional harm removal (DIReg): subtract the largest entries of tuned - base, in memory or on disk.

`HarmVector` keeps them in a file: made from checkpoints of any size, a LoRA adapter or models. It subtracts itself from
models, sharded ones too; `apply_vector` subtracts it from a checkpoint on disk, `revert_checkpoint` takes that back.
In memory alone, `subtract_harm_` edits for good, `harm_subtracted` for the length of a ``with`` block.
`harm_vector_report` tells before the edit how much of the vector its largest entries carry, `harm_by_tensor` where they
sit; `gradient_importance` ranks them by their effect, `harm_gradient` writes the same of a checkpoint and a file of
harmful pairs.
"""

from prosocial_ext.checkpoints.errors import CheckpointError
from prosocial_ext.direg.checkpoint_edit import CheckpointEdit, apply_vector, revert_checkpoint
from prosocial_ext.direg.checkpoint_gradient import HarmGradient, harm_gradient
from prosocial_ext.direg.harm_vector import HarmVector
from prosocial_ext.direg.importance import gradient_importance
from prosocial_ext.direg.models import matching_parameters
from prosocial_ext.direg.report import HarmVectorReport, harm_vector_report
from prosocial_ext.direg.subtract import SAFETY_ARITHMETIC_DENSITY, harm_subtracted, subtract_harm_
from prosocial_ext.direg.tensors import TensorShare, harm_by_tensor

__all__ = [
    "SAFETY_ARITHMETIC_DENSITY",
    "CheckpointEdit",
    "CheckpointError",
    "HarmGradient",
    "HarmVector",
    "HarmVectorReport",
    "TensorShare",
    "apply_vector",
    "gradient_importance",
    "harm_by_tensor",
    "harm_gradient",
    "harm_subtracted",
    "harm_vector_report",
    "matching_parameters",
    "revert_checkpoint",
    "subtract_harm_",
]
