"""Takes agents, gives `top` the lines of its table: which of them, in what order, in columns that fit the screen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from coding_agent_exporter.top import words
from coding_agent_exporter.top.view import CLOSE, NEAR, State
from coding_agent_exporter.usagetable import columns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coding_agent_exporter.top.view import Agent, Controls, Order

Span = tuple[str, str]
"""Text, and the name of its style: one of `STYLES`."""

Line = tuple[Span, ...]

STYLES = ("", "title", "dim", "good", "warn", "bad", "key", "head", "sorted", "cursor")

_STATE_STYLES = {State.WORKING: "good", State.WAITING: "warn", State.STALE: "bad", State.UNKNOWN: "", State.RECENT: ""}
_RANKS = {state: rank for rank, state in enumerate(State)}


@dataclass(slots=True)
class _Column:
    """A column: `width` at least, `wanted` at best. Columns give way in the order of `rank`, the highest first.

    `tail`: what is too long loses its beginning. Models have their families and versions at the end.
    """

    title: str
    rank: int
    width: int
    order: Order | None = None
    right: bool = False
    tail: bool = False
    wanted: int = 0


# -- which agents, and in what order


def chosen(agents: Sequence[Agent], controls: Controls) -> list[Agent]:
    """Those that the controls let through, sorted. What is not known comes last, however the order is turned."""
    tests = controls.filter.casefold().split()
    kept = [agent for agent in agents if _wanted(agent, controls) and all(test in _text(agent) for test in tests)]
    kept.sort(key=lambda agent: (agent.root, agent.pid is None, agent.pid or 0, agent.session))
    known = [(value, agent) for agent in kept if (value := _value(agent, controls.order)) is not None]
    known.sort(key=lambda item: item[0], reverse=controls.reverse)
    return [agent for _, agent in known] + [agent for agent in kept if _value(agent, controls.order) is None]


def _wanted(agent: Agent, controls: Controls) -> bool:
    match controls.only:
        case "working":
            return agent.state is State.WORKING
        case "waiting":
            return agent.state is State.WAITING
        case "limit":
            return agent.peak is not None and agent.peak >= CLOSE
    return True


def _text(agent: Agent) -> str:
    """What a filter looks at."""
    texts = (str(agent.pid or ""), agent.root, agent.state, agent.model, agent.session, agent.branch)
    return " ".join(texts).casefold()


def _value(agent: Agent, order: Order) -> tuple[float | str, ...] | None:
    """What an agent is sorted by, the first on the screen having the least; None: it is not known."""
    match order:
        case "state":
            return (_RANKS[agent.state], -(agent.last or 0.0) if agent.state is State.RECENT else agent.since or 0.0)
        case "context":
            # The peak counts too: a context that was full a moment ago is what one looks for.
            return None if agent.peak is None else (-agent.peak, -(agent.percent or 0))
        case "cost":
            billed, imputed = agent.today.billed, agent.today.imputed
            if billed is None and imputed is None:
                return None
            return (-(billed.total if billed else 0), -(imputed.total if imputed else 0))
        case "tokens":
            return (-agent.rate,) if agent.rate > 0 else None
        case "last":
            return None if agent.last is None else (-agent.last,)
        case "session":
            return (agent.session.casefold(),) if agent.session else None
        case "pid":
            return None if agent.pid is None else (agent.pid,)


# -- columns


def table(
    agents: Sequence[Agent], controls: Controls, *, now: float, width: int, unicode: bool, first: int, most: int,
) -> list[Line]:
    """The heading, and `most` agents from the `first` on. Columns fit all agents: scrolling does not move them."""
    layout = _layout(agents, width, unicode=unicode)
    head: list[Span] = []
    for column in layout:
        text = words.fit(column.title, column.width, unicode=unicode, right=column.right)
        before, _, after = text.partition(column.title)
        style = "sorted" if column.order == controls.order else "head"
        head += [(f" {before}" if head else before, "head"), (column.title, style), (after, "head")]
    used = sum(column.width for column in layout) + len(layout) - 1
    head.append((" " * (width - used), "head"))
    return [tuple(head), *(_row(agent, layout, now, unicode=unicode) for agent in agents[first:first + most])]


def _layout(agents: Sequence[Agent], width: int, *, unicode: bool) -> list[_Column]:
    """The columns that there is room for. Names share what is left over, then the bar takes some."""
    def longest(texts: list[str], most: int) -> int:
        return min(most, max(columns(words.name(text, unicode=unicode)) for text in texts))

    roots = {agent.root for agent in agents}
    sessions = longest([agent.session for agent in agents], 40)
    models = longest([agent.model for agent in agents], 30)
    branches = longest([agent.branch for agent in agents], 30)
    root = longest(list(roots), 12)
    wanted = [
        _Column("PID", 0, max(5, *(len(str(agent.pid or "")) for agent in agents)), "pid", right=True),
        _Column("ROOT", 10, max(4, root)),
        _Column("STATE", 1, 7, "state"),
        _Column("FOR", 5, 4, right=True),
        _Column("CONTEXT", 2, 12, "context", wanted=24),
        _Column("PEAK", 6, 5, "context", right=True),
        _Column("MODEL", 7, 9, tail=True, wanted=models),
        _Column("SESSION", 3, 9, "session", wanted=sessions),
        _Column("BRANCH", 11, 8, wanted=branches),
        _Column("TODAY", 4, 9, "cost", right=True),
        _Column("TOK/M", 9, 5, "tokens", right=True),
        _Column("LAST", 8, 4, "last", right=True),
    ]
    left_out = {"ROOT"} if len(roots) < 2 else set()
    left_out |= {"BRANCH"} if not branches else set()
    layout = sorted((column for column in wanted if column.title not in left_out), key=lambda column: column.rank)
    while len(layout) > 1 and sum(column.width + 1 for column in layout) - 1 > width:
        layout.pop()
    layout.sort(key=wanted.index)
    spare = width - sum(column.width + 1 for column in layout) + 1
    for titles in (("MODEL", "SESSION", "BRANCH"), ("CONTEXT",)):
        growing = [column for column in layout if column.title in titles]
        while spare > 0 and (growing := [column for column in growing if column.width < column.wanted]):
            min(growing, key=lambda column: column.width).width += 1
            spare -= 1
    return layout


def _row(agent: Agent, layout: list[_Column], now: float, *, unicode: bool) -> Line:
    gone = agent.state is State.STALE
    line: list[Span] = []
    for column in layout:
        spans = _cell(agent, column, now, unicode=unicode)
        line += [(" " if line else "", "")] + [(text, "dim" if gone and style != "bad" else style)
                                               for text, style in spans]
    return tuple(line)


def _cell(agent: Agent, column: _Column, now: float, *, unicode: bool) -> list[Span]:
    text, style = "", ""
    match column.title:
        case "PID":
            text = str(agent.pid or "-")
        case "ROOT":
            text = words.name(agent.root, unicode=unicode)
        case "STATE":
            text, style = agent.state.value, _STATE_STYLES[agent.state]
        case "FOR":
            text = words.age(agent.since, now)
        case "CONTEXT":
            return _context(agent, column.width, unicode=unicode)
        case "PEAK":
            # Only where it says more than the percent beside it does.
            if agent.peak is not None and agent.peak != agent.percent:
                text, style = words.percent(agent.peak), _heat(agent.peak)
        case "MODEL":
            text = words.name(agent.model, unicode=unicode) or "-"
        case "SESSION":
            text = words.name(agent.session, unicode=unicode) or "-"
        case "BRANCH":
            text = words.name(agent.branch, unicode=unicode) or "-"
        case "TODAY":
            text = words.spent(agent.today)
        case "TOK/M":
            text = words.count(agent.rate)
        case "LAST":
            text = words.age(agent.last, now)
    return [(words.fit(text, column.width, unicode=unicode, right=column.right, tail=column.tail), style)]


def _context(agent: Agent, width: int, *, unicode: bool) -> list[Span]:
    """A bar and a number; an empty bar where the percent is not known, nothing of an agent that says nothing."""
    if agent.pid is None or agent.state is State.STALE:
        return [(" " * width, "")]
    full, empty = ("█", "░") if unicode else ("#", ".")
    size = width - 6
    filled = 0 if agent.percent is None else round(min(100.0, agent.percent) * size / 100)
    heat = _heat(agent.percent)
    number = f" {words.percent(agent.percent):>5}"
    return [(full * filled, heat or "good"), (empty * (size - filled), "dim"), (number, heat)]


def _heat(percent: float | None) -> str:
    return "" if percent is None or percent < CLOSE else "warn" if percent < NEAR else "bad"
