"""The `usage` command as a person and a script meet it: tables, files, errors, progress, the end by Ctrl-C."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import unicodedata
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coding_agent_exporter.usageprogress import ProgressBar
from coding_agent_exporter.usagetable import MIN_NAME, columns, printable, shorten
from process_support import DEADLINE, environment, wait_for
from usage_support import RECORDINGS, ask, event, log, run, table, tokens

if TYPE_CHECKING:
    from pathlib import Path

BY_MODEL = """\
MODEL                 MSGS  INPUT  OUTPUT  CACHE  API USD  SUBSCR USD
fakechat/fake-large     52   115k    5679   200k   0.4893           -
fakeanth/fake-claude    18  29.5k    1782   155k   0.2632           -
unknown                  -      -       -      -   0.2333      0.0223
loopback/sonnet-like     9   2899    1370   2505   0.0300           -
loopback/haiku-like     10  16.9k    2113   5261   0.0280           -
fakechat/fake-tiny       6  37.6k     739  59.4k   0.0124           -
fakechat/fake-small     10  11.0k    1045  17.1k   0.0053           -
loopback/tiny-ctx        2   4011     411    478   0.0018           -
fakechat/fake-free       2   4073     291   5048   0.0000           -
TOTAL                  109   221k   13.4k   444k   1.0633      0.0223

SUBSCR USD: imputed to subscriptions, not billed; not to be added to API USD
"""

BY_DAY = """\
from 2026-11-21T00:00:00+00:00

DAY         MSGS  INPUT  OUTPUT  CACHE  API USD  SUBSCR USD
2026-11-21   109   221k   13.4k   444k   1.0633      0.0223
TOTAL        109   221k   13.4k   444k   1.0633      0.0223

