"""Takes lines, gives each of them to a decoder by itself: what is beside a line never decides whether it counts.

Lines that msgspec refuses get a second chance where they are JSON all the same, or several objects in a row.
"""

from __future__ import annotations

import re
from hashlib import blake2b
from typing import TYPE_CHECKING, TypeVar

import msgspec

from coding_agent_exporter.model import MAX_ID

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable

T = TypeVar("T")

MALFORMED = (msgspec.MsgspecError, ValueError, RecursionError)
"""What msgspec raises on bytes it cannot take: malformed or mistyped JSON, bad UTF-8, nesting past its depth."""

OF_BLOCKS = ("bad_cost", "bad_tokens")
"""Reasons for which only a part of a line is rejected; for all others it is the line."""

_raw = msgspec.json.Decoder(msgspec.Raw)

# A string that does not end goes to the end of the line: looking for its end again and again would take for ever.
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[{}]', re.DOTALL)

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


def decode_each(decode: Callable[[bytes], T], data: bytes) -> list[T]:
    """Decode a chunk of lines, each by itself; raises what is in `MALFORMED` if any is odd, an empty one included.

    msgspec's `decode_lines` would be a little faster, but takes an object that is broken over two lines for whole:
    it would count or not as the chunks happen to fall.
    """
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return list(map(decode, lines))


def lines_of(rejected: Counter[str]) -> int:
    """How many whole lines were rejected."""
    return rejected.total() - sum(rejected[reason] for reason in OF_BLOCKS)


def identifier(name: str) -> str:
    """What a session or message is known by: its name, or a digest in the place of what is too long to remember."""
    if len(name) <= MAX_ID:
        return name
    digest = blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return f"{name[: MAX_ID - len(digest)]}{digest}"


def objects(line: bytes) -> list[bytes]:
    """The objects that a line begins with, and what is left of it: mostly the line itself.

    Several are in one line when a writer died before its newline, and the next one wrote on. The first one would have
    been taken by itself, had it been read before the next one came.
    """
    ends = _ends(line)
    if not ends or (len(ends) == 1 and not line[ends[0]:].strip()):
        return [line]
    pieces = [line[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    rest = line[ends[-1]:]
    return pieces if not rest or rest.isspace() else [*pieces, rest]


def whole(partial: bytes) -> int:
    """How many bytes of an unterminated line are whole JSON objects (their writer died before the newline)."""
    if not partial.rstrip().endswith(b"}") and b"}{" not in partial:
        return 0
    ends = _ends(partial)
    return ends[-1] if ends else 0


def _ends(line: bytes) -> list[int]:
    """Where the well-formed objects end that a line begins with."""
    ends: list[int] = []
    start = depth = 0
    for token in _TOKEN.finditer(line):
        at, brace = token.start(), token[0]
        if depth == 0 and (brace != b"{" or line[start:at].strip()):
            break
        if brace == b"{":
            depth += 1
        elif brace == b"}":
            depth -= 1
            if depth == 0:
                if not _is_json(line[start:token.end()]):
                    break
                start = token.end()
                ends.append(start)
    return ends


def _is_json(line: bytes) -> bool:
    try:
        decode_line(_raw.decode, line)
    except MALFORMED:
        return False
    return True
