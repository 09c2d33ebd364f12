"""``POST /generate`` in the words of SGLang: ``text`` or ``input_ids``, and ``sampling_params``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

from tokasaurus.errors import RequestError
from tokasaurus.server.operations.fields import HARMLESS, without_harmless
from tokasaurus.server.operations.prompts import Prompts, read_prompts
from tokasaurus.server.operations.schemas import EngineRequest
from tokasaurus.text.params import SamplingParams, renamed
from tokasaurus.text.preparation import PreparedRequest, Preparer
from tokasaurus.text.structured_output import FIELD as STRUCTURED_OUTPUTS

__all__ = ["SAMPLING_FIELDS", "SglangRequest", "prepare_sglang"]

_SAMPLING = "sampling_params."
_MAX_NEW_TOKENS = 128  # SGLang's default

T = TypeVar("T")


class _Field(NamedTuple):
    """The field of ``SamplingParams`` for one of SGLang's sampling parameters."""

    name: str
    convert: Callable[[Any], Any] = lambda value: value


SAMPLING_FIELDS: Mapping[str, _Field] = {
    "n": _Field("n"),
    "max_new_tokens": _Field("max_tokens"),
    "temperature": _Field("temperature"),
    "top_p": _Field("top_p"),
    "top_k": _Field("top_k"),
    "min_p": _Field("min_p"),
    "sampling_seed": _Field("seed"),
    "frequency_penalty": _Field("frequency_penalty"),
    "presence_penalty": _Field("presence_penalty"),
    "repetition_penalty": _Field("repetition_penalty"),
    "logit_bias": _Field("logit_bias"),
    "min_new_tokens": _Field("min_tokens"),
    "stop": _Field("stop"),
    "stop_token_ids": _Field("stop_token_ids"),
    "ignore_eos": _Field("ignore_eos"),
    "json_schema": _Field(STRUCTURED_OUTPUTS, lambda value: {"json": value}),
    "regex": _Field(STRUCTURED_OUTPUTS, lambda value: {"regex": value}),
    "ebnf": _Field(STRUCTURED_OUTPUTS, lambda value: {"grammar": value}),
}
"""The sampling parameters of SGLang that are supported."""

_OUR_NAMES = {
    **{field.name: f"{_SAMPLING}{name}" for name, field in SAMPLING_FIELDS.items()},
    "logprobs": "top_logprobs_num",
    "prompt_logprobs": "top_logprobs_num",
}

_FORMS = [name for name, field in SAMPLING_FIELDS.items() if field.name == STRUCTURED_OUTPUTS]

_HARMLESS_SAMPLING: Mapping[str, tuple[Any, ...]] = {
    "custom_params": ({},),
    "no_stop_trim": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_regex": ("", []),
    "stream_interval": (1,),
    "structural_tag": (),
}


