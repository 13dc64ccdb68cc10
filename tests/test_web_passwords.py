"""Passwords, configured headers and the rate limit, and their reload, over real sockets."""

from __future__ import annotations

import base64
import http.client
import logging
import threading
from typing import TYPE_CHECKING

import bcrypt
import pytest

from coding_agent_exporter.web.access import Authenticator, RateLimit
from coding_agent_exporter.webconfig import WebConfigError
from web_support import DEADLINE, ask, exchange, get, serving

if TYPE_CHECKING:
    from pathlib import Path


def hashed(password: str) -> str:
    """The cheapest bcrypt hash, as htpasswd writes it."""
    return "$2y" + bcrypt.hashpw(password.encode(), bcrypt.gensalt(4)).decode()[3:]


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.fixture
def users(tmp_path: Path) -> Path:
    config = tmp_path / "web.yml"
    config.write_text(f"basic_auth_users:\n  prometheus: {hashed('right')}\n  long: {hashed('x' * 72)}\n"
                      "http_server_config:\n  headers: {X-Frame-Options: deny, Content-Security-Policy: configured}\n")
    return config


def test_basic_auth(users: Path) -> None:
    """Only a right password opens, on every path; whoever is refused is asked for one."""
    with serving(web_config=users) as server:
        for path in ("/metrics", "/", "/-/healthy", "/-/ready", "/nowhere"):
            answer = get(server, path)
            assert (answer.status, answer.body) == (401, b"unauthorized\n")
            assert answer.headers["www-authenticate"] == 'Basic realm="coding-agent-exporter"'
        assert get(server, Authorization=basic("prometheus", "right")).status == 200
        assert get(server, "/nowhere", Authorization=basic("prometheus", "right")).status == 404
        for wrong in (basic("prometheus", "wrong"), basic("nobody", "right"), basic("", ""), "Basic !", "Bearer x",
                      basic("prometheus", "right" + "t" * 5000), basic("prometheus", "right\0"),
                      "Basic " + base64.b64encode(b"prometheus").decode()):
            assert get(server, Authorization=wrong).status == 401
        assert server.errors == 0


def test_oversized_password(users: Path) -> None:
    """Of a password bcrypt sees 72 bytes, as in the toolkit: a longer one is right when these are."""
    with serving(web_config=users) as server:
        assert get(server, Authorization=basic("long", "x" * 72)).status == 200
        assert get(server, Authorization=basic("long", "x" * 100)).status == 200
        assert get(server, Authorization=basic("long", "x" * 71)).status == 401


def test_configured_headers(users: Path) -> None:
    """Configured headers are on every reply, refusals included, and win over a page's own."""
    with serving(web_config=users) as server:
        answers = [get(server), get(server, "/", Authorization=basic("prometheus", "right"))]
        for answer in answers:
            assert answer.headers["x-frame-options"] == "deny"
            assert answer.headers["content-security-policy"] == "configured"
        assert b"X-Frame-Options: deny" in exchange(server, b"nonsense\r\n\r\n")


