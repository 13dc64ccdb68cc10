"""Takes what the exporter watches and has found, gives the page at `/`, for a person to read."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

CONTENT_SECURITY_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""The header that belongs to this page: it loads nothing and runs nothing."""


@dataclass(frozen=True, slots=True)
class RootRow:
    """One configured directory. `found`: what lies there; `problem`: what is in the way."""

    kind: str
    alias: str
    path: str
    exists: bool
    found: str
    problem: str = ""


@dataclass(frozen=True, slots=True)
class InstanceRow:
    """One running agent process. `since` is text; `context_percent` is None while unknown."""

    pid: int
    root: str
    activity: str
    since: str
    context_percent: float | None
    model: str
    session: str


@dataclass(frozen=True, slots=True)
class SpendRow:
    """What one source spent on one model. Amounts are text with their unit; empty: nothing of that kind."""

    source: str
    model: str
    usd: str
    usd_imputed: str
    tokens: str


@dataclass(frozen=True, slots=True)
class Page:
    """Everything the page shows. `links` are (target, text); `notes` are sentences, shown first."""

    title: str
    version: str
    telemetry_path: str
    uptime: str
    links: tuple[tuple[str, str], ...] = ()
    roots: tuple[RootRow, ...] = ()
    instances: tuple[InstanceRow, ...] = ()
    spend: tuple[SpendRow, ...] = ()
    notes: tuple[str, ...] = ()


_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5d666f; --line: #dde1e5; --ground: #fff;
  --panel: #f6f7f9; --link: #0b5cad; --ok: #1a7f43; --warn: #9a5b00; --bad: #b3261e }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --soft: #9aa4ae; --line: #333a41;
  --ground: #15181b; --panel: #1e2226; --link: #78b4f0; --ok: #5cc98a; --warn: #e5a84b; --bad: #f28b82 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 68rem; background: var(--ground);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
