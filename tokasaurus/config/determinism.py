"""What is known about determinism before the model is loaded.

Results are deterministic if a request gets the same bits whatever runs beside it. The worker
decides: it probes the products of the loaded model.
"""

from __future__ import annotations

from tokasaurus.config.engine import EngineConfig

__all__ = ["check_determinism", "plan_determinism"]


def check_determinism(config: EngineConfig, device: str) -> str | None:
    """Why results cannot be deterministic, and the remedy; None if nothing is known against it."""
    if device == "cuda":
        return "results depend on the batch on device=cuda for now; set device=cpu"
    if config.torch_compile:
        return "torch_compile=T lets results depend on the batch; leave it out"
    if config.attention in ("flashinfer", "reference", "triton"):
        return (
            f"attention={config.attention} lets results depend on the batch; set attention=compiled"
        )
    if config.kv_cache_dtype != "auto":
        return (
            f"kv_cache_dtype={config.kv_cache_dtype} takes attention=reference, which lets results"
            " depend on the batch; leave it out"
        )
    return None


def plan_determinism(config: EngineConfig, obstacle: str | None) -> str:
    """A line for ``--show``. The obstacle is what ``check_determinism`` returns."""
    if config.deterministic is False:
        return "not deterministic: deterministic=F"
    if obstacle is not None:
        return f"not deterministic: {obstacle}"
    if config.deterministic:
        return "deterministic: products that depend on the number of rows will run on fixed tiles"
    return "deterministic if the products of the loaded model are; the log will say"
