"""Takes the shared panels and queries, gives the dashboard Turns: rates, latencies, tools, failures, and traces."""

from __future__ import annotations

from grafana import promql as q
from grafana.board import FLEET, SPEND, TURNS, Board, by_label, chosen, explore, root
from grafana.panels import (
    GREEN,
    ORANGE,
    RED,
    coloured,
    columns,
    elsewhere,
    grid,
    heat,
    lines,
    number,
    ranking,
    target,
    to_dashboard,
)

NO_FILES = "No session files (pi, oh-my-pi) are read, or no turn ended: see docs/inputs.md"
NO_FIRST = "No agent records its first token (oh-my-pi does)"
NO_TOOLS = "No tool was called, or no session files (pi, oh-my-pi) are read"
NO_EXPORTER = "No exporter is scraped"
STOPS = ("stop", "toolUse", "length", "error", "aborted", "other")

TURNS_TOTAL = q.turn("coding_agent_turns_total")
FAILED = q.turn("coding_agent_turns_total", 'stop_reason="error"')
BUCKETS = q.turn("coding_agent_turn_duration_seconds_bucket")
FIRST = q.turn("coding_agent_time_to_first_token_seconds_bucket")
CALLS = q.tool("coding_agent_tool_calls_total")
CALLS_FAILED = q.tool("coding_agent_tool_calls_total", 'outcome="error"')
TOOL_BUCKETS = q.tool("coding_agent_tool_duration_seconds_bucket")
SHARE = ((None, GREEN), (0.05, ORANGE), (0.2, RED))
TOOL = ("source", "tool")


def board() -> Board:
    """The dashboard."""
    series = "coding_agent_turns_total"
    board = Board(
        TURNS, "Coding agents / Turns",
        "How many turns agents make (a turn is a model call with the tools it asked for), how long they take, and what "
        "fails.",
        chosen(root("session_root", "sessions"),
               by_label("source", "Source", q.select(series, 'root=~"$session_root"')),
               by_label("model", "Model", q.select(series, 'root=~"$session_root"', 'source=~"$source"'))),
        since="now-6h", refresh="30s", tempo=True)
    _overview(board)
    _turns(board)
    _tools(board)
    return board


def _overview(board: Board) -> None:
    def over_all(share: float, buckets: str) -> str:
        return q.quantile(share, q.spent(buckets, "le"))

    errors = f"({q.spent(FAILED)} or 0 * {q.spent(TURNS_TOTAL)})"
    failing = f"({q.spent(CALLS_FAILED)} or 0 * {q.spent(CALLS)})"
    board.row(
        "In the time range",
        number("Turns", "Turns that ended.", q.or_zero(q.spent(TURNS_TOTAL)), unit="short", empty=NO_EXPORTER,
               link=to_dashboard("Fleet", FLEET)),
        number("Median duration", "Half of the turns took no longer, tools included.", over_all(0.5, BUCKETS), unit="s",
               empty=NO_FILES),
        number("p99 duration", "One turn of a hundred took longer, tools included.", over_all(0.99, BUCKETS), unit="s",
               empty=NO_FILES),
        number("Median to first token", "From the start of a model call to its first token.", over_all(0.5, FIRST),
               unit="s", empty=NO_FIRST),
        number("Failed model calls", ("Share of turns whose model call ended in an error. Orange from 5 % on, red from "
                                      "20 %."),
               q.ratio(errors, q.spent(TURNS_TOTAL)), unit="percentunit", empty=NO_FILES, thresholds=SHARE, decimals=1),
        number("Failed tool calls", "Share of tool calls that failed. Orange from 5 % on, red from 20 %.",
               q.ratio(failing, q.spent(CALLS)), unit="percentunit", empty=NO_TOOLS, thresholds=SHARE, decimals=1),
    )


