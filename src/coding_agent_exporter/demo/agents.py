"""Takes the part of one made-up agent, gives what it does, as a generator of the times at which it does something.

Each is a generator over epoch milliseconds: what it yields is when it wants to be resumed, and what it then writes
bears that time or an earlier one. Whoever drives them needs no clock, and in which slices time passes makes no
difference.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from coding_agent_exporter.demo.work import COMPACT_AT, SYSTEM_TOKENS, Call, Context, Model, tools
from coding_agent_exporter.demo.writers import Instance, Log, Session, Truth, Usage, UsageLog, figures

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Generator, Iterator
    from pathlib import Path

    from coding_agent_exporter.demo.work import Tokens, Tool

    Steps = Generator[int, None, int]
    """Yields when to be resumed, returns when it is done."""

File = TypeVar("File", bound="Log | Instance")

MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000

PEAK_MS = 300
"""How long a context stays at its limit before it is compacted."""


@dataclass(frozen=True)
class Role:
    """One agent's part. Days are counted from 0, the day on which the fleet starts; -1: never.

    `models`: what it uses, the first one mostly. `turns`: model calls of a prompt, at most. `think`: minutes between
    prompts, about. `logged`: whether mngr writes down what it spends beside its session file. `crash`: the day on
    which its process is killed. `fork`: the day on which a session is forked. `only`: the one day on which it runs.
    `hours`: when its day begins and ends, by UTC; `weekends`: whether it works then too. `pace`: how many times as fast
    as usual its models, its tools and its user are.
    """

    kind: str
    name: str
    models: tuple[Model, ...]
    turns: int = 14
    think: float = 4.0
    logged: bool = False
    subscription: bool = False
    crash: int = -1
    fork: int = -1
    only: int = -1
    hours: tuple[float, float] = (8.8, 17.6)
    weekends: bool = False
    pace: float = 1.0


class Day(NamedTuple):
    """When somebody works; all in epoch milliseconds but `number`."""

    number: int
    begin: int
    lunch: int
    back: int
    end: int


@dataclass
class Host:
    """Where agents run: their home directory, and the files in it that are being written."""

    home: Path
    name: str
    truth: Truth = field(default_factory=Truth)
    files: list[Log | Instance] = field(default_factory=list)
    seen: Callable[[float], None] | None = None
    always: bool = False
    """Whether agents work round the clock."""
    tell: Callable[[int, str, str], None] | None = None
    """Told of what befalls agents: when, whom, what."""
    first_pid: int = 4000
    _pids: int = 0

    def pid(self) -> int:
        self._pids += 1
        return self.first_pid + 37 * self._pids

    def add(self, file: File) -> File:
        """A file that is written from now on."""
        self.files.append(file)
        return file

    def moment(self, at: int) -> None:
        """What the files say now is gone in a moment: whoever watches them looks now."""
        if self.seen is not None:
            self.flush(at)
            self.seen(at / 1000)

    def flush(self, at: int) -> None:
        for file in self.files:
            file.flush(at)
        self.files = [file for file in self.files if not file.ended]


class Agent:
    """What all kinds share: days, prompts, and pauses between them."""

    source = ""
    root = ""
    """The alias by which an exporter without settings knows the directory of its files."""

    def __init__(self, host: Host, role: Role, chance: random.Random) -> None:
        self.host, self.role, self.chance = host, role, chance
        self.context = Context(role.models[0], role.pace)

    def run(self, start: int) -> Iterator[int]:
        """All that the agent ever does."""
        done = start
        for day in self.days(start):
            begin = max(day.begin, done + 1_000)
            yield begin
            self.arrive(begin)
            at = done = begin + self.between(2_000, 90_000)
            crash = self.between(day.back, day.back + 2 * HOUR) if day.number == self.role.crash else 0
            forked = day.number != self.role.fork
            while at < day.end:
                yield at
                if crash and at >= crash - 5 * MINUTE:
                    yield from until(self.prompt(at), max(crash, at + 20_000))
                    at, crash = max(crash, at + 20_000), 0
                    yield at
                    self.crash(at)
                    at = done = at + 4 * MINUTE
                    yield at
                    self.arrive(at, resume=True)
                    continue
                # A process that is killed is one that has been there for a while.
                doomed = crash and at > crash - 30 * MINUTE
                used = (self.context.tokens or 0) > SYSTEM_TOKENS
                if used and not doomed and self.chance.random() < 0.05:
                    self.new_session(at)
                elif not forked and at > day.back:
                    forked = True
                    self.fork(at)
                at = done = yield from self.prompt(at)
                at += self.thinks() + 2_000
                if day.lunch <= at < day.back:
                    at = day.back + self.between(0, 5 * MINUTE)
            done = max(done + 1_000, day.end)
            yield done
            self.leave(done)

    def days(self, start: int) -> Iterator[Day]:
        """The days on which the agent works. For a job it is one, which ends when its work is done."""
        first, hours = start // DAY, self.role.hours
        number = 0
        while True:
            midnight = (first + number) * DAY
            weekday = (first + number + 3) % 7
            if self.host.always:
                yield Day(number, max(start, midnight), 0, 0, midnight + DAY)
            elif self.role.only in {-1, number} and (weekday < 5 or self.role.weekends):
                begin = midnight + int(hours[0] * HOUR) + self.between(-15 * MINUTE, 15 * MINUTE)
                end = midnight + int(hours[1] * HOUR) + self.between(-15 * MINUTE, 15 * MINUTE)
                lunch = midnight + int(11.9 * HOUR) + self.between(0, 50 * MINUTE)
                if end > start:
                    yield Day(number, max(begin, start), lunch, lunch + self.between(40 * MINUTE, HOUR), end)
            number += 1
            if 0 <= self.role.only < number:
                return

    def between(self, least: int, most: int) -> int:
        return self.chance.randrange(least, max(most, least + 1))

    def spend(self, at: int, pico: int | None, tokens: Tokens) -> None:
        model = self.context.model
        mode = "subscription" if self.role.subscription else "api_key"
        self.host.truth.add(at, Usage(self.root, self.source, model.provider, model.name, mode), pico, tokens)

    def choose(self) -> Model:
        models = self.role.models
        return models[0] if self.chance.random() < 0.75 else self.chance.choice(models)

    def calls(self) -> int:
        return 1 + self.between(0, self.role.turns)

    def thinks(self) -> int:
        return int(self.chance.expovariate(1 / (self.role.think * MINUTE)) / self.role.pace)

    # -- what differs from kind to kind

    def arrive(self, at: int, *, resume: bool = False) -> None:
        """The agent's process starts; to `resume` is to go on with the session that there was."""

    def leave(self, at: int) -> None:
        """The process ends."""

    def crash(self, at: int) -> None:
        """The process is killed."""

    def new_session(self, at: int) -> None:
        """A session with nothing in it."""

    def fork(self, at: int) -> None:
        """The session goes on in a copy."""

    def prompt(self, at: int) -> Steps:
        """One prompt: some model calls, and the tools they ask for. Returns when it is answered."""
        raise NotImplementedError


