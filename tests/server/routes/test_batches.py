"""Files and batches, through the openai client."""

from __future__ import annotations

import contextlib
import io
import json
import resource
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest
from fake_engine import TOKENIZER, RunningServer, ids_of, wait_for, with_config
from rows import each_row

from tokasaurus.batch import runner as runner_module
from tokasaurus.batch.capacity import BATCH_PRIORITY

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
FINAL = ("completed", "failed", "expired", "cancelled")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    config = with_config(data_dir=str(tmp_path_factory.mktemp("data")), max_body_bytes=4 << 20)
    with RunningServer(config).running() as server:
        yield server


@pytest.fixture
def server(shared: RunningServer) -> Iterator[RunningServer]:
    shared.engine.reset()
    yield shared
    shared.engine.reset()
    shared.wait_idle()


@pytest.fixture
def client(server: RunningServer) -> openai.OpenAI:
    return server.client()


def line(number: int, url: str = COMPLETIONS, **changes: object) -> dict:
    body: dict = {"seed": number, "max_tokens": 5}
    if url == CHAT:
        body["messages"] = [{"role": "user", "content": f"number {number}"}]
    else:
        body["prompt"] = f"number {number}"
    return {"custom_id": f"id-{number}", "method": "POST", "url": url, "body": body, **changes}


def upload(client: openai.OpenAI, lines: list[dict] | bytes) -> str:
    data = lines
    if not isinstance(lines, bytes):
        data = "".join(json.dumps(each) + "\n" for each in lines).encode()
    return client.files.create(file=("in.jsonl", io.BytesIO(data)), purpose="batch").id


def create(client: openai.OpenAI, lines: list[dict] | bytes, url: str = COMPLETIONS, **options):
    return client.batches.create(
        input_file_id=upload(client, lines),
        endpoint=url,
        completion_window=options.pop("completion_window", "24h"),
        **options,
    )


def wait(client: openai.OpenAI, batch_id: str, *statuses: str):
    wait_for(lambda: client.batches.retrieve(batch_id).status in (statuses or FINAL))
    return client.batches.retrieve(batch_id)


def content(client: openai.OpenAI, file_id: str | None) -> list[dict]:
    if file_id is None:
        return []
    return [json.loads(each) for each in client.files.content(file_id).text.splitlines()]


# --- files -------------------------------------------------------------------------------------


def test_a_file_is_kept_until_it_is_deleted(client, server):
    data = b'{"a": 1}\r\n\x00\xff' * 100_000
    file = client.files.create(file=("my file.jsonl", io.BytesIO(data)), purpose="batch")
    assert (file.bytes, file.filename, file.purpose) == (len(data), "my file.jsonl", "batch")
    assert (file.object, file.status, file.expires_at) == ("file", "processed", None)
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).content == data
    assert client.files.list().data[0] == file
    gone = client.files.delete(file.id)
    assert (gone.id, gone.deleted, gone.object) == (file.id, True, "file")
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(file.id)
    assert not (Path(server.batches.store.path(file.id))).exists()


def test_lists_of_files_come_in_pages(client):
    ids = [upload(client, b"x") for _ in range(5)]
    # The client asks for further pages itself.
    assert [file.id for file in client.files.list(limit=2)][:5] == ids[::-1]
    page = client.files.list(limit=2, order="asc", after=ids[1])
    assert [file.id for file in page.data] == ids[2:4]
    assert page.has_more
    assert client.files.list(purpose="batch_output", after=ids[0]).data == []


def test_a_file_that_has_expired_is_gone(client, monkeypatch):
    file = client.files.create(
        file=b"x", purpose="batch", expires_after={"anchor": "created_at", "seconds": 1000}
    )
    assert file.expires_at == file.created_at + 1000
    assert client.files.retrieve(file.id) == file
    later = SimpleNamespace(time=lambda: file.expires_at + 0.05)
    monkeypatch.setattr("tokasaurus.server.routes.files.time", later)
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)
    assert file.id not in [each.id for each in client.files.list()]


def form(*parts: tuple[str, bytes], boundary: bytes = b"xyz") -> bytes:
    pieces = []
    for disposition, data in parts:
        head = f"Content-Disposition: form-data; {disposition}".encode()
        pieces.append(b"--" + boundary + b"\r\n" + head + b"\r\n\r\n" + data + b"\r\n")
    return b"".join([*pieces, b"--", boundary, b"--\r\n"])


PURPOSE = ('name="purpose"', b"batch")
FILE = ('name="file"; filename="a"', b"abc")


