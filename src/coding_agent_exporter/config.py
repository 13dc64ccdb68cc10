"""Takes flags, environment variables and a TOML file, gives every other module one frozen `Settings`.

`options.OPTIONS` is the one list of what can be set. A flag wins over a variable, a variable over
the file, the file over the default.
"""

from __future__ import annotations

import difflib
import os.path
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, cast

from coding_agent_exporter.model import Root, RootKind
from coding_agent_exporter.options import ENV_PREFIX, INFO_LABELS, OPTIONS, Option, markdown, toml_key
from coding_agent_exporter.values import DIRECTORY, SWITCH, WORDS, Address, Named, Place

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

__all__ = [
    "INFO_LABELS", "OPTIONS", "Address", "ConfigError", "Option", "Settings", "load", "markdown", "read_text",
]

_SERVICE_LINK = re.compile(
    r"SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?")
"""What Kubernetes sets in every pod next to a Service called coding-agent-exporter: not ours."""


class ConfigError(ValueError):
    """A setting that cannot be used. One line, which opens with where the value was written."""

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


class Collector(TypedDict):
    """What `export.target.resolve` takes from the settings, by its names."""

    endpoint: str
    protocol: str
    headers: str
    compression: str
    timeout: float | None


@dataclass(frozen=True, slots=True)
class Settings:
    """What the exporter was told. Durations are seconds, sizes bytes, paths absolute."""

    config_file: Path | None
    roots: tuple[Root, ...]
    """All directories to read: telemetry, then usage, then sessions, each kind in the order it was given."""
    web_listen_address: tuple[Address, ...]
    """At least one."""
    web_telemetry_path: str
    web_config_file: Path | None
    web_max_connections: int
    telemetry_stale_after: float
    telemetry_forget_after: float
    telemetry_peak_window: float
    telemetry_info_labels: tuple[str, ...]
    """A subset of `INFO_LABELS`, in that order."""
    usage_agent_label: bool
    state_path: Path
    counters_zero_hold: float
    counters_baseline_age: float
    counters_max_series: int
    shutdown_linger: float
    otlp_endpoint: str
    otlp_protocol: str
    otlp_headers: str
    otlp_compression: str
    otlp_timeout: float
    otlp_flush_timeout: float
    otlp_pi_spans: Literal["sessions", "usage"]
    otlp_backfill: bool
    otlp_max_queue: int
    otlp_max_age: float
    otlp_metrics: bool
    otlp_metrics_interval: float
    watch_poll_interval: float
    watch_force_polling: bool
    input_max_line_size: int
    log_level: Literal["debug", "info", "warn", "error"]
    log_format: Literal["logfmt", "json"]

    @property
    def collector(self) -> Collector:
        """The settings of an OTLP collector. An empty text, or None, leaves the choice to the OTEL variables."""
        return {
            "endpoint": self.otlp_endpoint, "protocol": self.otlp_protocol, "headers": self.otlp_headers,
            "compression": self.otlp_compression, "timeout": self.otlp_timeout or None,
        }


_ROOT_KINDS: tuple[tuple[str, RootKind], ...] = (
    ("telemetry.dir", "telemetry"), ("usage.root", "usage"), ("sessions.dir", "sessions"))
_BY_NAME = {option.name: option for option in OPTIONS}
_BY_FLAG = {option.flag: option for option in OPTIONS}
_BY_ENV = {option.env: option for option in OPTIONS}


class _Given(NamedTuple):
    """One value as somebody wrote it."""

    text: str
    origin: str
    base: Path
    """What a relative path is relative to."""


_Written = dict[str, list[_Given]]
"""What one place sets: option name to values. An empty list is an empty TOML array: set, to nothing."""


def read_text(file: Path) -> str:
    """The reader `load` uses outside of tests. Raises OSError, or ValueError when the file is not UTF-8."""
    return file.read_text(encoding="utf-8")


