"""The `snapshot` command: the document that pi-telemetry-snapshot prints, byte for byte."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coding_agent_exporter.ecmascript import UNDEFINED, dumps, key, number
from coding_agent_exporter.snapshot import Processes, snapshot
from process_support import environment
from support import DATA

if TYPE_CHECKING:
    from collections.abc import Callable

NOW = 1_795_225_189_402
RECORDED = DATA / "snapshot"


class Some(Processes):
    """A PID namespace with these processes, by pid, and when they started (epoch ms)."""

    def __init__(self, **started: float | None) -> None:
        self.started = {int(name.removeprefix("p")): at for name, at in started.items()}

    def exists(self, pid: int) -> bool:
        return pid in self.started

    def started_ms(self, pid: int) -> float | None:
        return self.started[pid]


def put(directory: Path, *documents: dict[str, Any]) -> Path:
    """The instances as files."""
    for document in documents:
        (directory / f"{document['process']['pid']}.json").write_text(json.dumps(document))
    return directory


def instance(pid: Any, activity: str = "working", *, age: float = 100, **sections: Any) -> dict[str, Any]:
    return {"schemaVersion": 2, "process": {"pid": pid, "startedAt": NOW - 60_000, "updatedAt": NOW - age},
            "state": {"activity": activity}, **sections}


def pids(document: dict[str, Any]) -> list[Any]:
    return [one["process"]["pid"] for one in document["instances"]]


@pytest.mark.parametrize("moment", ["idle", "mid", "stale"])
def test_a_recorded_directory_gives_the_recorded_output(moment: str, tmp_path: Path) -> None:
    """To the byte, key order included, but for the source and the directory; a killed agent's old file is left out."""
    text = (RECORDED / f"{moment}.json").read_text()
    recorded = json.loads(text)
    killed = instance(10648, age=0)
    killed["process"]["updatedAt"] = recorded["generatedAt"] - recorded["staleMs"] - 1
    files = [{key: value for key, value in one.items() if key != "telemetry"} for one in recorded["instances"]]
    put(tmp_path, *([] if moment == "mid" else [killed]), *files)
    (tmp_path / "10642.json.tmp-10642").write_text("{")
    found = snapshot(str(tmp_path), now_ms=recorded["generatedAt"], stale_ms=recorded["staleMs"], pid_check="off")
    assert found["counts"]["total"] == {"idle": 0, "mid": 4, "stale": 3}[moment]
    for indent in (0, 2):
        ours = dumps(found, indent).replace(str(tmp_path), recorded["telemetryDir"])
        wanted = text.removesuffix("\n") if indent == 0 else json.dumps(recorded, indent=2, ensure_ascii=False)
        assert ours.replace('"coding-agent-exporter"', '"pi-telemetry-snapshot"') == wanted


NASTY = [
    ('{"schemaVersion":2,"process":{"pid":%d,"updatedAt":%d,"10":1,"2":1.0,"x":1e21,"y":1e-7,"z":-0.0,'
     '"big":12345678901234567890},"session":{"id":42,"name":null},'
     '"context":{"percent":5e-324,"nearLimit":[],"closeToLimit":"no"},"telemetry":"old"}'),
    '{"schemaVersion":2.0,"process":{"pid":"%d","updatedAt":"%d"},"session":"none","context":7,"state":[],"a":"\\ud83d"}',
    ('{"schemaVersion":2,"process":{"pid":%d,"updatedAt":%d},"session":{"id":"7"},'
     '"workspace":{"cwd":"/a\\u2028b\\u007f\\u0001"},'
     '"context":{"percent":101.5,"pressure":"at_limit","closeToLimit":true},"state":{"activity":"unknown"}}'),
    '{"schemaVersion":2,"process":{"pid":%d,"updatedAt":%d},"context":{"percent":true},"state":{"activity":["working"]}}',
    ('{"schemaVersion":2,"process":{"pid":"\\ufeff%d\\u00a0","updatedAt":[%d]},"session":{"id":1e999},"__proto__":{"a":1},'
     '"deep":' + "[" * 600 + "]" * 600 + "}"),
    '{"schemaVersion":2,"process":{"pid":%d,"updatedAt":%d,"updatedAt":1e999}}',
]
FOREIGN = {"torn.json": '{"schemaVersion":2,', "list.json": "[]", "one.json": '{"schemaVersion":1}',
           "none.json": '{"schemaVersion":2,"process":null}', "bom.json": "\ufeff{}", "empty.json": "", "a.txt": "{}"}


