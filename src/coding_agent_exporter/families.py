"""Takes nothing, gives the metric catalogue: name, type, labels, help and unit of every family, in one table.

`/metrics`, `docs/metrics.md`, and the tests of dashboards and rules all read this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MetricType = Literal["counter", "gauge", "stateset", "info", "histogram"]

USAGE = ("root", "source", "provider", "model", "cost_mode")
INSTANCE = ("root", "pid")


@dataclass(frozen=True, slots=True)
class Family:
    """One metric family. Counters carry their `_total` in the name, as they are shown."""

    name: str
    type: MetricType
    labels: tuple[str, ...]
    help: str
    scale: int = 1
    """Counters are integers inside; the shown value is the integer divided by this."""
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram, without +Inf, in the unit of its name."""
    otlp: str = ""
    """The name under which a family goes out over OTLP, and nowhere else."""


def _pico(name: str, labels: tuple[str, ...], text: str) -> Family:
    return Family(name, "counter", labels, text, scale=10**12)


COST = _pico("coding_agent_cost_usd_total", (*USAGE, "provenance"),
             "Money spent, in US dollars. provenance=reported came from the agent, estimated from tokens and "
             "list prices; cost_mode=subscription is imputed, not billed.")
TOKENS = Family("coding_agent_tokens_total", "counter", (*USAGE, "token_type"),
                "Tokens used. The types do not overlap: input excludes what was read from or written to a cache.")
MESSAGES = Family("coding_agent_messages_total", "counter", USAGE,
                  "Assistant messages (model calls) that were recorded, aborted ones included.")
UNPRICED = Family("coding_agent_unpriced_tokens_total", "counter", USAGE,
                  "Tokens of messages whose cost was neither reported nor could be estimated; they are in no cost.")
SESSIONS = Family("coding_agent_sessions_total", "counter", USAGE,
                  "Sessions that used a model at least once, by the model of their first message.")

INSTANCE_INFO = Family("coding_agent_instance_info", "info",
                       (*INSTANCE, "session_id", "session_name", "host", "cwd", "git_branch", "provider", "model",
                        "thinking_level"),
                       "What a running agent process is working on; always 1.")
ACTIVITY = Family("coding_agent_activity", "stateset", (*INSTANCE, "activity"),
                  "What the agent is doing now: 1 for the current activity, 0 for the others.")
ACTIVITY_SINCE = Family("coding_agent_activity_since_timestamp_seconds", "gauge", INSTANCE,
                        "When the current activity began, or was first seen.")
CONTEXT_PERCENT = Family("coding_agent_context_percent", "gauge", INSTANCE,
                         "How full the context window is, 0 to 100 and above; absent while unknown.")
CONTEXT_PEAK = Family("coding_agent_context_percent_peak", "gauge", INSTANCE,
                      "Highest context percent in the trailing window (60 s by default) and since the scrape before.")
CONTEXT_TOKENS = Family("coding_agent_context_tokens", "gauge", INSTANCE, "Tokens in the context window.")
CONTEXT_WINDOW = Family("coding_agent_context_window_tokens", "gauge", INSTANCE,
                        "Size of the model's context window in tokens.")
PRESSURE = Family("coding_agent_context_pressure", "stateset", (*INSTANCE, "pressure"),
                  "Context pressure as the agent reports it: 1 for the current level, 0 for the others.")
NEAR_LIMIT = Family("coding_agent_context_near_limit", "gauge", INSTANCE,
                    "1 while the context is at 95 percent or more, as the agent reports it.")
CLOSE_TO_LIMIT = Family("coding_agent_context_close_to_limit", "gauge", INSTANCE,
                        "1 while the context is at 85 percent or more, as the agent reports it.")
CROSSINGS = Family("coding_agent_context_limit_crossings_total", "counter", ("root", "pressure"),
                   "Times an agent's context pressure rose to this level, or past it, from below.")
COMPACTIONS = Family("coding_agent_compactions_total", "counter", ("root",), "Context compactions.")
INSTANCES = Family("coding_agent_instances", "gauge", ("root", "activity"),
                   "Running agent processes (with a fresh heartbeat) by activity.")
HEARTBEAT = Family("coding_agent_instance_heartbeat_timestamp_seconds", "gauge", INSTANCE,
                   "When the agent last wrote its heartbeat.")
