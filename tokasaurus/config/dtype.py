"""The dtype that a model runs in, and why."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DtypeChoice", "choose_dtype"]


@dataclass(frozen=True)
class DtypeChoice:
    """A dtype, and a line for the log that says why."""

    name: str
    reason: str


def choose_dtype(
    asked: str, device: str, checkpoint: str | None, bfloat16_instructions: str | None
) -> DtypeChoice:
    """Decides the dtype of weights, activations and KV cache.

    Args:
        asked: by the user; "auto" leaves it open.
        device: "cpu" or "cuda".
        checkpoint: the dtype of most weights in the files; None if unknown.
        bfloat16_instructions: the instruction set of the processor's kernels, if it multiplies
            bf16; otherwise None.
    """
    if asked != "auto":
        return DtypeChoice(asked, f"dtype={asked}: as asked")
    name, reason = _by_itself(device, checkpoint, bfloat16_instructions)
    return DtypeChoice(name, f"dtype=auto: {name}, {reason}")


def _by_itself(
    device: str, checkpoint: str | None, bfloat16_instructions: str | None
) -> tuple[str, str]:
    if device == "cuda":
        return "bfloat16", "which cuda multiplies fastest"
    if checkpoint is None:
        return "float32", "since neither the checkpoint nor config.json says another dtype"
    if checkpoint == "float32":
        return checkpoint, "as the checkpoint has it"
    if checkpoint == "bfloat16" and bfloat16_instructions is not None:
        instructions = f"instruction_set={bfloat16_instructions} multiplies it"
        return checkpoint, f"as the checkpoint has it, and {instructions}"
    return "float32", (
        f"although the checkpoint has {checkpoint}, which the kernels on this cpu do not multiply"
    )
