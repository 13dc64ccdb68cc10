"""Takes values decoded from JSON, gives what ECMAScript makes of them: coercions, key order, and JSON text.

A document that a JavaScript program reads and prints again is not what Python would print: whole floats lose their
`.0`, keys that are array indices come first, exponents look different. (ECMA-262: ToNumber, ToBoolean,
OrdinaryOwnPropertyKeys, Number::toString, SerializeJSONProperty.)
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_INDEX = re.compile(r"0|[1-9][0-9]{0,9}", re.ASCII)
_MAX_INDEX = 2**32 - 2
_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", re.ASCII)
_SURROGATE = re.compile("[\ud800-\udfff]")
_SPACE = "\t\n\v\f\r \xa0\u1680\u2028\u2029\u202f\u205f\u3000\ufeff" + "".join(map(chr, range(0x2000, 0x200b)))
"""What ECMAScript takes for white space; `str.strip` knows more of it, and less."""


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
    """`Number(value)`; NaN where it is none."""
    if value is None or value is False:
        return 0.0
    if isinstance(value, int | float):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    if isinstance(value, list):
        value = key(value)
    if isinstance(value, str):
        text = value.strip(_SPACE)
        if not text:
            return 0.0
        if re.fullmatch(r"0[xX][0-9a-fA-F]+|0[oO][0-7]+|0[bB][01]+", text, re.ASCII):
            return number(int(text, 0))
        if _DECIMAL.fullmatch(text):
            return float(text)
        if text in {"Infinity", "+Infinity", "-Infinity"}:
            return float(text)
    return math.nan


def key(value: object) -> str:
    """The property name that a value becomes: `object[value]`."""
    if isinstance(value, list):
        # The arrays in an array are joined by the same comma: what counts is the order of what is no array, or empty.
        leaves, rest = [], value[::-1]
        while rest:
            item = rest.pop()
            if isinstance(item, list) and item:
                rest += item[::-1]
            else:
                leaves.append("" if item is None else key(item))
        return ",".join(leaves)
    if isinstance(value, str):
        return value
    if is_number(value) and math.isinf(number(value)):
        return "Infinity" if number(value) > 0 else "-Infinity"
    return "[object Object]" if isinstance(value, dict) else dumps(value)


def dumps(value: object, indent: int = 0) -> str:
    """`JSON.stringify(value, null, indent)`."""
    out: list[str] = []
    # What is being written, outermost first, with its end. No recursion: documents can be nested deeper than Python's
    # stack is.
    opened: list[tuple[Iterator[tuple[str, object]], str]] = [(iter([("", value)]), "")]
    while opened:
        parts, end = opened[-1]
        before, inner = next(parts, (None, None))
        if before is None:
            out.append(end)
            opened.pop()
            continue
        out.append(before)
        if isinstance(inner, dict | list | tuple):
            start, end = "{}" if isinstance(inner, dict) else "[]"
            outer, line = (f"\n{' ' * indent * (len(opened) - less)}" if indent else "" for less in (1, 0))
            found = _parts(inner, line, ": " if indent else ":")
            out.append(start)
            opened.append((iter(found), outer + end if found else end))
        else:
            out.append(_leaf(inner))
    return "".join(out)


def _parts(value: dict[str, object] | list[object] | tuple[object, ...], line: str, colon: str
           ) -> list[tuple[str, object]]:
    """What is in an object or array, each with the text that stands before it."""
    named: list[tuple[str, object]]
    if isinstance(value, dict):
        named = [(f"{_leaf(name)}{colon}", inner) for name, inner in sorted(value.items(), key=_order)
                 if inner is not UNDEFINED]
    else:
        named = [("", inner) for inner in value]
    return [(f"{',' if place else ''}{line}{name}", inner) for place, (name, inner) in enumerate(named)]


def _leaf(value: object) -> str:
    if isinstance(value, str):
        # Half a surrogate pair cannot be encoded: it stays an escape.
        return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    assert isinstance(value, int | float)
    return _number(number(value))


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
