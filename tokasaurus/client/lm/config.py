"""Configurations of language models, as programs of agents have them in YAML.

Owns their fields and checks. An agent's program types its configuration as :class:`LMConfig` and
passes it on to the factory, so that class keeps every key that it does not know. The class of a
particular client knows all of its keys, and refuses others by name.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tokasaurus.client.address import BASE_URL_VARIABLE, Address
from tokasaurus.client.certificates import trusted
from tokasaurus.client.lm.call_log import current_context
from tokasaurus.client.retrying import RetryPolicy
from tokasaurus.errors import ConfigError

__all__ = ["PREFIX", "LMConfig", "TokasaurusConfig", "given_fields"]

PREFIX = "toka:"
"""Before the name of a model that an engine serves."""

_DEFAULT_URL = "http://localhost:8080"  # the port of the setup guide, not that of an engine


class LMConfig(BaseModel):
    """What every language model has. Keys that it does not know are kept for the client's own.

    Attributes:
        model: the model's name; its prefix says which client it needs.
        temperature: of sampling; 0 takes the likeliest token.
        train_temperature, val_temperature: instead of it, where the log context's ``mode`` is
            ``train``, or ``val`` or ``validation``.
        max_output_tokens: an answer that would be longer is truncated.
        log_calls: write a JSON file for each call.
        max_retries: further attempts after the first.
        starting_delay: seconds before the second attempt.
        backoff_factor: the next delay is so many times longer.
        max_delay: seconds that no delay exceeds.
    """

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, validate_assignment=True)

    model: str = Field(min_length=1)
    temperature: float = Field(0.2, ge=0)
    train_temperature: float | None = Field(None, ge=0)
    val_temperature: float | None = Field(None, ge=0)
    max_output_tokens: int = Field(8192, ge=1)
    log_calls: bool = False
    max_retries: int = Field(5, ge=0)
    starting_delay: float = Field(1.0, ge=0)
    backoff_factor: float = Field(2.0, ge=1)
    max_delay: float = Field(10.0, ge=0)

    def temperature_now(self) -> float:
        """The temperature for the mode of the log context."""
        mode = current_context().get("mode")
        chosen = None
        if mode == "train":
            chosen = self.train_temperature
        elif mode in ("val", "validation"):
            chosen = self.val_temperature
        return self.temperature if chosen is None else chosen


class TokasaurusConfig(LMConfig):
    """A model that an engine, or another server with OpenAI's routes, serves.

    Attributes:
        base_url: the server's address, with or without ``/v1``. The environment variable
            TOKASAURUS_BASE_URL is the default.
        protocol: ``openai`` posts to ``/v1/chat/completions``, ``toka`` to ``/generate``.
        api_key: sent as a bearer token; TOKASAURUS_API_KEY is the default.
        ca_file: PEM file of the certificates to trust; default those that the system trusts.
        stop_sequences: texts that end an answer and are left out of it. The default is what
            agents with feedback need; an empty list has none.
        timeout_s: seconds without a byte of the answer after which an attempt has failed.
        enable_health_check: ask ``/ping`` before the first call. A failure is only logged.
        seed: of sampling; the server draws one otherwise.
        top_p: sample among the likeliest tokens of this mass together.
        top_logprobs: how many of the likeliest tokens :meth:`TokasaurusClient.call` returns with
            a list of messages; 0 is the chosen token's logprob only, None is none.
        cartridges: come before the prompt of every call that names none itself.
        extra_body: further fields of each request, such as ``{"top_k": 20}``.
        on_failure: ``return_empty`` logs an error and answers with an empty text; ``raise`` raises
            a :class:`~tokasaurus.errors.TokasaurusError`.
        on_truncation: what an answer is that reached ``max_output_tokens``. ``fail``: a failure;
            ``retry``: a failure, after further attempts if these can differ; ``return``: an answer.
    """

    # An error would show the whole input, with the key.
    model_config = ConfigDict(extra="forbid", validate_default=True, hide_input_in_errors=True)

    base_url: str = Field(
        default_factory=lambda: os.environ.get(BASE_URL_VARIABLE) or _DEFAULT_URL, min_length=1
    )
    protocol: Literal["openai", "toka"] = "openai"
    api_key: str | None = Field(None, repr=False)
    ca_file: str | None = None
    stop_sequences: list[str] = Field(default_factory=lambda: ["FEEDBACK", "OBSERVATION"])
    timeout_s: float = Field(900.0, gt=0)
    enable_health_check: bool = False
    seed: int | None = None
    top_p: float | None = Field(None, gt=0, le=1)
    top_logprobs: int | None = Field(None, ge=0)
    cartridges: list[str | dict[str, Any]] = Field(default_factory=list)
    extra_body: dict[str, Any] = Field(default_factory=dict)
    on_failure: Literal["raise", "return_empty"] = "return_empty"
    on_truncation: Literal["fail", "retry", "return"] = "fail"

    @classmethod
    def of(cls, config: LMConfig | Mapping[str, Any]) -> TokasaurusConfig:
        """The configuration with the fields that another one was given.

        Raises:
            pydantic.ValidationError: a ``ValueError`` that names what is wrong.
        """
        if isinstance(config, cls):
            return config
        return cls.model_validate(given_fields(config))

    @model_validator(mode="before")
    @classmethod
    def _names_unknown_keys(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        known = list(cls.model_fields)
        unknown = [str(key) for key in values if key not in known]
        if unknown:
            raise ValueError("; ".join(_unknown(key, known) for key in unknown))
        return values

    @field_validator("stop_sequences", "cartridges", "extra_body", mode="before")
    @classmethod
    def _nothing_is_empty(cls, value: Any, info: Any) -> Any:
        if value is None:
            return {} if info.field_name == "extra_body" else []
        return [value] if isinstance(value, str) else value

    @field_validator("base_url")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        try:
            Address.of(value, "")
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return value

    @field_validator("ca_file", mode="before")
    @classmethod
    def _is_a_path(cls, value: Any) -> Any:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @model_validator(mode="after")
    def _has_certificates(self) -> TokasaurusConfig:
        if self.ca_file is not None:
            try:
                trusted(self.base_url, self.ca_file)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return self

    @property
    def server_model(self) -> str:
        """The model's name as requests have it, without the prefix."""
        return self.model.removeprefix(PREFIX)

    @property
    def address(self) -> Address:
        """The server's address without ``/v1``, and the key."""
        return Address.of(self.base_url, self.api_key)

    @property
    def retry(self) -> RetryPolicy:
        """When a call is sent again."""
        return RetryPolicy(
            max_retries=self.max_retries,
            starting_delay_s=self.starting_delay,
            backoff_factor=self.backoff_factor,
            max_delay_s=self.max_delay,
        )


def given_fields(config: LMConfig | Mapping[str, Any]) -> dict[str, Any]:
    """The keys that a configuration was given, and what its class says otherwise than LMConfig.

    So the defaults of a client's own class hold where nobody has chosen a value.
    """
    if not isinstance(config, LMConfig):
        return dict(config)
    fields = {name: getattr(config, name) for name in type(config).model_fields}
    chosen = {
        name: value
        for name, value in fields.items()
        if name in config.model_fields_set or _differs(name, value)
    }
    return {**chosen, **(config.model_extra or {})}


def _differs(name: str, value: Any) -> bool:
    field = LMConfig.model_fields.get(name)
    return field is None or field.default != value


def _unknown(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return (
        f"{key!r} is not a key of lm_config for a model with the prefix {PREFIX!r}: {hint}"
        "extra_body takes further fields of requests"
    )
