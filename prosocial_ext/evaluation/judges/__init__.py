"""Judges of replies: each gives a prompt's reply a score, and flags it where the score reaches a threshold.

A judge does not know what its flag is used for. A refusal judge flags refusals, a harm judge flags harm; the two are
different questions, and `prosocial_ext.evaluation.evaluate` never lets one stand for the other without saying so.
"""

from prosocial_ext.evaluation.judges.build import KINDS, build_judge
from prosocial_ext.evaluation.judges.classifier import ClassifierJudge
from prosocial_ext.evaluation.judges.function import FunctionJudge
from prosocial_ext.evaluation.judges.judge import Judge, Verdicts
from prosocial_ext.evaluation.judges.phrases import PHRASES, PhraseJudge
from prosocial_ext.evaluation.judges.yes_no import YesNoJudge

__all__ = [
    "KINDS",
    "PHRASES",
    "ClassifierJudge",
    "FunctionJudge",
    "Judge",
    "PhraseJudge",
    "Verdicts",
    "YesNoJudge",
    "build_judge",
]
