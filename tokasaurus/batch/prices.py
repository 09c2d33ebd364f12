"""What tokens cost, in any currency."""

from __future__ import annotations

from dataclasses import dataclass

from tokasaurus.batch.records import Usage

__all__ = ["Prices"]

_MILLION = 1e6


@dataclass(frozen=True)
class Prices:
    """Prices of a million tokens.

    Attributes:
        prompt: of prompts, whether or not they were found in the prefix cache.
        generated: of generated tokens.
    """

    prompt: float
    generated: float

    def cost(self, usage: Usage) -> float:
        """What the tokens cost."""
        whole = usage.input_tokens * self.prompt + usage.output_tokens * self.generated
        return whole / _MILLION

    def shown(self, usage: Usage) -> str:
        """The same as text, with at least three digits that count."""
        cost = self.cost(usage)
        return f"{cost:,.2f}" if cost >= 1 or cost == 0 else f"{cost:.3g}"
