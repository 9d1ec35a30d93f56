"""Figures for generated text: how often, how far it follows preferences, how likely, how repetitive, and how sure."""

from prosocial_ext.evaluation.attributes import AttributeMatrix, attribute_matrix
from prosocial_ext.evaluation.hypervolume import hypervolume
from prosocial_ext.evaluation.intervals import Estimate, bootstrap_difference, bootstrap_interval
from prosocial_ext.evaluation.likelihood import document_losses, perplexity, perplexity_of
from prosocial_ext.evaluation.preferences import mip, preference_cosine
from prosocial_ext.evaluation.rates import Rate, rate
from prosocial_ext.evaluation.repetition import distinct_n, repetition_rate

__all__ = [
    "AttributeMatrix",
    "Estimate",
    "Rate",
    "attribute_matrix",
    "bootstrap_difference",
    "bootstrap_interval",
    "distinct_n",
    "document_losses",
    "hypervolume",
    "mip",
    "perplexity",
    "perplexity_of",
    "preference_cosine",
    "rate",
    "repetition_rate",
]