@each_row(
    "body, param, status",
    [
        (form(FILE), "purpose", 400),
        (form(PURPOSE), "file", 400),
        (form(FILE, ('name="purpose"', b"fine-tune")), "purpose", 400),
        (form(FILE, PURPOSE, PURPOSE), "purpose", 400),
        (form(FILE, FILE, PURPOSE), "file", 400),
        (form(('name="file"', b"abc"), PURPOSE), "file", 400),
        (form(FILE, PURPOSE, ('name="color"', b"red")), "color", 400),
        (form(FILE, ('name="purpose"', b"b" * 5000)), "purpose", 400),
        (
            form(FILE, PURPOSE, ('name="expires_after[seconds]"', b"-1")),
            "expires_after[seconds]",
            400,
        ),
        (form(FILE, PURPOSE, ('name="expires_after[anchor]"', b"x")), "expires_after[anchor]", 400),
        (form(('filename="a"', b"abc"), PURPOSE), None, 400),
        (form(FILE, PURPOSE)[:-9], None, 400),
        (b"--abc", None, 400),
        (b"", None, 400),
    ],
)
def test_malformed_uploads_are_refused(server, body, param, status):
    before = set(server.batches.store.path("").iterdir())
    answer = server.post("/v1/files", body, **{"Content-Type": "multipart/form-data; boundary=xyz"})
    assert (answer.status, answer.error["param"]) == (status, param)
    assert set(server.batches.store.path("").iterdir()) == before


