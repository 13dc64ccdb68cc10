"""Takes the shared panels and queries, gives the dashboard Exporter: is it up, does it read, store and send."""

from __future__ import annotations

from grafana import promql as q
from grafana.board import EXPORTER, FLEET, TURNS, Board, chosen
from grafana.panels import GREEN, ORANGE, RED, lines, number, target, to_dashboard, words

NO_EXPORTER = "No exporter is scraped"
NO_PROCESS = "No process_* metrics: they exist on Linux only"
NO_FILES = "No file of an agent is below the configured directories"
NO_COLLECTOR = "No spans: no collector is configured (--otlp.endpoint)"
WHO = "{{job}} {{instance}}"
EACH = ("job", "instance")
BAD = ((None, GREEN), (1, RED))
ODD = ((None, GREEN), (1, ORANGE))

UP = (f"{q.select('up')}\nand on (job, instance)\n"
      f"max_over_time({q.select('coding_agent_exporter_build_info')}[$__range])")
"""Only of targets that were an exporter in the time range: with All chosen, the variables match every target."""


def own(name: str, *matchers: str) -> str:
    """A metric of the exporter itself, without its prefix."""
    return q.select(f"coding_agent_exporter_{name}", *matchers)


def process(name: str) -> str:
    """A metric that other programs have too, of exporters only."""
    return f"{q.select(name)}\nand on (job, instance) {own('build_info')}"


def board() -> Board:
    """The dashboard."""
    board = Board(
        EXPORTER, "Coding agents / Exporter",
        "Whether the exporters are up, read all there is, store it, and get their spans delivered.",
        chosen(), since="now-6h", refresh="30s")
    _health(board)
    _reading(board)
    _storing(board)
    _sending(board)
    _process(board)
    return board


def _health(board: Board) -> None:
    def grew(name: str, *matchers: str) -> str:
        # These start over with the process: differences of raw samples would miss what follows. A rate over the
        # range, times the range, knows of resets; whether it is 0 does not depend on the extrapolation.
        return q.or_zero(f"sum (rate({own(name, *matchers)}[$__range])) * $__range_s")

    board.row(
        "Health",
        number("Down", "Exporters that could not be scraped. Red from 1 on.",
               f"count (({UP}) == 0) or 0 * count ({UP})", unit="short", empty=NO_EXPORTER, thresholds=BAD, width=3),
        words("Version", "Versions of the exporter, and of its Python. Several: an upgrade is under way.",
              f"count by (version, python_version) ({own('build_info')})", "{{version}} (Python {{python_version}})",
              empty=NO_EXPORTER, width=3),
        number("Bytes behind", ("On disk and not read. Orange from 1 MB on: a backlog, or a state file that cannot be "
                                "written."),
               f"sum ({own('lag_bytes')})", unit="bytes", empty=NO_EXPORTER,
               thresholds=((None, GREEN), (2**20, ORANGE)), width=3),
        number("Unreadable files", ("Files that cannot be read (permission, no regular file, a link out of the "
                                    "directory) or not be understood. Red from 1 on; the log names them."),
               q.or_zero(f"""sum ({own('files', 'state=~"unreadable|invalid"')})""", now=True), unit="short",
               empty=NO_EXPORTER, thresholds=BAD, width=3),
        number("Failed commits", ("In the time range. While commits fail counters stand still, and nothing is lost. "
                                  "Red from 1 on."),
               grew("store_commits_total", 'outcome="failed"'), unit="short", empty=NO_EXPORTER, thresholds=BAD,
               decimals=0, width=3),
        number("Dropped spans", "Spans that will never arrive, in the time range. Red from 1 on.",
               grew("spans_dropped_total"), unit="short", empty=NO_EXPORTER, thresholds=BAD, decimals=0, width=3),
        number("Dropped series", ("Times that a name was left out of a label in the time range, because there were too "
                                  "many: model=other, tool=other. Orange from 1 on."),
               grew("series_dropped_total"), unit="short", empty=NO_EXPORTER, thresholds=ODD, decimals=0, width=3),
        number("Polling", ("Exporters without file change notification: they poll, which costs processor time and "
                           "shortest peaks. Orange from 1 on."),
               f"sum ({own('watch_polling')})", unit="short", empty=NO_EXPORTER, thresholds=ODD, width=3),
        lines("Up", "1 while an exporter could be scraped. One that was down all the time is not known here.",
              target(UP, WHO), unit="short", empty=NO_EXPORTER, top=1, width=8, calcs=("lastNotNull", "min")),
        lines("Duration of scrapes", ("Of the scrape before, with the step that reads what is new. Red from 5 s on: "
                                      "near usual timeouts."),
              target(q.total("max", EACH, own("last_scrape_duration_seconds")), WHO), unit="s", empty=NO_EXPORTER,
              thresholds=((None, GREEN), (5, RED)), width=8),
        lines("Steps", "Passes over the inputs, as steps a second. 0 while the exporter is up: the process hangs.",
              target(q.rate(own("steps_total"), *EACH), WHO), unit="ops", empty=NO_EXPORTER, width=8),
    )


