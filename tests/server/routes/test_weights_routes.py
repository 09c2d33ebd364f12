"""New weights over HTTP, in buckets, on the fake engine."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import http.client
import json
import socket
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fake_engine import PATIENCE_S, RunningServer, wait_for, with_config
from rows import each_row
from safetensors.numpy import save

from tokasaurus.protocol.commands import Command, UpdateWeights
from tokasaurus.server.control import weights_updates
from tokasaurus.server.control.weights_updates import WeightsUpdates

UPDATES = "/v1/weights/updates"


@pytest.fixture
def home(tmp_path):
    return tmp_path


@pytest.fixture
def server(home):
    with RunningServer(directory=home).running() as server:
        yield server


def bucket(number=0, size=1000):
    return save({f"tensor.{number}": np.full(size, number, np.float32)})


def begin(server, **body):
    answer = server.post(UPDATES, body)
    assert answer.status == 200, answer.content
    return answer.json["id"]


def put(server, update, number, data, checksum=None, **headers):
    sha256 = hashlib.sha256(data).hexdigest() if checksum is None else checksum
    headers = {"X-Checksum-SHA256": sha256, **headers}
    return server._ask("PUT", f"{UPDATES}/{update}/buckets/{number}", data, headers)


def commit(server, update, number):
    return server.post(f"{UPDATES}/{update}/commit", {"num_buckets": number})


def delete(server, update):
    return server._ask("DELETE", f"{UPDATES}/{update}", None, {})


def updates_of(server):
    sent = [each.action for each in server.engine.received if isinstance(each, Command)]
    return [each for each in sent if isinstance(each, UpdateWeights)]


def files_below(directory):
    """All files that the server keeps of weights."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


def test_an_update_from_its_beginning_to_its_end(server, home):
    answer = server.post(UPDATES, {"weight_version": "step-7"})
    update = answer.json["id"]
    assert answer.json | {"id": "", "created_at": 0, "expires_at": 0} == {
        "id": "",
        "object": "weights.update",
        "status": "open",
        "created_at": 0,
        "expires_at": 0,
        "weight_version": "step-7",
        "weights_version": None,
        "error": None,
        "buckets": [],
    }
    assert answer.json["expires_at"] - answer.json["created_at"] == 3600
    data = [bucket(number) for number in range(3)]
    digests = [hashlib.sha256(each).hexdigest() for each in data]
    for number in (2, 0, 1):
        stored = put(server, update, number, data[number]).json
        size = len(data[number])
        assert stored == {"index": number, "bytes": size, "sha256": digests[number]}
    told = server.get(f"{UPDATES}/{update}").json
    assert [each["sha256"] for each in told["buckets"]] == digests
    for path in files_below(home):
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(path.parent.parent.stat().st_mode) == 0o700
    done = commit(server, update, 3).json
    assert (done["status"], done["weights_version"]) == ("committed", 1)
    (action,) = updates_of(server)
    assert (action.version, action.checksums) == (1, tuple(digests))
    assert [Path(each).read_bytes() for each in action.files] == data
    assert server.get("/weight_info").json == {"weight_version": "step-7", "weights_version": 1}
    assert server.get(f"{UPDATES}/{update}").json == done


def test_a_bucket_with_a_wrong_checksum_is_refused_and_changes_nothing(server, home):
    update = begin(server)
    data = bucket()
    assert put(server, update, 0, data).status == 200
    before = files_below(home)
    for wrong in ("0" * 64, hashlib.sha256(b"").hexdigest(), "", "x" * 64, "0" * 63):
        answer = put(server, update, 0, bucket(7), wrong)
        assert (answer.status, answer.error["param"]) == (400, "X-Checksum-SHA256"), wrong
    answer = server._ask("PUT", f"{UPDATES}/{update}/buckets/1", data, {})
    assert (answer.status, answer.error["param"]) == (400, "X-Checksum-SHA256")
    assert files_below(home) == before
    assert before[0].read_bytes() == data
    assert len(server.get(f"{UPDATES}/{update}").json["buckets"]) == 1


@each_row("data", [b"", b"12345678", b"\xff" * 64, bytes(8) + b"{", b"\x02" + bytes(7) + b"[]"])
def test_a_bucket_that_is_no_safetensors_file_is_refused(data, home):
    with RunningServer(directory=home).running() as server:
        update = begin(server)
        assert put(server, update, 0, data).status == 400
        assert not files_below(home)


def test_a_bucket_may_come_again_and_may_be_replaced(server, home):
    update = begin(server)
    first, second = bucket(1), bucket(2, 5000)
    answers = [put(server, update, 0, each) for each in (first, first, second)]
    assert answers[0].json == answers[1].json
    assert [each.read_bytes() for each in files_below(home)] == [second]
    assert put(server, update, 0, first, hashlib.sha256(first).hexdigest().upper()).status == 200
    assert commit(server, update, 1).status == 200
    assert Path(updates_of(server)[0].files[0]).read_bytes() == first