def _turns(board: Board) -> None:
    def over_time(buckets: str, *by: str) -> tuple[tuple[float, str], ...]:
        return tuple((share, q.quantile(share, q.rate(buckets, *by, "le"))) for share in (0.5, 0.9, 0.99))

    board.row(
        "Turns",
        lines("Turns a minute", "How often turns end, by harness and model.",
              target(f"{q.rate(TURNS_TOTAL, 'source', 'model')} * 60", "{{source}} {{model}}"), unit="suffix: /min",
              empty=NO_FILES, interval="1m", stack=True, link=to_dashboard("Spend", SPEND)),
        columns("Why turns ended", ("stop: the agent was done; toolUse: it asked for tools; length: the reply was cut "
                                    "off; error: the model call failed; aborted: by a person."),
                target(q.bars(TURNS_TOTAL, "stop_reason"), "{{stop_reason}}"), unit="short", empty=NO_FILES,
                interval="5m", names=STOPS),
        lines("Duration of turns", ("Tools included, on a log axis. The dots are turns that lead to their traces, "
                                    "where the data source knows of exemplars."),
              *(target(expr, f"p{share * 100:g}", exemplars=share == 0.9) for share, expr in over_time(BUCKETS)),
              unit="s", empty=NO_FILES, interval="5m", log=True, height=9),
        heat("Durations", "How many turns took how long. Dots lead to traces.", q.cells(BUCKETS, "le"), unit="s",
             empty=NO_FILES, interval="5m"),
        lines("Time to first token", "From the start of a model call to its first token, on a log axis.",
              *(target(expr, f"p{share * 100:g}", exemplars=share == 0.9) for share, expr in over_time(FIRST)),
              unit="s", empty=NO_FIRST, interval="5m", log=True),
        lines("p90 duration by model", "Nine turns of ten took no longer, tools included; on a log axis.",
              target(q.quantile(0.9, q.rate(BUCKETS, "source", "model", "le")), "{{source}} {{model}}"), unit="s",
              empty=NO_FILES, interval="15m", log=True),
        columns("Failed model calls by model", "Turns whose model call ended in an error. Aborted ones are not in it.",
                target(q.bars(FAILED, "source", "provider", "model"), "{{source}} {{provider}}/{{model}}"),
                unit="short", empty="No model call has failed", interval="5m",
                link=elsewhere("Traces of failed calls",
                               explore('span.gen_ai.operation.name = "chat" && status = error'))),
        ranking("Model calls by model", "Turns in the time range.", q.spent(TURNS_TOTAL, "provider", "model"),
                "{{provider}}/{{model}}", unit="short", empty=NO_FILES, width=12),
    )


def _tools(board: Board) -> None:
    calls = q.spent(CALLS, *TOOL)
    failed = f"({q.spent(CALLS_FAILED, *TOOL)} or 0 * {calls})"
    seconds = q.spent(q.tool("coding_agent_tool_duration_seconds_sum"), *TOOL)
    timed = q.spent(q.tool("coding_agent_tool_duration_seconds_count"), *TOOL)
    traces = {"title": "Calls of this tool that failed", "targetBlank": True,
              "url": explore('span.gen_ai.tool.name = "${__data.fields.Tool}" && status = error')}
    board.row(
        "Tools",
        grid("Tools", ("In the time range. Failed: orange from 5 % on, red from 20 %; a failure is for the model to "
                       "deal with. Tools that ran at once all have the slowest one's duration (pi). A click on a tool "
                       "leads to the traces of its failures."),
             target(f"{calls} > 0", cells=True),
             target(q.ratio(failed, calls), cells=True),
             target(q.ratio(seconds, timed), cells=True),
             target(f"{q.quantile(0.9, q.spent(TOOL_BUCKETS, *TOOL, 'le'))} >= 0", cells=True),
             empty=NO_TOOLS, sort="Calls", width=12, height=10,
             names={"tool": "Tool", "source": "Source", "Value #A": "Calls", "Value #B": "Failed", "Value #C": "Mean",
                    "Value #D": "p90"},
             overrides={"Tool": {"links": [traces]}, "Calls": {"decimals": 0},
                        "Failed": {"unit": "percentunit", "decimals": 1, **coloured(SHARE)},
                        "Mean": {"unit": "s"}, "p90": {"unit": "s"}}),
        columns("Tool calls", "How often tools were called.", target(q.bars(CALLS, "tool"), "{{tool}}"), unit="short",
                empty=NO_TOOLS, interval="5m", height=10),
        lines("Failed share of tool calls", "By tool. The lines are at 5 % and 20 %.",
              target(q.ratio(q.rate(CALLS_FAILED, "tool"), q.rate(CALLS, "tool")), "{{tool}}"), unit="percentunit",
              empty="No tool call has failed", interval="15m", top=1, thresholds=SHARE),
        lines("Tool time", "How many tools run at any time, on average: seconds of tools in each second.",
              target(q.rate(q.tool("coding_agent_tool_duration_seconds_sum"), "tool"), "{{tool}}"), unit="short",
              empty=NO_TOOLS, interval="5m", stack=True),
    )