def _reading(board: Board) -> None:
    board.row(
        "Reading",
        lines("Files", "Files below the configured directories. All but ok need a look.",
              target(q.total("sum", ("kind", "state", "root"), own("files")), "{{kind}} {{root}} {{state}}"),
              unit="short", empty=NO_FILES, link=to_dashboard("Fleet", FLEET)),
        lines("Bytes behind over time", "On disk and not read: a line that is being written, or a backlog.",
              target(q.total("sum", ("kind", "root"), own("lag_bytes")), "{{kind}} {{root}}"), unit="bytes",
              empty=NO_FILES),
        lines("Bytes read", "Bytes a second of logs. 0 although agents work: the wrong directory.",
              target(q.rate(own("read_bytes_total"), "kind", "root"), "{{kind}} {{root}}"), unit="Bps", empty=NO_FILES,
              stack=True),
        lines("Lines read", "Lines a second of logs, accepted or not.",
              target(q.rate(own("read_lines_total"), "kind", "root"), "{{kind}} {{root}}"), unit="suffix: lines/s",
              empty=NO_FILES, stack=True),
        lines("Rejected input", ("Lines, or parts of lines, a second that were not counted. copied and replayed are "
                                 "normal; many bad_* mean a writer that has changed its format."),
              target(q.rate(own("rejected_total"), "kind", "reason"), "{{kind}} {{reason}}"), unit="suffix: /s",
              empty="Nothing was rejected", stack=True, interval="1m"),
        lines("Files read again", ("Files a second that were truncated or replaced. What was written between the last "
                                   "read and a truncation is lost."),
              target(q.rate(own("file_restarts_total"), "kind", "root"), "{{kind}} {{root}}"), unit="suffix: /s",
              empty="No file was truncated or replaced", stack=True, interval="1m"),
    )


def _storing(board: Board) -> None:
    board.row(
        "Storing and counting",
        lines("Commits", "Commits to the state file a second. Failed ones: the disk is full, or read-only.",
              target(q.rate(own("store_commits_total"), "outcome"), "{{outcome}}"), unit="ops", empty=NO_EXPORTER,
              names=("ok", "failed"), width=8),
        lines("State file", "Its size: it grows with the sessions of the last hours, and does not shrink.",
              target(q.total("max", EACH, own("store_size_bytes")), WHO), unit="bytes", empty=NO_EXPORTER, width=8),
        lines("Series", "Counter series held. The bound is --counters.max-series.",
              target(q.total("max", EACH, own("series")), WHO), unit="short", empty=NO_EXPORTER, width=8),
        lines("Money ahead of the logs", ("Shown, but since corrected downwards: counters never go down, they wait. "
                                          "More than cents for long needs a look (line at 1 USD)."),
              target(q.total("max", EACH, own("cost_overshoot_usd")), WHO), unit="currencyUSD", empty=NO_EXPORTER,
              thresholds=((None, GREEN), (1, ORANGE)), width=8),
        lines("Time in steps", "Share of the time that an exporter works. Over 50 % for long: a backlog, a slow disk.",
              target(q.rate(own("step_seconds_total"), *EACH), WHO), unit="percentunit", empty=NO_EXPORTER,
              thresholds=((None, GREEN), (0.5, ORANGE)), width=8),
        lines("Polling over time", "1 while file change notification does not work.",
              target(q.total("max", EACH, own("watch_polling")), WHO), unit="short", empty=NO_EXPORTER, width=8, top=1),
    )


def _sending(board: Board) -> None:
    board.row(
        "Sending spans and answering",
        lines("Spans that wait", "Finished spans in the outbox. Growing: the collector is away, refuses, or is slow.",
              target(q.total("max", EACH, own("spans_pending")), WHO), unit="short", empty=NO_COLLECTOR, width=8,
              link=to_dashboard("Turns", TURNS)),
        lines("Spans sent", "Spans a second that the collector took, and failed attempts, which are made again.",
              target(q.rate(own("spans_exported_total")), "taken"),
              target(q.rate(own("spans_export_failures_total")), "failed"),
              unit="suffix: /s", empty=NO_COLLECTOR, names=("failed",), width=8),
        lines("Spans dropped", "Spans a second that will never arrive, by reason.",
              target(q.rate(own("spans_dropped_total"), "reason"), "{{reason}}"), unit="suffix: /s",
              empty="No span was dropped", width=8, interval="1m"),
        lines("Web errors", ("Requests a second that failed through a fault of the exporter. The log has a line for "
                             "each."),
              target(q.rate(own("web_errors_total"), *EACH), WHO), unit="suffix: /s", empty=NO_EXPORTER, interval="1m"),
        lines("Refused connections", "A second, because --web.max-connections were busy.",
              target(q.rate(own("web_refused_total"), *EACH), WHO), unit="suffix: /s", empty=NO_EXPORTER,
              interval="1m"),
    )


def _process(board: Board) -> None:
    board.row(
        "Process",
        lines("Memory", "Resident memory of the exporter. The line is at 128 MB: twice what millions of messages take.",
              target(process("process_resident_memory_bytes"), WHO), unit="bytes", empty=NO_PROCESS, width=8,
              thresholds=((None, GREEN), (2**27, ORANGE))),
        lines("Processor time", "Share of one core. The line is at 50 %.",
              target(f"rate({q.select('process_cpu_seconds_total')}[$__rate_interval])\n"
                     f"and on (job, instance) {own('build_info')}", WHO),
              unit="percentunit", empty=NO_PROCESS, width=8, thresholds=((None, GREEN), (0.5, ORANGE))),
        lines("Open files", "Share of the file descriptors that the process may have. The line is at 80 %.",
              target(f"{q.select('process_open_fds')} / {q.select('process_max_fds')}\n"
                     f"and on (job, instance) {own('build_info')}", WHO),
              unit="percentunit", empty=NO_PROCESS, width=8, thresholds=((None, GREEN), (0.8, RED))),
    )
