"""Routes that control a running engine, on the fake engine."""

from __future__ import annotations

import http.client
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
from fake_engine import EOS_ID, RunningServer, ids_of, wait_for, with_config
from rows import check_each, each_row

from tokasaurus.protocol.commands import (
    AbortAll,
    Command,
    FlushCache,
    Pause,
    PauseMode,
    ReleaseMemory,
    RestoreMemory,
    Resume,
    UpdateWeights,
)
from tokasaurus.server.routes.control import CONTROL_SCHEMAS

COMPLETIONS = "/v1/completions"
LONG = {"prompt": "the cat", "max_tokens": 300, "ignore_eos": True, "seed": 1}
ALL = ReleaseMemory(True, True)


@pytest.fixture
def server():
    """A server of its own: commands leave traces in the text core."""
    with RunningServer().running() as server:
        yield server


def commands(server):
    """What was asked of the engine, as plain values."""
    sent = [each.action for each in server.engine.received if isinstance(each, Command)]
    server.engine.received.clear()
    return [plain(action) for action in sent]


def plain(action):
    return type(action).__name__, *msgspec.structs.astuple(action)


def ask(server, request):
    """The answer to "METHOD PATH", or to a pair of this and a JSON body."""
    line, body = (request, None) if isinstance(request, str) else request
    method, path = line.split(" ")
    data, headers = None, {}
    if body is not None:
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
    elif method == "POST":
        data = b""
    return server._ask(method, path, data, headers)


def started(server, body=LONG, number=1):
    """Requests that have begun to run and hold still; returns their answers to come."""
    server.engine.hold_at = 5
    pool = ThreadPoolExecutor(number)
    answers = [pool.submit(server.post, COMPLETIONS, body) for _ in range(number)]
    wait_for(lambda: server.engine.num_running == number * body.get("n", 1))
    wait_for(lambda: all(each.position == 5 for each in [*server.engine._running.values()]))
    pool.shutdown(wait=False)
    return answers


# --- what each route asks of the engine ----------------------------------------------------------

ABORT, DRAIN, KEEP = Pause(PauseMode.ABORT), Pause(PauseMode.DRAIN), Pause(PauseMode.KEEP)
PAUSED = {"status": "paused"}
OK = {"status": "ok"}


@each_row(
    "request_, actions, answer",
    [
        ("POST /pause", [ABORT, FlushCache()], PAUSED),
        ("POST /pause?mode=abort&clear_cache=false", [ABORT], PAUSED),
        ("POST /pause?mode=wait", [DRAIN, FlushCache()], PAUSED),
        ("POST /pause?wait_for_inflight_requests=true", [DRAIN, FlushCache()], PAUSED),
        ("POST /pause?mode=keep&clear_cache=0", [KEEP], PAUSED),
        ("POST /resume", [Resume()], {"status": "resumed"}),
        ("POST /pause_generation", [ABORT], None),
        (("POST /pause_generation", {}), [ABORT], None),
        (("POST /pause_generation", {"mode": "retract"}), [KEEP], None),
        (("POST /pause_generation", {"mode": "in_place"}), [KEEP], None),
        (("POST /continue_generation", {"torch_empty_cache": True}), [Resume()], None),
        (("POST /abort_request", {"abort_all": True}), [AbortAll()], None),
        (("POST /abort_request", {"rid": "", "abort_all": True}), [AbortAll()], None),
        (("POST /abort_request", {"rid": "nothing"}), [], {"status": "aborted", "aborted": 0}),
        ("POST /abort_requests", [AbortAll()], {"status": "aborted", "aborted": 0}),
        (("POST /abort_requests", {"request_ids": []}), [AbortAll()], None),
        (("POST /abort_requests", {"request_ids": ["nothing"]}), [], None),
        ("POST /sleep", [ABORT, ALL], {"status": "sleeping"}),
        ("POST /sleep?level=2&mode=keep", [KEEP, ALL], {"status": "sleeping"}),
        ("POST /sleep?level=0&mode=wait", [DRAIN], {"status": "sleeping"}),
        ("POST /release_memory_occupation", [ALL], OK),
        (("POST /release_memory_occupation", {"tags": None}), [ALL], OK),
        (
            ("POST /release_memory_occupation", {"tags": ["kv_cache"]}),
            [ReleaseMemory(False, True)],
            OK,
        ),
        (("POST /release_memory_occupation", {"tags": ["cuda_graph"]}), [], OK),
        ("POST /resume_memory_occupation", [], OK),  # nothing is released
        ("POST /wake_up", [], {"status": "awake"}),
        ("GET /is_paused", [], {"is_paused": False}),
        ("GET /is_sleeping", [], {"is_sleeping": False}),
        ("GET /weight_info", [], {"weight_version": "default", "weights_version": 0}),
        ("GET /get_weight_version", [], {"weight_version": "default", "weights_version": 0}),
        (
            ("POST /update_weight_version", {"new_version": "v", "abort_all_requests": True}),
            [AbortAll()],
            {"success": True, "message": "Weight version updated to v", "new_version": "v"},
        ),
        (("POST /update_weight_version", {"new_version": "v"}), [], None),
    ],
)
def test_a_route_asks_this_of_the_engine(request_, actions, answer):
    with RunningServer().running() as server:
        got = ask(server, request_)
        assert got.status == 200, got.content
        assert commands(server) == [plain(action) for action in actions]
        assert answer is None or got.json == answer


