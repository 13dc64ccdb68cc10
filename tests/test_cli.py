"""The command line as a user meets it: output, exit codes, and one line for what is wrong."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import coding_agent_exporter
from coding_agent_exporter import cli
from coding_agent_exporter.config import OPTIONS
from coding_agent_exporter.model import RootReport
from coding_agent_exporter.options import GROUPS
from coding_agent_exporter.webconfig import WebConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from coding_agent_exporter.config import Settings

    Capsys = pytest.CaptureFixture[str]


def run(*argv: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """The program as a process of its own, without settings from the environment of the tests."""
    clean = {name: os.environ[name] for name in os.environ if not name.startswith("CODING_AGENT_EXPORTER_")}
    return subprocess.run([sys.executable, "-m", "coding_agent_exporter", *argv], env=clean | (env or {}),
                          capture_output=True, text=True, timeout=60, check=False)


class TestProcess:
    def test_help(self) -> None:
        """`--help` names all flags under headings, with defaults, all commands, and three examples."""
        result = run("--help", env={"COLUMNS": "100"})
        assert (result.returncode, result.stderr) == (0, "")
        for option in OPTIONS:
            assert f"  {option.flag}" in result.stdout
        for title in GROUPS.values():
            assert f"\n{title}:\n" in result.stdout
        for command in cli.COMMANDS:
            assert f"\n    {command.name} " in result.stdout
        assert "(default: :10464; repeatable)" in " ".join(result.stdout.split())
        assert "CODING_AGENT_EXPORTER_WEB_LISTEN_ADDRESS" in result.stdout
        assert result.stdout.count("\n  # ") == 3

    def test_version(self) -> None:
        """Both spellings print one line, also where a setting is wrong."""
        wrong = {"CODING_AGENT_EXPORTER_LOG_LEVEL": "x"}
        for argv in (["--version"], ["version"]):
            result = run(*argv, env=wrong)
            assert (result.returncode, result.stderr) == (0, "")
            assert result.stdout.startswith("coding-agent-exporter ")
            assert result.stdout.count("\n") == 1

    @pytest.mark.parametrize(("argv", "env", "message"), [
        (["--counters.zero-hold=soon"], {},
         "--counters.zero-hold: 'soon' is not a duration such as 30s, 10m, 1h30m or 500ms"),
        (["check", "--web.listen-adress", ":1"], {},
         "--web.listen-adress: unknown flag; did you mean --web.listen-address?"),
        (["--web.listen-adress", ":1"], {},
         "--web.listen-adress: unknown flag; did you mean --web.listen-address?"),
        (["--log.level"], {}, "--log.level: expected one argument"),
        ([], {"CODING_AGENT_EXPORTER_LOG_LEVL": "info"},
         "CODING_AGENT_EXPORTER_LOG_LEVL: unknown variable; did you mean CODING_AGENT_EXPORTER_LOG_LEVEL?"),
    ])
    def test_bad_setting(self, argv: list[str], env: dict[str, str], message: str) -> None:
        """A bad flag or variable: exit code 2 and one line, no usage, no traceback."""
        result = run(*argv, env=env)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr == f"coding-agent-exporter: error: {message}\n"

    def test_bad_file(self, tmp_path: Path) -> None:
        """The same for a TOML file: one line that names file and key."""
        file = tmp_path / "exporter.toml"
        file.write_text('[web]\nlisten-address = "nowhere"\n')
        result = run(f"--config.file={file}")
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith(f"coding-agent-exporter: error: {file}: [web] listen-address: ")
        assert result.stderr.count("\n") == 1

    @pytest.mark.parametrize("argv", [["frobnicate"], ["serve", "check"], ["-x"], ["serve", "--format=json"]])
    def test_bad_command(self, argv: list[str]) -> None:
        """What is no command, or no flag of that command: exit code 2 and one line."""
        result = run(*argv)
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)

    def test_a_directory_that_cannot_be_looked_at_is_a_problem(self, tmp_path: Path) -> None:
        """`check` names it, and goes on with the others."""
        nowhere = tmp_path / ("x" * 300)
        result = run("check", f"--usage.root=a={nowhere}", f"--sessions.dir=s={tmp_path}", env={"HOME": str(tmp_path)})
        assert (result.returncode, result.stderr) == (1, "")
        assert f"PROBLEM: {nowhere}" in result.stdout
        assert f"sessions   s   {tmp_path}" in result.stdout

    @pytest.mark.parametrize("argv", [["--help"], ["--version"]])
    def test_reader_that_has_seen_enough(self, argv: list[str]) -> None:
        """A closed pipe on standard output ends the program quietly."""
        read, write = os.pipe()
        os.close(read)
        try:
            result = subprocess.run([sys.executable, "-m", "coding_agent_exporter", *argv], stdout=write,
                                    stderr=subprocess.PIPE, timeout=60, check=False)
        finally:
            os.close(write)
        assert (result.returncode, result.stderr) == (0, b"")


class Pipeline:
    """Stands in for what runs the real pipeline: notes the settings it is given, and answers as told."""

    def __init__(self) -> None:
        self.settings: list[Settings] = []
        self.reports: list[RootReport] = []
        self.serving: Callable[[], int] = lambda: 0

    def serve(self, settings: Settings) -> int:
        self.settings.append(settings)
        return self.serving()

    def inspect(self, settings: Settings) -> list[RootReport]:
        self.settings.append(settings)
        return self.reports or [RootReport(root, exists=False, found={}) for root in settings.roots]


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Pipeline]:
    """A stub in the place of the pipeline, an empty home, and logging put back afterwards."""
    stub = Pipeline()
    functions: dict[str, tuple[str, object]] = {
        "serve": ("serve", stub.serve), "inspection": ("inspect", stub.inspect)}
    for name, (function, stand_in) in functions.items():
        module = types.ModuleType(f"coding_agent_exporter.{name}")
        setattr(module, function, stand_in)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(coding_agent_exporter, name, module, raising=False)
    for name in list(os.environ):
        if name.startswith(("CODING_AGENT_EXPORTER_", "PI_", "MNGR_", "XDG_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    root, package = logging.getLogger(), logging.getLogger("coding_agent_exporter")
    handlers, levels = root.handlers[:], (root.level, package.level)
    root.handlers[:] = []
    yield stub
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    package.setLevel(levels[1])
    logging.captureWarnings(capture=False)


class TestServe:
    @pytest.mark.parametrize("argv", [
        ["--web.listen-address", ":1", "--web.listen-address=:2"],
        ["serve", "--web.listen-address", ":1", "--web.listen-address", ":2"],
        ["--web.listen-address=:1", "serve", "--web.listen-address=:2"]])
    def test_settings_arrive(self, pipeline: Pipeline, argv: list[str]) -> None:
        """`serve` is the default command; flags stand before it, after it, or both."""
        assert cli.main(argv) == 0
        (settings,) = pipeline.settings
        assert settings.web_listen_address == (("", 1), ("", 2))

    def test_switches_arrive(self, pipeline: Pipeline) -> None:
        """A switch takes no value, and does not swallow the command behind it."""
        assert cli.main(["--usage.agent-label", "serve", "--no-watch.force-polling"]) == 0
        assert pipeline.settings[0].usage_agent_label
        assert not pipeline.settings[0].watch_force_polling

    def test_exit_code_is_the_pipelines(self, pipeline: Pipeline) -> None:
        """What the pipeline returns is the exit code."""
        pipeline.serving = lambda: 1
        assert cli.main([]) == 1

    def test_address_in_use(self, pipeline: Pipeline, capsys: Capsys) -> None:
        """A failure of the system is one log line with its reason, and exit code 1."""
        def fail() -> int:
            raise OSError(98, "Address already in use")

        pipeline.serving = fail
        assert cli.main([]) == 1
        _, line = capsys.readouterr()
        assert line.endswith(' level=error msg="cannot go on" error="[Errno 98] Address already in use"\n')
        assert line.count("\n") == 1

    def test_bad_web_config_file(self, pipeline: Pipeline, capsys: Capsys) -> None:
        """A web configuration file that cannot be used is a bad setting like any other."""
        def fail() -> int:
            raise WebConfigError("/w.yml: not YAML")

        pipeline.serving = fail
        assert cli.main([]) == 2
        assert capsys.readouterr().err == "coding-agent-exporter: error: web.config.file: /w.yml: not YAML\n"

    def test_bug(self, pipeline: Pipeline, capsys: Capsys) -> None:
        """An error that nobody foresaw is one log line too, with its traceback as a field."""
        def fail() -> int:
            raise RuntimeError("a bug")

        pipeline.serving = fail
        assert cli.main(["--log.format=json"]) == 1
        line = json.loads(capsys.readouterr().err)
        assert line["level"] == "error"
        assert line["exception"].startswith("Traceback ")


class TestCheck:
    def test_nothing_wrong(self, pipeline: Pipeline, tmp_path: Path, capsys: Capsys) -> None:
        """The settings that matter, a line for each directory, a verdict; a missing one is no problem."""
        pipeline.reports = [
            RootReport(root, exists=i != 1, found={"instance files": i, "fresh": 0} if i < 2 else {})
            for i, root in enumerate(_defaults(pipeline))]
        omp = pipeline.reports.pop().root
        pipeline.reports.append(RootReport(omp, exists=True, found={"files": 3, "messages": 42}))
        assert cli.main(["check", "--web.listen-address=[::1]:9"]) == 0
        home = str(tmp_path)
        expected = [
            "listen address   [::1]:9",
            "metrics path     /metrics",
            "config file      none",
            "web config file  none",
            "state file       ~/.local/state/coding-agent-exporter/state.db  will be made",
            "otlp collector   none",
            "",
            "telemetry  pi    ~/.pi/agent/telemetry/instances  nothing yet",
            "usage      mngr  ~/.mngr                          not there yet",
            "sessions   pi    ~/.pi/agent/sessions             nothing yet",
            "sessions   omp   ~/.omp/agent/sessions            3 files, 42 messages",
            "",
            "no problems found",
        ]
        printed = capsys.readouterr().out.splitlines()
        # Columns are as wide as the home directory makes them.
        assert [_squeeze(line.replace(home, "~")) for line in printed] == list(map(_squeeze, expected))
        assert len({line.index(home) for line in printed if line.startswith(("tele", "usa", "sess"))}) == 1

    def test_problems(self, pipeline: Pipeline, tmp_path: Path, capsys: Capsys) -> None:
        """Everything wrong is marked where it is, and makes exit code 1."""
        (tmp_path / "web.yml").write_text("tls_server_confg: {}\n")
        (tmp_path / "file").write_text("")
        root = _defaults(pipeline)[0]
        pipeline.reports = [RootReport(root, exists=True, found={"instance files": 2},
                                       problems=("x.json cannot be read",))]
        assert cli.main(["check", "--web.config.file=web.yml", "--state.path=file/state.db"]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert any(line.startswith("web config file") and "PROBLEM: " in line for line in lines)
        assert any(line.startswith("state file") and f"PROBLEM: {tmp_path}/file is not a directory" in line
                   for line in lines)
        assert "    PROBLEM: x.json cannot be read" in lines
        assert lines[-1] == "3 problems found"

    def test_json(self, pipeline: Pipeline, tmp_path: Path, capsys: Capsys) -> None:
        """The same for programs."""
        (tmp_path / "state.db").mkdir()
        root = _defaults(pipeline)[0]
        pipeline.reports = [RootReport(root, exists=True, found={"instance files": 2}, problems=("bad",))]
        assert cli.main(["check", "--format=json", "--state.path=state.db"]) == 1
        document: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert document == {
            "settings": {"listen_address": ":10464", "metrics_path": "/metrics", "config_file": "none",
                         "web_config_file": "none", "state_file": f"{tmp_path}/state.db",
                         "otlp_collector": "none"},
            "roots": [{"kind": "telemetry", "alias": "pi",
                       "path": f"{tmp_path}/.pi/agent/telemetry/instances",
                       "exists": True, "found": {"instance files": 2}, "problems": ["bad"]}],
            "problems": ["state file: not a regular file", "telemetry pi: bad"],
        }

    def test_good_web_config(self, pipeline: Pipeline, tmp_path: Path, capsys: Capsys) -> None:
        """A web configuration file that can be used is said to be."""
        (tmp_path / "web.yml").write_text("http_server_config: {http2: false}\n")
        assert cli.main(["check", "--web.config.file=web.yml"]) == 0
        assert f"{tmp_path}/web.yml valid" in _squeeze(capsys.readouterr().out)

    def test_existing_state(self, pipeline: Pipeline, tmp_path: Path, capsys: Capsys) -> None:
        """A state file that is there is left as it is."""
        (tmp_path / "state.db").write_bytes(b"12345")
        assert cli.main(["check", "--state.path=state.db"]) == 0
        assert "5 bytes" in capsys.readouterr().out
        assert (tmp_path / "state.db").read_bytes() == b"12345"

    def test_grpc_not_installed(self, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> None:
        """What would keep the exporter from starting is a problem here too."""
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert cli.main(["check", "--otlp.endpoint=http://c:4317", "--otlp.protocol=grpc"]) == 1
        assert "pip install 'coding-agent-exporter[grpc]'" in capsys.readouterr().out

    def test_changes_nothing(self, pipeline: Pipeline, tmp_path: Path, capsys: Capsys) -> None:
        """`check` makes neither the state file nor its directory."""
        assert cli.main(["check"]) == 0
        assert list(tmp_path.iterdir()) == []

    def test_no_directories(self, pipeline: Pipeline, tmp_path: Path, capsys: Capsys) -> None:
        """That nothing at all would be read is said, though it may be meant."""
        (tmp_path / "c.toml").write_text("telemetry.dir = []\nusage.root = []\nsessions.dir = []\n")
        assert cli.main(["check", "--config.file=c.toml"]) == 0
        assert "nothing would be exported" in capsys.readouterr().out

    def test_hostile_names(self, pipeline: Pipeline, capsys: Capsys) -> None:
        """A file name cannot steer the terminal it is shown on."""
        root = _defaults(pipeline)[0]
        pipeline.reports = [RootReport(root, exists=True, found={}, problems=("evil\x1b[2J\n\udcffname",))]
        assert cli.main(["check"]) == 1
        assert "    PROBLEM: evil\\x1b[2J\\n\\udcffname\n" in capsys.readouterr().out

    def test_failure_to_inspect(self, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch,
                                capsys: Capsys) -> None:
        """A failure of the system while looking is exit code 1 and one line."""
        def fail(_: object) -> list[RootReport]:
            raise OSError(5, "Input/output error", "/x")

        monkeypatch.setattr(sys.modules["coding_agent_exporter.inspection"], "inspect", fail)
        assert cli.main(["check"]) == 1
        assert capsys.readouterr().err == "coding-agent-exporter: error: [Errno 5] Input/output error: '/x'\n"


def test_home_of_nobody(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user id without a name and without HOME, as containers have, is no reason to fail."""
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert cli.main([]) == 0
    assert pipeline.settings[0].state_path == Path("/.local/state/coding-agent-exporter/state.db")


def _defaults(pipeline: Pipeline) -> tuple[Any, ...]:
    """The default roots of this test's home."""
    cli.main([])
    return pipeline.settings.pop().roots


def _squeeze(line: str) -> str:
    return " ".join(line.split())
