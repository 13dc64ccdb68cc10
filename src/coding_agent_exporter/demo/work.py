"""Takes a generator of chance, gives what model calls and tools of a made-up agent come to: tokens, money, time.

The figures follow how such agents are billed: a call reads what it knows from the provider's cache while that is warm,
writes what is new to it, and the context grows by both until it is compacted. Money is pico-USD, always whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import random

Tokens = tuple[int, int, int, int]
"""input, output, cache read, cache creation; they do not overlap."""

CACHE_MS = 300_000
"""How long a provider keeps what it cached."""

SYSTEM_TOKENS = 11_400
"""The context of a session in which nothing has been said."""

COMPACT_AT = 95.0
"""Percent of the context window at which an agent compacts."""


@dataclass(frozen=True)
class Model:
    """A model. `price`: pico-USD for each token of (input, output, cache read, cache creation), which is the price of
    a million tokens in micro-USD; None where nobody knows it. `speed`: output tokens a second."""

    provider: str
    name: str
    window: int
    price: Tokens | None
    speed: float

    @property
    def full(self) -> str:
        return f"{self.provider}/{self.name}"


OPUS = Model("anthropic", "claude-opus-4-8", 200_000, (5_000_000, 25_000_000, 500_000, 6_250_000), 38)
SONNET = Model("anthropic", "claude-sonnet-4-6", 200_000, (3_000_000, 15_000_000, 300_000, 3_750_000), 55)
HAIKU = Model("anthropic", "claude-haiku-4-5", 200_000, (1_000_000, 5_000_000, 100_000, 1_250_000), 150)
GPT = Model("openai", "gpt-5.2", 272_000, (1_750_000, 14_000_000, 175_000, 0), 50)
FLASH = Model("google", "gemini-3-flash", 400_000, (500_000, 3_000_000, 50_000, 0), 160)
QWEN = Model("openrouter", "qwen3-coder", 256_000, (220_000, 950_000, 55_000, 0), 90)
CODEX = Model("openai", "gpt-5-codex", 272_000, None, 65)
"""Its agent reports tokens alone: the exporter estimates the cost from list prices."""
PREVIEW = Model("in-house", "coder-preview", 128_000, None, 40)
"""In no price list."""


class Call(NamedTuple):
    """One model call. Times are milliseconds."""

    tokens: Tokens
    pico: int
    duration: int
    first_token: int


class Tool(NamedTuple):
    """One tool call, how long it ran in milliseconds, and how many tokens its result adds to the context."""

    name: str
    duration: int
    failed: bool
    tokens: int


@dataclass
class Context:
    """The context of one session. `tokens` is None after a compaction, until the next call tells.

    `pace`: how many times as fast as usual the model is.
    """

    model: Model
    pace: float = 1.0
    tokens: int | None = SYSTEM_TOKENS
    _size: int = SYSTEM_TOKENS
    _fresh: int = 0
    _cached: int = 0
    _last: int = 0

    @property
    def percent(self) -> float | None:
        return None if self.tokens is None else 100 * self.tokens / self.model.window

    def add(self, tokens: int) -> None:
        """What a user or a tool says: in the context from now on, billed with the next call."""
        self._fresh += tokens

    def call(self, chance: random.Random, now: int) -> Call:
        """One model call that starts at `now`, epoch milliseconds."""
        total = self._size + self._fresh
        read = self._cached if now - self._last < CACHE_MS else 0
        output = min(6000, int(chance.lognormvariate(math.log(330), 0.9)) + 20)
        price = self.model.price or (0, 0, 0, 0)
        if price[3]:
            new = min(total - read, chance.randrange(3, 15))
            tokens = (new, output, read, total - read - new)
        else:
            tokens = (total - read, output, read, 0)
        first = int((1000 * chance.lognormvariate(math.log(0.9), 0.45) + (total - read) / 40) / self.pace)
        duration = first + int(1000 * output / self.model.speed / self.pace)
        self._cached, self._size, self._fresh = total, total + output, 0
        self._last, self.tokens = now + duration, total + output
        return Call(tokens, sum(map(int.__mul__, tokens, price)), duration, first)

    def settle(self) -> None:
        """Take what tools said into the figure that the agent shows."""
        self.tokens = self._size + self._fresh

    def compact(self, chance: random.Random) -> int:
        """Summarise. Returns how many tokens there were before."""
        before = self._size + self._fresh
        self._size, self._fresh = SYSTEM_TOKENS + chance.randrange(5_000, 14_000), 0
        self._cached, self.tokens = SYSTEM_TOKENS, None
        return before


_TOOLS = (  # name, share, median seconds, spread, share that fails, median tokens of the result
    ("bash", 0.40, 7.0, 1.3, 0.07, 600),
    ("read", 0.27, 0.03, 0.6, 0.01, 1500),
    ("edit", 0.19, 0.06, 0.5, 0.03, 260),
    ("grep", 0.09, 0.22, 0.8, 0.005, 600),
    ("write", 0.05, 0.05, 0.5, 0.005, 120),
)
_SHARES = [share for _, share, *_ in _TOOLS]


def tools(chance: random.Random, pace: float = 1.0) -> list[Tool]:
    """The tools that one turn asks for, so many times as fast as usual."""
    asked = []
    count = chance.choice((1, 1, 1, 1, 2, 3))
    for name, _, seconds, spread, failing, tokens in chance.choices(_TOOLS, _SHARES, k=count):
        ran = min(280_000, int(1000 * chance.lognormvariate(math.log(seconds), spread) / pace) + 4)
        size = min(9000, int(chance.lognormvariate(math.log(tokens), 0.8)))
        asked.append(Tool(name, ran, chance.random() < failing, size))
    return asked
