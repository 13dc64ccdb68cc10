"""Takes the command line, gives the process an exit code: 0 ok, 1 something failed, 2 a setting is wrong.

A command is an entry of `COMMANDS`: a name, a line of help, what it adds to the parser, and the function that
runs it.
"""

from __future__ import annotations

import argparse
import errno
import logging
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from coding_agent_exporter import check, config, logs, webconfig
from coding_agent_exporter.demo import OWN_SETTINGS
from coding_agent_exporter.options import GROUPS, OPTIONS
from coding_agent_exporter.values import SWITCH, WORD, Place, duration

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from coding_agent_exporter.config import Settings

PROG = "coding-agent-exporter"
OK, FAILED, BAD_SETTING = 0, 1, 2

log = logging.getLogger(__name__)

_DESCRIPTION = """\
Prometheus exporter for coding agents: what they are doing, how full their context is, what they cost.
Reads the files that pi, oh-my-pi, OpenCode, Claude Code and Codex leave behind, and never writes to them.
"""

_EPILOG = """\
settings:
  Every flag is also an environment variable (--web.listen-address is
  CODING_AGENT_EXPORTER_WEB_LISTEN_ADDRESS; several values are separated by
  commas) and a key of the TOML file named by --config.file ([web]
  listen-address = ":10464"). A flag wins over a variable, a variable over the
  file. DIRECTORIES are PATH or ALIAS=PATH; the alias is the label root. Given
  ones replace the default ones, and missing ones are waited for.

examples:
  # export what the agents of this user do, on http://localhost:10464/metrics
  coding-agent-exporter

  # what would it read, and is anything wrong with it?
  coding-agent-exporter check

  # a sidecar that reads two mounted directories and serves one address
  coding-agent-exporter --telemetry.dir=pi=/agent/telemetry/instances \\
      --usage.root=mngr=/agent/mngr --web.listen-address=127.0.0.1:10464
"""


Load = Callable[..., "Settings"]
"""Reads the settings, with other variables and another home directory where it is given them; raises ConfigError."""


@dataclass(frozen=True, slots=True)
class Command:
    """`run` returns the exit code. It loads the settings itself: `version` answers where one is wrong.

    `without`: settings that it does not take.
    """

    name: str
    help: str
    run: Callable[[argparse.Namespace, Load], int]
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None
    takes_settings: bool = True
    usage: str = "[flags]"
    without: frozenset[str] = frozenset()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. `argv` is without the program's name."""
    if sys.stderr is None:  # started with 2>&-: nobody wants to know, and that is no error
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (until the end)
    try:
        return _run(sys.argv[1:] if argv is None else list(argv))
    except config.ConfigError as error:
        sys.stderr.write(f"{PROG}: error: {error}\n")
        return BAD_SETTING
    except OSError as error:
        sys.stderr.write(f"{PROG}: error: {error}\n")
        return FAILED
    except KeyboardInterrupt:
        return 130


def _run(argv: Sequence[str]) -> int:
    parser, known, noted = _parser()
    _reject_unknown(argv, known)
    arguments = parser.parse_args(argv)
    run: Callable[[argparse.Namespace, Load], int] = arguments.run

    def load(environ: Mapping[str, str] = os.environ, home: Path | None = None) -> Settings:
        return config.load(noted, environ, home=home or _home(), cwd=Path.cwd())

    return run(arguments, load)


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:
        # A container may run under a user id that nobody has heard of, without HOME.
        return Path("/")


def _serve(_: argparse.Namespace, load: Load) -> int:
    settings = load()
    logs.setup(settings.log_level, settings.log_format)
    from coding_agent_exporter import serve  # noqa: PLC0415 (help and errors in settings need none of it)

    try:
        return serve.serve(settings)
    except config.ConfigError:
        raise
    except webconfig.WebConfigError as error:
        raise config.ConfigError(f"web.config.file: {error}") from error
    except OSError as error:
        # An address in use, a state file that cannot be opened: the reason says it all.
        log.error("cannot go on", extra=logs.fields(error=error))  # noqa: TRY400 (no traceback: see above)
    except Exception:
        log.exception("cannot go on")
    return FAILED


def _check(arguments: argparse.Namespace, load: Load) -> int:
    settings = load()
    logs.setup("error", settings.log_format)
    from coding_agent_exporter import inspection  # noqa: PLC0415 (as in _serve)

    report = check.examine(settings, inspection.inspect(settings))
    _emit(check.as_json(report) if arguments.format == "json" else check.as_text(report))
    return FAILED if report.problems else OK


def _add_check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=("text", "json"), default="text",
                        help="format of the report (default: text)")


