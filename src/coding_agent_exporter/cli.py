"""Takes the command line, gives the process an exit code: 0 ok, 1 something failed, 2 a setting is wrong.

What a command does is up to `commands`; here is what all have in common: settings as flags, help, errors, exit codes.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from coding_agent_exporter import config
from coding_agent_exporter.commands import BAD_SETTING, COMMANDS, FAILED, PROG, emit, home, print_version, run_serve
from coding_agent_exporter.options import GROUPS, OPTIONS
from coding_agent_exporter.values import SWITCH, WORD

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from coding_agent_exporter.commands import Load
    from coding_agent_exporter.config import Settings

__all__ = ["COMMANDS", "main"]

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

    def load(environ: Mapping[str, str] = os.environ, directory: Path | None = None) -> Settings:
        return config.load(noted, environ, home=directory or home(), cwd=Path.cwd())

    return run(arguments, load)


class _Parser(argparse.ArgumentParser):
    """argparse with errors in one line, and with help that survives a reader who has seen enough."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise config.ConfigError(message.removeprefix("argument "))

    def print_help(self, file: object = None) -> None:  # noqa: ARG002 (argparse's own signature)
        emit(self.format_help())

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
    parser.add_argument("--version", action="store_const", const=print_version, dest="run", default=run_serve,
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
