"""A worker without a model, and an oracle of what it must generate.

The device keeps what a real one keeps: page tables, lengths, last tokens, sampling parameters, and
a KV cache. A KV cell is the token it is of, its position, the version of the weights that computed
it, and a digest of this version and all tokens up to it, computed from the cell before it *as found
through the page table*. Every row checks all cells it attends to. The drawn token is a hash of the
seed, the sample, the generated position and the digest, so a token lost, repeated or reordered, a
page that is stale, or one that other weights computed, changes what comes out.

A cell of a cartridge has a number that follows from its paths and position in the place of a token,
and belongs to no version of the weights. A text goes on with its digest, as with that of no tokens.

Controls are carried out in order. An update from the files ``BAD_FILES`` is refused. A cartridge
cannot be written from a path that begins with "missing".
"""

from __future__ import annotations

import itertools
import zlib
from dataclasses import dataclass

import numpy as np

from tokasaurus.config.slices import ManagerConfig
from tokasaurus.protocol.commands import (
    Control,
    ControlDone,
    GroupAction,
    ReceiveWeights,
    ReleaseMemory,
    RestoreMemory,
    UpdateWeights,
    WriteCartridge,
)
from tokasaurus.protocol.messages import ForwardBatch, ForwardResult, GenerateRequest, Pooling
from tokasaurus.rounding import ceil_div

VOCAB_SIZE = 61

GOOD_FILES = ("good.safetensors",)
BAD_FILES = ("bad.safetensors",)  # the device refuses them
BAD_NAMES = ("bad",)  # of tensors; the same

_MASK = (1 << 64) - 1
EMPTY_CONTEXT = 0x0123456789ABCDEF
_NO_VERSION = -2  # of the weights: the cell is of a cartridge


def mix(digest: int, value: int) -> int:
    """A 64-bit digest that goes on with a value."""
    mixed = (digest ^ (value * 0x9E3779B97F4A7C15 & _MASK)) * 0xBF58476D1CE4E5B9 & _MASK
    return mixed ^ (mixed >> 31)


def context_of(weights_version: int, behind: int = EMPTY_CONTEXT) -> int:
    """The digest of no tokens, where the text comes behind a cartridge of this digest."""
    return mix(behind, weights_version)


