"""Settings: where they come from, which place wins, how values are written, and what errors say."""

from __future__ import annotations

import contextlib
import re
import typing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coding_agent_exporter import config
from coding_agent_exporter.config import OPTIONS, Address, ConfigError, Settings
from coding_agent_exporter.model import Root

HOME = Path("/home/dev")
CWD = Path("/srv/project")
FILE = "/etc/exporter.toml"


def load(*argv: str, env: dict[str, str] | None = None, toml: str | None = None) -> Settings:
    """Settings in a world where only `FILE` exists; given `toml`, its path stands in a variable."""
    def read(path: Path) -> str:
        if toml is None or path != Path(FILE):
            raise FileNotFoundError(2, "No such file or directory")
        return toml

    environ = dict(env or {})
    if toml is not None:
        environ["CODING_AGENT_EXPORTER_CONFIG_FILE"] = FILE
    return config.load(argv, environ, home=HOME, cwd=CWD, read=read)


def error(*argv: str, env: dict[str, str] | None = None, toml: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*argv, env=env, toml=toml)
    return str(caught.value)


def roots(settings: Settings, kind: str) -> list[tuple[str, str]]:
    return [(root.alias, str(root.path)) for root in settings.roots if root.kind == kind]


class TestDefaults:
    def test_all(self) -> None:
        """Without any setting the exporter has the documented defaults, below the home directory."""
        assert load() == Settings(
            config_file=None,
            roots=(
                Root("telemetry", "pi", HOME / ".pi/agent/telemetry/instances"),
                Root("usage", "mngr", HOME / ".mngr"),
                Root("sessions", "pi", HOME / ".pi/agent/sessions"),
                Root("sessions", "omp", HOME / ".omp/agent/sessions"),
            ),
            web_listen_address=(Address("", 10464),),
            web_telemetry_path="/metrics",
            web_config_file=None,
            web_max_connections=128,
            telemetry_stale_after=10.0,
            telemetry_forget_after=3600.0,
            telemetry_peak_window=60.0,
            telemetry_info_labels=("session_id", "session_name", "host", "cwd", "git_branch", "provider",
                                   "model", "thinking_level"),
            usage_agent_label=False,
            state_path=HOME / ".local/state/coding-agent-exporter/state.db",
            counters_zero_hold=0.0,
            counters_baseline_age=600.0,
            counters_max_series=10000,
            shutdown_linger=0.0,
            otlp_endpoint="",
            otlp_protocol="",
            otlp_headers="",
            otlp_compression="",
            otlp_timeout=0.0,
            otlp_flush_timeout=5.0,
            otlp_pi_spans="sessions",
            otlp_backfill=False,
            otlp_max_queue=200_000,
            otlp_max_age=7 * 86_400.0,
            otlp_metrics=False,
            otlp_metrics_interval=0.0,
            watch_poll_interval=0.2,
            watch_force_polling=False,
            input_max_line_size=4 * 2**20,
            log_level="info",
            log_format="logfmt",
        )

    def test_agents_own_variables(self) -> None:
        """The variables by which agents move their files move the default directories and thresholds."""
        settings = load(env={
            "PI_TELEMETRY_DIR": "/t", "PI_TELEMETRY_STALE_MS": "2500", "MNGR_HOST_DIR": "~/m",
            "MNGR_AGENT_STATE_DIR": "/agents/a1", "PI_CODING_AGENT_DIR": "agent",
            "XDG_STATE_HOME": "/var/state"})
        assert roots(settings, "telemetry") == [("pi", "/t")]
        assert settings.telemetry_stale_after == 2.5
        assert roots(settings, "usage") == [("mngr", "/home/dev/m"), ("agent", "/agents/a1")]
        assert roots(settings, "sessions") == [("pi", "/srv/project/agent/sessions"),
                                               ("omp", "/home/dev/.omp/agent/sessions")]
        assert settings.state_path == Path("/var/state/coding-agent-exporter/state.db")

    def test_empty_variables_of_agents_do_not_count(self) -> None:
        """An empty variable of an agent is as good as none."""
        names = ("PI_TELEMETRY_DIR", "PI_TELEMETRY_STALE_MS", "MNGR_HOST_DIR", "MNGR_AGENT_STATE_DIR",
                 "PI_CODING_AGENT_DIR", "XDG_STATE_HOME")
        assert load(env=dict.fromkeys(names, "")) == load()

    def test_relative_state_home_does_not_count(self) -> None:
        """The XDG specification has relative values passed over."""
        assert load(env={"XDG_STATE_HOME": "state"}).state_path == load().state_path

    @pytest.mark.parametrize("inside", ["~/.mngr", "~/.mngr/agents/a1", "~/x/../.mngr/agents/a1"])
    def test_agent_inside_the_host_directory_is_read_once(self, inside: str) -> None:
        """An agent's own directory below the host's is no root of its own: its spend would be read twice."""
        assert roots(load(env={"MNGR_AGENT_STATE_DIR": inside}), "usage") == [("mngr", "/home/dev/.mngr")]

    def test_one_agent_directory_for_pi_and_omp_is_read_once(self) -> None:
        """oh-my-pi obeys PI_CODING_AGENT_DIR too: where it names oh-my-pi's directory, that is one root."""
        settings = load(env={"PI_CODING_AGENT_DIR": "~/.omp/agent"})
        assert roots(settings, "sessions") == [("pi", "/home/dev/.omp/agent/sessions")]

    def test_bad_variable_of_an_agent_is_named(self) -> None:
        """An agent's variable that cannot be understood is an error that names it, unless it is overruled."""
        env = {"PI_TELEMETRY_STALE_MS": "soon"}
        assert error(env=env).startswith("PI_TELEMETRY_STALE_MS: ")
        assert load("--telemetry.stale-after=3s", env=env).telemetry_stale_after == 3