def _snapshot(arguments: argparse.Namespace, _: Load) -> int:
    from coding_agent_exporter import ecmascript, snapshot  # noqa: PLC0415 (as in _serve)

    # The variables are pi-telemetry's, and so is what becomes of one that makes no sense: the default.
    directory = (arguments.dir or os.environ.get("PI_TELEMETRY_DIR", "").strip()
                 or str(_home() / ".pi" / "agent" / "telemetry" / "instances"))
    stale_ms = arguments.stale_ms
    if stale_ms is None:
        configured = ecmascript.number(os.environ.get("PI_TELEMETRY_STALE_MS", ""))
        stale_ms = math.floor(configured) if 0 < configured < math.inf else 10_000
    found = snapshot.snapshot(directory, now_ms=time.time_ns() // 1_000_000, stale_ms=stale_ms,
                              pid_check=arguments.pid_check)
    _emit(ecmascript.dumps(found, 2 if arguments.pretty else 0) + "\n")
    return OK


def _add_snapshot_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stale-ms", type=_positive, metavar="N",
                        help="age of a heartbeat, in ms, beyond which its agent is left out "
                             "(default: $PI_TELEMETRY_STALE_MS, else 10000)")
    parser.add_argument("--pretty", action="store_true", help="indent the document")
    parser.add_argument("--dir", metavar="DIRECTORY", default="",
                        help="directory of instance files "
                             "(default: $PI_TELEMETRY_DIR, else ~/.pi/agent/telemetry/instances)")
    parser.add_argument("--pid-check", choices=("auto", "on", "off"), default="auto",
                        help="whether an agent must be a process of this machine; auto: where one of them is, started "
                             "when its heartbeat says (default: auto)")


def _positive(text: str) -> int:
    try:
        number = math.floor(float(text))
    except (ValueError, OverflowError):
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return number


def _shipped(kind: str) -> Callable[[argparse.Namespace, Load], int]:
    def run(arguments: argparse.Namespace, _: Load) -> int:
        from coding_agent_exporter import shipped  # noqa: PLC0415 (as in _serve)

        files = {file.stem: file for file in shipped.files(kind)}
        unknown = [name for name in arguments.names if name not in files]
        if unknown:
            raise config.ConfigError(f"{unknown[0]}: there is no such file among the {kind}: {', '.join(files)}")
        chosen = [files[name] for name in arguments.names or files]
        if arguments.dir:
            for written in shipped.write(chosen, Path(arguments.dir), force=arguments.force):
                _emit(f"{written}\n")
        elif arguments.names:
            for file in chosen:
                _emit(file.read_text(encoding="utf-8"))
        else:
            _emit("".join(f"{name:<12}{shipped.title(file)}\n" for name, file in files.items()))
        return OK

    return run


def _add_shipped_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="print these; without a name, list what there is")
    parser.add_argument("--dir", metavar="DIRECTORY", default="",
                        help="write them, or all of them, into this directory, and print the paths")
    parser.add_argument("--force", action="store_true", help="overwrite files that are not as they are shipped")


def _usage(arguments: argparse.Namespace, load: Load) -> int:
    settings = load()
    logs.setup("error", settings.log_format)
    from coding_agent_exporter import usage  # noqa: PLC0415 (as in _serve)
    from coding_agent_exporter.usageprogress import ProgressBar  # noqa: PLC0415

    try:
        question = usage.Question(
            by=usage.parse_by(arguments.by), since=arguments.since, until=arguments.until, utc=arguments.utc,
            format=arguments.format, detail=arguments.detail)
        dumb = os.environ.get("TERM", "dumb") == "dumb"
        with usage.tidy_end(), ProgressBar(sys.stderr, dumb=dumb) as progress:
            answer = usage.usage(settings, question, progress=progress, width=shutil.get_terminal_size().columns)
    except usage.QuestionError as error:
        raise config.ConfigError(str(error)) from error
    for note in answer.notes:
        sys.stderr.write(f"{PROG}: {note}\n")
    _emit(_encodable(answer.text))
    return OK


def _add_usage_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--by", metavar="A,B,...", default="",
                        help="what the rows are: model, day, session, agent or source, or several of them "
                             "(default: model)")
    parser.add_argument("--since", metavar="WHEN", default="",
                        help="leave out what is older: a duration (24h, 7d), a date, a time, today, yesterday, week or "
                             "month (default: everything; with --detail 24h)")
    parser.add_argument("--until", metavar="WHEN", default="",
                        help="leave out what is newer; a date or word stands for all of it, its last day included "
                             "(default: nothing is)")
    parser.add_argument("--utc", action="store_true", help="days, and times without an offset, are UTC's, not local")
    parser.add_argument("--format", choices=("table", "json", "csv"), default="table",
                        help="format of the table (default: table)")
    parser.add_argument("--detail", action="store_true",
                        help="with --format=json: sources with their sessions and rate limits, in the shape of "
                             "`mngr usage --format json --detail`")


