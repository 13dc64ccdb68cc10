"""The benchmarks on a tree that is too small to measure: they run, and they check what they measure."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from benchmarks import conversations, ingest, linear, many, sections, spans, table, wrap
from benchmarks.generate import generate
from benchmarks.process import total
from benchmarks.sections import Size
from benchmarks.table import Row

TINY = Size(events=3000, sessions=60, agents=12)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.jsonl")}


def test_the_same_sizes_and_seed_give_the_same_tree(tmp_path: Path) -> None:
    """Two runs of the benchmark, on two machines, read the same bytes; another seed gives others."""
    first = generate(tmp_path / "a", **TINY._asdict())
    again = generate(tmp_path / "b", **TINY._asdict())
    generate(tmp_path / "c", **TINY._asdict(), seed=2)
    assert asdict(first) == asdict(again)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a").keys().isdisjoint(contents(tmp_path / "c"))


def test_the_tree_is_a_mix_of_all_harnesses_and_of_the_size_asked_for(tmp_path: Path) -> None:
    """Every way of counting takes part, and the number of lines is within a few percent."""
    truth = generate(tmp_path, events=20_000, sessions=400, agents=50)
    lines = sum(data.count(b"\n") for data in contents(tmp_path).values())
    assert truth.lines == lines
    assert lines == pytest.approx(20_000, rel=0.05)
    assert {source for source, _ in truth.spent} == {"pi-coding", "opencode", "claude", "codex"}
    assert truth.copied > 0


def test_the_pipeline_counts_exactly_what_was_generated(tmp_path: Path) -> None:
    """To the last pico-USD, copies in forked sessions left out."""
    truth = generate(tmp_path / "tree", events=20_000, sessions=400, agents=50)
    _, spent = ingest.pipeline(tmp_path / "tree", tmp_path / "state", truth.lines)
    assert spent == sum(truth.spent.values())


def test_the_speeds_are_reported_with_their_ratios(tmp_path: Path) -> None:
    """Ours, what msgspec alone does in the same run, and one by the other."""
    rows = sections.speed(tmp_path, size=TINY, runs=1)
    assert rows[0].what == "full pipeline with commits"
    assert [row.what for row in rows].count("  pipeline / that") >= 3


def test_a_wrong_total_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline that loses a line stops the benchmark instead of looking fast."""
    monkeypatch.setattr(ingest, "pipeline", lambda *_: (ingest.Speed(1e9, 1e9), 0))
    with pytest.raises(sections.WrongTotalError):
        sections.speed(tmp_path, size=TINY, runs=1)


def test_session_files_are_the_same_every_time(tmp_path: Path) -> None:
    """As the usage logs are; and what is expected of them is counted while they are written."""
    first = conversations.generate(tmp_path / "a", sessions=3, start=spans.START * 1000)
    again = conversations.generate(tmp_path / "b", sessions=3, start=spans.START * 1000)
    assert asdict(first) == asdict(again)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert first.size == sum(map(len, contents(tmp_path / "a").values()))


def test_every_span_reaches_the_collector(tmp_path: Path) -> None:
    """From session files through the outbox and the real worker, and a running exporter's turns one by one."""
    rows = spans.spans(tmp_path, sessions=3, count=2, runs=1)
    assert [row.what for row in rows if row.target] == [
        "turn's last line to its span's arrival, median", "RSS with OTLP over HTTP"]


def test_a_lost_span_is_no_result(tmp_path: Path) -> None:
    """A worker that loses spans stops the benchmark instead of looking fast."""
    truth = conversations.generate(tmp_path / "sessions", sessions=1, start=spans.START * 1000)
    truth.spans += 1
    with pytest.raises(spans.LostSpansError):
        spans.through(tmp_path / "sessions", tmp_path / "state", truth)


def test_many_log_files_are_measured_and_counted(tmp_path: Path) -> None:
    """Start, scrape, commit, a new agent and idle CPU; a total that is wrong would stop it."""
    rows = many.many(tmp_path, logs=30, seconds=0.1, count=2)
    assert len(rows) == 7
    assert "notified" in rows[-1].note


def test_tables_are_aligned_or_markdown() -> None:
    """The same rows for a terminal and for docs/performance.md."""
    rows = [Row("a", "1 ms", "2 ms", "note"), Row("longer", "10 ms")]
    assert table.text("Title", rows).splitlines() == [
        "Title",
        "what    result  target  note",
        "------  ------  ------  ----",
        "a       1 ms    2 ms    note",
        "longer  10 ms",
    ]
    assert table.markdown("Title", rows).splitlines()[2:] == [
        "| what | result | target | note |", "|---|---|---|---|",
        "| a | 1 ms | 2 ms | note |", "| longer | 10 ms |  |  |",
    ]


def test_totals_are_summed_over_the_series_of_one_name() -> None:
    """Comments and other metrics are left out."""
    text = '# TYPE a counter\na{x="1"} 1.5\na{x="2 3"} 2\nab{x="1"} 100\n'
    assert total(text, "a") == 3.5


def test_what_wrap_adds_is_reported_beside_a_round_trip_without_it(tmp_path: Path) -> None:
    """Two medians and their ratio; a command that has ended is no result."""
    assert [row.what.split(",")[0] for row in wrap.wrap(tmp_path, count=20)] == [
        "round trip through cat", "the same through wrap -- cat", "  that / without"]
    with pytest.raises((EOFError, BrokenPipeError)):
        wrap.round_trips(tmp_path, ["true"], 20)


def test_what_a_line_costs_is_reported_beside_little_and_much_history(tmp_path: Path) -> None:
    """Events, files and messages of one session; all of them are counted, or there is no result."""
    rows = linear.linear(tmp_path, batch=2000, histories=(3000, 6000), files=(1, 5), lengths=(10, 20), count=2)
    assert [row.what for row in rows if row.target] == [
        "2,000 events after 3,000 / on an empty state", "2,000 events after 6,000 / on an empty state"]
    assert len(rows) == 2 + 2 * 3 + 2 * 2


def test_an_event_that_is_not_counted_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline that forgets looks linear."""
    monkeypatch.setattr(linear, "_messages", lambda _: 0)
    with pytest.raises(linear.WrongCountError):
        linear.linear(tmp_path, batch=2000, histories=(3000,), files=(), lengths=())