def load(argv: Sequence[str], environ: Mapping[str, str], *, home: Path, cwd: Path,
         read: Callable[[Path], str] = read_text) -> Settings:
    """Settings from flags (`--name=value` or `--name value`), variables, and the file that either names.

    Depends on nothing but its arguments. Relative paths are relative to `cwd`, those in the TOML file to the
    file's directory. Raises ConfigError.
    """
    flags, variables = _from_flags(argv, cwd), _from_environ(environ, cwd)
    written = {**variables, **flags}
    config_file = _value(_BY_NAME["config.file"], written, environ, home, cwd)
    if config_file is not None:
        written = {**_from_toml(config_file, written["config.file"][0].origin, read), **written}
    values = {option.name: _value(option, written, environ, home, cwd) for option in OPTIONS}
    roots = tuple(Root(kind, *named) for name, kind in _ROOT_KINDS for named in values.pop(name))
    return Settings(roots=roots, **{_BY_NAME[name].field: value for name, value in values.items()})


def _from_flags(argv: Sequence[str], cwd: Path) -> _Written:
    written: _Written = {}
    rest = iter(argv)
    for token in rest:
        flag, equals, text = token.partition("=")
        option = _BY_FLAG.get(flag)
        off = _BY_FLAG.get(f"--{flag.removeprefix('--no-')}") if option is None and not equals else None
        if off is not None and off.type is SWITCH:
            option, text = off, "false"
        elif option is None:
            raise ConfigError(f"{flag}: unknown flag{did_you_mean(flag, _BY_FLAG)}")
        elif option.type is SWITCH and not equals:
            text = "true"
        elif not equals:
            value = next(rest, None)
            if value is None:
                raise ConfigError(f"{flag}: a value is missing")
            text = value
        if option.name in written and not option.repeatable:
            raise ConfigError(f"{option.flag}: given twice")
        written.setdefault(option.name, []).append(_Given(text, option.flag, cwd))
    return written


def _from_environ(environ: Mapping[str, str], cwd: Path) -> _Written:
    written: _Written = {}
    for name in sorted(name for name in environ if name.startswith(ENV_PREFIX)):
        option = _BY_ENV.get(name)
        if option is not None:
            text = environ[name]
            texts = [part.strip() for part in text.split(",")] if option.repeatable else [text]
            written[option.name] = [_Given(text, name, cwd) for text in texts]
        elif not _SERVICE_LINK.fullmatch(name.removeprefix(ENV_PREFIX)):
            raise ConfigError(f"{name}: unknown variable{did_you_mean(name, _BY_ENV)}")
    return written


def _from_toml(file: Path, named_by: str, read: Callable[[Path], str]) -> _Written:
    try:
        document = tomllib.loads(read(file))
    except OSError as error:
        raise ConfigError(f"{named_by}: {file}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{named_by}: {file}: not a TOML file: {error}") from error
    in_file = {option.name: option for option in OPTIONS if option.in_file}
    written: _Written = {}
    for name, value in _flatten(document):
        option = in_file.get(name)
        if option is None:
            hint = did_you_mean(name, in_file, toml_key)
            raise ConfigError(f"{file}: {toml_key(name)}: unknown key{hint}")
        origin = f"{file}: {option.toml}"
        items = value if isinstance(value, list) and (option.repeatable or option.type is WORDS) else [value]
        # bool is an int to isinstance, and not to whoever writes `zero-hold = true`.
        if any(type(item) not in option.type.toml for item in items):
            raise ConfigError(f"{origin}: must be {_toml_types(option)}")
        if option.repeatable and not items and option.type is not DIRECTORY:
            raise ConfigError(f"{origin}: at least one is needed")
        texts = [str(item).lower() if option.type is SWITCH else str(item) for item in items]
        if option.type is WORDS:
            texts = [",".join(texts)]
        written[option.name] = [_Given(text, origin, file.parent) for text in texts]
    return written