def test_an_upload_that_the_disk_has_no_room_for(client, server):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 10, before[1]))
    try:
        with pytest.raises(openai.InternalServerError) as raised:
            upload(client, b"x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.status_code == 507
    assert raised.value.code == "storage_full"
    assert "cannot be stored: File too large" in raised.value.message
    upload(client, b"x" * 100_000)


@contextlib.contextmanager
def full_database(server: RunningServer) -> Iterator[None]:
    """Forbid SQLite any further page."""
    database = server.batches.store._database

    async def limit(num_pages: int) -> None:
        await server.batches.on_disk(database.execute, f"PRAGMA max_page_count = {num_pages}")

    ((num_pages,),) = database.execute("PRAGMA page_count").fetchall()
    server.on_loop(limit(num_pages))
    try:
        yield
    finally:
        server.on_loop(limit(1 << 30))


def test_a_full_database_is_a_507_and_leaves_nothing(client, server, monkeypatch):
    """Neither a file nor a batch leaves anything, and later ones are kept again."""
    monkeypatch.setattr(runner_module, "_RETRY_S", 0.01)
    file_id = upload(client, [line(1)])
    created: list[str] = []

    def leftovers() -> set[str]:
        on_disk = {path.name for path in server.batches.store.path("").iterdir()}
        return on_disk - {file.id for file in client.files.list()}

    before = leftovers()  # data of files that have expired

    def create_many() -> None:  # until the last page is full
        metadata = {f"{key}": "x" * 512 for key in range(16)}
        body = {"input_file_id": file_id, "endpoint": COMPLETIONS, "completion_window": "24h"}
        while True:
            created.append(client.batches.create(**body, metadata=metadata).id)

    with full_database(server), pytest.raises(openai.InternalServerError) as raised:
        create_many()
    assert (raised.value.status_code, raised.value.code) == (507, "storage_full")
    assert "cannot be stored: database or disk is full" in raised.value.message
    assert {wait(client, batch_id).status for batch_id in created} <= {"completed"}
    uploaded, answer = [], None
    with full_database(server):
        while answer is None or answer.status == 200:
            filename = f'name="file"; filename="{"x" * 200}"'
            body = form((filename, b"x"), ('name="purpose"', b"batch"))
            headers = {"Content-Type": "multipart/form-data; boundary=xyz"}
            answer = server.post("/v1/files", body, **headers)
            uploaded += [answer.json["id"]] if answer.status == 200 else []
    assert (answer.status, answer.headers["x-should-retry"]) == (507, "false")
    assert wait(client, create(client, [line(1)]).id).status == "completed"
    batches = list(client.batches.list())
    assert [batch.id for batch in batches[1 : len(created) + 1]] == created[::-1]
    assert {file.id for file in client.files.list()} >= set(uploaded)
    assert leftovers() == before


def test_a_disk_error_other_than_full_is_a_503(client, server, monkeypatch):
    def failing(*_):
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(server.batches.store, "batch", failing)
    for call in (client.batches.retrieve, client.batches.cancel):
        with pytest.raises(openai.InternalServerError) as raised:
            call("batch_1")
        assert raised.value.status_code == 503
        assert "data_dir: disk I/O error" in raised.value.message


def test_a_list_goes_on_where_a_file_was_deleted(client, server):
    ids = [upload(client, b"x") for _ in range(5)]
    page = client.files.list(limit=2)
    assert [file.id for file in page.data] == [ids[4], ids[3]]
    for each in (ids[3], ids[2]):
        client.files.delete(each)
    assert [file.id for file in page.get_next_page().data] == [ids[1], ids[0]]
    assert [file.id for file in client.files.list(order="asc", after=ids[2]).data] == [ids[4]]
    for path in ("/v1/files?after=file-none", f"/v1/batches?after={ids[0]}"):
        assert (server.get(path).status, server.get(path).error["param"]) == (404, "after")


def test_uploads_of_another_content_type_are_refused(server):
    assert server.post("/v1/files", {"file": "a"}).status == 415
    assert server.post("/v1/files", b"", **{"Content-Type": "multipart/form-data"}).status == 415
    form = {"Content-Type": "multipart/form-data; boundary=xyz", "Content-Encoding": "gzip"}
    answer = server.post("/v1/files", b"", **form)
    assert answer.status == 415
    assert "compressed" in answer.error["message"]


# --- batches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("url", [COMPLETIONS, CHAT])
def test_a_batch_answers_each_line_as_its_route_does(client, server, url):
    lines = [line(number, url) for number in range(40)]
    expected = [server.post(url, each["body"]).json["choices"] for each in lines]
    batch = create(client, lines, url, metadata={"job": "nightly"})
    assert (batch.object, batch.endpoint, batch.status) == ("batch", url, "validating")
    assert (batch.metadata, batch.expires_at) == ({"job": "nightly"}, batch.created_at + 86400)
    batch = wait(client, batch.id)
    assert batch.status == "completed"
    assert batch.error_file_id is None
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (40, 40, 0)
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    answers = content(client, batch.output_file_id)
    assert [each["custom_id"] for each in answers] == [each["custom_id"] for each in lines]
    assert [each["response"]["body"]["choices"] for each in answers] == expected
    assert all(each["error"] is None and each["response"]["status_code"] == 200 for each in answers)
    assert len({each["id"] for each in answers}) == 40
    assert batch.usage.output_tokens == 200
    usages = [each["response"]["body"]["usage"] for each in answers]
    assert batch.usage.input_tokens == sum(each["prompt_tokens"] for each in usages)
    assert batch.usage.total_tokens == batch.usage.input_tokens + 200
    output = client.files.retrieve(batch.output_file_id)
    assert output.purpose == "batch_output"
    assert len(client.files.content(output.id).content) == output.bytes
    assert client.batches.list(limit=1).data == [batch]


def test_the_usage_of_a_batch_counts_each_prompt_once(server, client):
    """Also if a prompt has several samples, or a line several prompts."""
    params = {"max_new_tokens": 3, "ignore_eos": True}
    bodies = [
        {"text": "the cat", "sampling_params": params},
        {"text": "the cat sat", "sampling_params": {**params, "n": 4}},
        {"text": ["hello", "on the mat"], "sampling_params": params},
    ]
    lines = [
        {"custom_id": str(number), "method": "POST", "url": "/generate", "body": body}
        for number, body in enumerate(bodies)
    ]
    batch = wait(client, create(client, lines, "/generate").id)
    num_input = sum(
        len(TOKENIZER.encode(text)) for text in ("the cat", "the cat sat", "hello", "on the mat")
    )
    assert (batch.usage.input_tokens, batch.usage.output_tokens) == (num_input, 3 * 7)
    assert batch.usage.total_tokens == num_input + 3 * 7


def test_the_usage_of_a_batch_counts_reasoning(server, client, monkeypatch):
    thoughts, rest = ids_of("<think>the cat</think>"), ids_of("sat")
    monkeypatch.setattr(server.engine, "script", lambda *_: [*thoughts, *rest, *rest])
    template = "{{ messages[0].content }}{# <think> #}"
    options = {"max_tokens": len(thoughts) + 2 * len(rest), "n": 2}
    options["chat_template_kwargs"] = {"chat_template": template}
    lines = [line(number, CHAT) for number in range(3)]
    for each in lines:
        each["body"] |= options
    usage = wait(client, create(client, lines, CHAT).id).usage
    assert usage.output_tokens == 6 * options["max_tokens"]
    assert usage.output_tokens_details.reasoning_tokens == 6 * len(thoughts)


def test_a_bad_line_of_a_batch_fails_alone(client):
    good = [line(number) for number in range(3)]
    bad = [
        (b"{not json", "invalid_json_line"),
        (b'"text"', "invalid_json_line"),
        (b"\xff\xfe{}", "invalid_json_line"),
        (b"[" * 100_000, "invalid_json_line"),
        (json.dumps({**good[0], "custom_id": None}).encode(), "missing_custom_id"),
        (json.dumps(good[0]).encode(), "duplicate_custom_id"),
        (json.dumps(line(10, CHAT)).encode(), "mismatched_endpoint"),
        (json.dumps(line(11, method="GET")).encode(), "invalid_method"),
        (json.dumps(line(12, body=[1])).encode(), "invalid_body"),
        (json.dumps(line(13, model="m")).encode(), "unknown_field"),
    ]
    refused = [
        (line(20, body={"prompt": "a", "max_tokens": 10**6}), "max_tokens"),
        (line(21, body={"prompt": "a", "stream": True}), "stream"),
        (line(22, body={}), "prompt"),
    ]
    data = b"\n".join(
        [
            json.dumps(good[0]).encode(),
            b"\n  ",  # blank lines are no requests
            *(each for each, _ in bad),
            *(json.dumps(each).encode() for each, _ in refused),
            *(json.dumps(each).encode() for each in good[1:]),
        ]
    )
    batch = wait(client, create(client, data).id)
    counts = batch.request_counts
    assert batch.status == "completed"
    assert (counts.total, counts.completed, counts.failed) == (16, 3, 13)
    answers = content(client, batch.output_file_id)
    assert [each["custom_id"] for each in answers] == ["id-0", "id-1", "id-2"]
    errors = content(client, batch.error_file_id)
    assert [each["error"]["code"] for each in errors[:10]] == [code for _, code in bad]
    assert all(each["response"] is None for each in errors[:10])
    # Without an id of their own they have their numbers, as an editor shows them.
    assert [each["custom_id"] for each in errors[:5]] == [f"line-{n}" for n in range(4, 9)]
    for each, (asked, param) in zip(errors[10:], refused, strict=True):
        assert each["custom_id"] == asked["custom_id"]
        assert each["error"] is None
        assert each["response"]["status_code"] == 400
        assert each["response"]["body"]["error"]["param"] == param


@each_row(
    "data, code",
    [
        (b"", "empty_file"),
        (b"\n\n  \n", "empty_file"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "invalid_json_line"),
        (json.dumps(line(1)).encode("utf-16"), "invalid_json_line"),
        (json.dumps(line(1, CHAT)).encode(), "mismatched_endpoint"),
        (b"x\n" * 50_001, "too_many_lines"),
    ],
)
def test_a_file_that_is_not_a_batch_fails_with_the_reason(client, data, code):
    batch = wait(client, create(client, data).id)
    assert batch.status == "failed"
    assert batch.failed_at is not None
    assert batch.errors.data[0].code == code
    assert batch.output_file_id is None
    assert batch.error_file_id is None


@each_row(
    "changes, param, status",
    [
        ({"input_file_id": "file-none"}, "input_file_id", 404),
        ({"endpoint": "/v1/models"}, "endpoint", 400),
        ({"completion_window": "soon"}, "completion_window", 400),
        ({"completion_window": "31d"}, "completion_window", 400),
        ({"metadata": {"a": 1}}, "metadata", 400),
        ({"metadata": {"a": "b" * 513}}, "metadata", 400),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata", 400),
        ({"output_expires_after": {"anchor": "now", "seconds": 9}}, "output_expires_after", 400),
        (
            {"output_expires_after": {"anchor": "created_at", "seconds": 0}},
            "output_expires_after",
            400,
        ),
        ({"color": "red"}, "color", 400),
        ({"endpoint": None}, "endpoint", 400),
    ],
)
def test_a_wrong_batch_is_refused_by_the_name_of_its_field(client, server, changes, param, status):
    body = {"input_file_id": upload(client, [line(1)]), "endpoint": COMPLETIONS, **changes}
    answer = server.post("/v1/batches", body)
    assert (answer.status, answer.error["param"]) == (status, param)


def test_the_output_of_a_batch_cannot_be_an_input(client):
    batch = wait(client, create(client, [line(1)]).id)
    with pytest.raises(openai.BadRequestError, match="purpose"):
        client.batches.create(
            input_file_id=batch.output_file_id, endpoint=COMPLETIONS, completion_window="24h"
        )


def test_unknown_batches_and_query_parameters_are_refused(client, server):
    for call in (client.batches.retrieve, client.batches.cancel):
        with pytest.raises(openai.NotFoundError):
            call("batch_none")
    for path in (
        "/v1/batches?limit=0",
        "/v1/batches?limit=x",
        "/v1/files?order=up",
        "/v1/files?x=1",
    ):
        assert server.get(path).status == 400
    assert server.get("/v1/batches?after=none").status == 404


def test_the_input_file_of_a_running_batch_cannot_be_deleted(client, server):
    server.engine.paused = True
    batch = create(client, [line(1)])
    with pytest.raises(openai.ConflictError, match="cancel"):
        client.files.delete(batch.input_file_id)
    server.engine.paused = False
    wait(client, batch.id)
    client.files.delete(batch.input_file_id)


def test_a_batch_is_cancelled(client, server):
    server.engine.script = lambda request, index: ids_of("a") * request.max_tokens
    first = wait(client, create(client, [line(1)]).id)
    with pytest.raises(openai.ConflictError, match="completed"):
        client.batches.cancel(first.id)
    server.engine.paused = True
    lines = [line(number) for number in range(300)]
    batch = create(client, lines)
    wait(client, batch.id, "in_progress")
    wait_for(lambda: server.engine.num_running == 128)
    assert client.batches.cancel(batch.id).status == "cancelling"
    batch = wait(client, batch.id)
    assert batch.status == "cancelled"
    assert batch.cancelling_at <= batch.cancelled_at
    assert (batch.request_counts.total, batch.request_counts.failed) == (300, 300)
    errors = content(client, batch.error_file_id)
    assert [each["custom_id"] for each in errors] == [each["custom_id"] for each in lines]
    assert {each["error"]["code"] for each in errors} == {"batch_cancelled"}
    server.wait_idle()


def test_a_batch_that_expires_keeps_the_lines_it_has_answered(client, server):
    """The engine answers two lines of 5 tokens, and never those of 400."""
    server.engine.hold_at = 10
    lines = [line(number) for number in range(4)]
    for each in lines[2:]:
        each["body"]["max_tokens"] = 400
    batch = create(client, lines, completion_window="1h")
    assert batch.expires_at == batch.created_at + 3600
    wait_for(lambda: client.batches.retrieve(batch.id).request_counts.completed == 2)
    server.advance(3601)
    client = server.client()  # the first client's connections were idle for an hour
    batch = wait(client, batch.id)
    assert batch.status == "expired"
    assert batch.expired_at is not None
    errors = content(client, batch.error_file_id)
    assert {each["error"]["code"] for each in errors} == {"batch_expired"}
    assert [each["custom_id"] for each in errors] == ["id-2", "id-3"]
    answers = content(client, batch.output_file_id)
    assert [each["custom_id"] for each in answers] == ["id-0", "id-1"]


def test_the_output_of_a_batch_expires(client):
    after = {"anchor": "created_at", "seconds": 3600}
    batch = wait(client, create(client, [line(1)], output_expires_after=after).id)
    output = client.files.retrieve(batch.output_file_id)
    assert output.expires_at == output.created_at + 3600


def test_batches_have_low_priority_and_a_bounded_number_in_flight(client, server):
    server.engine.paused, server.engine.most_running = True, 0
    batch = create(client, [line(number) for number in range(400)])
    wait_for(lambda: server.engine.num_running == 128)  # twice what the engine runs at once
    priorities = [request.priority for request in server.engine.requests]
    assert set(priorities) == {0, BATCH_PRIORITY}
    assert priorities.count(0) == 128 // 16
    server.engine.paused = False
    assert wait(client, batch.id).request_counts.completed == 400
    assert server.engine.most_running == 128


def test_a_batch_leaves_room_in_the_queue_for_other_requests(tmp_path):
    with RunningServer(
        with_config(data_dir=str(tmp_path), max_queued_requests=20)
    ).running() as own:
        own.engine.paused = True
        client = own.client()
        batch = create(client, [line(number) for number in range(100)])
        wait_for(lambda: own.engine.num_running == 10)
        own.engine.paused = False
        assert own.post(COMPLETIONS, {"prompt": "a"}).status == 200
        assert wait(client, batch.id).request_counts.completed == 100
        assert own.engine.most_running in (10, 11)  # the other request may have met ten lines


def test_a_snapshot_of_the_engine_has_no_metadata_and_one_error_of_a_batch(server, client):
    """Every viewer of the page gets it each second, so clients may not make it large."""
    lines = [{"custom_id": str(number)} for number in range(50)]
    wrong = create(client, lines, metadata={"key": "x" * 512})
    assert len(wait(client, wrong.id).errors.data) == 50
    (found,) = [each for each in server.get("/v1/engine").json["batches"] if each["id"] == wrong.id]
    assert found["status"] == "failed"
    assert len(found["errors"]["data"]) == 1
    assert found.get("metadata") is None
