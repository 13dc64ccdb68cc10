"""Takes spans from the outbox, gives them to an OTLP collector, and takes them out when it has them.

`target` says where, `worker` when, `delivery` in which pieces, `otlp_http` and `otlp_grpc` how, `wire` in which
bytes; `answer` says what follows from a collector's reply. Nothing heavy is imported before `Exporter.start()`.
"""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING

from coding_agent_exporter.export.delivery import DROP_REASONS, Counts, Outbox
from coding_agent_exporter.export.target import resolve, resource
from coding_agent_exporter.export.worker import Exporter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["DROP_REASONS", "Counts", "Exporter", "Outbox", "create"]


def create(outbox: Outbox, environ: Mapping[str, str], *, version: str, instance: str, endpoint: str = "",
           protocol: str = "", headers: str = "", compression: str = "", timeout: float | None = None,
           insecure: bool | None = None, host: str | None = None, clock: Callable[[], float] = time.monotonic,
           wall: Callable[[], float] = time.time) -> Exporter | None:
    """An exporter that is not started yet; None when neither a setting nor a variable names an endpoint.

    `instance` becomes `service.instance.id`, and has to stay the same over restarts. The settings are those of
    `target.resolve`, and win over the OTEL variables in `environ`. Raises ValueError with one line for people.
    """
    target = resolve(environ, endpoint=endpoint, protocol=protocol, headers=headers, compression=compression,
                     timeout=timeout, insecure=insecure)
    if target is None:
        return None
    attributes = resource(environ, version=version, instance=instance,
                          host=socket.gethostname() if host is None else host)
    return Exporter(target, outbox, resource=attributes, version=version, clock=clock, wall=wall)
