"""Log lines: one record is one line, whatever it holds."""

from __future__ import annotations

import io
import json
import logging
import sys
import warnings
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coding_agent_exporter import logs

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = logging.getLogger("coding_agent_exporter.tests")


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """`setup` changes the whole process: put back what pytest had."""
    root, package = logging.getLogger(), logging.getLogger("coding_agent_exporter")
    handlers, levels = root.handlers[:], (root.level, package.level)
    root.handlers[:] = []
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    package.setLevel(levels[1])
    logging.captureWarnings(capture=False)


def record(msg: str, /, fields: dict[str, object] | None = None, level: int = logging.INFO,
           args: tuple[object, ...] = ()) -> logging.LogRecord:
    made = logging.LogRecord("coding_agent_exporter.x", level, "x.py", 1, msg, args, None)
    made.created = 1767225600.5
    made.__dict__.update(logs.fields(**(fields or {})))
    return made


def test_logfmt() -> None:
    """A logfmt line: time, level, message, then fields in the order given; quoted where needed."""
    fields = {"address": ":1", "path": "/a b", "n": 3, "ratio": 0.5, "on": True, "nothing": None, "empty": "",
              "text": 'say "x=\\"', "plain": "a/b"}
    line = logs.Logfmt().format(record("now %s", fields, args=("listening",)))
    assert line == ('ts=2026-01-01T00:00:00.500Z level=info msg="now listening" address=:1 path="/a b" n=3 '
                    'ratio=0.5 on=true nothing=null empty="" text="say \\"x=\\\\\\"" plain=a/b')


def test_json() -> None:
    """The same as JSON, with numbers as numbers."""
    fields = {"n": 3, "inf": float("inf"), "path": "/ä"}
    line = logs.Json().format(record("started", fields, logging.WARNING))
    assert line == ('{"ts": "2026-01-01T00:00:00.500Z", "level": "warn", "msg": "started", '
                    '"n": 3, "inf": "inf", "path": "/ä"}')


def test_field_with_a_name_of_ours() -> None:
    """A field cannot replace the message."""
    assert json.loads(logs.Json().format(record("x", {"msg": "other"}))) == {
        "ts": "2026-01-01T00:00:00.500Z", "level": "info", "msg": "x", "msg_": "other"}


@pytest.mark.parametrize("formatter", [logs.Logfmt(), logs.Json()], ids=["logfmt", "json"])
@given(st.text() | st.sampled_from(["\n", "\r\n", "\x85", "\u2028", "\x1b[2J", "\udcff", '"', "\\", "%s"]))
def test_one_line(formatter: logging.Formatter, text: str) -> None:
    """No text breaks a line, steers a terminal, or fails to be encoded."""
    line = formatter.format(record(text, {"field": text, "a b\n=": text}))
    assert line.isprintable()
    line.encode()
    if isinstance(formatter, logs.Json):
        assert json.loads(line)["field"] == text


def test_exception_is_one_field() -> None:
    """A traceback does not spread over lines."""
    made = record("failed", level=logging.ERROR)
    try:
        raise ValueError("two\nlines")  # noqa: TRY301 (a traceback is the point)
    except ValueError:
        made.exc_info = sys.exc_info()
    line = logs.Logfmt().format(made)
    assert "\n" not in line
    assert line.startswith('ts=2026-01-01T00:00:00.500Z level=error msg=failed exception="Traceback ')
    assert line.endswith('ValueError: two\\nlines"')


def test_setup(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines go to standard error; the level is the program's, libraries are heard from warnings up."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    library = logging.getLogger("watchfiles")
    logs.setup("debug", "json")
    logs.setup("info", "logfmt")
    PACKAGE.debug("not asked for")
    PACKAGE.info("ours", extra=logs.fields(n=1))
    library.info("theirs")
    library.warning("theirs, and important")
    messages = [line.partition(" level=")[2] for line in stream.getvalue().splitlines()]
    assert messages == ["info msg=ours n=1", 'warn msg="theirs, and important"']


def test_warnings_are_log_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python warning is a line like any other."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logs.setup("info", "logfmt")
        warnings.warn("old", stacklevel=1)
        # Before the context manager puts back what it found.
        logging.captureWarnings(capture=False)
    (line,) = stream.getvalue().splitlines()
    assert "level=warn" in line


def test_error_level_silences_libraries_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """At level error nobody's warnings are written."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    logs.setup("error", "logfmt")
    PACKAGE.warning("x")
    logging.getLogger("watchfiles").warning("x")
    assert not stream.getvalue()
