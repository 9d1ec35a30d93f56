"""Guided generation: the base model times a preference-conditioned reward model, token by token (GUI-Gen).

`GuidedGenerator` reads two causal language models, a cache each, and draws every token with one ``ops.guided_sample``.
"""

from prosocial_ext.decoding.generator import GuidedGenerator, GuidedOutput
from prosocial_ext.decoding.seeds import row_seeds

__all__ = ["GuidedGenerator", "GuidedOutput", "row_seeds"]
