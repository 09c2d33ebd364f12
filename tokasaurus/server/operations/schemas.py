"""What requests have in common, above all requests for text.

A field that is null is the same as a field left out: a null temperature is the default, not 0.
Types are strict: "1" is not a number. ``SamplingParams`` checks the ranges, so the embedded engine
refuses the same values in the same words.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar

from pydantic import Field

from tokasaurus.cartridges.specification import CartridgeSpec
from tokasaurus.errors import RequestError
from tokasaurus.protocol.messages import MAX_PRIORITY, LogprobsMode
from tokasaurus.server.operations.cartridges import CartridgeReference
from tokasaurus.server.operations.fields import HARMLESS, without_harmless
from tokasaurus.server.operations.strict import StrictSchema, validated
from tokasaurus.text.params import SamplingParams
from tokasaurus.text.structured_output import FIELD as STRUCTURED_OUTPUTS
from tokasaurus.text.structured_output import from_response_format

__all__ = [
    "EngineRequest",
    "GenerationRequest",
    "Metadata",
    "RequestBody",
    "StreamOptions",
    "body_reference",
    "check_priority",
    "parse",
]

_MAX_NAME_CHARS = 512

_TIER_PRIORITIES = {"flex": 1000, "priority": -1000}
"""The priority of a request in another service tier than the default one."""

Metadata: TypeAlias = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
]
"""A client's own notes, within OpenAI's limits."""

# Other names of the kinds in ``structured_outputs``. First those that vLLM had.
_GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    # SGLang's names.
    "json_schema": "json",
    "regex": "regex",
    "ebnf": "grammar",
}


class StreamOptions(StrictSchema):
    """What a stream holds besides the text."""

    include_usage: bool | None = None
    """End with a chunk that has the usage of the whole request, and no choices."""
    continuous_usage_stats: bool | None = None
    """Put the usage so far into every chunk."""
    include_obfuscation: Literal[False] | None = None
    """Only false: no chunk is padded to hide its length."""


class RequestBody(StrictSchema):
    """What all requests have in common.

    Attributes:
        harmless: fields that it does not have, with the values that change nothing; see ``fields``.
        key_fields: the fields that tell it from other shapes of the same request, which must have
            one of them.
    """

    key_fields: ClassVar[tuple[str, ...]] = ()
    harmless: ClassVar[Mapping[str, tuple[Any, ...]]] = HARMLESS

    def field_names(self) -> Mapping[str, str]:
        """This request's names for fields that the text core calls otherwise."""
        return {}

    def check(self) -> None:
        """Raises RequestError where fields contradict one another."""


class EngineRequest(RequestBody):
    """What requests that run on the engine have in common."""

    user: Annotated[str, Field(max_length=_MAX_NAME_CHARS)] | None = None
    """The person whom the request is for. Users get equal shares of the engine."""
    request_id: Annotated[str, Field(min_length=1, max_length=_MAX_NAME_CHARS)] | None = None
    """A name for the request, beside its ``X-Request-Id``. The answer's id ends with it."""

    def answer_id(self, prefix: str) -> str:
        """The id of the answer."""
        return prefix + (self.request_id or uuid.uuid4().hex)

    @property
    def needs_grammar(self) -> bool:
        """Whether a grammar must be compiled, which may take a while."""
        return False

    @property
    def cartridge_specs(self) -> tuple[CartridgeSpec, ...]:
        """The cartridges before its prompts, in order."""
        return ()

    def with_tags_read(self) -> EngineRequest:
        """The request with the cartridges that tags in its system messages name.

        Raises:
            RequestError: a tag is wrong, or the request names cartridges in another way, too.
        """
        return self

    def within(self, max_priority: int) -> EngineRequest:
        """The request, if it may outrank the default priority by this; in a tier that it may have.

        Raises:
            RequestError: its priority is more important.
        """
        del max_priority
        return self


