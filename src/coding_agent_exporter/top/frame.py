"""Takes a view, the controls and the size of a screen, gives `top` a frame: lines of text with styles. Pure."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coding_agent_exporter.top import words
from coding_agent_exporter.top.keys import HELP
from coding_agent_exporter.top.table import chosen, table
from coding_agent_exporter.top.view import CLOSE, NEAR, State
from coding_agent_exporter.usagetable import columns

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from coding_agent_exporter.top.table import Line, Span
    from coding_agent_exporter.top.view import Agent, Controls, View

_HEADER, _FOOTER = 4, 1

_LEGEND = (
    ("recent", "a session without a heartbeat, whose log grew in the last minutes"),
    ("stale", "the heartbeat is overdue: killed, stopped, or its host is gone"),
    ("! !!", f"context at {CLOSE} % or more, at {NEAR} % or more; PEAK: of late"),
    ("TODAY", "USD of the session since midnight; ~ estimated, ? price unknown,"),
    ("", "() imputed, not billed (subscription); + imputed money besides"),
    ("TOK/M", "tokens per minute over the last minutes, cached ones included"),
    ("LAST", "how long ago the last model call was recorded"),
)


@dataclass(frozen=True, slots=True)
class Frame:
    """What is on the screen. `page` agents fit on it, and `most` can be scrolled out at the top."""

    lines: tuple[Line, ...]
    page: int
    most: int

    @property
    def text(self) -> str:
        """Without styles and without spaces at the ends of lines; every line ends."""
        return "".join("".join(text for text, _ in line).rstrip() + "\n" for line in self.lines)


def frame(
    view: View, controls: Controls, *, now: float, width: int = 80, height: int | None = None, unicode: bool = True,
) -> Frame:
    """One frame of at most `width` columns and exactly `height` lines; without a height all agents, and no footer.

    `now` is epoch seconds. Without `unicode` every character is ASCII.
    """
    page = len(view.agents) if height is None else max(1, height - _HEADER - _FOOTER - 1)
    shown = chosen(view.agents, controls)
    most = max(0, len(shown) - page)
    offset = min(controls.offset, most)
    if controls.help:
        body = _help()
    elif shown:
        body = table(shown, controls, now=now, width=width, unicode=unicode, first=offset, most=page)
    else:
        body = _nothing(view, unicode=unicode)
    lines = [*_header(view, controls, now, width, unicode=unicode), *body]
    if height is not None:
        lines = lines[:max(0, height - _FOOTER)]
        lines += [()] * (height - _FOOTER - len(lines))
        lines.append(_footer(controls, width, len(shown), offset, page, unicode=unicode))
    return Frame(tuple(_cut(line, width) for line in lines), page, most)


def _header(view: View, controls: Controls, now: float, width: int, *, unicode: bool) -> list[Line]:
    states = [agent.state for agent in view.agents]
    styles = {State.WORKING: "good", State.WAITING: "warn"}
    agents: list[str | Span] = [
        (f"{states.count(state)} {state}", styles.get(state, "dim")) for state in State if state in states]
    right = [("by " + controls.order + (" reversed" if controls.reverse else ""), "dim"),
             (time.strftime("%H:%M:%S", time.localtime(now)), "")]
    if not states:
        agents.append(("none", "dim"))
    if view.reading is not None:
        agents.append((f"reading logs {view.reading:.0%}", "warn"))
    if view.unreadable:
        agents.append((f"{view.unreadable} unreadable, see check", "bad"))
    return [
        _items("agents", agents, width, right),
        _items("today", _today(view), width),
        _items("rate", _rate(view), width),
        _items("limit", _limits(view.agents, unicode=unicode), width),
    ]


def _today(view: View) -> list[str | Span]:
    spend = view.today
    found: list[str | Span] = []
    if spend.billed:
        found.append(f"{words.dollars(spend.billed)} USD billed")
        if spend.billed.estimated:
            found.append((f"{words.amount(spend.billed.estimated)} estimated", "dim"))
    if spend.imputed:
        found.append(f"{words.dollars(spend.imputed)} USD imputed")
    if spend.tokens:
        found.append(f"{words.count(spend.tokens)} tokens")
    return found or [("nothing was used", "dim")]


def _rate(view: View) -> list[str | Span]:
    found: list[str | Span] = []
    if view.billed:
        found.append(f"{words.amount(view.billed)} USD/h billed")
    if view.imputed:
        found.append(f"{words.amount(view.imputed)} USD/h imputed")
    if view.rate:
        found.append(f"{words.count(view.rate)} tokens/min")
    return [*found, (f"over {view.window // 60} min" if found else f"nothing in {view.window // 60} min", "dim")]


def _limits(agents: Iterable[Agent], *, unicode: bool) -> list[str | Span]:
    """Who is close to the limit now or was within the peak's window, the fullest first."""
    close = sorted(
        ((agent.peak, agent) for agent in agents if agent.peak is not None and agent.peak >= CLOSE),
        key=lambda item: (-item[0], item[1].root, item[1].pid or 0))
    if not close:
        return [(f"no context at {CLOSE} % or more", "dim")]
    found: list[str | Span] = []
    for peak, agent in close:
        now_at = "" if agent.percent == peak else f", now {words.percent(agent.percent).strip()}"
        session = words.fit(words.name(agent.session, unicode=unicode), 12, unicode=unicode).rstrip()
        found.append((f"{agent.pid} {session} {words.percent(peak).strip()}{now_at}",
                      "bad" if peak >= NEAR else "warn"))
    return found


