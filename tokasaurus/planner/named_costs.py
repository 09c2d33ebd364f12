"""Cost models by the value of a flag: a preset, a fixed time, or a file."""

from __future__ import annotations

import math
from pathlib import Path

from tokasaurus.errors import ConfigError
from tokasaurus.planner.cost_file import read_cost
from tokasaurus.planner.cost_model import INSTANT, CostModel, fixed
from tokasaurus.planner.estimate import Gpu, ModelShape, estimate

__all__ = ["PRESETS", "cost_model"]

# An estimate. The data sheet of the H100 SXM promises 3.35 TB/s and 989 TFLOP/s of dense bf16. The
# H200 has the same processor with 4.8 TB/s; one was measured at 4.3 TB/s and 790 TFLOP/s. The same
# shares are assumed here, less a quarter of the products for shapes that are not ideal.
_H100 = Gpu(bytes_per_s=3.0e12, flops_per_s=590e12)

# From the published configurations of Llama-3.2-1B and Llama-3.1-8B.
_LLAMA_1B = ModelShape(16, 2048, 32, 8, 64, 128256, 0.973e9)
_LLAMA_8B = ModelShape(32, 4096, 32, 8, 128, 128256, 6.98e9)

PRESETS = {
    "llama-1b-h100": estimate(_LLAMA_1B, _H100),
    "llama-8b-h100": estimate(_LLAMA_8B, _H100),
    "instant": INSTANT,
}


def cost_model(name: str) -> CostModel:
    """A preset by name, ``fixed:SECONDS``, or a file that ``toka-bench calibrate`` has written.

    Raises:
        ConfigError: there is no such preset or file, the file is not a cost model, or the seconds
            are not a number of at least 0.
    """
    if name in PRESETS:
        return PRESETS[name]
    if name.endswith((".yaml", ".yml")) or Path(name).is_file():
        return read_cost(name)
    kind, _, seconds = name.partition(":")
    try:
        step_s = float(seconds) if kind == "fixed" else math.nan
    except ValueError:
        step_s = math.nan
    if not 0 <= step_s < math.inf:
        known = ", ".join(PRESETS)
        raise ConfigError(
            f"cost={name}: expected one of {known}, such as fixed:0.003, or a file that"
            " toka-bench calibrate has written"
        )
    return fixed(step_s)
