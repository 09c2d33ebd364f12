"""Every field of every request changes something, is refused by name, or is harmless.

The fields come from the schemas; what each field does comes from ``field_table``. A field that is
missing in either place fails here.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import msgspec
import openai.types.batch_create_params as openai_batch
import openai.types.chat.completion_create_params as openai_chat
import openai.types.completion_create_params as openai_completion
import openai.types.embedding_create_params as openai_embedding
import openai.types.responses.response_create_params as openai_responses
import pytest
from fake_engine import RunningServer, wait_for, with_config
from field_table import (
    BASE,
    BATCHES,
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    GENERATE,
    OBJECTS,
    RESPONSES,
    SCHEMAS,
    SYNCHRONOUS,
    Changes,
    Passes,
    Place,
    example,
)
from pydantic import BaseModel
from rows import check_each, each_row

from tokasaurus.server.operations.schemas import RequestBody
from tokasaurus.server.protocols.sglang.request import _HARMLESS_SAMPLING
from tokasaurus.server.protocols.table import OPERATIONS
from tokasaurus.server.routes.control_bodies import ControlBody


def name_of(schema: type[BaseModel]) -> str:
    return schema.__name__.lstrip("_")


PLACES: dict[str, Place] = {
    **{name_of(schema): place for schema, place in SCHEMAS.items()},
    **OBJECTS,
}
every_place = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)

# Numbers, what looks like one, and other values; JSON, since Python cannot write all of them.
ODD_VALUES = [
    *("-1", "0", "1", "2147483648", "-9223372036854775809", "18446744073709551616", "1e308"),
    *("1" + "0" * 400, "0.5", "-0.0", "true", '"1"', '""', "[]", "{}", '[{"a": null}]', "[[[1]]]"),
    *('{"\\u0000": "\\u0000"}', "[-1]", "[true]", "[1.5]"),
]
NO_JSON = ("NaN", "Infinity", "-Infinity", "1e999", '"\\ud800"')


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with all routes. Its engine sends each answer in one update."""
    config = with_config(data_dir=str(tmp_path_factory.mktemp("data")))
    with RunningServer(config).running() as server:
        server.engine.largest_step = 1 << 30
        server.store.put("notes", 21)
        server.store.put("notes", 5, "another", source="s3")
        server.store.put("more", 4)
        yield server


@pytest.fixture(scope="module")
def files(everything: RunningServer) -> dict[str, str]:
    """Ids of input files, by their names in the table."""

    def upload(text: str) -> str:
        body = {"seed": 1, "max_tokens": 3}
        chat = {"custom_id": "b", "url": CHAT, "body": {**body, **BASE[CHAT]}}
        line = {"custom_id": "a", "url": COMPLETIONS, "body": {**body, "prompt": text}}
        lines = "".join(json.dumps({**each, "method": "POST"}) + "\n" for each in (line, chat))
        data = io.BytesIO(lines.encode())
        return everything.client().files.create(file=("in.jsonl", data), purpose="batch").id

    return {"FILE": upload("the cat"), "OTHER FILE": upload("the dog")}