class TestPlaces:
    def test_precedence(self) -> None:
        """A flag wins over a variable, a variable over the file, the file over the default."""
        env = {"CODING_AGENT_EXPORTER_WEB_TELEMETRY_PATH": "/env"}
        toml = '[web]\ntelemetry-path = "/file"'
        assert load("--web.telemetry-path=/flag", env=env, toml=toml).web_telemetry_path == "/flag"
        assert load(env=env, toml=toml).web_telemetry_path == "/env"
        assert load(toml=toml).web_telemetry_path == "/file"

    def test_file_named_by_flag_wins(self) -> None:
        """`--config.file` wins over its variable; empty, it turns the file off."""
        assert load("--config.file=", toml="broken").config_file is None
        assert load(toml="").config_file == Path(FILE)

    @pytest.mark.parametrize("option", [o for o in OPTIONS if o.repeatable], ids=lambda o: o.name)
    def test_repeatable_from_every_place(self, option: config.Option) -> None:
        """Several: a repeated flag, commas in the variable, an array in TOML. They replace the default."""
        one, two = ("a:1", "b:2") if "address" in option.name else ("a=/1", "b=/2")
        table, _, key = option.name.rpartition(".")
        expected = load(option.flag, one, f"{option.flag}={two}")
        assert load(env={option.env: f"{one}, {two}"}) == expected
        from_file = load(toml=f'{table}.{key} = ["{one}", "{two}"]')
        assert from_file.roots == expected.roots
        assert from_file.web_listen_address == expected.web_listen_address
        kind = option.name.partition(".")[0]
        assert expected.web_listen_address == (("a", 1), ("b", 2)) if kind == "web" else (
            roots(expected, kind) == [("a", "/1"), ("b", "/2")])

    @pytest.mark.parametrize("option", [o for o in OPTIONS if o.in_file], ids=lambda o: o.name)
    def test_every_option_from_every_place(self, option: config.Option) -> None:
        """Each option of the table can be set by flag, variable and TOML, to the same effect."""
        text, toml = SAMPLES[option.name]
        by_flag = load(f"{option.flag}={text}")
        assert by_flag != load()
        assert load(env={option.env: text}) == by_flag
        table, _, key = option.name.rpartition(".")
        by_file = load(toml=f"[{table}]\n{key} = {toml}")
        assert {**as_dict(by_file), "config_file": None} == as_dict(by_flag)

    def test_toml_paths_are_relative_to_the_file(self) -> None:
        """A relative path means the directory of the file that holds it; elsewhere the working directory."""
        assert roots(load(toml='usage.root = "logs"'), "usage") == [("logs", "/etc/logs")]
        assert roots(load("--usage.root=logs"), "usage") == [("logs", "/srv/project/logs")]

    def test_none_of_a_kind(self) -> None:
        """An empty array in TOML reads no directory of that kind."""
        assert roots(load(toml="sessions.dir = []"), "sessions") == []

    def test_info_labels(self) -> None:
        """Info labels keep the order of the family, and can be narrowed to nothing in every place."""
        flag, name = "--telemetry.info-labels", "CODING_AGENT_EXPORTER_TELEMETRY_INFO_LABELS"
        assert load(f"{flag}=model, host,model").telemetry_info_labels == ("host", "model")
        for settings in (load(f"{flag}="), load(env={name: ""}), load(toml="telemetry.info-labels = []"),
                         load(toml='telemetry.info-labels = ""')):
            assert settings.telemetry_info_labels == ()
        assert load(toml='telemetry.info-labels = ["model", "cwd"]').telemetry_info_labels == ("cwd", "model")

    def test_switches(self) -> None:
        """A switch alone is true; `--no-` and `=false` turn it off, also over a variable."""
        env = {"CODING_AGENT_EXPORTER_USAGE_AGENT_LABEL": "true"}
        assert load("--usage.agent-label").usage_agent_label
        assert load(env=env).usage_agent_label
        assert not load("--no-usage.agent-label", env=env).usage_agent_label
        assert not load("--usage.agent-label=false", env=env).usage_agent_label

    def test_kubernetes_service_variables_are_passed_over(self) -> None:
        """A Service called coding-agent-exporter must not keep every pod next to it from starting."""
        prefix = "CODING_AGENT_EXPORTER"
        suffixes = ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_METRICS", "PORT", "PORT_10464_TCP",
                    "PORT_10464_TCP_PROTO", "PORT_10464_TCP_PORT", "PORT_10464_TCP_ADDR")
        assert load(env={f"{prefix}_{suffix}": "tcp://10.0.0.1:10464" for suffix in suffixes}) == load()


