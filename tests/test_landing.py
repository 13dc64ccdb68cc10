"""The landing page: what a person finds at `/`."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from coding_agent_exporter.landing import CONTENT_SECURITY_POLICY, InstanceRow, Page, RootRow, SpendRow, render

VOID = {"meta", "link"}
NASTY = "<script>alert('1')</script>&\"'"


class Reader(HTMLParser):
    """Reads a page as a browser would: its texts, its links, and whether its tags are balanced."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in {"href", "src", "action"}]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self._open[-1] != "style":
            self.texts.append(data.strip())

    @property
    def text(self) -> str:
        return " | ".join(self.texts).replace("\N{NO-BREAK SPACE}", " ")


def page(**parts: object) -> Page:
    return Page("coding-agent-exporter", "1.2.3", "/metrics", "3 min", **parts)  # type: ignore[arg-type]


def test_full() -> None:
    """A person sees what is watched, what was found, who runs, what was spent, and where the metrics are."""
    reader = Reader(render(page(
        links=(("/-/ready", "Readiness"),),
        roots=(RootRow("telemetry", "default", "/home/dev/t", exists=True, found="4 instances"),
               RootRow("usage", "mngr", "/home/dev/.mngr", exists=True, found="", problem="permission denied"),
               RootRow("sessions", "pi", "/home/dev/s", exists=False, found=""),
               RootRow("sessions", "omp", "/home/dev/o", exists=True, found="")),
        instances=(InstanceRow(10642, "default", "waiting_input", "3 min", 97.4, "a/opus", "Fix it"),
                   InstanceRow(10643, "default", "unknown", "1 h", None, "", "")),
        spend=(SpendRow("pi-coding", "a/opus", "$12.34", "", "1,204"),),
        notes=("Counters stand still.",))))
    assert reader.text == (
        "coding-agent-exporter | coding-agent-exporter | version 1.2.3, up 3 min | Metrics | Readiness | "
        "Counters stand still. | Watched directories | Kind | Root | Path | Found | "
        "heartbeats | default | /home/dev/t | 4 instances | "
        "usage logs | mngr | /home/dev/.mngr | permission denied | "
        "session files | pi | /home/dev/s | not there yet, waited for | "
        "session files | omp | /home/dev/o | empty so far | "
        "Running agents | Pid | Root | Activity | Since | Context | Model | Session | "
        "10642 | default | waiting input | 3 min | 97 % | a/opus | Fix it | "
        "10643 | default | unknown | 1 h | unknown | "
        "Spend | Source | Model | Billed | Subscription | Tokens | pi-coding | a/opus | $12.34 | 1,204 | "
        "Subscription amounts are what the tokens would have cost; nobody was billed for them.")
    assert reader.addresses == ["data:,", "/metrics", "/-/ready"]


def test_escapes() -> None:
    """Whatever the agents' files say is text on this page, never markup."""
    html = render(Page(NASTY, NASTY, '/"metrics', NASTY, ((NASTY, NASTY),),
                       (RootRow(NASTY, NASTY, NASTY, exists=True, found=NASTY),
                        RootRow(NASTY, NASTY, NASTY, exists=True, found="", problem=NASTY)),
                       (InstanceRow(1, NASTY, NASTY, NASTY, 1.0, NASTY, NASTY),),
                       (SpendRow(NASTY, NASTY, NASTY, NASTY, NASTY),), (NASTY,)))
    reader = Reader(html)
    assert "script" not in reader.tags
    assert reader.handlers == []
    assert reader.texts.count(NASTY) == 22
    assert NASTY in reader.addresses


def test_self_contained() -> None:
    """The page loads nothing and runs nothing, as its content security policy says."""
    reader = Reader(render(page()))
    assert not {"script", "img", "iframe", "object", "form"} & set(reader.tags)
    assert "url(" not in render(page())
    assert "@import" not in render(page())
    assert CONTENT_SECURITY_POLICY == "default-src 'none'; style-src 'unsafe-inline'"


def root(kind: str, *, exists: bool) -> RootRow:
    return RootRow(kind, "a", "/p", exists=exists, found="")


@pytest.mark.parametrize(("roots", "texts"), [
    ((), ("No directory is configured", "No heartbeat directory exists yet", "No usage log or session file")),
    ((root("telemetry", exists=True), root("usage", exists=True)),
     ("No agent writes a heartbeat now: start one", "Nothing was spent yet: the next message")),
    ((root("telemetry", exists=False), root("sessions", exists=False)),
     ("No heartbeat directory exists yet: install", "No usage log or session file was found: point")),
])
def test_empty(roots: tuple[RootRow, ...], texts: tuple[str, ...]) -> None:
    """Where nothing is shown, the page says why, and what to do."""
    text = Reader(render(page(roots=roots))).text
    for expected in texts:
        assert expected in text


@pytest.mark.parametrize(("percent", "level"), [
    (84.9, ""), (85.0, "warn"), (94.9, "warn"), (95.0, "bad"), (140.0, "bad")])
def test_context_levels(percent: float, level: str) -> None:
    """Context is marked at the agents' own thresholds; the bar ends at 100."""
    html = render(page(instances=(InstanceRow(1, "r", "working", "1 s", percent, "m", "s"),)))
    assert f'<span class="{level}">{percent:.0f}&nbsp;%</span>' in html
    assert f'value="{min(percent, 100):.0f}"' in html
