"""Who may ask for what: API keys once there are any, and only this machine until then."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from starlette.requests import Request

from synapse.commands import require
from synapse.server.http.errors import BadKey, NotLocal
from synapse.server.keys import KeyPermission, Keys

Needs = Literal["chat", "read", "manage", "any"]

MAKE_A_KEY = "`synapse key create NAME` makes a key"
PROXY_HEADERS = ("forwarded", "x-forwarded-", "x-real-ip", "via")
"""What the names of headers begin with that a proxy adds (RFC 7239, RFC 9110 section 7.6.3, and common use)."""
ALL: tuple[KeyPermission, ...] = ("chat", "read", "manage")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: the name of a key, or None for this machine while no key exists."""

    key: str | None
    permissions: frozenset[KeyPermission]

    def require(self, needs: Needs) -> None:
        """Refuse a caller who lacks a permission; `any` is any of them.

        Raises:
            LacksPermission: says what is held and what is needed.
        """
        if not (needs == "any" and self.permissions):
            require(self.permissions, needs, self.key)


async def authorize(request: Request, keys: Keys, needs: Needs) -> Caller:
    """Who sent this request, if they may do what needs this permission.

    Raises:
        BadKey: keys exist and the request carries none, or a wrong or revoked one.
        NotLocal: no keys exist and the request does not come from this machine, or by way of a proxy or of another
            site's web page.
        LacksPermission: the key does not hold the permission.
    """
    if not await keys.any():
        check_local(request)
        return Caller(None, frozenset(ALL))
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not secret.strip():
        raise BadKey("no API key was sent", hint=f"send the header Authorization: Bearer KEY; {MAKE_A_KEY}")
    key = await keys.find(secret.strip())
    if key is None:
        raise BadKey("the API key is unknown or was revoked", hint=MAKE_A_KEY)
    caller = Caller(key.name, frozenset(key.permissions))
    caller.require(needs)
    await keys.note_use(key)
    return caller


def check_local(request: Request) -> None:
    """Check that a request comes from this machine, and not by way of a proxy or of a web page of another site.

    A page can make a browser on this machine send requests here. Its `Origin` gives it away, and when it had its own
    name point to this machine (DNS rebinding) the `Host` does.

    Raises:
        NotLocal: it does not.
    """
    hint = f"{MAKE_A_KEY}; with a key, requests may come from anywhere"
    if request.client is not None and not is_loopback(request.client.host):
        raise NotLocal("without an API key only this machine may ask", hint=hint)
    hosts = request.headers.getlist("host")
    if len(hosts) != 1 or not is_loopback(host_of(f"//{hosts[0]}")):
        raise NotLocal("without an API key the Host must be a loopback name, such as localhost", hint=hint)
    if any(name.startswith(PROXY_HEADERS) for name in request.headers):
        raise NotLocal("without an API key no request may come by way of a proxy, which hides who asks", hint=hint)
    if any(not is_loopback(host_of(origin)) for origin in request.headers.getlist("origin")):
        raise NotLocal("without an API key web pages of other sites may not ask", hint=hint)


def host_of(url: str) -> str:
    """The host of a URL, without port and brackets; empty when there is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Whether a name or an address always means this machine."""
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