SUBSCR USD: imputed to subscriptions, not billed; not to be added to API USD
"""


# -- the table


def test_by_model(tmp_path: Path) -> None:
    """Without flags: what each model cost, the dearest first; real and imputed money in columns of their own."""
    assert ask(tmp_path, *RECORDINGS) == BY_MODEL


def test_by_day(tmp_path: Path) -> None:
    """A bounded period is named."""
    assert ask(tmp_path, *RECORDINGS, "--by=day", "--since=2026-11-21", "--utc") == BY_DAY


def test_estimates_and_unpriced_tokens_are_marked(tmp_path: Path) -> None:
    """Each mark has a line that says what it means; where there is nothing to mark, there is no such line."""
    root = log(
        tmp_path, "pi-coding",
        event("2026-05-01T10:00:00Z", message_id="m1", model="anthropic/claude-sonnet-4-5", tokens=tokens(10**5)),
        event("2026-05-01T10:01:00Z", message_id="m2", model="no/body", tokens=tokens(12_345)),
        event("2026-05-01T10:02:00Z", message_id="m3", model="a/tiny", usd=0.000_000_1),
    )
    text = ask(tmp_path, f"--usage.root=m={root}", env={"COLUMNS": "120"})
    lines = re.sub(r"~0\.\d{4}", "~", text).splitlines()  # what it costs is up to the price list
    assert [line.split() for line in lines[:5]] == [
        ["MODEL", "MSGS", "INPUT", "OUTPUT", "CACHE", "UNPRICED", "API", "USD", "SUBSCR", "USD"],
        ["anthropic/claude-sonnet-4-5", "1", "100k", "-", "-", "-", "~", "-"],
        ["a/tiny", "1", "-", "-", "-", "-", "<0.0001", "-"],
        ["no/body", "1", "12.3k", "-", "-", "12.3k", "?", "-"],
        ["TOTAL", "3", "112k", "-", "-", "12.3k", "~", "-"],
    ]
    assert [line[:10] for line in lines[5:]] == ["", "~ estimate", "UNPRICED: "]


def test_a_tiny_amount_below_0(tmp_path: Path) -> None:
    """What a later reading takes back has a sign, also where there are no digits to show."""
    root = log(tmp_path, "codex", event("2026-05-01T10:00:00Z", usd=0.5), event("2026-05-02T10:00:00Z", usd=0.499_99))
    text = ask(tmp_path, f"--usage.root=m={root}", "--since=2026-05-02", "--utc")
    assert text.splitlines()[-1].split() == ["TOTAL", "-", "-", "-", "-", ">-0.0001", "-"]


@pytest.mark.parametrize(("width", "by"), [(80, "session,model"), (80, "day,session,agent"), (200, "session")])
def test_the_table_fits(width: int, by: str, tmp_path: Path) -> None:
    """Names are shortened in the middle, numbers never; every line ends at the same column."""
    lines = ask(tmp_path, *RECORDINGS, f"--by={by}", env={"COLUMNS": str(width)}).splitlines()
    body = lines[: lines.index("")]
    assert len(body) > 20
    assert {len(line) for line in body} == {max(len(line) for line in body)}
    assert len(body[0]) <= width
    if width == 200:
        assert "2026-11-21T01-39-48-140Z_01a1fbc2-772c-75f6-82f0-d211d1564a55 " in "\n".join(body)


def test_names_cannot_steer_the_terminal(tmp_path: Path) -> None:
    """Control characters, and those that turn the direction of writing, are shown as escapes."""
    line = event("2026-05-01T10:00:00Z", "s\u202e\u2028\n", 1.0, model="a\x9b31m/b\r")
    root = log(tmp_path, "evil\x1b]0;x\x07", line, agent="agent\x1b[2J")
    for shape in ("table", "csv", "json"):
        text = ask(tmp_path, f"--usage.root=m={root}", "--by=source,agent,session,model", f"--format={shape}",
                   env={"COLUMNS": "300"})
        assert re.search(r"[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u202e]", text) is None
        assert r"\x1b[2J" in text or r"\u001b[2J" in text
        assert len(text.splitlines()) == (2 if shape == "csv" else 3 if shape == "table" else len(text.split("\n")) - 1)


def test_wide_and_combining_characters_keep_columns_aligned(tmp_path: Path) -> None:
    """A Chinese name takes two columns a character, an accent of its own none."""
    names = ["模型/超大型语言模型版本三", "cafe\u0301/model", "plain/model", "emoji/\N{ROCKET}\N{ROCKET}"]
    root = log(tmp_path, "pi-coding",
               *(event("2026-05-01T10:00:00Z", usd=1.0, message_id=name, model=name) for name in names))
    lines = ask(tmp_path, f"--usage.root=m={root}", env={"COLUMNS": "64"}).splitlines()
    assert len({columns(line) for line in lines}) == 1
    assert columns(lines[0]) <= 64
    assert any("cafe\u0301/model " in line for line in lines)


def test_a_terminal_that_is_not_utf_8_gets_escapes(tmp_path: Path) -> None:
    """A name is no reason to fail."""
    root = log(tmp_path, "pi-coding", event("2026-05-01T10:00:00Z", usd=1.0, message_id="m", model="модель/x"))
    text = ask(tmp_path, f"--usage.root=m={root}", env={"PYTHONIOENCODING": "ascii"})
    assert r"\u043c\u043e" in text


@given(st.text(max_size=60), st.integers(MIN_NAME, 40))
def test_shortening(text: str, width: int) -> None:
    """What fits is left alone; what does not keeps both of its ends, and never takes more columns than there are."""
    shown = printable(text)
    assert shown.isprintable()
    short = shorten(shown, width)
    assert columns(short) <= width
    if columns(shown) <= width:
        assert short == shown
    else:
        head, tail = short.split("…")[0], short.rsplit("…", 1)[1]
        assert shown.startswith(head)
        assert shown.endswith(tail)
        # A wide character may leave one column free at either side.
        assert columns(short) >= width - 2


def test_combining_marks_take_no_column() -> None:
    """What the width of a text rests on."""
    assert [columns(text) for text in ("abc", "日本", "e\u0301", "\uff46", "")] == [3, 4, 1, 2, 0]
    assert unicodedata.combining("\u0301")


# -- files for programs


def test_csv(tmp_path: Path) -> None:
    """RFC 4180: a header, CR LF, quotes where they are needed; numbers in full; no total to be added twice."""
    root = log(tmp_path, "pi-coding",
               event("2026-05-01T10:00:00Z", 'say "x", y', 0.1234567, message_id="m", model="a/b", tokens=tokens(1, 2)),
               event("2026-05-01T10:00:00Z", "sub", 2.0, message_id="n", model="a/b", cost_mode="SUBSCRIPTION"))
    raw = subprocess.run(
        [sys.executable, "-m", "coding_agent_exporter", "usage", f"--usage.root=m={root}", "--format=csv", "--utc",
         "--by=day,session"], cwd=tmp_path, env=environment(tmp_path), capture_output=True, check=True).stdout
    header, *rows = raw.decode().split("\r\n")
    assert header.split(",") == [
        "day", "session", "sessions", "messages", "input_tokens", "output_tokens", "cache_read_tokens",
        "cache_creation_tokens", "unpriced_tokens", "api_cost_usd", "api_estimated_usd", "subscription_cost_usd",
        "subscription_estimated_usd"]
    assert rows == [
        '2026-05-01,"say ""x"", y",1,1,1,2,0,0,0,0.1234567,0,,', "2026-05-01,sub,1,1,0,0,0,0,0,,,2,0", ""]


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)"])
def test_csv_holds_no_formulas(name: str, tmp_path: Path) -> None:
    """A name that a spreadsheet would calculate begins with an apostrophe."""
    root = log(tmp_path, "opencode", event("2026-05-01T10:00:00Z", name, 1.0, message_id="m", model=name), agent=name)
    (row,) = table(tmp_path, f"--usage.root=m={root}", "--by=session,model,agent")
    assert [row["session"], row["model"], row["agent"]] == [f"'{name}"] * 3


def test_json(tmp_path: Path) -> None:
    """Rows and total with numbers in full, and what was asked."""
    root = log(tmp_path, "claude", event("2026-05-01T10:00:00Z", "s", 0.125, model="anthropic/x"))
    found = json.loads(ask(tmp_path, f"--usage.root=m={root}", "--format=json", "--by=day,agent,model", "--utc",
                           "--since=2026-05-01", "--until=2026-05-02"))
    assert isinstance(found.pop("now"), int)
    amounts = {
        "sessions": 1, "messages": 0, "tokens": tokens(), "unpriced_tokens": 0,
        "api_cost": {"total_cost_usd": 0.125, "estimated_cost_usd": 0.0, "is_estimated": False},
        "subscription_cost": None,
    }
    assert found == {
        "since": "2026-05-01T00:00:00+00:00", "until": "2026-05-03T00:00:00+00:00", "by": ["day", "agent", "model"],
        "rows": [{"day": "2026-05-01", "agent": "agent-1", "model": "anthropic/x", **amounts}], "total": amounts,
    }


# -- nothing found, something wrong


def test_nothing_to_read(tmp_path: Path) -> None:
    """A sentence on standard error that says where it looked, exit code 0; files for programs are whole."""
    flags = [f"--usage.root=m={tmp_path / 'none'}", f"--sessions.dir=s={tmp_path / 'nor'}"]
    sentence = (f"coding-agent-exporter: no usage was found; looked in {tmp_path / 'none'}, {tmp_path / 'nor'}\n")
    for shape in ("table", "csv", "json"):
        result = run(tmp_path, *flags, f"--format={shape}")
        assert (result.returncode, result.stderr) == (0, sentence)
        if shape == "json":
            assert json.loads(result.stdout)["rows"] == []
        else:
            assert len(list(csv.reader(io.StringIO(result.stdout)))) == (shape == "csv")
    result = run(tmp_path, *flags, "--format=json", "--detail")
    assert (result.returncode, result.stderr, json.loads(result.stdout)["sources"]) == (0, sentence, [])


def test_nothing_in_the_period(tmp_path: Path) -> None:
    """Said apart from nothing at all."""
    root = log(tmp_path, "claude", event("2026-05-01T10:00:00Z", "s", 0.125))
    result = run(tmp_path, f"--usage.root=m={root}", "--until=2026-04-30")
    assert (result.returncode, result.stdout) == (0, "")
    assert "no usage was found in this period; looked in " in result.stderr


def test_a_log_that_cannot_be_read_is_no_secret(tmp_path: Path) -> None:
    """The rest is printed; the sum is known to be short."""
    root = log(tmp_path, "claude", event("2026-05-01T10:00:00Z", "s", 0.125))
    (root / "agents" / "agent-2" / "events" / "claude" / "usage" / "events.jsonl").mkdir(parents=True)
    result = run(tmp_path, f"--usage.root=m={root}")
    assert (result.returncode, "0.1250" in result.stdout) == (0, True)
    assert result.stderr == (
        "coding-agent-exporter: 1 of the logs and directories could not be read: `check` names them\n")


@pytest.mark.parametrize(("flags", "message"), [
    (["--by=modle"], "--by: 'modle' is not one of model, day, session, agent, source"),
    (["--by=day,day"], "--by: 'day' is given twice"),
    (["--since=soon"], ("--since: 'soon' is not a duration such as 24h or 7d, a date, a time (2026-11-21T08:00), "
                        "or one of today, yesterday, week, month")),
    (["--since=2026-05-02", "--until=2026-05-01", "--utc"],
     "--since: 2026-05-02T00:00:00+00:00 is not before --until, 2026-05-02T00:00:00+00:00"),
    (["--detail"], "--detail: only with --format=json"),
    (["--detail", "--format=json", "--by=day"],
     "--detail: not with --by or --until, which the document of mngr does not know"),
    (["--format=xml"], "--format: invalid choice: 'xml' (choose from 'table', 'json', 'csv')"),
    (["--sicne=1h"], "--sicne: unknown flag; did you mean --since?"),
    (["--usage.root="], "--usage.root: must not be empty"),
])
def test_bad_flags(flags: list[str], message: str, tmp_path: Path) -> None:
    """Exit code 2 and one line."""
    result = run(tmp_path, *flags)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.replace("choose from table, json, csv", "choose from 'table', 'json', 'csv'") == (
        f"coding-agent-exporter: error: {message}\n")


def test_no_room_for_what_has_to_be_remembered(tmp_path: Path) -> None:
    """Without any directory for temporary files: one line, exit code 1."""
    code = ("import sys, tempfile; tempfile._candidate_tempdir_list = lambda: ['/nonexistent'];"
            "from coding_agent_exporter import cli; sys.exit(cli.main(['usage']))")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(tmp_path),
                            capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert "No usable temporary directory" in result.stderr


def test_nowhere_to_write_to(tmp_path: Path) -> None:
    """A closed standard output (`>&-`) is an error in one line; a closed standard error is none."""
    def without(number: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["/bin/sh", "-c", f'exec "$@" {number}>&-', "sh", sys.executable, "-m", "coding_agent_exporter", "usage",
             *RECORDINGS], cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, check=False,
            timeout=DEADLINE)

    silent, deaf = without(1), without(2)
    assert (silent.returncode, silent.stderr) == (
        1, "coding-agent-exporter: error: [Errno 9] standard output is closed\n")
    assert (deaf.returncode, deaf.stdout) == (0, BY_MODEL)


def test_a_reader_who_has_seen_enough(tmp_path: Path) -> None:
    """A closed pipe on standard output (`| head`) ends it quietly."""
    read, write = os.pipe()
    os.close(read)
    try:
        result = subprocess.run([sys.executable, "-m", "coding_agent_exporter", "usage", *RECORDINGS], stdout=write,
                                stderr=subprocess.PIPE, env=environment(tmp_path), timeout=DEADLINE, check=False)
    finally:
        os.close(write)
    assert (result.returncode, result.stderr) == (0, b"")


# -- progress


@pytest.fixture
def endless(tmp_path: Path) -> list[str]:
    """Flags for a session file that takes hours to read, and no room on the disk: a hole of a terabyte."""
    directory = tmp_path / "sessions" / "project"
    directory.mkdir(parents=True)
    with (directory / "hole.jsonl").open("wb") as file:
        file.truncate(1 << 40)
    (tmp_path / "tmp").mkdir()
    return [f"--sessions.dir=s={tmp_path / 'sessions'}", f"--usage.root=m={tmp_path / 'none'}"]


def test_progress_on_a_terminal_and_its_end_by_ctrl_c(endless: list[str], tmp_path: Path) -> None:
    """A bar on standard error; Ctrl-C takes it away, and ends with 130, without a word, leaving no files."""
    ours, theirs = os.openpty()
    seen = b""
    process = subprocess.Popen(
        [sys.executable, "-m", "coding_agent_exporter", "usage", *endless], stdout=subprocess.PIPE, stderr=theirs,
        env=environment(tmp_path, {"TERM": "xterm", "TMPDIR": str(tmp_path / "tmp")}), cwd=tmp_path)
    os.close(theirs)
    try:
        while b" of 1,099,512 MB" not in seen:
            seen += os.read(ours, 4096)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=DEADLINE)
        while True:
            try:
                more = os.read(ours, 4096)
            except OSError:  # Linux: the other end is closed
                break
            if not more:
                break
            seen += more
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert (process.returncode, out) == (130, b"")
    frames = seen.decode().split("\r\x1b[K")
    assert frames[0] == frames[-1] == ""
    assert all(re.fullmatch(r"reading \[#* *\]  {0,2}\d+%  [\d,]+ of 1,099,512 MB", frame) for frame in frames[1:-1])
    assert list((tmp_path / "tmp").iterdir()) == []


def test_no_progress_on_a_pipe(endless: list[str], tmp_path: Path) -> None:
    """However long it takes; and Ctrl-C is as quiet there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "coding_agent_exporter", "usage", *endless], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=environment(tmp_path, {"TERM": "xterm", "TMPDIR": str(tmp_path / "tmp")}))
    try:
        wait_for(lambda: list((tmp_path / "tmp").rglob("usage.db-wal")), "the reading to begin")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (130, b"", b"")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_ends_leave_nothing_behind_either(
    number: signal.Signals, endless: list[str], tmp_path: Path
) -> None:
    """A terminal that is closed, a time that is up: the temporary file is removed. What nohup ignores stays ignored."""
    def start(*before: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*before, sys.executable, "-m", "coding_agent_exporter", "usage", *endless], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=environment(tmp_path, {"TMPDIR": str(tmp_path / "tmp")}))

    def reading() -> list[Path]:
        return list((tmp_path / "tmp").rglob("usage.db-wal"))

    process = start("/bin/sh", "-c", 'trap "" HUP; exec "$@"', "sh") if number == signal.SIGTERM else start()
    try:
        wait_for(reading, "the reading to begin")
        if number == signal.SIGTERM:
            process.send_signal(signal.SIGHUP)
        process.send_signal(number)
        out, err = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (128 + number, b"", b"")
    assert list((tmp_path / "tmp").iterdir()) == []


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "dumb", "frames"), [
    (Terminal, False, ["   5%  5 of 100 MB", "  60%  60 of 100 MB"]), (Terminal, True, []), (io.StringIO, False, []),
])
def test_frames(stream: type[io.StringIO], dumb: bool, frames: list[str]) -> None:
    """None in the first half second, then ten a second at most; none where nobody looks, or lines cannot be cleared."""
    times = iter([0.0, 0.1, 0.49, 0.5, 0.55, 0.7])
    shown = stream()
    with ProgressBar(shown, dumb=dumb, clock=lambda: next(times)) as progress:
        for done in (1, 2, 5, 6, 60):
            progress(done * 10**6, 100 * 10**6)
    text = shown.getvalue()
    assert [frame.partition("]")[2] for frame in text.split("\r\x1b[K")[1:-1]] == frames
    assert text.endswith("\r\x1b[K") == bool(frames)


def test_a_terminal_that_goes_away_is_no_error() -> None:
    """What is counted is worth more than the bar."""
    class Gone(Terminal):
        def write(self, _: str) -> int:
            raise OSError

    now = 0.0
    with ProgressBar(Gone(), clock=lambda: now) as progress:
        now = 1.0
        progress(1, 2)
        progress(2, 2)
