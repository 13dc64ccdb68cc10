"""Takes request bytes from delivery, gives them to a collector over gRPC, and its answer back.

Only loaded when gRPC is chosen. The official exporter is not used for the reasons given in otlp_http; its service
stub is one line here, and passes bytes, so that nothing is encoded twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status

from coding_agent_exporter.export import wire
from coding_agent_exporter.export.answer import Answer, Kind, grpc_kind, one_line

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from coding_agent_exporter.export.target import Target

_METHODS = {
    "traces": "/opentelemetry.proto.collector.trace.v1.TraceService/Export",
    "metrics": "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export",
}
_DETAILS = "grpc-status-details-bin"


class GrpcTransport:
    """One channel, kept between requests and replaced after every failure."""

    def __init__(self, target: Target, agent: str) -> None:
        self._target, self._agent = target, agent
        # Header values are bytes to gRPC only under a name that ends in -bin.
        self._metadata = tuple((name, value) for name, value in target.headers.items() if not name.endswith("-bin"))
        # Any: grpc carries no types, and its stubs are a package of their own.
        self._channel: Any = None
        self._call: Any = None

    def send(self, body: bytes, timeout: float) -> Answer:
        """One request, answered or given up within `timeout` seconds. Raises nothing that a network can cause."""
        try:
            if self._channel is None:
                self._channel = self._open()
            method = self._channel.unary_unary(_METHODS[self._target.signal])
            self._call = method.future(body, timeout=timeout, metadata=self._metadata)
            rejected, message = wire.partial_success(self._call.result())
        except grpc.RpcError as error:
            answer = self._failed(error)
        except grpc.FutureCancelledError:
            answer = Answer(Kind.AGAIN, "no answer in time")
        except (OSError, ValueError) as error:
            answer = Answer(Kind.AGAIN, self._said(str(error)))
        else:
            return Answer(Kind.ACCEPTED, self._said(message), rejected)
        finally:
            self._call = None
        # gRPC holds a grudge: a channel whose connection failed refuses by itself for a while, up to two minutes.
        self.close()
        return answer

    def cut(self) -> None:
        """End a request that another thread is in."""
        call = self._call
        if call is not None:
            call.cancel()

    def close(self) -> None:
        """Drop the channel; the next request opens another, and reads the certificate files again."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _open(self) -> Any:
        target = self._target
        options = (("grpc.primary_user_agent", self._agent),)
        compression = grpc.Compression.Gzip if target.gzip else grpc.Compression.NoCompression
        if not target.tls:
            return grpc.insecure_channel(target.url, options, compression)
        credentials = grpc.ssl_channel_credentials(
            _content(target.ca_file), _content(target.key_file or target.certificate_file),
            _content(target.certificate_file))
        return grpc.secure_channel(target.url, credentials, options, compression)

    def _failed(self, error: Any) -> Answer:
        code, details = error.code().name, error.details() or ""
        delay = _retry_delay(error.trailing_metadata() or ())
        said = self._said(details)
        kind = grpc_kind(code, details, retry_info=delay is not None)
        return Answer(kind, f"gRPC {code}{': ' if said else ''}{said}", retry_after=delay)

    def _said(self, text: str) -> str:
        return self._target.hidden(one_line(text))


def _retry_delay(metadata: Iterable[tuple[str, str | bytes]]) -> float | None:
    """Seconds from the RetryInfo that a server attaches, or None."""
    for name, value in metadata:
        if name == _DETAILS and isinstance(value, bytes):
            try:
                for detail in Status.FromString(value).details:
                    info = RetryInfo()
                    if detail.Unpack(info):
                        seconds: float = info.retry_delay.seconds + info.retry_delay.nanos / 1e9
                        return max(0.0, seconds)
            except DecodeError:
                return None
    return None


def _content(path: Path | None) -> bytes | None:
    return path.read_bytes() if path else None
