"""Grammar matchers: they compute the tokens that each slot may draw next.

The manager plans a sequence with a grammar like any other, several batches ahead. Its allowed
tokens follow from its last one, which only the worker knows. A thread computes them while the next
batch runs its layers::

    main thread    ── layers of t ── draw t ── layers of t+1 ──────────────── draw t+1 ── ...
                                       │ ids                              masks ▲
    grammar thread                     └──── match t, compute the masks ────────┘

Only this thread uses matchers. The library's own threads compute many masks at once. The thread
first loads the vocabulary while the main thread loads the model. Later that would stop everything
for seconds, because the libraries involved hold Python's lock. Slots without a grammar cost
nothing.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import llguidance
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokasaurus.errors import ProtocolError, RequestError
from tokasaurus.grammars import GrammarCompiler, Vocabulary, holds_json
from tokasaurus.model.backend.base import SamplingKernels
from tokasaurus.model.backend.masking import mask_rows
from tokasaurus.model.download import Download
from tokasaurus.model.sampling.digits import DigitLimit, JsonText
from tokasaurus.model.sampling.slot_names import SlotNames
from tokasaurus.model.upload import Staging
from tokasaurus.protocol.arrays import Int32Array
from tokasaurus.protocol.messages import SlotGrammar, SlotParameters
from tokasaurus.rounding import ceil_div

__all__ = ["Matchers", "OpenMatchers", "SentMasks", "TokenMasks"]

log = logging.getLogger(__name__)

# Compiled grammars that are kept. Copying one is much cheaper than compiling it.
_MAX_COMPILED = 256


@dataclass(frozen=True, eq=False)
class TokenMasks:
    """The tokens that some sampling rows of a batch may draw; the others may draw any token.

    Attributes:
        rows: [masks], ascending.
        bits: [masks, bytes of the vocabulary], lowest bit first; an allowed token's bit is set.
        given_up: [masks], whether the grammar cannot be followed any further. Such a row may only
            draw an end, and its text is incomplete.
    """

    rows: NDArray[np.intp]
    bits: NDArray[np.uint8]
    given_up: NDArray[np.bool_]

    @staticmethod
    def of_everything(num_rows: int, vocab_size: int) -> TokenMasks:
        """Masks for all rows that allow every token."""
        bits = np.full((num_rows, ceil_div(vocab_size, 8)), 255, np.uint8)
        return TokenMasks(np.arange(num_rows), bits, np.zeros(num_rows, np.bool_))

    @property
    def cut_rows(self) -> Int32Array | None:
        """The sampling rows with a grammar that is given up; None if there are none."""
        return self.rows[self.given_up].astype(np.int32) if self.given_up.any() else None

    def send(self, device: torch.device, kernels: SamplingKernels | None) -> SentMasks:
        """Copies the masks to the device of the logits, as they are: a bit for each token."""
        return SentMasks(self, device, kernels)


class SentMasks:
    """Masks on the device.

    Args:
        masks: of one batch.
        device: of the logits.
        kernels: that apply them; None if torch does.
    """

    def __init__(
        self, masks: TokenMasks, device: torch.device, kernels: SamplingKernels | None
    ) -> None:
        staging = Staging(device)
        bits, rows = staging.add(masks.bits), staging.add_indices(masks.rows)
        staging.send()
        self._host_rows, self._rows, self._bits = masks.rows, rows.tensor, bits.tensor
        self._mask = mask_rows if kernels is None else kernels.mask

    def apply(self, adjusted: Tensor, logits: Tensor, part: slice) -> Tensor:
        """Logits with -inf for tokens that are not allowed; the same tensor if no row has a mask.

        Args:
            adjusted: [rows of the part, vocabulary]. Never changed.
            logits: before adjustments. They replace rows in which adjustments forbid every allowed
                token: the grammar wins.
            part: of the sampling rows.
        """
        first, last = np.searchsorted(self._host_rows, [part.start, part.stop]).tolist()
        if first == last:
            return adjusted
        rows = self._rows[first:last] - part.start
        return self._mask(adjusted, logits, rows, self._bits[first:last])


class Matchers:
    """The grammars of all slots.

    Args:
        num_slots: of the worker.
        vocab_size: of the model.
        load_vocabulary: called at once in another thread. None if no grammar will come.
        names: of the slots' requests, for the log.

    Attributes:
        waited_s: seconds that ``masks`` has waited in all.
    """

    def __init__(
        self,
        num_slots: int,
        vocab_size: int,
        load_vocabulary: Callable[[], Vocabulary] | None,
        names: SlotNames | None = None,
    ) -> None:
        self._work = _Work(num_slots, vocab_size, SlotNames() if names is None else names)
        self._thread: ThreadPoolExecutor | None = None
        # Jobs that nothing has waited for yet.
        self._jobs: list[Future[None]] = []
        self._constrained = np.zeros(num_slots, np.bool_)
        self.waited_s = 0.0
        # Whether any grammar has come.
        self._is_used = False
        if load_vocabulary is not None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
            self._submit(partial(self._work.start, load_vocabulary))

    def wait(self) -> None:
        """Waits until all jobs are done, and raises the first exception of a job."""
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            job.result()

    def enter(self, parameters: SlotParameters) -> None:
        """Takes the grammars of sequences that enter slots, with or without one.

        Raises:
            ProtocolError: a sequence has a grammar, but there is no vocabulary.
        """
        if not (self._is_used or parameters.grammars):
            return
        if self._thread is None:
            raise ProtocolError("a sequence has a grammar, but the worker has no vocabulary")
        self._is_used = True
        left = parameters.slots[self._constrained[parameters.slots]]
        if len(left):
            self._constrained[left] = False
            self._submit(partial(self._work.leave, left.tolist()))
        for grammar in parameters.grammars:
            self._constrained[grammar.slots] = True
            self._submit(partial(self._work.enter, grammar))

    def masks(self, slots: Int32Array) -> TokenMasks | None:
        """Masks of these slots, once they are computed; None if no slot has a grammar."""
        if not self._is_used:
            return None
        rows = np.flatnonzero(self._constrained[slots])
        if not len(rows):
            return None
        started = time.perf_counter()
        self.wait()
        self.waited_s += time.perf_counter() - started
        constrained = slots[rows]
        bits = self._work.masks[constrained].view(np.uint8)
        return TokenMasks(rows, bits, self._work.given_up[constrained])

    def advance(self, masks: TokenMasks, slots: Int32Array, token_ids: Download) -> None:
        """Lets the next masks be computed once the drawn tokens arrive.

        Args:
            masks: of the drawn tokens.
            slots: [sampling rows].
            token_ids: [sampling rows].
        """
        self._submit(partial(self._work.advance, slots[masks.rows].tolist(), masks.rows, token_ids))

    def _submit(self, job: Callable[[], None]) -> None:
        assert self._thread is not None
        self._jobs.append(self._thread.submit(job))


class OpenMatchers:
    """In the place of ``Matchers`` during the warm-up: all rows have masks, which allow any token.

    So the memory that masks take is used without a vocabulary and without grammars.

    Args:
        vocab_size: of the model.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def enter(self, parameters: SlotParameters) -> None:
        """Does nothing: no sequence of the warm-up has a grammar."""

    def masks(self, slots: Int32Array) -> TokenMasks:
        return TokenMasks.of_everything(len(slots), self._vocab_size)

    def advance(self, masks: TokenMasks, slots: Int32Array, token_ids: Download) -> None:
        """Does nothing: the next masks allow any token too."""


