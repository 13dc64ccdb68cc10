"""Takes lines that msgspec refuses, gives them a second chance where they are JSON all the same."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, TypeVar

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

MALFORMED = (msgspec.MsgspecError, ValueError, RecursionError)
"""What msgspec raises on bytes it cannot take: malformed or mistyped JSON, bad UTF-8, nesting past its depth."""

# The escape of half a character, behind an even number of backslashes.
_SURROGATE = re.compile(rb"(?<!\\)((?:\\\\)*)\\u[dD][89a-fA-F][0-9a-fA-F]{2}")


def decode_line(decode: Callable[[bytes], T], line: bytes) -> T:
    r"""Decode one line; raises what is in `MALFORMED`.

    JavaScript writes a text that was cut through an emoji as the escape of half a character (`\ud83d`). JSON allows
    it, and every reader but msgspec takes it. Such escapes are replaced: no label or identity contains them.
    """
    try:
        return decode(line)
    except msgspec.ValidationError:
        raise
    except MALFORMED:
        mended = _SURROGATE.sub(rb"\1\\ufffd", line)
        if mended == line:
            raise
        return decode(mended)
