"""`usage --format json --detail`: the document of `mngr usage`, for scripts that were written for that one.

`tests/data/usage/mngr-*.json` is what mngr 0.2.0 makes of the recordings.
"""

from __future__ import annotations

import json
from collections import defaultdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from coding_agent_exporter.usage import Question, usage
from support import CAPTURES, DATA, expected
from usage_support import RECORDINGS, ask, event, log, settings, tokens

if TYPE_CHECKING:
    from pathlib import Path

NOW = 1_795_230_000


def document(home: Path, *flags: str, since: str = "") -> dict[str, Any]:
    """What the command prints at the time of mngr's documents."""
    question = Question(format="json", detail=True, since=since)
    found: dict[str, Any] = json.loads(usage(settings(home, *flags), question, clock=lambda: NOW).text)
    return found


def mngr(recording: str) -> dict[str, Any]:
    return expected(DATA / "usage", f"mngr-{recording}.json")


def shape(value: Any) -> Any:
    """Keys in their order and the types of what they hold; all entries of a list in one."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shape(inner) for inner in value[:1]]
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


def without_durations(value: Any) -> Any:
    """mngr passes on what Claude Code says of time and lines; here these keys hold null."""
    if isinstance(value, dict):
        return {key: None if key.startswith(("total_duration", "total_api_duration", "total_lines"))
                else without_durations(inner) for key, inner in value.items()}
    return [without_durations(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("recording", ["pi", "opencode", "claude-code"])
def test_the_document_has_the_shape_of_mngrs(recording: str, tmp_path: Path) -> None:
    """The same keys at every depth, in the same order, with values of the same types; windows included."""
    ours = document(tmp_path, f"--usage.root=m={CAPTURES / recording}")
    theirs = without_durations(mngr(recording))
    assert list(ours) == list(theirs)
    assert json.dumps(shape(ours)) == json.dumps(shape(theirs))


def test_a_recording_of_pi_comes_to_mngrs_document(tmp_path: Path) -> None:
    """Where both count alike, every value is the same, to what floats can hold."""
    ours, theirs = document(tmp_path, f"--usage.root=m={CAPTURES / 'pi'}"), mngr("pi")
    assert rounded(ours) == rounded(theirs)


@pytest.mark.parametrize(("recording", "wrong"), [
    ("opencode", {"ses_e043b4857ffehOAoGQuNETFJWX": (0.0450048, 0.0090501)}),
    ("claude-code", {"5596bdf5-33ad-4b0b-ae53-c0314e9244d0": (0.1682427, 0.05125295)}),
])
def test_sessions_are_worth_what_mngr_says(
    recording: str, wrong: dict[str, tuple[float, float]], tmp_path: Path
) -> None:
    """But for a fork's copies, and a total that was restored: mngr counts them again, here they count once."""
    ours = by_session(document(tmp_path, f"--usage.root=m={CAPTURES / recording}"))
    theirs = by_session(mngr(recording))
    assert ours.keys() == theirs.keys()
    differing = {name: (theirs[name, mode], ours[name, mode]) for name, mode in ours
                 if ours[name, mode] != theirs[name, mode]}
    assert differing == {name: pytest.approx(values, abs=1e-9) for name, values in wrong.items()}


@pytest.mark.parametrize("number", range(1, 13))
def test_nasty_logs_come_to_mngrs_sessions(number: int, adversarial: Path, tmp_path: Path) -> None:
    """Reported cost and tokens of every session and cost mode, as mngr's reader has them. (Prices differ.)"""
    truth: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    estimated = set()
    for source, found in expected(adversarial / str(number)).items():
        for one in found["by_session"]:
            key = (source, one["session_id"], one["cost_mode"].upper())
            truth[key][0] += one["cost_usd"] or 0
            truth[key][1] += sum(count or 0 for count in (one["tokens"] or {}).values())
            if one["provenance"] != "reported":
                estimated.add(key)
    ours: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    marked = set()
    # All of it: an instant long before any of the logs.
    since = "2000-01-01"
    for source in document(tmp_path, f"--usage.root=m={adversarial / str(number)}", since=since)["sources"]:
        for one in source["sessions"]:
            key = (source["source"], one["session_id"], one["cost_mode"])
            ours[key][0] += one["cost"]["total_cost_usd"] or 0
            ours[key][1] += sum((one["tokens"] or {}).values())
            if one["cost_provenance"] != "REPORTED":
                marked.add(key)
    assert ours.keys() == truth.keys()
    assert marked == estimated
    assert {key: tokens for key, (_, tokens) in ours.items()} == {key: tokens for key, (_, tokens) in truth.items()}
    assert [key for key in ours if key not in estimated and abs(ours[key][0] - truth[key][0]) > 1e-6] == []