class Pi(Agent):
    """pi with the pi-telemetry extension: a session file and an instance file."""

    source = "pi-coding"
    root = "pi"
    omp = False

    def __init__(self, host: Host, role: Role, chance: random.Random) -> None:
        super().__init__(host, role, chance)
        logged = UsageLog(host.home / ".mngr", f"agent-{role.name}", self.source) if role.logged else None
        self.log = logged and host.add(logged)
        self.session: Session
        self.instance: Instance
        if logged:
            # The exporter reads usage logs first: what both files say goes by the log.
            self.root = "mngr"

    def arrive(self, at: int, *, resume: bool = False) -> None:
        if not resume:
            self._open_session(at)
        self._open_instance(at)

    def leave(self, at: int) -> None:
        self.session.exit(at)
        self.session.ended = True
        self.instance.exit(at)

    def crash(self, at: int) -> None:
        self.instance.kill(at)

    def new_session(self, at: int) -> None:
        self.leave(at)
        self.arrive(at + 1)

    def fork(self, at: int) -> None:
        parent: Session = self.session
        self.leave(at)
        self.session = self.host.add(Session(
            self._sessions, at + 1, self.chance, cwd=self._cwd, omp=self.omp, parent=parent))
        self._open_instance(at + 1)

    def prompt(self, at: int) -> Steps:
        instance, session, context, chance = self.instance, self.session, self.context, self.chance
        yield (at := at + 60)
        session.user(at, at - 50)
        instance.event(at, "agent_start")
        context.add(self.between(40, 900))
        left = self.calls()
        while left:
            left -= 1
            yield (at := at + self.between(30, 120))
            instance.event(at, "turn_start")
            if chance.random() < 0.012:
                yield (at := at + self.between(700, 3000))
                self._record(at, Call((0, 0, 0, 0), 0, 600, 0), "error", [])
                yield (at := at + 4_000)
                left += 1
                continue
            call = context.call(chance, at)
            asked = tools(chance, self.role.pace) if left else []
            stop = "toolUse" if asked else "length" if chance.random() < 0.02 else "stop"
            if chance.random() < 0.008:
                stop, asked, left = "aborted", [], 0
            yield (at := at + call.duration)
            names = self._record(at, call, stop, asked)
            instance.event(at, "message_end")
            ends = sorted((at + tool.duration, name, tool) for name, tool in zip(names, asked, strict=True))
            for name, tool in zip(names, asked, strict=True):
                session.start(at, name, tool)
            for end, name, tool in ends:
                # pi writes all results when the last tool is done, oh-my-pi each in its time.
                yield (at := max(at, end if self.omp else ends[-1][0]))
                session.result(at, name, tool)
                context.add(tool.tokens)
            context.settle()
            instance.event(at, "turn_end")
            if (context.percent or 0) >= COMPACT_AT:
                self.host.moment(at)
                yield (at := at + PEAK_MS)
                session.compaction(at, context.compact(chance))
                instance.event(at, "session_compact")
                self.host.moment(at)
        yield (at := at + 40)
        instance.event(at, "agent_end", busy=False)
        return at

    @property
    def _cwd(self) -> str:
        return f"/srv/{self.role.name}"

    @property
    def _sessions(self) -> Path:
        return self.host.home / (".omp" if self.omp else ".pi") / "agent" / "sessions"

    def _open_session(self, at: int) -> None:
        self.context = Context(self.choose(), self.role.pace)
        self.session = self.host.add(Session(self._sessions, at, self.chance, cwd=self._cwd, omp=self.omp))

    def _open_instance(self, at: int) -> None:
        self.instance = self.host.add(Instance(
            self.host.home / ".pi" / "agent" / "telemetry" / "instances", self.host.pid(), at, host=self.host.name,
            cwd=self._cwd, session=self.session.uuid, name=self.role.name, context=self.context,
        ))

    def _record(self, at: int, call: Call, stop: str, asked: list[Tool]) -> list[str]:
        self.spend(at, call.pico, call.tokens)
        if self.log is not None:
            self.log.event(at, self.session.name, timestamp=at - call.duration, **figures(call.pico, call.tokens),
                           model=self.context.model.full, cost_mode="API_KEY")
        return self.session.call(at, self.context.model, call, stop, asked)


class Omp(Pi):
    """oh-my-pi: the same, with its own additions to the session file."""

    source = "omp"
    root = "omp"
    omp = True


class Job(Pi):
    """pi as a job in a pod: one prompt, and gone."""

    def run(self, start: int) -> Iterator[int]:
        at = start + self.between(1_000, 20_000)
        yield at
        self.arrive(at)
        at = yield from self.prompt(at)
        yield (at := at + 500)
        self.leave(at)

    def calls(self) -> int:
        return self.role.turns


def until(steps: Steps, limit: int) -> Iterator[int]:
    """What is done before a time; the rest never happens."""
    for at in steps:
        if at >= limit:
            return
        yield at