@each_row(
    "request_, field",
    [
        ("POST /pause?mode=sleep", "mode"),
        ("POST /pause?clear_cache=maybe", "clear_cache"),
        ("POST /pause?level=1", "level"),
        ("POST /sleep?level=3", "level"),
        ("POST /sleep?level=x", "level"),
        ("POST /sleep?mode=retract", "mode"),
        ("POST /wake_up?tags=everything", "tags"),
        ("POST /wake_up?tag=weights", "tag"),
        (("POST /pause_generation", {"mode": "keep"}), "mode"),
        (("POST /pause_generation", {"modus": "abort"}), "modus"),
        (("POST /abort_request", {}), "rid"),
        (("POST /abort_request", {"rid": 7}), "rid"),
        (("POST /abort_requests", {"request_ids": "x"}), "request_ids"),
        (("POST /release_memory_occupation", {"tags": ["nothing"]}), "tags"),
        (("POST /update_weights_from_disk", {}), "model_path"),
        ("POST /update_weights_from_disk", "model_path"),
        (("POST /update_weights_from_disk", {"model_path": ""}), "model_path"),
        (("POST /update_weights_from_disk", {"model_path": "/no/such"}), "model_path"),
        (("POST /update_weights_from_disk", {"model_path": "/", "keep_pause": True}), "keep_pause"),
        (
            ("POST /update_weights_from_disk", {"model_path": "/", "load_format": "x"}),
            "load_format",
        ),
        (("POST /update_weight_version", {}), "new_version"),
        (("POST /update_weight_version", {"new_version": ""}), "new_version"),
        (("POST /update_weight_version", {"new_version": "x" * 257}), "new_version"),
    ],
)
def test_wrong_requests_are_refused_by_the_name_of_the_field(request_, field):
    with RunningServer().running() as server:
        answer = ask(server, request_)
        assert (answer.status, answer.error["param"]) == (400, field), answer.content
        assert not commands(server)


def test_nonsense_in_any_body_is_a_400(server):
    def check(schema):
        path = schema.__doc__.split("``")[1].removeprefix("POST ")
        for field in schema.model_fields:
            for wrong in (0.5, {"a": 1}, [[[1]]], 1 << 70):
                answer = ask(server, (f"POST {path}", {field: wrong}))
                assert answer.status == 400, (field, wrong, answer.content)
        for body in ([], "x", 1):
            assert ask(server, (f"POST {path}", body)).status == 400
        assert server._ask("POST", path, b"{}", {"Content-Type": "text/plain"}).status == 415

    check_each(CONTROL_SCHEMAS, check)
    assert not commands(server)


@each_row("kind", ["tensor", "ipc"])
def test_pickled_tensors_are_refused_with_the_name_of_the_right_route(kind):
    with RunningServer().running() as server:
        answer = server.post(f"/update_weights_from_{kind}", {"serialized_named_tensors": ["x"]})
        assert answer.status == 400
        assert "/v1/weights/updates" in answer.error["message"]


# --- answers of requests that are aborted --------------------------------------------------------


