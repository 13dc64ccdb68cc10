"""Takes what made-up agents spent and what /metrics says of it, gives the two side by side, for people.

What agents spent is known from the simulation alone, which has nothing in common with the exporter; only a price that
no agent names is looked up where the exporter looks it up.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from coding_agent_exporter.families import COST, TOKENS
from coding_agent_exporter.model import PICO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from coding_agent_exporter.demo.work import Tokens
    from coding_agent_exporter.demo.writers import Spend

    Estimate = Callable[[str, str, Tokens, datetime], int | None]
    """As `pricing.Prices.estimate`."""

EPSILON = 1e-6
"""US dollars: far less than a cent, far more than a float's rounding."""


class Account(NamedTuple):
    """What is accounted for by itself. `provenance`: of its money."""

    source: str
    provider: str
    model: str
    cost_mode: str
    provenance: str


@dataclass
class Amounts:
    """US dollars, None where nobody knows, and tokens by type."""

    usd: float | None = None
    tokens: Counter[str] = field(default_factory=Counter)

    def equals(self, other: Amounts) -> bool:
        if self.tokens != other.tokens:
            return False
        if self.usd is None or other.usd is None:
            return self.usd is other.usd
        return abs(self.usd - other.usd) < EPSILON


Book = dict[Account, Amounts]


def spent(spends: Iterable[Spend], types: tuple[str, ...], estimate: Estimate) -> Book:
    """The truth. `types`: the names of the four counts of a spend's tokens."""
    pico: defaultdict[Account, int | None] = defaultdict(int)
    book: Book = defaultdict(Amounts)
    for spend in spends:
        _, source, provider, model, mode = spend.usage
        account = Account(source, provider, model, mode, "estimated" if spend.pico is None else "reported")
        price = spend.pico
        if price is None:
            price = estimate(provider, model, spend.tokens, datetime.fromtimestamp(spend.at / 1000, UTC))
        total = pico[account]
        pico[account] = None if price is None or total is None else total + price
        for kind, count in zip(types, spend.tokens, strict=True):
            if count:
                book[account].tokens[kind] += count
    for account, total in pico.items():
        book[account].usd = None if total is None else total / PICO
    return dict(book)


def shown(exposition: str) -> Book:
    """What the text of /metrics says. Tokens do not say where the price came from: see `settle`."""
    book: Book = defaultdict(Amounts)
    for metric in text_string_to_metric_families(exposition):
        for sample in metric.samples:
            labels = sample.labels
            if sample.name not in {COST.name, TOKENS.name} or not sample.value:
                continue
            named = (labels["source"], labels["provider"], labels["model"], labels["cost_mode"])
            if sample.name == COST.name:
                account = book[Account(*named, labels["provenance"])]
                account.usd = (account.usd or 0) + sample.value
            else:
                book[Account(*named, "")].tokens[labels["token_type"]] += int(sample.value)
    return dict(book)


def settle(truth: Book, said: Book) -> Book:
    """`said` with its tokens in the one account of the truth that they belong to."""
    settled: Book = {account: Amounts(amounts.usd) for account, amounts in said.items() if account.provenance}
    for account, amounts in said.items():
        if not account.provenance:
            known = (one for one in truth if one[:4] == account[:4])
            settled.setdefault(next(known, account), Amounts()).tokens.update(amounts.tokens)
    return settled


def agree(truth: Book, said: Book) -> bool:
    """Whether every account is the same in both."""
    return all(truth.get(one, Amounts()).equals(said.get(one, Amounts())) for one in truth.keys() | said.keys())


def table(truth: Book, said: Book) -> str:
    """The accounts as lines of text, in which those that differ are marked."""
    rows: list[tuple[str, ...]] = [("source", "model", "agents spent", "/metrics says", "tokens", "/metrics says")]
    marks = [""]
    for account in sorted(truth.keys() | said.keys()):
        one, other = truth.get(account, Amounts()), said.get(account, Amounts())
        rows.append((account.source, _name(account, one.usd), _usd(one), _usd(other), _tokens(one), _tokens(other)))
        marks.append("" if one.equals(other) else "  DIFFERS")
    for title, mode in (("real money", "api_key"), ("subscription (imputed)", "subscription")):
        both = [sum(book[one].usd or 0 for one in book if one.cost_mode == mode) for book in (truth, said)]
        rows.append(("total", title, *(f"${usd:,.4f}" for usd in both), "", ""))
        marks.append("")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "".join(
        ("  ".join(
            cell.ljust(width) if number < 2 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ) + mark).rstrip() + "\n"
        for row, mark in zip(rows, marks, strict=True))


def _name(account: Account, usd: float | None) -> str:
    name = f"{account.provider}/{account.model}" if account.model != "unknown" else "(no model named)"
    notes = [note for note, meant in (
        ("subscription", account.cost_mode == "subscription"),
        ("estimated", account.provenance == "estimated" and usd is not None),
    ) if meant]
    return f"{name}, {', '.join(notes)}" if notes else name


def _usd(amounts: Amounts) -> str:
    return "no price" if amounts.usd is None else f"${amounts.usd:,.4f}"


def _tokens(amounts: Amounts) -> str:
    total = amounts.tokens.total()
    return f"{total:,}" if total else "-"