START = Family("coding_agent_instance_start_timestamp_seconds", "gauge", INSTANCE, "When the agent process started.")
STALE = Family("coding_agent_instance_stale", "gauge", INSTANCE,
               "1 when the heartbeat is overdue: the process was killed, is stopped, or its host is gone.")
LOST = Family("coding_agent_instances_lost_total", "counter", ("root",),
              "Agent processes that went stale without shutting down.")
RATE_LIMIT_USED = Family("coding_agent_rate_limit_used_percent", "gauge", ("root", "source", "window"),
                         "Share of the rate-limit window that is used up, 0 to 100.")
RATE_LIMIT_RESETS = Family("coding_agent_rate_limit_resets_timestamp_seconds", "gauge", ("root", "source", "window"),
                           "When the rate-limit window resets.")
RATE_LIMIT_WINDOW = Family("coding_agent_rate_limit_window_seconds", "gauge", ("root", "source", "window"),
                           "Length of the rate-limit window.")

CALL = ("root", "source", "provider", "model")
# From a quick tool to an hour's work: agents think long.
_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)

TURNS = Family("coding_agent_turns_total", "counter", (*CALL, "stop_reason"),
               "Turns (a model call with the tools it asked for), by why the call ended.")
TURN_SECONDS = Family("coding_agent_turn_duration_seconds", "histogram", CALL,
                      "How long turns took, tools included.", scale=10**6, buckets=_SECONDS)
TOOL_CALLS = Family("coding_agent_tool_calls_total", "counter", ("root", "source", "tool", "outcome"),
                    "Tool executions by outcome; unknown: no result was recorded.")
TOOL_SECONDS = Family("coding_agent_tool_duration_seconds", "histogram", ("root", "source", "tool"),
                      "How long tools ran; of tools that ran at once, pi records the slowest one's time for all.",
                      scale=10**6, buckets=_SECONDS)
FIRST_TOKEN_SECONDS = Family("coding_agent_time_to_first_token_seconds", "histogram", CALL,
                             "From the start of a model call to its first token, where the agent records it.",
                             scale=10**6, buckets=(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0))
# The conventions' own metrics, with the conventions' buckets.
GENAI_DURATION = Family("gen_ai_client_operation_duration", "histogram", (*CALL, "error"),
                        "Duration of model calls.", scale=10**6, otlp="gen_ai.client.operation.duration",
                        buckets=tuple(0.01 * 2**power for power in range(14)))
GENAI_TOKENS = Family("gen_ai_client_token_usage", "histogram", (*CALL, "token_type"),
                      "Tokens of model calls.", otlp="gen_ai.client.token.usage",
                      buckets=tuple(float(4**power) for power in range(14)))

BUILD_INFO = Family("coding_agent_exporter_build_info", "info", ("version", "python_version"),
                    "Version of the exporter and of the Python that runs it; always 1.")
SCRAPE_SECONDS = Family("coding_agent_exporter_last_scrape_duration_seconds", "gauge", (),
                        "How long the scrape before this one took, step and rendering together.")
STEPS = Family("coding_agent_exporter_steps_total", "counter", (), "Steps of the pipeline.")
STEP_SECONDS = Family("coding_agent_exporter_step_seconds_total", "counter", (),
                      "Time spent in steps of the pipeline.", scale=10**9)
FILE_STATES = ("ok", "unreadable", "invalid", "ignored")
STEP_RUNNING = Family("coding_agent_exporter_step_running_seconds", "gauge", (),
                      "How long the step that runs now has been running, where a scrape could not wait for its end and "
                      "shows what the one before has shown: a disk does not answer. Else 0.")
SOURCE_FILES = Family("coding_agent_exporter_files", "gauge", ("root", "kind", "state"),
                      "Files below the configured directories. state: ok, unreadable (permission, not a regular file, "
                      "a link out of the directory); of heartbeats also invalid (not a document this exporter knows), "
                      "and ignored (one too many).")
BYTES_READ = Family("coding_agent_exporter_read_bytes_total", "counter", ("root", "kind"), "Bytes consumed from logs.")
LINES_READ = Family("coding_agent_exporter_read_lines_total", "counter", ("root", "kind"),
                    "Lines consumed from logs, accepted or not; empty ones are none, objects in one line are several.")
