"""Every field of vLLM's and SGLang's requests is decided on, one by one.

The peers are not installed, so their fields are written down in ``peer_fields``.
"""

from __future__ import annotations

from typing import Any

import pytest
from field_table import BASE, CHAT, COMPLETIONS, DETOKENIZE, EMBEDDINGS, RESPONSES, SGLANG, TOKENIZE
from peer_fields import PEER_REQUESTS, SGLANG_SAMPLING, PeerRequest
from rows import check_each

from tokasaurus.server.protocols.sglang.request import SglangRequest
from tokasaurus.server.protocols.table import OPERATIONS
from tokasaurus.server.routes.tokens import DetokenizeRequest, TokenizeRequest

SCHEMAS = {TOKENIZE: TokenizeRequest, DETOKENIZE: DetokenizeRequest}


def schema_of(peer: PeerRequest) -> Any:
    if peer.path in SCHEMAS:
        return SCHEMAS[peer.path]
    return SglangRequest if "text" in peer.base else OPERATIONS[peer.path].schema


def outcome(server: Any, path: str, body: Any) -> Any:
    """What the engine is asked, and what the client gets without ids and times."""
    server.engine.received.clear()
    answer = server.post(path, body)
    assert answer.status == 200, answer.error
    asked = [
        asked_of(request, with_seed=bool(body.get("seed"))) for request in server.engine.requests
    ]
    said = answer.json
    leave_out = ("id", "created", "created_at", "completed_at", "model", "output", "meta_info")
    return asked, {name: each for name, each in said.items() if name not in leave_out}


def asked_of(request: Any, *, with_seed: bool) -> dict[str, Any]:
    sampling = request.sampling
    fields = {name: getattr(sampling, name) for name in sampling.__struct_fields__}
    fields |= {"prompt_ids": request.prompt_ids, "priority": request.priority}
    fields |= {"seed": request.seed} if with_seed else {}
    return {name: repr(value) for name, value in fields.items()}


@pytest.mark.parametrize("name", PEER_REQUESTS)
def test_a_request_with_every_default_of_a_peer_is_the_plain_request(server, name):
    peer = PEER_REQUESTS[name]
    defaults = {each: value for each, value in peer.defaults.items() if each not in peer.changing}
    plain = outcome(server, peer.path, peer.base)
    assert outcome(server, peer.path, {**defaults, **peer.base}) == plain
    assert server.post(peer.path, {**peer.defaults, **peer.base}).status == 200


@pytest.mark.parametrize("name", PEER_REQUESTS)
def test_every_field_of_a_peer_has_a_decision(server, name):
    peer = PEER_REQUESTS[name]
    schema = schema_of(peer)

    def check(field: str) -> None:
        assert field in schema.model_fields or field in schema.harmless
        if field in schema.model_fields:
            return  # ``test_every_field`` shows what it does
        values = schema.harmless[field]
        for value in (None, *(value for value in values if not isinstance(value, type))):
            assert server.post(peer.path, {**peer.base, field: value}).status == 200, value
        error = server.post(peer.path, {**peer.base, field: {"nonsense": 1}}).error
        assert error["param"] == field
        assert error["message"].startswith(f"{field} is not supported")

    check_each(peer.defaults, check)


def test_every_sampling_parameter_of_sglang_has_a_decision(server):
    plain = outcome(server, "/generate", SGLANG)
    body = {**SGLANG, "sampling_params": {**SGLANG["sampling_params"], **SGLANG_SAMPLING}}
    whole = outcome(server, "/generate", body)
    assert whole == plain


# --- what the served ones do ---------------------------------------------------------------------


def test_a_request_id_is_in_the_answers_id(server):
    for path, ends in ((COMPLETIONS, "cmpl-mine"), (CHAT, "chatcmpl-mine"), (RESPONSES, "mine")):
        body = {**BASE[path], "request_id": "mine"}
        assert server.post(path, body).json["id"] == ends
        stream = server.post(path, {**body, "stream": True}).content
        assert f'"id":"{ends}"'.encode() in stream
    answer = server.post("/generate", {"prompt": "hi", "max_tokens": 2, "request_id": "mine"}).json
    assert answer["id"] == "gen-mine"
    answer = server.post("/generate", {**SGLANG, "request_id": "mine"}).json
    assert answer["meta_info"]["id"] == "mine"
    for wrong in ("", "x" * 513, 7):
        error = server.post(COMPLETIONS, {**BASE[COMPLETIONS], "request_id": wrong}).error
        assert error["param"] == "request_id"


def test_add_special_tokens_is_about_texts(server):
    def prompt(path, **fields):
        server.engine.received.clear()
        assert server.post(path, {**BASE[path], **fields}).status == 200
        return server.engine.requests[0].prompt_ids.tolist()

    for path, name in ((COMPLETIONS, "prompt"), (EMBEDDINGS, "input")):
        with_bos, without = prompt(path), prompt(path, add_special_tokens=False)
        assert with_bos[1:] == without
        assert prompt(path, add_special_tokens=True) == with_bos
        ids = {name: [70, 71]}
        assert prompt(path, **ids, add_special_tokens=False) == [70, 71]


def test_tokenize_tells_the_template_of_the_tools_and_the_effort(server):
    tools = [{"type": "function", "function": {"name": name}} for name in ("first", "second")]
    template = "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}{{ reasoning_effort }}"

    def text(**fields):
        chat = {"messages": [{"role": "user", "content": "hi"}], "chat_template": template}
        answer = server.post(TOKENIZE, {**chat, **fields})
        assert answer.status == 200, answer.error
        return server.post(DETOKENIZE, {"tokens": answer.json["tokens"]}).json["prompt"]

    assert text() == ""
    assert text(tools=tools, reasoning_effort="low") == "first second low"
    assert text(tools=tools, tool_choice="none") == ""
    one = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": tools[1:]}}
    assert text(tools=tools, tool_choice=one) == "second "
    for fields in ({"tools": tools}, {"tool_choice": "required"}, {"reasoning_effort": "low"}):
        error = server.post(TOKENIZE, {"prompt": "hi", **fields}).error
        assert error["param"] == next(iter(fields))


def test_detokenize_leaves_special_tokens_out_if_asked(server):
    tokens = server.post(TOKENIZE, {"prompt": "the cat"}).json["tokens"]
    for skip, text in ((None, "<s>the cat"), (False, "<s>the cat"), (True, "the cat")):
        body = {"tokens": tokens, "skip_special_tokens": skip}
        assert server.post(DETOKENIZE, body).json == {"prompt": text}


def test_a_best_of_that_chooses_nothing_passes(server):
    for number in (1, 3):
        answer = server.post(COMPLETIONS, {**BASE[COMPLETIONS], "n": 3, "best_of": number})
        assert len(answer.json["choices"]) == 3


def test_what_only_tools_of_a_server_would_do_passes(server):
    plain = outcome(server, RESPONSES, BASE[RESPONSES])
    for fields in (
        {"include": ["file_search_call.results", "web_search_call.action.sources"]},
        {"max_tool_calls": 3},
        {"stream_options": {"include_usage": True}},
        {"a_field_of_next_year": None},
    ):
        assert outcome(server, RESPONSES, {**BASE[RESPONSES], **fields}) == plain
    error = server.post(RESPONSES, {**BASE[RESPONSES], "a_field_of_next_year": 1}).error
    assert error["param"] == "a_field_of_next_year"