def _items(title: str, items: Sequence[str | Span], width: int, right: Sequence[Span] = ()) -> Line:
    """A title and, behind it, as many items as there is room for, each whole; then what goes to the right end."""
    line: list[Span] = [(f"{title:<7}", "title")]
    room = width - 7
    for place, item in enumerate(items):
        text, style = item if isinstance(item, tuple) else (item, "")
        left = len(items) - place
        needed = columns(text) + (2 if place else 0)
        if needed > room - (len(f"  +{left}") if left > 1 else 0) and place:
            if room >= len(f"  +{left}"):
                line.append((f"  +{left}", "dim"))
            room = 0
            break
        line.append((("  " if place else "") + text, style))
        room -= needed
    for start in range(len(right)):
        ending = [("  ", ""), *(span for text, style in right[start:] for span in ((text, style), ("  ", "")))][:-1]
        if (size := sum(columns(text) for text, _ in ending)) <= room:
            return (*line, (" " * (room - size), ""), *ending)
    return tuple(line)


def _nothing(view: View, *, unicode: bool) -> list[Line]:
    if view.agents:
        return [(), (("  no agent is like that; a shows all, Esc drops the filter", "dim"),)]
    if view.reading is not None:
        return []
    lines: list[Line] = [(), (("  no agents; they would be seen in", "dim"),)]
    return [*lines, *(((f"    {words.name(place, unicode=unicode)}", "dim"),) for place in view.places)]


def _help() -> list[Line]:
    lines: list[Line] = [()]
    for texts in (HELP, _LEGEND):
        lines += [((f"  {key:<13}", "key"), (text, "")) for key, text in texts]
        lines.append(())
    return lines


def _footer(controls: Controls, width: int, total: int, offset: int, page: int, *, unicode: bool) -> Line:
    if controls.typing:
        typed = words.name(controls.filter, unicode=unicode)
        return (("filter: ", "title"), (typed, ""), (" ", "cursor"), ("  Enter keep  Esc clear", "dim"))
    parts = [("q", "quit"), ("?", "help"), ("s", "sort"), ("r", "reverse"), ("/", "filter"), ("a", "all"),
             ("w", "works"), ("i", "waits"), ("l", "limit")]
    where = ([f"/{words.name(controls.filter, unicode=unicode)}"] if controls.filter else []) + \
            ([controls.only] if controls.only != "all" else []) + \
            ([f"{offset + 1}-{min(total, offset + page)} of {total}"] if total > page else [])
    ending = "  ".join(where)
    line: list[Span] = []
    room = width - (columns(ending) + 2 if ending else 0)
    for key, text in parts:
        room -= len(key) + len(text) + 1 + (2 if line else 0)
        if room < 0:
            break
        line += [("  " if line else "", ""), (key, "key"), (f" {text}", "dim")]
    used = sum(columns(text) for text, _ in line)
    gap = " " * max(2 if line else 0, width - used - columns(ending))
    return (*line, (gap, ""), (ending, "title")) if ending else tuple(line)


def _cut(line: Line, width: int) -> Line:
    """The line as far as the screen goes; adjoining spans of one style are one."""
    kept: list[Span] = []
    for text, style in line:
        short = text if columns(text) <= width else _prefix(text, width)
        width -= columns(short)
        if kept and kept[-1][1] == style:
            kept[-1] = (kept[-1][0] + short, style)
        elif short:
            kept.append((short, style))
    return tuple(kept)


def _prefix(text: str, width: int) -> str:
    while columns(text) > width:
        text = text[:-1]
    return text
