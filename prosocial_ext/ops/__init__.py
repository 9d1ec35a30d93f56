"""The ops on compiled kernels: same names, signatures, results and errors as ``prosocial_ext.reference``."""

from prosocial_ext.ops._backend import backend
from prosocial_ext.ops.projection import gradient_gram, project_conflicts
from prosocial_ext.ops.sampling import guided_logprobs, guided_sample
from prosocial_ext.ops.topm import sparse_subtract_, topm_select, topm_subtract_
from prosocial_ext.reference import ProjectionStats, SparseDelta, TopmEdit, UndoRecord, raise_if_bad

__all__ = [
    "ProjectionStats",
    "SparseDelta",
    "TopmEdit",
    "UndoRecord",
    "backend",
    "gradient_gram",
    "guided_logprobs",
    "guided_sample",
    "project_conflicts",
    "raise_if_bad",
    "sparse_subtract_",
    "topm_select",
    "topm_subtract_",
]