class GenerationRequest(EngineRequest):
    """What requests for text have in common.

    Attributes:
        streams_prompt_logprobs: whether a stream has a place for prompt logprobs.
    """

    streams_prompt_logprobs: ClassVar[bool] = False

    model: str | None = None
    """Any name will do: there is one model. The answer repeats the name."""
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    bad_words: list[str] | None = None
    max_tokens: int | None = None
    prompt_logprobs: int | None = None
    """Logprobs of the prompt's tokens, and of this many of the likeliest tokens at each place.

    Only ``/generate`` has them in a stream.
    """
    logprobs_mode: str | None = None
    logprobs_ignore_temperature: bool | None = None
    """The same as ``logprobs_mode="raw"``."""
    logprobs_in_fingerprint: bool | None = None
    """Packed logprobs in ``system_fingerprint`` instead of the ``logprobs`` field."""
    return_token_ids: bool | None = None
    """Add ``token_ids`` to each choice, and ``prompt_token_ids``: to each choice of a completion,
    and beside the choices of a chat. A stream has the prompt's in the first chunk of each choice.
    """
    return_weights_versions: bool | None = None
    """Add ``weights_versions`` to each choice: which version of the weights drew which tokens.
    Default: once the engine has had other weights than those that it started with."""
    receipt: bool | None = None
    """Add a ``receipt`` of the answer, which ``toka-verify`` checks; see docs/reproducibility.md.

    A stream has it in its last event. The engine must have deterministic results.
    """
    priority: int | None = None
    """Of all requests in the engine, lower runs first; from -1,000,000 to 1,000,000, default 0.

    How far below 0 a client may go is its ``max_request_priority``, by default 0.
    """
    first_k: int | None = None
    """Wait for the k samples of each prompt that end first, then cancel its others; from 1 to n.

    The answer has those k choices, in order, each with its index among all n. A stream has begun to
    show the others: a cancelled choice ends in a chunk with ``finish_reason`` "abort". The usage
    counts the tokens of cancelled samples too.
    """
    response_format: Any = None
    """``{"type": "json_object"}``, or
    ``{"type": "json_schema", "json_schema": {"schema": ...}}``."""
    structured_outputs: Any = None
    """``json`` (a schema), ``regex``, ``choice``, ``grammar`` (Lark, GBNF) or ``json_object``."""
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    json_schema: Any = None
    regex: Any = None
    ebnf: Any = None
    cartridges: list[CartridgeReference] | None = None
    """Trained KV caches that come before the prompt, in this order; see docs/cartridges.md."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    metadata: Metadata | None = None
    """At most 16 pairs of strings, which the answer repeats."""
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None
    """``flex`` runs after other requests, ``priority`` before them; the others change nothing."""

    @property
    def num_samples(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives per generated token; 0 is the chosen token only, None is no logprobs."""
        raise NotImplementedError

    @property
    def token_limit(self) -> int | None:
        """The limit that the client set; None if it set none."""
        return self.max_tokens

    def field_names(self) -> Mapping[str, str]:
        return {} if self.form_field is None else {STRUCTURED_OUTPUTS: self.form_field}

    @property
    def form_field(self) -> str | None:
        """The field that says what the text must be; None if the text is free."""
        return next(iter(self._forms), None)

    @property
    def form(self) -> Any:
        """What the text must be, as ``SamplingParams`` says it; None if the text is free."""
        return next(iter(self._forms.values()), None)

    @cached_property
    def _forms(self) -> Mapping[str, Any]:
        """What the text must be, as ``SamplingParams`` says it, by the field that says it here.

        ``check`` refuses more than one.
        """
        forms: dict[str, Any] = {}
        if self.structured_outputs is not None:
            forms[STRUCTURED_OUTPUTS] = self.structured_outputs
        for name, kind in _GUIDED.items():
            if getattr(self, name) is not None:
                forms[name] = {kind: getattr(self, name)}
        if self.response_format is not None:
            form = from_response_format(self.response_format)
            if form is not None:
                forms["response_format"] = form
        return forms

    @property
    def needs_grammar(self) -> bool:
        return bool(self._forms)

    @property
    def cartridge_specs(self) -> tuple[CartridgeSpec, ...]:
        return tuple(each.spec for each in self.cartridges or ())

    @property
    def num_bad_word_characters(self) -> int:
        """Characters of bad words, which are tokenized with and without a space before them."""
        return 2 * sum(map(len, self.bad_words or ()))

    def check(self) -> None:
        super().check()
        if self.prompt_logprobs is not None and self.stream and not self.streams_prompt_logprobs:
            raise RequestError("prompt_logprobs needs stream to be false", "prompt_logprobs")
        if self.priority is not None and self.service_tier in _TIER_PRIORITIES:
            raise RequestError(
                f"service_tier {self.service_tier!r} sets the priority, which was given too; leave"
                " one out",
                "service_tier",
            )
        if len(self._forms) > 1:
            first, second, *_ = self._forms
            raise RequestError(
                f"{second} cannot be combined with {first}: both say what the text must be", second
            )
        if self.logprobs_ignore_temperature and self.logprobs_mode not in (None, "raw"):
            raise RequestError(
                "logprobs_ignore_temperature asks for raw logprobs, logprobs_mode for"
                f" {self.logprobs_mode!r}",
                "logprobs_ignore_temperature",
            )

    def params(self) -> SamplingParams:
        """Raises RequestError, with the fields as ``SamplingParams`` calls them."""
        num_logprobs = self.num_logprobs
        if self.logprobs_in_fingerprint and num_logprobs is None:
            num_logprobs = 0
        mode = LogprobsMode.RAW if self.logprobs_ignore_temperature else self.logprobs_mode
        own: dict[str, Any] = {
            "max_tokens": self.token_limit,
            "logprobs": num_logprobs,
            "logprobs_mode": mode,
            "priority": self._priority,
            "structured_outputs": self.form,
        }
        given = {name: getattr(self, name) for name in _SHARED_FIELDS}
        given = {name: value for name, value in given.items() if value is not None}
        return SamplingParams(**{**given, **own})

    @property
    def _priority(self) -> int:
        if self.priority is not None:
            return self.priority
        return _TIER_PRIORITIES.get(self.service_tier or "default", 0)

    def within(self, max_priority: int) -> EngineRequest:
        check_priority(self.priority, max_priority)
        if self.service_tier != "priority" or self._priority >= -max_priority:
            return self
        # As OpenAI answers where a project may not use the tier.
        return self.model_copy(update={"service_tier": "default"})

    def echoed(self) -> dict[str, Any]:
        """The fields of the request that the answer repeats."""
        echoed: dict[str, Any] = {}
        if self.metadata is not None:
            echoed["metadata"] = self.metadata
        if self.service_tier is not None:
            served = self.service_tier if self.service_tier in _TIER_PRIORITIES else "default"
            echoed["service_tier"] = served
        return echoed


