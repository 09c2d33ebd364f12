"""The flags of ``toka-batch run``: those of the engine, and a few of its own."""

from __future__ import annotations

from dataclasses import dataclass, fields

from tokasaurus.batch.prices import Prices
from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.schema import flag

__all__ = ["BatchRunConfig"]

_GROUP = "Batches"


@dataclass(frozen=True, kw_only=True)
class BatchRunConfig(EngineConfig):
    """The flags of the engine, and those of the command."""

    part: str | None = flag(
        None,
        group=_GROUP,
        help=(
            "I/N: of the files of a directory or pattern, answer every N-th, beginning with number "
            "I, which counts from 0. So N machines share the work."
        ),
        adapts="all files",
    )
    price_per_million: float | None = flag(
        None,
        group=_GROUP,
        minimum=0,
        help="What a million tokens cost, in any currency, to say what all of them cost.",
        adapts="no cost is shown",
    )
    prompt_price_per_million: float | None = flag(
        None,
        group=_GROUP,
        minimum=0,
        help="The same for tokens of prompts only.",
        adapts="price_per_million",
    )
    generated_price_per_million: float | None = flag(
        None,
        group=_GROUP,
        minimum=0,
        help="The same for generated tokens only.",
        adapts="price_per_million",
    )

    @property
    def engine(self) -> EngineConfig:
        """The flags of the engine alone."""
        return EngineConfig(
            **{item.name: getattr(self, item.name) for item in fields(EngineConfig)}
        )

    @property
    def prices(self) -> Prices | None:
        """None if the user has set none."""
        each = [
            self.price_per_million if price is None else price
            for price in (self.prompt_price_per_million, self.generated_price_per_million)
        ]
        if each == [None, None]:
            return None
        return Prices(each[0] or 0.0, each[1] or 0.0)
