"""``/v1/cartridges`` on a store with files, in front of a fake engine."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_engine import RunningServer, wait_for, with_config
from safetensors.torch import save

from tokasaurus.cartridges.store import CartridgeStore
from tokasaurus.launch.cartridge_store import cartridges_of
from tokasaurus.launch.cartridges.main import main
from tokasaurus.protocol.messages import CartridgeState, Statistics

SHAPE = {"num_layers": 2, "num_kv_heads": 1, "head_dim": 8}


def cartridge_file(num_tokens: int, seed: int = 0) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    return save(
        {
            f"{kind}.{layer}": torch.randn(num_tokens, 1, 8, generator=generator)
            for kind in ("keys", "values")
            for layer in range(2)
        }
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    base = with_config()
    config = replace(
        base,
        cartridge_shape=replace(base.cartridge_shape, **SHAPE),
        cartridges=replace(
            base.cartridges,
            directory=str(tmp_path_factory.mktemp("store")),
            roots=(str(tmp_path_factory.mktemp("files")),),
        ),
    )
    running = RunningServer(config, ready=False)
    store = CartridgeStore(config.cartridges)
    running.cartridges = cartridges_of(config, running.generations, store)
    running.state.ready(running.preparer, running.generations, running.cartridges, store)
    with running.running() as server:
        yield server


def root(server: RunningServer) -> Path:
    return Path(server.generations.config.cartridges.roots[0])


def upload(server: RunningServer, data: bytes, filename: str = "a.safetensors", **fields: str):
    boundary = uuid.uuid4().hex
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in fields.items()
    ]
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{filename}"'
        "\r\n\r\n"
    )
    body = "".join(parts).encode() + head.encode() + data + f"\r\n--{boundary}--\r\n".encode()
    kind = f"multipart/form-data; boundary={boundary}"
    return server._ask("POST", "/v1/cartridges", body, {"Content-Type": kind})


def complete(server: RunningServer, cartridge_id: str, **more: object):
    named = {"id": cartridge_id, "source": "local"}
    return server.post("/v1/completions", {"prompt": "a", "cartridges": [named], **more})


def listed(server: RunningServer) -> dict[str, dict]:
    return {each["id"]: each for each in server.get("/v1/cartridges").json["data"]}


def test_an_upload_is_listed_used_and_deleted(server):
    answer = upload(server, cartridge_file(21), name="notes")
    assert answer.status == 200, answer.content
    entry = answer.json
    (version,) = entry["versions"]
    assert (entry["id"], entry["source"], entry["uploaded"]) == ("notes", "local", True)
    assert (entry["tokens"], entry["users"], version["dtype"]) == (21, 0, "F32")
    assert version["bytes"] == 2 * 2 * 21 * 8 * 4
    assert version["residence"] == {"device": 0, "device_pages": 0, "host": False, "disk": True}
    assert listed(server)["notes"] == entry
    assert (
        complete(server, "notes").json["usage"]["prompt_tokens_details"]["cartridge_tokens"] == 21
    )
    wait_for(lambda: listed(server)["notes"]["versions"][0]["residence"]["host"])
    assert server.get("/v1/cartridges/notes").json == listed(server)["notes"]
    answer = server._ask("DELETE", "/v1/cartridges/notes", None, {})
    assert answer.json == {"id": "notes", "object": "cartridge", "deleted": True}
    assert "notes" not in listed(server)
    refused = complete(server, "notes")
    assert (refused.status, refused.error["param"]) == (400, "cartridges")
    assert server.get("/v1/cartridges/notes").status == 404
    assert server._ask("DELETE", "/v1/cartridges/notes", None, {}).status == 404


def test_a_file_of_the_machine_is_listed_once_a_request_has_used_it(server):
    path = root(server) / "local.safetensors"
    path.write_bytes(cartridge_file(5, seed=1))
    assert complete(server, str(path)).status == 200
    entry = listed(server)[str(path)]
    assert (entry["tokens"], entry["uploaded"]) == (5, False)
    quoted = str(path).replace("/", "%2F")
    for name in (quoted, str(path)):
        assert server.get(f"/v1/cartridges/{name}?source=local").json == entry
    assert server.get(f"/v1/cartridges/{quoted}?source=s3").status == 404
    assert server._ask("DELETE", f"/v1/cartridges/{quoted}", None, {}).status == 200
    assert path.exists()
    assert complete(server, str(path)).status == 200


def test_one_that_requests_use_is_deleted_only_by_force(server):
    upload(server, cartridge_file(21, seed=2), name="used")
    server.engine.reset()
    server.engine.paused = True
    answers: list = []
    asking = threading.Thread(target=lambda: answers.append(complete(server, "used")))
    asking.start()
    wait_for(lambda: listed(server)["used"]["users"] == 1)
    refused = server._ask("DELETE", "/v1/cartridges/used", None, {})
    assert (refused.status, refused.error["param"]) == (409, "id")
    assert "force=true" in refused.error["message"]
    forced = server._ask("DELETE", "/v1/cartridges/used?force=true", None, {})
    assert forced.status == 200
    assert complete(server, "used").status == 400
    server.engine.paused = False
    asking.join()
    assert answers[0].status == 200


def test_a_new_version_is_listed_beside_the_one_in_use(server):
    upload(server, cartridge_file(21, seed=3), name="changing")
    server.engine.paused = True
    asking = threading.Thread(target=lambda: complete(server, "changing"))
    asking.start()
    wait_for(lambda: listed(server)["changing"]["users"] == 1)
    upload(server, cartridge_file(30, seed=4), name="changing")
    entry = listed(server)["changing"]
    assert entry["tokens"] == 30
    found = [(each["tokens"], each["users"], each["current"]) for each in entry["versions"]]
    assert found == [(30, 0, True), (21, 1, False)]
    server.engine.paused = False
    asking.join()
    assert complete(server, "changing").status == 200
    wait_for(lambda: len(listed(server)["changing"]["versions"]) == 1)


def test_where_a_version_is_on_the_device_is_what_the_managers_say(server):
    upload(server, cartridge_file(21, seed=5), name="there")
    assert complete(server, "there").status == 200
    digest = listed(server)["there"]["digest"]
    (name,) = server.cartridges.uses()[digest].prefixes
    state = CartridgeState(name, 21, 2, 4, 0, 7, 5, 2, 1, 3.5)
    server.call(lambda: server.generations.absorb(make_statistics(state)))
    (version,) = listed(server)["there"]["versions"]
    assert version["residence"]["device"] == 2
    assert version["residence"]["device_pages"] == 4
    counts = [version[name] for name in ("requests", "hits", "loads", "evictions", "idle_s")]
    assert counts == [7, 5, 2, 1, 3.5]
    metrics = server.get("/metrics").content.decode()
    assert "tokasaurus_cartridge_hits_total 50.0" in metrics
    assert "tokasaurus_cartridge_pages 6.0" in metrics
    lines = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if line[0] != "#")
    assert float(lines["tokasaurus_cartridge_disk_bytes"]) > 2688
    assert float(lines["tokasaurus_cartridge_host_bytes"]) > 2688


def make_statistics(state: CartridgeState):
    zeros = dict.fromkeys(Statistics.__struct_fields__[: -len(Statistics.__struct_defaults__)], 0)
    return Statistics(**zeros, num_cartridge_hits=50, num_cartridge_pages=6, cartridges=(state,))


def test_wrong_uploads_are_refused_by_field(server):
    good = cartridge_file(3)
    for data, fields, filename, param in (
        (b"no cartridge", {"name": "a"}, "a.pt", "file"),
        (good[:-10], {"name": "a"}, "a.safetensors", "file"),
        (good, {"name": "../a"}, "a.safetensors", "name"),
        (good, {"name": "a b"}, "a.safetensors", "name"),
        (good, {}, "a b.safetensors", "name"),
        (good, {"colour": "red"}, "a.safetensors", "colour"),
    ):
        answer = upload(server, data, filename, **fields)
        assert (answer.status, answer.error["param"]) == (400, param), answer.content
    assert "a" not in listed(server)
    answer = server.post("/v1/cartridges", {"name": "a"})
    assert answer.status == 415
    assert upload(server, good, "dir/by-filename.pt").json["id"] == "by-filename.pt"


def test_wrong_queries_are_refused(server):
    for path in (
        "/v1/cartridges?limit=3",
        "/v1/cartridges/a?source=ftp",
        "/v1/cartridges/a?force=true",
    ):
        assert server.get(path).status == 400, path
    answer = server._ask("DELETE", "/v1/cartridges/a?force=perhaps", None, {})
    assert (answer.status, answer.error["param"]) == (400, "force")
    assert json.loads(server.get("/v1/cartridges").content)["object"] == "list"


# --- toka-cartridge -------------------------------------------------------------------------------


def command(server: RunningServer, *words: str) -> int:
    return main([*words, f"port={server.port}"])


def test_commands_upload_list_and_delete(server, tmp_path, capsys):
    path = tmp_path / "manual.safetensors"
    path.write_bytes(cartridge_file(9, seed=6))
    assert command(server, "upload", str(path)) == 0
    digest = listed(server)["manual"]["digest"]
    said = capsys.readouterr().out
    assert said == f"the engine has manual: 9 tokens, 1.2 KB, digest {digest}\n"
    assert command(server, "upload", f"file={path}", "name=again") == 0
    capsys.readouterr()
    assert command(server, "list") == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["id", "source", "version", "tokens", "MB", "users", "where"]
    row = next(row.split() for row in rows if row.startswith("manual "))
    assert row == ["manual", "local", digest[:12], "9", "0.0", "0", "disk"]
    assert command(server, "list", "json=T") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == server.get("/v1/cartridges").json
    for name in ("manual", "again"):
        assert command(server, "delete", name) == 0
        assert capsys.readouterr().out == f"{name} is deleted\n"
        assert name not in listed(server)


def test_commands_say_what_is_wrong(server, tmp_path, capsys):
    wrong = tmp_path / "wrong.pt"
    wrong.write_bytes(b"no cartridge")
    for words, status, said in (
        (("upload", str(wrong)), 1, "no"),
        (("upload", str(tmp_path / "missing.pt")), 2, "No such file"),
        (("upload", str(wrong), "name=a b"), 1, "name"),
        (("delete", "nothing"), 1, "nothing"),
        (("delete", "/tmp/a b?c#d", "source=s3", "force=T"), 1, "a b?c#d"),
    ):
        assert command(server, *words) == status, words
        error = capsys.readouterr().err
        assert error.startswith(f"toka-cartridge {words[0]}: error: "), error
        assert said in error
    assert main(["list", "port=1"]) == 1
    assert "port" in capsys.readouterr().err