def test_the_real_program_prints_the_same(tmp_path: Path, tool: Callable[[str], str]) -> None:
    """On one directory with well-formed, odd, torn and foreign files, and processes that are alive, dead or stale."""
    program = tool("pi-telemetry-snapshot")
    sleepers = [subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in NASTY]
    try:
        now = time.time_ns() // 1_000_000
        for raw, sleeper in zip(NASTY, sleepers, strict=True):
            (tmp_path / f"{sleeper.pid}.json").write_text(raw % (sleeper.pid, now))
        recorded = json.loads((RECORDED / "mid.json").read_text())
        mine = recorded["instances"][0]
        mine["process"] |= {"pid": os.getpid(), "updatedAt": now, "startedAt": now - 1000}
        dead = recorded["instances"][1]
        dead["process"]["updatedAt"] = now
        old = recorded["instances"][2]
        old["process"] |= {"pid": os.getppid(), "updatedAt": now - 3_600_000}
        put(tmp_path, mine, dead, old)
        for name, content in FOREIGN.items():
            (tmp_path / name).write_text(content)
        env = environment(tmp_path, {"PI_TELEMETRY_DIR": f" {tmp_path} ", "PI_TELEMETRY_STALE_MS": "6e5"})
        ours = [sys.executable, "-m", "coding_agent_exporter", "snapshot", "--pid-check=on"]
        for flags in ([], ["--pretty"]):
            wanted, got = (
                subprocess.run([*command, *flags], env=env, stdout=subprocess.PIPE, text=True, check=True, timeout=60)
                .stdout for command in ([program], ours))
            assert _timeless(got).replace('"coding-agent-exporter"', '"pi-telemetry-snapshot"') == _timeless(wanted)
            assert json.loads(got)["counts"]["total"] == len(NASTY)  # mine too, but not the last
    finally:
        for sleeper in sleepers:
            sleeper.communicate()


def _timeless(text: str) -> str:
    return re.sub(r'("(generatedAt|ageMs)": ?)[0-9]+', r"\1N", text)


def test_numbers_are_printed_as_node_prints_them(tool: Callable[[str], str]) -> None:
    """A few thousand floats of all magnitudes, as literals, in one go."""
    chance = random.Random(3)
    texts = [f"{chance.choice(['-', ''])}{chance.uniform(1, 10)!r}e{chance.randrange(-330, 310)}" for _ in range(3000)]
    texts += ["0", "-0", "1e21", "1e20", "123456789012345680000", "1e-6", "1e-7", "0.1", "5e-324", "1e999", "1.5e300"]
    source = "[" + ",".join(texts) + "]"
    program = "console.log(JSON.stringify(JSON.parse(require('fs').readFileSync(0, 'utf8'))))"
    done = subprocess.run([tool("node"), "-e", program], input=source, stdout=subprocess.PIPE, text=True, check=True,
                          timeout=60)
    assert dumps(json.loads(source)) + "\n" == done.stdout


@pytest.mark.parametrize(("value", "text"), [
    (1.0, "1"), (-0.0, "0"), (0.1, "0.1"), (1e20, "100000000000000000000"), (1e21, "1e+21"), (123e-7, "0.0000123"),
    (1e-7, "1e-7"), (1.25e-9, "1.25e-9"), (-2.5, "-2.5"), (2**63, "9223372036854776000"), (float("inf"), "null"),
    ({"b": 1, "10": 1, "2": 1, "01": 1, "gone": UNDEFINED}, '{"2":1,"10":1,"b":1,"01":1}'),
    ("\ud83d\u2028\x1f\x7f\"", '"\\ud83d\u2028\\u001f\x7f\\""'), ([], "[]"), (True, "true"), (None, "null"),
])
def test_json_text_is_ecmascripts(value: object, text: str) -> None:
    """Numbers, key order, half surrogate pairs and members that are undefined."""
    assert dumps(value) == text


def test_a_document_may_be_nested_deeper_than_the_stack(tmp_path: Path) -> None:
    """One such file is printed like the others; before, it was the end of the command."""
    put(tmp_path, instance(1), instance(2))
    deep = "[" * 900 + "]" * 900
    (tmp_path / "3.json").write_text(f'{json.dumps(instance(3))[:-1]}, "deep": {deep}, "session": {{"id": {deep}}}}}')
    found = snapshot(str(tmp_path), now_ms=NOW, stale_ms=10_000, pid_check="off")
    assert pids(found) == [1, 2, 3]
    for indent in (0, 2):
        assert dumps(found, indent).replace("\n", "").replace(" ", "").count(deep) == 5


@pytest.mark.parametrize("at", ["1e999", '"Infinity"', "-1e999", "null", '"soon"', "{}", '"0x' + "f" * 300 + '"'])
def test_a_heartbeat_at_no_time_is_stale(at: str, tmp_path: Path) -> None:
    """Also one that is infinitely far ahead."""
    (tmp_path / "1.json").write_text(f'{{"schemaVersion":2,"process":{{"pid":1,"updatedAt":{at}}}}}')
    assert pids(snapshot(str(tmp_path), now_ms=NOW, stale_ms=10_000, pid_check="off")) == []