def check_priority(priority: int | None, max_priority: int) -> None:
    """Raises RequestError if a request outranks the default priority by more than it may."""
    if priority is not None and -MAX_PRIORITY <= priority < -max_priority:
        raise RequestError(
            f"priority is {priority}, and this client's requests may have {-max_priority} or more"
            " (lower runs first); max_request_priority says how much they may outrank others",
            "priority",
        )


_SHARED_FIELDS = [
    field.name
    for field in dataclasses.fields(SamplingParams)
    if field.name in GenerationRequest.model_fields
]
"""The fields of ``SamplingParams`` that requests have under the same name."""

R = TypeVar("R", bound=RequestBody)


def parse(body: Any, schema: type[R]) -> R:
    """Reads a decoded JSON body.

    Raises:
        RequestError: it is not a request of this schema; names the field.
    """
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object")
    fields = without_harmless(body, schema.model_fields.keys(), schema.harmless)
    request = validated(fields, schema)
    request.check()
    return request


def body_reference(*schemas: type[StrictSchema]) -> dict[str, Any]:
    """The part of the OpenAPI document for a route that reads one of these schemas."""
    references = [{"$ref": f"#/components/schemas/{schema.__name__}"} for schema in schemas]
    schema = references[0] if len(references) == 1 else {"anyOf": references}
    return {"required": True, "content": {"application/json": {"schema": schema}}}
