"""Directional harm removal on models in memory (DIReg): subtract the largest entries of tuned - base from a model.

`subtract_harm_` edits for good, `harm_subtracted` for the length of a ``with`` block. `harm_vector_report` tells before
the edit how much of the vector its largest entries carry, `harm_by_tensor` where they sit; `gradient_importance` ranks
them by their effect instead.
"""

from prosocial_ext.direg.importance import gradient_importance
from prosocial_ext.direg.models import matching_parameters
from prosocial_ext.direg.report import HarmVectorReport, harm_vector_report
from prosocial_ext.direg.subtract import SAFETY_ARITHMETIC_DENSITY, harm_subtracted, subtract_harm_
from prosocial_ext.direg.tensors import TensorShare, harm_by_tensor

__all__ = [
    "SAFETY_ARITHMETIC_DENSITY",
    "HarmVectorReport",
    "TensorShare",
    "gradient_importance",
    "harm_by_tensor",
    "harm_subtracted",
    "harm_vector_report",
    "matching_parameters",
    "subtract_harm_",
]