def test_aborted_requests_are_answered_in_every_protocol(server):
    """Path, body, where the answer has the tokens, the finish reason."""
    chat = [{"role": "user", "content": "hi"}]
    cases = [
        (COMPLETIONS, LONG, lambda j: (j["choices"][0]["finish_reason"], j["choices"][0]["text"])),
        (
            "/v1/chat/completions",
            {"messages": chat, "max_tokens": 300, "ignore_eos": True},
            lambda j: (j["choices"][0]["finish_reason"], j["choices"][0]["message"]["content"]),
        ),
        (
            "/v1/responses",
            {"input": "hi", "max_output_tokens": 300, "ignore_eos": True},
            lambda j: (j["status"], j["output"][0]["content"][0]["text"]),
        ),
        (
            "/generate",
            {"prompt": "hi", "max_tokens": 300, "ignore_eos": True},
            lambda j: (j["finish_reason"], j["text"]),
        ),
        (
            "/generate",
            {"text": "hi", "sampling_params": {"max_new_tokens": 300, "ignore_eos": True}},
            lambda j: (j["meta_info"]["finish_reason"]["type"], j["text"]),
        ),
    ]
    server.engine.script = lambda request, index: ids_of("abcdefgh") * 40

    def check(case):
        path, body, told = case
        for streams in (False, True):
            server.engine.hold_at = 5
            with ThreadPoolExecutor(1) as pool:
                answer = pool.submit(server.post, path, {**body, "stream": streams})
                wait_for(lambda: server.engine.num_running == 1)
                wait_for(lambda: [s.position for s in [*server.engine._running.values()]] == [5])
                aborted = server.post("/abort_requests", b"").json
                got = answer.result()
            assert aborted == {"status": "aborted", "aborted": 1}
            assert got.status == 200
            if not streams:
                reason, text = told(got.json)
                assert reason == ("cancelled" if "responses" in path else "abort")
                assert text == "abcde"
            elif "responses" in path:
                last = json.loads(got.content.split(b"data: ")[-1])
                assert last["type"] == "response.incomplete"
                assert last["response"]["status"] == "cancelled"
                assert last["response"]["incomplete_details"] is None
                assert last["response"]["output"][0]["status"] == "incomplete"
            else:
                assert b"abort" in got.content
                assert got.content.endswith(b"data: [DONE]\n\n")
        server.engine.hold_at = None

    check_each(cases, check)
    server.check_nothing_is_left()


def test_the_openai_client_reads_an_aborted_answer(server):
    client = server.client()
    server.engine.hold_at = 4
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(
            client.completions.create, model="", prompt="the cat", max_tokens=300, n=3
        )
        wait_for(lambda: server.engine.num_running == 3)
        server.post("/abort_request", {"abort_all": True})
    choices = answer.result().choices
    assert [each.finish_reason for each in choices] == ["abort"] * 3


def test_one_request_is_aborted_by_its_name(server):
    server.engine.hold_at = 5
    body = {"input_ids": [[9, 9], [8, 8]], "rid": ["a", "b"]}
    body["sampling_params"] = {"max_new_tokens": 50, "ignore_eos": True}
    with ThreadPoolExecutor(3) as pool:
        two = pool.submit(server.post, "/generate", body)
        named = pool.submit(server.post, COMPLETIONS, {**LONG, "request_id": "own"})
        other = pool.submit(lambda: server.post(COMPLETIONS, LONG, **{"X-Request-Id": "mine"}))
        wait_for(lambda: server.engine.num_running == 4)
        assert server.post("/abort_request", {"rid": "b"}).json["aborted"] == 1
        assert server.post("/abort_requests", {"request_ids": ["own"]}).json["aborted"] == 1
        assert named.result().json["choices"][0]["finish_reason"] == "abort"
        assert server.post("/abort_requests", {"request_ids": ["mine", "x"]}).json["aborted"] == 1
        assert other.result().json["choices"][0]["finish_reason"] == "abort"
        server.engine.hold_at = None
        reasons = [each["meta_info"]["finish_reason"]["type"] for each in two.result().json]
    assert reasons == ["length", "abort"]


def test_lines_of_batches_begin_again_after_an_abort(tmp_path):
    with RunningServer(with_config(data_dir=str(tmp_path))).running() as server:
        server.engine.hold_at = 5
        line = {"custom_id": "a", "method": "POST", "url": COMPLETIONS, "body": LONG}
        client = server.client()
        file = client.files.create(file=("in", json.dumps(line).encode()), purpose="batch")
        batch = client.batches.create(
            input_file_id=file.id, endpoint=COMPLETIONS, completion_window="24h"
        )
        wait_for(lambda: server.engine.num_running == 1)
        assert server.post("/abort_requests", b"").json["aborted"] == 1
        server.engine.hold_at = None
        wait_for(lambda: client.batches.retrieve(batch.id).status == "completed")
        output = client.files.content(client.batches.retrieve(batch.id).output_file_id).text
    assert json.loads(output)["response"]["body"]["choices"][0]["finish_reason"] == "length"


