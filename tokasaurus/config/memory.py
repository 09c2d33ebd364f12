"""How the memory of a device is divided: weights first, then the KV cache, the rest for batches."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Memory"]

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_SCALES = ((1e9, "GB"), (1e6, "MB"), (1e3, "KB"))


@dataclass(frozen=True)
class Memory:
    """The memory of the device that a model runs on, and what the model takes of it.

    Attributes:
        device: "cpu" or "cuda".
        free_bytes: before the model is loaded; None if unknown.
        dtype: of weights and KV cache.
        num_weights: numbers that the weights hold.
        kv_elements: numbers that the KV cache holds for each token.
    """

    device: str
    free_bytes: int | None
    dtype: str
    num_weights: int
    kv_elements: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights."""
        return self.num_weights * _DTYPE_BYTES[self.dtype]

    @property
    def has_room_for_weights(self) -> bool:
        """Whether the weights fit, as far as is known."""
        return self.free_bytes is None or self.weight_bytes <= self.free_bytes

    @property
    def room(self) -> int | None:
        """Tokens of KV cache that fit beside the weights; None if unknown."""
        if self.free_bytes is None:
            return None
        return max(0, self.free_bytes - self.weight_bytes) // self.kv_bytes(1)

    def kv_bytes(self, num_tokens: int) -> int:
        """Bytes of a KV cache for this number of tokens."""
        return num_tokens * self.kv_elements * _DTYPE_BYTES[self.dtype]

    def weights_do_not_fit(self) -> str:
        """Why, and what helps."""
        need = f"the weights take {_size(self.weight_bytes)} in {self.dtype}"
        remedy = "free memory, or serve a smaller model"
        if _DTYPE_BYTES[self.dtype] > 2:
            remedy = f"dtype=bfloat16 takes half; otherwise {remedy}"
        return f"{need}, and {self._free()}; {remedy}"

    def kv_does_not_fit(self, num_tokens: int) -> str:
        """Why a KV cache of this size does not fit."""
        return (
            f"needs a KV cache of {num_tokens} tokens, {_size(self.kv_bytes(num_tokens))} in"
            f" {self.dtype}; {self._free()}, and beside {_size(self.weight_bytes)} of weights this"
            f" holds {self.room}"
        )

    def plan(self, num_tokens: int) -> str:
        """One line that says what takes how much, with a KV cache of this size."""
        used = self.weight_bytes + self.kv_bytes(num_tokens)
        rest = "" if self.free_bytes is None else f", {_size(self.free_bytes - used)} for the rest"
        return (
            f"memory: {self._free()}; {_size(self.weight_bytes)} for weights in {self.dtype},"
            f" {_size(self.kv_bytes(num_tokens))} for a KV cache of {num_tokens} tokens{rest}"
        )

    def _free(self) -> str:
        if self.free_bytes is None:
            return f"the free memory of {self.device} is unknown"
        return f"{self.device} has {_size(self.free_bytes)} free"


def _size(num_bytes: int) -> str:
    for scale, unit in _SCALES:
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes} bytes"
