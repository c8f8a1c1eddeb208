"""Whether what a file holds has the types that it is read with: those of the TypedDicts and dataclasses of records."""

import math
from functools import lru_cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints, is_typeddict

from stabrun.record.jsonl import is_number

hints_of = lru_cache(get_type_hints)


def wrong_field(value: dict[str, Any], schema: type) -> str | None:
    """The first field of an object, such as `signals`, that is missing or has another type than in a TypedDict or
    dataclass; None if there is none. Fields that the schema does not know may be anything.
    """
    required: frozenset[str] = getattr(schema, "__required_keys__", frozenset())
    for name, kind in hints_of(schema).items():
        if (name in required and name not in value) or (name in value and not fits(value[name], kind)):
            return name
    return None


def fits(value: Any, kind: Any) -> bool:
    """Whether a value of JSON has a type. `float | str` is a number of a record, also "nan", "inf" and "-inf"."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, UnionType):
        if float in inner and str in inner:
            return is_number(value) or (NoneType in inner and value is None)
        return any(fits(value, one) for one in inner)
    if origin is list:
        return isinstance(value, list) and all(fits(item, inner[0]) for item in value)
    if origin is tuple:
        return isinstance(value, list) and len(value) == len(inner) and all(map(fits, value, inner))
    if origin is dict:
        return isinstance(value, dict) and all(fits(item, inner[1]) for item in value.values())
    if is_typeddict(kind):
        return isinstance(value, dict) and wrong_field(value, kind) is None
    if kind is float:
        return type(value) is not str and is_number(value) and math.isfinite(value)
    if kind is int:
        return type(value) is int and is_number(value)
    return type(value) is (NoneType if kind is None else kind)
