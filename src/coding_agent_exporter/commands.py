"""Takes parsed arguments, gives each command its work: `COMMANDS` is the one list of what the program can do.

What a command needs beyond its arguments is imported when it runs: help and errors in settings need none of it.
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
from typing import TYPE_CHECKING

from coding_agent_exporter import check, config, logs, webconfig
from coding_agent_exporter.demo import OWN_SETTINGS
from coding_agent_exporter.values import Place, duration

if TYPE_CHECKING:
    from coding_agent_exporter.config import Settings

PROG = "coding-agent-exporter"
OK, FAILED, BAD_SETTING = 0, 1, 2

log = logging.getLogger(__name__)

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


def run_serve(_: argparse.Namespace, load: Load) -> int:
    settings = load()
    logs.setup(settings.log_level, settings.log_format)
    from coding_agent_exporter import serve

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
    from coding_agent_exporter import inspection

    report = check.examine(settings, inspection.inspect(settings))
    emit(check.as_json(report) if arguments.format == "json" else check.as_text(report))
    return FAILED if report.problems else OK


def _add_check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=("text", "json"), default="text",
                        help="format of the report (default: text)")


def _snapshot(arguments: argparse.Namespace, _: Load) -> int:
    from coding_agent_exporter import ecmascript, snapshot

    # The variables are pi-telemetry's, and so is what becomes of one that makes no sense: the default.
    directory = (arguments.dir or os.environ.get("PI_TELEMETRY_DIR", "").strip()
                 or str(home() / ".pi" / "agent" / "telemetry" / "instances"))
    stale_ms = arguments.stale_ms
    if stale_ms is None:
        configured = ecmascript.number(os.environ.get("PI_TELEMETRY_STALE_MS", ""))
        stale_ms = math.floor(configured) if 0 < configured < math.inf else 10_000
    found = snapshot.snapshot(directory, now_ms=time.time_ns() // 1_000_000, stale_ms=stale_ms,
                              pid_check=arguments.pid_check)
    emit(ecmascript.dumps(found, 2 if arguments.pretty else 0) + "\n")
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
        from coding_agent_exporter import shipped

        files = {file.stem: file for file in shipped.files(kind)}
        unknown = [name for name in arguments.names if name not in files]
        if unknown:
            raise config.ConfigError(f"{unknown[0]}: there is no such file among the {kind}: {', '.join(files)}")
        chosen = [files[name] for name in arguments.names or files]
        if arguments.dir:
            for written in shipped.write(chosen, Path(arguments.dir), force=arguments.force):
                emit(f"{written}\n")
        elif arguments.names:
            for file in chosen:
                emit(file.read_text(encoding="utf-8"))
        else:
            emit("".join(f"{name:<12}{shipped.title(file)}\n" for name, file in files.items()))
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
    from coding_agent_exporter import usage
    from coding_agent_exporter.usageprogress import ProgressBar

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
    emit(_encodable(answer.text))
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
    from coding_agent_exporter import wrap
    from coding_agent_exporter.integrations.files import Places

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
    from coding_agent_exporter.demo import show

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
    from coding_agent_exporter import top
    from coding_agent_exporter.top.view import Controls

    try:
        controls = Controls(order=arguments.sort, filter=arguments.filter)
        return top.top(settings, controls, once=arguments.once, interval=arguments.interval, emit=emit)
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


def print_version(_: argparse.Namespace, __: Load) -> int:
    emit(f"{PROG} {version()} (Python {platform.python_version()})\n")
    return OK


def version() -> str:
    """The version of the installed package."""
    try:
        return metadata.version(PROG)
    except metadata.PackageNotFoundError:
        return "unknown (not installed)"


COMMANDS = (
    Command("serve", "serve metrics until SIGTERM; the default", run_serve),
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
    Command("version", "print the version", print_version, takes_settings=False),
)


def home() -> Path:
    try:
        return Path.home()
    except RuntimeError:
        # A container may run under a user id that nobody has heard of, without HOME.
        return Path("/")


def _encodable(text: str) -> str:
    """What standard output cannot say (a terminal that is not UTF-8) as escapes: a name is no reason to fail."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def emit(text: str) -> None:
    """Writes to standard output; a reader who stops reading (`| head`) is no failure. Raises OSError."""
    if sys.stdout is None:  # started with >&-
        raise OSError(errno.EBADF, "standard output is closed")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still buffered would fail again at exit, with a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