# --- pausing and sleeping ------------------------------------------------------------------------


def test_a_paused_engine_is_healthy_and_requests_wait(server):
    assert server.post("/pause?mode=keep", b"").status == 200
    assert server.get("/is_paused").json == {"is_paused": True}
    assert "tokasaurus_paused" not in server.get("/metrics").content.decode()  # no statistics yet
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.post, COMPLETIONS, {"prompt": "the cat", "max_tokens": 3})
        wait_for(lambda: server.engine.num_running == 1)
        assert server.get("/health").json == {"status": "ok", "running": 1}
        assert not answer.done()
        assert server.post("/resume", b"").status == 200
        assert answer.result().status == 200
    assert server.get("/is_paused").json == {"is_paused": False}


def test_a_pause_that_waits_is_answered_when_all_that_had_begun_has_ended(server):
    (answer,) = started(server)
    with ThreadPoolExecutor(1) as pool:
        pause = pool.submit(server.post, "/pause?mode=wait", b"")
        wait_for(lambda: server.engine._draining is not None)
        assert not pause.done()
        server.engine.hold_at = None
        assert pause.result().json == {"status": "paused"}
    assert answer.result().json["choices"][0]["finish_reason"] == "length"


def test_sleeping_and_waking(server):
    def state():
        paused = server.get("/is_paused").json["is_paused"]
        return paused, server.get("/is_sleeping").json["is_sleeping"]

    assert ask(server, "POST /sleep?level=1&mode=keep").status == 200
    assert state() == (True, True)
    commands(server)
    assert ask(server, "POST /wake_up?tags=weights").json == {"status": "sleeping"}
    assert state() == (True, True)
    assert commands(server) == [plain(RestoreMemory(True, False))]
    assert ask(server, "POST /wake_up?tags=kv_cache&tags=weights").json == {"status": "awake"}
    assert commands(server) == [plain(RestoreMemory(False, True)), plain(Resume())]
    assert state() == (False, False)
    # Level 0 only pauses, and an engine that was paused before stays paused.
    assert ask(server, "POST /sleep?level=0").status == 200
    assert state() == (True, True)
    assert ask(server, "POST /wake_up?tags=scheduling").status == 200
    assert state() == (False, False)
    assert ask(server, "POST /pause").status == 200
    assert state() == (True, False)
    assert ask(server, "POST /sleep").status == 200
    assert ask(server, "POST /wake_up").status == 200
    assert state() == (True, False)


def test_a_restore_without_weights_says_what_to_do(server, tmp_path):
    server.engine.forgets_weights = True
    assert ask(server, "POST /sleep").status == 200
    assert ask(server, "POST /wake_up?tags=weights").json == {"status": "sleeping"}
    answer = ask(server, "POST /wake_up")
    assert answer.status == 409
    assert "then POST /resume" in answer.error["message"]
    assert ask(server, "POST /resume").status == 200
    assert server.get("/is_sleeping").json == {"is_sleeping": False}
    assert ask(server, "POST /release_memory_occupation").json == {"status": "ok"}
    answer = ask(server, "POST /resume_memory_occupation")
    assert (answer.status, answer.json["status"]) == (200, "ok")
    assert "wait for an update" in answer.json["message"]
    update = {"model_path": checkpoint(tmp_path, "model.safetensors")}
    assert ask(server, ("POST /update_weights_from_disk", update)).status == 200
    assert ask(server, "POST /resume_memory_occupation").json == {"status": "ok"}


def test_nothing_follows_a_pause_that_fails(server):
    server.engine.refuse[Pause] = ("it was resumed before all sequences had ended", None)
    for request in ("POST /pause?mode=wait", "POST /sleep?mode=wait"):
        assert ask(server, request).status == 409
        assert commands(server) == [plain(DRAIN)]
    assert server.get("/is_sleeping").json == {"is_sleeping": False}


# --- weights -------------------------------------------------------------------------------------


def checkpoint(directory, *names, index=None):
    directory.mkdir(exist_ok=True)
    for name in names:
        (directory / name).write_bytes(b"")
    if index is not None:
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return str(directory)