def _mix_arrays(digests: np.ndarray, values: np.ndarray) -> np.ndarray:
    mixed = digests ^ (values.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    return mixed ^ (mixed >> np.uint64(31))


def draw(digest: int, seed: int, sample_index: int, position: int) -> int:
    """The token at a generated position."""
    return mix(mix(mix(digest, seed), sample_index), position) % VOCAB_SIZE


def logprob_of(digest: int, token: int) -> float:
    """The "logprob" of a token after a context, exact in fp32."""
    return -float(mix(digest, token + 1) % 4096)


def rank_of(digest: int, token: int) -> int:
    """The "rank" of a token after a context."""
    return 1 + mix(digest, token + 2000) % VOCAB_SIZE


def top_of(digest: int, count: int) -> list[tuple[int, float]]:
    """The "best" tokens after a context."""
    ids = [mix(digest, 1000 + rank) % VOCAB_SIZE for rank in range(count)]
    return [(token, logprob_of(digest, token)) for token in ids]


def cartridge_token(paths: tuple[str, ...], position: int) -> int:
    """What a cell of a cartridge has in the place of a token; no token of text is like it."""
    return VOCAB_SIZE + mix(zlib.crc32(repr(paths).encode()), position) % 1_000_000


def cartridge_digest(paths: tuple[str, ...], num_tokens: int) -> int:
    """The digest of the last cell of a cartridge."""
    digest = EMPTY_CONTEXT
    for position in range(num_tokens):
        digest = mix(digest, cartridge_token(paths, position))
    return digest


class Oracle:
    """Generates one sequence alone, without pages or batches, with weights of any versions.

    A grammar of "12" is one that the device gives up after 12 tokens. The prompt comes behind a
    cartridge of the digest ``behind``.

    Attributes:
        ids, logprobs, tops: what it has generated.
        has_ended: whether no token comes after these.
        by_length: it has ended at max_tokens or is cut, not at a stop id.
    """

    def __init__(
        self, request: GenerateRequest, sample_index: int, behind: int = EMPTY_CONTEXT
    ) -> None:
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.tops: list[list[tuple[int, float]]] = []
        self.has_ended = False
        self.by_length = False
        self._request = request
        self._sample_index = sample_index
        self._behind = behind
        self._tokens = request.prompt_ids.tolist()
        # By version: a digest, and the number of tokens that it is of.
        self._digests: dict[int, tuple[int, int]] = {}

    def generate(self, count: int, weights_version: int = 0) -> None:
        """Generates tokens with weights of one version."""
        request = self._request
        for _ in range(count):
            assert not self.has_ended, "a token after the end"
            digest = self._digest(weights_version)
            token = draw(digest, request.seed, self._sample_index, len(self.ids))
            self.ids.append(token)
            self._tokens.append(token)
            self.logprobs.append(logprob_of(digest, token))
            self.tops.append(top_of(digest, max(0, request.num_logprobs)))
            is_cut = len(self.ids) == int(request.grammar or 0)
            self.by_length = len(self.ids) == request.max_tokens or is_cut
            self.has_ended = self.by_length or token in request.stop_token_ids

    def _digest(self, weights_version: int) -> int:
        empty = (context_of(weights_version, self._behind), 0)
        digest, length = self._digests.get(weights_version, empty)
        for token in self._tokens[length:]:
            digest = mix(digest, token)
        self._digests[weights_version] = (digest, len(self._tokens))
        return digest


def oracle(request: GenerateRequest, sample_index: int) -> Oracle:
    """A sequence from its beginning to its end, with the first weights."""
    result = Oracle(request, sample_index)
    while not result.has_ended:
        result.generate(1)
    return result


def prompt_logprobs_oracle(
    request: GenerateRequest, weights_version: int = 0, behind: int = EMPTY_CONTEXT
) -> list[tuple[float, int, list[tuple[int, float]]]]:
    """Logprob, rank and top logprobs of each prompt token except the first."""
    digest = context_of(weights_version, behind)
    prompt = request.prompt_ids.tolist()
    rows = []
    for token, following in itertools.pairwise(prompt):
        digest = mix(digest, token)
        tops = top_of(digest, request.num_prompt_logprobs)
        rows.append((logprob_of(digest, following), rank_of(digest, following), tops))
    return rows


def pooled_state(kind: int, digest: int) -> list[float]:
    """The "pooled state" of a prompt with this digest, exact in fp32."""
    return [float(kind), float(digest % 4093), float(digest // 4093 % 4093)]


def pooled_oracle(
    request: GenerateRequest, weights_version: int = 0, behind: int = EMPTY_CONTEXT
) -> list[float]:
    """The pooled state of a request's prompt."""
    digest = context_of(weights_version, behind)
    for token in request.prompt_ids.tolist():
        digest = mix(digest, token)
    return pooled_state(request.pooling, digest)


@dataclass
class Slot:
    """What the device remembers of a slot."""

    seed: int = -1
    sample_index: int = -1
    num_generated: int = 0
    num_logprobs: int = -1
    last_token: int = -1
    length: int = 0
    cut_after: int | None = None  # generated tokens; from then on its rows say that it is cut


class FakeDevice:
    """Runs batches in order; raises AssertionError where a real worker would go wrong."""

    def __init__(self, config: ManagerConfig) -> None:
        self.config = config
        size = config.page_size
        self.max_pages = ceil_div(config.max_request_tokens, size)
        self.page_table = np.full((config.num_slots, self.max_pages), -1, np.int64)
        self.slots: dict[int, Slot] = {}
        self.cell_tokens = np.full((config.num_pages, size), -1, np.int64)
        self.cell_positions = np.full((config.num_pages, size), -1, np.int64)
        self.cell_digests = np.zeros((config.num_pages, size), np.uint64)
        self.cell_versions = np.full((config.num_pages, size), -1, np.int64)
        self.weights_version = 0
        self.has_weights_memory = self.has_kv_cache = self.has_weights = True
        self.keeps_files = True  # so that weights which were released can be read again
        self.refuses_updates = False  # whatever their files
        self.next_number = 0
        self.remembers: set[int] = set()  # slots whose sequences have adjustments
        # By (seed, sample index): generated tokens drawn so far. Never drawn twice, none left out.
        self.num_drawn: dict[tuple[int, int], int] = {}
        self.num_rows = 0
        self.num_prompt_tokens = 0
        self.num_entered = 0
        self.num_early_copies = 0
        self.pooled_positions: dict[int, list[int]] = {}  # by slot, of prompts that are being fed
        # By slot, as the first stage of a pipeline sees it: the batch that drew its last token.
        self.drawn_in: dict[int, int] = {}
        # Of each batch that decodes: how many batches before it drew the latest of its tokens.
        self.distances: list[int] = []

    def run(self, batch: ForwardBatch) -> ForwardResult:
        assert batch.number == self.next_number, "a batch is missing"
        assert self.has_weights, "a batch runs without weights"
        assert self.has_kv_cache, "a batch runs without a KV cache"
        self.next_number += 1
        self._patch(batch)
        self._copy_early(batch)
        self._check_limits(batch)
        self._check_groups(batch)
        self._check_lane(batch)
        rows, prompt_rows, pooled = [], [], []
        written: set[tuple[int, int]] = set()
        reads: list[tuple[int, int]] = []
        for slot in batch.decode_slots.tolist():
            state = self.slots[slot]
            self._write(slot, state.length, [state.last_token], written)
            state.length += 1
            reads.append((slot, state.length))
            rows.append((slot, state.length - 1))
        at = 0
        for index, slot in enumerate(batch.prefill_slots.tolist()):
            length = int(batch.prefill_lengths[index])
            start = int(batch.prefill_starts[index])
            assert length >= 1
            ids = batch.prefill_ids[at : at + length].tolist()
            at += length
            self._write(slot, start, ids, written)
            state = self.slots[slot]
            state.length = start + length
            reads.append((slot, state.length))
            is_drawn_from = index in batch.draw_chunks
            assert not is_drawn_from or batch.prefill_next_ids[index] == -1
            if batch.prefill_pooling is not None and batch.prefill_pooling[index]:
                pooled += self._pool(batch, index, is_last=is_drawn_from)
            width = int(batch.prefill_num_logprobs[index])
            if width >= 0:
                following = [*ids[1:], int(batch.prefill_next_ids[index])]
                if is_drawn_from:
                    following.pop()
                prompt_rows += [
                    (slot, start + offset, token, width) for offset, token in enumerate(following)
                ]
        assert at == len(batch.prefill_ids)
        self._copy_pages(batch.copy_sources, batch.copy_targets)
        decoding, feeding = batch.decode_slots.tolist(), batch.prefill_slots.tolist()
        assert len(set(batch.draw_slots.tolist())) == len(batch.draw_slots)
        for slot, chunk in zip(batch.draw_slots.tolist(), batch.draw_chunks.tolist(), strict=True):
            assert slot not in decoding
            assert slot not in feeding or feeding[chunk] == slot
            self.slots[slot].length = self.slots[feeding[chunk]].length
            reads.append((slot, self.slots[slot].length))  # a fork finds what its source wrote
            rows.append((slot, self.slots[slot].length - 1))
        for slot, length in reads:  # after all writes, as in a forward pass
            self._check_context(slot, length)
        self.drawn_in.update((slot, batch.number) for slot, _ in rows)
        self.num_rows += len(rows)
        self.num_prompt_tokens += len(batch.prefill_ids)
        return self._result(batch.number, rows, prompt_rows, pooled)

    def carry_out(self, control: Control) -> ControlDone:
        assert control.number == self.next_number, "a batch or control is missing"
        self.next_number += 1
        action, error = control.action, None
        if isinstance(action, UpdateWeights):
            assert action.version > self.weights_version
            if action.files == BAD_FILES or self.refuses_updates:
                error = f"{action.files[0]} has another checksum"
            else:
                self.weights_version = action.version
                self.has_weights_memory = self.has_weights = True
        elif isinstance(action, ReleaseMemory):
            assert action.weights or action.kv_cache
            if action.weights:
                assert self.has_weights_memory, "weights are released twice"
                self.has_weights_memory = self.has_weights = False
            if action.kv_cache:
                assert self.has_kv_cache, "a KV cache is released twice"
                self.has_kv_cache = False
                for cells in (self.cell_tokens, self.cell_positions, self.cell_versions):
                    cells[:] = -1
        elif isinstance(action, RestoreMemory):
            assert action.weights or action.kv_cache
            if action.weights:
                assert not self.has_weights_memory, "weights are restored twice"
                self.has_weights_memory, self.has_weights = True, self.keeps_files
            if action.kv_cache:
                assert not self.has_kv_cache, "a KV cache is restored twice"
                self.has_kv_cache = True
        elif isinstance(action, WriteCartridge):
            error = self._write_cartridge(action)
        elif isinstance(action, GroupAction):
            if isinstance(action, ReceiveWeights) and action.names == BAD_NAMES:
                error = f"it does not use a tensor {action.names[0]}"
        else:
            raise AssertionError(f"the device knows no {type(action).__name__}")
        return ControlDone(control.number, error, self.has_weights)

    def _pool(self, batch: ForwardBatch, index: int, *, is_last: bool) -> list[list[float]]:
        """A "state" names the kind of pooling, and has a digest of the whole prompt."""
        slot, start = int(batch.prefill_slots[index]), int(batch.prefill_starts[index])
        length, kind = int(batch.prefill_lengths[index]), int(batch.prefill_pooling[index])
        if start == 0:
            self.pooled_positions[slot] = []
        elif kind == Pooling.LAST:  # what comes before may have been found in the cache
            self.pooled_positions.setdefault(slot, [])
        positions = self.pooled_positions[slot]
        positions += range(start, start + length)
        if not is_last:
            return []
        if kind == Pooling.MEAN:
            assert positions == list(range(start + length)), "a hidden state is missing"
        del self.pooled_positions[slot]
        return [pooled_state(kind, self._digest(slot, start + length - 1))]

    def _write_cartridge(self, action: WriteCartridge) -> str | None:
        """Fills the cells of a cartridge; returns an error where its file is said to be missing."""
        assert self.has_kv_cache, "a cartridge is written without a KV cache"
        size = self.config.page_size
        assert len(set(action.pages.tolist())) == ceil_div(action.num_tokens, size)
        if action.paths[0].startswith("missing") or not self.keeps_files:
            return f"{action.paths[0]} does not exist"
        digest = EMPTY_CONTEXT
        for position in range(action.num_tokens):
            cell = (action.pages[position // size], position % size)
            token = cartridge_token(action.paths, position)
            digest = mix(digest, token)
            self.cell_tokens[cell] = token
            self.cell_positions[cell] = position
            self.cell_digests[cell] = digest
            self.cell_versions[cell] = _NO_VERSION
        return None

    def _copy_early(self, batch: ForwardBatch) -> None:
        sources, targets = batch.early_copy_sources, batch.early_copy_targets
        assert (sources is None) == (targets is None)
        if sources is not None and targets is not None:
            assert len(sources) == len(targets) > 0
            self._copy_pages(sources, targets)
            self.num_early_copies += len(targets)

    def _copy_pages(self, sources: np.ndarray, targets: np.ndarray) -> None:
        assert len(set(targets.tolist())) == len(targets)
        assert not set(targets.tolist()) & set(sources.tolist())
        for cells in (
            self.cell_tokens,
            self.cell_positions,
            self.cell_digests,
            self.cell_versions,
        ):
            cells[targets] = cells[sources]

    def _patch(self, batch: ForwardBatch) -> None:
        if batch.left_slots is not None:
            for slot in batch.left_slots.tolist():
                self.remembers.remove(slot)
        parameters = batch.parameters
        if parameters is not None:
            assert not self.remembers & set(parameters.slots.tolist()), "it was not told to forget"
            for group in parameters.adjusted:
                self.remembers.update(group.slots.tolist())
            for index, slot in enumerate(parameters.slots.tolist()):
                self.num_entered += 1
                self.page_table[slot] = -1
                self.drawn_in.pop(slot, None)
                self.slots[slot] = Slot(
                    seed=int(parameters.seed[index]),
                    sample_index=int(parameters.sample_index[index]),
                    num_generated=int(parameters.num_generated[index]),
                    num_logprobs=int(parameters.num_logprobs[index]),
                )
            for grammar in parameters.grammars:
                for slot in grammar.slots.tolist():
                    self.slots[slot].cut_after = int(grammar.text)
        slots, columns, pages = batch.table_slots, batch.table_columns, batch.table_pages
        assert len(slots) == len(columns) == len(pages)
        assert all(0 <= slot < self.config.num_slots for slot in slots.tolist())
        assert all(0 <= column < self.max_pages for column in columns.tolist())
        assert all(0 <= page < self.config.num_pages for page in pages.tolist())
        self.page_table[slots, columns] = pages

    def _check_limits(self, batch: ForwardBatch) -> None:
        named = batch.decode_slots.tolist() + batch.prefill_slots.tolist()
        assert len(set(named)) == len(named), "a slot has two rows"
        assert 0 < len(named) <= self.config.max_seqs_per_forward
        num_tokens = len(batch.decode_slots) + int(batch.prefill_lengths.sum())
        assert num_tokens <= self.config.max_tokens_per_forward

    def _check_lane(self, batch: ForwardBatch) -> None:
        """The first stage can tell which tokens it must have, and waits only if idle otherwise."""
        if not len(batch.decode_slots):
            return
        latest = max(self.drawn_in[slot] for slot in batch.decode_slots.tolist())
        self.distances.append(batch.number - latest)
        is_due = self.distances[-1] >= self.config.num_lanes
        assert is_due or not len(batch.prefill_ids), "prompts wait for the tokens of a lane"

    def _check_groups(self, batch: ForwardBatch) -> None:
        no_chunks = np.zeros_like(batch.group_first_decodes)
        has_chunks = batch.group_first_chunks is not None
        columns = (
            batch.group_first_decodes,
            batch.group_num_decodes,
            batch.group_first_chunks if has_chunks else no_chunks,
            batch.group_num_chunks if has_chunks else no_chunks,
            batch.group_first_columns,
            batch.group_num_columns,
        )
        slots = np.concatenate((batch.decode_slots, batch.prefill_slots))
        lengths = [self.slots[slot].length for slot in batch.decode_slots.tolist()]
        lengths = np.array(lengths + batch.prefill_starts.tolist())
        covered = np.zeros(len(slots), np.int32)
        for decode, num_decodes, chunk, num_chunks, column, num_columns in zip(
            *(values.tolist() for values in columns), strict=True
        ):
            assert 0 <= decode <= decode + num_decodes <= len(batch.decode_slots)
            assert 0 <= chunk <= chunk + num_chunks <= len(batch.prefill_slots)
            chunk += len(batch.decode_slots)
            members = np.r_[decode : decode + num_decodes, chunk : chunk + num_chunks]
            assert len(members) >= self.config.min_group_size
            end = column + num_columns
            pages = self.page_table[slots[members], column:end]
            assert num_columns > 0
            assert (pages == pages[0]).all(), "slots of a group hold different pages"
            shortest = lengths[members].min()
            assert end * self.config.page_size <= shortest, "a page of a group is not full"
            assert (covered[members] == column).all(), "columns are read twice or never"
            covered[members] = end

    def _cells(self, slot: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        positions = np.arange(start, end)
        pages = self.page_table[slot, positions // self.config.page_size]
        assert (pages >= 0).all(), "a position has no page"
        return pages, positions % self.config.page_size

    def _write(self, slot: int, start: int, ids: list[int], written: set[tuple[int, int]]) -> None:
        pages, offsets = self._cells(slot, start, start + len(ids))
        cells = set(zip(pages.tolist(), offsets.tolist(), strict=True))
        assert len(cells) == len(ids)
        assert not cells & written, "two rows write to one cell"
        written |= cells
        digest = context_of(self.weights_version)
        if start > 0:
            page, offset = self._cells(slot, start - 1, start)
            digest = int(self.cell_digests[page, offset][0])
            if self.cell_versions[page, offset][0] == _NO_VERSION:
                digest = context_of(self.weights_version, digest)
        for index, token in enumerate(ids):
            assert 0 <= token < VOCAB_SIZE
            digest = mix(digest, token)
            self.cell_tokens[pages[index], offsets[index]] = token
            self.cell_positions[pages[index], offsets[index]] = start + index
            self.cell_digests[pages[index], offsets[index]] = digest
            self.cell_versions[pages[index], offsets[index]] = self.weights_version

    def _check_context(self, slot: int, length: int) -> None:
        pages, offsets = self._cells(slot, 0, length)
        assert np.array_equal(self.cell_positions[pages, offsets], np.arange(length)), (
            f"slot {slot} attends to cells of other positions"
        )
        versions = self.cell_versions[pages, offsets]
        first = int(np.count_nonzero(versions == _NO_VERSION))  # cell of the text
        assert (versions[:first] == _NO_VERSION).all(), "a cartridge is behind text"
        assert (versions[first:] == self.weights_version).all(), (
            f"slot {slot} attends to cells that other weights computed"
        )
        digests = self.cell_digests[pages, offsets]
        before = np.concatenate([np.array([EMPTY_CONTEXT], np.uint64), digests[:-1]])
        before[first] = context_of(self.weights_version, int(before[first]))
        expected = _mix_arrays(before, self.cell_tokens[pages, offsets])
        assert np.array_equal(expected, digests), f"slot {slot} attends to cells of other contexts"

    def _digest(self, slot: int, position: int) -> int:
        page, offset = self._cells(slot, position, position + 1)
        return int(self.cell_digests[page, offset][0])

    def _result(
        self,
        number: int,
        rows: list[tuple[int, int]],
        prompt_rows: list[tuple[int, int, int, int]],
        pooled: list[list[float]],
    ) -> ForwardResult:
        width = max([0, *(self.slots[slot].num_logprobs for slot, _ in rows)])
        asked = any(self.slots[slot].num_logprobs >= 0 for slot, _ in rows)
        token_ids = np.zeros(len(rows), np.int32)
        logprobs = np.full(len(rows), np.nan, np.float32)
        top_ids = np.full((len(rows), width), -1, np.int32)
        top_logprobs = np.full((len(rows), width), np.nan, np.float32)
        cut_rows: list[int] = []
        for index, (slot, position) in enumerate(rows):
            state = self.slots[slot]
            digest = self._digest(slot, position)
            key = (state.seed, state.sample_index)
            assert self.num_drawn.get(key, 0) == state.num_generated, "a token is drawn twice"
            token = draw(digest, state.seed, state.sample_index, state.num_generated)
            state.num_generated += 1
            self.num_drawn[key] = state.num_generated
            state.last_token = token_ids[index] = token
            if state.cut_after is not None and state.num_generated >= state.cut_after:
                cut_rows.append(index)
            if state.num_logprobs >= 0:
                logprobs[index] = logprob_of(digest, token)
                for rank, (top, value) in enumerate(top_of(digest, state.num_logprobs)):
                    top_ids[index, rank], top_logprobs[index, rank] = top, value
        prompt_width = max([0, *(row[3] for row in prompt_rows)])
        prompt_logprobs = np.zeros(len(prompt_rows), np.float32)
        prompt_ranks = np.zeros(len(prompt_rows), np.int32)
        prompt_top_ids = np.full((len(prompt_rows), prompt_width), -1, np.int32)
        prompt_top_logprobs = np.full((len(prompt_rows), prompt_width), np.nan, np.float32)
        for index, (slot, position, following, count) in enumerate(prompt_rows):
            digest = self._digest(slot, position)
            prompt_logprobs[index] = logprob_of(digest, following)
            prompt_ranks[index] = rank_of(digest, following)
            for rank, (top, value) in enumerate(top_of(digest, count)):
                prompt_top_ids[index, rank], prompt_top_logprobs[index, rank] = top, value
        return ForwardResult(
            number=number,
            token_ids=token_ids,
            logprobs=logprobs if asked else logprobs[:0],
            top_ids=top_ids,
            top_logprobs=top_logprobs,
            prompt_logprobs=prompt_logprobs,
            prompt_ranks=prompt_ranks,
            prompt_top_ids=prompt_top_ids,
            prompt_top_logprobs=prompt_top_logprobs,
            device_s=0.001,
            pooled=np.array(pooled, np.float32) if pooled else None,
            cut_rows=np.array(cut_rows, np.int32) if cut_rows else None,
        )