SAMPLES = {
    "web.listen-address": ("127.0.0.1:9", '"127.0.0.1:9"'),
    "web.telemetry-path": ("/m", '"/m"'),
    "web.config.file": ("/web.yml", '"/web.yml"'),
    "web.max-connections": ("7", "7"),
    "telemetry.dir": ("t=/t", '"t=/t"'),
    "telemetry.stale-after": ("3s", '"3s"'),
    "telemetry.forget-after": ("0", "0"),
    "telemetry.peak-window": ("2m", '"2m"'),
    "telemetry.info-labels": ("cwd", '["cwd"]'),
    "usage.root": ("/u", '["/u"]'),
    "usage.agent-label": ("true", "true"),
    "sessions.dir": ("s=~/s", '"s=~/s"'),
    "state.path": ("/state.db", '"/state.db"'),
    "counters.zero-hold": ("30s", '"30s"'),
    "counters.baseline-age": ("1h30m", '"1h30m"'),
    "counters.max-series": ("5", "5"),
    "shutdown.linger": ("1m30s", '"1m30s"'),
    "otlp.endpoint": ("http://localhost:4318", '"http://localhost:4318"'),
    "otlp.protocol": ("grpc", '"grpc"'),
    "otlp.headers": ("a=b", '"a=b"'),
    "otlp.compression": ("gzip", '"gzip"'),
    "otlp.timeout": ("3s", '"3s"'),
    "otlp.flush-timeout": ("1s", '"1s"'),
    "otlp.pi-spans": ("usage", '"usage"'),
    "otlp.backfill": ("true", "true"),
    "otlp.max-queue": ("5", "5"),
    "otlp.max-age": ("2h", '"2h"'),
    "otlp.metrics": ("true", "true"),
    "otlp.metrics-interval": ("15s", '"15s"'),
    "watch.poll-interval": ("500ms", '"500ms"'),
    "watch.force-polling": ("true", "true"),
    "input.max-line-size": ("1MiB", "1048576"),
    "log.level": ("warn", '"warn"'),
    "log.format": ("json", '"json"'),
}


