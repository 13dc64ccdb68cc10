"""Names that somebody makes up: each kind has a bound, and what is beyond it is counted elsewhere, never lost."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from coding_agent_exporter import families
from coding_agent_exporter.ledger.book import OTHER, OTHERS, REPORTED, Book

if TYPE_CHECKING:
    from coding_agent_exporter.ledger.book import Labels


def spent(book: Book) -> dict[Labels, int]:
    deltas, _ = book.flush()
    return {labels: delta.amount for (name, labels), delta in deltas.items() if name == families.COST.name}


def test_label_sets_past_the_cap_lose_a_name_at_a_time_and_no_amount() -> None:
    """First the model, then the agent, then the source: the number of sets is bounded whatever is made up."""
    book = Book(max_series=50, cutoff=0)
    count = 1000
    for number in range(count):
        for source in ("pi-coding", f"made-up-{number}"):
            for agent in ("", f"agent-{number}"):
                for mode in ("api_key", "subscription"):
                    book.row(book.number("root", source, f"p/model-{number}", mode, agent), 1)[REPORTED] += 1
    amounts = spent(book)
    assert sum(amounts.values()) == 8 * count
    assert len(book.keys) <= 50 + 2 * OTHERS + 4
    assert len(book.keys) == len(set(book.keys))
    assert book.overflowed == Counter(usage=8 * count - 50)
    # The genuine source keeps its name; what was made up shares one.
    assert sum(amount for labels, amount in amounts.items() if labels[1] == "pi-coding") == 4 * count
    assert sum(amount for labels, amount in amounts.items() if labels[1] == OTHER) > 3 * count
    assert {labels for labels in amounts if labels[1] == OTHER} == {
        ("root", OTHER, OTHER, OTHER, mode, *agent, "reported")
        for mode in ("api_key", "subscription") for agent in ((), (OTHER,))
    }


def test_a_known_name_keeps_its_series_past_the_cap_also_after_a_restart() -> None:
    book = Book(max_series=2, cutoff=0, keys=[("r", "s", "p", "m", "api_key"), ("r", "s", "p", "n", "api_key")])
    assert book.keys[book.number("r", "s", "p/n", "api_key")][3] == "n"
    other = book.number("r", "s", "p/new", "api_key")
    assert book.keys[other] == ("r", "s", OTHER, OTHER, "api_key")
    assert book.number("r", "s", "p/newer", "api_key") == book.number("r", "s", "p/new", "api_key") == other
    assert book.overflowed["usage"] == 3


def test_names_that_differ_only_behind_what_is_shown_are_one() -> None:
    """And no name is remembered whole: a log may hold a million of them, of a megabyte each."""
    book = Book(max_series=100, cutoff=0)
    for number in range(500):
        book.row(book.number("r", "s", "p/" + "n" * 1000 + str(number), "api_key"), 1)[REPORTED] += 1
    assert list(spent(book).values()) == [500]
    assert not any(len(model or "") > 500 for _, _, model, _, _ in book._models)
