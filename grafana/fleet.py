"""Takes the shared panels and queries, gives the dashboard Fleet: who works, who waits, how full contexts are."""

from __future__ import annotations

from grafana import promql as q
from grafana.board import COST, FLEET, SPEND, TRACES, TURNS, Board, chosen, explore, root
from grafana.panels import (
    CONTEXT,
    GREEN,
    ORANGE,
    PURPLE,
    RED,
    STATES,
    coloured,
    columns,
    filled,
    grid,
    lines,
    number,
    states,
    target,
    timeline,
    to_dashboard,
)

NO_AGENT = "No agent is running"
NO_EXPORTER = "No exporter is scraped"
NO_CONTEXT = "No running agent says how full its context is"
NOT_YET = "None so far: no heartbeats (pi-telemetry) were seen"
WAIT = ((None, GREEN), (300, ORANGE), (900, RED))

PERCENT = q.telemetry("coding_agent_context_percent")
PEAK = f"max_over_time({q.telemetry('coding_agent_context_percent_peak')}[$__rate_interval])"
CROSSINGS = "coding_agent_context_limit_crossings_total"
REAL = q.select(COST, q.REAL)
ON = f"on ({', '.join(q.AGENT)})"

NOW_DOING = "\nor ".join((
    f"max by ({', '.join(q.AGENT)}, activity) ({q.telemetry('coding_agent_activity')} == 1)",
    f'label_replace({q.stale()}, "activity", "stale", "", "")',
))
HISTORY = f"\nor {ON} ".join([
    *(f"{place} * {q.activity(state)}" for place, (state, _) in enumerate(STATES[:-1], 1)),
    f"{len(STATES)} * {q.stale()}",
])
NAME = "{{session_name}} {{root}}/{{pid}} {{instance}}"


def board() -> Board:
    """The dashboard."""
    board = Board(
        FLEET, "Coding agents / Fleet",
        "Which coding agents run, which of them wait for input, how full their contexts are, and what it costs.",
        chosen(root("telemetry_root", "telemetry")), since="now-6h", refresh="15s", tempo=True)
    _now(board)
    _agents(board)
    _context(board)
    _money(board)
    return board


def _now(board: Board) -> None:
    def running(state: str) -> str:
        series = q.telemetry("coding_agent_instances", f'activity="{state}"')
        return q.or_zero(f"sum ({series})", now=True)

    board.row(
        "Now",
        number("Working", "Agents that work on a prompt.", running("working"), unit="short", empty=NO_EXPORTER,
               width=3),
        number("Waiting for input", "Agents that have finished, or ask something, and wait for a person.",
               running("waiting_input"), unit="short", empty=NO_EXPORTER, thresholds=((None, PURPLE),), width=3),
        number("Longest wait", ("How long the agent has waited that waits longest. Orange from 5 minutes on, red from "
                                "15."),
               q.or_zero(f"max (\n{q.waiting()}\n)", now=True), unit="s", empty=NO_EXPORTER, thresholds=WAIT, width=3),
        number("Fullest context", "Of the agents that run now. Orange from 85 % on, red from 95 %: compaction is near.",
               f"max ({PERCENT})", unit="percent", empty=NO_CONTEXT, thresholds=CONTEXT, decimals=0, width=3),
        number("Stale", ("Agents whose heartbeat is overdue: killed, stopped, or their host is gone. "
                         "Red from 1 on."),
               q.or_zero(f"sum ({q.telemetry('coding_agent_instance_stale')})", now=True), unit="short",
               empty=NO_EXPORTER, thresholds=((None, GREEN), (1, RED)), width=3),
        number("Lost", "Agents that went stale without shutting down, in the time range. Red from 1 on.",
               q.or_zero(q.spent(q.telemetry("coding_agent_instances_lost_total"))), unit="short", empty=NO_EXPORTER,
               thresholds=((None, GREEN), (1, RED)), width=3),
        number("Spent today", ("Real money (api_key) since midnight, of all roots: those of usage are other "
                               "directories than those of heartbeats."),
               q.or_zero(q.spent(REAL)), unit="currencyUSD", empty=NO_EXPORTER, since="now/d", decimals=2, width=3,
               link=to_dashboard("Spend", SPEND)),
        number("Burn rate per hour", "Real money (api_key) in the last 15 minutes, as USD per hour.",
               q.hourly(REAL), unit="currencyUSD", empty=NO_EXPORTER, decimals=2, width=3,
               link=to_dashboard("Spend", SPEND)),
    )


