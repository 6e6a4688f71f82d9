"""Who may ask: the checks that need no server."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from synapse.commands import LacksPermission
from synapse.server.access import Caller, check_local, host_of, is_loopback
from synapse.server.http.errors import NotLocal


def request(client: str | None = "127.0.0.1", **headers: str) -> Request:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    return Request({"type": "http", "headers": raw, "client": (client, 5000) if client else None})


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "127.0.0.1", "127.9.8.7", "::1", "::ffff:127.0.0.1"])
def test_loopback_names_and_addresses_mean_this_machine(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host",
    [
        "",
        "0.0.0.0",  # noqa: S104 (not bound to)
        "::",
        "10.0.0.1",
        "::ffff:10.0.0.1",
        "localhost.example.com",
        "127.0.0.1.example.com",
        "127.1",
        "2130706433",
        "0x7f.0.0.1",
    ],
)
def test_nothing_else_means_this_machine(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize("host", ["localhost", "localhost:8377", "127.0.0.1:1", "[::1]:8377", "[::1]"])
def test_without_keys_a_request_from_this_machine_is_let_in(host: str) -> None:
    check_local(request(host=host))
    check_local(request(host=host, origin="http://localhost:3000"))


@pytest.mark.parametrize(
    "host", ["", "evil.example", "evil.example:8377", "localhost@evil.example", "[::1", "192.168.0.7"]
)
def test_without_keys_another_host_name_is_refused(host: str) -> None:
    with pytest.raises(NotLocal, match="Host"):
        check_local(request(host=host))


@pytest.mark.parametrize("origin", ["null", "https://evil.example", "http://localhost.evil.example", "file://", ""])
def test_without_keys_a_page_of_another_site_is_refused(origin: str) -> None:
    with pytest.raises(NotLocal, match="web pages"):
        check_local(request(host="localhost", origin=origin))


@pytest.mark.parametrize(
    "name", ["Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Real-IP", "Via"]
)
def test_without_keys_a_request_that_came_through_a_proxy_is_refused(name: str) -> None:
    with pytest.raises(NotLocal, match="proxy"):
        check_local(request(host="localhost", **{name.lower(): "127.0.0.1"}))


def test_without_keys_another_machine_is_refused() -> None:
    with pytest.raises(NotLocal, match="this machine") as caught:
        check_local(request(client="192.168.0.7", host="localhost"))
    assert "synapse key create" in str(caught.value.hint)


def test_without_keys_a_request_without_a_host_is_refused() -> None:
    with pytest.raises(NotLocal):
        check_local(request())


@given(st.text())
def test_any_text_as_a_host_is_judged_without_an_error(text: str) -> None:
    assert is_loopback(host_of(f"//{text}")) in (True, False)


@pytest.mark.parametrize(
    ("held", "opens"),
    [
        ({"chat"}, {"chat", "any"}),
        ({"read"}, {"read", "any"}),
        ({"manage"}, {"read", "manage", "any"}),
        ({"chat", "manage"}, {"chat", "read", "manage", "any"}),
        (set(), set()),
    ],
)
def test_permissions_open_what_they_say(held: set, opens: set) -> None:
    caller = Caller("key", frozenset(held))
    for needs in ("chat", "read", "manage", "any"):
        if needs in opens:
            caller.require(needs)
        else:
            with pytest.raises(LacksPermission, match=needs):
                caller.require(needs)