def observe(
    server: RunningServer, files: dict[str, str], place: Place, body: Any, *, to_end: bool = True
) -> Any:
    """Everything that the client and the engine see of a request and that is the same each time."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    for name, file_id in files.items():
        data = data.replace(json.dumps(name).encode(), json.dumps(file_id).encode())
    server.engine.received.clear()
    with mock.patch.object(server.generations, "start", wraps=server.generations.start) as start:
        answer = server.on_loop(server.call_app(place.path, data))
        if answer.status != 200:
            return answer.status, answer.error["param"], answer.error["message"]
        if place.path == BATCHES:
            return _outcome(server, answer.json["id"]) if to_end else (200,)
    requests = [_sent(request) for request in server.engine.requests]
    keys = [call.kwargs["client"] for call in start.call_args_list]
    if answer.headers["content-type"].startswith("text/event-stream"):
        events = answer.content.split(b"\n\n")
        said: Any = [_plain(json.loads(e.split(b"data: ")[1])) for e in events if b"{" in e]
    else:
        said = _plain(answer.json)
    return 200, requests, keys, said


def _sent(request: Any) -> dict[str, Any]:
    fields = {name: getattr(request, name) for name in request.__struct_fields__}
    del fields["request_id"], fields["name"]  # of this request alone
    if request.pooling:
        del fields["seed"]  # its token is not shown
    return fields | {
        "prompt_ids": request.prompt_ids.tolist(),
        "sampling": msgspec.to_builtins(request.sampling, enc_hook=lambda array: array.tolist()),
    }


def _outcome(server: RunningServer, batch_id: str) -> Any:
    """The end of a batch; its times count from its creation."""
    client = server.client()
    wait_for(lambda: client.batches.retrieve(batch_id).status in ("completed", "failed"))
    batch = client.batches.retrieve(batch_id)
    contents, lifetimes = [], []
    for file_id in (batch.output_file_id, batch.error_file_id):
        if file_id is not None:
            lines = client.files.content(file_id).text.splitlines()
            contents.append([_plain(json.loads(each)) for each in lines])
            file = client.files.retrieve(file_id)
            lifetimes.append(file.expires_at and file.expires_at - file.created_at)
    window_s = batch.expires_at - batch.created_at
    return 200, batch.status, batch.metadata, batch.endpoint, window_s, contents, lifetimes


NAMES_AND_TIMES = ("id", "item_id", "request_id", "created", "created_at", "completed_at")


def _plain(value: Any) -> Any:
    """A value without names and times, at any depth."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if not isinstance(value, dict):
        return value
    leave_out = (*NAMES_AND_TIMES, "e2e_latency")
    return {
        name: _plain(each)
        for name, each in value.items()
        if name not in leave_out or isinstance(each, dict) or str(each).endswith("mine")
    }


def body_of(place: Place, fields: Any, around: Any = None) -> Any:
    return {**place.wrap(fields), **(around or {})}


# --- the table is whole ------------------------------------------------------------------------


def schemas_of_the_server() -> set[type[BaseModel]]:
    """Every schema that is read from a client's JSON, but not the bases of others.

    Those of control routes have a table of their own, in ``test_control_routes``.
    """
    found, new = set(), [BaseModel]
    while new:
        schema = new.pop()
        below = [each for each in schema.__subclasses__() if each is not ControlBody]
        new += below
        if not below and schema.__module__.startswith("tokasaurus.server"):
            found.add(schema)
    return found


def test_every_schema_is_in_the_table():
    asked = {schema for operation in OPERATIONS.values() for schema in operation.schemas}
    assert schemas_of_the_server() == set(SCHEMAS)
    assert asked < set(SCHEMAS)


@each_row("name", PLACES)
def test_every_field_is_in_the_table(name):
    assert set(PLACES[name].rows) == PLACES[name].known


@each_row(
    "path, theirs",
    [
        (COMPLETIONS, openai_completion.CompletionCreateParamsBase),
        (CHAT, openai_chat.CompletionCreateParamsBase),
        (RESPONSES, openai_responses.ResponseCreateParamsBase),
        (EMBEDDINGS, openai_embedding.EmbeddingCreateParams),
        (BATCHES, openai_batch.BatchCreateParams),
    ],
)
def test_every_field_of_openai_is_known(path, theirs):
    if path == BATCHES:
        assert set(theirs.__annotations__) <= PLACES["BatchRequest"].known
        return
    (schema,) = OPERATIONS[path].schemas
    assert set(theirs.__annotations__) <= {*schema.model_fields, *schema.harmless}


# --- what is supported -------------------------------------------------------------------------


@every_place
def test_a_field_does_what_the_table_says(everything, files, place):
    def seen(fields, around=None):
        return observe(everything, files, place, body_of(place, fields, around))

    check_each(place.rows, lambda field: check_field(place, field, seen))


