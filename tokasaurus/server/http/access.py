"""Checks keys and body sizes before anything is read or parsed.

It knows keys by their digests only, and nothing of what requests are about. It is a plain ASGI
layer, which looks at the headers once, and counts a body's bytes only if they are not declared.

Requests that control the engine need an admin key. An engine without admin keys obeys whatever
reaches it over a loopback address, except web pages.

A browser lets any page send some requests anywhere without asking first: forms, uploads, requests
without a body. It names the page in ``Origin``, and says in ``Sec-Fetch-Site`` how the page relates
to the engine. So a request that shows no key and comes from a page elsewhere changes nothing.

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
from tokasaurus.server.errors import BodyTooLarge, Forbidden, ForeignPage, Unauthorized
from tokasaurus.server.http.answers import error_answer
from tokasaurus.server.http.hosts import Hosts

__all__ = [
    "CLIENT",
    "MAY_END_ALL",
    "OPEN_PATHS",
    "Access",
    "max_priority_of",
    "may_end",
    "share_of",
]

OPEN_PATHS = frozenset({"/ping", "/health"})
"""Paths that need no key: they are for load balancers, and only say whether the engine serves."""

CLIENT = "tokasaurus.client"
"""Where a scope names the client: a text for each key or, if no key is needed, for each address."""

MAY_END_ALL = "tokasaurus.may_end_all"
"""Where a scope says whether the client may end requests of other clients."""

_MAX_PRIORITY = "tokasaurus.max_priority"
_KEY = "key "
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing, on every route."""

# Values of Sec-Fetch-Site. A page cannot set this header. A page with the same site and another
# origin, such as another port of localhost, is known by its Origin.
_OWN_SITES = frozenset({"same-origin", "none"})
_OTHER_SITES = frozenset({"cross-site"})
_BEARER = b"bearer "


def share_of(scope: Scope, user: str | None) -> str:
    """The client whose share of the engine a request takes.

    That is its key; without keys, the user that it names; without a user, its address. With keys,
    the user does not count, since a client could name another one each time.
    """
    client: str = scope.get(CLIENT, "")
    return client if user is None or client.startswith(_KEY) else f"user {user}"


def max_priority_of(scope: Scope) -> int:
    """By how much a request may outrank the default priority."""
    limit: int = scope.get(_MAX_PRIORITY, 0)
    return limit


def may_end(scope: Scope, client: str) -> bool:
    """Whether the sender of a request may end another request.

    Args:
        scope: of the sender's request.
        client: whose share the other request takes.
    """
    return bool(scope.get(MAY_END_ALL)) or scope.get(CLIENT) == client


class Access:
    """Refuses requests without a key, and bodies that are too large.

    Args:
        app: the layer inside.
        config: the server's slice.
        is_control: whether a path is for the control of the engine.
        open_paths: that need no key.
    """

    def __init__(
        self,
        app: ASGIApp,
        config: ServerConfig,
        is_control: Callable[[str], bool],
        open_paths: frozenset[str] = OPEN_PATHS,
    ) -> None:
        self._app = app
        self._open_paths = open_paths
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
        self._max_priority = config.max_request_priority
        self._priorities = {
            f"{_KEY}{digest}": limit for digest, limit in config.key_priorities.items()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        authorization, num_bytes, is_chunked = b"", 0, False
        origin: str | None = None
        site: str | None = None
        hosts = []
        for name, value in scope["headers"]:
            if name == b"authorization":
                authorization = value
            elif name == b"host":
                hosts.append(value)
            elif name == b"origin":
                origin = value.decode("latin-1")
            elif name == b"sec-fetch-site":
                site = value.decode("latin-1").strip().lower()
            elif name == b"content-length":
                num_bytes = int(value)
            elif name == b"transfer-encoding":
                is_chunked = True
        try:
            self._check_host(scope, hosts)
            is_control = self._is_control(scope["path"])
            if is_control:
                client, shown = self._admin(scope, authorization), self._admin_digests
            else:
                client, shown = self._client(scope, authorization), self._digests
            scope[CLIENT] = client
            scope[MAY_END_ALL] = self._may_end_all(client)
            scope[_MAX_PRIORITY] = self._priorities.get(client, self._max_priority)
            if not shown and (is_control or scope["method"] not in _SAFE_METHODS):
                host = hosts[0].decode("latin-1") if hosts else ""
                self._check_page(origin, site, host, is_control)
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

    def _check_page(
        self, origin: str | None, site: str | None, host: str, is_control: bool
    ) -> None:
        """Raises Forbidden or ForeignPage if a page sends this that may not.

        A page of the engine's own, such as /docs, may do all but control it.

        Args:
            origin: of the page; None if no page, or a page of the engine, sends this.
            site: how the page relates to the engine; None if the browser is too old to say.
            host: of the engine, as the client calls it.
            is_control: whether the request controls the engine.
        """
        if origin in self._origins:
            return
        if is_control:
            if origin or site in _OTHER_SITES:
                raise Forbidden(
                    f"the page {origin or 'of another site'} may not control the engine: give the"
                    " engine an admin key, or name the page in cors_origins"
                )
            return
        if "*" in self._origins:
            return
        is_own = not origin or (host and origin.lower().endswith(f"://{host.lower()}"))
        if site in _OTHER_SITES or (site not in _OWN_SITES and not is_own):
            raise ForeignPage(
                f"the page {origin or 'of another site'} may not use this engine: name its origin"
                " in cors_origins, or give the engine an API key"
            )

    def _may_end_all(self, client: str) -> bool:
        """Whether a client has an admin key, or is on the machine of an engine without keys."""
        if client.startswith(_KEY):
            return bytes.fromhex(client.removeprefix(_KEY)) in self._admin_digests
        return self._is_local and not self._digests

    def _client(self, scope: Scope, authorization: bytes) -> str:
        """The name of the client. Raises Unauthorized."""
        if not self._digests or scope["path"] in self._open_paths:
            return _address(scope)
        known = _known_key(authorization, self._all_digests, "an API key")
        return f"{_KEY}{known.hex()}"

    def _admin(self, scope: Scope, authorization: bytes) -> str:
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
