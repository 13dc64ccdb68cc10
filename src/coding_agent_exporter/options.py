"""Takes nothing, gives `config` and `cli` the one list of what can be set.

Flags, variables, TOML keys, `--help` and docs/configuration.md all derive from it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from coding_agent_exporter import families
from coding_agent_exporter.values import (
    ADDRESS,
    COUNT,
    DIRECTORY,
    DURATION,
    OPTIONAL_PATH,
    PATH,
    SIZE,
    SWITCH,
    URL_PATH,
    WORD,
    WORDS,
    Type,
)

ENV_PREFIX = "CODING_AGENT_EXPORTER_"
INFO_LABELS = tuple(name for name in families.INSTANCE_INFO.labels if name not in families.INSTANCE)
"""What `--telemetry.info-labels` chooses from, in the order of the family."""


@dataclass(frozen=True, slots=True)
class Option:
    """One thing that can be set. `default` is written as a user would write it.

    Where `shown` is given, the default depends on the environment (see `config`), and `shown` says how.
    """

    name: str
    type: Type
    default: str
    help: str
    repeatable: bool = False
    choices: tuple[str, ...] = ()
    least: str = ""
    shown: str = ""
    in_file: bool = True

    @property
    def group(self) -> str:
        """The heading it stands under: the first part of the name."""
        return self.name.partition(".")[0]

    @property
    def flag(self) -> str:
        return f"--{self.name}"

    @property
    def env(self) -> str:
        return ENV_PREFIX + re.sub(r"[.-]", "_", self.name).upper()

    @property
    def toml(self) -> str:
        """How an error names the key: `[web] listen-address`, `[web.config] file`."""
        return toml_key(self.name)

    @property
    def field(self) -> str:
        return re.sub(r"[.-]", "_", self.name)


GROUPS = {
    "config": "Configuration file",
    "web": "Web: where metrics are served",
    "telemetry": "Telemetry: heartbeat files of running agents",
    "usage": "Usage: logs of what each message cost, as mngr's writers keep them",
    "sessions": "Sessions: session files of pi and oh-my-pi",
    "state": "State: what survives a restart",
    "counters": "Counters",
    "shutdown": "Shutdown",
    "otlp": "OTLP: spans and metrics to a collector",
    "watch": "Watch: how changes are noticed",
    "input": "Input",
    "log": "Log: on standard error",
}

OPTIONS: tuple[Option, ...] = (
    Option("config.file", OPTIONAL_PATH, "", "TOML file with any of these settings.", in_file=False),

    Option("web.listen-address", ADDRESS, ":10464", "Address to serve on; port 0 is any free port.",
           repeatable=True),
    Option("web.telemetry-path", URL_PATH, "/metrics", "Path of the metrics."),
    Option("web.config.file", OPTIONAL_PATH, "",
           "File in the format of Prometheus's exporter-toolkit: TLS, client certificates, basic auth."),
    Option("web.max-connections", COUNT, "128", "Connections served at the same time.", least="1"),

    Option("telemetry.dir", DIRECTORY, "", "Directory of pi-telemetry instance files.", repeatable=True,
           shown="pi=$PI_TELEMETRY_DIR, else pi=~/.pi/agent/telemetry/instances"),
    Option("telemetry.stale-after", DURATION, "10s",
           "Age of a heartbeat beyond which its process counts as gone.", least="1ms",
           shown="$PI_TELEMETRY_STALE_MS milliseconds, else 10s"),
    Option("telemetry.forget-after", DURATION, "1h",
           "How long a stale instance is still shown; its file is never touched."),
    Option("telemetry.peak-window", DURATION, "60s", "Trailing window of coding_agent_context_percent_peak."),
    Option("telemetry.info-labels", WORDS, ",".join(INFO_LABELS),
           "Labels of coding_agent_instance_info beside root and pid. Those left out never leave the host; "
           "an empty list leaves out all.", choices=INFO_LABELS),

    Option("usage.root", DIRECTORY, "",
           "Directory of mngr (which holds agents/ and preserved/), or of one agent.", repeatable=True,
           shown="mngr=$MNGR_HOST_DIR, else mngr=~/.mngr; also agent=$MNGR_AGENT_STATE_DIR where that lies "
                 "elsewhere"),
    Option("usage.agent-label", SWITCH, "false",
           "Adds a label agent to all usage series: one set for each agent."),

    Option("sessions.dir", DIRECTORY, "", "Directory of session files.", repeatable=True,
           shown="pi=$PI_CODING_AGENT_DIR/sessions, else pi=~/.pi/agent/sessions; also "
                 "omp=~/.omp/agent/sessions"),

    Option("state.path", PATH, "", "File that keeps counters and read positions. One exporter for each file.",
           shown="$XDG_STATE_HOME/coding-agent-exporter/state.db, else "
                 "~/.local/state/coding-agent-exporter/state.db"),

    Option("counters.zero-hold", DURATION, "0",
           "How long a new series stays at 0 after it was first scraped. Set it to the scrape interval or "
           "more where several Prometheus servers scrape this exporter."),
    Option("counters.baseline-age", DURATION, "10m",
           "What was spent longer than this before the very first start is history: part of the first value "
           "shown, not an increase."),
    Option("counters.max-series", COUNT, "10000",
           "Most series of one family; what is beyond counts as model=other.", least="1"),

    Option("shutdown.linger", DURATION, "0",
           "Longest wait, after SIGTERM, for a scrape that has seen the final values."),

    Option("otlp.endpoint", WORD, "",
           "Base URL of an OTLP collector, such as http://localhost:4318: finished turns go there as spans. Without "
           "one, here or in OTEL_EXPORTER_OTLP_ENDPOINT, nothing is sent. All standard OTEL_EXPORTER_OTLP_* variables "
           "are honoured; these flags win."),
    Option("otlp.protocol", WORD, "", "http/protobuf (the default), or grpc (needs the extra [grpc]).",
           choices=("", "http/protobuf", "grpc")),
    Option("otlp.headers", WORD, "", "Headers to send: name=value,... with percent-encoded values."),
    Option("otlp.compression", WORD, "", "gzip, or none (the default).", choices=("", "none", "gzip")),
    Option("otlp.timeout", DURATION, "0", "Longest time for one request; 0: what the variables say, else 10s."),
    Option("otlp.flush-timeout", DURATION, "5s", "Longest time, at shutdown, for sending what is in the outbox."),
    Option("otlp.pi-spans", WORD, "sessions",
           "Where spans of pi and oh-my-pi come from: their session files (whole trees of turns and tools), or usage "
           "logs (one span per message), for where session files are not mounted.", choices=("sessions", "usage")),
    Option("otlp.backfill", SWITCH, "false",
           "Also send what had ended longer than --counters.baseline-age before the very first start. Settle this "
           "before the first start."),
    Option("otlp.max-queue", COUNT, "200000", "Most spans that wait for a collector; the oldest are dropped.",
           least="1"),
    Option("otlp.max-age", DURATION, "7d", "Longest time that a span waits for a collector.", least="1m"),
    Option("otlp.metrics", SWITCH, "false",
           "Send metrics to the collector too. Each push counts as a scrape: where Prometheus scrapes as well, set "
           "--counters.zero-hold."),
    Option("otlp.metrics-interval", DURATION, "0",
           "How often metrics are sent; 0: what OTEL_METRIC_EXPORT_INTERVAL says, else 60s."),

    Option("watch.poll-interval", DURATION, "200ms",
           "How often directories are looked at where inotify does not work.", least="10ms"),
    Option("watch.force-polling", SWITCH, "false", "Never use inotify."),

    Option("input.max-line-size", SIZE, "4MiB",
           "Longest line that is read; longer ones are counted as rejected.", least="1KiB"),

    Option("log.level", WORD, "info", "Least severe messages to write.",
           choices=("debug", "info", "warn", "error")),
    Option("log.format", WORD, "logfmt", "Format of log lines.", choices=("logfmt", "json")),
)


def toml_key(name: str) -> str:
    """A dotted name as people write it in TOML: `[web] listen-address`."""
    table, dot, key = name.rpartition(".")
    return f"[{table}] {key}" if dot else key


_MARKDOWN_HEAD = """\
<!-- Generated by `make docs` from src/coding_agent_exporter/options.py. Do not edit. -->
# Configuration

