"""Registers PBLoRA with peft, which has no public way to add a method from outside.

peft's ``register_peft_method`` wants the name to be a member of the closed enum ``PeftType``. So the member is made by
hand first, with all that ``enum`` itself would set; after that peft and transformers treat it as their own.
Once a public way exists, this module is the one to change.
"""

from __future__ import annotations

from typing import Any

import peft
from peft.utils import PeftType, register_peft_method

__all__ = ["NAME", "register"]

NAME = "PBLORA"


def register(config_class: Any, model_class: Any) -> None:
    """Make peft know PBLoRA; calling it again changes nothing."""
    if NAME not in PeftType.__members__:
        member: Any = str.__new__(PeftType, NAME)
        member._name_, member._value_ = NAME, NAME
        PeftType._member_names_.append(NAME)
        PeftType._member_map_[NAME] = member
        PeftType._value2member_map_[NAME] = member
        if hasattr(PeftType, "_hashable_values_"):  # Python 3.13
            PeftType._hashable_values_.append(NAME)
        type.__setattr__(PeftType, NAME, member)
    if PeftType(NAME) not in peft.PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(
            name=NAME.lower(), config_cls=config_class, model_cls=model_class, prefix=model_class.prefix
        )
