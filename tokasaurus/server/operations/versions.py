"""Which weights drew the tokens of an answer."""

from __future__ import annotations

from typing import Any

from tokasaurus.text.generation import Generation
from tokasaurus.text.samples import SampleOutput

__all__ = ["weights_versions"]


def weights_versions(generation: Generation, output: SampleOutput) -> list[dict[str, Any]]:
    """Runs of tokens with the same version of the weights, in order."""
    label = generation.weights.label
    return [
        {"version": version, "label": label(version), "num_tokens": num_tokens}
        for version, num_tokens in output.weights_versions
    ]
