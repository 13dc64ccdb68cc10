"""`dashboards` and `rules`: the very files of grafana/, from the installed package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from process_support import environment

GRAFANA = Path(__file__).parent.parent / "grafana"
NAMES = {"dashboards": ["exporter", "fleet", "spend", "turns"], "rules": ["alerts", "budgets", "recording"]}


def run(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "coding_agent_exporter", *arguments], env=environment(home), cwd=home,
                          capture_output=True, text=True, check=False, timeout=60)


def original(kind: str, name: str) -> Path:
    return GRAFANA / kind / f"{name}.{'json' if kind == 'dashboards' else 'yaml'}"


@pytest.mark.parametrize("kind", NAMES)
def test_without_a_name_they_are_listed(kind: str, tmp_path: Path) -> None:
    """A line for each: its name, and what it is about."""
    done = run(tmp_path, kind)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines()] == NAMES[kind]
    assert all(len(line.split()) > 5 for line in done.stdout.splitlines())


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in NAMES.items() for name in names])
def test_what_is_printed_is_the_file(kind: str, name: str, tmp_path: Path) -> None:
    """To the byte: what the package ships is what the repository and the chart hold."""
    done = run(tmp_path, kind, name)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == original(kind, name).read_text(encoding="utf-8")


def test_they_are_written_into_a_directory(tmp_path: Path) -> None:
    """All, or those that are named; the paths are printed, and a second time changes nothing."""
    for _ in range(2):
        done = run(tmp_path, "dashboards", "--dir=a/b")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines() == [f"a/b/{name}.json" for name in NAMES["dashboards"]]
    for file in (tmp_path / "a" / "b").iterdir():
        assert json.loads(file.read_text()) == json.loads(original("dashboards", file.stem).read_text())
    assert run(tmp_path, "rules", "alerts", "--dir=c").stdout == "c/alerts.yaml\n"
    assert [file.name for file in (tmp_path / "c").iterdir()] == ["alerts.yaml"]


def test_a_file_that_somebody_changed_is_not_overwritten(tmp_path: Path) -> None:
    """Budgets are there to be edited: nothing is written then, unless it is forced."""
    assert run(tmp_path, "rules", "budgets", "--dir=r").returncode == 0
    mine = tmp_path / "r" / "budgets.yaml"
    mine.write_text("groups: []\n")
    done = run(tmp_path, "rules", "--dir=r")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "r/budgets.yaml" in done.stderr
    assert "--force" in done.stderr
    assert [file.name for file in mine.parent.iterdir()] == ["budgets.yaml"]
    assert mine.read_text() == "groups: []\n"
    assert run(tmp_path, "rules", "--dir=r", "--force").returncode == 0
    assert mine.read_bytes() == original("rules", "budgets").read_bytes()


@pytest.mark.parametrize(("arguments", "code"), [
    (["dashboards", "fleets"], 2), (["rules", "fleet"], 2), (["rules", "--dirs=x"], 2), (["rules", "--dir=/proc/x"], 1),
])
def test_what_cannot_be_done_is_one_line(arguments: list[str], code: int, tmp_path: Path) -> None:
    """A name that is none, a flag that is none, a directory that cannot be made."""
    done = run(tmp_path, *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1)
