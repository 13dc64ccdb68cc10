"""Takes signed figures from the accounts, gives exact deltas by counter series to the pipeline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING

from coding_agent_exporter import families
from coding_agent_exporter.model import CounterKey, Delta

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

REPORTED, ESTIMATED, INPUT, OUTPUT, CACHE_READ, CACHE_CREATION, MESSAGES, UNPRICED, SESSIONS = range(9)
SLOTS = 9

Labels = tuple[str, ...]
"""(root, source, provider, model, cost_mode[, agent])"""

Estimate = Callable[[str, str, tuple[int, int, int, int], datetime], int | None]
"""Provider, model, (input, output, cache_read, cache_creation) tokens and their time -> pico-USD, None if unknown."""

RUN = 64
"""So many events at the most are entered as one."""

MAX_LABEL = 200

OTHERS = 100
"""So many label sets are made past the cap that keep the source and the agent; so many more keep the source."""

OTHER = "other"
UNKNOWN = "unknown"

_FAMILIES: tuple[tuple[str, str | None], ...] = (
    (families.COST.name, "reported"),
    (families.COST.name, "estimated"),
    (families.TOKENS.name, "input"),
    (families.TOKENS.name, "output"),
    (families.TOKENS.name, "cache_read"),
    (families.TOKENS.name, "cache_creation"),
    (families.MESSAGES.name, None),
    (families.UNPRICED.name, None),
    (families.SESSIONS.name, None),
)


class Book:
    """Interned usage label sets and the figures added to each since the last flush.

    `cutoff` is the epoch second before which spend belongs to the baseline.
    Past `max_series` label sets, new ones are counted under provider and model "other"; where there are very many
    agents or sources too, under agent and source "other". `overflowed` says how often a name was left out of a label,
    by what it was a name of (a value of `reason` in `families.SERIES_DROPPED`).
    """

    bulk = True
    """Whether sums of several events may be entered as one."""

    def __init__(self, *, max_series: int, cutoff: float, keys: Iterable[Labels] = ()) -> None:
        self.keys: list[Labels] = list(keys)
        self.cutoff = cutoff
        self.overflowed: Counter[str] = Counter()
        self._saved = len(self.keys)
        self._index = {labels: number for number, labels in enumerate(self.keys)}
        self._max_series = max_series
        self._new: dict[int, list[int]] = {}
        self._base: dict[int, list[int]] = {}
        self._plain: dict[CounterKey, Delta] = {}
        self._models: dict[tuple[str, str, str | None, str, str], int] = {}

    def number(self, root: str, source: str, model: str | None, mode: str, agent: str = "") -> int:
        """The number of a usage label set. `model` as logs write it: `provider/model`, or no provider, or None."""
        quick = (root, source, model, mode, agent)
        number = self._models.get(quick)
        if number is None:
            provider, slash, name = (model or "").partition("/")
            if not slash:
                provider, name = "", provider
            labels = (root, source, clean(provider), clean(name), mode, *((agent,) if agent else ()))
            if labels not in self._index and len(self.keys) >= self._max_series:
                self.overflowed["usage"] += 1
                return self._number(self._other(labels))
            number = self._number(labels)
            if len(self._models) < 2 * self._max_series and len(model or "") <= 2 * MAX_LABEL:
                self._models[quick] = number
        return number

    def known(self, root: str, source: str, model: str | None, mode: str, agent: str = "") -> int | None:
        """As `number`, of a label set that there is already."""
        return self._models.get((root, source, model, mode, agent))

    def _number(self, labels: Labels) -> int:
        number = self._index.get(labels)
        if number is None:
            number = self._index[labels] = len(self.keys)
            self.keys.append(labels)
        return number

    def _other(self, labels: Labels) -> Labels:
        """The label set for what has none of its own: the closest one that is there, or may still be made."""
        root, source, _, _, mode, *agent = labels
        anybody = (OTHER,) * len(agent)
        near: Labels = (root, source, OTHER, OTHER, mode, *agent)
        if near in self._index or len(self.keys) < self._max_series + OTHERS:
            return near
        near = (root, source, OTHER, OTHER, mode, *anybody)
        if near in self._index or len(self.keys) < self._max_series + 2 * OTHERS:
            return near
        return (root, OTHER, OTHER, OTHER, mode, *anybody)

    def row(self, number: int, second: int) -> list[int]:
        """The slots to add to for a label set, for something that happened at an epoch second."""
        rows = self._base if second < self.cutoff else self._new
        row = rows.get(number)
        if row is None:
            row = rows[number] = [0] * SLOTS
        return row

    def move(self, before: int, after: int, amounts: Mapping[int, int], second: int) -> None:
        """Take amounts by slot from one label set to another: what a process or session had spent turned out to be
        of another cost mode."""
        source, target = self.row(before, second), self.row(after, second)
        for slot, amount in amounts.items():
            source[slot] -= amount
            target[slot] += amount

    def count(self, key: CounterKey, second: float, amount: int = 1) -> None:
        """Add to a counter that is no usage family."""
        delta = self._plain.setdefault(key, Delta())
        delta.amount += amount
        if second < self.cutoff:
            delta.baseline += amount

    def flush(self) -> tuple[dict[CounterKey, Delta], list[tuple[int, Labels]]]:
        """Everything added since the last flush, and the label sets that are new since then."""
        deltas, self._plain = self._plain, {}
        for rows, is_base in ((self._base, True), (self._new, False)):
            for number, row in rows.items():
                labels = self.keys[number]
                for slot, amount in enumerate(row):
                    # Messages that cost nothing are an answer too: their series of reported cost stands at 0.
                    free = slot == REPORTED and row[MESSAGES] and not row[ESTIMATED] and not row[UNPRICED]
                    if not amount and not free:
                        continue
                    name, extra = _FAMILIES[slot]
                    key = (name, labels if extra is None else (*labels, extra))
                    delta = deltas.setdefault(key, Delta())
                    delta.amount += amount
                    if is_base:
                        delta.baseline += amount
            rows.clear()
        created = [(number, self.keys[number]) for number in range(self._saved, len(self.keys))]
        self._saved = len(self.keys)
        return deltas, created


def clean(value: str) -> str:
    """A label value out of a name that somebody else wrote: bounded, encodable, never empty."""
    return value[:MAX_LABEL].encode("utf-8", "replace").decode() or UNKNOWN