def test_password_reload(users: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A changed password holds from the next request on, also on an open connection, also if the old was cached."""
    with serving(web_config=users) as server, caplog.at_level(logging.INFO):
        host, port = server.addresses[0]
        client = http.client.HTTPConnection(host, port, timeout=DEADLINE)
        assert ask(client, Authorization=basic("prometheus", "right")).status == 200
        users.write_text(f"basic_auth_users: {{prometheus: {hashed('new one')}}}\n")
        assert ask(client, Authorization=basic("prometheus", "right")).status == 401
        assert ask(client, Authorization=basic("prometheus", "new one")).status == 200
        client.close()
    assert [record.getMessage() for record in caplog.records] == [f"web configuration read again: {users}"]


@pytest.mark.parametrize("broken", ["basic_auth_users: [", "basic_auth_user: {}", "", "basic_auth_users: {a: b}"])
def test_broken_reload(users: Path, broken: str, caplog: pytest.LogCaptureFixture) -> None:
    """A file that breaks fails every request, for right passwords too, opens nothing, and is reported once."""
    text = users.read_text()
    right = basic("prometheus", "right")
    with serving(web_config=users) as server, caplog.at_level(logging.ERROR):
        assert get(server, Authorization=right).status == 200
        users.write_text(broken)
        assert [get(server, Authorization=right).status, get(server).status] == [500, 500]
        assert len(caplog.records) == 1
        assert str(users) in caplog.text
        users.write_text(text)
        assert [get(server, Authorization=right).status, get(server).status] == [200, 401]


def test_missing_at_start(tmp_path: Path) -> None:
    """A configuration that is missing or broken at the start is an error then."""
    with pytest.raises(WebConfigError, match=r"web\.yml: No such file or directory"), serving(
            web_config=tmp_path / "web.yml"):
        pass


def test_rate_limit(tmp_path: Path) -> None:
    """Requests beyond the configured rate get 429, before any password is looked at."""
    config = tmp_path / "web.yml"
    config.write_text("rate_limit: {interval: 1h, burst: 2}\n")
    with serving(web_config=config) as server:
        assert [get(server).status for _ in range(3)] == [200, 200, 429]


def test_rate_limit_refills() -> None:
    """One request is allowed for each interval that has passed, and no more than the burst is saved up."""
    now = [0.0]
    limit = RateLimit(0.5, 2, lambda: now[0])
    assert [limit.allow() for _ in range(3)] == [True, True, False]
    now[0] = 0.6
    assert [limit.allow() for _ in range(2)] == [True, False]
    now[0] = 100.0
    assert [limit.allow() for _ in range(3)] == [True, True, False]


def test_comparisons() -> None:
    """A right password is compared once; a wrong one, and any of an unknown user, each time."""
    authenticator = Authenticator({"a": hashed("right")}, remembered=1)
    assert [authenticator.check(basic("a", "right")) for _ in range(3)] == ["ok"] * 3
    assert authenticator.comparisons == 1
    assert [authenticator.check(basic("a", "wrong")), authenticator.check(basic("b", "right"))] == ["denied"] * 2
    assert [authenticator.check(basic("a", "wrong")), authenticator.check(basic("b", "right"))] == ["denied"] * 2
    assert authenticator.comparisons == 5
    assert authenticator.check("") == "denied"
    assert authenticator.comparisons == 5


def test_remembered_is_bounded() -> None:
    """Of right passwords only so many are remembered; the one that is forgotten is compared again."""
    authenticator = Authenticator({"a": hashed("1"), "b": hashed("2")}, remembered=1)
    for _ in range(2):
        assert authenticator.check(basic("a", "1")) == authenticator.check(basic("b", "2")) == "ok"
    assert authenticator.comparisons == 4


def test_line_for_comparisons(monkeypatch: pytest.MonkeyPatch) -> None:
    """One comparison runs at a time. Who finds the line full, or waits too long, is told so, and a password that
    is known to be right does not wait."""
    started, go = threading.Semaphore(0), threading.Event()
    compare = bcrypt.checkpw
    running: list[int] = []

    def slow(password: bytes, digest: bytes) -> bool:
        running.append(1)
        started.release()
        if password == b"slow":
            assert go.wait(DEADLINE)
        return compare(password, digest)

    monkeypatch.setattr(bcrypt, "checkpw", slow)
    authenticator = Authenticator({"a": hashed("right")}, patience=0.05, line=2)
    assert authenticator.check(basic("a", "right")) == "ok"
    assert started.acquire(timeout=DEADLINE)
    thread = threading.Thread(target=authenticator.check, args=(basic("a", "slow"),))
    thread.start()
    assert started.acquire(timeout=DEADLINE)
    assert authenticator.check(basic("a", "other")) == "busy"
    assert authenticator.check(basic("a", "right")) == "ok"
    go.set()
    thread.join(DEADLINE)
    assert authenticator.check(basic("a", "other")) == "denied"
    assert len(running) == 3
