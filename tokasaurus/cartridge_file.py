"""A cartridge's file: the keys and values of a trained KV cache. No torch.

The file is in the safetensors format. For each layer it has ``keys.{layer}`` and
``values.{layer}``, [tokens, kv_heads, head_dim] in BF16, F16 or F32. Position 0 comes first. The
keys are rotated to positions 0, 1, 2, ..., as the KV cache keeps them.
"""

from __future__ import annotations

from tokasaurus.errors import ModelError
from tokasaurus.listing import listing
from tokasaurus.safetensors_file import SafetensorsFile

__all__ = ["CartridgeFile", "key_name", "value_name"]

_DTYPES = ("BF16", "F16", "F32")


def key_name(layer: int) -> str:
    return f"keys.{layer}"


def value_name(layer: int) -> str:
    return f"values.{layer}"


class CartridgeFile(SafetensorsFile):
    """An open cartridge.

    Raises:
        ModelError: the file cannot be read, is damaged, or has no keys; names the file.
    """

    @property
    def num_tokens(self) -> int:
        """The number of positions, of which ``check`` says whether all tensors have them."""
        first = self.tensors.get(key_name(0))
        if first is None or not first.shape or not first.shape[0]:
            raise ModelError(
                f"{self.path} is not a cartridge: it needs tensors {key_name(0)} and "
                f"{value_name(0)} of [tokens, kv_heads, head_dim], and so on for each layer"
            )
        return first.shape[0]

    def check(self, num_layers: int, num_kv_heads: int, head_dim: int) -> None:
        """Compares the tensors with a model's sizes.

        Raises:
            ModelError: names the file and the tensor.
        """
        shape = (self.num_tokens, num_kv_heads, head_dim)
        names = [name(layer) for layer in range(num_layers) for name in (key_name, value_name)]
        if missing := [name for name in names if name not in self.tensors]:
            raise ModelError(
                f"{self.path} lacks tensors: {listing(missing)}; the model has {num_layers} layers"
            )
        if unknown := sorted(self.tensors.keys() - set(names)):
            raise ModelError(
                f"{self.path} has tensors that a cartridge of {num_layers} layers does not have: "
                f"{listing(unknown)}"
            )
        for name in names:
            entry = self.tensors[name]
            if entry.dtype not in _DTYPES:
                raise ModelError(
                    f"{self.path}: tensor {name} is {entry.dtype}; it can be {', '.join(_DTYPES)}"
                )
            if entry.shape != shape:
                raise ModelError(
                    f"{self.path}: tensor {name} has shape {list(entry.shape)}; "
                    f"this model needs {list(shape)}"
                )