def test_weights_from_disk(server, tmp_path):
    one = checkpoint(tmp_path / "one", "b.safetensors", "a.safetensors", "config.json")
    index = {"weight_map": {"x": "p.safetensors", "y": "q.safetensors", "z": "p.safetensors"}}
    two = checkpoint(
        tmp_path / "two", "p.safetensors", "q.safetensors", "r.safetensors", index=index
    )
    path = "/update_weights_from_disk"
    asked = {"model_path": one, "load_format": None, "flush_cache": True, "weight_version": "one"}
    answer = server.post(path, asked)
    assert answer.json == {
        "success": True,
        "message": "Succeeded to update model weights. Weight version is one.",
        "num_paused_requests": 0,
        "weight_version": "one",
        "weights_version": 1,
    }
    files = tuple(f"{one}/{name}.safetensors" for name in "ab")
    assert commands(server) == [plain(UpdateWeights(1, files))]
    assert server.get("/model_info").json["weight_version"] == "one"
    body = {"model_path": two, "abort_all_requests": True}
    assert server.post(path, body).json["weight_version"] == "2"
    files = tuple(f"{two}/{name}.safetensors" for name in "pq")
    assert commands(server) == [plain(AbortAll()), plain(UpdateWeights(2, files))]
    single = f"{one}/a.safetensors"
    assert server.post(path, {"model_path": single}).json["weights_version"] == 3
    assert commands(server) == [plain(UpdateWeights(3, (single,)))]
    for name, wrong in {
        "no files": checkpoint(tmp_path / "empty"),
        "no map": checkpoint(tmp_path / "map", index={}),
        "outside": checkpoint(tmp_path / "out", index={"weight_map": {"x": "../a.safetensors"}}),
        "no directory": f"{one}/config.json",
    }.items():
        answer = server.post(path, {"model_path": wrong})
        assert (answer.status, answer.error["param"]) == (400, "model_path"), name
    server.engine.refuse[UpdateWeights] = ("tensor x is missing", "files")
    answer = server.post(path, {"model_path": one, "weight_version": "four"})
    assert (answer.status, answer.error["param"]) == (400, "model_path")
    assert answer.error["message"] == "tensor x is missing"
    assert server.get("/weight_info").json == {"weight_version": "3", "weights_version": 3}


def test_answers_tell_the_versions_where_a_client_asks(server, tmp_path):
    path = checkpoint(tmp_path / "w", "a.safetensors")
    server.engine.script = lambda request, index: [*ids_of("abcdefgh"), EOS_ID]
    body = {"prompt": "the cat", "max_tokens": 50, "return_weights_versions": True}
    plain_answer = server.post(COMPLETIONS, {**body, "return_weights_versions": None}).json
    assert "weights_versions" not in plain_answer["choices"][0]
    with ThreadPoolExecutor(3) as pool:
        server.engine.hold_at = 3
        asked = [
            (COMPLETIONS, {**body, "stream": True}),
            ("/generate", {"prompt": "hi", "max_tokens": 50, "return_weights_versions": True}),
            ("/generate", {"text": "hi", "sampling_params": {"max_new_tokens": 50}}),
        ]
        answers = [pool.submit(server.post, *each) for each in asked]
        wait_for(lambda: server.engine.num_running == 3)
        wait_for(lambda: {s.position for s in [*server.engine._running.values()]} == {3})
        assert server.post(
            "/update_weights_from_disk", {"model_path": path, "weight_version": "new"}
        ).json["success"]
        server.engine.hold_at = None
        stream, native, sglang = [each.result() for each in answers]
    both = [
        {"version": 0, "label": "default", "num_tokens": 3},
        {"version": 1, "label": "new", "num_tokens": 6},
    ]
    runs: dict[int, int] = {}
    for event in stream.events:
        for run in event["choices"][0]["weights_versions"]:
            runs[run["version"]] = runs.get(run["version"], 0) + run["num_tokens"]
    assert runs == {0: 3, 1: 6}
    assert native.json["weights_versions"] == both
    assert sglang.json["meta_info"]["weight_version"] == "new"
    chat = {"messages": [{"role": "user", "content": "hi"}], "return_weights_versions": True}
    (choice,) = server.post("/v1/chat/completions", chat).json["choices"]
    assert choice["weights_versions"] == [{"version": 1, "label": "new", "num_tokens": 9}]
    # After an update every answer is stamped, unless the client does not want it.
    for path, asked_for in ((COMPLETIONS, body), ("/generate", {"prompt": "hi"})):
        for wanted in (None, False):
            answer = server.post(path, {**asked_for, "return_weights_versions": wanted}).json
            (one,) = answer["choices"] if path == COMPLETIONS else [answer]
            assert ("weights_versions" in one) == (wanted is None)


