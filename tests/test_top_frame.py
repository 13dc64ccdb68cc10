"""What `top` shows of what there is to be seen: whole frames."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coding_agent_exporter.top import words
from coding_agent_exporter.top.frame import Frame, frame
from coding_agent_exporter.top.table import STYLES, chosen
from coding_agent_exporter.top.view import ORDERS, Agent, Controls, Order, Spend, State, View
from coding_agent_exporter.usagetable import columns
from top_support import FLEET, NOW, money

if TYPE_CHECKING:
    from collections.abc import Iterator

EVIL = r"evil\x1b[2J\u202ename"
"""As a name of the fleet is shown."""


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The clock on the screen is local."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def draw(view: View = FLEET, *, width: int = 80, height: int | None = 14, unicode: bool = True,
         **controls: object) -> Frame:
    return frame(view, replace(Controls(), **controls), now=NOW, width=width, height=height,  # type: ignore[arg-type]
                 unicode=unicode)


def pids(order: Order, *, reverse: bool = False) -> list[int | None]:
    return [agent.pid for agent in chosen(FLEET.agents, Controls(order=order, reverse=reverse))]


def styles(made: Frame, text: str) -> set[str]:
    """The styles in which a text is shown."""
    return {style for line in made.lines for span, style in line if text in span}


def test_in_80_columns() -> None:
    """All that matters fits an ordinary terminal."""
    assert draw().text == """\
agents 3 working  2 waiting  1 recent  1 stale                by state  09:05:09
today  ~21.35 USD billed  3.20 estimated  4.10 USD imputed  5.00M tokens
rate   9.12 USD/h billed  1.20 USD/h imputed  129k tokens/min  over 5 min
limit  10646 refact…edger 97!!, now ?  210644 数据库…ation 95!!, now 94!  +1
   PID STATE    FOR CONTEXT       PEAK MODEL      SESSION       TODAY TOK/M LAST
210644 working   1h ██████  94!   95!! …-opus-4-8 数据…tion    (4.10) 12.0k   6s
 10642 working  42s ████░░  71         …-opus-4-8 fix …flow     12.35 84.2k   3s
 10646 working   5s ░░░░░░   ?    97!! …5.2-codex refa…dger     ~3.20 32.0k   6s
   777 waiting  25h █░░░░░  12         tiny-ctx   evil…name         -     -    -
 10644 waiting  12m █████░  88!        …onnet-4-5 01a1…f35d    0.4321     -  12m
     - recent     -                    …haiku-4-5 ses_…a81c   0.0200+   900   1m
 10648 stale    31m                    …-opus-4-8 old one           ?     -  33m

q quit  ? help  s sort  r reverse  / filter  a all  w works  i waits  l limit
"""


def test_the_frame_in_the_docs() -> None:
    """The page shows what the program does."""
    page = (Path(__file__).parents[1] / "docs" / "top.md").read_text(encoding="utf-8")
    assert f"```text\n{draw(height=13).text}```" in page


def test_in_120_columns() -> None:
    """More room: root and branch, names in full, longer bars."""
    assert draw(width=120, height=13, order="context").text == f"""\
agents 3 working  2 waiting  1 recent  1 stale                                                      by context  09:05:09
today  ~21.35 USD billed  3.20 estimated  4.10 USD imputed  5.00M tokens
rate   9.12 USD/h billed  1.20 USD/h imputed  129k tokens/min  over 5 min
limit  10646 refact…edger 97!!, now ?  210644 数据库…ation 95!!, now 94!  10644 01a1fb…9f35d 88!
   PID ROOT STATE    FOR CONTEXT       PEAK MODEL             SESSION                     BRANCH        TODAY TOK/M LAST
 10646 pi   working   5s ░░░░░░   ?    97!! gpt-5.2-codex     refactor ledger             main          ~3.20 32.0k   6s
