"""What the engine is asked for tokens, and what veRL is told of the answer."""

from __future__ import annotations

import base64
import binascii
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from tokasaurus.client.reading import read_answer, read_usage
from tokasaurus.errors import ConfigError, EngineError, RequestError

__all__ = [
    "Ask",
    "RolloutDefaults",
    "output_class",
    "parse_completion",
    "parse_prompt_logprobs",
    "step_label",
    "token_ids_of",
    "token_output",
]

log = logging.getLogger(__name__)

COMPLETIONS = "/custom/cartridge/completions"
NATIVE = "/generate"
_LOGPROBS_MODES = {"processed_logprobs": "processed", "raw_logprobs": "raw"}
_STOP_REASONS = {"stop": "completed", "length": "completed", "abort": "aborted"}
_LABEL = "global-step-"


@dataclass(frozen=True)
class Ask:
    """A request to the engine.

    Attributes:
        path: of the route.
        body: its JSON, without cartridges.
        has_logprobs: whether logprobs of the generated tokens are asked for.
        num_prompt_logprobs: likeliest tokens for each token of the prompt; 0 is the token itself,
            and None is none.
    """

    path: str
    body: dict[str, Any]
    has_logprobs: bool
    num_prompt_logprobs: int | None


@dataclass(frozen=True, kw_only=True)
class RolloutDefaults:
    """What veRL's configuration of the rollout says about every request.

    Attributes:
        max_model_len: tokens of prompt and answer together; None is what the engine allows.
        logprobs_mode: "processed_logprobs" or "raw_logprobs".
        is_deterministic: draw the same tokens for the same request id.
        free_cache_engine: whether the engine gives its memory up while the trainer trains.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    prompt_length: int = 512
    response_length: int = 512
    max_model_len: int | None = None
    logprobs_mode: str | None = "processed_logprobs"
    is_deterministic: bool = False
    seed: int = 0
    free_cache_engine: bool = True

    def __post_init__(self) -> None:
        if (self.logprobs_mode or "processed_logprobs") not in _LOGPROBS_MODES:
            raise ConfigError(
                f"actor_rollout_ref.rollout.logprobs_mode={self.logprobs_mode!r} is not supported;"
                f" use one of {', '.join(_LOGPROBS_MODES)}"
            )

    @classmethod
    def of(cls, config: Any) -> RolloutDefaults:
        """Reads a ``RolloutConfig``, or a mapping with some of its keys.

        Raises:
            ConfigError: it asks for what the engine cannot do.
        """
        names = {name: name for name in cls.__dataclass_fields__}
        names["is_deterministic"] = "full_determinism"
        found = {name: _field(config, theirs) for name, theirs in names.items()}
        given = {name: value for name, value in found.items() if value is not _MISSING}
        return cls(**{k: v for k, v in given.items() if v is not None or k in _MAY_BE_NONE})

    def ask(
        self,
        prompt_ids: Sequence[int],
        sampling_params: Mapping[str, Any],
        *,
        request_id: str,
        engine_limit: int | None = None,
        num_before: int = 0,
    ) -> Ask:
        """The request for a prompt.

        Args:
            prompt_ids: of the prompt.
            sampling_params: in veRL's words; what is missing comes from the configuration. It is
                not changed.
            request_id: what a seed is made of, where the results shall be deterministic.
            engine_limit: tokens of prompt and answer together that the engine allows.
            num_before: positions of cartridges before the prompt.

        Raises:
            RequestError: the prompt leaves no room for an answer, or a parameter is wrong.
        """
        given = dict(sampling_params)
        for name in ("max_tokens", "max_new_tokens", "detokenize", "n"):
            given.pop(name, None)
        if sampling_params.get("n", 1) != 1:
            raise RequestError(
                f"n={sampling_params['n']} must be 1: veRL asks for each sample by itself", "n"
            )
        has_logprobs = bool(given.pop("logprobs", False))
        num_prompt_logprobs = given.pop("prompt_logprobs", None)
        body: dict[str, Any] = {
            "model": "default",
            "prompt": list(prompt_ids),
            "max_tokens": self.limit(
                len(prompt_ids), sampling_params, engine_limit=engine_limit, num_before=num_before
            ),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "return_weights_versions": True,
            **({} if self.repetition_penalty == 1 else self._penalty),
            **({"ignore_eos": True} if self.ignore_eos else {}),
            **{name: value for name, value in given.items() if value is not None},
        }
        if self.is_deterministic and "seed" not in body:
            body["seed"] = _seed(self.seed, request_id)
        if num_prompt_logprobs is not None:
            # A teacher's: of its own distribution, whatever its answer would be drawn from.
            body |= {"prompt_logprobs": num_prompt_logprobs, "logprobs_mode": "raw"}
            body |= {"logprobs": 0} if has_logprobs else {}
            return Ask(NATIVE, body, has_logprobs, num_prompt_logprobs)
        if has_logprobs:
            mode = _LOGPROBS_MODES[self.logprobs_mode or "processed_logprobs"]
            body |= {"logprobs_in_fingerprint": True, "logprobs_mode": mode}
        return Ask(COMPLETIONS, body, has_logprobs, None)

    @property
    def _penalty(self) -> dict[str, float]:
        return {"repetition_penalty": self.repetition_penalty}

    def limit(
        self,
        num_prompt: int,
        sampling_params: Mapping[str, Any],
        *,
        engine_limit: int | None = None,
        num_before: int = 0,
    ) -> int:
        """The number of tokens that the answer may have.

        Args:
            num_prompt: tokens of the prompt.
            sampling_params: with ``max_tokens`` or ``max_new_tokens``, or neither.
            engine_limit, num_before: as of :meth:`ask`.

        Raises:
            RequestError: there is no room for an answer.
        """
        given = sampling_params.get("max_tokens", sampling_params.get("max_new_tokens"))
        rest = self.prompt_length + self.response_length - num_prompt
        asked = min(self.response_length, rest) if given is None else int(given)
        rooms = []
        if self.max_model_len is not None:
            rooms.append((self.max_model_len - num_prompt, "max_model_len", self.max_model_len))
        if engine_limit is not None:
            rest = engine_limit - num_before - num_prompt
            rooms.append((rest, "max_num_tokens_per_request of the engine", engine_limit))
        for room, name, value in rooms:
            if room < 1:
                behind = f" behind {num_before} positions of cartridges" if num_before else ""
                raise RequestError(
                    f"a prompt of {num_prompt} tokens{behind} leaves no room for an answer within"
                    f" {name}={value}; shorten the prompt, or raise the limit",
                    "prompt_ids",
                )
        return max(1, min([asked, *(room for room, _, _ in rooms)]))


_MISSING = object()
_MAY_BE_NONE = ("max_model_len", "logprobs_mode")


def _field(config: Any, name: str) -> Any:
    if config is None:
        return _MISSING
    if isinstance(config, Mapping):
        return config.get(name, _MISSING)
    return getattr(config, name, _MISSING)


def _seed(seed: int, request_id: str) -> int:
    """The same for the same request, on whichever replica; another one for another request."""
    digest = hashlib.sha256(f"{seed} {request_id}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def token_ids_of(prompt_ids: Any) -> list[int]:
    """Token ids as a list, whether they come as a list, an array, or a tensor of one row.

    Raises:
        RequestError: they are none.
    """
    ids = prompt_ids.tolist() if hasattr(prompt_ids, "tolist") else list(prompt_ids)
    if len(ids) == 1 and isinstance(ids[0], list):
        (ids,) = ids
    if not ids or not all(isinstance(each, int | np.integer) for each in ids):
        raise RequestError("prompt_ids must be a list of at least one token id", "prompt_ids")
    return [int(each) for each in ids]


def parse_completion(response: Mapping[str, Any], return_logprob: bool) -> Any:
    """What veRL is told of an answer of a route for completions.

    Args:
        response: its JSON.
        return_logprob: whether logprobs were asked for.

    Returns:
        A ``TokenOutput``. Without a fingerprint there are no ids, and ``log_probs`` is None where
        the logprobs are missing or damaged.
    """
    fingerprint = _fingerprint(response)
    ids = (fingerprint.get("completion_ids") or [[]])[0]
    choice = (response.get("choices") or [{}])[0]
    log_probs = None
    if return_logprob and ids:
        log_probs = _unpacked(fingerprint.get("packed_chosen_logprobs"), len(ids))
    usage = read_usage(response.get("usage"))
    return token_output(
        ids,
        log_probs,
        _stop_reason(choice.get("finish_reason")),
        num_cached_tokens=usage.cached_tokens,
        **_steps(choice.get("weights_versions")),
    )


def parse_prompt_logprobs(response: Mapping[str, Any], ask: Ask) -> Any:
    """What veRL is told of an answer of ``/generate`` with prompt logprobs.

    Returns:
        A ``TokenOutput``, whose ``extra_fields`` have ``prompt_ids`` and ``prompt_logprobs``, each
        [prompt tokens, max(k, 1)]: row i is about token i + 1, and the last row is zeros.

    Raises:
        EngineError: the answer has no prompt logprobs.
    """
    answer = read_answer(response)
    found = answer.prompt_logprobs
    if found is None or answer.token_ids is None:
        raise EngineError("the engine's answer has no prompt_logprobs")
    prompt = np.asarray(ask.body["prompt"], np.int32)
    ids: NDArray[np.int32] = prompt[:, None]
    logprobs: NDArray[np.float32] = found.chosen[:, None]
    if ask.num_prompt_logprobs:
        ids, logprobs = found.top_ids, found.top
    log_probs = None
    if ask.has_logprobs and answer.logprobs is not None:
        log_probs = answer.logprobs.chosen.tolist()
    (choice, *_) = answer.choices
    return token_output(
        answer.token_ids.tolist(),
        log_probs,
        _stop_reason(answer.finish_reason),
        num_cached_tokens=answer.usage.cached_tokens,
        prompt_ids=[*ids[1:].tolist(), [0] * ids.shape[1]],
        prompt_logprobs=[*logprobs[1:].tolist(), [0.0] * ids.shape[1]],
        **_steps(choice.weights_versions),
    )


def token_output(
    token_ids: Sequence[int],
    log_probs: Sequence[float] | None,
    stop_reason: str | None,
    **extra_fields: Any,
) -> Any:
    """veRL's ``TokenOutput``; without veRL, a class with the same fields."""
    return output_class()(
        token_ids=list(token_ids),
        log_probs=None if log_probs is None else list(log_probs),
        stop_reason=stop_reason,
        extra_fields=extra_fields,
    )


