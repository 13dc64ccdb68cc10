"""Takes one setting as text, gives `config` its typed value.

Parsers raise ValueError, which says in one line what is wrong. They never name the setting: the caller knows
whether the text came from a flag, a variable or a file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MAX_ALIAS = 100
"""Longest alias of a root in characters: it is a label on every series of that root."""


class Address(NamedTuple):
    """Where to listen. An empty host is every interface; port 0 is any free port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Named(NamedTuple):
    """A directory and the alias by which the label `root` knows it."""

    alias: str
    path: Path


@dataclass(frozen=True, slots=True)
class Place:
    """What `~` and a relative path mean where a value was written."""

    home: Path
    base: Path


@dataclass(frozen=True, slots=True)
class Type:
    """A type of setting: `metavar` stands for it in help, `toml` are the TOML types it may be written in."""

    name: str
    metavar: str
    parse: Callable[[str, Place], object]
    toml: tuple[type, ...] = (str,)


# As in Prometheus: units from large to small, each at most once.
_DURATION = re.compile(
    r"(?:([0-9]+)y)?(?:([0-9]+)w)?(?:([0-9]+)d)?(?:([0-9]+)h)?(?:([0-9]+)m)?(?:([0-9]+)s)?(?:([0-9]+)ms)?")
_UNIT_SECONDS = (365 * 86400, 7 * 86400, 86400, 3600, 60, 1, 0.001)
_MAX_SECONDS = 100 * 365 * 86400
"""A century: longer is a slip of the hand, and far from what a clock or a timer overflows at."""
_SIZE = re.compile(r"([0-9]+)(B|KiB|MiB|GiB)?")
_SIZE_UNIT = {None: 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_MAX_DIGITS = 18
_URL_PATH = re.compile(r"/[A-Za-z0-9._~!$&'()*+,;=:@/-]+")


def duration(text: str, _: Place) -> float:
    """Seconds from a duration in Prometheus style: `1h30m`, `500ms`, `0`."""
    if text == "0":
        return 0.0
    match = _DURATION.fullmatch(text)
    if not text or match is None or any(len(part or "") > _MAX_DIGITS for part in match.groups()):
        raise ValueError(f"{text!r} is not a duration such as 30s, 10m, 1h30m or 500ms")
    parts = zip(match.groups(), _UNIT_SECONDS, strict=True)
    seconds = float(sum(int(part) * unit for part, unit in parts if part))
    if seconds > _MAX_SECONDS:
        raise ValueError(f"{text!r} is longer than 100 years")
    return seconds


def size(text: str, _: Place) -> int:
    """Bytes from `4MiB`, `512KiB`, `1GiB`, or a plain number of bytes."""
    match = _SIZE.fullmatch(text)
    if match is None or len(match[1]) > _MAX_DIGITS:
        raise ValueError(f"{text!r} is not a size such as 4MiB, 512KiB, or a number of bytes")
    return int(match[1]) * _SIZE_UNIT[match[2]]


def count(text: str, _: Place) -> int:
    """A whole number, not negative."""
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise ValueError(f"{text!r} is not a whole number")
    return int(text)


def switch(text: str, _: Place) -> bool:
    """`true` or `false`."""
    if text not in {"true", "false"}:
        raise ValueError(f"{text!r} is neither true nor false")
    return text == "true"


def word(text: str, _: Place) -> str:
    """The text as it is; the option lists the words it takes."""
    return text


def words(text: str, _: Place) -> tuple[str, ...]:
    """The words of a list separated by commas; none when the text is empty."""
    return tuple(part.strip() for part in text.split(",")) if text.strip() else ()


def address(text: str, _: Place) -> Address:
    """`host:port`, `:port` or `[v6]:port`. Host names are looked up when the exporter binds, not here."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host, bracketed = host[1:-1], True
    else:
        bracketed = False
    if not colon or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise ValueError(f"{text!r} is not host:port, :port or [IPv6 address]:port with a port up to 65535")
    if bracketed != (":" in host):
        raise ValueError(f"{text!r}: square brackets go around an IPv6 address, as in [::1]:10464")
    if re.search(r"[^\x21-\x7e]|[/\[\]@]", host):
        raise ValueError(f"{text!r}: {host!r} is not a host name or address")
    return Address(host, int(port))


def url_path(text: str, _: Place) -> str:
    """The path of a page; `/` is the landing page and `/-/` belongs to health checks."""
    if not _URL_PATH.fullmatch(text) or f"{text}/".startswith(("/-/", "//")):
        raise ValueError(f"{text!r} must start with /, be a plain path, and be neither / nor below /-/")
    return text


def path(text: str, place: Place) -> Path:
    """An absolute path. `~` is expanded; links are not resolved, as they may change."""
    if not text:
        raise ValueError("must not be empty")
    if "\0" in text:
        raise ValueError(f"{text!r} is not a path")
    if text == "~" or text.startswith("~/"):
        return place.home / text[2:]
    if text.startswith("~"):
        raise ValueError(f"{text!r}: ~ stands for your own home directory only; write the other one out")
    return place.base / text


def optional_path(text: str, place: Place) -> Path | None:
    """As `path`; an empty text is none."""
    return path(text, place) if text else None


def directory(text: str, place: Place) -> Named:
    """A directory as `alias=path` or as a path, which is then its own alias.

    What starts with `/`, `~` or `.` is a path, whatever `=` it holds.
    """
    alias, equals, rest = text.partition("=")
    if not equals or text.startswith(("/", "~", ".")):
        alias, rest = text, text
    elif not alias:
        raise ValueError(f"{text!r}: the alias before = is empty")
    named = Named(alias, path(rest, place))
    if not alias.isprintable():
        raise ValueError(f"the alias {alias!r} cannot be printed; choose another: alias=path")
    if len(alias) > MAX_ALIAS:
        raise ValueError(f"the alias is longer than {MAX_ALIAS} characters; choose a shorter one: alias=path")
    return named


DURATION = Type("duration", "DURATION", duration, (str, int))
SIZE = Type("size", "SIZE", size, (str, int))
COUNT = Type("number", "N", count, (int,))
SWITCH = Type("true or false", "", switch, (bool,))
WORD = Type("text", "WORD", word)
WORDS = Type("list", "A,B,...", words)
ADDRESS = Type("address", "HOST:PORT", address)
URL_PATH = Type("URL path", "PATH", url_path)
PATH = Type("path", "PATH", path)
OPTIONAL_PATH = Type("path", "PATH", optional_path)
DIRECTORY = Type("directory", "[ALIAS=]PATH", directory)
