"""Takes spans and resource attributes, gives the bytes of OTLP requests, and reads the bytes of the answers.

The messages are those of opentelemetry-proto, filled in here and not by the SDK's encoder: that one wants a
ReadableSpan with a Resource for each span (whose hash serialises it to JSON every time), is a third slower, and
answers an attribute that it cannot encode with a traceback and a span without it. Here such a span is an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Status
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Message

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from coding_agent_exporter.spanmodel import Span, Value

SCOPE = "coding_agent_exporter"

_KINDS = {"internal": Message.SPAN_KIND_INTERNAL, "client": Message.SPAN_KIND_CLIENT}
# Sampled; and it is known that the parent is not remote.
_FLAGS = 0x01 | 0x100


class Encoder:
    """Builds requests for one resource. `version` is the scope's, and that of this program."""

    def __init__(self, resource: Mapping[str, str], version: str) -> None:
        self._resource = Resource(attributes=_attributes(resource))
        self._scope = InstrumentationScope(name=SCOPE, version=version)

    def span(self, span: Span) -> Message:
        """The message of one span. Raises ValueError or TypeError when the protocol cannot carry it."""
        return Message(
            trace_id=_identifier(span.trace, 16), span_id=_identifier(span.span, 8),
            parent_span_id=_identifier(span.parent, 8) if span.parent else b"",
            name=span.name, kind=_KINDS[span.kind], start_time_unix_nano=span.start, end_time_unix_nano=span.end,
            attributes=_attributes(span.attributes), flags=_FLAGS,
            events=[Message.Event(name=event.name, time_unix_nano=event.at, attributes=_attributes(event.attributes))
                    for event in span.events],
            links=[Message.Link(trace_id=_identifier(link.trace, 16), span_id=_identifier(link.span, 8))
                   for link in span.links],
            status=Status(code=Status.STATUS_CODE_ERROR, message=span.error) if span.error else None)

    def request(self, messages: Iterable[Message]) -> bytes:
        """The bytes of one request, spans in the order given. One without spans is empty, and legal."""
        spans = list(messages)
        if not spans:
            return b""
        return ExportTraceServiceRequest(resource_spans=[ResourceSpans(
            resource=self._resource, scope_spans=[ScopeSpans(scope=self._scope, spans=spans)])]).SerializeToString()


def partial_success(body: bytes) -> tuple[int, str]:
    """How many were rejected, and what was said about it. The same bytes for every signal. Raises ValueError."""
    try:
        partial = ExportTraceServiceResponse.FromString(body).partial_success
    except DecodeError as error:
        raise ValueError("not an OTLP response") from error
    return partial.rejected_spans, partial.error_message


def _identifier(text: str, size: int) -> bytes:
    raw = bytes.fromhex(text)
    if len(raw) != size or not any(raw):
        raise ValueError(f"{text!r} is not the id of {size} bytes that it should be")
    return raw


def _attributes(values: Mapping[str, Value]) -> list[KeyValue]:
    return [KeyValue(key=name, value=_value(value)) for name, value in values.items()]


def _value(value: Value) -> AnyValue:
    if isinstance(value, bool):
        return AnyValue(bool_value=value)
    if isinstance(value, str):
        return AnyValue(string_value=value)
    if isinstance(value, int):
        return AnyValue(int_value=value)
    if isinstance(value, float):
        return AnyValue(double_value=value)
    return AnyValue(array_value=ArrayValue(values=[AnyValue(string_value=text) for text in value]))