def as_dict(settings: Settings) -> dict[str, object]:
    return {name: getattr(settings, name) for name in typing.get_type_hints(Settings)}


class TestValues:
    @pytest.mark.parametrize(("text", "seconds"), [
        ("0", 0), ("0s", 0), ("30s", 30), ("10m", 600), ("1h30m", 5400), ("500ms", 0.5), ("1d", 86400),
        ("1w", 604800), ("1m500ms", 60.5)])
    def test_durations(self, text: str, seconds: float) -> None:
        """Durations are written as in Prometheus."""
        assert load(f"--counters.zero-hold={text}").counters_zero_hold == seconds

    @pytest.mark.parametrize("text", ["", "5", "-1s", "1.5s", "1s1m", "1s1s", "1 s", "s", "1S", "٣s", "101y",
                                      "9" * 30 + "s"])
    def test_not_durations(self, text: str) -> None:
        """Everything else is refused, also a number without a unit: it might mean anything."""
        assert error(f"--counters.zero-hold={text}").startswith("--counters.zero-hold: ")

    @given(st.integers(0, 99), st.integers(0, 99), st.integers(0, 99))
    def test_durations_add_up(self, hours: int, minutes: int, seconds: int) -> None:
        """The parts of a duration add up."""
        settings = load(f"--shutdown.linger={hours}h{minutes}m{seconds}s")
        assert settings.shutdown_linger == hours * 3600 + minutes * 60 + seconds

    @pytest.mark.parametrize(("text", "size"), [("4MiB", 4 << 20), ("64KiB", 65536), ("1GiB", 1 << 30),
                                                ("2048", 2048), ("2048B", 2048)])
    def test_sizes(self, text: str, size: int) -> None:
        """Sizes are bytes, in binary units or none."""
        assert load(f"--input.max-line-size={text}").input_max_line_size == size

    @pytest.mark.parametrize("text", ["", "4MB", "4 MiB", "-1", "1.5MiB", "mib"])
    def test_not_sizes(self, text: str) -> None:
        """Units that mean 1000 to some and 1024 to others are refused."""
        assert error(f"--input.max-line-size={text}").startswith("--input.max-line-size: ")

    @pytest.mark.parametrize(("text", "host", "port"), [
        (":10464", "", 10464), ("127.0.0.1:1", "127.0.0.1", 1), ("[::1]:65535", "::1", 65535),
        ("localhost:0", "localhost", 0), ("[::]:80", "::", 80)])
    def test_addresses(self, text: str, host: str, port: int) -> None:
        """Addresses are host:port, IPv6 in brackets; as text they read as they were written."""
        (address,) = load(f"--web.listen-address={text}").web_listen_address
        assert (address.host, address.port, str(address)) == (host, port, text)

    @pytest.mark.parametrize("text", ["", "10464", "localhost", "localhost:", ":65536", ":-1", "::1:80",
                                      "[::1]",
                                      "[1.2.3.4]:80", "http://localhost:80", "a b:80", ":٣"])
    def test_not_addresses(self, text: str) -> None:
        """What could be read in two ways, or in none, is refused."""
        assert error(f"--web.listen-address={text}").startswith("--web.listen-address: ")

    @pytest.mark.parametrize("text", ["/", "metrics", "", "/-/healthy", "/-/", "/-", "//x", "/a b", "/a?b",
                                      "/a#b"])
    def test_not_metrics_paths(self, text: str) -> None:
        """The metrics do not take the place of the landing page or of health checks."""
        assert error(f"--web.telemetry-path={text}").startswith("--web.telemetry-path: ")

    @pytest.mark.parametrize(("text", "alias", "path"), [
        ("/data", "/data", "/data"), ("~/data", "~/data", "/home/dev/data"), ("~", "~", "/home/dev"),
        ("data", "data", "/srv/project/data"), ("x=/data", "x", "/data"), ("x=~/d", "x", "/home/dev/d"),
        ("/a=b", "/a=b", "/a=b"), ("./a=b", "./a=b", "/srv/project/a=b"), ("x=/a=b", "x", "/a=b")])
    def test_directories(self, text: str, alias: str, path: str) -> None:
        """A directory is `alias=path`, or a path that is its own alias as it was written."""
        assert roots(load(f"--usage.root={text}"), "usage") == [(alias, path)]

    @pytest.mark.parametrize("text", ["", "=/data", "x=", "a\nb=/data", "/da\tta", "x=~other/d",
                                      f"{'a' * 101}=/x",
                                      f"/{'a' * 100}", "x=/\0", "\udcff=/x"])
    def test_not_directories(self, text: str) -> None:
        """Aliases become label values: not empty, printable, at most 100 characters."""
        assert error(f"--usage.root={text}").startswith("--usage.root: ")

    def test_longest_alias(self) -> None:
        """An alias of exactly 100 characters is fine."""
        assert roots(load(f"--usage.root={'a' * 100}=/x"), "usage") == [("a" * 100, "/x")]

    @pytest.mark.parametrize("second", ["x=/b", "y=/a", "y=/a/", "y=/b/../a"])
    def test_twins(self, second: str) -> None:
        """Within one kind neither an alias nor a directory is given twice; across kinds both may be."""
        assert "twice" in error("--usage.root=x=/a", f"--usage.root={second}")
        assert "twice" in error(f"--usage.root={second}", "--usage.root=x=/a")
        load("--usage.root=x=/a", f"--sessions.dir={second}")

    @pytest.mark.parametrize(("flag", "small", "least"), [
        ("--web.max-connections", "0", "1"), ("--counters.max-series", "0", "1"),
        ("--watch.poll-interval", "9ms", "10ms"), ("--telemetry.stale-after", "0", "1ms"),
        ("--input.max-line-size", "1023", "1KiB")])
    def test_least(self, flag: str, small: str, least: str) -> None:
        """Values with which the exporter could not work are refused, and the error names the least one."""
        assert least in error(f"{flag}={small}")
        load(f"{flag}={least}")