h1 { margin: 0; font-size: 1.5rem; line-height: 1.25 }
h2 { margin: 2rem 0 .5rem; font-size: 1.1rem }
a { color: var(--link) }
.soft { color: var(--soft) }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 1rem 0 }
nav a { padding: .25rem 0 }
.note { margin: .5rem 0; padding: .5rem .75rem; border-left: 3px solid var(--warn); background: var(--panel) }
.scroll { overflow-x: auto }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums }
th { color: var(--soft); font-weight: 600; font-size: .85rem; white-space: nowrap }
th, td { padding: .4rem 1.25rem .4rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: baseline }
th:last-child, td:last-child { padding-right: 0 }
.number { text-align: right; white-space: nowrap }
.path { overflow-wrap: anywhere; font-family: ui-monospace, monospace; font-size: .85rem; min-width: 12rem }
code { white-space: nowrap }
.ok { color: var(--ok) } .warn { color: var(--warn) } .bad { color: var(--bad) }
meter { width: 4.5rem; margin-right: .5rem }
@media (max-width: 40rem) { body { font-size: 15px } th, td { padding-right: .6rem } }
"""

_KINDS = {"telemetry": "heartbeats", "usage": "usage logs", "sessions": "session files"}


def render(page: Page) -> str:
    """Give the page as HTML. Every value is escaped; the page needs no other resource and no script."""
    links = ((page.telemetry_path, "Metrics"), *page.links)
    navigation = " ".join(f'<a href="{escape(target)}">{escape(text)}</a>' for target, text in links)
    return "\n".join((
        '<!DOCTYPE html>', '<html lang="en">', "<head>", '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        # An icon of its own, empty: browsers otherwise ask for /favicon.ico and log its absence.
        '<link rel="icon" href="data:,">',
        f"<title>{escape(page.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
        f"<h1>{escape(page.title)}</h1>",
        f'<div class="soft">version {escape(page.version)}, up {escape(page.uptime)}</div>',
        f"<nav>{navigation}</nav>",
        *(f'<p class="note">{escape(note)}</p>' for note in page.notes),
        *_roots(page.roots), *_instances(page), *_spend(page),
        "</body>\n</html>\n"))


def _table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """`columns` are headings, cells are HTML. A column whose heading begins with `>` is set to the right."""
    numeric = [column.startswith(">") for column in columns]

    def cells(tag: str, values: tuple[str, ...]) -> str:
        return "".join(f'<{tag} class="number">{value}</{tag}>' if right else f"<{tag}>{value}</{tag}>"
                       for value, right in zip(values, numeric, strict=True))

    head = cells("th", tuple(column.removeprefix(">") for column in columns))
    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n'
            f"<tbody>\n{body}\n</tbody></table></div>")


def _roots(roots: tuple[RootRow, ...]) -> tuple[str, ...]:
    if not roots:
        return _empty("Watched directories", "No directory is configured: name one with "
                      "<code>--telemetry.dir</code>, <code>--usage.root</code> or "
                      "<code>--sessions.dir</code>.")
    rows = []
    for root in roots:
        if root.problem:
            state = f'<span class="bad">{escape(root.problem)}</span>'
        elif not root.exists:
            state = '<span class="warn">not there yet, waited for</span>'
        else:
            state = f'<span class="ok">{escape(root.found or "empty so far")}</span>'
        rows.append((escape(_KINDS.get(root.kind, root.kind)), escape(root.alias),
                     f'<div class="path">{escape(root.path)}</div>', state))
    return ("<h2>Watched directories</h2>", _table(("Kind", "Root", "Path", "Found"), rows))


def _instances(page: Page) -> tuple[str, ...]:
    if not page.instances:
        if any(root.kind == "telemetry" and root.exists for root in page.roots):
            why = "No agent writes a heartbeat now: start one with the pi-telemetry extension."
        else:
            why = ("No heartbeat directory exists yet: install the pi-telemetry extension and start an "
                   "agent, or point <code>--telemetry.dir</code> at where it writes.")
        return _empty("Running agents", why)
    rows = [(str(instance.pid), escape(instance.root), escape(instance.activity.replace("_", " ")),
             escape(instance.since), _context(instance.context_percent), escape(instance.model),
             escape(instance.session)) for instance in page.instances]
    return ("<h2>Running agents</h2>",
            _table(("Pid", "Root", "Activity", "Since", ">Context", "Model", "Session"), rows))


def _context(percent: float | None) -> str:
    if percent is None:
        return '<span class="soft">unknown</span>'
    # The agents' own thresholds: close to the limit at 85, near it at 95.
    level = "bad" if percent >= 95 else "warn" if percent >= 85 else ""
    bar = f'<meter min="0" max="100" low="85" high="95" optimum="0" value="{min(percent, 100):.0f}"></meter>'
    return f'{bar}<span class="{level}">{percent:.0f}&nbsp;%</span>'


def _spend(page: Page) -> tuple[str, ...]:
    if not page.spend:
        if any(root.kind in {"usage", "sessions"} and root.exists for root in page.roots):
            why = "Nothing was spent yet: the next message of an agent will show up here."
        else:
            why = ("No usage log or session file was found: point <code>--usage.root</code> at mngr's host "
                   "directory, or <code>--sessions.dir</code> at pi's sessions.")
        return _empty("Spend", why)
    rows = [tuple(map(escape, (row.source, row.model, row.usd, row.usd_imputed, row.tokens)))
            for row in page.spend]
    remark = "Subscription amounts are what the tokens would have cost; nobody was billed for them."
    return ("<h2>Spend</h2>", _table(("Source", "Model", ">Billed", ">Subscription", ">Tokens"), rows),
            f'<p class="soft">{remark}</p>')


def _empty(heading: str, why: str) -> tuple[str, ...]:
    """`why` is HTML: why there is nothing, and what to do about it."""
    return (f"<h2>{heading}</h2>", f'<p class="soft">{why}</p>')