class SglangRequest(EngineRequest):
    """``POST /generate`` with ``text`` or ``input_ids``. A list has an entry for each prompt."""

    key_fields: ClassVar[tuple[str, ...]] = ("text", "input_ids")
    harmless: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **HARMLESS,
        "audio_data": ([],),
        "background": (False,),
        "encoder_urls": ([],),
        "http_worker_ipc": (),
        "image_data": ([],),
        "input_embeds": (),
        "log_metrics": (True, False),
        "lora_id": (),
        "model": (str,),
        "need_wait_for_mm_inputs": (False,),
        "no_logs": (True, False),
        "num_items_assigned": ({},),
        "priority": (),
        "received_time": (float, int),
        "return_bytes": (False,),
        "token_ids_logprob": ([],),
        "video_data": ([],),
    }

    text: Prompts = None
    """One or several texts, as they are: no chat template is applied."""
    input_ids: Prompts = None
    """Instead of ``text``: one or several lists of token ids."""
    sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None
    """See ``SAMPLING_FIELDS``."""
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: int | list[int] | None = None
    """The position in the prompt where logprobs begin; default -1: none of the prompt."""
    top_logprobs_num: int | list[int] | None = None
    """Logprobs of this many likeliest tokens, too."""
    return_text_in_logprobs: bool | None = None
    """Put the text of tokens beside their ids."""
    stream: bool | None = None
    rid: str | list[str] | None = None
    """A name that the answer repeats."""

    def field_names(self) -> Mapping[str, str]:
        names = {**_OUR_NAMES, "prompt": self.prompt_field}
        form = next(iter(self._forms), None)
        return names if form is None else {**names, STRUCTURED_OUTPUTS: f"{_SAMPLING}{form}"}

    @property
    def needs_grammar(self) -> bool:
        return bool(self._forms)

    @property
    def _forms(self) -> list[str]:
        """The sampling parameters in this request that say what a text must be."""
        params = self.sampling_params or []
        rows = params if isinstance(params, list) else [params]
        return [name for row in rows for name in _FORMS if row.get(name) is not None]

    def check(self) -> None:
        if self.text is not None and self.input_ids is not None:
            raise RequestError("text and input_ids cannot both be given", "input_ids")
        self.prompts()

    def prompts(self) -> list[str | list[int]]:
        """One or several. Raises RequestError."""
        name = self.prompt_field
        prompts = read_prompts(name, getattr(self, name))
        if isinstance(prompts[0], str) != (name == "text"):
            raise RequestError(f"{name} must hold {'texts' if name == 'text' else 'ids'}", name)
        return prompts

    @property
    def prompt_field(self) -> str:
        return "text" if self.text is not None else "input_ids"

    @property
    def is_single(self) -> bool:
        """Whether the prompt came without a list around it; then so does its answer."""
        if self.text is not None:
            return isinstance(self.text, str)
        return bool(self.input_ids) and not isinstance(self.input_ids[0], list)

    def per_prompt(self, name: str, count: int, default: T) -> list[T]:
        """The values of a field, one for each prompt. Raises RequestError."""
        value = getattr(self, name)
        if not isinstance(value, list):
            return [default if value is None else value] * count
        if self.is_single or len(value) != count:
            raise RequestError(f"{name} has {len(value)} entries for {count} prompts", name)
        return value

    def params(self, count: int) -> list[SamplingParams]:
        """The parameters of each prompt; no limit if the client set none. Raises RequestError."""
        columns = zip(
            self.per_prompt("sampling_params", count, _NO_PARAMS),
            self.per_prompt("return_logprob", count, False),
            self.per_prompt("logprob_start_len", count, -1),
            self.per_prompt("top_logprobs_num", count, 0),
            strict=True,
        )
        return [_params(*row) for row in columns]


_NO_PARAMS: dict[str, Any] = {}


def _params(
    sampling: dict[str, Any], with_logprobs: bool, start: int, num_top: int
) -> SamplingParams:
    if start < -1:
        raise RequestError(
            f"logprob_start_len must be -1 or more, not {start}", "logprob_start_len"
        )
    if num_top and not with_logprobs:
        raise RequestError("top_logprobs_num needs return_logprob to be true", "top_logprobs_num")
    if start >= 0 and not with_logprobs:
        raise RequestError("logprob_start_len needs return_logprob to be true", "logprob_start_len")
    given = without_harmless(sampling, SAMPLING_FIELDS.keys(), _HARMLESS_SAMPLING, where=_SAMPLING)
    forms = [_SAMPLING + name for name in _FORMS if given.get(name) is not None]
    if len(forms) > 1:
        raise RequestError(f"{forms[1]} cannot be combined with {forms[0]}", forms[1])
    values = {
        SAMPLING_FIELDS[name].name: SAMPLING_FIELDS[name].convert(value)
        for name, value in given.items()
        if value is not None
    }
    values.setdefault("max_tokens", None)
    logprobs = num_top if with_logprobs else None
    try:
        return SamplingParams(
            **values, logprobs=logprobs, prompt_logprobs=logprobs if start >= 0 else None
        )
    except RequestError as error:
        # Prompts may use different fields to say what their text must be.
        raise renamed(error, {STRUCTURED_OUTPUTS: forms[0]} if forms else {}) from None


def prepare_sglang(request: SglangRequest, preparer: Preparer) -> list[PreparedRequest]:
    """The prompts, ready to run. Raises RequestError."""
    prompts = request.prompts()
    params = request.params(len(prompts))
    read_prompts(request.prompt_field, prompts, max(each.n for each in params))
    starts = request.per_prompt("logprob_start_len", len(prompts), -1)
    limit = preparer.config.max_request_tokens
    prepared = []
    for prompt, each, start in zip(prompts, params, starts, strict=True):
        ids = preparer.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if start > len(ids):
            raise RequestError(
                f"logprob_start_len is {start}, and the prompt has {len(ids)} tokens",
                "logprob_start_len",
            )
        if each.max_tokens is None:
            room = max(1, min(_MAX_NEW_TOKENS, limit - len(ids)))
            each = dataclasses.replace(each, max_tokens=room)
        prepared.append(preparer.prepare(ids, each))
    return prepared
