"""The agents of `demo` and their account: what happens follows from the seed, and a difference of a cent is seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from coding_agent_exporter.demo import accounts
from coding_agent_exporter.demo.cast import FIRST_PID, Stage
from coding_agent_exporter.demo.writers import TOKEN_TYPES, Spend, Usage
from demo_support import files

if TYPE_CHECKING:
    from pathlib import Path

START = 1_767_744_000.0


def told(home: Path, seconds: float, seed: int, speed: float = 1.0, every: float = 0.25) -> list[tuple[int, str, str]]:
    """What happens to the agents until then."""
    events: list[tuple[int, str, str]] = []
    stage = Stage(home, seed, start=START, speed=speed, tell=lambda *event: events.append(event))
    for step in range(int(seconds / every) + 1):
        stage.advance(START + step * every, lambda _: None)
    return events


def test_the_seed_decides(tmp_path: Path) -> None:
    """The same seed and start give the same events and the same files; another seed others."""
    events = {name: told(tmp_path / name, 60, seed, every=every)
              for name, seed, every in (("a", 1, 0.25), ("b", 1, 15.0), ("c", 2, 0.25))}
    assert events["a"] == events["b"] != events["c"]
    # A session file names its parent by its path.
    content = {name: {path: data.replace(str(tmp_path / name).encode(), b"") for path, data in
                      files(tmp_path / name).items()} for name in "abc"}
    assert content["a"] == content["b"] != content["c"]
    assert len(content["a"]) > 15


@pytest.mark.parametrize("seed", range(1, 9))
def test_within_a_minute_there_is_something_to_see(seed: int, tmp_path: Path) -> None:
    """Whatever the seed: agents near the limit, compacted, killed, gone; none bears the pid of a process."""
    events = told(tmp_path, 60, seed)
    for what in ("is near the limit", "compacted", "is killed", "is done and leaves", "is back"):
        assert any(text.startswith(what) for _, _, text in events), what
    assert [at for at, _, _ in events if at < (START + 10) * 1000][5:]
    pids = [int(path.stem) for path in tmp_path.rglob("instances/*.json")]
    assert len(pids) > 4
    assert min(pids) > FIRST_PID >= 4_194_304


def test_speed(tmp_path: Path) -> None:
    """Four times as fast, about four times as many model calls end in the same time."""
    calls = []
    for speed in (1, 4):
        stage = Stage(tmp_path / str(speed), 3, start=START, speed=speed)
        stage.advance(START + 120)
        calls.append(len(stage.truth.spends))
    assert 2 * calls[0] < calls[1] < 8 * calls[0]


SPENDS = [
    Spend(1_767_744_001_000, Usage("pi", "pi-coding", "anthropic", "claude-opus-4-8", "api_key"), 25 * 10**10,
          (1, 2, 3, 4)),
    Spend(1_767_744_002_000, Usage("mngr", "codex", "openai", "gpt-5-codex", "api_key"), None, (5, 6, 7, 0)),
    Spend(1_767_744_003_000, Usage("mngr", "codex", "in-house", "coder", "api_key"), None, (8, 0, 0, 0)),
]
EXPOSITION = """\
# TYPE coding_agent_cost_usd_total counter
coding_agent_cost_usd_total{{cost_mode="api_key",model="claude-opus-4-8",provenance="reported",provider="anthropic",\
root="pi",source="pi-coding"}} {opus}
coding_agent_cost_usd_total{{cost_mode="api_key",model="gpt-5-codex",provenance="estimated",provider="openai",\
root="mngr",source="codex"}} 0.5
# TYPE coding_agent_tokens_total counter
"""
TOKENS = """\
coding_agent_tokens_total{{cost_mode="api_key",model="{model}",provider="{provider}",root="r",source="{source}",\
token_type="{kind}"}} {count}
"""


def exposition(opus: float = 0.25, coder: int = 8) -> str:
    lines = [EXPOSITION.format(opus=opus)]
    for provider, model, source, counts in (
        ("anthropic", "claude-opus-4-8", "pi-coding", (1, 2, 3, 4)), ("openai", "gpt-5-codex", "codex", (5, 6, 7, 0)),
        ("in-house", "coder", "codex", (coder, 0, 0, 0)),
    ):
        lines += [TOKENS.format(provider=provider, model=model, source=source, kind=kind, count=count)
                  for kind, count in zip(TOKEN_TYPES, counts, strict=True)]
    return "".join(lines)


@pytest.mark.parametrize(("text", "differing"), [
    (exposition(), 0), (exposition(opus=0.26), 1), (exposition(coder=9), 1), (exposition(opus=0.0), 1),
    (exposition().replace("in-house", "elsewhere"), 2), ("", 3),
])
def test_a_difference_is_seen(text: str, differing: int) -> None:
    """A cent too much, a token too many, a series too few, another model: each line that differs is marked."""
    prices = {"gpt-5-codex": 5 * 10**11}
    truth = accounts.spent(SPENDS, TOKEN_TYPES, lambda _, model, __, ___: prices.get(model))
    said = accounts.settle(truth, accounts.shown(text))
    assert accounts.agree(truth, said) is (differing == 0)
    assert accounts.table(truth, said).count("DIFFERS") == differing
