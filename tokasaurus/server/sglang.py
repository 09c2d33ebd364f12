"""``POST /generate`` in the words of SGLang: ``text`` or ``input_ids``, and ``sampling_params``.

Every event of a stream carries the whole text so far. Where a logprob is asked for that does not exist, that of
a prompt's first token, there is null.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import msgspec

from tokasaurus.errors import RequestError
from tokasaurus.server.fields import without_harmless
from tokasaurus.server.generation import Generation
from tokasaurus.server.grammar import FIELD as STRUCTURED_OUTPUTS
from tokasaurus.server.logprobs import finite
from tokasaurus.server.params import SamplingParams, renamed
from tokasaurus.server.preparation import PreparedRequest, Preparer
from tokasaurus.server.render import takes_long
from tokasaurus.server.samples import SampleOutput, TokenLogprobs
from tokasaurus.server.schemas import EngineRequest, Prompts, read_prompts
from tokasaurus.server.tokenizer import Tokenizer
from tokasaurus.server.writer import DONE, StreamWriter, event

__all__ = ["SAMPLING_FIELDS", "SglangRequest", "SglangWriter", "prepare_sglang"]

_MAX_NEW_TOKENS = 128  # where a request does not say

T = TypeVar("T")


class _Field(NamedTuple):
    """What one of SGLang's sampling parameters is called here."""

    name: str  # of SamplingParams
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
"""SGLang's sampling parameters that are supported."""

_OUR_NAMES = {
    **{field.name: f"sampling_params.{name}" for name, field in SAMPLING_FIELDS.items()},
    "logprobs": "top_logprobs_num",
    "prompt_logprobs": "top_logprobs_num",
}

_FORMS = [name for name, field in SAMPLING_FIELDS.items() if field.name == STRUCTURED_OUTPUTS]

_HARMLESS_SAMPLING: Mapping[str, tuple[Any, ...]] = {
    "custom_params": (),
    "no_stop_trim": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_regex": ("", []),
    "stream_interval": (1,),
    "structural_tag": (),
}


class SglangRequest(EngineRequest):
    """``POST /generate`` with ``text`` or ``input_ids``. What is a list has an entry for each prompt."""

    key_fields: ClassVar[tuple[str, ...]] = ("text", "input_ids")
    harmless: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "audio_data": (),
        "background": (False,),
        "custom_logit_processor": (),
        "image_data": (),
        "input_embeds": (),
        "log_metrics": (True, False),
        "lora_id": (),
        "lora_path": (),
        "modalities": (["text"],),
        "model": (str,),
        "no_logs": (True, False),
        "priority": (),
        "return_bytes": (False,),
        "return_hidden_states": (False,),
        "return_routed_experts": (False,),
        "session_params": (),
        "token_ids_logprob": (),
        "video_data": (),
    }

    text: Prompts = None
    """One or several texts, as they are: no chat template is applied."""
    input_ids: Prompts = None
    """Instead of ``text``: one or several lists of token ids."""
    sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None
    """See ``SAMPLING_FIELDS``."""
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: int | list[int] | None = None
    """The prompt's position from which on logprobs are returned; -1, the default, for none of the prompt."""
    top_logprobs_num: int | list[int] | None = None
    """Logprobs of so many likeliest tokens, too."""
    return_text_in_logprobs: bool | None = None
    """Say the tokens' text beside their ids."""
    stream: bool | None = None
    rid: str | list[str] | None = None
    """A name, which the answer repeats."""

    @property
    def streams(self) -> bool:
        return bool(self.stream)

    def field_names(self) -> Mapping[str, str]:
        names = {**_OUR_NAMES, "prompt": self._prompt_field}
        form = next(iter(self._forms), None)
        return names if form is None else {**names, STRUCTURED_OUTPUTS: f"sampling_params.{form}"}

    @property
    def needs_grammar(self) -> bool:
        return bool(self._forms)

    @property
    def _forms(self) -> list[str]:
        """The parameters that say what a text must be, as far as they are given."""
        params = self.sampling_params or []
        rows = params if isinstance(params, list) else [params]
        return [name for row in rows for name in _FORMS if row.get(name) is not None]

    def check(self) -> None:
        if self.text is not None and self.input_ids is not None:
            raise RequestError("text and input_ids cannot both be given", "input_ids")
        self.prompts()

    def prompts(self) -> list[str | list[int]]:
        """One or several. Raises RequestError."""
        name = self._prompt_field
        prompts = read_prompts(name, getattr(self, name))
        if isinstance(prompts[0], str) != (name == "text"):
            raise RequestError(f"{name} must hold {'texts' if name == 'text' else 'ids'}", name)
        return prompts

    @property
    def _prompt_field(self) -> str:
        return "text" if self.text is not None else "input_ids"

    @property
    def is_single(self) -> bool:
        """Whether the prompt came without a list around it, so that its answer does, too."""
        if self.text is not None:
            return isinstance(self.text, str)
        return bool(self.input_ids) and not isinstance(self.input_ids[0], list)

    def per_prompt(self, name: str, count: int, default: T) -> list[T]:
        """The values of a field. Raises RequestError."""
        value = getattr(self, name)
        if not isinstance(value, list):
            return [default if value is None else value] * count
        if self.is_single or len(value) != count:
            raise RequestError(f"{name} has {len(value)} entries for {count} prompts", name)
        return value

    def params(self, count: int) -> list[SamplingParams]:
        """Of each prompt; without a limit where the client set none. Raises RequestError."""
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
    try:
        given = without_harmless(sampling, SAMPLING_FIELDS.keys(), _HARMLESS_SAMPLING)
        forms = [name for name in _FORMS if given.get(name) is not None]
        if len(forms) > 1:
            raise RequestError(f"{forms[1]} cannot be combined with {forms[0]}", forms[1])
        values = {
            SAMPLING_FIELDS[name].name: SAMPLING_FIELDS[name].convert(value)
            for name, value in given.items()
            if value is not None
        }
    except RequestError as error:
        raise renamed(error, {str(error.field): f"sampling_params.{error.field}"}) from None
    values.setdefault("max_tokens", None)
    logprobs = num_top if with_logprobs else None
    names = dict(_OUR_NAMES)
    if forms:
        names[STRUCTURED_OUTPUTS] = f"sampling_params.{forms[0]}"
    try:
        return SamplingParams(
            **values, logprobs=logprobs, prompt_logprobs=logprobs if start >= 0 else None
        )
    except RequestError as error:
        raise renamed(error, names) from None


