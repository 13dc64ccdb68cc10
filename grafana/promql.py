"""Takes names of metrics and labels, gives the PromQL that several panels share.

Amounts (money, tokens, counts) over a window are differences of raw samples, never `increase()`, which extrapolates
to the edges of the window. Rates use `rate()`.
"""

from __future__ import annotations

WINDOW = "$__range"
"""The time range that a panel shows."""
STEP = "$__interval"
"""From one bar to the next."""

REAL = 'cost_mode="api_key"'
IMPUTED = 'cost_mode="subscription"'
"""What a subscription would have cost at list prices. Never in one sum with REAL."""

TARGET = ('job=~"$job"', 'instance=~"$instance"')
AGENT = ("job", "instance", "root", "pid")
"""What tells agents apart: two exporters can both see a process 7 in a root of the same name."""


def select(name: str, *matchers: str) -> str:
    """The series of the chosen exporters."""
    return f"{name}{{{', '.join((*TARGET, *matchers))}}}"


def telemetry(name: str, *matchers: str) -> str:
    """Series from heartbeats. They have no source, and their roots are other directories than those of usage."""
    return select(name, 'root=~"$telemetry_root"', *matchers)


def usage(name: str, *matchers: str) -> str:
    """Series from usage logs and session files."""
    return select(name, 'root=~"$root"', 'source=~"$source"', 'model=~"$model"', *matchers)


def turn(name: str, *matchers: str) -> str:
    """Series of turns, which come from session files."""
    return select(name, 'root=~"$session_root"', 'source=~"$source"', 'model=~"$model"', *matchers)


def tool(name: str, *matchers: str) -> str:
    """Series of tool calls: these do not tell the model."""
    return select(name, 'root=~"$session_root"', 'source=~"$source"', *matchers)


def total(function: str, by: tuple[str, ...], expr: str) -> str:
    """`function by (labels) (expr)`."""
    grouping = f" by ({', '.join(by)})" if by else ""
    return f"{function}{grouping} ({expr})"


def spent(series: str, *by: str, window: str = WINDOW, ahead: bool = False) -> str:
    """What a counter rose by in a window, exactly, also where its pod came or went inside of it.

    Counters start at 0 and do not reset, so the last value is the highest. The value before the window is taken where
    there is one, so that windows that adjoin add up; a series that was born in the window counts from its own first
    sample: 0, or the history from before the exporter. `ahead`: the window begins at the time of evaluation, for
    bars that stand where their time begins.
    """
    inside = f"{series}[{window}] offset -{window}" if ahead else f"{series}[{window}]"
    before = f"{series}[10m]" if ahead else f"{series}[10m] offset {window}"
    return total("sum", by, (
        f"\n    max_over_time({inside})\n"
        f"  - (last_over_time({before}) or min_over_time({inside}))\n"
    ))


def bars(series: str, *by: str) -> str:
    """What a counter rose by from each bar to the next."""
    return spent(series, *by, window=STEP, ahead=True)


def cells(series: str, *by: str) -> str:
    """What a counter rose by up to each point: Grafana draws the cells of a heat map before their time, not after."""
    return spent(series, *by, window=STEP)


def rate(series: str, *by: str, window: str = "$__rate_interval") -> str:
    """Units a second."""
    return total("sum", by, f"rate({series}[{window}])")


def hourly(series: str) -> str:
    """Units an hour, of the last 15 minutes, however long the time range is: $__rate_interval would grow with it."""
    return or_zero(f"{rate(series, window='15m')} * 3600", now=True)


def or_zero(expr: str, *, now: bool = False) -> str:
    """0 instead of nothing, where an exporter was there in the time range to say so: where none was, nothing is known.

    `now`: one that is there at the end of it. Whether agents wait is not known of an exporter that has gone.
    """
    build = select("coding_agent_exporter_build_info")
    return f"{expr}\nor\n0 * max({build if now else f'max_over_time({build}[{WINDOW}])'})"


def estimated_marked(expr: str, *by: str) -> str:
    """The sum by these labels, and a label `mark` that says " (estimated)" where a price list and not the agent spoke.

    `expr` has the label provenance.
    """
    mark = f'label_replace(\n{expr}, "mark", " (estimated)", "provenance", "estimated")'
    return total("sum", (*by, "mark"), mark)


def agents(expr: str, *labels: str) -> str:
    """The highest value of each agent, without labels that come from anywhere else (a pod's, say)."""
    return total("max", (*AGENT, *labels), expr)


def named(expr: str) -> str:
    """Session, model and branch beside the value of each agent, as far as the exporter shows them.

    `expr` has the labels of AGENT. One series of info for each agent is taken: where metrics are pushed, that of a
    session that has ended stays for some minutes.
    """
    keys = ", ".join(AGENT)
    names = ("session_name", "session_id", "model", "git_branch")
    info = f"topk by ({keys}) (1, {agents(telemetry('coding_agent_instance_info'), *names)})"
    return f"(\n{expr}\n)\n* on ({keys}) group_left ({', '.join(names)}) {info}"


def activity(state: str) -> str:
    """The agents that are in this state now, each with the value 1."""
    series = telemetry("coding_agent_activity", f'activity="{state}"')
    return agents(f"{series} == 1")


def stale() -> str:
    """The agents whose heartbeat is overdue, each with the value 1."""
    return agents(f"{telemetry('coding_agent_instance_stale')} == 1")


def waiting() -> str:
    """For how many seconds agents have waited for input."""
    since = agents(telemetry("coding_agent_activity_since_timestamp_seconds"))
    return f"(time() - {since})\nand on ({', '.join(AGENT)}) {activity('waiting_input')}"


def quantile(share: float, buckets: str) -> str:
    """A quantile of a histogram; `buckets` is a sum that has the label le."""
    return f"histogram_quantile({share}, {buckets})"


def ratio(part: str, whole: str) -> str:
    """A share, and nothing where there is nothing to have a share in."""
    return f"({part})\n/\n({whole} > 0)"
