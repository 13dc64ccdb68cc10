"""Takes a directory, a seed and a clock that is passed in, gives the files of a made-up fleet of agents, and the truth.

    fleet = Fleet(directory, seed=1, start=1_794_787_200.0)
    fleet.advance(now)
    fleet.truth.pico(since, until)

`directory` becomes a home directory: pi's session and instance files, oh-my-pi's sessions, and the usage logs of mngr
lie where they do for a user who configured nothing. Everything follows from seed, start and cast: in which slices time
passes makes no difference to the files, and no clock is read.
"""

from __future__ import annotations

import heapq
import random
from typing import TYPE_CHECKING

from coding_agent_exporter.demo.agents import Host, Job, Omp, Pi, Role
from coding_agent_exporter.demo.logged import Claude, Codex, OpenCode
from coding_agent_exporter.demo.work import CODEX, FLASH, GPT, HAIKU, OPUS, PREVIEW, QWEN, SONNET

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from coding_agent_exporter.demo.agents import Agent
    from coding_agent_exporter.demo.writers import Truth

KINDS: dict[str, type[Agent]] = {
    "pi": Pi, "omp": Omp, "job": Job, "opencode": OpenCode, "claude": Claude, "codex": Codex,
}

RUNAWAY_DAY = 5
"""The day, counted from the first one, on which agents loop for hours."""

DESK = (
    Role("pi", "checkout", (OPUS, SONNET), turns=24, crash=1),
    Role("pi", "search", (SONNET, HAIKU), logged=True, fork=2),
    Role("omp", "ledger", (SONNET, GPT), turns=20, think=6),
    Role("claude", "website", (OPUS,), subscription=True, turns=16, think=5),
    Role("codex", "infra", (CODEX,), turns=10, think=12),
)
"""A developer's machine, with a subscription."""

BENCH = (
    Role("pi", "mobile", (SONNET, OPUS), turns=18, think=5, hours=(7.6, 16.4)),
    Role("pi", "payments", (OPUS, HAIKU), turns=16, think=7, crash=6, hours=(9.5, 18.6)),
    Role("opencode", "catalog", (GPT, FLASH, QWEN), turns=18, think=6, fork=1, hours=(9.2, 18.0)),
    Role("codex", "preview", (PREVIEW,), turns=6, think=25),
    *(Role("pi", f"migration-{number}", (OPUS,), turns=60, think=0.05, only=RUNAWAY_DAY, hours=(12.6, 17.2))
      for number in range(1, 6)),
    Role("pi", "nightly", (HAIKU,), turns=30, think=1, hours=(2.0, 3.1), weekends=True),
)
"""Another one. Has a model in no price list, a job at night, and once a loop that nobody stops for hours."""

POD = (Role("job", "job", (SONNET,), turns=60),)
"""One job in a pod."""


class Fleet:
    """The agents of one home directory. `start` is epoch seconds: nothing happens before.

    `always`: agents work round the clock, from the start on, rather than in their hours. `kinds`: what a role's kind
    stands for.
    """

    def __init__(
        self, directory: Path, seed: int = 1, *, start: float, cast: Sequence[Role] = (*DESK, *BENCH),
        host: str = "laptop", always: bool = False, kinds: Mapping[str, type[Agent]] = KINDS,
    ) -> None:
        self._host = Host(directory, host, always=always)
        begin = round(start * 1000)
        self._due: list[tuple[int, int, Iterator[int]]] = []
        for number, role in enumerate(cast):
            chance = random.Random(f"{seed}/{host}/{role.name}")  # noqa: S311  the same every time, not a secret
            self._resume(begin, number, kinds[role.kind](self._host, role, chance).run(begin))

    @property
    def truth(self) -> Truth:
        return self._host.truth

    @property
    def done(self) -> bool:
        """Whether nothing will happen any more."""
        return not self._due

    def advance(self, now: float, seen: Callable[[float], None] | None = None) -> None:
        """Bring the files to where they are at `now`, epoch seconds, which must not go back.

        `seen` is called, with its time, at each moment whose files are overwritten within a second: an exporter that
        watches the directory sees them.
        """
        limit = round(now * 1000)
        self._host.seen = seen
        while self._due and self._due[0][0] <= limit:
            at, number, agent = heapq.heappop(self._due)
            self._resume(at, number, agent)
        self._host.flush(limit)

    def _resume(self, at: int, number: int, agent: Iterator[int]) -> None:
        due = next(agent, None)
        if due is not None:
            heapq.heappush(self._due, (max(at, due), number, agent))
