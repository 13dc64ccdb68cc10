"""Takes the shared panels and queries, gives the dashboard Spend: money, tokens, budgets and rate limits.

Real money and what a subscription would have cost are never in one query.
"""

from __future__ import annotations

from grafana import promql as q
from grafana.board import COST, FLEET, SPEND, Board, by_label, chosen, root
from grafana.panels import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    columns,
    dial,
    filled,
    grid,
    lines,
    number,
    ranking,
    target,
    to_dashboard,
)

NO_EXPORTER = "No exporter is scraped"
NO_MONEY = "No money (api_key) was spent so far"
NO_SUBSCRIPTION = "No subscription is used"
NO_TOKENS = "No tokens: no usage logs or session files are read"
NO_BUDGET = "No budget: load recording.yaml and budgets.yaml from grafana/rules"
NO_LIMITS = "No harness has reported a rate limit"
NO_COUNT = "No messages with a cost in this time range"

REAL = q.usage(COST, q.REAL)
IMPUTED = q.usage(COST, q.IMPUTED)
TOKENS = q.usage("coding_agent_tokens_total")
UNPRICED = q.usage("coding_agent_unpriced_tokens_total")
CACHED = q.usage("coding_agent_tokens_total", 'token_type="cache_read"')
PROMPT = q.usage("coding_agent_tokens_total", 'token_type=~"input|cache_read|cache_creation"')
MODEL = ("source", "provider", "model")
NAMED = "{{source}} {{provider}}/{{model}}"
DAY = 86400
LIMIT = ((None, GREEN), (80, ORANGE), (90, RED))


def board() -> Board:
    """The dashboard."""
    # Claude Code's log has money and no tokens, that of a model without a price tokens and no money.
    known = f'__name__=~"{COST}|coding_agent_tokens_total"'
    board = Board(
        SPEND, "Coding agents / Spend",
        "What coding agents cost: real money (api_key) and, apart from it, what subscriptions would have cost.",
        chosen(root("root", "usage|sessions"), by_label("source", "Source", q.select("", known, 'root=~"$root"')),
               by_label("model", "Model", q.select("", known, 'root=~"$root"', 'source=~"$source"'))),
        since="now-7d", refresh="1m")
    _totals(board)
    _breakdown(board)
    _imputed(board)
    _tokens(board)
    _per(board)
    _limits(board)
    return board