@each_row("number", ["-1", "x", "10000", "1.0", "%31%00", "٣"])
def test_the_number_of_a_bucket_is_a_number(number):
    with RunningServer().running() as server:
        update = begin(server)
        path = number if number.isascii() else "%D9%A3"
        assert put(server, update, path, bucket()).status == 400


def test_large_buckets_are_streamed_and_limited(home):
    config = with_config(max_body_bytes=9 << 20)
    with RunningServer(config, directory=home).running() as server:
        update = begin(server)
        data = bucket(1, 2 << 20)  # 8 MiB
        assert put(server, update, 0, data).json["bytes"] == len(data)
        assert files_below(home)[0].read_bytes() == data
        assert put(server, update, 1, bucket(1, 3 << 20)).status == 413
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)
        headers = {"X-Checksum-SHA256": hashlib.sha256(data).hexdigest()}
        path = f"{UPDATES}/{update}/buckets/2"
        pieces = [data[:100], data[100:]]
        connection.request("PUT", path, iter(pieces), headers, encode_chunked=True)
        assert connection.getresponse().status == 200
        connection.close()
        connection.request("PUT", path, iter([data, data]), headers, encode_chunked=True)
        assert connection.getresponse().status == 413
        connection.close()
        assert len(files_below(home)) == 2


def test_a_compressed_bucket_is_refused(server):
    answer = put(server, begin(server), 0, bucket(), **{"Content-Encoding": "gzip"})
    assert answer.status == 415


def test_a_commit_needs_all_buckets_and_no_others(server):
    update = begin(server)
    for number in (0, 2):
        put(server, update, number, bucket(number))
    for count, said in ((1, "there are more"), (2, "bucket 1"), (3, "bucket 1"), (9, "bucket 1")):
        answer = commit(server, update, count)
        assert answer.status == 409
        assert said in answer.error["message"]
    for wrong in (0, -1, 10_001, "2", 2.0, None):
        answer = commit(server, update, wrong)
        assert (answer.status, answer.error["param"]) == (400, "num_buckets")
    assert not updates_of(server)
    put(server, update, 1, bucket(1))
    assert commit(server, update, 3).status == 200


def test_there_is_one_unfinished_update_at_a_time(server, home):
    first = begin(server)
    answer = server.post(UPDATES, {})
    assert answer.status == 409
    assert first in answer.error["message"]
    put(server, first, 0, bucket())
    assert delete(server, first).json == {"id": first, "object": "weights.update", "deleted": True}
    assert not files_below(home)
    second = begin(server)
    for answer in (
        put(server, first, 0, bucket()),
        commit(server, first, 1),
        delete(server, first),
        server.get(f"{UPDATES}/{first}"),
    ):
        assert answer.status == 404
    put(server, second, 0, bucket())
    assert commit(server, second, 1).status == 200
    for answer in (
        put(server, second, 0, bucket()),
        commit(server, second, 1),
        delete(server, second),
    ):
        assert answer.status == 409
    begin(server)


def test_a_refusal_names_buckets_and_not_their_files(server, home):
    update = begin(server)
    put(server, update, 0, bucket())
    (path,) = files_below(home)
    server.engine.refuse[UpdateWeights] = (f"{path}: tensor x is int8", "files")
    answer = commit(server, update, 1)
    assert (answer.status, answer.error["param"]) == (400, None)
    assert answer.error["message"] == "bucket 0: tensor x is int8"
    assert server.get(f"{UPDATES}/{update}").json["error"] == "bucket 0: tensor x is int8"


def test_a_refused_update_is_open_again(server):
    update = begin(server, weight_version="new")
    put(server, update, 0, bucket())
    server.engine.refuse[UpdateWeights] = ("tensor x is missing", "files")
    answer = commit(server, update, 1)
    assert (answer.status, answer.error["message"]) == (400, "tensor x is missing")
    told = server.get(f"{UPDATES}/{update}").json
    assert (told["status"], told["error"]) == ("open", "tensor x is missing")
    assert server.get("/weight_info").json["weights_version"] == 0
    server.engine.refuse.clear()
    put(server, update, 1, bucket(1))
    assert commit(server, update, 2).json["weights_version"] == 1
    assert server.get("/weight_info").json["weight_version"] == "new"


