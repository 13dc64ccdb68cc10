"""Takes what one step changed, gives it to the store; again, while that fails."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from coding_agent_exporter import families
from coding_agent_exporter.logs import fields
from coding_agent_exporter.schema import StoreError, UnusableError

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable

    from coding_agent_exporter.model import CounterKey
    from coding_agent_exporter.store import Batch, Store

log = logging.getLogger(__name__)


class Commits:
    """One batch at a time. Counts in `stats` what became of them; `stored` is told of each that is in the state file.

    Raises UnusableError where trying again does not help.
    """

    def __init__(self, store: Store, stats: Counter[CounterKey], stored: Callable[[Batch], None]) -> None:
        self._store = store
        self._stats = stats
        self._stored = stored
        self._batch: Batch | None = None
        self._failing = False
        for how in ("ok", "failed"):
            stats[families.COMMITS.name, (how,)] = 0

    @property
    def pending(self) -> bool:
        """Whether a batch could not be stored yet. Nothing may be read then: it would have nowhere to go."""
        return self._batch is not None

    def put(self, batch: Batch) -> bool:
        """Store a batch. Only while none is pending."""
        self._batch = batch
        return self.settle()

    def settle(self) -> bool:
        """Store what is pending. Returns whether nothing is any more."""
        if (batch := self._batch) is None:
            return True
        if not batch.empty:
            if not self.attempt(lambda: self._store.commit(batch)):
                return False
            if self._failing:
                log.info("the state file can be written again")
            self._failing = False
            self._stats[families.COMMITS.name, ("ok",)] += 1
            self._stored(batch)
        self._batch = None
        return True

    def attempt(self, change: Callable[[], None]) -> bool:
        """Make a change to the state file. Returns whether it could be made."""
        try:
            change()
        except UnusableError:
            raise
        except StoreError as error:
            self._note(error)
            return False
        return True

    def _note(self, error: StoreError) -> None:
        if not self._failing:
            log.error("counters stand still until this works", extra=fields(error=error))
        self._failing = True
        self._stats[families.COMMITS.name, ("failed",)] += 1
