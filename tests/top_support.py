"""Takes nothing, gives the tests of `top` a fleet to look at."""

from __future__ import annotations

from coding_agent_exporter.model import PICO
from coding_agent_exporter.top.view import Agent, Spend, State, View
from coding_agent_exporter.usagetable import Money

NOW = 1_795_251_909.0


def money(usd: float, estimated: float = 0.0, *, known: bool = True) -> Money:
    return Money(round(usd * PICO), round(estimated * PICO), known)


FLEET = View(
    agents=(
        Agent("pi", 10642, State.WORKING, NOW - 42, 71.2, 71.2, "claude-opus-4-8", "fix the login flow", "fix/login",
              Spend(money(12.3456), None, 1_234_567), 84_211, NOW - 3),
        Agent("pi", 10644, State.WAITING, NOW - 720, 88.1, 88.1, "claude-sonnet-4-5",
              "01a1fbc2-74e7-70f3-8236-1cf90229f35d", "main", Spend(money(0.4321), None, 90_000), 0, NOW - 735),
        Agent("pi", 10646, State.WORKING, NOW - 5, None, 97.08, "gpt-5.2-codex", "refactor ledger", "main",
              Spend(money(3.2, 3.2), None, 900_000), 32_000, NOW - 6),
        Agent("omp", 210644, State.WORKING, NOW - 3700, 94.99, 95.6, "claude-opus-4-8", "数据库迁移 migration", "db",
              Spend(None, money(4.1), 900_000), 12_000, NOW - 6),
        Agent("omp", 777, State.WAITING, NOW - 90_000, 12, 12, "tiny-ctx", "evil\x1b[2J\u202ename"),
        Agent("mngr", None, State.RECENT, None, None, None, "claude-haiku-4-5", "ses_4f2a81c", "",
              Spend(money(0.02), money(0.01), 9000), 900, NOW - 100),
        Agent("pi", 10648, State.STALE, NOW - 1900, None, None, "claude-opus-4-8", "old one", "main",
              Spend(money(0, known=False), None, 9000), 0, NOW - 1990),
    ),
    today=Spend(money(21.3456, 3.2), money(4.1), 5_000_000),
    billed=round(9.12 * PICO), imputed=round(1.2 * PICO), rate=129_111,
)
"""All that there can be: each state, both kinds of money, an estimate, a price that is not known, a hostile name."""