@given(st.recursive(
    st.none() | st.booleans() | st.integers(-10**9, 10**9) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_a_printed_document_is_laid_out_like_the_standard_librarys(value: Any) -> None:
    """Line by line, where keys are no array indices and no text holds half a surrogate pair."""
    ours = json.dumps(json.loads(dumps(value)), indent=2, ensure_ascii=False)
    assert dumps(value, 2) == ours
    assert json.loads(ours) == value


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_printed_number_is_the_number(value: float) -> None:
    """Nothing is lost on the way."""
    assert float(dumps(value)) == value


@pytest.mark.parametrize(("value", "wanted"), [
    (" 3e3 ", 3000), ("", 0), ("0x1F", 31), ("Infinity", float("inf")), (None, 0), (True, 1), (2.5, 2.5), (".5", 0.5),
    ("\ufeff7\xa0", 7), (f"0x{'f' * 300}", float("inf")), ([], 0), ([["8"]], 8),
])
def test_what_counts_as_a_number(value: object, wanted: float) -> None:
    """Coercion follows the standard."""
    assert number(value) == wanted


@pytest.mark.parametrize("value", ["1_000", "ten", "0x", [1, 2], {}, UNDEFINED, "1e", "nan", "\x857", "7\x1c"])
def test_what_is_no_number(value: object) -> None:
    """The rest is none."""
    assert number(value) != number(value)


@pytest.mark.parametrize(("value", "wanted"), [
    ("a", "a"), (1.0, "1"), (1e999, "Infinity"), ([1, None, [], [[2], "b", {}]], "1,,,2,b,[object Object]"), ([], ""),
    (None, "null"), (False, "false"), ([[-1e999]], "-Infinity"),
])
def test_what_a_value_is_as_a_key(value: object, wanted: str) -> None:
    """`String(value)`, as of session ids that are no text."""
    assert key(value) == wanted


@pytest.mark.parametrize(("processes", "pid_check", "found"), [
    (Some(p1=NOW - 60_500.0), "auto", [1]),  # this machine's, and 2 has died
    (Some(p1=NOW - 9e6), "auto", [1, 2]),  # another process with that pid: another namespace
    (Some(), "auto", [1, 2]),
    (Some(p1=None), "auto", [1]),  # no start times: macOS
    (Some(p2=NOW - 9e6), "on", [2]),
    (Some(), "on", []),
    (Some(), "off", [1, 2]),
])
def test_pids_count_where_they_are_those_of_this_machine(
    processes: Processes, pid_check: Any, found: list[int], tmp_path: Path
) -> None:
    """A fresh heartbeat is proof of life elsewhere; `on` and `off` decide for themselves."""
    put(tmp_path, instance(1), instance(2), instance(3, age=10_001))
    assert pids(snapshot(str(tmp_path), now_ms=NOW, stale_ms=10_000, pid_check=pid_check, processes=processes)) == found


def test_start_times_are_known(tmp_path: Path) -> None:
    """A process that starts now is found to have started now."""
    processes = Processes()
    if processes.started_ms(os.getpid()) is None:
        pytest.skip("no /proc on this system")
    before = time.time() * 1000
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        started = processes.started_ms(process.pid)
        assert started is not None
        assert before - 2000 < started < time.time() * 1000 + 2000
        assert processes.exists(process.pid)
        process.communicate()
    assert not processes.exists(2**40)


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*flags: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "coding_agent_exporter", "snapshot", *flags],
                              env=environment(tmp_path, env), capture_output=True, text=True, check=False, timeout=60)

    return run


def test_the_command_finds_the_directory_as_pi_telemetry_does(
    command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """The flag, else the variable, else the home directory; one that is not there has no agents."""
    home = tmp_path / ".pi" / "agent" / "telemetry" / "instances"
    for done, wanted in ((command(), home), (command(PI_TELEMETRY_DIR="/nowhere"), "/nowhere"),
                         (command("--dir=/d", PI_TELEMETRY_DIR="/nowhere"), "/d")):
        assert (done.returncode, done.stderr) == (0, "")
        document = json.loads(done.stdout)
        assert (document["telemetryDir"], document["aggregate"]) == (str(wanted), "none")


@pytest.mark.parametrize(("flags", "variable", "wanted"), [
    ([], "", 10_000), ([], "250.9", 250), ([], "soon", 10_000), ([], "-1", 10_000), (["--stale-ms=3000"], "1", 3000),
])
def test_the_stale_time(
    flags: list[str], variable: str, wanted: int, command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """The flag, else a variable that makes sense, else ten seconds."""
    assert json.loads(command(*flags, PI_TELEMETRY_STALE_MS=variable).stdout)["staleMs"] == wanted


@pytest.mark.parametrize("flags", [["--stale-ms=0"], ["--stale-ms", "soon"], ["--pid-check=maybe"], ["--dirs=x"]])
def test_a_flag_that_makes_no_sense(
    flags: list[str], command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """One line, exit code 2."""
    done = command(*flags)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