LINES_ACCEPTED = Family("coding_agent_exporter_accepted_lines_total", "counter", ("root", "kind"),
                        "Lines of logs that could be read. Those consumed are these and the rejected ones.")
REJECTED = Family("coding_agent_exporter_rejected_total", "counter", ("root", "kind", "reason"),
                  "Lines, or parts of lines, that were not counted, by reason.")
RESTARTED = Family("coding_agent_exporter_file_restarts_total", "counter", ("root", "kind"),
                   "Files that were truncated or replaced, and read again from the start.")
LAG_BYTES = Family("coding_agent_exporter_lag_bytes", "gauge", ("root", "kind"), "Bytes on disk not read yet.")
COMMITS = Family("coding_agent_exporter_store_commits_total", "counter", ("outcome",),
                 "Commits to the state file, by outcome. While they fail, counters stand still and nothing is lost.")
STATE_BYTES = Family("coding_agent_exporter_store_size_bytes", "gauge", (), "Size of the state file.")
SERIES = Family("coding_agent_exporter_series", "gauge", (), "Counter series held.")
LEFT_OUT = ("usage", "turn_models", "tools", "rate_limit_windows")
"""What the names were of that are left out of labels: the values of `reason` of the next family."""
SERIES_DROPPED = Family("coding_agent_exporter_series_dropped_total", "counter", ("reason",),
                        "Times that a name was left out of a label because there were too many of its kind. reason: "
                        "usage and turn_models (counted under model=other), tools (under tool=other), "
                        "rate_limit_windows (not shown).")
OVERSHOOT = Family("coding_agent_exporter_cost_overshoot_usd", "gauge", (),
                   "Money shown but since corrected downwards by the logs: counters never go down, they wait for new "
                   "spend to catch up.", scale=10**12)
WEB_ERRORS = Family("coding_agent_exporter_web_errors_total", "counter", (),
                    "Requests, or connections, that failed through a fault of the exporter.")
WEB_REFUSED = Family("coding_agent_exporter_web_refused_total", "counter", (),
                     "Connections turned away because --web.max-connections were busy.")
SPANS_PENDING = Family("coding_agent_exporter_spans_pending", "gauge", (),
                       "Finished spans in the outbox, not yet taken by the collector.")
SPANS_EXPORTED = Family("coding_agent_exporter_spans_exported_total", "counter", (), "Spans that the collector took.")
SPANS_FAILED = Family("coding_agent_exporter_spans_export_failures_total", "counter", (),
                      "Attempts to send spans that failed and will be made again.")
SPANS_DROPPED = Family("coding_agent_exporter_spans_dropped_total", "counter", ("reason",),
                       "Spans that will never arrive: refused by the collector, too large, too old, or past the "
                       "bound of the outbox.")
WATCH_FALLBACK = Family("coding_agent_exporter_watch_polling", "gauge", (),
                        "1 while file change notification does not work and directories are polled.")

FAMILIES: tuple[Family, ...] = (
    COST, TOKENS, MESSAGES, UNPRICED, SESSIONS,
    INSTANCE_INFO, ACTIVITY, ACTIVITY_SINCE, CONTEXT_PERCENT, CONTEXT_PEAK, CONTEXT_TOKENS, CONTEXT_WINDOW,
    PRESSURE, NEAR_LIMIT, CLOSE_TO_LIMIT, CROSSINGS, COMPACTIONS, INSTANCES, HEARTBEAT, START, STALE, LOST,
    RATE_LIMIT_USED, RATE_LIMIT_RESETS, RATE_LIMIT_WINDOW,
    TURNS, TURN_SECONDS, FIRST_TOKEN_SECONDS, TOOL_CALLS, TOOL_SECONDS, GENAI_DURATION, GENAI_TOKENS,
    BUILD_INFO, SCRAPE_SECONDS, STEPS, STEP_SECONDS, STEP_RUNNING, SOURCE_FILES, BYTES_READ, LINES_READ,
    LINES_ACCEPTED, REJECTED, RESTARTED, LAG_BYTES, COMMITS, STATE_BYTES, SERIES, SERIES_DROPPED, OVERSHOOT,
    WATCH_FALLBACK,
    WEB_ERRORS, WEB_REFUSED, SPANS_PENDING, SPANS_EXPORTED, SPANS_FAILED, SPANS_DROPPED,
)
BY_NAME: dict[str, Family] = {family.name: family for family in FAMILIES}
HISTOGRAMS: dict[str, tuple[Family, str]] = {
    f"{family.name}_{part}": (family, part)
    for family in FAMILIES if family.type == "histogram" for part in ("bucket", "sum")
}
"""Counter name -> histogram and part. A histogram is kept as counters: its buckets, cumulative and labelled `le`, the
last of which is its count; and its sum, in the family's integer unit."""

