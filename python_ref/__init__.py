"""The ops in pure PyTorch: the definition of correct. Ships as ``prosocial_ext.reference``."""

from .flags import raise_if_bad
from .projection import gradient_gram, project_conflicts
from .results import ProjectionStats, SparseDelta, TopmEdit, UndoRecord
from .sampling import guided_logprobs, guided_sample
from .topm import sparse_subtract_, topm_select, topm_subtract_

__all__ = [
    "ProjectionStats",
    "SparseDelta",
    "TopmEdit",
    "UndoRecord",
    "gradient_gram",
    "guided_logprobs",
    "guided_sample",
    "project_conflicts",
    "raise_if_bad",
    "sparse_subtract_",
    "topm_select",
    "topm_subtract_",
]