def step_label(global_steps: int | None) -> str | None:
    """The label of weights that a trainer's step has made; None leaves it to the engine."""
    return None if global_steps is None else f"{_LABEL}{global_steps}"


def _steps(runs: Any) -> dict[str, Any]:
    """Which weights drew the tokens, as veRL counts steps, if all have a step's label."""
    if not runs:
        return {}
    labels = [str(run.get("label")) for run in runs]
    fields: dict[str, Any] = {"weights_versions": [dict(run) for run in runs]}
    steps = [label.removeprefix(_LABEL) for label in labels if label.startswith(_LABEL)]
    if len(steps) == len(labels) and all(step.isdecimal() for step in steps):
        numbers = [int(step) for step in steps]
        fields |= {"min_global_steps": min(numbers), "max_global_steps": max(numbers)}
        fields["global_steps"] = numbers[-1]
    return fields


def _stop_reason(finish_reason: str | None) -> str | None:
    if finish_reason is None:
        return None
    return _STOP_REASONS.get(finish_reason, finish_reason)


def _fingerprint(response: Mapping[str, Any]) -> Mapping[str, Any]:
    text = response.get("system_fingerprint")
    if not isinstance(text, str):
        return {}
    try:
        fields = msgspec.json.decode(text)
    except msgspec.DecodeError:
        return {}
    return fields if isinstance(fields, dict) else {}


def _unpacked(packed: Any, num_tokens: int) -> list[float] | None:
    """Logprobs of one choice; None, with a warning, if there are not as many as tokens."""
    try:
        values = np.frombuffer(base64.b64decode(packed[0], validate=True), "<f4")
    except (TypeError, IndexError, KeyError, ValueError, binascii.Error) as error:
        log.warning("the logprobs of an answer are missing or damaged: %s", error)
        return None
    if len(values) != num_tokens:
        log.warning("an answer has %d tokens and %d logprobs", num_tokens, len(values))
        return None
    found: list[float] = values.tolist()
    return found


def output_class() -> Any:
    """veRL's ``TokenOutput``, or the one of this package where veRL is not installed."""
    try:
        from verl.workers.rollout.replica import TokenOutput
    except ModuleNotFoundError as error:
        if error.name not in ("verl", "verl.workers"):  # a directory may be called verl, too
            raise
        from tokasaurus.integrations.verl.token_output import TokenOutput
    return TokenOutput