def test_a_session_counts_as_a_whole_while_its_last_line_is_recent(tmp_path: Path) -> None:
    """24 hours unless `--since` says otherwise; what is older leaves sessions and sums, not the rate limits."""
    day = 86_400
    root = log(
        tmp_path, "claude",
        *(event(iso(NOW - age), session, usd, rate_limits={"five_hour": {"used_percentage": 40 + usd, "label": "5h"}})
          for age, session, usd in ((3 * day, "old", 1.0), (2 * day, "long", 2.0), (day, "long", 4.0))))
    flags = [f"--usage.root=m={root}"]
    for since, seconds, names, usd in (
        ("", day, ["long"], 3.0), ("4d", 4 * day, ["long", "old"], 4.0), ("1h", 3600, [], None),
    ):
        found = document(tmp_path, *flags, since=since)
        source = found["sources"][0]
        assert found["since_seconds"] == source["since_seconds"] == seconds
        assert [one["session_id"] for one in source["sessions"]] == names
        assert source["subscription_cost"]["total_cost_usd"] == usd
        assert source["api_cost"]["total_cost_usd"] is None
        assert source["five_hour"]["used_percentage"] == 44.0


def test_windows_are_shown_as_their_writer_gave_them(tmp_path: Path) -> None:
    """The freshest line's; with what follows from length and end. Odd types are null, reserved names left out."""
    limits = {
        "five_hour": {"used_percentage": 12.5, "resets_at": NOW + 3600, "window_seconds": 18_000, "label": "5h"},
        "odd": {"used_percentage": "much", "resets_at": True, "window_seconds": 0, "label": 7, "status": "x"},
        "over": {"used_percentage": 1, "resets_at": NOW - 1}, "sessions": {"used_percentage": 99}, "none": 5,
    }
    root = log(tmp_path, "claude", event(iso(NOW - 10), usd=1.0, rate_limits=limits),
               event(iso(NOW - 20), usd=1.0, rate_limits={"old": {"used_percentage": 1}}))
    source = document(tmp_path, f"--usage.root=m={root}")["sources"][0]
    nothing = {"used_percentage": None, "resets_at": None, "window_seconds": None, "label": None, "status": None,
               "is_using_overage": None, "seconds_until_reset": None, "elapsed_seconds": None,
               "elapsed_percentage": None, "is_present": False}
    assert source["five_hour"] == {
        **nothing, **limits["five_hour"], "seconds_until_reset": 3600, "elapsed_seconds": 14_400,  # type: ignore[dict-item]
        "elapsed_percentage": 80.0, "is_present": True}
    assert source["odd"] == {**nothing, "status": "x", "window_seconds": 0}
    assert source["over"]["seconds_until_reset"] == 0
    assert isinstance(source["sessions"], list)
    assert not {"none", "old"} & source.keys()
    assert source["is_stale"] is True  # a window is over


def test_tokens_without_a_price_make_no_cost(tmp_path: Path) -> None:
    """null, as with mngr, and marked as an estimate that nobody could make."""
    root = log(tmp_path, "pi-coding", event(iso(NOW), message_id="m", model="no/body", tokens=tokens(1, 2, 3, 4)))
    (source,) = document(tmp_path, f"--usage.root=m={root}")["sources"]
    (session,) = source["sessions"]
    assert (session["cost"]["total_cost_usd"], session["cost_provenance"]) == (None, "ESTIMATED")
    assert source["api_cost"] == {**session["cost"], "is_estimated": True}
    assert source["api_tokens"] == tokens(1, 2, 3, 4)


def test_the_program_prints_it(tmp_path: Path) -> None:
    """Session files too, which mngr does not read; sources with the freshest first."""
    found = json.loads(ask(tmp_path, *RECORDINGS, "--format=json", "--detail", "--since=2000-01-01"))
    assert [source["source"] for source in found["sources"]] == ["claude", "omp", "opencode", "pi-coding"]
    updated = [source["updated_at"] for source in found["sources"]]
    assert updated == sorted(updated, reverse=True)
    assert sum(source["session_count"] for source in found["sources"]) == 28


def by_session(found: dict[str, Any]) -> dict[tuple[str, str], float]:
    """Dollars by session and cost mode, to a billionth."""
    sums: dict[tuple[str, str], float] = defaultdict(float)
    for source in found["sources"]:
        for one in source["sessions"]:
            sums[one["session_id"], one["cost_mode"]] += one["cost"]["total_cost_usd"]
    return {key: round(dollars, 9) for key, dollars in sums.items()}


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return round(value, 9) if isinstance(value, float) else value


def iso(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).isoformat()
