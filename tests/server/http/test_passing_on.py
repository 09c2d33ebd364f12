"""What goes along with a request that another web server answers."""

from __future__ import annotations

import asyncio

from tokasaurus.server.http.access import CLIENT, MAY_END_ALL, may_end
from tokasaurus.server.http.passing_on import KnownClients, _head


def passed_on(scope):
    """The scope at the other end."""
    lines = _head({"method": "POST", "path": "/x", "query_string": b"", **scope}, False).split(
        b"\r\n"
    )
    headers = [tuple(line.split(b": ", 1)) for line in lines[1:] if line]
    found = {}

    async def app(scope, receive, send):
        found.update(scope)

    asyncio.run(KnownClients(app)({"type": "http", "headers": headers}, None, None))
    return found


def test_who_sent_a_request_goes_along_and_cannot_be_forged():
    forged = [(b"tokasaurus-client", b"key of another"), (b"tokasaurus-may-end-all", b"yes")]
    found = passed_on({"headers": forged, CLIENT: "key 12ab", MAY_END_ALL: False})
    assert found[CLIENT] == "key 12ab"
    assert may_end(found, "key 12ab")
    assert not may_end(found, "key of another")
    assert may_end(passed_on({"headers": [], CLIENT: "key 9", MAY_END_ALL: True}), "anyone")
