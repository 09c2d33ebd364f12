"""Load for tests of servers, on plain sockets: ten thousand connections cost the client little."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import json
import resource
import socket
import subprocess
import sys
from pathlib import Path


def resident_bytes() -> int:
    """Memory of this process after a collection, without what the allocator keeps in reserve."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


class Load:
    """Requests that a test begins now and finishes later, with a connection each.

    Args:
        port: of the server.
        headers: additional ones, each with its line end.
    """

    def __init__(self, port: int, headers: str = "") -> None:
        self._port = port
        self._headers = headers
        self._open: list[socket.socket] = []
        self._read: dict[socket.socket, bytes] = {}

    def begin(self, path: str, body: object) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self._port), timeout=60)
        connection.sendall(_request(path, body, self._headers + "Connection: close\r\n"))
        self._open.append(connection)
        self._read[connection] = b""
        return connection

    def read_until(self, connection: socket.socket, mark: bytes) -> None:
        while mark not in self._read[connection]:
            data = connection.recv(1 << 16)
            assert data, self._read[connection]
            self._read[connection] += data

    def finish(self, connection: socket.socket) -> tuple[int, bytes]:
        """Read the answer to its end: (status, content)."""
        while data := connection.recv(1 << 16):
            self._read[connection] += data
        connection.close()
        head, _, content = self._read.pop(connection).partition(b"\r\n\r\n")
        if b"transfer-encoding: chunked" in head.lower():
            content = _unchunked(content)
        return int(head.split()[1]), content

    def close(self) -> None:
        """Close every connection."""
        for connection in self._open:
            connection.close()


def crowd(port: int, num_connections: int, num_requests: int) -> list[int]:
    """Send numbered requests over ``num_connections`` connections, all open at once and kept alive.

    The client runs in a process of its own, which has its own limit of open files.

    Returns:
        How often each number was answered with its own answer.
    """
    _allow_files(num_connections + 200)  # this process has the other ends of the connections
    command = [sys.executable, __file__, str(port), str(num_connections), str(num_requests)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


async def _crowd(port: int, num_connections: int, num_requests: int) -> list[int]:
    _allow_files(num_connections + 200)
    answered = [0] * num_requests
    numbers = iter(range(num_requests))
    num_missing, connected = num_connections, asyncio.Event()
    gate = asyncio.Semaphore(100)  # the kernel's queue of new connections is short

    async def work() -> None:
        nonlocal num_missing
        async with gate:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        num_missing -= 1
        if not num_missing:
            connected.set()
        await connected.wait()
        for number in numbers:
            await _ask(reader, writer, number)
            answered[number] += 1
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    await asyncio.gather(*(work() for _ in range(num_connections)))
    return answered


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
    num_tokens = 1 + number % 7
    body = {"prompt": [20 + number % 200], "seed": number, "max_tokens": num_tokens}
    body |= {"ignore_eos": True, "stream": number % 2 == 0, "model": str(number)}
    body |= {"stream_options": {"include_usage": True}} if body["stream"] else {}
    writer.write(_request("/v1/completions", body, ""))
    status, content = await _read_answer(reader)
    assert status == 200, content
    *_, last = (
        line.removeprefix(b"data: ")
        for line in content.split(b"\n\n")
        if line not in (b"", b"data: [DONE]")
    )
    answer = json.loads(last)
    assert answer["model"] == str(number)
    assert answer["usage"]["completion_tokens"] == num_tokens


def _allow_files(number: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < number:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(number, hard), hard))


def _request(path: str, body: object, headers: str) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{headers}"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


async def _read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    status = int(head.split()[1])
    for line in head.split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return status, await reader.readexactly(int(line.split(b":")[1]))
    content = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        content += (await reader.readexactly(size + 2))[:-2]
    await reader.readexactly(2)
    return status, content


def _unchunked(data: bytes) -> bytes:
    content = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        length = int(size, 16)
        content += data[:length]
        data = data[length + 2 :]
    return content


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_crowd(*map(int, sys.argv[1:])))))
