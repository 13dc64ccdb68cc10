"""Takes the recordings, gives lines and instance files that are damaged in every way that is known to hurt readers.

All of it from a seed: the same one gives the same bytes.
"""

from __future__ import annotations

import faulthandler
import json
import random
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from support import CAPTURES, DATA

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WATCHDOG = 1800.0
"""Seconds after which a test is taken to hang: many times what the slowest machine takes for the longest form."""

SPECIAL = {
    "@HUGE@": b"1" + b"0" * 400, "@LONG@": b"9" * 5000, "@EXP@": b"1e999", "@NEXP@": b"-1e999", "@TINY@": b"1e-999",
    "@NAN@": b"NaN", "@INF@": b"Infinity", "@NINF@": b"-Infinity", "@ZERO@": b"-0", "@LEAD@": b"007", "@PLUS@": b"+1",
    "@DEEP@": b"[" * 1100 + b"]" * 1100, "@DEEPER@": b'{"a":' * 1100 + b"1" + b"}" * 1100, "@OPEN@": b"[" * 300,
    "@HALF@": rb'"\ud83d"', "@HALVES@": rb'"\udc00\ud83d\\\ud83d"', "@BAD@": b'"\xff\xfe\xc3"',
    "@SUR@": b'"\xed\xa0\x80"',
    "@TRUE@": b"True", "@SINGLE@": b"'a'", "@NOTHING@": b"", "@RAW@": b'"a\x01\x00b"', "@ESC@": rb'"\q\u12"',
}
"""Values that no encoder writes."""

ODD: tuple[Any, ...] = (
    *SPECIAL, None, True, False, 0, -1, 1, 2**31, 2**53, 2**53 + 1, 2**63, 2**64, -(2**63), 1e308, 5e-324, 0.1, 1e6,
    1_000_001, 253_402_300_800_000, 253_402_300_799_999, 1_795_225_187_616, "", " ", "0", "NaN", "true", "null",
    "SUBSCRIPTION", "API_KEY", "cost_snapshot", "session", "message", "compaction", "custom", "title", "assistant",
    "toolResult", "user", "2026-11-21T01:39:48Z", "0001-01-01T00:00:00Z", "0001-01-01T00:00:00+14:00",
    "9999-12-31T23:59:59.999999-14:00", "1969-12-31T23:59:59Z", "2026-02-30T00:00:00Z", "2026-11-21T01:39:60Z",
    "2026-11-21T24:00:00Z", "2026-11-21", "2026-11-21T01:39:48.123456789Z", "2026-W47-6", "2026-11-21T01:39:48",
    "20261121T013948Z", "-2026-11-21T00:00:00Z", "tomorrow", "\u2028\u2029", "\ufeff", "\x00", "\n", "\r\n",
    "//", "../../etc/passwd", "{}", "}{", [], {}, [[]], [{}], {"": {}}, {"a": None}, [1, "a", None, {"b": [2]}],
    {"total": "1"}, {"total": -1}, {"total": 1e300}, {"total_cost_usd": True}, {"input": 1.5}, {"w": 5},
    {"five_hour": {"used_percentage": "x"}}, {"five_hour": {"used_percentage": 50, "resets_at": -1}},
    [{"type": "toolCall", "id": {}, "name": []}], [{"type": "toolCall", "id": "t", "name": "n"}] * 3,
)


