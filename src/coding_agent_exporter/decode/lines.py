"""Takes lines, gives each of them to a decoder by itself: what is beside a line never decides whether it counts.

Lines that msgspec refuses get a second chance where they are JSON all the same, or several objects in a row.
"""

from __future__ import annotations

import re
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from coding_agent_exporter.model import MAX_ID

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Iterator

T = TypeVar("T")

MALFORMED = (msgspec.MsgspecError, ValueError, RecursionError)
"""What msgspec raises on bytes it cannot take: malformed or mistyped JSON, bad UTF-8, nesting past its depth."""

OF_BLOCKS = ("bad_cost", "bad_tokens")
"""Reasons for which only a part of a line is rejected; for all others it is the line."""

LONG = 1 << 18
"""Lines of more bytes are read with care: what is made of a line can take thirty times its size."""

MAX_MEMBER = 1 << 14
"""In a long line, a member of more bytes that is no text has the wrong type, whatever it is."""

_raw = msgspec.json.Decoder(msgspec.Raw)

# A string that does not end goes to the end of the line: looking for its end again and again would take for ever.
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[{}]', re.DOTALL)

# The escape of half a character, behind an even number of backslashes.
_SURROGATE = re.compile(rb"(?<!\\)((?:\\\\)*)\\u[dD][89a-fA-F][0-9a-fA-F]{2}")

_TOO_LARGE = object()


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
        if b"\\ud" not in line and b"\\uD" not in line:
            raise
        mended = _SURROGATE.sub(rb"\1\\ufffd", line)
        if mended == line:
            raise
        return decode(mended)


class Members:
    """Reads some members of an object, by name. Large ones become what has no type; those in `raw` stay bytes."""

    def __init__(self, *names: str, raw: tuple[str, ...] = ()) -> None:
        self._raw = raw
        self._names = names
        kind = msgspec.defstruct("Members", [(name, msgspec.Raw, msgspec.Raw()) for name in (*names, *raw)])
        self._decode: Callable[[bytes], Any] = msgspec.json.Decoder(kind).decode

    def read(self, line: bytes) -> dict[str, Any]:
        """The members that are there; raises what is in `MALFORMED`: a ValidationError where it is no object."""
        found = decode_line(self._decode, line)
        members: dict[str, Any] = {name: getattr(found, name) for name in self._raw}
        for name in self._names:
            value = bytes(getattr(found, name))
            if value:
                small = len(value) <= MAX_MEMBER or value.startswith(b'"')
                members[name] = msgspec.json.decode(value) if small else _TOO_LARGE
        return members


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
    ends = [] if is_json(line) else _ends(line)
    if not ends:
        return [line]
    pieces = [line[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    rest = line[ends[-1]:]
    return pieces if not rest or rest.isspace() else [*pieces, rest]


def elements(array: bytes) -> Iterator[bytes]:
    """The objects in an array that is well-formed JSON, one by one."""
    start = depth = 0
    for token in _TOKEN.finditer(array):
        if token[0] == b"{":
            start = start if depth else token.start()
            depth += 1
        elif token[0] == b"}":
            depth -= 1
            if depth == 0:
                yield array[start:token.end()]


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
                if not is_json(line[start:token.end()]):
                    break
                start = token.end()
                ends.append(start)
    return ends


def is_json(line: bytes) -> bool:
    """Whether it is JSON of any kind."""
    try:
        decode_line(_raw.decode, line)
    except MALFORMED:
        return False
    return True