def _flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """TOML tables as dotted names. An empty table sets nothing."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _value(option: Option, written: _Written, environ: Mapping[str, str], home: Path, cwd: Path) -> Any:
    """The value of one option. Any, as the table knows types at run time; a test holds them to `Settings`."""
    given = written.get(option.name)
    if given is None:
        given = _default(option, environ, home, cwd)
    values = [_parse(option, one, home) for one in given]
    if option.type is DIRECTORY:
        _reject_twins(values, given)
    return tuple(values) if option.repeatable else values[0]


def _parse(option: Option, given: _Given, home: Path) -> Any:
    place = Place(home, given.base)
    try:
        value = option.type.parse(given.text, place)
        if option.least and cast("float", value) < cast("float", option.type.parse(option.least, place)):
            raise ValueError(f"{given.text!r} is too small; the least is {option.least}")  # noqa: TRY301 (one message for all)
        if option.type is WORDS:
            for each in cast("tuple[str, ...]", value):
                _reject_stranger(each, option.choices)
            # One order and no repetition, whatever the order they were written in.
            return tuple(choice for choice in option.choices if choice in cast("tuple[str, ...]", value))
        if option.choices:
            _reject_stranger(cast("str", value), option.choices)
    except ValueError as error:
        raise ConfigError(f"{given.origin}: {error}") from error
    return value


def _reject_stranger(word: str, choices: Sequence[str]) -> None:
    if word not in choices:
        raise ValueError(f"{word!r} is not one of {', '.join(choices)}")


def _reject_twins(values: Sequence[Named], given: Sequence[_Given]) -> None:
    """Two roots with one alias could not be told apart; one directory read twice would count all twice."""
    for i, (value, one) in enumerate(zip(values, given, strict=True)):
        for earlier in values[:i]:
            if earlier.alias == value.alias:
                raise ConfigError(f"{one.origin}: the alias {value.alias!r} is given twice")
            if os.path.normpath(earlier.path) == os.path.normpath(value.path):
                raise ConfigError(f"{one.origin}: {str(value.path)!r} is given twice")


def _default(option: Option, environ: Mapping[str, str], home: Path, cwd: Path) -> list[_Given]:
    """What an option is when nobody set it. The agents' own variables have a say, unless they are empty."""
    def agents(variable: str, alias: str, below: str, otherwise: str) -> _Given:
        value = environ.get(variable)
        return _Given(f"{alias}={value}{below}" if value else f"{alias}={otherwise}", variable, cwd)

    match option.name:
        case "telemetry.dir":
            return [agents("PI_TELEMETRY_DIR", "pi", "", "~/.pi/agent/telemetry/instances")]
        case "telemetry.stale-after" if environ.get("PI_TELEMETRY_STALE_MS"):
            return [_Given(f"{environ['PI_TELEMETRY_STALE_MS']}ms", "PI_TELEMETRY_STALE_MS", cwd)]
        case "usage.root":
            host = agents("MNGR_HOST_DIR", "mngr", "", "~/.mngr")
            agent = agents("MNGR_AGENT_STATE_DIR", "agent", "", "")
            if agent.text == "agent=" or _is_below(_parse(option, agent, home), _parse(option, host, home)):
                return [host]
            return [host, agent]
        case "sessions.dir":
            pi = agents("PI_CODING_AGENT_DIR", "pi", "/sessions", "~/.pi/agent/sessions")
            omp = _Given("omp=~/.omp/agent/sessions", option.flag, cwd)
            # oh-my-pi obeys the same variable: where it points to oh-my-pi's directory, that is one root.
            return [pi] if _is_below(_parse(option, pi, home), _parse(option, omp, home)) else [pi, omp]
        case "state.path":
            # The XDG specification has relative values passed over.
            xdg = environ.get("XDG_STATE_HOME", "")
            base = xdg if xdg.startswith("/") else "~/.local/state"
            return [_Given(f"{base}/coding-agent-exporter/state.db", "XDG_STATE_HOME", cwd)]
    return [_Given(option.default, option.flag, cwd)]


def _is_below(inner: Named, outer: Named) -> bool:
    """Whether one directory is the other or lies in it, going by their names alone."""
    return Path(os.path.normpath(inner.path)).is_relative_to(os.path.normpath(outer.path))


def did_you_mean(name: str, known: Iterable[str], show: Callable[[str], str] = str) -> str:
    """The end of an error about an unknown name: empty when nothing known comes close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {show(close[0])}?" if close else ""


def _toml_types(option: Option) -> str:
    names = {str: "a string", int: "a whole number", bool: "true or false"}
    one = " or ".join(names[each] for each in option.type.toml)
    return f"{one}, or an array of them" if option.repeatable or option.type is WORDS else one