def _agents(board: Board) -> None:
    keys = {"root": "Root", "pid": "Pid"}
    session = {"title": TRACES, "targetBlank": True,
               "url": explore('span.gen_ai.conversation.id = "${__data.fields.session_id}"')}
    since = q.agents(q.telemetry("coding_agent_activity_since_timestamp_seconds"))
    # As of the scrape: what has passed since then says nothing about the agent.
    heartbeat = q.telemetry("coding_agent_instance_heartbeat_timestamp_seconds")
    # The last minute is in the gauge itself. A window here would bring agents back that have gone.
    peak = q.agents(q.telemetry("coding_agent_context_percent_peak"))
    board.row(
        "Agents",
        grid(
            "Agents", ("Every agent with a heartbeat file. A stale one (its heartbeat is overdue) shows only who it "
                       "was. Context: orange from 85 % on, red from 95 %; the peak is that of the last minute. "
                       "A click on a session's id leads to its traces."),
            target(q.named(NOW_DOING), cells=True),
            target(q.agents(PERCENT), cells=True),
            target(peak, cells=True),
            target(f"time() - {since}", cells=True),
            target(q.agents(f"timestamp({heartbeat}) - {heartbeat}"), cells=True),
            target(f"{since} * 1000", cells=True),
            empty=NO_AGENT, sort="For", height=10,
            names={"activity": "State", "Value #D": "For", "Value #F": "Since", "session_name": "Session",
                   "model": "Model", "git_branch": "Branch", "Value #B": "Context", "Value #C": "Peak", **keys,
                   "instance": "Instance", "Value #E": "Heartbeat age", "session_id": "session_id"},
            hidden=("Value #A", "job"),
            overrides={
                "State": {"mappings": states(STATES), "custom.cellOptions": {"type": "color-text"}},
                "For": {"unit": "s", "decimals": 0},
                "Since": {"unit": "dateTimeAsIsoNoDateIfToday"},
                "Context": {"unit": "percent", "decimals": 0, **filled(CONTEXT, 100)},
                "Peak": {"unit": "percent", "decimals": 0, **coloured(CONTEXT)},
                "Heartbeat age": {"unit": "s", "decimals": 0, **coloured(((None, GREEN), (10, RED)))},
                "session_id": {"links": [session]},
            },
        ),
        timeline(
            "What agents did", ("Activity of each agent and session. Stale: the heartbeat is overdue; a row ends when "
                                "the agent shuts down."),
            q.named(HISTORY), NAME, empty=NO_AGENT, width=16, height=10),
        grid(
            "Who waits for input", "Who waits, and for how long. Orange from 5 minutes on, red from 15.",
            target(q.named(q.waiting()), cells=True),
            target(f"{since} * 1000\nand {ON} {q.activity('waiting_input')}", cells=True),
            empty="No agent waits for input", sort="Waits for", width=8, height=10,
            names={"Value #A": "Waits for", "Value #B": "Since", "session_name": "Session", "git_branch": "Branch",
                   **keys},
            hidden=("job", "instance", "model", "session_id"),
            overrides={"Waits for": {"unit": "s", "decimals": 0, **coloured(WAIT)},
                       "Since": {"unit": "dateTimeAsIsoNoDateIfToday"}},
        ),
    )


def _context(board: Board) -> None:
    board.row(
        "Context",
        lines("Context", ("How full contexts are, as sampled. A gap: not known, as after a compaction. "
                          "The lines are at 85 % (close) and 95 % (near the limit)."),
              target(q.named(q.agents(PERCENT)), NAME), unit="percent", empty=NO_CONTEXT,
              thresholds=CONTEXT, soft_top=100, height=9),
        lines("Peaks of context", ("The highest that contexts were between two points, also for a moment between two "
                                   "scrapes. The lines are at 85 % and 95 %."),
              target(q.named(q.agents(PEAK)), NAME), unit="percent", empty=NO_CONTEXT,
              thresholds=CONTEXT, height=9, calcs=("max",)),
        columns("Limits crossed", ("How often a context rose to 85 % (approaching), 95 % (near) or 100 % (at the "
                                   "limit) from below. Many at 95 %: sessions are too long for the model's window."),
                target(q.bars(q.telemetry(CROSSINGS), "pressure"), "{{pressure}}"), unit="short", empty=NOT_YET,
                interval="5m", width=8, names=("approaching_limit", "near_limit", "at_limit")),
        columns("Compactions", "Contexts that were compacted, by the directory that told of it.",
                target(q.bars(q.select("coding_agent_compactions_total"), "root"), "{{root}}"),
                unit="short", empty="No compaction so far", interval="5m", width=8),
        columns("Lost agents", "Agents that went stale without shutting down, by root. Each one is worth a look.",
                target(q.bars(q.telemetry("coding_agent_instances_lost_total"), "root"), "{{root}}"), unit="short",
                empty=NOT_YET, interval="5m", width=8),
    )


def _money(board: Board) -> None:
    board.row(
        "Activity and money",
        lines("Agents by activity", "How many agents worked, and how many waited.",
              target(f"sum by (activity) ({q.telemetry('coding_agent_instances')})", "{{activity}}"), unit="short",
              empty=NO_AGENT, stack=True, names=("working", "waiting_input", "unknown"),
              link=to_dashboard("Turns", TURNS)),
        lines("Burn rate per hour by source", ("Real money (api_key) as USD per hour, of all roots. Subscriptions are "
                                               "not in it."),
              target(f"{q.rate(REAL, 'source')} * 3600", "{{source}}"), unit="currencyUSD",
              empty="No money (api_key) was spent so far", interval="5m", stack=True,
              link=to_dashboard("Spend", SPEND)),
    )