class _Work:
    """The state of the grammar thread."""

    _compiler: GrammarCompiler
    _pool: llguidance.LLExecutor
    # [slots, 32-bit words of the vocabulary]
    masks: Int32Array
    _only_eos: NDArray[np.uint8]
    _digit_limit: DigitLimit

    def __init__(self, num_slots: int, vocab_size: int, names: SlotNames) -> None:
        self._vocab_size = vocab_size
        self._names = names
        self._compiled: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()
        self._matchers: list[llguidance.LLMatcher | None] = [None] * num_slots
        # The texts of slots whose grammar is of JSON.
        self._texts: dict[int, JsonText] = {}
        self.given_up = np.zeros(num_slots, np.bool_)

    def start(self, load_vocabulary: Callable[[], Vocabulary]) -> None:
        vocabulary = load_vocabulary()
        self._compiler = GrammarCompiler(vocabulary)
        self._pool = llguidance.LLExecutor()
        num_words = ceil_div(max(self._vocab_size, len(vocabulary.tokens)), 32)
        self.masks = np.zeros((len(self._matchers), num_words), np.int32)
        self._only_eos = np.zeros(num_words * 4, np.uint8)
        for token_id in vocabulary.eos_token_ids:
            self._only_eos[token_id // 8] |= 1 << token_id % 8
        self._digit_limit = DigitLimit(vocabulary.tokens, num_words)

    def enter(self, grammar: SlotGrammar) -> None:
        slots = grammar.slots.tolist()
        ends = np.cumsum(grammar.num_generated)
        compiled = self._compile(grammar.text, slots[0])
        is_json = holds_json(grammar.text)
        for slot, ids in zip(slots, np.split(grammar.generated_ids, ends[:-1]), strict=True):
            matcher = compiled.deep_copy() if compiled is not None else None
            if matcher is not None and len(ids):
                matcher.consume_tokens(ids.tolist())
            self._matchers[slot] = matcher
            self._texts.pop(slot, None)
            if is_json:
                self._texts[slot] = self._digit_limit.begin()
                self._texts[slot].extend(ids.tolist())
        self.given_up[slots] = False
        self._fill(slots)

    def leave(self, slots: list[int]) -> None:
        for slot in slots:
            self._matchers[slot] = None
            self._texts.pop(slot, None)

    def advance(self, drawing: list[int], rows: NDArray[np.intp], token_ids: Download) -> None:
        """Takes the token of each slot that draws, from its row. Waits until they arrive."""
        pairs, slots = [], []
        drawn = token_ids.array()[rows].tolist()
        for slot, token_id in zip(drawing, drawn, strict=True):
            matcher = self._matchers[slot]
            if matcher is None:
                continue
            if token_id in self._compiler.eos_token_ids:
                # It has ended. Batches that were planned before that draw an end again.
                self._matchers[slot] = None
                continue
            pairs.append((matcher, token_id))
            slots.append(slot)
            if slot in self._texts:
                self._texts[slot].extend([token_id])
        if pairs:
            self._pool.consume_token_par(pairs)
            self._fill(slots)

    def _compile(self, text: str, slot: int) -> llguidance.LLMatcher | None:
        matcher = self._compiled.pop(text, None)
        if matcher is None:
            try:
                matcher = self._compiler.compile(text)
            except RequestError as error:
                log.error(
                    "a grammar that the server compiled cannot be compiled here: %s",
                    error,
                    extra=self._names.extra(slot),
                )
                return None
            if len(self._compiled) >= _MAX_COMPILED:
                self._compiled.popitem(last=False)
        # Last is youngest.
        self._compiled[text] = matcher
        return matcher

    def _fill(self, slots: list[int]) -> None:
        """Computes the slots' next masks. Where a matcher gives up, only an end is allowed."""
        pairs = []
        for slot in slots:
            matcher = self._matchers[slot]
            if matcher is not None and not matcher.is_error():
                pairs.append((matcher, slot))
            else:
                self._give_up(slot)
        if not pairs:
            return
        num_slots, num_words = self.masks.shape
        self._pool.unsafe_compute_mask_ptr(pairs, self.masks.ctypes.data, 4 * num_words, num_slots)
        for matcher, slot in pairs:
            if matcher.is_error():
                self._give_up(slot)
            elif slot in self._texts:
                self._digit_limit.apply(self._texts[slot], self.masks[slot])

    def _give_up(self, slot: int) -> None:
        matcher = self._matchers[slot]
        if matcher is not None:
            log.warning(
                "a grammar cannot be followed any further: %s",
                matcher.get_error(),
                extra=self._names.extra(slot),
            )
        self._matchers[slot] = None
        self.given_up[slot] = True
        self.masks[slot].view(np.uint8)[:] = self._only_eos
