"""Figures for generated text: how often, how far it follows preferences, how likely, how repetitive."""

from prosocial_ext.evaluation.likelihood import perplexity
from prosocial_ext.evaluation.preferences import mip
from prosocial_ext.evaluation.rates import Rate, rate
from prosocial_ext.evaluation.repetition import distinct_n, repetition_rate

__all__ = ["Rate", "distinct_n", "mip", "perplexity", "rate", "repetition_rate"]