210644 omp  working   1h ██████  94!   95!! claude-opus-4-8   数据库迁移 migration        db           (4.10) 12.0k   6s
 10644 pi   waiting  12m █████░  88!        claude-sonnet-4-5 01a1fbc2-74e7…-1cf90229f35d main         0.4321     -  12m
 10642 pi   working  42s ████░░  71         claude-opus-4-8   fix the login flow          fix/login     12.35 84.2k   3s
   777 omp  waiting  25h █░░░░░  12         tiny-ctx          {EVIL}       -                 -     -    -
     - mngr recent     -                    claude-haiku-4-5  ses_4f2a81c                 -           0.0200+   900   1m
 10648 pi   stale    31m                    claude-opus-4-8   old one                     main              ?     -  33m
q quit  ? help  s sort  r reverse  / filter  a all  w works  i waits  l limit
"""


def test_without_unicode() -> None:
    """A terminal that knows ASCII only gets bars of # and names with escapes, as wide as they are shown."""
    made = draw(unicode=False)
    assert made.text.isascii()
    assert made.text == """\
agents 3 working  2 waiting  1 recent  1 stale                by state  09:05:09
today  ~21.35 USD billed  3.20 estimated  4.10 USD imputed  5.00M tokens
rate   9.12 USD/h billed  1.20 USD/h imputed  129k tokens/min  over 5 min
limit  10646 refact~edger 97!!, now ?  210644 \\u6570~ation 95!!, now 94!  +1
   PID STATE    FOR CONTEXT       PEAK MODEL      SESSION       TODAY TOK/M LAST
210644 working   1h ######  94!   95!! ~-opus-4-8 \\u65~tion    (4.10) 12.0k   6s
 10642 working  42s ####..  71         ~-opus-4-8 fix ~flow     12.35 84.2k   3s
 10646 working   5s ......   ?    97!! ~5.2-codex refa~dger     ~3.20 32.0k   6s
   777 waiting  25h #.....  12         tiny-ctx   evil~name         -     -    -
 10644 waiting  12m #####.  88!        ~onnet-4-5 01a1~f35d    0.4321     -  12m
     - recent     -                    ~haiku-4-5 ses_~a81c   0.0200+   900   1m
 10648 stale    31m                    ~-opus-4-8 old one           ?     -  33m

q quit  ? help  s sort  r reverse  / filter  a all  w works  i waits  l limit
"""


def test_narrow() -> None:
    """On a phone the most important columns are left, and items of the header that do not fit are counted."""
    assert draw(width=40, height=9).text == """\
agents 3 working  2 waiting  +2
today  ~21.35 USD billed  +3
rate   9.12 USD/h billed  +3
limit  10646 refact…edger 97!!, now ?
   PID STATE   CONTEXT      SESSION
210644 working ██████  94!  数据库…ation
 10642 working ████░░  71   fix th… flow
 10646 working ░░░░░░   ?   refact…edger
q quit  ? help  s sort          1-3 of 7
"""


def test_without_height() -> None:
    """For a pipe: all agents, no footer, no padding."""
    made = draw(height=None)
    assert made.text == "".join(f"{line}\n" for line in draw().text.splitlines()[:12])


def test_help_fits_the_smallest_common_terminal() -> None:
    """Each key and each mark is explained in 24 lines of 80 columns."""
    text = draw(help=True, height=24).text
    for word in ("q, Ctrl-C", "sort by the next", "estimated", "imputed", "how long ago the last model call"):
        assert word in text
    assert text.count("\n") == 24
    assert draw(help=True, width=200, height=24).text.splitlines()[4:23] == text.splitlines()[4:23]