def _totals(board: Board) -> None:
    calendar = "Real money (api_key), estimates included, since the start of the {}, in the time zone of the dashboard."
    left = f"scalar(clamp_min(days_in_month() * {DAY} - $__range_s, 0))"
    week = q.spent(REAL, window="7d")
    # On the first of a month there may be no series of this month yet, while last week's pods have ended.
    forecast = f"({q.spent(REAL)} or 0 * {week})\n+\n{week} / {7 * DAY} * {left}"
    reach = f"max(time() - min_over_time(timestamp({q.select('coding_agent_exporter_build_info')})[32d:1h]))"
    budget = ("100 * max by (period) (period:coding_agent_cost_usd:spent)\n"
              "/ on (period)\n(max by (period) (period:coding_agent_budget_usd:limit) > 0)")
    daily = q.estimated_marked(q.bars(REAL, *MODEL, "provenance"), *MODEL)

    board.row(
        "Real money",
        number("Today", calendar.format("day"), q.or_zero(q.spent(REAL)), unit="currencyUSD", empty=NO_EXPORTER,
               since="now/d", decimals=2, width=3),
        number("This week", calendar.format("week"), q.or_zero(q.spent(REAL)), unit="currencyUSD", empty=NO_EXPORTER,
               since="now/w", decimals=2, width=3),
        number("This month", f"{calendar.format('month')} It needs a month of samples: see Samples reach back.",
               q.or_zero(q.spent(REAL)), unit="currencyUSD", empty=NO_EXPORTER, since="now/M", decimals=2, width=3),
        number("Forecast for the month", ("The month so far, and the pace of the last 7 days for the rest of it. Too "
                                          "low while there are less than 7 days of samples. Months end by UTC."),
               q.or_zero(forecast), unit="currencyUSD", empty=NO_EXPORTER, since="now/M", decimals=2, width=3),
        number("In the time range", "Real money (api_key), estimates included, in the time range of the dashboard.",
               q.or_zero(q.spent(REAL)), unit="currencyUSD", empty=NO_EXPORTER, decimals=2, width=3),
        number("Of it estimated", ("Real money that no agent reported: tokens times list prices. Orange when there is "
                                   "any."),
               q.or_zero(q.spent(q.usage(COST, q.REAL, 'provenance="estimated"'))), unit="currencyUSD",
               empty=NO_EXPORTER, thresholds=((None, GREEN), (0.005, ORANGE)), decimals=2, width=3),
        number("Burn rate per hour", "Real money (api_key) in the last 15 minutes, as USD per hour.",
               q.hourly(REAL), unit="currencyUSD", empty=NO_EXPORTER, decimals=2, width=3,
               link=to_dashboard("Fleet", FLEET)),
        number("Samples reach back", ("Age of the oldest sample of an exporter, 32 days at most. Figures of a longer "
                                      "time are too low: Prometheus keeps 15 days unless it is told otherwise, and a "
                                      "young installation has less. Orange below 31 days, red below 7."),
               q.or_zero(reach), unit="s", empty=NO_EXPORTER,
               thresholds=((None, RED), (7 * DAY, ORANGE), (31 * DAY, GREEN)), decimals=0, width=3),
        columns("Real money by day", ("The last 30 days, a bar for each day in the time zone of the dashboard; today "
                                      "so far is the last. Neighbours leave nothing out between them."),
                target(daily, f"{NAMED}{{{{mark}}}}"), unit="currencyUSD", empty=NO_MONEY, interval="1d",
                since="30d", width=16, height=9, decimals=2),
        dial("Budgets", ("How much of each budget is used up, by rolling windows of 1, 7 and 30 days, over everything "
                         "that this Prometheus sees: the variables above do not apply. Orange from 80 % on, red from "
                         "100 %."),
             budget, "{{period}}", unit="percent", empty=NO_BUDGET,
             thresholds=((None, GREEN), (80, ORANGE), (100, RED)), top=120, width=8, height=9),
    )


def _breakdown(board: Board) -> None:
    text = "Real money (api_key) in the time range. Estimates from list prices are bars of their own."
    board.row(
        "Real money, in the time range",
        columns("Real money over time", "By model, an hour or longer for each bar.",
                target(q.estimated_marked(q.bars(REAL, *MODEL, "provenance"), *MODEL), f"{NAMED}{{{{mark}}}}"),
                unit="currencyUSD", empty=NO_MONEY, interval="1h", width=24, height=9, decimals=2),
        *(
            ranking(title, text, q.estimated_marked(q.spent(REAL, *labels, "provenance"), *labels),
                    f"{legend}{{{{mark}}}}", unit="currencyUSD", empty=NO_MONEY, decimals=2)
            for title, labels, legend in (
                ("By model", ("provider", "model"), "{{provider}}/{{model}}"), ("By source", ("source",), "{{source}}"),
                ("By provider", ("provider",), "{{provider}}"), ("By root", ("root",), "{{root}}"))
        ),
    )


def _imputed(board: Board) -> None:
    note = "Nobody is billed for it: it is what these tokens would have cost, and is in no figure above."
    board.row(
        "Subscriptions (imputed)",
        number("Today, imputed", f"Since midnight. {note}", q.or_zero(q.spent(IMPUTED)), unit="currencyUSD",
               empty=NO_EXPORTER, thresholds=((None, GREY),), since="now/d", decimals=2, height=8),
        number("This month, imputed", f"Since the first of the month. {note}", q.or_zero(q.spent(IMPUTED)),
               unit="currencyUSD", empty=NO_EXPORTER, thresholds=((None, GREY),), since="now/M", decimals=2, height=8),
        columns("Imputed by day", f"The last 30 days. {note}",
                target(q.estimated_marked(q.bars(IMPUTED, *MODEL, "provenance"), *MODEL), f"{NAMED}{{{{mark}}}}"),
                unit="currencyUSD", empty=NO_SUBSCRIPTION, interval="1d", since="30d", width=16, decimals=2),
    )


