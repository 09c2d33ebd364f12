"""What requests have in common, and those for text above all.

A field left out and a field that is null mean the same, a null temperature too: the default, not 0.
Types are strict: "1" is no number. Ranges are checked by ``SamplingParams``, so that the embedded engine
refuses the same values in the same words.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar

from pydantic import Field

from tokasaurus.errors import RequestError
from tokasaurus.protocol.messages import LogprobsMode
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
    "parse",
]

_MAX_USER_CHARS = 512

_TIER_PRIORITIES = {"flex": 1000, "priority": -1000}
"""What other service tiers than the default one mean for a request that sets no priority."""

Metadata: TypeAlias = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
]
"""What a client says for itself, in OpenAI's limits."""

# Older names of what ``structured_outputs`` has.
_GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}


class StreamOptions(StrictSchema):
    """What a stream tells besides the text."""

    include_usage: bool | None = None
    """End with a chunk that has no choices but the usage of the whole request."""
    continuous_usage_stats: bool | None = None
    """Tell the usage so far in every chunk."""


class RequestBody(StrictSchema):
    """What all requests have in common.

    Attributes:
        harmless: fields that it does not have, with the values that change nothing (see ``fields``).
        key_fields: those that tell it from other shapes of the same request; one of them is required.
    """

    key_fields: ClassVar[tuple[str, ...]] = ()
    harmless: ClassVar[Mapping[str, tuple[Any, ...]]] = HARMLESS

    def field_names(self) -> Mapping[str, str]:
        """How this request spells fields of ``SamplingParams`` that it spells differently."""
        return {}

    def check(self) -> None:
        """Raises RequestError where fields contradict one another."""


class EngineRequest(RequestBody):
    """What requests have in common that run on the engine."""

    user: Annotated[str, Field(max_length=_MAX_USER_CHARS)] | None = None
    """Whom the request is for: requests of different users get their turn alike."""

    @property
    def needs_grammar(self) -> bool:
        """Whether a grammar must be compiled, which may take a while."""
        return False


class GenerationRequest(EngineRequest):
    """What requests for text have in common.

    Attributes:
        streams_prompt_logprobs: whether a stream has a place for them.
    """

    streams_prompt_logprobs: ClassVar[bool] = False

    model: str | None = None
    """Any name will do: there is one model. The answer repeats it."""
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
    """Logprobs of the prompt's tokens, and of so many likeliest ones at each place.

    In a stream ``/generate`` alone has them.
    """
    logprobs_mode: str | None = None
    logprobs_ignore_temperature: bool | None = None
    """The same as ``logprobs_mode="raw"``."""
    logprobs_in_fingerprint: bool | None = None
    """Packed logprobs in ``system_fingerprint`` instead of the ``logprobs`` field."""
    priority: int | None = None
    """Lower runs first, of all requests that the engine has; from -1,000,000 to 1,000,000, default 0."""
    first_k: int | None = None
    """Wait for the k samples of each prompt that end first, and cancel its other samples then; from 1 to n.

    The answer has those k choices, in order, each with the index it has among all n. A stream has begun
    to show others: every choice that was cancelled ends in a chunk with ``finish_reason`` "abort". The
    usage counts what was generated of cancelled samples too.
    """
    response_format: Any = None
    """``{"type": "json_object"}`` or ``{"type": "json_schema", "json_schema": {"schema": ...}}``."""
    structured_outputs: Any = None
    """One of ``json`` (a schema), ``regex``, ``choice``, ``grammar`` (Lark or GBNF), ``json_object``."""
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    metadata: Metadata | None = None
    """At most 16 pairs of strings, which the answer repeats."""
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None
    """``flex`` runs behind other requests, ``priority`` before them; the others are as if left out."""

    @property
    def num_samples(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives per generated token; 0 is the chosen one only, None is no logprobs."""
        raise NotImplementedError

    @property
    def token_limit(self) -> int | None:
        """What the client asked for; None if nothing."""
        return self.max_tokens

    def field_names(self) -> Mapping[str, str]:
        return {} if self.form_field is None else {STRUCTURED_OUTPUTS: self.form_field}

    @property
    def form_field(self) -> str | None:
        """The field that says what the text must be; None if the text is free."""
        return next(iter(self._forms), None)

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
    def num_bad_word_characters(self) -> int:
        """To tokenize for each prompt, since bad words are, with a space before them and without."""
        return 2 * sum(map(len, self.bad_words or ()))

    def check(self) -> None:
        super().check()
        if self.prompt_logprobs is not None and self.stream and not self.streams_prompt_logprobs:
            raise RequestError("prompt_logprobs needs stream to be false", "prompt_logprobs")
        if self.priority is not None and self.service_tier in _TIER_PRIORITIES:
            raise RequestError(
                f"service_tier {self.service_tier!r} sets the priority, which was given too; leave one out",
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
        return SamplingParams(
            n=self.num_samples,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=self.seed,
            stop=self.stop,
            ignore_eos=bool(self.ignore_eos),
            stop_token_ids=self.stop_token_ids,
            min_tokens=self.min_tokens or 0,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            logit_bias=self.logit_bias,
            bad_words=self.bad_words,
            max_tokens=self.token_limit,
            logprobs=num_logprobs,
            prompt_logprobs=self.prompt_logprobs,
            logprobs_mode=LogprobsMode.RAW
            if self.logprobs_ignore_temperature
            else self.logprobs_mode,
            priority=self._priority,
            first_k=self.first_k,
            structured_outputs=next(iter(self._forms.values()), None),
        )

    @property
    def _priority(self) -> int:
        if self.priority is not None:
            return self.priority
        return _TIER_PRIORITIES.get(self.service_tier or "default", 0)

    def echoed(self) -> dict[str, Any]:
        """What the answer repeats of the request."""
        echoed: dict[str, Any] = {}
        if self.metadata is not None:
            echoed["metadata"] = self.metadata
        if self.service_tier is not None:
            served = self.service_tier if self.service_tier in _TIER_PRIORITIES else "default"
            echoed["service_tier"] = served
        return echoed


R = TypeVar("R", bound=RequestBody)


def parse(body: Any, schema: type[R]) -> R:
    """Reads a decoded JSON body.

    Raises:
        RequestError: it is no such request; names the field.
    """
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object")
    fields = without_harmless(body, schema.model_fields.keys(), schema.harmless)
    request = validated(fields, schema)
    request.check()
    return request


def body_reference(*schemas: type[StrictSchema]) -> dict[str, Any]:
    """What the OpenAPI document says of a route whose body is one of these."""
    references = [{"$ref": f"#/components/schemas/{schema.__name__}"} for schema in schemas]
    schema = references[0] if len(references) == 1 else {"anyOf": references}
    return {"required": True, "content": {"application/json": {"schema": schema}}}