def test_nobody() -> None:
    """Without agents it says where they would be seen; with a filter that hides all, how to get rid of it."""
    empty = View(places=("/home/dev/.pi/agent/telemetry/instances", "/srv/\x1b[31mred"))
    assert draw(empty, height=10).text == """\
agents none                                                   by state  09:05:09
today  nothing was used
rate   nothing in 5 min
limit  no context at 85 % or more

  no agents; they would be seen in
    /home/dev/.pi/agent/telemetry/instances
    /srv/\\x1b[31mred

q quit  ? help  s sort  r reverse  / filter  a all  w works  i waits  l limit
"""
    assert "a shows all, Esc drops the filter" in draw(filter="nowhere").text


def test_while_logs_are_read_agents_are_there() -> None:
    """A long history does not hide who works; how far it has come is in the first line."""
    first = draw(replace(FLEET, reading=0.427, unreadable=2), width=100).text.splitlines()[0]
    assert first.startswith("agents 3 working  2 waiting  1 recent  1 stale  reading logs 43%  2 unreadable, see check")


def test_colours_say_the_same_as_the_marks() -> None:
    """Each threshold has a colour, and a mark that is there without colour: 85 percent !, 95 percent !!."""
    made = draw()
    assert styles(made, " 88! ") == {"warn"}
    assert styles(made, "97!!") == {"bad"}
    assert styles(made, "  71  ") == {""}
    assert styles(made, "stale  ") == {"bad"}
    assert styles(made, "old one") == {"dim"}
    assert styles(made, "CONTEXT") == {"head"}
    assert styles(draw(order="context"), "CONTEXT") == {"sorted"}
    assert {style for line in made.lines for _, style in line} <= set(STYLES)


def test_what_is_below_a_threshold_does_not_look_like_it() -> None:
    """94.99 percent is 94, not 95; what exceeds three digits stays within its column."""
    assert [words.percent(value) for value in (None, 0.0, 84.99, 85.0, 94.99, 95.0, 102.4, 1e300)] == [
        "?  ", "0  ", "84  ", "85! ", "94! ", "95!!", "102!!", "999!!"]


@pytest.mark.parametrize(("seconds", "shown"), [
    (-5, "0s"), (0, "0s"), (59.9, "59s"), (60, "1m"), (3599, "59m"), (3600, "1h"), (48 * 3600 - 1, "47h"),
    (48 * 3600, "2d"), (999 * 86_400, "999d"), (1000 * 86_400, "2y"), (1e12, "999y"),
])
def test_ages(seconds: float, shown: str) -> None:
    """Rounded down, in four characters."""
    assert words.age(NOW - seconds, NOW) == shown


@pytest.mark.parametrize(("number", "shown"), [
    (0, "-"), (0.4, "-"), (1, "1"), (999, "999"), (999.6, "1.00k"), (1234, "1.23k"), (12_345, "12.3k"),
    (999_400, "999k"), (999_600, "1.00M"), (123_456_789, "123M"), (9e12, "9.00T"),
])
def test_counts(number: float, shown: str) -> None:
    """Three digits and a unit."""
    assert words.count(number) == shown


@pytest.mark.parametrize(("spend", "shown"), [
    (Spend(), "-"), (Spend(money(0)), "0"), (Spend(money(0.00001)), "<.0001"), (Spend(money(0.1234567)), "0.1235"),
    (Spend(money(12.345)), "12.35"), (Spend(money(12.345, 0.1)), "~12.35"), (Spend(money(0, known=False)), "?"),
    (Spend(None, money(3.5)), "(3.50)"), (Spend(money(1.5), money(3.5)), "1.50+"), (Spend(money(-0.5)), "-0.5000"),
])
def test_money(spend: Spend, shown: str) -> None:
    """Real and imputed money are told apart and never added; estimates and unknown prices are marked."""
    assert words.spent(spend) == shown


