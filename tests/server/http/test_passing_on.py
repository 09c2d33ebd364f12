"""What goes along with a request that another web server answers."""

from __future__ import annotations

import asyncio

import pytest

from tokasaurus.server.errors import ClientGone
from tokasaurus.server.http.access import CLIENT, MAY_END_ALL, may_end
from tokasaurus.server.http.passing_on import KnownClients, PassOn, _head


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


@pytest.mark.parametrize("has_begun", [True, False])
def test_a_client_that_leaves_ends_the_answer_and_is_no_error_of_the_server(tmp_path, has_begun):
    """A viewer of the page always leaves in the midst of an answer."""

    async def run():
        leaves, ended = asyncio.Event(), asyncio.Event()
        sent = []

        async def serve(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            if has_begun:
                writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n")
            else:
                leaves.set()
            assert await reader.read() == b""
            ended.set()
            writer.close()

        async def receive():
            await leaves.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)
            if message.get("body"):
                leaves.set()

        scope = {"type": "http", "method": "GET", "path": "/x", "query_string": b"", "headers": []}
        path = tmp_path / "socket"
        async with await asyncio.start_unix_server(serve, path):
            passing = PassOn(path)(scope, receive, send)
            if has_begun:
                await passing
                assert [each.get("body") for each in sent] == [None, b"hi"]
            else:
                with pytest.raises(ClientGone):
                    await passing
                assert sent == []
            await ended.wait()

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_server_that_ends_in_the_midst_of_an_answer_is_an_error(tmp_path):
    async def run():
        async def serve(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhi")
            writer.close()

        async def receive():
            return await asyncio.Future()

        async def send(message):
            pass

        scope = {"type": "http", "method": "GET", "path": "/x", "query_string": b"", "headers": []}
        path = tmp_path / "socket"
        async with await asyncio.start_unix_server(serve, path):
            with pytest.raises(ConnectionError, match="too soon"):
                await PassOn(path)(scope, receive, send)

    asyncio.run(asyncio.wait_for(run(), 30))