def check_field(place: Place, field: str, seen: Callable[..., Any]) -> None:
    row = place.rows[field]
    if isinstance(row, Changes):
        base = {**place.base, **row.beside}
        if field in row.beside:
            del base[field]
        plain, changed = (
            seen(base, row.around),
            seen({**base, field: row.value}, row.around),
        )
        assert changed[0] == 200, changed
        if plain[0] == 200:
            assert plain == seen(base, row.around)  # the change is not by chance
        assert plain != changed
        return
    plain = seen(place.base)
    assert plain[0] == 200, plain
    passes, refused = (
        (row.values, row.refused) if isinstance(row, Passes) else (row.passes, row.value)
    )
    for value in passes:
        assert seen({**place.base, field: value}) == plain
    if refused is not None:
        assert_refused(place, field, seen({**place.base, field: refused}))


def assert_refused(place: Place, field: str, got: Any) -> None:
    """Check for a 400 which names the field."""
    status, param, message = got
    assert status == 400, got
    assert param.split(".")[0] == (place.top or field), got
    assert field in message, got


@every_place
def test_null_is_the_same_as_left_out(everything, files, place):
    def seen(fields):
        return observe(everything, files, place, body_of(place, fields))

    check_each(place.rows, lambda field: check_null(place, field, seen))


def check_null(place: Place, field: str, seen: Callable[..., Any]) -> None:
    row, fields = place.rows[field], dict(place.base)
    fields.pop(field, None)
    if isinstance(row, Changes) and place.base.get(field) is not None and "seed" not in field:
        fields |= {n: v for n, v in row.beside.items() if v is not None and n != field}
    null, out = seen({**fields, field: None}), seen(fields)
    if field in place.required:
        assert_refused(place, field, null)
    if null[0] != 200:
        assert null[:2] == out[:2]
        return
    if "seed" in field or field == "sampling_params":  # without one, each request gets its own
        assert null[1][0].pop("seed") != out[1][0].pop("seed")
        null, out = null[:2], out[:2]
    assert null == out


# --- what is not -------------------------------------------------------------------------------


@every_place
def test_odd_values_work_or_are_refused_by_name(everything, files, place):
    """The status is never 500."""

    def seen(data, **options):
        return observe(everything, files, place, data, **options)

    check_each(place.rows, lambda field: check_odd_values(place, field, seen))
    everything.wait_idle()


def check_odd_values(place: Place, field: str, seen: Callable[..., Any]) -> None:
    row = place.rows[field]
    beside = row.beside if isinstance(row, Changes) else {}
    body = body_of(place, {**place.base, **beside, field: "HERE"}, getattr(row, "around", None))
    template = json.dumps(body)
    assert template.count('"HERE"') == 1
    for value in ODD_VALUES:
        got = seen(template.replace('"HERE"', value).encode(), to_end=False)
        if got[0] != 200:
            # The error may be about the fields beside this one.
            assert got[0] in (400, 404), (value, got)
            assert got[1] is not None, (value, got)
            names = {place.top or field, *beside}
            assert got[1].split(".")[0].split("[")[0] in names, (value, got)
    for value in NO_JSON:
        got = seen(template.replace('"HERE"', value).encode())
        assert got[0] == 400, (value, got)


NUMBERS = [
    (name_of(schema), field)
    for schema, place in SCHEMAS.items()
    for field, info in schema.model_fields.items()
    if field in place.rows and info.annotation in (int | None, float | None, int)
]


@each_row("name, field", NUMBERS)
def test_booleans_and_strings_are_not_numbers(everything, files, name, field):
    place, row = PLACES[name], PLACES[name].rows[field]
    beside = getattr(row, "beside", {})
    for value in (True, False, "1", [1], {"a": 1}):
        body = body_of(place, {**place.base, **beside, field: value})
        assert_refused(place, field, observe(everything, files, place, body))


OF_ANOTHER_TYPE = {"ignore_eos", "stop", "regex", "ebnf", "json_schema"}


