"""What ``actor_rollout_ref.rollout.custom`` says, checked."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from tokasaurus.client.address import Address
from tokasaurus.errors import ConfigError

__all__ = ["CARTRIDGE_SOURCES", "RolloutOptions", "checked_cartridges", "plain"]

CARTRIDGE_SOURCES = ("local", "wandb", "huggingface", "s3", "http")
_CARTRIDGE_FIELDS = ("id", "source", "force_redownload")
_CHOICES = {
    "cartridge_upload": ("auto", "always", "never"),
    "weight_sync": ("auto", "http", "none"),
}
_WHERE = "actor_rollout_ref.rollout.custom"


@dataclass(frozen=True, kw_only=True)
class RolloutOptions:
    """The options of the rollout.

    Attributes:
        tokasaurus_url: addresses of engines. Replica r has the one at r, modulo their number.
        cartridges: ``{"id", "source", "force_redownload"}`` of each, before every prompt.
        max_retries: of a request, after its first attempt.
        base_timeout: seconds until a first attempt without an answer is looked into; of attempt k,
            1.5 ** k times as long.
        retry_delay: seconds before the first retry; before retry k, 2 ** (k - 1) times as long.
        startup_timeout: seconds that an engine may take to start, or to start again.
        cartridge_upload: whether local cartridges are uploaded. "auto" uploads them unless the
            engine is on the same machine.
        weight_sync: whether the trainer's weights are sent to the engine: "http" or "none". "auto"
            sends them unless there are cartridges, whose training leaves the model as it is.

    Raises:
        ConfigError: a value is wrong; names the key.
    """

    tokasaurus_url: tuple[str, ...] = ("http://localhost:10210",)
    cartridges: tuple[Mapping[str, Any], ...] = ()
    max_retries: int = 5
    base_timeout: float = 120.0
    retry_delay: float = 2.0
    startup_timeout: float = 300.0
    cartridge_upload: str = "auto"
    weight_sync: str = "auto"

    def __post_init__(self) -> None:
        if not self.tokasaurus_url:
            raise ConfigError(f"{_WHERE}.tokasaurus_url is empty; name the address of an engine")
        for url in self.tokasaurus_url:
            try:
                Address.of(url, None)
            except ConfigError as error:
                raise ConfigError(f"{_WHERE}.tokasaurus_url: {error}") from None
        for name, least in (
            ("max_retries", 0),
            ("base_timeout", 0.001),
            ("retry_delay", 0),
            ("startup_timeout", 0),
        ):
            if not getattr(self, name) >= least:
                value = getattr(self, name)
                raise ConfigError(f"{_WHERE}.{name}={value} must be at least {least}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"{_WHERE}.{name}={getattr(self, name)!r} must be one of {', '.join(choices)}"
                )

    @classmethod
    def of(cls, custom: Any) -> RolloutOptions:
        """Reads the section ``custom``, which may be missing.

        Args:
            custom: a mapping, as Hydra, OmegaConf or YAML give it; or None.

        Raises:
            ConfigError: a key is unknown, or a value is wrong.
        """
        given = plain(custom)
        if given is None:
            return cls()
        if not isinstance(given, Mapping):
            raise ConfigError(f"{_WHERE}={given!r} must have keys, such as tokasaurus_url")
        known = [each.name for each in fields(cls)]
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, 1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
                raise ConfigError(f"{_WHERE}.{name} is unknown; {hint}")
        return cls(**{name: _read(name, value) for name, value in given.items()})

    def url_of(self, replica_rank: int) -> str:
        """The engine of a replica, without ``/v1`` and a slash at its end."""
        return Address.of(self.tokasaurus_url[replica_rank % len(self.tokasaurus_url)], None).url

    def is_first_with_its_engine(self, replica_rank: int) -> bool:
        """Whether no replica before this one has the same engine."""
        before = {self.url_of(rank) for rank in range(min(replica_rank, len(self.tokasaurus_url)))}
        return self.url_of(replica_rank) not in before

    @property
    def sends_weights(self) -> bool:
        """Whether the trainer's weights go to the engines."""
        return not self.cartridges if self.weight_sync == "auto" else self.weight_sync == "http"


def checked_cartridges(cartridges: Any) -> tuple[dict[str, Any], ...]:
    """Cartridges as requests name them.

    Args:
        cartridges: a list of ``{"id", "source", "force_redownload"}``, or None for none.

    Raises:
        ConfigError: one of them is wrong; says which and why.
    """
    given = plain(cartridges)
    if given is None:
        return ()
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise ConfigError(f"cartridges={given!r} must be a list of {{id, source}}")
    return tuple(_cartridge(each, f"cartridges[{index}]") for index, each in enumerate(given))


def plain(value: Any) -> Any:
    """The value itself, or what an OmegaConf node holds."""
    omegaconf = sys.modules.get("omegaconf")  # without it nothing can be such a node
    if omegaconf is not None and omegaconf.OmegaConf.is_config(value):
        return omegaconf.OmegaConf.to_container(value, resolve=True)
    return value


def _read(name: str, value: Any) -> Any:
    if name == "cartridges":
        try:
            return checked_cartridges(value)
        except ConfigError as error:
            raise ConfigError(f"{_WHERE}.{error}") from None
    if name == "tokasaurus_url":
        urls = value.split(",") if isinstance(value, str) else value
        if not isinstance(urls, Sequence) or not all(isinstance(each, str) for each in urls):
            raise ConfigError(f"{_WHERE}.{name}={value!r} must be an address, or a list of them")
        return tuple(each.strip() for each in urls if each.strip())
    if name in _CHOICES:
        return value
    is_whole = name == "max_retries"
    if isinstance(value, bool) or not isinstance(value, int if is_whole else int | float):
        kind = "a whole number" if is_whole else "a number of seconds"
        raise ConfigError(f"{_WHERE}.{name}={value!r} must be {kind}")
    return value if is_whole else float(value)


def _cartridge(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}={given!r} must be {{id, source, force_redownload}}")
    for name in given:
        if name not in _CARTRIDGE_FIELDS:
            known = ", ".join(_CARTRIDGE_FIELDS)
            raise ConfigError(f"{where}.{name} is unknown; known are {known}")
    if not isinstance(given.get("id"), str) or not given["id"]:
        raise ConfigError(f"{where}.id={given.get('id')!r} must be a text, such as a path")
    if given.get("source", "local") not in CARTRIDGE_SOURCES:
        known = ", ".join(CARTRIDGE_SOURCES)
        raise ConfigError(f"{where}.source={given['source']!r} must be one of {known}")
    if not isinstance(given.get("force_redownload", False), bool):
        raise ConfigError(
            f"{where}.force_redownload={given['force_redownload']!r} must be true or false"
        )
    return dict(given)
