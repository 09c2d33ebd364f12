"""The OpenAPI document: what each route reads and answers.

FastAPI sees neither, since the routes read their bodies themselves and write bytes. It contributes
the list of routes; the rest is said here, and tests check every route against it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from tokasaurus.batch.records import Batch, StoredFile

__all__ = ["document_answers"]

_UNUSED_SCHEMAS = ("HTTPValidationError", "ValidationError")  # FastAPI's own errors
_PLACE = "#/components/schemas/{model}"
_JSON = "application/json"
_STREAM = {"text/event-stream": {"schema": {"type": "string"}}}
_STRING, _NUMBER, _INTEGER = {"type": "string"}, {"type": "number"}, {"type": "integer"}
_MAYBE = {"type": ["string", "null"]}
_BOOLEAN = {"type": "boolean"}
_OBJECT = {"type": "object"}


def _object(**properties: Any) -> dict[str, Any]:
    """An object that always has these properties, and may have others."""
    return {"type": "object", "properties": properties, "required": [*properties]}


def _also(schema: Mapping[str, Any], **properties: Any) -> dict[str, Any]:
    """The object, which may have these properties, too."""
    return {**schema, "properties": {**schema["properties"], **properties}}


def _list(items: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _const(value: str) -> dict[str, Any]:
    return {"type": "string", "enum": [value]}


def _reference(name: str) -> dict[str, Any]:
    return {"$ref": _PLACE.format(model=name)}


def _page(items: str) -> dict[str, Any]:
    page = _object(object=_const("list"), data=_list(_reference(items)), has_more=_BOOLEAN)
    return _also(page, first_id=_MAYBE, last_id=_MAYBE)


def _json(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {_JSON: {"schema": schema}}


_IDS = _list(_INTEGER)
_USAGE = _object(prompt_tokens=_INTEGER, total_tokens=_INTEGER)
_SCHEMAS: Mapping[str, Any] = {
    "Error": _object(
        error=_object(message=_STRING, type=_STRING, param=_MAYBE, code=_MAYBE),
    ),
    "Usage": _USAGE,
    "Model": _object(id=_STRING, object=_const("model"), created=_INTEGER, owned_by=_STRING),
    "Completion": _object(
        id=_STRING,
        object=_const("text_completion"),
        created=_INTEGER,
        model=_STRING,
        choices=_list(
            _also(
                _object(index=_INTEGER, text=_STRING, finish_reason=_MAYBE),
                token_ids=_IDS,
                prompt_token_ids=_IDS,
            )
        ),
        usage=_reference("Usage"),
    ),
    "ChatCompletion": _also(
        _object(
            id=_STRING,
            object=_const("chat.completion"),
            created=_INTEGER,
            model=_STRING,
            choices=_list(
                _also(
                    _object(
                        index=_INTEGER,
                        message=_object(role=_STRING, content=_MAYBE),
                        finish_reason=_MAYBE,
                    ),
                    token_ids=_IDS,
                )
            ),
            usage=_reference("Usage"),
        ),
        prompt_token_ids=_IDS,
    ),
    "Embeddings": _object(
        object=_const("list"),
        data=_list(
            _object(
                object=_const("embedding"),
                index=_INTEGER,
                embedding={"anyOf": [_list(_NUMBER), _STRING]},
            )
        ),
        model=_STRING,
        usage=_reference("Usage"),
    ),
    "Response": _object(
        id=_STRING,
        object=_const("response"),
        created_at=_INTEGER,
        model=_STRING,
        status=_STRING,
        output=_list(_OBJECT),
        usage=_object(input_tokens=_INTEGER, output_tokens=_INTEGER, total_tokens=_INTEGER),
    ),
    "Cartridge": _object(
        id=_STRING,
        object=_const("cartridge"),
        source=_STRING,
        uploaded=_BOOLEAN,
        created_at=_INTEGER,
        bytes=_INTEGER,
        tokens=_INTEGER,
        digest=_STRING,
        users=_INTEGER,
        versions=_list(
            _object(
                digest=_STRING,
                current=_BOOLEAN,
                bytes=_INTEGER,
                tokens=_INTEGER,
                frozen_tokens=_INTEGER,
                dtype=_STRING,
                model=_MAYBE,
                users=_INTEGER,
                residence=_object(
                    device=_INTEGER, device_pages=_INTEGER, host=_BOOLEAN, disk=_BOOLEAN
                ),
                requests=_INTEGER,
                hits=_INTEGER,
                loads=_INTEGER,
                evictions=_INTEGER,
                idle_s={"type": ["number", "null"]},
            )
        ),
    ),
    "NativeAnswer": _object(
        id=_STRING,
        text=_STRING,
        output_ids=_IDS,
        prompt_ids=_IDS,
        finish_reason=_MAYBE,
        usage=_reference("Usage"),
    ),
    "SglangAnswer": _object(
        text=_STRING,
        output_ids=_IDS,
        meta_info=_object(id=_STRING, prompt_tokens=_INTEGER, completion_tokens=_INTEGER),
    ),
}
_FLUSHED = _json(
    _object(status=_const("ok"), flushed_pages=_INTEGER, flushed_tokens=_INTEGER),
)
_PAUSED = _json(_object(is_paused={"type": "boolean"}))
_SLEEPING = _json(_object(is_sleeping={"type": "boolean"}))
_STATUS, _ABORTED = _json(_object(status=_STRING)), _json(_object(status=_STRING, aborted=_INTEGER))
_VERSION = _json(_object(weight_version=_STRING, weights_version=_INTEGER))
_SUCCESS = _json(_object(success={"type": "boolean"}, message=_STRING))
_UPDATE = _json(_object(id=_STRING, object=_const("weights.update"), status=_STRING))
_BUCKET = _json(_object(index=_INTEGER, bytes=_INTEGER, sha256=_STRING))
_DROPPED = _json(_object(id=_STRING, object=_const("weights.update"), deleted={"type": "boolean"}))
_CARTRIDGE = _json(_reference("Cartridge"))
_FILE, _BATCH = _json(_reference("File")), _json(_reference("Batch"))
_DELETED = _object(id=_STRING, object=_const("file"), deleted={"type": "boolean"})
_HEALTH = _json(_object(status=_STRING, running=_INTEGER))
_CHATS = _list(_reference("ChatCompletion"))
_COMPLETION = {**_json(_reference("Completion")), **_STREAM}
_CHAT = {**_json(_reference("ChatCompletion")), **_STREAM}
_MANY_CHATS = {**_json(_CHATS), "application/msgpack": {"schema": _CHATS}}

_ANSWERS: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("get", "/ping"): _json(_object(message=_const("pong"))),
    ("get", "/health"): _HEALTH,
    ("get", "/version"): _json(_object(version=_STRING)),
    ("get", "/metrics"): {"text/plain": {"schema": _STRING}},
    ("get", "/v1/models"): _json(_object(object=_const("list"), data=_list(_reference("Model")))),
    ("get", "/v1/models/{model_id}"): _json(_reference("Model")),
    ("post", "/v1/completions"): _COMPLETION,
    ("post", "/v1/chat/completions"): _CHAT,
    ("post", "/custom/cartridge/completions"): _COMPLETION,
    ("post", "/v1/cartridge/completions"): _COMPLETION,
    ("post", "/custom/cartridge/chat/completions"): _CHAT,
    ("post", "/v1/cartridge/chat/completions"): _CHAT,
    ("post", "/batch/cartridge/chat/completions"): {
        **_json({"anyOf": [_reference("ChatCompletion"), _CHATS]}),
        **_STREAM,
        "application/msgpack": {"schema": _CHATS},
    },
    ("post", "/v1/responses"): {**_json(_reference("Response")), **_STREAM},
    ("post", "/v1/embeddings"): _json(_reference("Embeddings")),
    ("post", "/generate"): {
        **_json(
            {
                "anyOf": [
                    _reference("NativeAnswer"),
                    _reference("SglangAnswer"),
                    _list(_reference("SglangAnswer")),
                ]
            }
        ),
        **_STREAM,
    },
    ("post", "/custom/synchronous-batch-completions"): _MANY_CHATS,
    ("post", "/custom/cartridge/synchronous-batch-completions"): _MANY_CHATS,
    ("get", "/v1/files"): _json(_page("File")),
    ("post", "/v1/files"): _FILE,
    ("get", "/v1/files/{file_id}"): _FILE,
    ("delete", "/v1/files/{file_id}"): _json(_DELETED),
    ("get", "/v1/files/{file_id}/content"): {"application/octet-stream": {"schema": _STRING}},
    ("get", "/v1/cartridges"): _json(
        _object(object=_const("list"), data=_list(_reference("Cartridge")))
    ),
    ("post", "/v1/cartridges"): _CARTRIDGE,
    ("get", "/v1/cartridges/{cartridge_id}"): _CARTRIDGE,
    ("delete", "/v1/cartridges/{cartridge_id}"): _json(
        _object(id=_STRING, object=_const("cartridge"), deleted=_BOOLEAN)
    ),
    ("get", "/v1/batches"): _json(_page("Batch")),
    ("post", "/v1/batches"): _BATCH,
    ("get", "/v1/batches/{batch_id}"): _BATCH,
    ("post", "/v1/batches/{batch_id}/cancel"): _BATCH,
    ("post", "/tokenize"): _json(_object(count=_INTEGER, max_model_len=_INTEGER, tokens=_IDS)),
    ("post", "/detokenize"): _json(_object(prompt=_STRING)),
    ("get", "/tokenizer_info"): _json(_object(tokenizer_class=_STRING, vocab_size=_INTEGER)),
    ("post", "/flush_cache"): _FLUSHED,
    ("post", "/reset_prefix_cache"): _FLUSHED,
    ("post", "/pause"): _STATUS,
    ("post", "/resume"): _STATUS,
    ("get", "/is_paused"): _PAUSED,
    ("post", "/pause_generation"): _STATUS,
    ("post", "/continue_generation"): _STATUS,
    ("post", "/abort_request"): _ABORTED,
    ("post", "/abort_requests"): _ABORTED,
    ("post", "/sleep"): _STATUS,
    ("post", "/wake_up"): _STATUS,
    ("get", "/is_sleeping"): _SLEEPING,
    ("post", "/release_memory_occupation"): _STATUS,
    ("post", "/resume_memory_occupation"): _STATUS,
    ("post", "/update_weights_from_disk"): _SUCCESS,
    ("post", "/update_weights_from_tensor"): _STATUS,
    ("post", "/update_weights_from_distributed"): _SUCCESS,
    ("post", "/init_weights_update_group"): _SUCCESS,
    ("post", "/destroy_weights_update_group"): _SUCCESS,
    ("post", "/init_weight_transfer_engine"): _json(_object(message=_STRING)),
    ("post", "/shutdown_weight_transfer_engine"): _json(_object(message=_STRING)),
    ("post", "/start_weight_update"): _json(_object(message=_STRING)),
    ("post", "/update_weights"): _json(_object(message=_STRING)),
    ("post", "/finish_weight_update"): _json(_object(message=_STRING)),
    ("get", "/get_world_size"): _json(_object(world_size=_INTEGER)),
    ("post", "/update_weights_from_ipc"): _STATUS,
    ("post", "/update_weight_version"): _SUCCESS,
    ("get", "/weight_info"): _VERSION,
    ("get", "/get_weight_version"): _VERSION,
    ("post", "/v1/weights/updates"): _UPDATE,
    ("get", "/v1/weights/updates/{update_id}"): _UPDATE,
    ("delete", "/v1/weights/updates/{update_id}"): _DROPPED,
    ("put", "/v1/weights/updates/{update_id}/buckets/{number}"): _BUCKET,
    ("post", "/v1/weights/updates/{update_id}/commit"): _UPDATE,
    ("get", "/model_info"): _json(_object(model_path=_STRING, max_model_len=_INTEGER)),
    ("get", "/v1/engine"): _json(_object(status=_STRING, requests=_list(_OBJECT))),
    ("post", "/v1/engine/requests/{request_id}/cancel"): _json(
        _object(id=_STRING, cancelled=_BOOLEAN)
    ),
    ("get", "/server_info"): _json(_object(version=_STRING, status=_STRING)),
}


def _query(name: str, what: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "description": what, "schema": schema}


_AFTER = _query("after", "The id that the page before ended with.", _STRING)
_SOURCE = _query(
    "source",
    "Of the cartridge; default local.",
    {"type": "string", "enum": ["local", "wandb", "huggingface", "s3", "http"]},
)
_MODE = _query(
    "mode",
    "abort (default) ends all requests with the tokens that they have, wait lets those that have"
    " begun finish, keep lets all go on afterwards.",
    {"type": "string", "enum": ["abort", "wait", "keep"]},
)
_PARAMETERS: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]] = {
    ("get", "/v1/files"): (
        _query("purpose", "Of the files.", _STRING),
        _query("limit", "Files of a page.", {**_INTEGER, "minimum": 1, "maximum": 10_000}),
        _query("order", "By age.", {"type": "string", "enum": ["desc", "asc"]}),
        _AFTER,
    ),
    ("get", "/v1/cartridges/{cartridge_id}"): (_SOURCE,),
    ("delete", "/v1/cartridges/{cartridge_id}"): (
        _SOURCE,
        _query("force", "Delete it even if requests use it, which finish with it.", _BOOLEAN),
    ),
    ("post", "/pause"): (
        _MODE,
        _query("clear_cache", "Drop all cached pages, too; default true.", _BOOLEAN),
        _query("wait_for_inflight_requests", "The same as mode=wait.", _BOOLEAN),
    ),
    ("post", "/sleep"): (
        _query(
            "level",
            "0 only pauses; 1 and 2 release the memory. Default 1.",
            {**_INTEGER, "minimum": 0, "maximum": 2},
        ),
        _MODE,
    ),
    ("post", "/wake_up"): (
        _query(
            "tags",
            "What to restore, once for each; default all.",
            _list({"type": "string", "enum": ["weights", "kv_cache", "scheduling"]}),
        ),
    ),
    ("get", "/get_world_size"): (
        _query("include_dp", "Count the workers of all replicas; default true.", _BOOLEAN),
    ),
    ("get", "/v1/batches"): (
        _query("limit", "Batches of a page.", {**_INTEGER, "minimum": 1, "maximum": 100}),
        _AFTER,
    ),
}


def document_answers(app: FastAPI, bodies: Sequence[type[BaseModel]]) -> None:
    """Completes the OpenAPI document of an application.

    Args:
        app: with its routes.
        bodies: the schemas of requests that the routes refer to.
    """
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = generate()
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            for name in _UNUSED_SCHEMAS:
                schemas.pop(name, None)
            schemas.update(_schemas(bodies))
            for path, operations in document["paths"].items():
                for method, operation in operations.items():
                    _complete(operation, (method, path))
        return generate()

    app.openapi = openapi  # type: ignore[method-assign]


def _schemas(bodies: Sequence[type[BaseModel]]) -> dict[str, Any]:
    _, read = models_json_schema([(schema, "validation") for schema in bodies], ref_template=_PLACE)
    _, stored = msgspec.json.schema_components(
        [StoredFile, Batch], ref_template=_PLACE.replace("model", "name")
    )
    return {**read["$defs"], **stored, "File": stored["StoredFile"], **_SCHEMAS}


def _complete(operation: dict[str, Any], key: tuple[str, str]) -> None:
    operation["responses"] = {
        "200": {"description": "The answer.", "content": _ANSWERS[key]},
        "default": {
            "description": "What is wrong: with the request (4xx), or with the engine (5xx).",
            "content": _json(_reference("Error")),
        },
    }
    if key == ("get", "/health"):
        operation["responses"]["503"] = {"description": "Not now.", "content": _HEALTH}
    if key in _PARAMETERS:
        operation.setdefault("parameters", []).extend(_PARAMETERS[key])
