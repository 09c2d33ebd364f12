"""``toka`` in variants that no flag asks for: ``engine_variants.py VARIANT flag=value ...``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace

from tokasaurus.config.parser import parse_command_line
from tokasaurus.config.slices import EngineSlices
from tokasaurus.launch import replica_members
from tokasaurus.launch.assemble import assemble
from tokasaurus.launch.listening import listen
from tokasaurus.launch.supervisor import Supervisor


def all_steps_ahead(slices: EngineSlices) -> EngineSlices:
    """``scheduling_steps_ahead`` batches in flight, although the device needs fewer."""
    replicas = tuple(
        replace(each, manager=replace(each.manager, adapt_steps_ahead=False))
        for each in slices.replicas
    )
    return replace(slices, replicas=replicas)


def impatient(slices: EngineSlices) -> EngineSlices:
    """A replica that is started again has twice the time that its first start took."""
    replica_members._MIN_START_S, replica_members._START_FACTOR = 1.0, 2.0
    return slices


VARIANTS: Mapping[str, Callable[[EngineSlices], EngineSlices]] = {
    "all_steps_ahead": all_steps_ahead,
    "impatient": impatient,
}


def main() -> int:
    config = parse_command_line(sys.argv[2:], os.environ)
    listener = listen(config.host, config.port)
    config = replace(config, port=listener.getsockname()[1])
    return Supervisor(VARIANTS[sys.argv[1]](assemble(config)), listener).run()


if __name__ == "__main__":
    sys.exit(main())