def test_files_stay_until_other_weights_replace_them(server, home, tmp_path_factory):
    first = begin(server)
    put(server, first, 0, bucket(1))
    commit(server, first, 1)
    assert len(files_below(home)) == 1
    second = begin(server)
    put(server, second, 0, bucket(2))
    assert len(files_below(home)) == 2
    commit(server, second, 1)
    assert [each.read_bytes() for each in files_below(home)] == [bucket(2)]
    assert server.get(f"{UPDATES}/{first}").status == 404
    model_path = str(tmp_path_factory.mktemp("model"))
    Path(model_path, "a.safetensors").write_bytes(b"")
    assert server.post("/update_weights_from_disk", {"model_path": model_path}).status == 200
    assert not files_below(home)


def test_an_update_is_dropped_an_hour_after_its_last_bucket(server, home):
    update = begin(server)
    server.advance(3000)
    put(server, update, 0, bucket())
    server.advance(3000)
    assert server.get(f"{UPDATES}/{update}").status == 200
    server.advance(700)
    assert server.get(f"{UPDATES}/{update}").status == 404
    assert not files_below(home)
    begin(server)


def test_a_commit_whose_time_is_up_goes_on(server):
    update = begin(server)
    put(server, update, 0, bucket())
    server.engine.answers_commands = False
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(commit, server, update, 1)
        wait_for(lambda: updates_of(server))
        for busy in (put(server, update, 0, bucket()), delete(server, update)):
            assert busy.status == 409
        assert server.post(UPDATES, {}).status == 409
        server.advance(601)
        assert answer.result().status == 504
    assert server.get(f"{UPDATES}/{update}").json["status"] == "committing"
    server.advance(4000)  # it does not expire
    server.engine.answers_commands = True
    (message,) = [each for each in server.engine.received if isinstance(each, Command)]
    server.engine._carry_out(message.command_id, message.action)
    wait_for(lambda: server.get(f"{UPDATES}/{update}").json["status"] == "committed")


def test_a_bucket_that_breaks_off_leaves_nothing(server, home):
    update = begin(server)
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as connection:
        head = f"PUT {UPDATES}/{update}/buckets/0 HTTP/1.1\r\nHost: localhost\r\n"
        head += "Content-Length: 1000\r\n"
        connection.sendall(f"{head}X-Checksum-SHA256: {'0' * 64}\r\n\r\nxxx".encode())
        wait_for(lambda: files_below(home))
    wait_for(lambda: not files_below(home))
    assert server.get(f"{UPDATES}/{update}").json["buckets"] == []


def test_a_bucket_that_comes_while_its_update_is_deleted_is_dropped(server, home):
    update, data = begin(server), bucket(1, 1 << 17)
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as connection:
        head = f"PUT {UPDATES}/{update}/buckets/0 HTTP/1.1\r\nHost: localhost\r\n"
        head += f"Content-Length: {len(data)}\r\n"
        head += f"X-Checksum-SHA256: {hashlib.sha256(data).hexdigest()}\r\n\r\n"
        connection.sendall(head.encode() + data[:100])
        wait_for(lambda: files_below(home))
        assert delete(server, update).status == 200
        connection.sendall(data[100:])
        assert connection.recv(100).startswith(b"HTTP/1.1 404 ")
    assert not files_below(home)


def test_a_full_disk_is_a_507(server, monkeypatch, home):
    update = begin(server)

    async def full(file, pieces):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights_updates, "_write", full)
    answer = put(server, update, 0, bucket())
    assert (answer.status, answer.error["code"]) == (507, "storage_full")
    assert not files_below(home)


def test_files_go_with_the_server(home):
    async def begin_one():
        updates = WeightsUpdates(home)
        updates.begin(None)
        assert list(home.iterdir())

    asyncio.run(begin_one())
    gc.collect()
    assert not list(home.iterdir())


def test_bodies_are_json_objects(server):
    for body in ([], "x", {"weight_version": 7}, {"weight_versions": "x"}):
        assert server.post(UPDATES, body).status == 400
    answer = server._ask("POST", UPDATES, json.dumps({}).encode(), {"Content-Type": "text/plain"})
    assert answer.status == 415
    assert server._ask("POST", UPDATES, b"", {}).status == 200


def test_a_begin_that_comes_again_finds_its_update(server):
    def begun(**headers):
        headers["Content-Type"] = "application/json"
        return server._ask("POST", UPDATES, b"{}", headers)

    again = {"X-Request-Id": "begin-7"}
    first = begun(**again)
    assert (first.status, begun(**again).json["id"]) == (200, first.json["id"])
    assert begun(**{"X-Request-Id": "begin-8"}).status == 409
    assert begun().status == 409


def test_a_begin_may_replace_an_update_that_is_open(server, home):
    first = begin(server)
    assert put(server, first, 0, bucket()).status == 200
    second = begin(server, replace=True)
    assert second != first
    assert put(server, first, 1, bucket()).status == 404
    assert files_below(home) == []
    assert server.post(UPDATES, {"replace": False}).status == 409