def test_answers_of_an_engine_whose_weights_never_changed_have_no_version(server):
    answer = server.post("/generate", {"text": "hi"})
    assert "weight_version" not in answer.json["meta_info"]
    assert "weight_version" not in server.get("/model_info").json
    server.post("/update_weight_version", {"new_version": "base"})
    answer = server.post("/generate", {"text": "hi"})
    assert answer.json["meta_info"]["weight_version"] == "base"
    assert server.get("/model_info").json["weight_version"] == "base"


# --- what may go wrong ---------------------------------------------------------------------------

EVERY_COMMAND = [
    "POST /pause",
    "POST /resume",
    ("POST /abort_request", {"abort_all": True}),
    "POST /abort_requests",
    "POST /sleep",
    "POST /release_memory_occupation",
    "POST /pause_generation",
    "POST /continue_generation",
]


def test_a_refused_command_is_a_409_or_names_its_field(server):
    kinds = (Pause, Resume, AbortAll, ReleaseMemory)
    server.engine.refuse = dict.fromkeys(kinds, ("not now", None))
    for request in EVERY_COMMAND:
        answer = ask(server, request)
        assert (answer.status, answer.error["message"]) == (409, "not now"), request
    server.engine.refuse = dict.fromkeys(kinds, ("not this", "mode"))
    for request in EVERY_COMMAND:
        answer = ask(server, request)
        assert (answer.status, answer.error["param"]) == (400, "mode"), request


@pytest.mark.parametrize("died", [True, False])
def test_a_dead_or_loading_engine_is_a_503(died, tmp_path):
    with RunningServer(ready=died).running() as server:
        if died:
            server.call(lambda: server.state.die("it broke"))
        others = ("GET /is_paused", "GET /is_sleeping", "GET /weight_info", "POST /wake_up")
        path = checkpoint(tmp_path / "w", "a.safetensors")
        update = ("POST /update_weights_from_disk", {"model_path": path})
        for request in (*EVERY_COMMAND, *others, update):
            answer = ask(server, request)
            assert (answer.status, answer.error["type"]) == (503, "service_unavailable"), request


def test_a_command_ends_with_a_503_when_the_engine_dies_meanwhile(server):
    server.engine.send = lambda message: server.state.die("it broke")
    assert ask(server, "POST /pause").status == 503


def test_a_command_whose_time_is_up_goes_on(server, tmp_path):
    path = checkpoint(tmp_path / "w", "a.safetensors")
    body = {"model_path": path}
    server.engine.answers_commands = False
    with ThreadPoolExecutor(2) as pool:
        pause = pool.submit(server.post, "/pause?mode=keep", b"")
        update = pool.submit(server.post, "/update_weights_from_disk", body)
        wait_for(lambda: len(server.engine.received) == 2)
        server.advance(61)
        answer = pause.result()
        assert (answer.status, answer.error["code"]) == (504, "command_timeout")
        assert "it goes on" in answer.error["message"]
        assert answer.headers["x-should-retry"] == "false"
        assert not update.done()
        server.advance(600)
        assert update.result().status == 504
    sent = [each for each in server.engine.received if isinstance(each, Command)]
    server.engine.answers_commands = True
    for each in sent:
        server.engine._carry_out(each.command_id, each.action)
    wait_for(lambda: server.generations.commands.weights.version == 1)
    assert server.get("/is_paused").json == {"is_paused": True}
    # What comes behind the pause follows, too.
    wait_for(lambda: not server.generations.commands._unanswered)
    assert commands(server)[-1] == plain(FlushCache())


def test_a_client_that_leaves_does_not_end_its_command(server):
    server.engine.answers_commands = False
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("POST", "/pause?mode=keep")
    wait_for(lambda: len(server.engine.received) == 1)
    connection.close()
    server.settle()
    sent = list(server.engine.received)
    server.engine.answers_commands = True
    for each in sent:
        server.engine._carry_out(each.command_id, each.action)
    wait_for(lambda: server.get("/is_paused").json == {"is_paused": True})


def test_many_commands_at_once(server):
    barrier = threading.Barrier(8)

    def pause_and_resume(number):
        barrier.wait()
        for _ in range(10):
            assert ask(server, "POST /pause?mode=keep").status == 200
            assert ask(server, "POST /resume").status == 200

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(pause_and_resume, range(8)))
    assert not server.generations.commands._unanswered
