"""What each field of each request does, for ``test_every_field``. A new field needs a row here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from tokasaurus.server.operations import cartridges, schemas
from tokasaurus.server.protocols import embeddings, native
from tokasaurus.server.protocols.chat import messages, reasoning
from tokasaurus.server.protocols.chat import request as chat
from tokasaurus.server.protocols.completions import request as completions
from tokasaurus.server.protocols.responses import items as response_items
from tokasaurus.server.protocols.responses import request as responses
from tokasaurus.server.protocols.sglang import request as sglang
from tokasaurus.server.protocols.tools import request as tools
from tokasaurus.server.routes import batches as batch_routes
from tokasaurus.server.routes import tokens
from tokasaurus.text import structured_output as grammar


@dataclass(frozen=True)
class Changes:
    """The field is supported: it changes what the engine is asked or what the client is answered.

    Args:
        value: differs from the base's.
        beside: other fields that the object needs for the change to show.
        around: other fields that the whole body needs.
    """

    value: Any
    beside: Mapping[str, Any] = field(default_factory=dict)
    around: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Passes:
    """The field is accepted and changes nothing.

    Args:
        values: are accepted.
        why: the reason not to refuse them.
        refused: a value that is refused by name, if there is one.
    """

    values: tuple[Any, ...]
    why: str
    refused: Any = None


@dataclass(frozen=True)
class Refused:
    """The field is in the schema only to be refused by name, with a reason."""

    value: Any
    passes: tuple[Any, ...] = ()


Row: TypeAlias = Changes | Passes | Refused


@dataclass(frozen=True)
class Place:
    """An object in requests.

    Args:
        path: of a route that takes the object.
        base: fields that the object always has, among them the required ones.
        rows: by field.
        wrap: makes a whole body of the object.
        top: the body's field that contains the object; "" if the object is the body.
        known: the object's fields, as the code has them.
        required: known fields that may neither be left out nor be null.
    """

    path: str
    base: Mapping[str, Any]
    rows: Mapping[str, Row]
    known: frozenset[str]
    required: frozenset[str] = frozenset()
    wrap: Callable[[Any], Any] = lambda fields: fields
    top: str = ""


COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
GENERATE, EMBEDDINGS = "/generate", "/v1/embeddings"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
SYNCHRONOUS, BATCHES = "/custom/synchronous-batch-completions", "/v1/batches"

USER = {"role": "user", "content": "the cat"}
BASE: Mapping[str, Mapping[str, Any]] = {
    COMPLETIONS: {"prompt": "the cat", "seed": 1, "max_tokens": 12},
    CHAT: {"messages": [USER], "seed": 1, "max_tokens": 12},
    RESPONSES: {"input": "the cat", "seed": 1, "max_output_tokens": 12},
    GENERATE: {"prompt": "the cat", "seed": 1, "max_tokens": 12},
    EMBEDDINGS: {"input": "the cat"},
}
SGLANG = {"text": "the cat", "sampling_params": {"sampling_seed": 1, "max_new_tokens": 12}}

TOOL = {"type": "function", "function": {"name": "f"}}
OTHER_TOOL = {"type": "function", "function": {"name": "g", "description": "does"}}
FLAT_TOOL = {"type": "function", "name": "f"}
CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
# A template that shows everything it is given.
SHOWS_ALL = {"chat_template_kwargs": {"chat_template": "{{ messages }}{{ tools }}<tool_call>"}}
SHOWS_EFFORT = {
    "chat_template_kwargs": {"chat_template": "effort {{ enable_thinking }}{{ reasoning_effort }}"}
}
TOKENIZED = {"prompt": None, "messages": [USER], **SHOWS_ALL}
ONE_MODEL = "there is one model, by any name"
ONE_KIND = "there is only one kind"
NAMED = {"type": "function", "function": {"name": "f"}}
OTHER_NAMED = {"type": "function", "function": {"name": "g"}}
CACHE_HINT = "a hint for the cache, which needs none"
COMES_BACK = "clients send parts of answers back unchanged"

CARTRIDGE = {"id": "notes", "source": "local"}
"""The servers of tests that read this table have it, another one of the source s3, and "more"."""

FORMS: Mapping[str, Row] = {
    "response_format": Changes({"type": "json_object"}),
    "structured_outputs": Changes({"regex": "[a-z]+"}),
    "guided_json": Changes({"type": "integer"}),
    "guided_regex": Changes("[a-z]+"),
    "guided_choice": Changes(["a", "b"]),
    "guided_grammar": Changes('start: "a"'),
    "json_schema": Changes({"type": "integer"}),
    "regex": Changes("[a-z]+"),
    "ebnf": Changes('root ::= "a"'),
}
GENERATION: Mapping[str, Row] = {
    **FORMS,
    "cartridges": Changes([CARTRIDGE]),
    "model": Changes("other"),
    "n": Changes(3),
    "temperature": Changes(0.25),
    "top_p": Changes(0.5),
    "top_k": Changes(5),
    "min_p": Changes(0.5),
    "seed": Changes(2),
    "stop": Changes(["a", "b"]),
    "ignore_eos": Changes(True),
    "stop_token_ids": Changes([70, 71]),
    "min_tokens": Changes(3),
    "frequency_penalty": Changes(-0.5),
    "presence_penalty": Changes(0.5),
    "repetition_penalty": Changes(1.1),
    "logit_bias": Changes({"70": -100, "71": 2.5}),
    "bad_words": Changes(["cat"]),
    "max_tokens": Changes(5),
    "prompt_logprobs": Changes(2),
    "logprobs_mode": Changes("raw"),
    "logprobs_ignore_temperature": Changes(True),
    "logprobs_in_fingerprint": Changes(True),
    "priority": Changes(-5),
    "first_k": Changes(1, {"n": 3}),
    "return_token_ids": Changes(True),
    "return_weights_versions": Changes(True),
    "receipt": Changes(True),
    "stream": Changes(True),
    "stream_options": Changes({"include_usage": True}, {"stream": True}),
    "user": Changes("somebody"),
    "request_id": Changes("mine"),
    "metadata": Changes({"run": "7"}),
    "service_tier": Changes("flex"),
}


def known(schema: Any) -> frozenset[str]:
    """The fields of a schema, as clients spell them."""
    return frozenset(each.alias or name for name, each in schema.model_fields.items())


def required(schema: Any) -> frozenset[str]:
    fields = schema.model_fields.items()
    return frozenset(each.alias or name for name, each in fields if each.is_required())


def of(schema: Any, path: str, base: Any, rows: Any, wrap: Any = None, top: str = "") -> Place:
    wrap = wrap or (lambda fields: fields)
    return Place(path, base, rows, known(schema), required(schema), wrap, top)


def example(harmless: Any) -> Any:
    """A value that passes; a type stands for all its values."""
    return (
        {str: "anything", int: 7, float: 1.5}[harmless] if isinstance(harmless, type) else harmless
    )


def without_null(fields: Any) -> Any:
    """The fields that are not null; null if none is left, since an empty object is refused."""
    return {name: value for name, value in fields.items() if value is not None} or None


def in_chat(**fields: Any) -> dict[str, Any]:
    return {**BASE[CHAT], **SHOWS_ALL, **fields}


SCHEMAS: Mapping[Any, Place] = {
    completions.CompletionRequest: of(
        completions.CompletionRequest,
        COMPLETIONS,
        BASE[COMPLETIONS],
        {
            **GENERATION,
            "prompt": Changes("the dog"),
            "logprobs": Changes(3),
            "echo": Changes(True),
            "add_special_tokens": Changes(False),
            "best_of": Refused(2, (1,)),
        },
    ),
    schemas.StreamOptions: of(
        schemas.StreamOptions,
        COMPLETIONS,
        {},
        {
            "include_usage": Changes(True),
            "continuous_usage_stats": Changes(True),
            "include_obfuscation": Refused(True, (False,)),
        },
        lambda fields: {**BASE[COMPLETIONS], "stream": True, "stream_options": fields},
        "stream_options",
    ),
    cartridges.CartridgeReference: of(
        cartridges.CartridgeReference,
        COMPLETIONS,
        CARTRIDGE,
        {
            "id": Changes("more"),
            "source": Changes("s3"),
            "force_redownload": Passes((True, False), "the source has no other version"),
        },
        lambda fields: {**BASE[COMPLETIONS], "cartridges": [fields]},
        "cartridges",
    ),
    chat.ChatRequest: of(
        chat.ChatRequest,
        CHAT,
        BASE[CHAT],
        {
            **GENERATION,
            "messages": Changes([{**USER, "content": "the dog"}]),
            "ids": Changes([70, 71, 72], {"messages": None}),
            "logprobs": Changes(True),
            "top_logprobs": Changes(3, {"logprobs": True}),
            "max_completion_tokens": Changes(5, {"max_tokens": None}),
            "apply_chat_template_overrides": Changes({"shout": True}),
            "chat_template_kwargs": Changes({"shout": True}),
            "add_generation_prompt": Changes(False),
            "continue_final_message": Changes(
                True, {"messages": [{**USER, "role": "assistant"}, USER]}
            ),
            "reasoning_effort": Changes("none", SHOWS_EFFORT),
            "reasoning": Changes({"effort": "low"}, SHOWS_EFFORT),
            "tools": Changes([TOOL], SHOWS_ALL),
            "tool_choice": Changes("none", {"tools": [TOOL], **SHOWS_ALL}),
            "parallel_tool_calls": Changes(
                False, {"tools": [TOOL], "tool_choice": "required", **SHOWS_ALL}
            ),
        },
    ),
    messages.ChatMessage: of(
        messages.ChatMessage,
        CHAT,
        USER,
        {
            "role": Changes("system"),
            "content": Changes("the dog"),
            "name": Changes("Ann"),
            "tool_calls": Changes([CALL]),
            "tool_call_id": Changes("call_1"),
            "reasoning_content": Changes("hm"),
            "reasoning": Changes("hm"),
            "refusal": Changes("No."),
            "type": Passes((None, "text"), "lm-evaluation-harness sends it before 0.4.12", "image"),
            "parsed": Passes((None, {"a": 1}), COMES_BACK),
        },
        lambda fields: in_chat(messages=[fields]),
        "messages",
    ),
    messages.TextPart: of(
        messages.TextPart,
        CHAT,
        {"type": "text", "text": "the cat"},
        {
            "type": Passes(("text",), ONE_KIND, "image_url"),
            "text": Changes("the dog"),
            "cache_control": Passes(({"type": "ephemeral"},), CACHE_HINT, "ephemeral"),
            "prompt_cache_breakpoint": Passes(({"mode": "explicit"},), CACHE_HINT, "explicit"),
        },
        lambda fields: in_chat(messages=[{"role": "user", "content": [fields]}]),
        "messages",
    ),
    messages.RefusalPart: of(
        messages.RefusalPart,
        CHAT,
        {"type": "refusal", "refusal": "No."},
        {"type": Passes(("refusal",), ONE_KIND, "image_url"), "refusal": Changes("Never.")},
        lambda fields: in_chat(messages=[{"role": "assistant", "content": [fields]}, USER]),
        "messages",
    ),
    tools.ToolCall: of(
        tools.ToolCall,
        CHAT,
        CALL,
        {
            "id": Changes("call_1"),
            "type": Passes(("function",), ONE_KIND, "custom"),
            "function": Changes({"name": "g", "arguments": {}}),
            "index": Passes((0, 3), COMES_BACK),
        },
        lambda fields: in_chat(messages=[{"role": "assistant", "tool_calls": [fields]}, USER]),
        "messages",
    ),
    tools._CalledFunction: of(
        tools._CalledFunction,
        CHAT,
        CALL["function"],
        {
            "name": Changes("g"),
            "arguments": Changes({"a": 1}),
            "parsed_arguments": Passes((None, {"a": 1}), COMES_BACK),
        },
        lambda fields: in_chat(
            messages=[{"role": "assistant", "tool_calls": [{**CALL, "function": fields}]}, USER]
        ),
        "messages",
    ),
    tools.Tool: of(
        tools.Tool,
        CHAT,
        TOOL,
        {
            "type": Passes(("function",), ONE_KIND, "custom"),
            "function": Changes({"name": "g"}),
        },
        lambda fields: in_chat(tools=[fields]),
        "tools",
    ),
    tools.Function: of(
        tools.Function,
        CHAT,
        TOOL["function"],
        {
            "name": Changes("g"),
            "description": Changes("does"),
            "parameters": Changes({"type": "object", "properties": {"a": {"type": "integer"}}}),
            "strict": Passes((True, False), "enforced calls follow their schema in any case"),
        },
        lambda fields: in_chat(tools=[{"type": "function", "function": fields}]),
        "tools",
    ),
    tools.ToolChoice: of(
        tools.ToolChoice,
        CHAT,
        {"type": "function", "function": {"name": "f"}},
        {
            "type": Passes(("function",), ONE_KIND, "custom"),
            "function": Changes({"name": "g"}),
        },
        lambda fields: in_chat(tools=[TOOL, OTHER_TOOL], tool_choice=fields),
        "tool_choice",
    ),
    tools._FunctionName: of(
        tools._FunctionName,
        CHAT,
        {"name": "f"},
        {"name": Changes("g")},
        lambda fields: in_chat(
            tools=[TOOL, OTHER_TOOL], tool_choice={"type": "function", "function": fields}
        ),
        "tool_choice",
    ),
    tools.AllowedTools: of(
        tools.AllowedTools,
        CHAT,
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}},
        {
            "type": Passes(("allowed_tools",), ONE_KIND, "custom"),
            "allowed_tools": Changes({"mode": "required", "tools": [NAMED]}),
        },
        lambda fields: in_chat(tools=[TOOL, OTHER_TOOL], tool_choice=fields),
        "tool_choice",
    ),
    tools._AllowedFunctions: of(
        tools._AllowedFunctions,
        CHAT,
        {"mode": "auto", "tools": [NAMED]},
        {"mode": Changes("required"), "tools": Changes([NAMED, OTHER_NAMED])},
        lambda fields: in_chat(
            tools=[TOOL, OTHER_TOOL],
            tool_choice={"type": "allowed_tools", "allowed_tools": fields},
        ),
        "tool_choice",
    ),
    responses.ResponsesRequest: of(
        responses.ResponsesRequest,
        RESPONSES,
        BASE[RESPONSES],
        {
            **GENERATION,
            "n": Refused(2, (1,)),
            "first_k": Refused(1),
            "return_token_ids": Refused(True, (False,)),
            "return_weights_versions": Refused(True),
            "max_tokens": Refused(5),
            "logprobs_in_fingerprint": Refused(True),
            "prompt_logprobs": Refused(2),
            "response_format": Refused({"type": "json_object"}),
            "stream_options": Refused(
                {"continuous_usage_stats": True}, ({"include_usage": True}, {})
            ),
            "input": Changes("the dog"),
            "instructions": Changes("Be brief."),
            "max_output_tokens": Changes(5),
            "text": Changes({"format": {"type": "json_object"}}),
            "include": Changes(["message.output_text.logprobs"]),
            "top_logprobs": Changes(2, {"include": ["message.output_text.logprobs"]}),
            "tools": Changes([FLAT_TOOL], SHOWS_ALL),
            "tool_choice": Changes("none", {"tools": [FLAT_TOOL], **SHOWS_ALL}),
            "parallel_tool_calls": Changes(False),
            "chat_template_kwargs": Changes({"shout": True}),
            "reasoning": Changes({"effort": "low"}),
        },
    ),
    reasoning.Reasoning: of(
        reasoning.Reasoning,
        RESPONSES,
        {},
        {
            "effort": Changes("high"),
            "summary": Refused("detailed", ("auto",)),
            "generate_summary": Refused("concise", ("auto",)),
            "context": Refused("all_turns", ("auto",)),
            "mode": Refused("pro", ("standard",)),
        },
        lambda fields: {**BASE[RESPONSES], "reasoning": fields},
        "reasoning",
    ),
    response_items.FunctionTool: of(
        response_items.FunctionTool,
        RESPONSES,
        FLAT_TOOL,
        {
            "type": Passes(("function",), ONE_KIND, "web_search"),
            "name": Changes("g"),
            "description": Changes("does"),
            "parameters": Changes({"type": "object", "properties": {"a": {"type": "integer"}}}),
            "strict": Changes(True),
        },
        lambda fields: {**BASE[RESPONSES], **SHOWS_ALL, "tools": [fields]},
        "tools",
    ),
    response_items.FunctionChoice: of(
        response_items.FunctionChoice,
        RESPONSES,
        {"type": "function", "name": "f"},
        {"type": Passes(("function",), ONE_KIND, "web_search"), "name": Changes("g")},
        lambda fields: {
            **BASE[RESPONSES],
            **SHOWS_ALL,
            "tools": [FLAT_TOOL, {**FLAT_TOOL, "name": "g"}],
            "tool_choice": fields,
        },
        "tool_choice",
    ),
    response_items.AllowedFunctions: of(
        response_items.AllowedFunctions,
        RESPONSES,
        {"type": "allowed_tools", "mode": "auto", "tools": [FLAT_TOOL]},
        {
            "type": Passes(("allowed_tools",), ONE_KIND, "web_search"),
            "mode": Changes("required"),
            "tools": Changes([FLAT_TOOL, {**FLAT_TOOL, "name": "g"}]),
        },
        lambda fields: {
            **BASE[RESPONSES],
            **SHOWS_ALL,
            "tools": [FLAT_TOOL, {**FLAT_TOOL, "name": "g"}],
            "tool_choice": fields,
        },
        "tool_choice",
    ),
    response_items.FunctionCall: of(
        response_items.FunctionCall,
        RESPONSES,
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {
            "type": Passes(("function_call",), ONE_KIND, "web_search_call"),
            "call_id": Changes("d"),
            "name": Changes("g"),
            "arguments": Changes('{"a": 1}'),
            "id": Passes(("fc_1",), COMES_BACK),
            "status": Passes(("completed",), COMES_BACK),
        },
        lambda fields: {**BASE[RESPONSES], **SHOWS_ALL, "input": [USER, fields, USER]},
        "input",
    ),
    response_items.CallOutput: of(
        response_items.CallOutput,
        RESPONSES,
        {"type": "function_call_output", "call_id": "c", "output": "rain"},
        {
            "type": Passes(("function_call_output",), ONE_KIND, "shell_call_output"),
            "call_id": Changes("d"),
            "output": Changes([{"type": "input_text", "text": "sun"}]),
            "id": Passes(("fco_1",), COMES_BACK),
            "status": Passes(("completed",), COMES_BACK),
        },
        lambda fields: {**BASE[RESPONSES], **SHOWS_ALL, "input": [USER, fields]},
        "input",
    ),
    response_items.ReasoningItem: of(
        response_items.ReasoningItem,
        RESPONSES,
        {"type": "reasoning"},
        {
            "type": Passes(("reasoning",), ONE_KIND, "compaction"),
            "content": Changes([{"type": "reasoning_text", "text": "hm"}]),
            "summary": Passes(([],), COMES_BACK, [{}]),
            "encrypted_content": Refused("gAAAA"),
            "id": Passes(("rs_1",), COMES_BACK),
            "status": Passes(("completed",), COMES_BACK),
        },
        lambda fields: {**BASE[RESPONSES], **SHOWS_ALL, "input": [USER, fields, USER]},
        "input",
    ),
    response_items.ReasoningText: of(
        response_items.ReasoningText,
        RESPONSES,
        {"type": "reasoning_text", "text": "hm"},
        {
            "type": Passes(("reasoning_text",), ONE_KIND, "summary_text"),
            "text": Changes("oh"),
        },
        lambda fields: {
            **BASE[RESPONSES],
            **SHOWS_ALL,
            "input": [USER, {"type": "reasoning", "content": [fields]}, USER],
        },
        "input",
    ),
    response_items.InputMessage: of(
        response_items.InputMessage,
        RESPONSES,
        USER,
        {
            "role": Changes("system"),
            "content": Changes("the dog"),
            "type": Passes(("message",), ONE_KIND, "function_call"),
            "id": Passes(("msg_1",), COMES_BACK),
            "status": Passes(("completed",), COMES_BACK),
            "phase": Passes(("final_answer",), COMES_BACK),
        },
        lambda fields: {**BASE[RESPONSES], "input": [fields]},
        "input",
    ),
    response_items.InputText: of(
        response_items.InputText,
        RESPONSES,
        {"type": "input_text", "text": "the cat"},
        {
            "type": Passes(("output_text",), COMES_BACK, "input_image"),
            "text": Changes("the dog"),
            "annotations": Passes(([],), COMES_BACK, [{}]),
            "logprobs": Passes(([], [{}]), COMES_BACK),
            "cache_control": Passes(({"type": "ephemeral"},), CACHE_HINT, "ephemeral"),
            "prompt_cache_breakpoint": Passes(({"mode": "explicit"},), CACHE_HINT, "explicit"),
        },
        lambda fields: {**BASE[RESPONSES], "input": [{"role": "user", "content": [fields]}]},
        "input",
    ),
    responses.TextOptions: of(
        responses.TextOptions,
        RESPONSES,
        {},
        {"format": Changes({"type": "json_object"}), "verbosity": Refused("low", ("medium",))},
        lambda fields: {**BASE[RESPONSES], "text": fields},
        "text",
    ),
    responses.TextFormat: of(
        responses.TextFormat,
        RESPONSES,
        {"type": "json_schema", "schema": {"type": "object"}},
        {
            "type": Changes("json_object", {"schema": None}),
            "schema": Changes({"type": "integer"}),
            "name": Changes("other"),
            "description": Changes("of a thing"),
            "strict": Changes(True),
        },
        lambda fields: {**BASE[RESPONSES], "text": {"format": fields}},
        "text",
    ),
    native.NativeRequest: of(
        native.NativeRequest,
        GENERATE,
        BASE[GENERATE],
        {
            **GENERATION,
            "return_token_ids": Refused(True, (False,)),
            "logprobs_in_fingerprint": Refused(True, (False,)),
            "stream_options": Refused({"include_usage": True}),
            "prompt": Changes("the dog"),
            "system": Changes("Be brief."),
            "logprobs": Changes(2),
        },
    ),
    sglang.SglangRequest: of(
        sglang.SglangRequest,
        GENERATE,
        SGLANG,
        {
            "text": Changes("the dog"),
            "input_ids": Changes([70, 71], {"text": None}),
            "sampling_params": Changes({"sampling_seed": 2}),
            "return_logprob": Changes(True),
            "logprob_start_len": Changes(0, {"return_logprob": True}),
            "top_logprobs_num": Changes(2, {"return_logprob": True}),
            "return_text_in_logprobs": Changes(True, {"return_logprob": True}),
            "stream": Changes(True),
            "rid": Changes("mine", {"text": ["the cat"]}),
            "request_id": Changes("mine"),
            "user": Changes("somebody"),
        },
    ),
    embeddings.EmbeddingRequest: of(
        embeddings.EmbeddingRequest,
        EMBEDDINGS,
        BASE[EMBEDDINGS],
        {
            "input": Changes("the dog"),
            "add_special_tokens": Changes(False),
            "request_id": Passes(("mine",), "it names the request for /abort_requests", ""),
            "model": Changes("other"),
            "encoding_format": Changes("base64"),
            "dimensions": Changes(4),
            "pooling": Changes("last"),
            "priority": Changes(-5),
            "user": Changes("somebody"),
        },
    ),
    tokens.TokenizeRequest: of(
        tokens.TokenizeRequest,
        TOKENIZE,
        {"prompt": "the cat"},
        {
            "model": Passes(("other",), ONE_MODEL),
            "prompt": Changes("the dog"),
            "messages": Changes([USER], {"prompt": None}),
            "add_special_tokens": Changes(False),
            "return_token_strs": Changes(True),
            **{
                name: Changes(value, {"prompt": None, "messages": [USER]})
                for name, value in (
                    ("add_generation_prompt", False),
                    ("continue_final_message", True),
                    ("chat_template", "{{ messages }}"),
                    ("chat_template_kwargs", {"shout": True}),
                )
            },
            "tools": Changes([TOOL], TOKENIZED),
            "tool_choice": Changes("none", {**TOKENIZED, "tools": [TOOL]}),
            "reasoning_effort": Changes("low", {**TOKENIZED, **SHOWS_EFFORT}),
        },
    ),
    tokens.DetokenizeRequest: of(
        tokens.DetokenizeRequest,
        DETOKENIZE,
        {"tokens": [70]},
        {
            "model": Passes(("other",), ONE_MODEL),
            "tokens": Changes([71]),
            "skip_special_tokens": Changes(True, {"tokens": [0, 1, 2, 3, 70]}),
        },
    ),
    batch_routes.BatchRequest: of(
        batch_routes.BatchRequest,
        BATCHES,
        {"input_file_id": "FILE", "endpoint": COMPLETIONS, "completion_window": "24h"},
        {
            "input_file_id": Changes("OTHER FILE"),
            "endpoint": Changes(CHAT),
            "completion_window": Changes("7d"),
            "metadata": Changes({"run": "7"}),
            "output_expires_after": Changes({"anchor": "created_at", "seconds": 1000}),
        },
    ),
    batch_routes.OutputExpiresAfter: of(
        batch_routes.OutputExpiresAfter,
        BATCHES,
        {"anchor": "created_at", "seconds": 1000},
        {"anchor": Passes(("created_at",), ONE_KIND, "started_at"), "seconds": Changes(2000)},
        lambda fields: {
            "input_file_id": "FILE",
            "endpoint": COMPLETIONS,
            "output_expires_after": fields,
        },
        "output_expires_after",
    ),
}
"""Objects that a schema describes."""

SAMPLING: Mapping[str, Row] = {
    name: GENERATION[each.name]
    for name, each in sglang.SAMPLING_FIELDS.items()
    if each.name in GENERATION and each.name != grammar.FIELD
}
OBJECTS: Mapping[str, Place] = {
    "sampling_params": Place(
        GENERATE,
        SGLANG["sampling_params"],
        {
            **SAMPLING,
            "json_schema": Changes('{"type": "integer"}'),
            "regex": Changes("[a-z]+"),
            "ebnf": Changes('root ::= "a"'),
        },
        frozenset(sglang.SAMPLING_FIELDS),
        wrap=lambda fields: {"text": "the cat", "sampling_params": fields},
        top="sampling_params",
    ),
    "structured_outputs": Place(
        COMPLETIONS,
        {},
        {
            "json": Changes({"type": "integer"}),
            "regex": Changes("[a-z]+"),
            "choice": Changes(["a", "b"]),
            "grammar": Changes('start: "a"'),
            "json_object": Changes(True),
            "whitespace_pattern": Changes(" ", {"json_object": True}),
            "disable_any_whitespace": Changes(True, {"json_object": True}),
        },
        frozenset(grammar._KINDS + grammar._OPTIONS),
        wrap=lambda fields: {**BASE[COMPLETIONS], "structured_outputs": without_null(fields)},
        top="structured_outputs",
    ),
    "response_format": Place(
        COMPLETIONS,
        {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
        {
            "type": Changes("json_object", {"json_schema": None}),
            "json_schema": Changes({"schema": {"type": "integer"}}),
        },
        frozenset(grammar.RESPONSE_FORMAT),
        frozenset({"type", "json_schema"}),
        wrap=lambda fields: {**BASE[COMPLETIONS], "response_format": fields},
        top="response_format",
    ),
    "response_format.json_schema": Place(
        COMPLETIONS,
        {"schema": {"type": "object"}},
        {
            "schema": Changes({"type": "integer"}),
            "name": Passes(("thing",), "for people; so is the description"),
            "description": Passes(("of a thing",), "for people"),
            "strict": Passes((True, False), "a schema holds whether or not it is strict"),
        },
        frozenset(grammar.RESPONSE_SCHEMA),
        frozenset({"schema"}),
        wrap=lambda fields: {
            **BASE[COMPLETIONS],
            "response_format": {"type": "json_schema", "json_schema": fields},
        },
        top="response_format",
    ),
    "synchronous batch": Place(
        SYNCHRONOUS,
        {"requests": [BASE[CHAT]]},
        {"requests": Changes([{**BASE[CHAT], "seed": 2}])},
        frozenset({"requests"}),
        frozenset({"requests"}),
    ),
}
"""Objects that no schema describes."""
