"""Takes the bytes that a terminal sends, gives keys by name; and takes a key, gives what it makes of the controls."""

from __future__ import annotations

import codecs
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from coding_agent_exporter.top.view import ORDERS, Controls

if TYPE_CHECKING:
    from coding_agent_exporter.top.view import Only

MAX_FILTER = 60

HELP = (
    ("q, Ctrl-C", "quit"),
    ("s, S", "sort by the next, the previous column"),
    ("r", "reverse the order"),
    ("/", "filter: words to look for; Enter keeps it, Esc clears it"),
    ("a", "all agents"),
    ("w", "only those that work"),
    ("i", "only those that wait for input"),
    ("l", "only those whose context is close to its limit, or was just now"),
    ("arrows, j k", "scroll; also PgUp PgDn Home End, Space"),
    ("?", "this help"),
)

_NAMES = {
    "\x1b[A": "up", "\x1b[B": "down", "\x1bOA": "up", "\x1bOB": "down", "\x1b[5~": "pgup", "\x1b[6~": "pgdn",
    "\x1b[H": "home", "\x1b[F": "end", "\x1bOH": "home", "\x1bOF": "end", "\x1b[1~": "home", "\x1b[4~": "end",
    "\r": "enter", "\n": "enter", "\x7f": "backspace", "\x08": "backspace", "\x15": "clear", "\x1b": "esc",
}
# A sequence, complete or still to be continued; or one character.
_KEY = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1bO.|(?P<part>\x1b(?:\[[0-?]*[ -/]*|O)?$)|.", re.DOTALL)

_ONLY: dict[str, Only] = {"a": "all", "w": "working", "i": "waiting", "l": "limit"}


class Keyboard:
    """Puts together what arrives in pieces: a slow line can tear a sequence, or a character, apart."""

    def __init__(self) -> None:
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""

    @property
    def waiting(self) -> bool:
        """Whether the beginning of a sequence is there: either more follows at once, or it was the Esc key."""
        return bool(self._rest)

    def feed(self, data: bytes) -> list[str]:
        """The keys that are complete now. Sequences that mean nothing here are left out."""
        text, self._rest = self._rest + self._characters.decode(data), ""
        keys = []
        for match in _KEY.finditer(text):
            if match["part"] is not None:
                self._rest = match["part"]
            else:
                keys.append(_NAMES.get(match[0], match[0]))
        return [key for key in keys if key.isalpha() or len(key) == 1]

    def flush(self) -> list[str]:
        """Nothing followed: what was waiting is a key of its own."""
        rest, self._rest = self._rest, ""
        return ["esc"] if rest else []


def press(controls: Controls, key: str, *, page: int = 10, most: int = 0) -> Controls | None:
    """The controls after a key; None when it quits. `page` agents fit on the screen, `most` can be scrolled out."""
    if controls.typing:
        return _edit(controls, key)
    if controls.help:
        return None if key == "q" else replace(controls, help=False)
    match key:
        case "q":
            return None
        case "s" | "S":
            step = 1 if key == "s" else -1
            order = ORDERS[(ORDERS.index(controls.order) + step) % len(ORDERS)]
            return replace(controls, order=order, reverse=False, offset=0)
        case "r":
            return replace(controls, reverse=not controls.reverse, offset=0)
        case "/":
            return replace(controls, typing=True)
        case "esc":
            return replace(controls, filter="", only="all", offset=0)
        case "a" | "w" | "i" | "l":
            return replace(controls, only=_ONLY[key], offset=0)
        case "?" | "h":
            return replace(controls, help=True)
    moved = {
        "up": controls.offset - 1, "k": controls.offset - 1, "down": controls.offset + 1, "j": controls.offset + 1,
        "pgup": controls.offset - page, "pgdn": controls.offset + page, " ": controls.offset + page,
        "home": 0, "end": most,
    }.get(key, controls.offset)
    return replace(controls, offset=max(0, min(most, moved)))


def _edit(controls: Controls, key: str) -> Controls:
    match key:
        case "enter":
            return replace(controls, typing=False)
        case "esc":
            return replace(controls, typing=False, filter="", offset=0)
        case "backspace":
            return replace(controls, filter=controls.filter[:-1], offset=0)
        case "clear":
            return replace(controls, filter="", offset=0)
    if len(key) == 1 and key.isprintable() and len(controls.filter) < MAX_FILTER:
        return replace(controls, filter=controls.filter + key, offset=0)
    return controls