class Mutator:
    """Damages the lines of a corpus."""

    def __init__(self, corpus: list[bytes], seed: int) -> None:
        self.corpus = corpus
        self.chance = random.Random(seed)

    def line(self, line: bytes = b"") -> bytes:
        """One damaged line, of the corpus if none is given; a newline may be in it."""
        chance = self.chance
        line = line or chance.choice(self.corpus)
        if chance.random() < 0.6:
            line = self._field(line)
        for _ in range(chance.choice((0, 1, 1, 1, 2, 5))):
            line = chance.choice(_BYTES)(line, chance, self.corpus)
        return line

    def document(self, pid: int) -> bytes:
        """As `line`, of an instance file of this process."""
        document = json.loads(self.chance.choice(self.corpus))
        document["process"]["pid"] = pid
        return self.line(json.dumps(document).encode())

    def _field(self, line: bytes) -> bytes:
        chance = self.chance
        value = json.loads(line)
        for _ in range(chance.choice((1, 1, 1, 2, 4))):
            parent: Any = value
            while True:
                if not isinstance(parent, dict | list) or not parent:
                    break
                key: Any = chance.choice(list(parent)) if isinstance(parent, dict) else chance.randrange(len(parent))
                if isinstance(parent[key], dict | list) and parent[key] and chance.random() < 0.7:
                    parent = parent[key]
                    continue
                match chance.randrange(8):
                    case 0:
                        del parent[key]
                    case 1 if isinstance(parent, dict):
                        name = chance.choice((f"{key}x", key.upper(), "", "type", "usage", "id"))
                        parent[name] = deepcopy(chance.choice(ODD))
                    case _:
                        parent[key] = deepcopy(chance.choice(ODD))
                break
        line = json.dumps(value, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")
        if b"@" in line:
            for name, bytes_of_it in SPECIAL.items():
                line = line.replace(f'"{name}"'.encode(), bytes_of_it)
        return line


def _flip(line: bytes, chance: random.Random, _: list[bytes]) -> bytes:
    changed = bytearray(line or b" ")
    for _time in range(chance.choice((1, 1, 2, 8))):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _cut(line: bytes, chance: random.Random, _: list[bytes]) -> bytes:
    return line[: chance.randrange(len(line) + 1)]


def _behead(line: bytes, chance: random.Random, _: list[bytes]) -> bytes:
    return line[chance.randrange(len(line) + 1) :]


def _splice(line: bytes, chance: random.Random, corpus: list[bytes]) -> bytes:
    other = chance.choice(corpus)
    return line[: chance.randrange(len(line) + 1)] + other[chance.randrange(len(other) + 1) :]


def _glue(line: bytes, chance: random.Random, corpus: list[bytes]) -> bytes:
    return line + chance.choice((b"", b" ", b",", b"\x00", b"\r")) + chance.choice(corpus)


def _insert(line: bytes, chance: random.Random, _: list[bytes]) -> bytes:
    at = chance.choice((0, len(line), chance.randrange(len(line) + 1)))
    return line[:at] + chance.choice(_PIECES) + line[at:]


def _double(line: bytes, chance: random.Random, _: list[bytes]) -> bytes:
    """A key twice."""
    return line.replace(b"{", b"{" + chance.choice(_MEMBERS) + b",", chance.choice((1, 2)))


def _break(line: bytes, chance: random.Random, _: list[bytes]) -> bytes:
    return line.replace(b", ", b",\n" + chance.choice((b"", b" ", b"{")), 1)


def _token(line: bytes, chance: random.Random, _: list[bytes]) -> bytes:
    found = chance.choice((b"{", b"}", b'"', b":", b",", b"[", b"0", b"T", b"Z", b"null"))
    return line.replace(found, chance.choice((b"", b"{", b"}", b'"', b"[", b"]", b"\\", b"\\\"", b"\\u", b"e", b"-",
                                              b"\n")), 1)


_BYTES: tuple[Callable[[bytes, random.Random, list[bytes]], bytes], ...] = (
    _flip, _cut, _behead, _splice, _glue, _insert, _double, _break, _token)

_PIECES = (b"\xef\xbb\xbf", b"\x00", b"\x00" * 64, b"\r\n", b"\r", b"\n", b"\n\n", b" ", b"\xe2\x80\xa8", b"\xff\xfe",
           b"\xc3", b"\xed\xa0\x80", b"\\ud83d", b"{}", b"}{", b"}", b"{", b"[]", b"\x1a", b"\x0b", b"\x85",
           *SPECIAL.values())

_MEMBERS = (b'"type":"x"', b'"session_id":"other"', b'"cost":[]', b'"timestamp":0', b'"usage":7', b'"id":null',
            b'"":""', b'"message":{}', b'"tokens":{"input":-1}', b'"pid":"1"')


def good_event(number: int) -> bytes:
    return json.dumps({
        "type": "cost_snapshot", "timestamp": "2026-12-01T00:00:00Z", "session_id": f"good-{number}",
        "message_id": f"good-{number}", "model": "good/model", "cost": {"total_cost_usd": 0.25},
        # The very same figures at the start of a session would be a fork's copy.
        "tokens": {"input": number, "output": 2, "cache_read": 3, "cache_creation": 4},
    }).encode()


def good_entry(number: int) -> bytes:
    at = 1_796_083_200_000 + number
    return json.dumps({"type": "message", "id": f"good-{number}", "timestamp": "2026-12-02T00:00:00Z", "message": {
        "role": "assistant", "provider": "good", "model": "model", "timestamp": at, "stopReason": "stop",
        "content": [{"type": "text", "text": "SECRET"}],
        "usage": {"input": number, "output": 2, "cacheRead": 3, "cacheWrite": 4, "cost": {"total": 0.25}},
    }}).encode()


def lines_in(data: bytes) -> list[bytes]:
    return [line for line in data.split(b"\n") if line and not line.isspace()]


def usage_corpus() -> list[bytes]:
    return _lines(*CAPTURES.rglob("usage/events.jsonl"))


def session_corpus() -> list[bytes]:
    return _lines(*CAPTURES.rglob("sessions/**/*.jsonl"), *(DATA / "spans/cases").glob("*.jsonl"))


def heartbeat_corpus() -> list[bytes]:
    found = [json.loads(line) for line in _lines(*(DATA / "heartbeats").glob("*.jsonl"))]
    return [json.dumps(entry["doc"]).encode() for entry in found if isinstance(entry.get("doc"), dict)]


def _lines(*paths: Any) -> list[bytes]:
    return [line for path in sorted(paths) for line in path.read_bytes().split(b"\n") if line.strip()]


@contextmanager
def watchdog() -> Iterator[None]:
    """Ends the process with all stacks when what is inside hangs."""
    faulthandler.dump_traceback_later(WATCHDOG, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
