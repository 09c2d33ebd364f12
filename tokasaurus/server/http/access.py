"""Checks keys and body sizes before anything is read or parsed.

It knows keys by their digests only, and nothing of what requests are about. It is a plain ASGI
layer, which looks at the headers once, and counts a body's bytes only if they are not declared.

Requests that control the engine need an admin key. An engine without admin keys obeys whatever
reaches it over a loopback address, except web pages: a browser lets any page send a request there,
and names the page in ``Origin``.

An engine on a loopback address without keys also checks ``Host``. Otherwise a page could give its
own name the address 127.0.0.1 (DNS rebinding): to the browser, the engine is then of its origin.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import socket
from collections.abc import Callable, Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokasaurus.config.slices import ServerConfig
from tokasaurus.errors import RequestError
from tokasaurus.server.errors import BodyTooLarge, Forbidden, Unauthorized
from tokasaurus.server.http.answers import error_answer
from tokasaurus.server.http.hosts import Hosts

__all__ = ["CLIENT", "OPEN_PATHS", "Access", "share_of"]

OPEN_PATHS = frozenset({"/ping", "/health"})
"""Paths that need no key: they are for load balancers, and only say whether the engine serves."""

CLIENT = "tokasaurus.client"
"""Where a scope names the client: a text for each key or, if no key is needed, for each address."""

_KEY = "key "
_BEARER = b"bearer "


def share_of(scope: Scope, user: str | None) -> str:
    """The client whose share of the engine a request takes.

    That is its key; without keys, the user that it names; without a user, its address. With keys,
    the user does not count, since a client could name another one each time.
    """
    client: str = scope.get(CLIENT, "")
    return client if user is None or client.startswith(_KEY) else f"user {user}"


class Access:
    """Refuses requests without a key, and bodies that are too large.

    Args:
        app: the layer inside.
        config: the server's slice.
        is_control: whether a path is for the control of the engine.
    """

    def __init__(
        self, app: ASGIApp, config: ServerConfig, is_control: Callable[[str], bool]
    ) -> None:
        self._app = app
        self._is_control = is_control
        self._digests: Sequence[bytes] = [bytes.fromhex(each) for each in config.api_key_digests]
        admin_digests = [bytes.fromhex(each) for each in config.admin_key_digests]
        self._admin_digests: Sequence[bytes] = admin_digests
        self._all_digests = [*self._digests, *admin_digests]
        self._origins = config.cors_origins
        self._is_local = _is_loopback(config.host)
        self._hosts: Hosts | None = None
        if config.allowed_hosts or (self._is_local and not self._digests):
            self._hosts = Hosts(config.host, config.allowed_hosts)
        self._max_body_bytes = config.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        authorization, origin, num_bytes, is_chunked = b"", "", 0, False
        hosts = []
        for name, value in scope["headers"]:
            if name == b"authorization":
                authorization = value
            elif name == b"host":
                hosts.append(value)
            elif name == b"origin":
                origin = value.decode("latin-1")
            elif name == b"content-length":
                num_bytes = int(value)
            elif name == b"transfer-encoding":
                is_chunked = True
        try:
            self._check_host(scope, hosts)
            if self._is_control(scope["path"]):
                scope[CLIENT] = self._admin(scope, authorization, origin)
            else:
                scope[CLIENT] = self._client(scope, authorization)
            if num_bytes > self._max_body_bytes:
                raise self._too_large()
        except RequestError as error:
            await error_answer(error)(scope, receive, send)
            return
        if is_chunked:
            receive = self._counted(receive)
        await self._app(scope, receive, send)

    def _check_host(self, scope: Scope, hosts: Sequence[bytes]) -> None:
        """Raises RequestError if Host is missing, sent twice, or another machine's."""
        if len(hosts) != 1 and (hosts or scope["http_version"] == "1.1"):
            sent = f"{len(hosts)} were sent" if hosts else "it is missing"
            raise RequestError(f"a request must have one Host header, and {sent}")
        if hosts and self._hosts is not None:
            self._hosts.check(hosts[0].decode("latin-1"))

    def _client(self, scope: Scope, authorization: bytes) -> str:
        """The name of the client. Raises Unauthorized."""
        if not self._digests or scope["path"] in OPEN_PATHS:
            return _address(scope)
        known = _known_key(authorization, self._all_digests, "an API key")
        return f"{_KEY}{known.hex()}"

    def _admin(self, scope: Scope, authorization: bytes, origin: str) -> str:
        """The name of a client that controls the engine. Raises Unauthorized or Forbidden."""
        if self._admin_digests:
            known = _known_key(authorization, self._all_digests, "an admin key")
            if known not in self._admin_digests:
                raise Forbidden("an admin key is needed here, and this key is for requests only")
            return f"{_KEY}{known.hex()}"
        client = self._client(scope, authorization)
        if not self._is_local:
            raise Forbidden(
                "this engine has no admin key and listens to other machines, so it cannot be"
                " controlled over HTTP: start it with admin_api_key_file or"
                " TOKASAURUS_ADMIN_API_KEY, or leave host at its default"
            )
        if origin and origin not in self._origins:
            raise Forbidden(
                f"the page {origin} may not control the engine: give the engine an admin key, or"
                " name the page in cors_origins"
            )
        return client

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"the body is larger than max_body_bytes={self._max_body_bytes}")

    def _counted(self, receive: Receive) -> Receive:
        """Receives a body in chunks. Raises BodyTooLarge where the body is read."""
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise self._too_large()
            return message

        return counted


def _address(scope: Scope) -> str:
    address = scope.get("client")
    return f"address {address[0]}" if address else ""


def _known_key(authorization: bytes, digests: Sequence[bytes], kind: str) -> bytes:
    """The digest of a request's key, which is one of the digests. Raises Unauthorized."""
    if authorization[: len(_BEARER)].lower() != _BEARER:
        raise Unauthorized(f"{kind} is needed here: send Authorization: Bearer KEY")
    digest = hashlib.sha256(authorization[len(_BEARER) :].strip()).digest()
    known = None
    for each in digests:  # all of them, so that the time says nothing of which one fits
        if hmac.compare_digest(each, digest):
            known = each
    if known is None:
        raise Unauthorized("the API key is wrong")
    return known


def _is_loopback(host: str) -> bool:
    """Whether only programs on the same machine reach a server that listens on this host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass
    if not host:
        return False
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return all(ipaddress.ip_address(each[4][0]).is_loopback for each in found)
