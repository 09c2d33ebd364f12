"""How the memory of a device is divided: process, weights, the largest batch, then the KV cache.

All of it is arithmetic, from the shapes of the model. On CUDA the worker measures later what it
takes, and gives the KV cache the rest (``model.worker.memory_profile``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tokasaurus.config.slices import MemoryItem, ModelFacts
from tokasaurus.rounding import ceil_div

__all__ = ["DTYPE_BYTES", "Memory", "amount"]

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Of a number."""

# Of a row of a quantized product, beside its numbers of one byte: its scale, and their sum.
_QUANTIZED_ROW_BYTES = 8

_SCALES = ((1e9, "GB"), (1e6, "MB"), (1e3, "KB"))

# Of the worker's process without model and batches: the interpreter, torch and its threads, CUDA's
# context, the tables of slots.
_PROCESS_BYTES = 512 << 20

# Rows go through the head, the sampler and the logprobs in parts of this number of logits, or of
# one row (``model.sampling.drawing``). Each logit takes at most this number of bytes: the product
# in the model's dtype, the logits in fp32, and copies of them that are adjusted, sorted with their
# ids, and summed up. With all filters, penalties and logprobs at once, a logit took 27 bytes on a
# CPU; with an earlier sampler it took 55.
_PART_LOGITS = 1 << 25
_LOGIT_BYTES = 64

# Of these: the product and the logits in fp32.
_HEAD_BYTES = 8

# The share of the free memory that stays free if the KV cache takes the rest.
_SPARE = 0.1

# Partial results of attention on CUDA: a row has two, in fp32, if it is in a prefix group, and one
# more for each group that this group lies in.
_PARTIALS = 2


