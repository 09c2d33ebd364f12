"""What is special about an engine that starts beside the one that it follows."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.memory import amount
from tokasaurus.config.resolve import data_dir_of
from tokasaurus.config.slices import EngineSlices
from tokasaurus.errors import ConfigError
from tokasaurus.launch.assemble import assemble
from tokasaurus.launch.keeping.notes import Begin, Standing
from tokasaurus.launch.machine import devices_here
from tokasaurus.launch.processes import Launcher, LocalLauncher

__all__ = ["check_successor", "placed_beside", "words_of"]


def words_of(
    begin: Begin, environment: Mapping[str, str]
) -> tuple[Sequence[str], Mapping[str, str]]:
    """The command line and the environment of an engine. What restarts have added wins."""
    overrides = environment.get("OVERRIDES")
    if overrides is None or not begin.added_words:
        return (*begin.words, *begin.added_words), environment
    # The words of the variable count after those of the command line.
    both = f"{overrides} {shlex.join(begin.added_words)}"
    return begin.words, {**environment, "OVERRIDES": both}


def check_successor(config: EngineConfig, before: Standing, port: int) -> None:
    """Checks what a new engine cannot change.

    Args:
        config: of the new one.
        before: the old one.
        port: of both.

    Raises:
        ConfigError: names the flag.
    """
    remedy = "a restart cannot change it: stop toka, and start it again"
    if config.port not in (0, port):
        raise ConfigError(f"port={config.port}, and the engine has port={port}; {remedy}")
    if config.host != before.host:
        raise ConfigError(f"host={config.host}, and the engine has host={before.host}; {remedy}")
    data_dir = data_dir_of(dataclasses.replace(config, port=port))
    if Path(data_dir).expanduser().resolve() != Path(before.data_dir).expanduser().resolve():
        raise ConfigError(f"data_dir={data_dir}, and batches are in {before.data_dir}; {remedy}")
    if config.profile:
        raise ConfigError(
            "profile=T: both engines would write the same file; toka restart profile=F"
        )
    if config.launcher != "local":
        raise ConfigError(
            f"launcher={config.launcher}: only an engine on one machine can be restarted, since the"
            " places of its processes are taken; stop toka, and start it again"
        )


def placed_beside(config: EngineConfig, before: Standing) -> tuple[EngineSlices, Launcher]:
    """Resolves a configuration for the memory that there is beside the running engine.

    Raises:
        ConfigError: the new engine does not fit, or only with a smaller KV cache or smaller
            batches than the old one has, and nobody has asked for that.
        ModelError: the model cannot be found, or its architecture is unknown.
    """
    devices = devices_here(config)
    left = max(0, devices.memory_bytes - before.untaken_bytes)
    arithmetic = ""
    if before.untaken_bytes:
        arithmetic = (
            f" ({amount(devices.memory_bytes)} are free; {before.untaken_plan}; so a new one"
            f" beside it has {amount(left)})"
        )
    try:
        slices = assemble(config, dataclasses.replace(devices, memory_bytes=left))
    except ConfigError as error:
        raise ConfigError(f"{error}{arithmetic}") from None
    tokens = slices.replicas[0].manager.max_tokens_per_forward
    plan = slices.memory_plan.line.removeprefix("memory: ")
    pairs = (
        ("kv_cache_num_tokens", slices.memory_plan.kv_tokens, before.num_kv_tokens),
        ("max_tokens_per_forward", tokens, before.max_tokens_per_forward),
    )
    for flag, now, then in pairs:
        if now < then and getattr(config, flag) in (None, "auto"):
            raise ConfigError(
                f"beside the running engine there is room for {flag}={now}, and that engine has"
                f" {then}: {plan}{arithmetic}; accept it with toka restart {flag}={now}, free"
                " memory, or stop toka and start it again"
            )
    return slices, LocalLauncher()
