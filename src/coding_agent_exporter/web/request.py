"""Takes the bytes of an HTTP/1.1 request's head, gives a `Request`, or the reason why they are none."""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_HEAD = 16 * 1024
"""Bytes of a request line with its headers."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request as parsed. Header names are in lower case; `has_body`: what follows is no request."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    keep_alive: bool
    has_body: bool


class BadRequestError(Exception):
    """The bytes are no request that is served here."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


_HEAD_END = re.compile(rb"\r?\n\r?\n")
_REQUEST_LINE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+) (\S+) HTTP/(\d)\.(\d)")
_HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*?)[ \t]*")


def split_head(received: bytes) -> tuple[bytes, bytes] | None:
    """Split what was received into the head of the first request, and what follows; None: more has to come.

    Raises BadRequestError when the head is larger than MAX_HEAD.
    """
    start = len(received) - len(received.lstrip(b"\r\n"))  # some clients end a request with a line too many
    match = _HEAD_END.search(received, start)
    if match and match.end() <= MAX_HEAD:
        return received[start:match.start()], received[match.end():]
    if len(received) > MAX_HEAD:
        raise BadRequestError(431, f"the request's head is larger than {MAX_HEAD} bytes")
    return None


def parse_request(head: bytes) -> Request:
    """Parse a request line and headers, without the empty line that ends them. Raises BadRequestError."""
    line, *rest = head.decode("latin-1").replace("\r\n", "\n").split("\n")
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        raise BadRequestError(400, "malformed request line")
    method, target, major, minor = match.groups()
    if major != "1":
        raise BadRequestError(505, "only HTTP/1.1 and HTTP/1.0 are served")
    headers: dict[str, str] = {}
    for text in rest:
        field = _HEADER.fullmatch(text)
        if field is None:
            raise BadRequestError(400, "malformed header")
        name, value = field[1].lower(), field[2]
        if name == "host" and name in headers:
            raise BadRequestError(400, "more than one Host header")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    if minor != "0" and "host" not in headers:
        raise BadRequestError(400, "no Host header")
    if not target.startswith("/"):  # a proxy's form: http://host/path
        target = "/" + target.partition("://")[2].partition("/")[2]
    path, _, query = target.partition("#")[0].partition("?")
    options = {option.strip().lower() for option in headers.get("connection", "").split(",")}
    return Request(method, path, query, headers, keep_alive=minor != "0" and "close" not in options,
                   has_body="transfer-encoding" in headers or headers.get("content-length", "0") != "0")


def accepts_gzip(accept_encoding: str) -> bool:
    """Whether an Accept-Encoding header names gzip with a weight above 0."""
    for item in accept_encoding.lower().split(","):
        coding, _, parameter = item.partition(";")
        if coding.strip() == "gzip":
            return re.fullmatch(r"\s*q\s*=\s*0(\.0*)?\s*", parameter) is None
    return False
