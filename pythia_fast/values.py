"""Values of a page: as the type of their key, as words about that type, as TOML."""

from __future__ import annotations

import json
import math
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin


def convert(value: Any, hint: Any) -> Any:
    """value as hint, or None where it is of another kind. bool is no int, nan is no float."""
    if get_origin(hint) is Literal:
        return value if value in get_args(hint) and isinstance(value, str) else None
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            return None
        kinds = get_args(hint)
        kinds = (kinds[0],) * len(value) if kinds[-1] is Ellipsis else kinds
        items = tuple(convert(v, k) for v, k in zip(value, kinds, strict=False))
        return None if len(value) != len(kinds) or None in items else items
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if math.isfinite(value) else None
    return value if type(value) is hint else None


def describe(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(describe(option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(repr(choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        return f"a list of {'' if kinds[-1] is Ellipsis else f'{len(kinds)} '}{kinds[0].__name__}s"
    return {
        "int": "a whole number",
        "float": "a number",
        "str": "a string",
        "bool": "true or false",
    }[hint.__name__]


def toml_value(value: Any) -> str:
    """value as TOML spells it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple | list):
        return f"[{', '.join(toml_value(v) for v in value)}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)
