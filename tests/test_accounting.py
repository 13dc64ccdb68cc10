"""The totals of whole trees of logs, against independent truths."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from coding_agent_exporter.pipeline import Pipeline
from support import CAPTURES, Clock, by_source, differences, drain, exact, expected, scrape, settings, total

if TYPE_CHECKING:
    from pathlib import Path

COST = "coding_agent_cost_usd_total"


@pytest.mark.parametrize("number", range(1, 13))
def test_adversarial_trees_come_to_what_the_reference_reader_counts(
    number: int, adversarial: Path, tmp_path: Path
) -> None:
    """Malformed, repeated and reordered events: reported cost to 1e-6 USD, tokens exactly."""
    tree = adversarial / str(number)
    pipeline = Pipeline(settings(tmp_path, "--usage.root", f"m={tree}"), clock=Clock())
    drain(pipeline)
    assert differences(exact(pipeline), expected(tree)) == []
    pipeline.close()


def test_a_recording_of_pi_comes_to_what_its_logs_say(tmp_path: Path) -> None:
    """Usage logs alone, as mngr's reader counts them."""
    pipeline = Pipeline(settings(tmp_path, "--usage.root", f"m={CAPTURES / 'pi'}"), clock=Clock())
    drain(pipeline)
    assert differences(exact(pipeline), expected(CAPTURES / "pi", "expected-by-mngr-reader.json")) == []
    pipeline.close()


def test_a_fork_in_opencode_is_not_spent_again(tmp_path: Path) -> None:
    """Six messages that a fork copied were never sent to a model: the model server's log says 0.185294525 USD."""
    pipeline = Pipeline(settings(tmp_path, "--usage.root", f"m={CAPTURES / 'opencode'}"), clock=Clock())
    samples = scrape(pipeline)
    assert total(samples, COST) == pytest.approx(0.185294525, abs=1e-12)
    assert total(samples, "coding_agent_messages_total") == 46
    assert total(samples, "coding_agent_exporter_rejected_total", reason="copied") == 6
    pipeline.close()


def test_a_total_that_claude_code_restores_is_not_spent_again(tmp_path: Path) -> None:
    """After `kill -9` and `--continue` the process restores its last total; the last process was a subscription."""
    pipeline = Pipeline(settings(tmp_path, "--usage.root", f"m={CAPTURES / 'claude-code'}"), clock=Clock())
    samples = scrape(pipeline)
    assert total(samples, COST) == pytest.approx(0.2556029, abs=1e-12)
    assert total(samples, COST, cost_mode="subscription") == pytest.approx(0.0223122, abs=1e-12)
    assert total(samples, "coding_agent_sessions_total") == 4
    pipeline.close()


def test_branches_and_sub_agents_of_oh_my_pi_count_once(tmp_path: Path) -> None:
    """42 messages for 0.58487835 USD, where the lines come to 0.60473925: a branch copied three of them."""
    sessions = CAPTURES / "oh-my-pi" / "sessions"
    pipeline = Pipeline(settings(tmp_path, "--sessions.dir", f"omp={sessions}"), clock=Clock())
    samples = scrape(pipeline)
    assert total(samples, COST, source="omp") == pytest.approx(0.58487835, abs=1e-12)
    assert total(samples, COST) == total(samples, COST, source="omp")
    assert total(samples, "coding_agent_messages_total") == 42
    assert total(samples, "coding_agent_compactions_total") == 1
    pipeline.close()


@pytest.mark.parametrize("order", ["logs first", "sessions first", "together"])
def test_a_message_in_a_usage_log_and_in_a_session_file_counts_once(order: str, tmp_path: Path) -> None:
    """Whichever input brings it first. One message (0.006237 USD) is in no log: its process ran without mngr."""
    logs, sessions = tmp_path / "mngr", tmp_path / "sessions"
    pipeline = Pipeline(
        settings(tmp_path, "--usage.root", f"m={logs}", "--sessions.dir", f"s={sessions}"), clock=Clock()
    )
    steps = {"logs first": [logs, sessions], "sessions first": [sessions, logs], "together": []}[order]
    for directory in steps:
        directory.symlink_to(CAPTURES / "pi" / ("sessions" if directory is sessions else ""))
        drain(pipeline)
    if not steps:
        logs.symlink_to(CAPTURES / "pi")
        sessions.symlink_to(CAPTURES / "pi" / "sessions")
        drain(pipeline)
    counted = exact(pipeline)
    assert by_source(counted)["pi-coding", "api_key"]["usd"] == pytest.approx(0.0535543 + 0.006237, abs=1e-12)
    messages = sum(amount for (name, _), amount in counted.items() if name == "coding_agent_messages_total")
    assert messages == 21
    pipeline.close()
