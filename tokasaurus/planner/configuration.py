"""The configuration of an engine whose device is simulated, from the flags alone."""

from __future__ import annotations

import dataclasses

from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.resolve import resolve
from tokasaurus.config.slices import EngineSlices, ModelFacts
from tokasaurus.planner.simulated_device import STOP_ID, VOCAB_SIZE

__all__ = ["simulated_slices"]

_FACTS = ModelFacts(
    path="",
    vocab_size=VOCAB_SIZE,
    num_layers=64,
    hidden_size=64,
    num_heads=64,
    num_kv_heads=64,
    intermediate_size=64,
    max_position_embeddings=1 << 30,  # only the KV cache limits requests
    kv_elements_per_token=1,
    num_parameters=0,
    num_product_parameters=0,
    num_product_rows=0,
    activation_elements_per_token=0,
    eos_token_ids=(STOP_ID,),
)


def simulated_slices(config: EngineConfig, facts: ModelFacts = _FACTS) -> EngineSlices:
    """Resolves flags for a device of unlimited memory.

    Args:
        config: the flags.
        facts: the facts of the model that the device pretends to run.

    Raises:
        ConfigError: the flags contradict one another.
    """
    config = dataclasses.replace(config, device="cpu")
    return resolve(config, facts, num_cuda_devices=0, memory_bytes=None)
