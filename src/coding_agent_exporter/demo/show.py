"""Takes what the command line says of the demo, gives the show: made-up agents, and the real exporter beside them.

The exporter is `serve.serve`, in the main thread, with its own signals and its own end; the agents live in a thread
that begins when it listens and ends when it is asked to stop. At the end /metrics is asked once more, and held to what
the agents spent.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from coding_agent_exporter import config, logs, serve
from coding_agent_exporter.demo import OWN_SETTINGS, accounts
from coding_agent_exporter.demo.cast import Stage
from coding_agent_exporter.demo.scratch import scratch
from coding_agent_exporter.demo.writers import PICO, TOKEN_TYPES, Truth
from coding_agent_exporter.pricing import Prices
from coding_agent_exporter.schema import StoreError
from coding_agent_exporter.values import Address

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path
    from types import FrameType

    from coding_agent_exporter.config import Settings
    from coding_agent_exporter.model import Root

    Load = Callable[[dict[str, str], Path], Settings]
    """Settings by the flags, with these variables and this home directory; raises ConfigError."""

DEFAULTS = {
    "CODING_AGENT_EXPORTER_WEB_LISTEN_ADDRESS": "127.0.0.1:10464",
    "CODING_AGENT_EXPORTER_LOG_LEVEL": "warn",
}
"""What is not as with `serve`, unless a flag says so: only this machine sees agents that are none."""

COLLECTORS = tuple(f"OTEL_EXPORTER_OTLP_{which}ENDPOINT" for which in ("", "TRACES_", "METRICS_"))

CONFIG = "demo.toml"
"""What other commands need, to see the demo's agents."""

TICK = 0.1
"""Seconds between two looks at what the agents do."""
MOMENT = 0.25
"""Seconds for which files stay as they are when they will be overwritten soon, however late it is."""
SLICE = 1.0
"""Seconds that are caught up at once, after a machine was suspended."""
PATIENCE = 10.0
"""Seconds for which /metrics may differ from the truth at the end before that is an error."""
MILESTONES = tuple(amount * 10**power for power in range(8) for amount in (1, 2, 5))
"""US dollars."""


@dataclass(frozen=True)
class Options:
    """`seconds`: how long; 0: until a signal. `speed`: see `cast.Stage`."""

    seed: int = 1
    speed: float = 1.0
    seconds: float = 0.0
    quiet: bool = False


def run(options: Options, load: Load) -> int:
    """Show it until SIGINT, SIGTERM or SIGHUP, or until the time is up. Returns the exit code.

    1: /metrics says something else than the agents spent. Raises OSError where the show cannot begin or go on, and
    ConfigError.
    """
    for name in COLLECTORS:
        # A collector that somebody set up for real agents gets nothing of these; --otlp.endpoint names one for them.
        os.environ.pop(name, None)
    signals = _Signals()
    try:
        with scratch() as home:
            settings = _settings(load, home)
            logs.setup(settings.log_level, settings.log_format)
            show = _Show(home, settings, options, signals)
            try:
                serve.serve(settings, beside=show.beside)
            except StoreError as error:
                raise OSError(str(error)) from error
            except OSError as error:
                if show.begun:
                    raise
                hint = "choose another one: --web.listen-address=127.0.0.1:PORT, or port 0 for any that is free"
                raise OSError(f"{error.strerror or error}; {hint}") from error
            return show.code
    finally:
        signals.restore()


def _settings(load: Load, home: Path) -> Settings:
    """All roots and the state lie below `home`, as for a user who configured nothing. Raises ConfigError."""
    settings, own = load(DEFAULTS, home), config.load([], DEFAULTS, home=home, cwd=home)
    for option in config.OPTIONS:
        # Three options are a kind of root each.
        given, plain = (getattr(one, option.field, _roots(one, option.group)) for one in (settings, own))
        if option.name in OWN_SETTINGS and given != plain:
            raise config.ConfigError(f"{option.flag}: cannot be set for the demo, which has files of its own")
    for root in settings.roots:
        root.path.mkdir(parents=True)
    tables = [f"[state]\npath = {json.dumps(str(settings.state_path))}\n"]
    for table, key in (("telemetry", "dir"), ("usage", "root"), ("sessions", "dir")):
        directories = [f"{root.alias}={root.path}" for root in _roots(settings, table)]
        tables.append(f"[{table}]\n{key} = {json.dumps(directories)}\n")
    (home / CONFIG).write_text("\n".join(tables), encoding="utf-8")
    return settings


def _roots(settings: Settings, kind: str) -> list[Root]:
    return [root for root in settings.roots if root.kind == kind]


