"""Takes values decoded from JSON, gives what ECMAScript makes of them: coercions, key order, and JSON text.

A document that a JavaScript program reads and prints again is not what Python would print: whole floats lose their
`.0`, keys that are array indices come first, exponents look different. (ECMA-262: ToNumber, ToBoolean,
OrdinaryOwnPropertyKeys, Number::toString, SerializeJSONProperty.)
"""

from __future__ import annotations

import json
import math
import re
from typing import Final

_INDEX = re.compile(r"0|[1-9][0-9]{0,9}", re.ASCII)
_MAX_INDEX = 2**32 - 2
_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", re.ASCII)
_SURROGATE = re.compile("[\ud800-\udfff]")


class _Undefined:
    def __repr__(self) -> str:
        return "UNDEFINED"


UNDEFINED: Final = _Undefined()
"""What a missing member is. Members with this value are not printed."""


def member(value: object, name: str) -> object:
    """`value?.name`."""
    return value.get(name, UNDEFINED) if isinstance(value, dict) else UNDEFINED


def truthy(value: object) -> bool:
    """ToBoolean: of objects and arrays, empty ones are true too."""
    if isinstance(value, dict | list):
        return True
    return bool(value) and value is not UNDEFINED and not (isinstance(value, float) and math.isnan(value))


def is_number(value: object) -> bool:
    """`typeof value === "number"`."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def number(value: object) -> float:
    """`Number(value)`; NaN where it is none. Arrays and objects are NaN here."""
    if value is None or value is False:
        return 0.0
    if isinstance(value, int | float):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    if isinstance(value, str):
        text = value.strip()
        if not text:
            return 0.0
        if re.fullmatch(r"0[xX][0-9a-fA-F]+|0[oO][0-7]+|0[bB][01]+", text, re.ASCII):
            return float(int(text, 0))
        if _DECIMAL.fullmatch(text):
            return float(text)
        if text in {"Infinity", "+Infinity", "-Infinity"}:
            return float(text)
    return math.nan


def key(value: object) -> str:
    """The property name that a value becomes: `object[value]`."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return ",".join("" if item is None else key(item) for item in value)
    return "[object Object]" if isinstance(value, dict) else dumps(value)


def dumps(value: object, indent: int = 0) -> str:
    """`JSON.stringify(value, null, indent)`."""
    return _text(value, "\n" if indent else "", " " * indent)


def _text(value: object, newline: str, step: str) -> str:
    if isinstance(value, str):
        # Half a surrogate pair cannot be encoded: it stays an escape.
        return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))
    if isinstance(value, dict):
        colon, deeper = (": ", newline + step) if newline else (":", "")
        parts = [f"{_text(name, '', '')}{colon}{_text(inner, deeper, step)}"
                 for name, inner in sorted(value.items(), key=_order) if inner is not UNDEFINED]
        return _joined("{", parts, "}", newline, step)
    if isinstance(value, list | tuple):
        parts = [_text(inner, newline + step if newline else "", step) for inner in value]
        return _joined("[", parts, "]", newline, step)
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    assert isinstance(value, int | float)
    return _number(number(value))


def _joined(start: str, parts: list[str], end: str, newline: str, step: str) -> str:
    if not parts or not newline:
        return start + ",".join(parts) + end
    return start + newline + step + f",{newline}{step}".join(parts) + newline + end


def _order(item: tuple[str, object]) -> tuple[int, int]:
    """Array indices first, ascending; all others in the order in which they were added."""
    name = item[0]
    if _INDEX.fullmatch(name) and int(name) <= _MAX_INDEX:
        return 0, int(name)
    return 1, 0


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "null"
    if value == 0:
        return "0"  # minus zero too
    mantissa, _, exponent = f"{abs(value)!r}".partition("e")
    whole, _, fraction = mantissa.partition(".")
    if fraction == "0":
        fraction = ""
    digits = (whole + fraction).lstrip("0")
    # The value is 0.<digits> times ten to this power.
    point = len(whole) + int(exponent or 0) if whole != "0" else int(exponent or 0) - (len(fraction) - len(digits))
    digits = digits.rstrip("0")
    sign = "-" if value < 0 else ""
    if len(digits) <= point <= 21:
        return sign + digits + "0" * (point - len(digits))
    if 0 < point <= 21:
        return f"{sign}{digits[:point]}.{digits[point:]}"
    if -6 < point <= 0:
        return f"{sign}0.{'0' * -point}{digits}"
    power = point - 1
    rest = f".{digits[1:]}" if len(digits) > 1 else ""
    return f"{sign}{digits[0]}{rest}e{'+' if power > 0 else '-'}{abs(power)}"
