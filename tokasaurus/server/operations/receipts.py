"""The receipt in an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokasaurus.text.generation import Generation
from tokasaurus.text.receipts import FIELD

__all__ = ["receipt_field"]


def receipt_field(generations: Sequence[Generation]) -> dict[str, Any]:
    """The field of an answer that has its receipt; none if the client asked for none.

    Args:
        generations: of all prompts, whose output was taken.
    """
    receipts = generations[0].request.receipts
    return {} if receipts is None else {FIELD: receipts.write(generations)}
