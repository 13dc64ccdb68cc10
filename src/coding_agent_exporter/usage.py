"""Takes the settings and a question, gives the text that `usage` prints: what was spent, out of the logs themselves.

    discover -> tail -> decode -> ledger -> tally -> table

The modules are the daemon's, and so are its rules; its state file is not touched. What the ledger has to remember lies
in a temporary file, as there may be far more of it than memory should hold.
"""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

from coding_agent_exporter import families, usagedetail, usagetable
from coding_agent_exporter.discover import Discovery
from coding_agent_exporter.inputs import Inputs
from coding_agent_exporter.pricing import Prices
from coding_agent_exporter.store import Batch, Store
from coding_agent_exporter.tail import Tail
from coding_agent_exporter.usageperiod import Calendar, Period
from coding_agent_exporter.usagetally import DIMENSIONS, Attributing, Dimension, Tally

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coding_agent_exporter.config import Settings
    from coding_agent_exporter.usagetally import Witness

Format = Literal["table", "json", "csv"]

Progress = Callable[[int, int], None]
"""Told how many bytes of how many have been read."""


class QuestionError(ValueError):
    """A question that makes no sense. One line, which opens with the flag."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked for. `since` and `until` are as they were written, empty where nothing bounds the period.

    Without `by`, a table is by model; `detail` has an order of its own, and takes neither `by` nor `until`.
    """

    by: tuple[Dimension, ...] = ()
    since: str = ""
    until: str = ""
    utc: bool = False
    format: Format = "table"
    detail: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """`text` is for standard output. `notes` are sentences for standard error."""

    text: str
    notes: tuple[str, ...] = ()


def parse_by(text: str) -> tuple[Dimension, ...]:
    """`model,day` as dimensions; none when the text is empty. Raises QuestionError."""
    found: list[Dimension] = []
    for part in map(str.strip, text.split(",") if text else ()):
        dimension = next((known for known in DIMENSIONS if known == part), None)
        if dimension is None:
            raise QuestionError(f"--by: {part!r} is not one of {', '.join(DIMENSIONS)}")
        if dimension in found:
            raise QuestionError(f"--by: {part!r} is given twice")
        found.append(dimension)
    return tuple(found)


def usage(
    settings: Settings, question: Question, *, clock: Callable[[], float] = time.time, width: int = 80,
    progress: Progress = lambda _done, _total: None,
) -> Answer:
    """Read everything and answer. `width` is that of the table in columns.

    Raises QuestionError, and OSError (StoreError among them) when there is no room for the temporary file.
    """
    now, calendar = clock(), Calendar(utc=question.utc)
    period = _period(question, calendar, now)
    by = question.by or ("model",)
    if question.detail:
        if question.format != "json":
            raise QuestionError("--detail: only with --format=json")
        if question.by or question.until:
            raise QuestionError("--detail: not with --by or --until, which the document of mngr does not know")
        detail = usagedetail.Detail()
        tally = Tally(usagedetail.BY, Period(), calendar)
        unreadable = read(settings, tally, detail, clock=clock, progress=progress)
        since = usagedetail.DEFAULT_SECONDS if not question.since else max(0, int(now) - int(period.since))
        text = usagedetail.document(tally, detail, now=int(now), since_seconds=since)
        return Answer(text, _notes(settings, period, unreadable, anything=bool(detail)))
    tally = Tally(by, period, calendar)
    unreadable = read(settings, tally, clock=clock, progress=progress)
    bounds = calendar.iso(period.since), calendar.iso(period.until)
    table = usagetable.Table(by, usagetable.rows(tally, by), bounds, int(now))
    match question.format:
        case "json":
            text = table.json()
        case "csv":
            text = table.csv()
        case _:
            text = table.text(width)
    return Answer(text, _notes(settings, period, unreadable, anything=bool(table.rows)))


def read(
    settings: Settings, tally: Tally, witness: Witness | None = None, *, clock: Callable[[], float] = time.time,
    progress: Progress = lambda _done, _total: None,
) -> int:
    """Count all that the configured roots hold. Returns how many logs and directories could not be
    read.

    Raises OSError, StoreError among them.
    """
    with tempfile.TemporaryDirectory(prefix="coding-agent-exporter-") as place:
        store = Store(Path(place) / "usage.db")
        try:
            ledger = Attributing(store, Prices().estimate, tally, witness)
            discovery, tail = Discovery(settings.roots), Tail(max_line=settings.input_max_line_size)
            inputs = Inputs(settings.roots, discovery, tail, ledger, None, ())
            ledger.now = clock()
            inputs.step(ledger.now, budget=0)
            total = sum(inputs.lag.values())
            more = bool(total)
            while more:
                ledger.now = clock()
                more = inputs.step(ledger.now)
                store.commit(Batch(ledger.flush(complete=False, now=ledger.now)))
                ledger.trim()
                inputs.take_changed(ledger.now)
                progress(min(total, _read_bytes(inputs)), total)
        finally:
            store.close()
    return sum(count for (_, _, state), count in inputs.states.items() if state == "unreadable")


@contextmanager
def tidy_end() -> Iterator[None]:
    """A terminal that is closed, or a time that is up, ends the command as Ctrl-C does: with its files removed."""

    def end(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    # What whoever started this ignores (nohup) stays ignored.
    taken = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _read_bytes(inputs: Inputs) -> int:
    return sum(amount for (name, _), amount in inputs.stats.items() if name == families.BYTES_READ.name)


def _period(question: Question, calendar: Calendar, now: float) -> Period:
    bounds = []
    for flag, text, end in (("--since", question.since, False), ("--until", question.until, True)):
        try:
            bounds.append(calendar.instant(text, now, end=end) if text else None)
        except ValueError as error:
            raise QuestionError(f"{flag}: {error}") from error
    since, until = bounds
    open_ended = Period()
    period = Period(open_ended.since if since is None else since, open_ended.until if until is None else until)
    if period.since >= period.until:
        first, last = calendar.iso(period.since), calendar.iso(period.until)
        raise QuestionError(f"--since: {first} is not before --until, {last}")
    return period


def _notes(settings: Settings, period: Period, unreadable: int, *, anything: bool) -> tuple[str, ...]:
    notes = []
    if unreadable:
        notes.append(f"{unreadable} of the logs and directories could not be read: `check` names them")
    if not anything:
        places = ", ".join(str(root.path) for root in settings.roots if root.kind != "telemetry")
        when = "" if period == Period() else " in this period"
        notes.append(f"no usage was found{when}; looked in {places}" if places else "no directories are configured")
    return tuple(notes)