@pytest.mark.parametrize(("order", "expected"), [
    ("state", [210644, 10642, 10646, 777, 10644, None, 10648]),
    ("context", [10646, 210644, 10644, 10642, 777, None, 10648]),
    ("cost", [10642, 10646, 10644, None, 210644, 10648, 777]),
    ("tokens", [10642, 10646, 210644, None, 777, 10644, 10648]),
    ("last", [10642, 210644, 10646, None, 10644, 10648, 777]),
    ("session", [10644, 777, 10642, 10648, 10646, None, 210644]),
    ("pid", [777, 10642, 10644, 10646, 10648, 210644, None]),
])
def test_orders(order: Order, expected: list[int | None]) -> None:
    """By what one looks for first: who has worked longest, whose context is fullest, what costs most."""
    assert pids(order) == expected


def test_reversed_orders_leave_the_unknown_at_the_end() -> None:
    """What is not known is not the least."""
    assert pids("context", reverse=True) == [777, 10642, 10644, 210644, 10646, None, 10648]


@pytest.mark.parametrize(("controls", "expected"), [
    ({"filter": "OPUS main"}, [10648]), ({"filter": "omp"}, [210644, 777]), ({"filter": "10644"}, [210644, 10644]),
    ({"only": "working"}, [210644, 10642, 10646]), ({"only": "waiting"}, [777, 10644]),
    ({"only": "limit"}, [210644, 10646, 10644]),
])
def test_filters(controls: dict[str, str], expected: list[int]) -> None:
    """All words have to be somewhere in the line, in any case; or only agents of a kind are left."""
    asked = replace(Controls(), **controls)  # type: ignore[arg-type]
    assert [agent.pid for agent in chosen(FLEET.agents, asked)] == expected


def test_scrolling() -> None:
    """A long list scrolls below its heading; columns stay where they are; the footer says where one is."""
    many = View(tuple(Agent("pi", pid, State.WORKING, session=f"session {pid}") for pid in range(1, 41)))
    top, end = draw(many, order="pid"), draw(many, order="pid", offset=10**6)
    assert (top.page, top.most) == (8, 32)
    assert top.lines[4] == end.lines[4]
    assert "session 1 " in top.text.splitlines()[5]
    assert "session 40 " in end.text.splitlines()[12]
    assert top.text.splitlines()[-1].endswith("1-8 of 40")
    assert end.text.splitlines()[-1].endswith("33-40 of 40")


TEXTS = st.text(max_size=60) | st.sampled_from(
    ["数据库", "e\u0301\u0301", "\x1b]0;title\x07", "\u202e\u2066", "\ud800", "\n\r\t"])
AGENTS = st.builds(
    Agent, TEXTS, st.none() | st.integers(1, 2**31), st.sampled_from(State), st.none() | st.floats(-1e12, 1e12),
    st.none() | st.floats(0, 1e308), st.none() | st.floats(0, 1e308), TEXTS, TEXTS, TEXTS,
    st.builds(Spend, st.none() | st.builds(money, st.floats(-10, 1e5)), st.none() | st.builds(money, st.floats(0, 10))),
    st.floats(0, 1e15), st.none() | st.floats(-1e12, 1e12))


@settings(max_examples=150, deadline=None)
@given(st.lists(AGENTS, max_size=12), st.integers(1, 200), st.none() | st.integers(1, 40), st.sampled_from(ORDERS),
       TEXTS, st.booleans(), st.booleans())
def test_no_name_steers_the_terminal(agents: list[Agent], width: int, height: int | None, order: Order, text: str,
                                     unicode: bool, typing: bool) -> None:
    """Whatever agents call themselves, on a screen of any size: exactly its lines, none too wide, and nothing in them
    but characters that have a glyph, in known styles."""
    controls = Controls(order=order, filter=text, typing=typing, help=False)
    made = frame(View(tuple(agents), places=(text,)), controls, now=NOW, width=width, height=height, unicode=unicode)
    if height is not None:
        assert len(made.lines) == height
    for line in made.lines:
        shown = "".join(span for span, _ in line)
        assert columns(shown) <= width
        assert shown.isprintable()
        assert unicode or shown.isascii()
        assert {style for _, style in line} <= set(STYLES)