def _wrap(arguments: argparse.Namespace, _: Load) -> int:
    from coding_agent_exporter import wrap  # noqa: PLC0415 (as in _serve)
    from coding_agent_exporter.integrations.files import Places  # noqa: PLC0415 (as in _serve)

    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        raise config.ConfigError("wrap: no command; write it after --, as in: wrap -- pi --mode rpc")
    logging.basicConfig(format=f"{PROG}: %(message)s", level=logging.WARNING)
    places = Places.of(os.environ, telemetry_dir=arguments.telemetry_dir, agent_dir=arguments.agent_dir)
    try:
        return wrap.wrap(command, places)
    except OSError as error:
        sys.stderr.write(f"{PROG}: error: {error}\n")
        return wrap.NOT_FOUND if isinstance(error, FileNotFoundError) else wrap.NOT_EXECUTABLE


def _add_wrap_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--telemetry-dir", metavar="DIRECTORY", default="",
                        help="directory of instance files "
                             "(default: $PI_TELEMETRY_DIR, else ~/.pi/agent/telemetry/instances)")
    parser.add_argument("--agent-dir", metavar="DIRECTORY", default="",
                        help="directory of the agent, whose usage log is events/pi-coding/usage/events.jsonl in it "
                             "(default: $MNGR_AGENT_STATE_DIR, else agents/pi-rpc below $MNGR_HOST_DIR or ~/.mngr)")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND ...",
                        help="what to run, with its arguments")


def _demo(arguments: argparse.Namespace, load: Load) -> int:
    from coding_agent_exporter.demo import show  # noqa: PLC0415 (as in _serve)

    return show.run(show.Options(arguments.seed, arguments.speed, arguments.seconds, arguments.quiet), load)


def _add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=1, metavar="N",
                        help="what the agents do follows from it (default: 1)")
    parser.add_argument("--speed", type=_speed, default=1.0, metavar="N",
                        help="agents live so many times as fast; heartbeats stay as they are (default: 1)")
    parser.add_argument("--for", type=_duration, default=0.0, metavar="DURATION", dest="seconds",
                        help="end by itself after so long, such as 60s (default: on Ctrl-C)")
    parser.add_argument("--quiet", action="store_true", help="do not tell what happens to the agents")


def _speed(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0.1 <= number <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0.1 to 100")
    return number


def _duration(text: str) -> float:
    try:
        return duration(text, Place(Path(), Path()))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _top(arguments: argparse.Namespace, load: Load) -> int:
    settings = load()
    logs.setup("error", settings.log_format)
    from coding_agent_exporter import top  # noqa: PLC0415 (as in _serve)
    from coding_agent_exporter.top.view import Controls  # noqa: PLC0415

    try:
        controls = Controls(order=arguments.sort, filter=arguments.filter)
        return top.top(settings, controls, once=arguments.once, interval=arguments.interval, emit=_emit)
    except top.MissingExtraError as error:
        raise config.ConfigError(str(error)) from error


def _add_top_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--once", action="store_true",
                        help="print one frame with all agents, and end; so it is where standard output is no terminal")
    parser.add_argument("--interval", type=_interval, metavar="DURATION", default=1.0,
                        help="time between frames while nothing happens (default: 1s)")
    parser.add_argument("--sort", choices=("state", "context", "cost", "tokens", "last", "session", "pid"),
                        default="state", help="column to sort by at first (default: state)")
    parser.add_argument("--filter", metavar="WORDS", default="",
                        help="show only agents whose line holds these words (default: all)")


def _interval(text: str) -> float:
    seconds = _duration(text)
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 100ms and 1h")
    return seconds


def _version(_: argparse.Namespace, __: Load) -> int:
    _emit(f"{PROG} {version()} (Python {platform.python_version()})\n")
    return OK


def version() -> str:
    """The version of the installed package."""
    try:
        return metadata.version(PROG)
    except metadata.PackageNotFoundError:
        return "unknown (not installed)"


