"""The seam between the model and the kernels of a device.

A backend owns what happens between the matrix products of a layer: attention over the paged KV
cache, and the element-wise work. It may also have kernels that draw tokens from logits. It knows
nothing of weights or slots. Tests compare every backend with ``reference.py``, which is the
definition, and kernels of sampling with ``model/sampling/sampler.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from tokasaurus.model.kv_cache import KVCache
from tokasaurus.model.upload import Staging
from tokasaurus.protocol.arrays import EMPTY_INT32, Int32Array

__all__ = [
    "DEFAULT_OPTIONS",
    "DRAW",
    "NO_GROUPED_ROWS",
    "NO_GROUPS",
    "Attention",
    "Backend",
    "BackendOptions",
    "GraphPlan",
    "GroupedRows",
    "HeadNorms",
    "ModelHeads",
    "Operators",
    "PrefixGroups",
    "Rotation",
    "SamplingKernels",
    "SequenceRows",
]


@dataclass(frozen=True, eq=False)
class PrefixGroups:
    """Sequences that share pages, which a backend may read once for all rows of a group.

    Group g is two ranges of sequences: ``num_decodes[g]`` from ``first_decodes[g]`` on decode, and
    ``num_chunks[g]`` from ``first_chunks[g]`` on feed a chunk of a prompt. One of the ranges may be
    empty. In the columns ``first_columns[g]`` to ``first_columns[g] + num_columns[g]`` of the page
    table, all these sequences name the same full pages. The positions of these pages come before
    those of all rows of the group, so each row sees them all. A group inside another comes after it
    and starts where it ends. A sequence's own columns are those behind its last group.

    Attributes:
        first_decodes: [groups], sequences of the batch.
        num_decodes: [groups].
        first_chunks: [groups], sequences of the batch, counted from the first decode on.
        num_chunks: [groups].
        first_columns: [groups], columns of the page table.
        num_columns: [groups].
    """

    first_decodes: Int32Array
    num_decodes: Int32Array
    first_chunks: Int32Array
    num_chunks: Int32Array
    first_columns: Int32Array
    num_columns: Int32Array

    def __len__(self) -> int:
        return len(self.first_decodes)


NO_GROUPS = PrefixGroups(*[EMPTY_INT32] * 6)


class GroupedRows(NamedTuple):
    """Rows of a batch whose prefix is read once for a group."""

    num_decodes: int
    num_prefills: int


NO_GROUPED_ROWS = GroupedRows(0, 0)


@dataclass(frozen=True)
class SequenceRows:
    """The rows of each sequence in a flat batch, and the length of its context.

    Sequence s owns rows ``query_starts[s] : query_starts[s + 1]``; its last row is at position
    ``kv_lengths[s] - 1``::

        sequence       0    1        2
        rows           a    b c d    e f         query_starts = [0, 1, 4, 6]
        positions      9    0 1 2    4 5         kv_lengths   = [10, 3, 6]

    Attributes:
        slots: [sequences], each one's row of the page table.
        query_starts: [sequences + 1].
        kv_lengths: [sequences], positions to attend to, including those of this batch.
        positions: [rows], on the host.
        page_table: [slots, pages] int32, on the device.
        num_decodes: sequences of one row that come first in the batch, and decode.
        groups: sequences that share pages. A backend may ignore them.
        decode_slots: [decodes] int32, on the device; None if the device does not know them.
        decode_lengths: [decodes] int32, likewise.
    """

    slots: Int32Array
    query_starts: Int32Array
    kv_lengths: Int32Array
    positions: Int32Array
    page_table: Tensor
    num_decodes: int = 0
    groups: PrefixGroups = NO_GROUPS
    decode_slots: Tensor | None = None
    decode_lengths: Tensor | None = None

    def decodes_on_device(self) -> tuple[Tensor, Tensor]:
        """Slots and lengths of the sequences that decode, [decodes] int32 each."""
        if self.decode_slots is not None and self.decode_lengths is not None:
            return self.decode_slots, self.decode_lengths
        count, staging = self.num_decodes, Staging(self.page_table.device)
        slots, lengths = staging.add(self.slots[:count]), staging.add(self.kv_lengths[:count])
        staging.send()
        return slots.tensor.clone(), lengths.tensor

    def chunks(self) -> SequenceRows:
        """The sequences that do not decode, as a batch of their own, without groups."""
        first = self.query_starts[self.num_decodes]
        return SequenceRows(
            self.slots[self.num_decodes :],
            self.query_starts[self.num_decodes :] - first,
            self.kv_lengths[self.num_decodes :],
            self.positions[first:],
            self.page_table,
        )

    def most_tokens(self) -> int:
        """Of a sequence; 0 if there is none."""
        return int(self.kv_lengths.max(initial=0))


class Rotation(NamedTuple):
    """The angles of one batch: cosines and sines, each [rows, 1, head_dim / 2] in fp32."""

    cos: Tensor
    sin: Tensor


class HeadNorms(NamedTuple):
    """RMS norms of each query head and each key head, before the rotation.

    Attributes:
        query: [head_dim], the weight.
        key: [head_dim].
        eps: is added to the mean of the squares.
    """

    query: Tensor
    key: Tensor
    eps: float


class Operators(Protocol):
    """The element-wise work between the products of a layer, on [rows, size] tensors."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight; the mean and the quotient are in fp32.

        Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467. The quotient is rounded to the
        dtype of x before it is multiplied by the weight.

        Args:
            x: [..., size], the last dimension is contiguous.
            weight: [size].
            eps: is added to the mean.
        """
        ...

    def add_rms_norm(self, stream: Tensor, added: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Adds to the residual stream in place, and returns the norm of the sum.

        Args:
            stream: [rows, size], contiguous; it is changed.
            added: [rows, size].
            weight: [size].
            eps: as for ``rms_norm``.
        """
        ...

    def silu_multiply(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up, [rows, size]; Shazeer 2020, https://arxiv.org/abs/2002.05202.

        Args:
            gate_up: [rows, 2 * size], gate in the left half.
        """
        ...


DRAW = np.dtype(
    [
        ("seed", np.int64),
        ("sample_index", np.int32),
        ("position", np.int32),
        ("temperature", np.float32),
        ("top_k", np.int32),
        ("top_p", np.float32),
        ("log_min_p", np.float32),
    ]
)
"""How a row draws, for ``SamplingKernels.draw``.

The first three give its random number (``model/sampling/randomness.py``). A temperature of 0 asks
for the first token of the ranking. Filters are off if ``top_k`` is 0, ``top_p`` is 1, and
``log_min_p`` is -infinity.
"""


class SamplingKernels(Protocol):
    """Work over whole rows of logits, [rows, vocabulary] in fp32, bf16 or fp16, where they are.

    Each row is on its own: its results depend neither on the rows beside it nor on the number of
    threads. ``model/sampling`` defines them, except for the last bits of weights. Scores are
    logits, divided by the temperature where it is given.
    """

    def draw(self, logits: Tensor, draws: Tensor) -> Tensor:
        """Draws a token for each row, [rows] int64.

        Args:
            logits: which may hold numbers that are not finite: then some token is drawn.
            draws: [rows, bytes] uint8, a ``DRAW`` for each row, on the device of the logits.
        """
        ...

    def log_sums(
        self,
        logits: Tensor,
        index: Tensor | None,
        temperature: Tensor | None,
        token_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The logarithms of the sums of e^score, which turn scores into logprobs.

        Args:
            logits: of all rows.
            index: [some] int64, which rows; None for all.
            temperature: [some] fp32; None if all are 1.
            token_ids: [some] int64, to be counted how many tokens have higher scores.

        Returns:
            [some] fp32, and the number of tokens with higher scores, [some] int64.
        """
        ...

    def ranked(
        self, logits: Tensor, index: Tensor | None, temperature: Tensor | None, depth: int
    ) -> tuple[Tensor, Tensor]:
        """The tokens with the highest scores, best first, and equal ones by id.

        Args:
            logits: of all rows.
            index: as for ``log_sums``.
            temperature: as for ``log_sums``.
            depth: how many, at most all.

        Returns:
            Scores in fp32 and ids in int64, [some, depth] each.
        """
        ...

    def mask(self, adjusted: Tensor, logits: Tensor, rows: Tensor, bits: Tensor) -> Tensor:
        """Logits without tokens that are not allowed, as ``masking.mask_rows`` defines them."""
        ...


class Attention(Protocol):
    """The attention of one batch, for all its layers."""

    def attend(
        self, layer: int, heads: Tensor, rotation: Rotation, norms: HeadNorms | None
    ) -> Tensor:
        """Norms and rotates, writes the rows' keys and values into their pages, attends causally.

        A row sees every position of its sequence up to its own. Scores are scaled by
        1 / sqrt(head_dim); query head h reads key/value head h // (heads / kv_heads).

        Args:
            layer: the index of the layer in the cache.
            heads: [rows, heads + 2 * kv_heads, head_dim]: query, key and value heads. It is not
                changed.
            rotation: of these rows.
            norms: of queries and keys; None if the model has none.

        Returns:
            [rows, heads * head_dim] in the dtype of the heads, contiguous.
        """
        ...


class GraphPlan(Protocol):
    """Attention whose tensors and grids stay as they are, so that a graph can replay its kernels.

    It has room for a number of rows, each of which decodes. A batch of fewer is filled up with rows
    that have no sequence: these read and write nothing in the KV cache, and their output may be
    anything.
    """

    def attention(self) -> Attention:
        """Enqueues what the layers share, and returns the attention of the batch filled last.

        Called before the layers, and recorded with them.
        """
        ...

    def fill(self, rows: SequenceRows | None) -> bool:
        """Plans a batch, on the stream that will replay. Nothing is waited for.

        Args:
            rows: sequences that decode, at most as many as there is room for. None for no sequence
                at all.

        Returns:
            False if this batch has to be planned by ``Backend.plan``; then nothing has changed.
        """
        ...


@dataclass(frozen=True)
class BackendOptions:
    """What a user may choose about kernels.

    Attributes:
        instruction_set: of the processor, by the name of the flag; "auto" takes the best.
        use_groups: read the prefix of a group once. None does so where it saves time.
    """

    instruction_set: str = "auto"
    use_groups: bool | None = True


DEFAULT_OPTIONS = BackendOptions()


@dataclass(frozen=True)
class ModelHeads:
    """What a model asks of attention, on one device.

    Attributes:
        num_heads: query heads.
        num_kv_heads: key heads, and as many value heads.
        head_dim: numbers of a head.
        dtype: of the heads.
        kept_dtype: of keys and values in the cache; None for that of the heads.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    kept_dtype: torch.dtype | None = None


class Backend(Protocol):
    """The kernels of one device over one KV cache.

    Args:
        cache: the pages to attend over.
        num_heads: query heads.
        options: the same for all calls.
    """

    name: ClassVar[str]
    """The value of the flag ``attention`` that asks for it."""

    is_independent_of_batch: ClassVar[bool]
    """Whether its attention and operators give a row the same bits whatever other rows there are,
    however its sequence was cut into chunks, and whatever its pages, groups and threads are."""

    def __init__(
        self, cache: KVCache, num_heads: int, options: BackendOptions = DEFAULT_OPTIONS
    ) -> None: ...

    @classmethod
    def why_not(cls, options: BackendOptions) -> str | None:
        """Why it cannot run on this machine, and the remedy; None if it can.

        Raises:
            ConfigError: these options exist on another machine only.
        """
        ...

    @classmethod
    def why_not_model(cls, heads: ModelHeads) -> str | None:
        """Why it cannot run a model with such heads, and the remedy; None if it can.

        Called only if ``why_not`` returns None.
        """
        ...

    @classmethod
    def operators(cls, options: BackendOptions) -> Operators:
        """The element-wise kernels. Called only if ``why_not`` returns None."""
        ...

    @classmethod
    def sampling(cls, options: BackendOptions) -> SamplingKernels | None:
        """The kernels of sampling; None if torch samples. Called as ``operators`` is."""
        ...

    def calibrate(self, shared: Callable[[Sequence[float]], list[float]]) -> None:
        """Measures what decisions depend on. Called at most once, when nothing else runs.

        Args:
            shared: from the numbers that this rank has measured, those that all ranks use.
        """
        ...

    def workspace_bytes(self, num_rows: int, longest: int) -> int:
        """The most memory that attention takes for one batch, beside what ``attend`` returns.

        Prefix groups that lie in one another more than once may take more: the reserve of the
        device's memory is for them.

        Args:
            num_rows: of the batch, at most.
            longest: positions of a sequence, at most.
        """
        ...

    @property
    def grouped_rows(self) -> GroupedRows:
        """Of the batch planned last."""
        ...

    def plan(self, rows: SequenceRows) -> Attention:
        """Prepares what a batch's layers share. Called once per batch, before its layers."""
        ...

    def graph_plan(self, num_rows: int, page_table: Tensor, max_tokens: int) -> GraphPlan | None:
        """Makes the tensors that a graph of decodes reads; each call makes others.

        Args:
            num_rows: of the graph.
            page_table: [slots, columns] int32, that of every batch.
            max_tokens: of a sequence. Batches with longer ones do not run as a graph.

        Returns:
            None if graphs cannot contain its kernels.
        """
        ...