@each_row("field", sorted(set(OBJECTS["sampling_params"].rows) - OF_ANOTHER_TYPE))
def test_sampling_params_of_a_wrong_type_are_refused(everything, files, field):
    place = OBJECTS["sampling_params"]
    for value in (True, "1", [[1]]):
        got = observe(everything, files, place, body_of(place, {**place.base, field: value}))
        assert got[:2] == (400, f"sampling_params.{field}")


# These take any object.
TEMPLATE_ARGUMENTS = ("apply_chat_template_overrides", "chat_template_kwargs")
OWN_PLACES = [
    name
    for name, place in PLACES.items()
    if place.path != SYNCHRONOUS and place.top in ("", "sampling_params")
]


@pytest.mark.parametrize("name", OWN_PLACES)
def test_nonsense_is_refused_by_the_name_of_its_field(everything, files, name):
    def seen(body):
        return observe(everything, files, PLACES[name], body)

    check_each(PLACES[name].rows, lambda field: check_nonsense(PLACES[name], field, seen))


def check_nonsense(place: Place, field: str, seen: Callable[..., Any]) -> None:
    base = {**place.base, **getattr(place.rows[field], "beside", {})}
    for wrong in ([[["nonsense"]]], *([] if field in TEMPLATE_ARGUMENTS else [{"type": {}}])):
        assert_refused(place, field, seen(body_of(place, {**base, field: wrong})))


HARMLESS_OF = {
    "sampling_params": _HARMLESS_SAMPLING,
    **{name_of(schema): schema.harmless for schema in SCHEMAS if issubclass(schema, RequestBody)},
}
HARMLESS_OF = {name: fields for name, fields in HARMLESS_OF.items() if fields}


@pytest.mark.parametrize("name", HARMLESS_OF)
def test_an_unsupported_field_passes_where_it_is_harmless(everything, files, name):
    def seen(body):
        return observe(everything, files, PLACES[name], body)

    fields = [field for field in HARMLESS_OF[name] if field not in PLACES[name].known]
    check_each(fields, lambda field: check_harmless(name, field, seen))


def check_harmless(name: str, field: str, seen: Callable[..., Any]) -> None:
    place, values = PLACES[name], HARMLESS_OF[name][field]
    plain = seen(body_of(place, place.base))
    for value in (None, *map(example, values)):
        assert seen(body_of(place, {**place.base, field: value})) == plain
    for value in (
        {"nonsense": 1},
        *(number for number in (0.5, 3) if type(number) not in values),
        *([1, 0] if values and isinstance(values[0], bool) else ()),
    ):
        assert_refused(place, field, seen(body_of(place, {**place.base, field: value})))


@each_row("name", PLACES)
def test_an_unknown_field_is_refused_unless_it_is_null(everything, files, name):
    place = PLACES[name]

    def seen(fields):
        return observe(everything, files, place, body_of(place, fields))

    if place.path != SYNCHRONOUS:
        assert seen({**place.base, "zzz": None}) == seen(place.base)
    body = body_of(place, {**place.base, "zzz": 1})
    assert_refused(place, "zzz", observe(everything, files, place, body))


FROM_CLIENTS = {
    "ignore_eos": True,
    "min_tokens": 0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "seed": 1234,
    "best_of": 1,
    "stop": None,
    "logprobs": None,
    "lora_path": None,
    "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    "logprobs_in_fingerprint": False,
    "logprobs_ignore_temperature": False,
    "cartridges": [],
    "model": "",
}


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_everything_that_real_clients_send_passes_together(everything, path):
    chat_only = {"apply_chat_template_overrides": {}, "ids": None}
    body = {**BASE[path], **FROM_CLIENTS, **(chat_only if path == CHAT else {})}
    assert everything.post(path, body).status == 200


def test_everything_that_sglangs_benchmark_sends_passes(everything):
    body = {
        "text": "the cat",
        "sampling_params": {"temperature": 0.0, "max_new_tokens": 5, "ignore_eos": True},
        "stream": True,
        "lora_path": None,
        "return_logprob": False,
        "return_routed_experts": False,
        "logprob_start_len": -1,
    }
    assert everything.post(GENERATE, body).status == 200
