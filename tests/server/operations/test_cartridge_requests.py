"""Requests with cartridges: every way to name them, and what they change."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import threading
from collections.abc import Iterator

import pytest
from fake_engine import BOS, RunningServer, ids_of, wait_for, with_config
from known_cartridges import KnownCartridges
from rows import each_row

from tokasaurus.cartridges.specification import ModelShape
from tokasaurus.protocol.commands import Command, LoadCartridge, UnloadCartridge
from tokasaurus.protocol.messages import AbortRequest, GenerateRequest

COMPLETIONS = ("/v1/completions", "/custom/cartridge/completions", "/v1/cartridge/completions")
CHATS = (
    "/v1/chat/completions",
    "/custom/cartridge/chat/completions",
    "/v1/cartridge/chat/completions",
    "/batch/cartridge/chat/completions",
)
SYNCHRONOUS = (
    "/custom/synchronous-batch-completions",
    "/custom/cartridge/synchronous-batch-completions",
    "/batch/cartridge/chat/completions",
)
USER = {"role": "user", "content": "hello"}
NOTES = {"id": "notes", "source": "local"}


@pytest.fixture(scope="module")
def own_server() -> Iterator[RunningServer]:
    with RunningServer().running() as server:
        yield server


@pytest.fixture(scope="module")
def tagging() -> Iterator[RunningServer]:
    with RunningServer(with_config(cartridge_tags=True)).running() as server:
        yield server


@pytest.fixture
def server(own_server: RunningServer) -> Iterator[RunningServer]:
    """A server of this file, with the cartridges "notes" (21 tokens) and "more" (4)."""
    yield from prepared(own_server)


@pytest.fixture
def tags(tagging: RunningServer) -> Iterator[RunningServer]:
    """The same, which reads tags."""
    yield from prepared(tagging)


def prepared(server: RunningServer) -> Iterator[RunningServer]:
    server.engine.reset()
    fill(server.store)
    yield server
    server.engine.reset()
    server.wait_idle()
    server.settle()
    assert not any(use.num_users for use in server.cartridges.uses().values())


def fill(store: KnownCartridges) -> None:
    store.versions.clear()
    store.asked.clear()
    store.put("notes", 21)
    store.put("more", 4)


async def make_event() -> asyncio.Event:
    return asyncio.Event()


def begin(server: RunningServer, path: str, body: object) -> socket.socket:
    """Send a request on a bare socket, which the test can close at any time."""
    data = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(
        b"POST %b HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
        % (path.encode(), len(data), data)
    )
    return connection


def read_all(connection: socket.socket) -> None:
    with connection:
        while connection.recv(1 << 16):
            pass


def actions(server: RunningServer, kind: type) -> list:
    sent = (each.action for each in server.engine.received if isinstance(each, Command))
    return [action for action in sent if isinstance(action, kind)]


def prefix_of(request: GenerateRequest, server: RunningServer) -> int:
    """The tokens of the prefix that a request names; 0 for none."""
    known = {each.prefix.name: each.prefix for each in server.cartridges._known.values()}
    return known[request.cartridge].num_tokens if request.cartridge else 0


# --- where cartridges are named -------------------------------------------------------------------


def test_every_route_for_text_takes_cartridges(server):
    for path, body in (
        *((path, {"prompt": "hello"}) for path in COMPLETIONS),
        *((path, {"messages": [USER]}) for path in CHATS),
        ("/generate", {"prompt": "hello"}),
        ("/v1/responses", {"input": "hello"}),
    ):
        server.engine.received.clear()
        answer = server.post(path, {**body, "cartridges": [NOTES]})
        assert answer.status == 200, (path, answer.content)
        (request,) = server.engine.requests
        assert prefix_of(request, server) == 21, path
        usage = answer.json["usage"]
        details = usage.get("prompt_tokens_details") or usage["input_tokens_details"]
        assert details["cartridge_tokens"] == 21, path
        prompt_tokens = usage.get("prompt_tokens") or usage["input_tokens"]
        assert prompt_tokens == len(request.prompt_ids), path


def test_every_synchronous_batch_takes_cartridges(server):
    for path in SYNCHRONOUS:
        server.engine.received.clear()
        chats = [{"messages": [USER], "cartridges": [NOTES]}, {"messages": [USER]}]
        answer = server.post(path, {"requests": chats})
        assert answer.status == 200, (path, answer.content)
        details = [each["usage"]["prompt_tokens_details"] for each in answer.json]
        assert details == [{"cached_tokens": 0, "cartridge_tokens": 21}, {"cached_tokens": 0}]
        assert [prefix_of(each, server) for each in server.engine.requests] == [21, 0]


def test_a_batch_whose_later_chat_is_wrong_keeps_no_cartridge(server):
    chats = [{"messages": [USER], "cartridges": [NOTES]}, {"messages": [USER], "n": 0}]
    answer = server.post(SYNCHRONOUS[0], {"requests": chats})
    assert (answer.status, answer.error["param"]) == (400, "requests[1].n")
    assert not server.engine.requests  # and the fixture sees that nothing uses it


def test_without_cartridges_nothing_is_different(server):
    plain = server.post("/v1/completions", {"prompt": "hello", "seed": 1}).json
    for value in ([], None):
        for path in COMPLETIONS:
            body = {"prompt": "hello", "seed": 1, "cartridges": value}
            answer = server.post(path, body).json
            assert answer["choices"] == plain["choices"]
            assert answer["usage"] == plain["usage"]
    assert "cartridge_tokens" not in plain["usage"]["prompt_tokens_details"]
    assert not server.store.asked


def test_streams_and_several_prompts_share_one_prefix(server):
    body = {
        "prompt": ["one", "two"],
        "cartridges": [{"id": "more", "source": "local"}, NOTES],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    answer = server.post("/v1/completions", body)
    last = json.loads(answer.content.split(b"data: ")[-2])
    assert last["usage"]["prompt_tokens_details"]["cartridge_tokens"] == 2 * 25
    assert [prefix_of(each, server) for each in server.engine.requests] == [25, 25]
    assert len({each.cartridge for each in server.engine.requests}) == 1
    assert [each.id for each in server.store.asked] == ["more", "notes"]


def test_the_fields_of_a_cartridge_reach_its_source(server):
    server.store.put("run", 5, source="wandb")
    for fields in ({"id": "run"}, {"id": "run", "source": None, "force_redownload": None}):
        assert server.post("/v1/completions", {"prompt": "a", "cartridges": [fields]}).status == 200
        spec = server.store.asked.pop()
        assert (spec.id, spec.source, spec.force_redownload) == ("run", "wandb", False)
    forced = {**NOTES, "force_redownload": True}
    assert server.post("/v1/completions", {"prompt": "a", "cartridges": [forced]}).status == 200
    assert server.store.asked.pop().force_redownload


@each_row(
    "cartridges, said",
    [
        ("notes", "valid list"),
        (["notes"], "cartridges[0]"),
        ([{}], "cartridges[0].id"),
        ([{"id": ""}], "cartridges[0].id"),
        ([{"id": 7}], "cartridges[0].id"),
        ([{"id": "a", "source": "ftp"}], "cartridges[0].source"),
        ([{"id": "a", "force_redownload": "yes"}], "cartridges[0].force_redownload"),
        ([{"id": "a", "colour": "red"}], "cartridges[0].colour"),
        ([NOTES, NOTES], "named twice"),
        ([{"id": "nothing", "source": "local"}], "'nothing'"),
        ([{"id": "foreign", "source": "local"}], "not for this model"),
        ([{"id": "long", "source": "local"}], "512 tokens (max_num_tokens_per_request)"),
    ],
)
def test_wrong_cartridges_are_refused_by_name(server, cartridges, said):
    server.store.put("foreign", 3, shape=ModelShape(1, 2, 3))
    server.store.put("long", 511)
    for path, base in (("/v1/completions", {"prompt": "a"}), (CHATS[1], {"messages": [USER]})):
        answer = server.post(path, {**base, "cartridges": cartridges})
        assert (answer.status, answer.error["param"]) == (400, "cartridges"), answer.content
        assert said in answer.error["message"]
    assert not server.engine.requests


def test_what_clients_of_cartridges_send_and_read(server):
    """A rollout of veRL, a synchronous batch of the training package, and its chat client."""
    prompt = ids_of("hello")
    rollout = {
        "model": "default",
        "prompt": prompt,
        "max_tokens": 5,
        "temperature": 0.7,
        "top_p": 1.0,
        "logprobs_in_fingerprint": True,
        "return_token_ids": True,
        "cartridges": [{"id": "notes", "source": "local", "force_redownload": True}],
    }
    answer = server.post("/custom/cartridge/completions", rollout).json
    fingerprint = json.loads(answer["system_fingerprint"])
    assert len(fingerprint["completion_ids"][0]) == 5
    assert len(base64.b64decode(fingerprint["packed_chosen_logprobs"][0])) == 4 * 5
    assert fingerprint["packed_topk_indices"] is None
    assert answer["choices"][0]["logprobs"] is None
    assert answer["choices"][0]["prompt_token_ids"] == prompt
    assert answer["choices"][0]["token_ids"] == fingerprint["completion_ids"][0]
    chat = {
        "model": "default",
        "messages": [USER],
        "max_completion_tokens": 5,
        "temperature": 0.0,
        "apply_chat_template_overrides": {"shout": True},
        "logprobs": True,
        "top_logprobs": 3,
        "logprobs_in_fingerprint": True,
        "logprobs_ignore_temperature": True,
        "return_token_ids": True,
        "cartridges": [NOTES],
    }
    for path in SYNCHRONOUS[1:]:
        (answer,) = server.post(path, {"requests": [chat]}).json
        fingerprint = json.loads(answer["system_fingerprint"])
        assert len(base64.b64decode(fingerprint["packed_topk_indices"][0])) == 4 * 5 * 3
        assert answer["usage"]["prompt_tokens_details"]["cartridge_tokens"] == 21
        assert len(answer["prompt_token_ids"]) == answer["usage"]["prompt_tokens"]
        assert [answer["choices"][0]["token_ids"]] == fingerprint["completion_ids"]
    del chat["messages"], chat["apply_chat_template_overrides"]
    answer = server.post("/custom/cartridge/chat/completions", {**chat, "ids": prompt}).json
    assert json.loads(answer["system_fingerprint"])["input_ids"] == [prompt]


# --- what they change -----------------------------------------------------------------------------


def test_texts_behind_a_cartridge_have_no_second_bos(server):
    """A cartridge begins with it."""
    hello = ids_of("hello")
    (bos,) = ids_of(BOS)
    chat = ids_of("<|user|>hello<|end|><|assistant|>")
    for path, body, expected in (
        ("/v1/completions", {"prompt": "hello"}, hello),
        ("/v1/completions", {"prompt": "hello", "add_special_tokens": True}, [bos, *hello]),
        ("/v1/completions", {"prompt": [bos, *hello]}, [bos, *hello]),
        ("/v1/chat/completions", {"messages": [USER]}, chat),
        ("/v1/chat/completions", {"ids": [bos, *chat]}, [bos, *chat]),
        ("/generate", {"prompt": "hello"}, chat),
        ("/v1/responses", {"input": "hello"}, chat),
    ):
        server.engine.received.clear()
        assert server.post(path, {**body, "cartridges": [NOTES]}).status == 200
        (request,) = server.engine.requests
        assert request.prompt_ids.tolist() == expected, (path, body)
    server.engine.received.clear()
    assert server.post("/v1/completions", {"prompt": "hello"}).status == 200
    assert server.engine.requests[0].prompt_ids.tolist() == [bos, *hello]


def test_a_cartridge_counts_in_the_limit_of_a_request(server):
    """512 tokens, of which the cartridge takes 21."""
    prompt = [70] * 100
    base = {"prompt": prompt, "cartridges": [NOTES], "ignore_eos": True}
    fits = server.post("/v1/completions", {**base, "max_tokens": 391})
    assert fits.json["usage"]["completion_tokens"] == 391
    answer = server.post("/v1/completions", {**base, "max_tokens": 392})
    assert (answer.status, answer.error["param"]) == (400, "max_tokens")
    assert "cartridges of 21 tokens" in answer.error["message"]
    assert "at most 391" in answer.error["message"]
    answer = server.post("/v1/completions", {**base, "prompt": [70] * 491})
    assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
    chat = {"ids": prompt, "cartridges": [NOTES], "ignore_eos": True}
    assert server.post("/v1/chat/completions", chat).json["usage"]["completion_tokens"] == 391
    # Completions without a limit get 16 tokens, or what is left.
    answer = server.post("/v1/completions", {**base, "prompt": [70] * 483})
    assert answer.json["usage"]["completion_tokens"] == 8


def test_a_new_version_reaches_the_device_while_requests_finish_on_the_old_one(server):
    body = {"prompt": "a", "cartridges": [{**NOTES, "force_redownload": True}], "max_tokens": 5}
    assert server.post("/v1/completions", body).status == 200
    before = server.engine.requests[0].cartridge
    server.engine.received.clear()
    server.engine.hold_at = 1
    connection = begin(server, "/v1/completions", {**body, "stream": True})
    wait_for(lambda: server.engine.num_running == 1)
    assert server.engine.requests[0].cartridge == before
    server.store.put("notes", 30, "changed")
    server.engine.hold_at = None
    server.engine.paused = True
    second = begin(server, "/v1/completions", body)
    wait_for(lambda: len(server.engine.requests) == 2)
    after = server.engine.requests[1].cartridge
    assert after != before
    assert [each.name for each in actions(server, LoadCartridge)] == [after]
    assert before not in [each.name for each in actions(server, UnloadCartridge)]
    server.engine.paused = False
    read_all(connection)
    read_all(second)
    wait_for(lambda: before in [each.name for each in actions(server, UnloadCartridge)])


def test_a_request_whose_client_leaves_while_its_cartridge_is_looked_for_ends(server):
    gate = server.on_loop(make_event())
    server.store.gates["notes"] = gate
    try:
        connection = begin(server, "/v1/completions", {"prompt": "a", "cartridges": [NOTES]})
        wait_for(lambda: server.store.num_waiting == 1)
        # It keeps others from nothing.
        assert server.post("/v1/completions", {"prompt": "b"}).status == 200
        connection.close()
        wait_for(lambda: server.store.num_waiting == 0)
    finally:
        del server.store.gates["notes"]
        server.call(gate.set)
    server.settle()
    assert len(server.engine.requests) == 1


def test_the_time_limit_of_a_request_counts_while_its_cartridge_is_looked_for():
    config = with_config(request_timeout_s=0.05)
    with RunningServer(config).running() as server:
        fill(server.store)
        server.store.gates["notes"] = server.on_loop(make_event())
        answer = server.post("/v1/completions", {"prompt": "a", "cartridges": [NOTES]})
        assert (answer.status, answer.error["code"]) == (408, "request_timeout")


def test_requests_that_wait_for_cartridges_count_in_the_queue():
    with RunningServer(with_config(max_queued_requests=3)).running() as server:
        fill(server.store)
        server.store.gates["notes"] = server.on_loop(make_event())
        body = {"prompt": "a", "cartridges": [NOTES]}
        waiting = [begin(server, "/v1/completions", body) for _ in range(3)]
        wait_for(lambda: server.generations.num_of("address 127.0.0.1") == 3)
        answer = server.post("/v1/completions", body)
        assert (answer.status, answer.error["code"]) == (429, "rate_limit_exceeded")
        for each in waiting:
            each.close()
        wait_for(lambda: server.store.num_waiting == 0)
        assert server.post("/v1/completions", {"prompt": "a"}).status == 200


@each_row(
    "end, said",
    [
        (lambda server: server.state.drain(), "shutting down"),
        (lambda server: server.state.die("it burnt"), "it burnt"),
    ],
)
def test_requests_that_wait_for_cartridges_end_with_the_engine(end, said):
    with RunningServer().running() as server:
        fill(server.store)
        server.store.gates["notes"] = server.on_loop(make_event())
        answers: list = []
        body = {"prompt": "a", "cartridges": [NOTES]}
        asking = threading.Thread(
            target=lambda: answers.append(server.post("/v1/completions", body))
        )
        asking.start()
        wait_for(lambda: server.store.num_waiting == 1)
        server.call(lambda: end(server))
        asking.join()
        assert answers[0].status == 503
        assert said in answers[0].error["message"]
        assert server.store.num_waiting == 0


def test_receipts_have_the_digests_of_cartridges(server):
    body = {"prompt": "a", "cartridges": [NOTES], "receipt": True}
    (request,) = server.post("/v1/completions", body).json["receipt"]["request"]
    assert request["cartridges"] == [server.store.versions["local", "notes"].metadata.digest]
    (request,) = server.post("/v1/completions", {"prompt": "a", "receipt": True}).json["receipt"][
        "request"
    ]
    assert "cartridges" not in request


def test_an_aborted_request_gives_its_cartridge_back(server):
    server.engine.hold_at = 1
    connection = begin(server, "/v1/completions", {"prompt": "a", "cartridges": [NOTES]})
    wait_for(lambda: server.engine.num_running == 1)
    connection.close()
    wait_for(lambda: any(isinstance(each, AbortRequest) for each in server.engine.received))


# --- tags -----------------------------------------------------------------------------------------

TAG = '<cartridge>{"id": "notes", "source": "local"}</cartridge>'
MORE = '<cartridge>\n { "id": "more",\n "source": "local" }\n</cartridge>'


def system(text: object, role: str = "system") -> list[dict[str, object]]:
    return [{"role": role, "content": text}, USER]


@each_row(
    "text, rest, num_tokens",
    [
        (TAG, "", 21),
        (f"Be kind.{TAG}", "Be kind.", 21),
        (f"one\n\n{TAG}\n\ntwo", "one\n\ntwo", 21),
        (f"one\n{TAG}\n\n\n\n\ntwo\n", "one\n\ntwo\n", 21),
        (f"{MORE}{TAG}", "", 25),
        ([{"type": "text", "text": f"a{TAG}"}, {"type": "text", "text": f"b{MORE}"}], "ab", 25),
        ("one\n\n\n\ntwo", "one\n\n\n\ntwo", 0),
        ("</cartridge>", "</cartridge>", 0),
    ],
)
def test_tags_are_taken_out_of_system_messages(tags, text, rest, num_tokens):
    tags.engine.received.clear()
    answer = tags.post("/v1/chat/completions", {"messages": system(text)})
    assert answer.status == 200, answer.content
    (request,) = tags.engine.requests
    bos = "" if num_tokens else BOS
    expected = ids_of(f"{bos}<|system|>{rest}<|end|><|user|>hello<|end|><|assistant|>")
    assert request.prompt_ids.tolist() == expected
    assert prefix_of(request, tags) == num_tokens


@each_row(
    "text, param, said",
    [
        ("<cartridge>notes</cartridge>", "messages", "messages[0]"),
        ("<cartridge></cartridge>", "messages", "messages[0]"),
        ("<cartridge>[]</cartridge>", "messages", "JSON object"),
        ('<cartridge>{"source": "local"}</cartridge>', "messages", "id is required"),
        ('<cartridge>{"id": "a", "colour": 1}</cartridge>', "messages", "colour"),
        ('<cartridge>{"id": "notes", "source": "local"}', "messages", "no </cartridge>"),
        (f"{TAG}{TAG}", "cartridges", "named twice"),
    ],
)
def test_wrong_tags_are_refused(tags, text, param, said):
    answer = tags.post("/v1/chat/completions", {"messages": system(text)})
    assert (answer.status, answer.error["param"]) == (400, param), answer.content
    assert said in answer.error["message"]
    assert not tags.engine.requests


def test_tags_beside_the_field_are_refused(tags):
    body = {"messages": system(TAG), "cartridges": [{"id": "more", "source": "local"}]}
    answer = tags.post("/v1/chat/completions", body)
    assert (answer.status, answer.error["param"]) == (400, "cartridges")


def test_tags_are_text_where_they_are_not_read(server, tags):
    """In any message unless cartridge_tags is set, and in the messages of others always."""
    for each, messages in (
        (server, system(TAG)),
        (tags, [{"role": "user", "content": TAG}]),
        (tags, [{"role": "user", "content": TAG}, {"role": "assistant", "content": TAG}]),
    ):
        each.engine.received.clear()
        assert each.post("/v1/chat/completions", {"messages": messages}).status == 200
        (request,) = each.engine.requests
        assert not request.cartridge
        assert not each.store.asked