Nothing has to be configured: without any setting the exporter looks where the agents of the same user keep
their files. Every setting can be given in three ways. The first that is there wins:

1. a flag: `--web.listen-address=127.0.0.1:9000`;
2. an environment variable, the same name in upper case:
   `CODING_AGENT_EXPORTER_WEB_LISTEN_ADDRESS=127.0.0.1:9000`;
3. a key of the TOML file that `--config.file` names:

   ```toml
   [web]
   listen-address = "127.0.0.1:9000"

   [usage]
   root = ["ci=/srv/ci/mngr", "~/.mngr"]
   ```

A setting that can be given several times repeats the flag, separates the values of the variable by commas,
and is an array in TOML. What is given replaces the default as a whole.

A setting that is wrong or unknown stops the exporter at once, with exit code 2 and one line that says where
it was written. Variables that Kubernetes sets for a Service called `coding-agent-exporter` are passed over.

How values are written:

- directory: `path` or `alias=path`. The alias is the value of the label `root`; without one it is the path
  as written. Directories that are missing are waited for. An empty array in TOML reads none of that kind.
- path: `~` is the home directory; other paths are relative to the working directory, or to the directory of
  the TOML file that holds them.
- duration: `500ms`, `30s`, `10m`, `1h30m`, `0`.
- size: `4MiB`, `512KiB`, or a number of bytes.
- address: `host:port`, `:port` (all interfaces) or `[IPv6 address]:port`.
- list: `a,b,c`, in TOML also an array.
- true or false: the flag alone is true, `--no-...` is false; `true` or `false` elsewhere.
"""


def markdown() -> str:
    """The text of docs/configuration.md."""
    lines = [_MARKDOWN_HEAD.rstrip()]
    for group, title in GROUPS.items():
        lines += ["", f"## {title}", ""]
        for option in (option for option in OPTIONS if option.group == group):
            several = ", can be given several times" if option.repeatable else ""
            lines += [f"### `{option.flag}`", "", option.help, "", f"- Type: {option.type.name}{several}"]
            if option.choices:
                lines.append(f"- Values: {', '.join(f'`{choice}`' for choice in option.choices)}")
            if option.least:
                lines.append(f"- At least: `{option.least}`")
            lines += [f"- Default: {option.shown or (f'`{option.default}`' if option.default else 'none')}",
                      f"- Variable: `{option.env}`"]
            if option.in_file:
                lines.append(f"- TOML: `{option.toml}`")
            lines.append("")
        lines.pop()
    return "\n".join(lines) + "\n"
