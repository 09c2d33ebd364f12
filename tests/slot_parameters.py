"""Parameters of sequences that enter slots, neutral but for what a test is about."""

from __future__ import annotations

from typing import Any

import numpy as np

from tokasaurus.protocol.messages import Sampling, SlotGrammar, SlotParameters

__all__ = ["entering"]


def entering(slots: list[int], *grammars: SlotGrammar, **fields: Any) -> SlotParameters:
    """``fields`` are others of ``SlotParameters``."""
    zeros = np.zeros(len(slots), np.int32)
    return SlotParameters(
        slots=np.array(slots, np.int32),
        samplings=(Sampling(),),
        sampling_index=zeros,
        seed=zeros.astype(np.int64),
        sample_index=zeros,
        num_generated=zeros,
        num_logprobs=zeros,
        grammars=grammars,
        **fields,
    )