@dataclass(frozen=True)
class Memory:
    """The memory of the device that a worker runs on, and what its part of the model takes of it.

    The bound of a batch is for the kernels that ``auto`` takes. attention=reference gathers keys
    and values, which takes more.

    Attributes:
        device: "cpu" or "cuda".
        memory_bytes: free before the workers' processes start; None if unknown.
        dtype: of weights, activations and KV cache.
        facts: of the model.
        quantization: of the products; None if they have the dtype.
        num_sharing: workers that share the memory in equal parts.
        pp_size: stages, each with a part of the layers.
        tp_size: workers that share each layer.
        keeps_e4m3: keys and values take a byte for each number.
        graph_rows: of the largest CUDA graph; 0 for none.
    """

    device: str
    memory_bytes: int | None
    dtype: str
    facts: ModelFacts
    quantization: str | None = None
    num_sharing: int = 1
    pp_size: int = 1
    tp_size: int = 1
    keeps_e4m3: bool = False
    graph_rows: int = 0

    @property
    def free_bytes(self) -> int | None:
        """What one worker may take; None if unknown."""
        return None if self.memory_bytes is None else self.memory_bytes // self.num_sharing

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that a worker has, at most."""
        facts = self.facts
        others = (facts.num_parameters - facts.num_product_parameters) * self._element_bytes
        products = facts.num_product_parameters * self._element_bytes
        if self.quantization is not None:
            products = facts.num_product_parameters + facts.num_product_rows * _QUANTIZED_ROW_BYTES
        return ceil_div(
            others + ceil_div(products * self._most_layers, facts.num_layers), self.tp_size
        )

    @property
    def has_room_for_weights(self) -> bool:
        """Whether the weights fit, as far as is known."""
        return self.free_bytes is None or self._for_weights <= self.free_bytes

    def kv_bytes(self, num_tokens: int) -> int:
        """Bytes of a worker's part of a KV cache for this number of tokens."""
        width = 1 if self.keeps_e4m3 else self._element_bytes
        return num_tokens * self._kv_elements_per_token * width

    def batch_bytes(self, num_tokens: int) -> int:
        """The most bytes of tensors that a batch of this number of tokens has at a time."""
        return sum(item.num_bytes for item in self._batch_items(num_tokens))

    def items(self, num_tokens: int, max_tokens: int) -> list[MemoryItem]:
        """What takes memory: a KV cache and batches of these sizes, and what comes before them.

        Args:
            num_tokens: of the KV cache.
            max_tokens: of a batch.
        """
        facts = self.facts
        return [
            MemoryItem("process", _PROCESS_BYTES, "interpreter, libraries, tables of slots"),
            MemoryItem(
                "weights",
                self.weight_bytes,
                f"{facts.num_parameters:,} numbers in {self._weight_dtype}{self._share}",
            ),
            *self._batch_items(max_tokens),
            MemoryItem(
                "KV cache",
                self.kv_bytes(num_tokens),
                f"{num_tokens:,} tokens of {self.kv_bytes(1):,} bytes in {self._kept_dtype}",
            ),
        ]

    def _batch_items(self, num_tokens: int) -> list[MemoryItem]:
        facts, vocab_size = self.facts, self.facts.vocab_size
        token_bytes = facts.activation_elements_per_token * self._element_bytes
        layers = num_tokens * token_bytes
        rows = min(num_tokens, max(_PART_LOGITS // vocab_size, 1))
        logits = rows * vocab_size
        items = [
            MemoryItem(
                "activations",
                layers,
                f"{num_tokens:,} tokens of a batch, {facts.activation_elements_per_token:,} numbers"
                f" each in {self.dtype}",
            ),
            MemoryItem(
                "logits", logits * _HEAD_BYTES, f"{rows:,} rows of {vocab_size:,} at a time"
            ),
            MemoryItem(
                "sampling",
                logits * (_LOGIT_BYTES - _HEAD_BYTES),
                "the same rows with every filter, penalty and logprob",
            ),
        ]
        if self.device != "cpu":
            items.append(
                MemoryItem(
                    "attention",
                    self._partial_bytes(num_tokens),
                    f"{_PARTIALS} partial results for each of {num_tokens:,} rows",
                )
            )
        if self.graph_rows:
            rows = min(self.graph_rows, num_tokens)
            items.append(
                MemoryItem(
                    "CUDA graphs",
                    rows * token_bytes + self._partial_bytes(rows),
                    f"activations and attention of {rows:,} rows, which all graphs share",
                )
            )
        return items

    def _partial_bytes(self, num_rows: int) -> int:
        facts = self.facts
        head_dim = facts.kv_elements_per_token // (2 * facts.num_layers * facts.num_kv_heads)
        return num_rows * _PARTIALS * ceil_div(facts.num_heads, self.tp_size) * (head_dim + 1) * 4

    def room(self, max_tokens: int) -> int | None:
        """Tokens of KV cache that fit beside weights and the largest batch; None if unknown."""
        if self.free_bytes is None:
            return None
        left = self.free_bytes - self._for_weights - self.batch_bytes(max_tokens)
        return max(0, left) // self.kv_bytes(1)

    @property
    def most_room(self) -> int | None:
        """Tokens of KV cache that weights leave room for, if batches took none; None if unknown."""
        if self.free_bytes is None:
            return None
        return max(0, self.free_bytes - self._for_weights) // self.kv_bytes(1)

    def usual_room(self, max_tokens: int) -> int | None:
        """The same, where a part of the memory stays free; None if unknown."""
        room = self.room(max_tokens)
        if room is None or self.free_bytes is None:
            return None
        return max(0, room - int(_SPARE * self.free_bytes) // self.kv_bytes(1))

    def usual_batch(self, most: int, least: int) -> int:
        """Tokens of a batch that takes at most half of what the weights leave, by halving."""
        if self.free_bytes is None:
            return most
        half = (self.free_bytes - self._for_weights) // 2
        while most // 2 >= least and self.batch_bytes(most) > half:
            most //= 2
        return most

    def batch_fits(self, num_tokens: int) -> bool:
        """Whether weights and a batch fit, as far as is known."""
        return self.free_bytes is None or (
            self._for_weights + self.batch_bytes(num_tokens) <= self.free_bytes
        )

    def weights_do_not_fit(self) -> str:
        """Why, and what helps."""
        need = f"the weights take {amount(self.weight_bytes)} in {self._weight_dtype}"
        remedy = "free memory, or serve a smaller model"
        if self._element_bytes > 2 and self.quantization is None:
            remedy = f"dtype=bfloat16 takes half; otherwise {remedy}"
        return f"{need} and the process {amount(_PROCESS_BYTES)}, and {self._free()}; {remedy}"

    def batch_does_not_fit(self, num_tokens: int) -> str:
        """Why a batch of this size does not fit, and which does."""
        fitting = next((size for size in _smaller(num_tokens) if self.batch_fits(size)), None)
        remedy = "free memory" if fitting is None else f"max_tokens_per_forward={fitting} fits"
        return (
            f"needs {amount(self.batch_bytes(num_tokens))} for the tensors of a batch; "
            f"{self._free()}, of which {amount(self.weight_bytes)} are for weights and"
            f" {amount(_PROCESS_BYTES)} for the process; {remedy}"
        )

    def kv_does_not_fit(self, num_tokens: int, max_tokens: int) -> str:
        """Why a KV cache of this size does not fit beside batches of ``max_tokens``."""
        return (
            f"needs a KV cache of {num_tokens} tokens, {amount(self.kv_bytes(num_tokens))} in"
            f" {self._kept_dtype}; {self._free()}, and beside {amount(self.weight_bytes)} of"
            " weights,"
            f" {amount(self.batch_bytes(max_tokens))} for batches of {max_tokens} tokens and"
            f" {amount(_PROCESS_BYTES)} for the process this holds {self.room(max_tokens)}"
        )

    def plan(self, num_tokens: int, max_tokens: int) -> str:
        """One line that says what takes how much: a KV cache and batches of these sizes."""
        batch_bytes = self.batch_bytes(max_tokens)
        used = self._for_weights + self.kv_bytes(num_tokens) + batch_bytes
        rest = "" if self.free_bytes is None else f", {amount(self.free_bytes - used)} to spare"
        return (
            f"memory: {self._free()}; {amount(self.weight_bytes)} for weights in"
            f" {self._weight_dtype},"
            f" {amount(self.kv_bytes(num_tokens))} for a KV cache of {num_tokens} tokens, at most"
            f" {amount(batch_bytes)} for a batch of {max_tokens} tokens, {amount(_PROCESS_BYTES)}"
            f" for the process{rest}"
        )

    @property
    def _share(self) -> str:
        """Which part of the model a worker has, if not all of it."""
        parts = []
        if self.pp_size > 1:
            parts.append(f"{self._most_layers} of {self.facts.num_layers} layers")
        if self.tp_size > 1:
            parts.append(f"a share of 1/{self.tp_size}")
        return ", of which this worker has " + ", ".join(parts) if parts else ""

    @property
    def _most_layers(self) -> int:
        """Layers of a stage, at most: stages take equal times, and the last one has the head."""
        facts = self.facts
        if self.pp_size == 1:
            return facts.num_layers
        products = max(facts.num_product_parameters, 1)
        head = (facts.num_parameters - products) * facts.num_layers // products
        return min(
            ceil_div(facts.num_layers + max(head, 0), self.pp_size),
            max(facts.num_layers - self.pp_size + 1, 1),
        )

    @property
    def _kv_elements_per_token(self) -> int:
        facts = self.facts
        heads = max(facts.num_kv_heads // self.tp_size, 1)  # with fewer heads, workers share them
        share = facts.kv_elements_per_token * self._most_layers * heads
        return max(ceil_div(share, facts.num_layers * facts.num_kv_heads), 1)

    @property
    def _kept_dtype(self) -> str:
        return "fp8_e4m3" if self.keeps_e4m3 else self.dtype

    @property
    def _weight_dtype(self) -> str:
        return self.dtype if self.quantization is None else f"{self.quantization} and {self.dtype}"

    @property
    def _element_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def _for_weights(self) -> int:
        return self.weight_bytes + _PROCESS_BYTES

    def _free(self) -> str:
        if self.free_bytes is None:
            return f"the free memory of {self.device} is unknown"
        if self.num_sharing == 1 or self.memory_bytes is None:
            return f"{self.device} has {amount(self.free_bytes)} free"
        return (
            f"{self.device} has {amount(self.memory_bytes)} free, {amount(self.free_bytes)} for"
            f" each of {self.num_sharing} workers"
        )


def _smaller(num_tokens: int) -> Iterator[int]:
    """Round numbers of tokens below this one, the largest first."""
    power = 1 << (num_tokens - 1).bit_length() >> 1
    while power:
        yield power
        power //= 2


def amount(num_bytes: int) -> str:
    """Bytes in the unit that people read."""
    for scale, unit in _SCALES:
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes} bytes"