INF = "+Inf"


def bounds(family: Family) -> tuple[str, ...]:
    """The upper bounds of a histogram's buckets, as values of the label `le`."""
    return (*map(str, family.buckets), INF)


_GROUPS = (
    ("Usage", "What was spent, from usage logs and session files.", (COST, TOKENS, MESSAGES, UNPRICED, SESSIONS)),
    ("Agents", ("What running agents do, from their heartbeats. A vanished agent's series vanish; what is not known "
                "is absent, never 0. A stale agent shows only its info, times and `coding_agent_instance_stale`."),
     (INSTANCES, INSTANCE_INFO, ACTIVITY, ACTIVITY_SINCE, HEARTBEAT, START, STALE, LOST)),
    ("Context", "How full context windows are.",
     (CONTEXT_PERCENT, CONTEXT_PEAK, CONTEXT_TOKENS, CONTEXT_WINDOW, PRESSURE, NEAR_LIMIT, CLOSE_TO_LIMIT, CROSSINGS,
      COMPACTIONS)),
    ("Turns", ("From session files (pi and oh-my-pi). In OpenMetrics, histograms carry the trace of a recent turn as "
               "an exemplar."),
     (TURNS, TURN_SECONDS, FIRST_TOKEN_SECONDS, TOOL_CALLS, TOOL_SECONDS)),
    ("Rate limits", "As a harness last reported them; absent once the window is over.",
     (RATE_LIMIT_USED, RATE_LIMIT_RESETS, RATE_LIMIT_WINDOW)),
    ("Exporter", "The exporter's own health. Its counters start over when it restarts; all others do not.",
     tuple(family for family in FAMILIES if family.name.startswith("coding_agent_exporter_"))),
)

_VALUES = (
    ("root", "alias of the configured directory"),
    ("source", "the harness: `pi-coding`, `omp`, `opencode`, `claude`, `codex`, or any other that writes such logs"),
    ("provider, model", ("`anthropic/claude-opus-4-8` is split at the first slash; `unknown` where the log does not "
                         "say, `other` past `--counters.max-series`")),
    ("cost_mode", "`api_key` (billed) or `subscription` (imputed: never add the two)"),
    ("agent", "the agent's id; only with `--usage.agent-label`"),
    ("provenance", "`reported` by the agent, or `estimated` from tokens and list prices"),
    ("token_type", "`input`, `output`, `cache_read`, `cache_creation`"),
    ("activity", "`working`, `waiting_input`, `unknown`"),
    ("pressure", "`normal`, `approaching_limit` (85 %), `near_limit` (95 %), `at_limit` (100 %)"),
    ("window", "as the harness names it: `five_hour`, `seven_day`"),
    ("stop_reason", "`stop`, `toolUse`, `length`, `error`, `aborted`, `other`"),
    ("tool", "name of the tool; `other` past 200 names of a root"),
    ("outcome", "`ok`, `error`, `unknown`"),
    ("kind", "`telemetry`, `usage`, `sessions`"),
)


def markdown() -> str:
    """`docs/metrics.md`."""
    lines = [
        "# Metrics", "",
        ("Generated from `families.py` by `make docs`. State sets are gauges with one series per state, exactly one of "
         "them 1. How counters count is explained in [operating.md](operating.md)."), "",
    ]
    for title, text, members in _GROUPS:
        lines += [f"## {title}", "", text, "", "| metric | type | labels | meaning |", "|---|---|---|---|"]
        for family in members:
            labels = ", ".join(family.labels) or "-"
            lines.append(f"| `{family.name}` | {family.type} | {labels} | {family.help} |")
        lines.append("")
    lines += ["## Labels", "", "| label | values |", "|---|---|"]
    lines += [f"| {label} | {values} |" for label, values in _VALUES]
    lines += ["", "The standard `process_*` metrics of Prometheus clients are served too (Linux).", ""]
    return "\n".join(lines)