class TestErrors:
    @pytest.mark.parametrize(("argv", "env", "toml", "message"), [
        (["--log.level=loud"], {}, None, "--log.level: 'loud' is not one of debug, info, warn, error"),
        ([], {"CODING_AGENT_EXPORTER_LOG_LEVEL": "x"}, None,
         "CODING_AGENT_EXPORTER_LOG_LEVEL: 'x' is not one of debug, info, warn, error"),
        ([], {}, '[log]\nlevel = "x"', f"{FILE}: [log] level: 'x' is not one of debug, info, warn, error"),
        (["--web.listen-adress=:1"], {}, None,
         "--web.listen-adress: unknown flag; did you mean --web.listen-address?"),
        (["--frobnicate"], {}, None, "--frobnicate: unknown flag"),
        (["serve"], {}, None, "serve: unknown flag"),
        (["--log.level"], {}, None, "--log.level: a value is missing"),
        (["--log.level=info", "--log.level=warn"], {}, None, "--log.level: given twice"),
        (["--no-log.level"], {}, None, "--no-log.level: unknown flag; did you mean --log.level?"),
        ([], {"CODING_AGENT_EXPORTER_WEB_LISTEN_ADRESS": ":1"}, None,
         ("CODING_AGENT_EXPORTER_WEB_LISTEN_ADRESS: unknown variable; did you mean "
          "CODING_AGENT_EXPORTER_WEB_LISTEN_ADDRESS?")),
        ([], {}, '[web]\nlisten-adress = ":1"',
         f"{FILE}: [web] listen-adress: unknown key; did you mean [web] listen-address?"),
        ([], {}, "zzz = 1", f"{FILE}: zzz: unknown key"),
        ([], {}, 'web = "x"', f"{FILE}: web: unknown key"),
        ([], {}, 'config.file = "/x"',
         f"{FILE}: [config] file: unknown key; did you mean [web.config] file?"),
        ([], {}, "[web]\nmax-connections = true", f"{FILE}: [web] max-connections: must be a whole number"),
        ([], {}, "[usage]\nagent-label = 1", f"{FILE}: [usage] agent-label: must be true or false"),
        ([], {}, "[usage]\nroot = [1]", f"{FILE}: [usage] root: must be a string, or an array of them"),
        ([], {}, "[log]\nlevel = ['info']", f"{FILE}: [log] level: must be a string"),
        ([], {}, "[web]\nlisten-address = []", f"{FILE}: [web] listen-address: at least one is needed"),
        (["--config.file=x.toml"], {}, None,
         "--config.file: /srv/project/x.toml: No such file or directory"),
        (["--usage.root=/a", "--usage.root=/a"], {}, None, "--usage.root: the alias '/a' is given twice"),
    ])
    def test_messages(self, argv: list[str], env: dict[str, str], toml: str | None, message: str) -> None:
        """An error is one line that opens with where the value was written."""
        assert error(*argv, env=env, toml=toml) == message

    def test_broken_toml_names_file_and_line(self) -> None:
        """A file that is not TOML is named, with the place of the mistake."""
        message = error(toml="[web\n")
        assert message.startswith(f"CODING_AGENT_EXPORTER_CONFIG_FILE: {FILE}: not a TOML file: ")
        assert "line 1" in message

    def test_file_that_is_not_text(self, tmp_path: Path) -> None:
        """A file that is not UTF-8 is an error like any other, not a traceback."""
        file = tmp_path / "c.toml"
        file.write_bytes(b"\xff\xfe")
        with pytest.raises(ConfigError, match=re.escape(str(file))):
            config.load([f"--config.file={file}"], {}, home=HOME, cwd=CWD)

    @given(st.text(max_size=30))
    def test_one_line_whatever_was_written(self, text: str) -> None:
        """Whatever is written into a setting, the error is one printable line."""
        for argv in ([f"--log.level={text}"], [f"--usage.root={text}"], [f"--{text}"]):
            with contextlib.suppress(ConfigError):
                load(*argv)
                continue
            assert error(*argv).isprintable()