COMMANDS = (
    Command("serve", "serve metrics until SIGTERM; the default", _serve),
    Command("check", "say what would be read, and what is wrong; exit code 1 if anything is", _check,
            _add_check_arguments),
    Command("snapshot", "print the state of this machine's agents as JSON, as pi-telemetry-snapshot does", _snapshot,
            _add_snapshot_arguments, takes_settings=False),
    Command("usage", "print what was spent, by model, day, session, agent or source, out of the logs themselves",
            _usage, _add_usage_arguments),
    Command("top", "show the agents of this machine and what they spend, live on a terminal", _top, _add_top_arguments),
    Command("dashboards", "list, print or write the dashboards for Grafana", _shipped("dashboards"),
            _add_shipped_arguments, takes_settings=False, usage="[name ...] [flags]"),
    Command("rules", "list, print or write the alerting and recording rules for Prometheus", _shipped("rules"),
            _add_shipped_arguments, takes_settings=False, usage="[name ...] [flags]"),
    Command("wrap", "run an agent in RPC mode (pi --mode rpc) with telemetry; its input and output pass untouched",
            _wrap, _add_wrap_arguments, takes_settings=False, usage="[flags] -- command ..."),
    Command("demo", "show made-up agents with an exporter beside them, until Ctrl-C", _demo, _add_demo_arguments,
            without=OWN_SETTINGS),
    Command("version", "print the version", _version, takes_settings=False),
)


class _Parser(argparse.ArgumentParser):
    """argparse with errors in one line, and with help that survives a reader who has seen enough."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise config.ConfigError(message.removeprefix("argument "))

    def print_help(self, file: object = None) -> None:  # noqa: ARG002 (argparse's own signature)
        _emit(self.format_help())

    @property
    def flags(self) -> set[str]:
        return set(self._option_string_actions)


class _Given(argparse.Action):
    """Notes a setting as `--flag=value`: what it means is up to `config`, for flags as for variables."""

    def __init__(self, *, noted: list[str], **options: Any) -> None:
        super().__init__(**options)
        self.noted = noted

    def __call__(self, _parser: argparse.ArgumentParser, _namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:
        self.noted.append(f"{option_string}={values}" if isinstance(values, str) else str(option_string))


def _parser() -> tuple[_Parser, set[str], list[str]]:
    """The parser, all flags it knows, and the list into which it notes the settings it meets.

    One list for all commands, as a setting may stand before the command or after it.
    """
    noted: list[str] = []
    parser = _Parser(prog=PROG, usage=f"{PROG} [command] [flags]", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--version", action="store_const", const=_version, dest="run", default=_serve,
                        help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="command", parser_class=_Parser)
    known = set()
    for command in COMMANDS:
        sub = commands.add_parser(command.name, usage=f"{PROG} {command.name} {command.usage}", help=command.help,
                                  description=f"{command.help[0].upper()}{command.help[1:]}.",
                                  epilog=_EPILOG if command.takes_settings and not command.without else None)
        sub.set_defaults(run=command.run)
        if command.add_arguments is not None:
            command.add_arguments(sub)
        if command.takes_settings:
            _add_settings(sub, noted, command.without)
        known |= sub.flags
    _add_settings(parser, noted)
    return parser, known | parser.flags, noted


def _add_settings(parser: argparse.ArgumentParser, noted: list[str], without: Collection[str] = ()) -> None:
    for group, title in GROUPS.items():
        section = parser.add_argument_group(title)
        for option in (option for option in OPTIONS if option.group == group and option.name not in without):
            default = option.shown or option.default or "none"
            choices = f" One of {', '.join(option.choices)}." if option.type is WORD else ""
            several = "; repeatable" if option.repeatable else ""
            text = f"{option.help}{choices} (default: {default}{several})"
            names = [option.flag]
            shape: dict[str, Any] = {"metavar": option.type.metavar}
            if option.type is SWITCH:
                names.append(f"--no-{option.name}")
                shape = {"nargs": 0}
            section.add_argument(*names, action=_Given, noted=noted, dest=argparse.SUPPRESS,
                                 default=argparse.SUPPRESS, help=text.replace("%", "%%"), **shape)


def _reject_unknown(argv: Sequence[str], known: set[str]) -> None:
    """Before argparse, which would take the value of a misspelt flag for a command, and blame that."""
    for token in argv:
        if token == "--":  # noqa: S105 (a word of the command line)
            break  # what follows belongs to another program
        flag = token.partition("=")[0]
        if flag.startswith("--") and flag not in known:
            raise config.ConfigError(f"{flag}: unknown flag{config.did_you_mean(flag, known)}")


def _encodable(text: str) -> str:
    """What standard output cannot say (a terminal that is not UTF-8) as escapes: a name is no reason to fail."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _emit(text: str) -> None:
    """Writes to standard output; a reader who stops reading (`| head`) is no failure. Raises OSError."""
    if sys.stdout is None:  # started with >&-
        raise OSError(errno.EBADF, "standard output is closed")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still buffered would fail again at exit, with a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
