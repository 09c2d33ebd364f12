"""Which weights drew the tokens of an answer."""

from __future__ import annotations

from typing import Any

from tokasaurus.text.generation import Generation
from tokasaurus.text.samples import SampleOutput

__all__ = ["versions_field", "weights_versions"]


def weights_versions(generation: Generation, output: SampleOutput) -> list[dict[str, Any]]:
    """Runs of tokens with the same version of the weights, in order."""
    label = generation.weights.label
    return [
        {"version": version, "label": label(version), "num_tokens": num_tokens}
        for version, num_tokens in output.weights_versions
    ]


def versions_field(
    generation: Generation, output: SampleOutput, wanted: bool | None
) -> dict[str, Any]:
    """The field of an answer that has them, or nothing.

    Args:
        generation: of the answer.
        output: a sample of it, or its next piece.
        wanted: what the client says; None leaves them out as long as the engine has only had the
            weights that it started with.
    """
    if wanted is None:
        wanted = not generation.weights.are_original
    return {"weights_versions": weights_versions(generation, output)} if wanted else {}