class TestTable:
    def test_settings_have_a_field_for_every_option(self) -> None:
        """`Settings` has one field for each option (directories go to `roots`), of its type."""
        hints = typing.get_type_hints(Settings)
        directories = {"telemetry_dir", "usage_root", "sessions_dir"}
        assert {option.field for option in OPTIONS} - directories | {"roots"} == set(hints)
        filled = load(*[f"--{name}={text}" for name, (text, _) in SAMPLES.items()])
        for settings in (load(), filled):
            for name, hint in hints.items():
                assert is_a(getattr(settings, name), hint), name

    def test_names(self) -> None:
        """Flag, variable and TOML key of an option derive from one name."""
        option = next(option for option in OPTIONS if option.name == "web.config.file")
        assert (option.flag, option.env, option.toml) == (
            "--web.config.file", "CODING_AGENT_EXPORTER_WEB_CONFIG_FILE", "[web.config] file")

    def test_no_two_options_share_a_name(self) -> None:
        """Dots and dashes fall together in variables: no two options may."""
        assert len({option.env for option in OPTIONS}) == len(OPTIONS)


def is_a(value: object, hint: typing.Any) -> bool:
    """Whether a value has a type as the fields of `Settings` are annotated; an int is no float here."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return isinstance(value, tuple) and all(is_a(each, args[0]) for each in value)
    if origin is typing.Literal:
        return value in args
    if args:
        return any(is_a(value, arg) for arg in args)
    return isinstance(value, hint) if issubclass(hint, Path | tuple) else type(value) is hint
