"""Takes sizes and a seed, gives a tree of usage logs that is always the same, and the truth about what it holds.

The lines have the shape of the recordings in `tests/data`: pi writes one event a message, OpenCode one with zeros
and two with the final figures, Claude Code and Codex running totals. Money is generated as a whole number of 1e-7
USD, so that the truth is an integer and owes nothing to the program that is measured.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MODELS = (
    "anthropic/claude-opus-4-8", "anthropic/claude-sonnet-4-6", "anthropic/claude-haiku-4-5", "openai/gpt-5.2",
    "openai/gpt-5.2-mini", "openai/gpt-5.2-codex", "google/gemini-3-pro", "google/gemini-3-flash",
    "openrouter/qwen3-coder", "openrouter/kimi-k2", "mistral/devstral-2", "deepseek/deepseek-v4",
)

SHARES = (("pi-coding", 0.55), ("opencode", 0.25), ("claude", 0.18), ("codex", 0.02))
"""What share of the agents each harness has."""

UNIT = 10**5
"""Costs are drawn in units of 1e-7 USD; so many pico-USD make one."""

_FORKED = 0.05
"""Share of the OpenCode sessions that are forked once."""

_START = 1_760_000_000_000  # epoch milliseconds


@dataclass
class Truth:
    """What a tree holds. `spent` is (source, cost mode) -> pico-USD; copies in forks are in none of it but `lines`."""

    lines: int = 0
    sessions: int = 0
    messages: int = 0
    tokens: int = 0
    copied: int = 0
    spent: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def usd(self) -> float:
        return sum(self.spent.values()) / 10**12


def generate(root: Path, *, events: int, sessions: int, agents: int = 200, seed: int = 1) -> Truth:
    """Write about `events` lines of `sessions` sessions of `agents` agents below `root`, as mngr lays them out.

    The number of lines is exact for one seed and set of sizes, and within a few percent of `events`.
    """
    truth = Truth()
    for number in range(agents):
        rng = random.Random(f"{seed}/{number}")  # noqa: S311  the same tree every time, not a secret
        source = _source(number, agents)
        share = events // agents
        count = max(1, sessions // agents)
        path = root / "agents" / f"agent-{rng.getrandbits(64):016x}" / "events" / source / "usage" / "events.jsonl"
        path.parent.mkdir(parents=True)
        agent = _Agent(source, rng, truth, start=_START + number * 60_000)
        with path.open("w", encoding="utf-8") as file:
            file.writelines(agent.lines(share, count))
    return truth


def _source(number: int, agents: int) -> str:
    reached = 0.0
    for source, share in SHARES:
        reached += share
        # Spread, so that any few agents in a row are a mix.
        if (number * 7919 % agents) < reached * agents - 1e-9:
            return source
    return SHARES[0][0]


class _Agent:
    """One agent's log. Time only moves on; two sessions are open at a time, as with a sub-agent."""

    def __init__(self, source: str, rng: random.Random, truth: Truth, *, start: int) -> None:
        self.source = source
        self.rng = rng
        self.truth = truth
        self.now = start
        self.written = 0

    def lines(self, events: int, sessions: int) -> Iterator[str]:
        each = max(1, events // sessions)
        makers = {"pi-coding": self.pi, "opencode": self.opencode, "claude": self.claude, "codex": self.codex}
        make = makers[self.source]
        # Claude Code's total is that of a process: two at once would mix two totals in one log.
        width = 1 if self.source == "claude" else 2
        for first in range(0, sessions, width):
            together = [make(each) for _ in range(first, min(first + width, sessions))]
            while together:
                active = self.rng.choice(together)
                for _ in range(self.rng.randrange(1, 12)):
                    line = next(active, None)
                    if line is None:
                        together.remove(active)
                        break
                    self.written += 1
                    self.truth.lines += 1
                    yield line

    def pi(self, events: int) -> Iterator[str]:
        rng, session, model = self.rng, self.pi_session(), self.rng.choice(MODELS)
        self.truth.sessions += 1
        for _ in range(events):
            if rng.random() < 0.01:
                model = rng.choice(MODELS)
            cost, tokens = self.figures()
            self.count(cost, sum(tokens))
            yield self.line(
                f'"event_id":"evt-pi-usage-{self.written}"', session, _cost(cost), _tokens(tokens), model)

    def opencode(self, events: int) -> Iterator[str]:
        rng, model = self.rng, self.rng.choice(MODELS)
        session = f"ses_{rng.getrandbits(96):024x}"
        self.truth.sessions += 1
        past: list[tuple[int, tuple[int, int, int, int]]] = []
        for _ in range(-(-events // 3)):
            message, (cost, tokens) = f"msg_{rng.getrandbits(80):020x}", self.figures()
            self.count(cost, sum(tokens))
            past.append((cost, tokens))
            for paid, counts in ((0, (0, 0, 0, 0)), (cost, tokens), (cost, tokens)):
                yield self.line(self.named(message), session, _cost(paid), _tokens(counts), model)
        if rng.random() < _FORKED:
            # A forked session fires its copies once, with new names and the final figures at once.
            session = f"ses_{rng.getrandbits(96):024x}"
            for cost, tokens in past[:20]:
                self.truth.copied += 1
                message = f"msg_{rng.getrandbits(80):020x}"
                yield self.line(self.named(message), session, _cost(cost), _tokens(tokens), model)

    def claude(self, events: int) -> Iterator[str]:
        """A process of its own for each session: its total starts at 0."""
        rng = self.rng
        session = f"{rng.getrandbits(32):08x}-0000-4000-8000-{rng.getrandbits(48):012x}"
        self.truth.sessions += 1
        total = 0
        for index in range(events):
            if index and rng.random() < 0.7:
                total += self.figures()[0]
            extra = (f',"total_duration_ms":{index * 9000},"total_api_duration_ms":{index * 7000},'
                     f'"total_lines_added":{index},"total_lines_removed":0')
            yield self.line(f'"event_id":"evt-{rng.getrandbits(128):032x}"', session, _cost(total, extra), "", "")
        self.spend(total)

    def codex(self, events: int) -> Iterator[str]:
        """With a cost, which real ones lack: prices come from a library whose speed is not ours to measure."""
        rng, model = self.rng, self.rng.choice(MODELS)
        session = f"{rng.getrandbits(32):08x}-0000-7000-8000-{rng.getrandbits(48):012x}"
        self.truth.sessions += 1
        total, tokens = 0, (0, 0, 0, 0)
        for _ in range(events):
            cost, more = self.figures()
            total += cost
            tokens = (tokens[0] + more[0], tokens[1] + more[1], tokens[2] + more[2], tokens[3] + more[3])
            yield self.line(
                f'"event_id":"line-{self.written}-usage"', session, _cost(total), _tokens(tokens), model,
                mode="SUBSCRIPTION")
        self.spend(total, "subscription")
        self.truth.tokens += sum(tokens)

    # -- pieces

    def pi_session(self) -> str:
        day, clock = _moment(self.now)
        started = f"{day}T{clock[:8].replace(':', '-')}-{clock[9:]}Z"
        bits = self.rng.getrandbits(128)
        return f"{started}_{bits >> 96:08x}-{bits >> 80 & 0xFFFF:04x}-7000-8000-{bits & 0xFFFFFFFFFFFF:012x}"

    def figures(self) -> tuple[int, tuple[int, int, int, int]]:
        draw = self.rng.random
        tokens = (int(draw() * 9000), int(draw() * 3000), int(draw() * 150_000), int(draw() * 4000))
        return 1000 + int(draw() * 500_000), tokens

    def named(self, message: str) -> str:
        return f'"event_id":"evt-{self.rng.getrandbits(128):032x}","message_id":"{message}"'

    def count(self, cost: int, tokens: int) -> None:
        self.spend(cost)
        self.truth.messages += 1
        self.truth.tokens += tokens

    def spend(self, cost: int, mode: str = "api_key") -> None:
        self.truth.spent[self.source, mode] += cost * UNIT

    def line(self, names: str, session: str, cost: str, tokens: str, model: str, *, mode: str = "API_KEY") -> str:
        self.now += 500 + int(self.rng.random() * 20_000)
        day, clock = _moment(self.now)
        tail = f',"model":"{model}","cost_mode":"{mode}"' if model else ',"rate_limits":null'
        return (
            f'{{"source":"{self.source}/usage","type":"cost_snapshot",{names},"timestamp":"{day}T{clock}Z",'
            f'"session_id":"{session}",{cost}{tokens}{tail}}}\n'
        )


def _cost(units: int, extra: str = "") -> str:
    return f'"cost":{{"total_cost_usd":{units // 10**7}.{units % 10**7:07d}{extra}}}'


def _tokens(counts: tuple[int, int, int, int]) -> str:
    return ',"tokens":{{"input":{},"output":{},"cache_read":{},"cache_creation":{}}}'.format(*counts)


def _moment(milliseconds: int) -> tuple[str, str]:
    """A date and a time of day, by a calendar whose months have 28 days: valid, in order, and quick to make."""
    days, rest = divmod(milliseconds - _START, 86_400_000)
    minutes, rest = divmod(rest, 60_000)
    months, day = divmod(days, 28)
    years, month = divmod(months, 12)
    date = f"{2022 + years}-{month + 1:02d}-{day + 1:02d}"
    return date, f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d}.{rest % 1000:03d}"
