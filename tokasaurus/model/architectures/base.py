"""What every architecture tells the engine about itself. Loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from tokasaurus.model.config import ModelConfig
from tokasaurus.model.json_fields import JsonFields

if TYPE_CHECKING:
    from tokasaurus.model.architectures.llama_model import LlamaModel

__all__ = ["Architecture"]


class Architecture(Protocol):
    """One architecture. Its module loads no torch: that is for ``model_class`` to do."""

    def parse(self, fields: JsonFields, rope_scaling: JsonFields | None) -> ModelConfig:
        """Reads ``config.json`` with the defaults that transformers gives this architecture.

        A field that would change the result and is not implemented is refused by name, never
        ignored.

        Args:
            fields: the whole file.
            rope_scaling: replaces the file's RoPE scaling; None keeps it.

        Raises:
            ModelError: names the file and the field.
        """
        ...

    def model_class(self) -> type[LlamaModel]:
        """Imports and returns the class of the model. Loads torch."""
        ...