class _Signals:
    """What signals do while `serve` does not handle them: end the program, once, and not while it cleans up."""

    def __init__(self) -> None:
        self.ending = False
        self.stop: Callable[[], None] | None = None
        """Ends a show that is under way."""
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # nohup has it ignored
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._caught) for number in numbers}

    def _caught(self, number: int, _: FrameType | None) -> None:
        if self.stop is not None:
            self.stop()
        elif not self.ending:
            self.ending = True
            raise SystemExit(128 + number)

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class _Show:
    """One show. `code` is its exit code, once it is over."""

    def __init__(self, home: Path, settings: Settings, options: Options, signals: _Signals) -> None:
        self.begun = False
        self.code = 1
        self._home, self._settings, self._options, self._signals = home, settings, options, signals
        self._truth = Truth()
        self._over = threading.Event()
        self._failed: OSError | None = None
        self._ended_well = False
        self._muted = False
        self._real, self._counted, self._milestone = 0, 0, 0

    @contextmanager
    def beside(self, addresses: Sequence[tuple[str, int]], stop: Callable[[], None]) -> Iterator[None]:
        """The agents, while the exporter serves; then the account. `stop` asks the exporter to end."""
        self._signals.stop = stop
        self.begun = True
        host, port = addresses[0]
        self._say(self._introduction(host, port))
        agents = threading.Thread(target=self._play, args=(stop,), name="demo-agents", daemon=True)
        agents.start()
        try:
            yield
        finally:
            self._signals.ending, self._signals.stop = True, None
            self._over.set()
            agents.join()
        if self._failed is not None:
            raise OSError(f"the agents of the demo cannot go on: {self._failed}")
        if self._ended_well:
            self._settle(host, port)

    # -- the agents

    def _play(self, stop: Callable[[], None]) -> None:
        try:
            began = at = time.time()
            deadline = time.monotonic() + self._options.seconds if self._options.seconds else float("inf")
            stage = Stage(self._home, self._options.seed, start=began, speed=self._options.speed, tell=self._tell)
            self._truth = stage.truth
            over = False
            while not over:
                over = self._over.wait(TICK)
                now = max(at, time.time())  # a clock may be set back
                while at < now:
                    at = min(now, at + SLICE)
                    stage.advance(at, self._hold)
                self._note_money()
                if time.monotonic() >= deadline:
                    stop()
            self._ended_well = True
        except OSError as error:
            self._failed = error
        finally:
            # Without agents there is nothing to show, whatever has become of them.
            stop()

    def _hold(self, _: float) -> None:
        self._over.wait(MOMENT)

    def _tell(self, at: int, who: str, what: str) -> None:
        if not self._options.quiet:
            self._say(f"{datetime.fromtimestamp(at / 1000).astimezone():%H:%M:%S}  {who:<10} {what}\n")

    def _note_money(self) -> None:
        spends, last = self._truth.spends, self._milestone
        for spend in spends[self._counted:]:
            self._real += spend.pico or 0 if spend.usage.cost_mode == "api_key" else 0
        self._counted = len(spends)
        while self._real >= MILESTONES[self._milestone] * PICO:
            self._milestone += 1
        if self._milestone > last:
            passed = f"have spent ${MILESTONES[self._milestone - 1]:,} of real money"
            self._tell(spends[-1].at, "all agents", passed)

    # -- what is said

    def _introduction(self, host: str, port: int) -> str:
        shown = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, host)  # noqa: S104  what it is called, nothing is bound
        target = str(Address(shown, port))
        file = f"--config.file={self._home / CONFIG}"
        how_long = f"for {self._options.seconds:g} s" if self._options.seconds else "until Ctrl-C"
        return f"""\
Agents that are not real (seed {self._options.seed}), {how_long}. Their files are below
{self._home}

a page       http://{target}/
metrics      http://{target}{self._settings.web_telemetry_path}
a screen     coding-agent-exporter top {file}
money        coding-agent-exporter usage {file}
Grafana      coding-agent-exporter dashboards --dir dashboards
alerts       coding-agent-exporter rules --dir rules
Prometheus   add to prometheus.yml:

scrape_configs:
- job_name: coding-agents
  scrape_interval: 5s
  static_configs:
  - targets: [{json.dumps(target)}]

"""

    def _say(self, text: str) -> None:
        """To standard output. Once nobody reads it (`| head`, a terminal that was closed) the show is over."""
        if self._muted:
            return
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except OSError:
            self._muted = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if self._signals.stop is not None:
                self._signals.stop()

    # -- the end

    def _settle(self, host: str, port: int) -> None:
        """Hold /metrics to the truth. A new series is at zero in the scrape that shows it first: one is not enough."""
        truth = accounts.spent(self._truth.spends, TOKEN_TYPES, Prices().estimate)
        deadline = time.monotonic() + PATIENCE + self._settings.counters_zero_hold
        while True:
            said = accounts.settle(truth, accounts.shown(self._metrics(host, port)))
            agree = accounts.agree(truth, said)
            if agree or time.monotonic() > deadline:
                break
            time.sleep(TICK)
        self.code = 0 if agree else 1
        verdict = "Every cent arrived once." if agree else (
            f"They differ, which is an error of the exporter. The agents were those of --seed {self._options.seed}.")
        self._say(f"\n{accounts.table(truth, said)}\n{verdict}\n")

    def _metrics(self, host: str, port: int) -> str:
        """What is served now. Raises OSError."""
        local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  as above
        connection = http.client.HTTPConnection(local, port, timeout=PATIENCE)
        try:
            connection.request("GET", self._settings.web_telemetry_path)
            reply = connection.getresponse()
            text = reply.read().decode()
        except http.client.HTTPException as error:
            raise OSError(f"no answer from /metrics: {error!r}") from error
        finally:
            connection.close()
        if reply.status != 200:
            raise OSError(f"/metrics answered {reply.status}: {text.strip()}")
        return text