def prepare_sglang(body: SglangRequest, preparer: Preparer) -> list[PreparedRequest]:
    """Decides what the client left open. Raises RequestError."""
    prompts = body.prompts()
    params = body.params(len(prompts))
    names = body.field_names()
    read_prompts(names["prompt"], prompts, max(each.n for each in params))
    starts = body.per_prompt("logprob_start_len", len(prompts), -1)
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
        try:
            prepared.append(preparer.prepare(ids, each))
        except RequestError as error:
            raise renamed(error, names) from None
    return prepared


class _Sample:
    """What a stream has told of one sample so far."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []

    def extend(self, output: SampleOutput) -> SampleOutput:
        """The output as if all had come at once."""
        self.text.append(output.text)
        self.token_ids += output.token_ids
        if output.logprobs is not None:
            self.logprobs.append(output.logprobs)
        return SampleOutput(
            output.index,
            "".join(self.text),
            self.token_ids,
            TokenLogprobs.join(self.logprobs) if self.logprobs else None,
            output.finish_reason,
        )


class SglangWriter(StreamWriter):
    """Writes the answer: an object for each sample, in a list unless there is but one.

    Args:
        request: what was asked.
        prepared: its prompts.
        tokenizer: spells tokens for logprobs.
    """

    def __init__(
        self, request: SglangRequest, prepared: Sequence[PreparedRequest], tokenizer: Tokenizer
    ) -> None:
        count = len(prepared)
        self._tokenizer = tokenizer
        self._with_text = bool(request.return_text_in_logprobs)
        self._starts = request.per_prompt("logprob_start_len", count, -1)
        rid = request.rid or uuid.uuid4().hex
        if isinstance(rid, str) and count > 1:
            rid = [f"{rid}_{position}" for position in range(count)]
        self._ids = [rid] if isinstance(rid, str) else rid
        if len(self._ids) != count:
            raise RequestError(f"rid has {len(self._ids)} entries for {count} prompts", "rid")
        self._is_single = request.is_single and prepared[0].params.n == 1
        self._with_logprobs = any(each.params.logprobs is not None for each in prepared)
        self._num_before: list[int] = []  # samples of the prompts before each
        num_samples = 0
        for each in prepared:
            self._num_before.append(num_samples)
            num_samples += int(each.params.n)
        self._streamed: dict[int, _Sample] = {}
        self._started_at = time.monotonic()

    def takes_long(self, generations: Sequence[Generation]) -> bool:
        return takes_long(generations, self._with_logprobs)

    def whole(self, generations: Sequence[Generation]) -> bytes:
        answers = [
            self._answer(generation, position, output)
            for position, generation in enumerate(generations)
            for output in generation.take_all()
        ]
        return msgspec.json.encode(answers[0] if self._is_single else answers)

    def chunk(
        self, generations: Sequence[Generation], position: int, output: SampleOutput
    ) -> bytes:
        index = self._num_before[position] + output.index
        so_far = self._streamed.setdefault(index, _Sample()).extend(output)
        answer = self._answer(generations[position], position, so_far)
        if not self._is_single:
            answer["index"] = index
        if output.finish_reason is not None:
            del self._streamed[index]
        return event(answer)

    def end(self, generations: Sequence[Generation]) -> bytes:
        return DONE

    def _answer(
        self, generation: Generation, position: int, output: SampleOutput
    ) -> dict[str, Any]:
        meta_info: dict[str, Any] = {
            "id": self._ids[position],
            "finish_reason": self._finish_reason(generation, output),
            "prompt_tokens": generation.num_prompt_tokens,
            "completion_tokens": len(output.token_ids),
            "cached_tokens": generation.num_cached_tokens,
            "e2e_latency": time.monotonic() - self._started_at,
        }
        num_top = generation.request.params.logprobs
        if num_top is not None:
            chosen, top = self._logprobs(output.token_ids, output.logprobs)
            prompt_chosen, prompt_top = self._prompt_logprobs(generation, self._starts[position])
            meta_info["input_token_logprobs"] = prompt_chosen
            meta_info["output_token_logprobs"] = chosen
            if num_top > 0:
                meta_info["input_top_logprobs"] = prompt_top
                meta_info["output_top_logprobs"] = top
        return {"text": output.text, "output_ids": output.token_ids, "meta_info": meta_info}

    def _prompt_logprobs(self, generation: Generation, start: int) -> tuple[list[Any], list[Any]]:
        values = generation.prompt_logprobs
        if values is None:
            return [], []
        ids = generation.request.prompt_ids.tolist()
        chosen, top = self._logprobs(ids[1:], values)
        return [self._entry(None, ids[0]), *chosen][start:], [None, *top][start:]

    def _logprobs(
        self, token_ids: Sequence[int], values: TokenLogprobs | None
    ) -> tuple[list[Any], list[Any]]:
        """Of each token, and of the likeliest in its place."""
        if values is None:
            return [], []
        logprobs = finite(values.logprobs)
        chosen = [self._entry(*each) for each in zip(logprobs, token_ids, strict=True)]
        rows = zip(finite(values.top_logprobs), values.top_ids.tolist(), strict=True)
        return chosen, [[self._entry(*each) for each in zip(*row, strict=True)] for row in rows]

    def _entry(self, logprob: float | None, token_id: int) -> tuple[float | None, int, str | None]:
        text = self._tokenizer.token_text(token_id) if self._with_text else None
        return logprob, token_id, text

    def _finish_reason(self, generation: Generation, output: SampleOutput) -> dict[str, Any] | None:
        if output.finish_reason is None:
            return None
        if output.finish_reason == "length":
            return {"type": "length", "length": generation.request.max_tokens}
        if output.finish_reason != "stop":
            return {"type": "abort"}
        request, ids = generation.request, output.token_ids
        if ids and ids[-1] in request.stop_token_ids:
            return {"type": "stop", "matched": ids[-1]}
        return {"type": "stop", "matched": self._matched(ids, request.params.stop_strings)}

    def _matched(self, token_ids: Sequence[int], stops: Sequence[str]) -> str | None:
        """The stop string that the last token completed: as in ``TextStream``, the one that begins first."""
        pieces = [self._tokenizer.spelled[token_id] for token_id in token_ids]
        text = b"".join(pieces)
        before = len(text) - len(pieces[-1]) if pieces else 0
        found = []
        for stop in stops:
            spelled = stop.encode()
            # Those that were complete earlier are mere text, because of min_new_tokens.
            begin = text.find(spelled, max(0, before - len(spelled) + 1))
            if begin >= 0:
                found.append((begin, -len(spelled), stop))
        return min(found)[2] if found else None