def _tokens(board: Board) -> None:
    hit = q.ratio(q.spent(CACHED), q.spent(PROMPT))
    hits = q.ratio(q.rate(CACHED, *MODEL), q.rate(PROMPT, *MODEL))
    share = ((None, ORANGE), (0.5, BLUE), (0.8, GREEN))
    board.row(
        "Tokens and cache",
        columns("Tokens", "By type; the types do not overlap. Real and imputed together.",
                target(q.bars(TOKENS, "token_type"), "{{token_type}}"), unit="short", empty=NO_TOKENS, interval="1h",
                names=("input", "output", "cache_read", "cache_creation"), height=9),
        lines("Cache hits by model", ("Share of the prompt that came from the cache: cache_read of input, cache_read "
                                      "and cache_creation. Low shares cost: cached tokens are a tenth of the price or "
                                      "so."),
              target(hits, NAMED), unit="percentunit", empty=NO_TOKENS, interval="15m", top=1, height=9,
              calcs=("lastNotNull", "min")),
        number("Cache hits", ("Share of the prompt that came from the cache, in the time range. Orange below 50 %, "
                              "green from 80 % on."),
               hit, unit="percentunit", empty=NO_TOKENS, thresholds=share, decimals=0, height=8),
        ranking("Tokens by model", "All types together, in the time range.", q.spent(TOKENS, "provider", "model"),
                "{{provider}}/{{model}}", unit="short", empty=NO_TOKENS, width=10),
        ranking("Unpriced tokens", ("Tokens whose cost nobody knows, in the time range: no agent reported it, and "
                                    "there is no list price. They are in no figure of money. Any at all is a reason to "
                                    "look."),
                f"{q.spent(UNPRICED, *MODEL)} > 0", NAMED, unit="short", empty="None: every token has a cost",
                thresholds=((None, ORANGE),), width=10),
    )


def _per(board: Board) -> None:
    calls = q.usage("coding_agent_messages_total", q.REAL)
    sessions = q.usage("coding_agent_sessions_total", q.REAL)
    board.row(
        "Per turn and session",
        ranking("Real money per turn", ("A turn is one model call with its tools. Harnesses that report running totals "
                                        "(Claude Code, Codex) count no calls, and are not here."),
                q.ratio(q.spent(REAL, *MODEL), q.spent(calls, *MODEL)), NAMED, unit="currencyUSD", empty=NO_COUNT,
                width=8, decimals=4),
        ranking("Real money per session", ("Spent in the time range, for each session that began in it. Off for "
                                           "sessions that reach over its edge."),
                q.ratio(q.spent(REAL, "source"), q.spent(sessions, "source")), "{{source}}", unit="currencyUSD",
                empty="No session began in this time range", width=8, decimals=2),
        ranking("Sessions", "Sessions that began in the time range, paid for by api_key or subscription.",
                f"{q.spent(q.usage('coding_agent_sessions_total'), 'source', 'cost_mode')}", "{{source}} {{cost_mode}}",
                unit="short", empty="No session began in this time range", width=8),
    )


def _limits(board: Board) -> None:
    keys = ("job", "instance", "root", "source", "window")
    matchers = ('root=~"$root"', 'source=~"$source"')
    used = q.total("max", keys, q.select("coding_agent_rate_limit_used_percent", *matchers))
    resets = q.total("max", keys, q.select("coding_agent_rate_limit_resets_timestamp_seconds", *matchers))
    board.row(
        "Rate limits",
        grid("Rate-limit windows", ("As the harness last reported them, until the window is over. Orange from 80 % on, "
                                    "red from 90 %."),
             target(used, cells=True), target(f"{resets} - time() > 0", cells=True), empty=NO_LIMITS, sort="Used",
             width=12, height=8,
             names={"source": "Source", "window": "Window", "Value #A": "Used", "Value #B": "Resets in", "root": "Root",
                    "instance": "Instance"},
             hidden=("job",),
             overrides={"Used": {"unit": "percent", "decimals": 0, **filled(LIMIT, 100)},
                        "Resets in": {"unit": "s", "decimals": 0}}),
        lines("Rate-limit windows over time", "Share that is used up. The lines are at 80 % and 90 %.",
              target(used, "{{source}} {{window}} {{root}} {{instance}}"), unit="percent", empty=NO_LIMITS,
              thresholds=LIMIT, top=100),
    )
