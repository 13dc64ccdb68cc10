"""Takes log records of the program, gives standard error one line for each, as logfmt or JSON.

Every line opens with `ts` (RFC 3339, UTC, milliseconds), `level` and `msg`. Whatever a message or a field
holds, also text that was read from somebody's files, a record stays one line.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from datetime import UTC, datetime
from typing import Any, Literal

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warn": logging.WARNING, "error": logging.ERROR}

_PLAIN = re.compile(r'[^\s"=\\]+')
_NOT_A_KEY = re.compile(r"[^A-Za-z0-9_.-]")


def fields(**values: object) -> dict[str, Any]:
    """For `extra`: `log.warning("cannot read", extra=fields(path=path, error=error))`."""
    return {"fields": values}


def setup(level: Literal["debug", "info", "warn", "error"], log_format: Literal["logfmt", "json"]) -> None:
    """Sends all log records of this process to standard error. A second call replaces the first.

    `level` is that of this program. Libraries are heard from warnings up: their lesser messages describe
    their own workings, watchfiles' one for every write of an agent.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Json() if log_format == "json" else Logfmt())
    logging.basicConfig(level=max(LEVELS[level], logging.WARNING), handlers=[handler], force=True)
    logging.getLogger(__package__).setLevel(LEVELS[level])
    logging.captureWarnings(capture=True)


class Logfmt(logging.Formatter):
    """`ts=2026-01-31T12:00:00.000Z level=info msg="now listening" address=:10464`."""

    def format(self, record: logging.LogRecord) -> str:
        pairs = _content(record, self).items()
        return " ".join(f"{_NOT_A_KEY.sub('_', key)}={_logfmt_value(value)}" for key, value in pairs)


class Json(logging.Formatter):
    """One object a line, with the members in the order of `Logfmt`."""

    def format(self, record: logging.LogRecord) -> str:
        return _json(_content(record, self))


def _content(record: logging.LogRecord, formatter: logging.Formatter) -> dict[str, Any]:
    ts = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
    content: dict[str, Any] = {
        "ts": ts.replace("+00:00", "Z"),
        "level": "warn" if record.levelno == logging.WARNING else record.levelname.lower(),
        "msg": record.getMessage(),
    }
    for key, value in getattr(record, "fields", {}).items():
        content[f"{key}_" if key in content else key] = _scalar(value)
    if record.exc_info:
        content["exception"] = formatter.formatException(record.exc_info)
    return content


def _scalar(value: object) -> str | int | float | bool | None:
    """JSON knows no infinity; everything that is not a plain value goes as its text."""
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def _logfmt_value(value: object) -> str:
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) and value.isprintable() else _json(value)
    return _json(value)


def _json(value: object) -> str:
    """JSON without a line break of any kind: U+2028 is one to many readers, and json leaves it as it is."""
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() else json.dumps(value)
