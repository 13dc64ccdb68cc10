"""Zero first, never down: what scrapes may see of a counter."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coding_agent_exporter.counters import Counters, Series
from coding_agent_exporter.model import CounterKey, Delta

KEY: CounterKey = ("coding_agent_cost_usd_total", ("root", "pi-coding", "p", "m", "api_key", "reported"))


def look(counters: Counters, now: float, *, delivered: bool = True) -> dict[CounterKey, int]:
    """A scrape: what it sees, and that it was delivered."""
    counters.pin(now)
    seen, held = dict(counters.values()), counters.waiting()
    if delivered:
        counters.scraped(held, now)
    return seen


def test_a_new_series_is_seen_at_zero_before_it_shows_its_value() -> None:
    """Otherwise its first increment is in no increase()."""
    counters = Counters()
    counters.add({KEY: Delta(5)})
    assert look(counters, 0)[KEY] == 0
    assert look(counters, 15)[KEY] == 5


def test_a_scrape_that_was_not_delivered_has_seen_nothing() -> None:
    """The connection broke: the zero is shown again."""
    counters = Counters()
    counters.add({KEY: Delta(5)})
    assert look(counters, 0, delivered=False)[KEY] == 0
    assert look(counters, 15)[KEY] == 0
    assert look(counters, 30)[KEY] == 5


def test_the_zero_is_held_for_a_second_prometheus() -> None:
    """With a hold of 60 s every scrape of the first minute sees the zero."""
    counters = Counters(hold=60)
    counters.add({KEY: Delta(5)})
    assert [look(counters, now)[KEY] for now in (0, 10, 59, 60)] == [0, 0, 0, 5]


def test_the_baseline_is_the_first_value_and_no_increase() -> None:
    """Of 100 that were spent, 90 before the exporter's time: the first scrape sees 90, the next 100."""
    counters = Counters()
    counters.add({KEY: Delta(100, baseline=90)})
    assert look(counters, 0)[KEY] == 90
    assert look(counters, 15)[KEY] == 100


def test_stopping_ends_the_hold_but_not_the_first_scrape() -> None:
    """A last scrape can only count what the one before it saw lower."""
    counters = Counters(hold=3600)
    counters.add({KEY: Delta(5)})
    look(counters, 0)
    counters.pin(1, at_once=True)
    assert dict(counters.values())[KEY] == 5


def test_a_correction_between_two_scrapes_is_nobodys_business() -> None:
    """Nobody saw 8: the next scrape sees 3, and nothing overshoots."""
    counters = Counters()
    counters.add({KEY: Delta(1)})
    look(counters, 0)
    assert look(counters, 1)[KEY] == 1
    counters.add({KEY: Delta(7)})
    counters.add({KEY: Delta(-5)})
    assert look(counters, 2)[KEY] == 3
    assert counters.overshoot == 0


def test_a_correction_after_a_scrape_waits_until_new_spend_has_caught_up() -> None:
    """8 was seen, 3 is right: 8 stays until more than 5 has been spent, and the overshoot says by how much."""
    counters = Counters()
    counters.add({KEY: Delta(8)})
    look(counters, 0)
    assert look(counters, 1)[KEY] == 8
    counters.add({KEY: Delta(-5)})
    assert (look(counters, 2)[KEY], counters.overshoot) == (8, 5)
    counters.add({KEY: Delta(4)})
    assert (look(counters, 3)[KEY], counters.overshoot) == (8, 1)
    counters.add({KEY: Delta(4)})
    assert (look(counters, 4)[KEY], counters.overshoot) == (11, 0)


def stored(counters: Counters) -> list[tuple[CounterKey, Series]]:
    """What a commit would write; a series that did not show its value yet is stored as never scraped."""
    return [
        (key, Series(series.exact, series.shown, series.first, 2 if series.state == 2 else 0))
        for key, series in counters.take_changed()
    ]


@given(
    st.lists(
        st.one_of(
            st.integers(-20, 30).map(lambda amount: ("add", amount)),
            st.just(("scrape", 1)), st.just(("lost scrape", 0)), st.just(("commit", 0)), st.just(("crash", 0)),
        ),
        max_size=40,
    )
)
def test_no_scrape_ever_sees_less_than_the_one_before(events: list[tuple[str, int]]) -> None:
    """Also when the exporter crashes at any moment and goes on with what it had committed last."""
    disk: dict[CounterKey, Series] = {}
    counters, now, seen = Counters(), 0.0, 0
    since_commit: list[int] = []
    for what, amount in events:
        now += 1
        if what == "add":
            counters.add({KEY: Delta(amount)})
            since_commit.append(amount)
        elif what == "commit":
            disk.update(stored(counters))
            since_commit.clear()
        elif what == "crash":
            counters = Counters()
            counters.load((key, Series(s.exact, s.shown, s.first, s.state)) for key, s in disk.items())
            for lost in since_commit:  # The files are still there: what was not committed is read again.
                counters.add({KEY: Delta(lost)})
        else:
            counters.pin(now)
            disk.update(stored(counters))  # Commit before showing.
            since_commit.clear()
            shown = dict(counters.values()).get(KEY, 0)
            assert shown >= seen
            seen = shown
            if amount:
                counters.scraped(counters.waiting(), now)
