"""What the keys of `top` do, and how they come out of what a terminal sends."""

from __future__ import annotations

import pytest

from coding_agent_exporter.top.keys import Keyboard, press
from coding_agent_exporter.top.view import ORDERS, Controls


def typed(controls: Controls, *keys: str, page: int = 5, most: int = 20) -> Controls:
    for key in keys:
        after = press(controls, key, page=page, most=most)
        assert after is not None, f"{key} quits"
        controls = after
    return controls


@pytest.mark.parametrize(("data", "keys"), [
    (b"q", ["q"]), (b"s/", ["s", "/"]), (b"\x1b[A\x1bOB\x1b[5~\x1b[6~", ["up", "down", "pgup", "pgdn"]),
    (b"\x1b[H\x1b[4~\r\x7f\x15", ["home", "end", "enter", "backspace", "clear"]),
    (b"\x1b[1;5C\x1b[200~x", ["x"]), ("é数".encode(), ["é", "数"]), (b"\xff", ["\ufffd"]),
    (b"\x1b\x1b[A", ["esc", "up"]),
])
def test_sequences(data: bytes, keys: list[str]) -> None:
    """Keys have names; sequences that mean nothing here are left out, not taken for letters."""
    assert Keyboard().feed(data) == keys


@pytest.mark.parametrize("data", [b"\x1b[5~", b"\x1bOA", "数".encode(), b"\x1b[1;5A"])
def test_a_slow_line_tears_sequences_apart(data: bytes) -> None:
    """Byte by byte a key is the same key."""
    keyboard = Keyboard()
    assert [key for byte in data for key in keyboard.feed(bytes([byte]))] == Keyboard().feed(data)
    assert not keyboard.waiting


def test_the_esc_key() -> None:
    """Esc is what nothing follows."""
    keyboard = Keyboard()
    assert keyboard.feed(b"\x1b") == []
    assert [keyboard.waiting, keyboard.flush(), keyboard.waiting, keyboard.flush()] == [True, ["esc"], False, []]


def test_sorting() -> None:
    """s goes through all orders and comes back, S the other way; each begins unreversed and at the top."""
    controls = Controls(offset=7, reverse=True)
    seen = []
    for _ in ORDERS:
        controls = typed(controls, "s")
        seen.append(controls.order)
    assert seen == [*ORDERS[1:], ORDERS[0]]
    assert controls == Controls()
    assert typed(controls, "S").order == ORDERS[-1]
    assert typed(controls, "r").reverse


def test_filter() -> None:
    """What is typed goes to the filter, keys that mean something else included; Enter keeps it, Esc clears it."""
    typing = typed(Controls(offset=4), "/", "q", "s", "x", "backspace", "up", " ", "1")
    assert (typing.filter, typing.typing, typing.offset) == ("qs 1", True, 0)
    kept = typed(typing, "enter")
    assert (kept.filter, kept.typing, kept.order) == ("qs 1", False, "state")
    assert typed(typing, "esc") == Controls()
    assert typed(typing, "clear").filter == ""
    assert len(typed(Controls(), "/", *"x" * 500).filter) == 60


def test_kinds() -> None:
    """w, i and l leave only agents of a kind; a and Esc show all."""
    assert [typed(Controls(), key).only for key in "wila"] == ["working", "waiting", "limit", "all"]
    assert typed(Controls(), "w", "esc").only == "all"


def test_scrolling_stays_within_the_list() -> None:
    """By lines and by pages, to both ends, and not beyond."""
    assert typed(Controls(), "up").offset == 0
    assert typed(Controls(), "down", "j", "k").offset == 1
    assert typed(Controls(), "pgdn", " ", "pgup").offset == 5
    assert typed(Controls(), "end").offset == 20
    assert typed(Controls(), "end", "down", "up").offset == 19
    assert typed(Controls(), "end", "home").offset == 0


def test_quitting_and_help() -> None:
    """q quits, in the help too; any other key leaves the help."""
    assert press(Controls(), "q") is None
    helped = typed(Controls(), "?")
    assert helped.help
    assert press(helped, "q") is None
    assert typed(helped, "s") == Controls()
    assert typed(Controls(), "unknown", "Z") == Controls()
