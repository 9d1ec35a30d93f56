"""Dataclasses back from the JSON that ``dataclasses.asdict`` made of them."""

from __future__ import annotations

import types
import typing
from dataclasses import fields, is_dataclass
from typing import Any

__all__ = ["from_json"]


def from_json(kind: Any, value: Any) -> Any:
    """Return ``value`` as an instance of ``kind``: a dataclass, a list, a dict, an optional or a plain type.

    >>> from prosocial_ext.evaluation import Rate
    >>> from_json(dict[str, Rate], {"a": {"value": 0.5, "low": 0.2, "high": 0.8, "n": 4}})
    {'a': Rate(value=0.5, low=0.2, high=0.8, n=4)}
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else from_json(next(a for a in arguments if a is not type(None)), value)
    if origin is list:
        return [from_json(arguments[0], item) for item in value]
    if origin is dict:
        return {key: from_json(arguments[1], item) for key, item in value.items()}
    if is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return typing.cast(Any, kind)(
            **{f.name: from_json(hints[f.name], value[f.name]) for f in fields(kind) if f.name in value}
        )
    return value
