"""The messages, one direction after the other.

    server ──GenerateRequest, AbortRequest, StopSequence, Acknowledge, FlushCache──▶ manager
    manager ──ForwardBatch──▶ worker ──ForwardResult──▶ manager
    manager ──SequenceUpdates, PromptLogprobs, PooledState, RequestRejected, Eta, CacheFlushed, Statistics──▶ server

A *sequence* is one sample of a request and is named by (request id, sample index). A *slot* is the
row that a running sequence owns in every table of the manager and the worker. Columns named
``*_slots``, ``*_ids`` ... of one message are parallel arrays.
"""

from __future__ import annotations

import enum
from typing import TypeAlias

import msgspec

from tokasaurus.protocol.arrays import Float32Array, Float64Array, Int32Array, Int64Array

__all__ = [
    "MAX_PRIORITY",
    "AbortRequest",
    "Acknowledge",
    "AdjustedSlots",
    "Adjustments",
    "CacheFlushed",
    "Eta",
    "FinishReason",
    "FlushCache",
    "ForwardBatch",
    "ForwardResult",
    "FromServer",
    "GenerateRequest",
    "LogprobsMode",
    "PooledState",
    "Pooling",
    "PromptLogprobs",
    "RequestRejected",
    "Sampling",
    "SequenceUpdates",
    "SlotGrammar",
    "SlotParameters",
    "Statistics",
    "StopSequence",
    "ToServer",
]


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True, eq=False):
    """Base of all messages: immutable, encoded as an array whose first item is the class name."""


class FinishReason(enum.IntEnum):
    """Why a sequence ended; RUNNING where it has not."""

    RUNNING = 0
    STOP = 1  # an end-of-sequence id, or the server's StopSequence
    LENGTH = 2  # max_tokens reached (also if the last token is an end-of-sequence id), or the worker cut it
    ABORT = 3  # AbortRequest, or first_k others of its request have ended


class LogprobsMode(enum.IntEnum):
    """Which distribution a logprob is taken from, as a natural logarithm in fp32.

    The first two see the model's own logits, whatever ``Adjustments`` say.
    """

    TEMPERATURE = 0  # softmax(logits / temperature); temperature 0 counts as 1
    RAW = 1  # softmax(logits)
    # After adjustments, temperature, top_k, top_p and min_p; tokens cut off are -inf. What a token is
    # drawn from, unless temperature is 0. Tokens of prompts are never adjusted.
    PROCESSED = 2


class Adjustments(msgspec.Struct, frozen=True, array_like=True):
    """How the logits of generated tokens change before temperature and filters; in this order.

    Where every token would be masked, none is. ``generated`` are the tokens of the sample so far.
    """

    bad_words: tuple[
        tuple[int, ...], ...
    ] = ()  # each one's last id is masked where generated ends with those before it
    min_tokens: int = 0  # before so many are generated ...
    late_ids: tuple[int, ...] = ()  # ... these are masked
    bias: tuple[tuple[int, float], ...] = ()  # added to the logit of an id
    repetition_penalty: float = (
        1.0  # of ids in prompt or generated: divides positive logits, multiplies others
    )
    frequency_penalty: float = 0.0  # subtracted for every time that an id was generated
    presence_penalty: float = 0.0  # subtracted once if it was

    @property
    def reads_prompt(self) -> bool:
        """Whether it matters what the prompt says."""
        return self.repetition_penalty != 1

    @property
    def reads_generated(self) -> bool:
        """Whether it matters what was generated."""
        has_penalty = self.frequency_penalty != 0 or self.presence_penalty != 0
        return self.reads_prompt or has_penalty or any(len(word) > 1 for word in self.bad_words)


class Pooling(enum.IntEnum):
    """Which hidden states of a prompt, after the model's last norm, make one vector of it."""

    NONE = 0
    MEAN = 1  # of all its tokens
    LAST = 2  # that of its last token


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """How the next token is drawn; already validated by the server.

    The filters apply in the order temperature, top_k, top_p, min_p, each on what the one before left.
    """

    temperature: float = 1.0  # 0 means argmax
    top_k: int = 0  # 0 means off
    top_p: float = 1.0  # in (0, 1]
    min_p: float = 0.0  # in [0, 1]
    logprobs_mode: LogprobsMode = LogprobsMode.TEMPERATURE
    adjustments: Adjustments | None = None  # before all of these; None if there are none


# --- server to manager -----------------------------------------------------------------------------

MAX_PRIORITY = 1_000_000  # of a request, and as far below 0


class GenerateRequest(Message, frozen=True):
    """Generate ``n`` samples that continue one prompt.

    The draw of the token at generated position t of sample i is a function of (seed, i, t) and of
    the model's logits, of nothing else. The manager answers with exactly one final SequenceUpdates
    row for every sample, or with one RequestRejected for the whole request.
    """

    request_id: int  # unique for the life of the engine
    prompt_ids: Int32Array  # [prompt length], at least 1
    n: int
    max_tokens: int  # at least 1
    sampling: Sampling
    seed: int  # 0 <= seed < 2**63; the server draws one where the client gave none
    stop_token_ids: tuple[
        int, ...
    ]  # a sequence ends after sampling one of these; () with ignore_eos
    num_logprobs: int = -1  # of generated tokens: -1 none, 0 the chosen one, k also the top k
    num_prompt_logprobs: int = -1  # of prompt tokens, likewise
    priority: int = 0  # lower runs first
    first_k: int = 0  # abort the other samples once so many have ended; 0: wait for all
    stream: bool = False  # send updates as tokens come; otherwise one update at the end
    hold_for_acks: bool = False  # has stop strings: plan few tokens beyond what was acknowledged
    # Answer with a PooledState of the prompt. Such a request has one sample of one token, which nobody reads.
    pooling: Pooling = Pooling.NONE
    grammar: str = ""  # that every sample follows to its end; "" is none. For the worker alone


class AbortRequest(Message, frozen=True):
    """The client went away: end every sample of the request that still runs."""

    request_id: int


class StopSequence(Message, frozen=True):
    """The server found a stop string: end this sequence. The server already knows which tokens count."""

    request_id: int
    sample_index: int


class Acknowledge(Message, frozen=True):
    """For sequences with stop strings: the server has searched so many generated tokens. Columns."""

    request_ids: Int64Array
    sample_indices: Int32Array
    num_tokens: Int32Array  # counted from the sequence's first generated token


class FlushCache(Message, frozen=True):
    """Forget every cached page that no running sequence holds; answered with a CacheFlushed."""

    flush_id: int  # unique among the flushes that were not answered yet


# --- manager to server -----------------------------------------------------------------------------


class SequenceUpdates(Message, frozen=True):
    """New tokens and ends of sequences, one row for each sequence.

    Row r brings the next ``num_tokens[r]`` ids of its sequence, in ``token_ids`` after those of the
    rows before it. Rows with ``num_logprobs[r] >= 0`` bring as many ``logprobs``, and
    ``num_tokens[r] * num_logprobs[r]`` entries of ``top_ids`` and ``top_logprobs`` (row-major, best
    first), all concatenated in row order.
    """

    request_ids: Int64Array  # [rows]
    sample_indices: Int32Array  # [rows]
    num_tokens: Int32Array  # [rows]
    finish_reasons: Int32Array  # [rows] FinishReason
    num_cached_tokens: (
        Int32Array  # [rows] prompt tokens found in the prefix cache at first admission
    )
    num_logprobs: Int32Array  # [rows] as in the request
    token_ids: Int32Array  # [sum(num_tokens)]
    logprobs: Float32Array
    top_ids: Int32Array
    top_logprobs: Float32Array


class PromptLogprobs(Message, frozen=True):
    """Logprobs of prompt tokens ``first_position ...``; the first token of a prompt has none.

    May come in pieces and, after a preemption, come again; all pieces of a request come before the
    final update of its sample 0.
    """

    request_id: int
    first_position: int
    logprobs: Float32Array  # [tokens]
    ranks: Int32Array  # [tokens] one more than there are likelier tokens
    top_ids: Int32Array  # [tokens, k]
    top_logprobs: Float32Array  # [tokens, k]


class PooledState(Message, frozen=True):
    """The pooled hidden state of a request's prompt; comes once, before its final update."""

    request_id: int
    state: Float32Array  # [hidden], not normalised


class CacheFlushed(Message, frozen=True):
    """What a FlushCache dropped."""

    flush_id: int
    num_pages: int
    num_tokens: int  # that these pages held


class RequestRejected(Message, frozen=True):
    """The request can never run; none of its samples will send an update."""

    request_id: int
    reason: str
    field: str | None = None


class Eta(Message, frozen=True):
    """When everything is predicted to end, in seconds from now; comes about once a second. Columns."""

    request_ids: Int64Array  # [requests]
    seconds: Float64Array  # [requests] until the last sample of the request ends
    backlog_seconds: float  # until all samples of all requests have ended


class Statistics(Message, frozen=True):
    """What the manager has counted; comes about once a second while it works, and once it is at rest."""

    # Totals since the start.
    num_batches: int
    num_prefill_tokens: int  # prompt tokens computed
    num_decode_tokens: int  # rows that decode
    num_grouped_tokens: int  # those of them whose prefix is read once for a group
    num_cached_tokens: int  # prompt tokens that need not be computed
    num_generated_tokens: int
    num_wasted_tokens: int  # sampled after their sequence had ended
    num_finished: int  # sequences
    num_preemptions: int
    num_evicted_pages: int  # from the prefix cache
    queue_s: float  # from arrival to first admission, summed over sequences
    device_s: float  # that the worker computed
    # The state of the moment.
    num_waiting: int  # sequences
    num_running: int  # sequences
    num_pages: int
    num_free_pages: int
    num_evictable_pages: int  # cached, and nobody's
    step_s: float  # what a batch takes at present; 0 until it was measured


# --- manager to worker, and back -------------------------------------------------------------------


class AdjustedSlots(msgspec.Struct, frozen=True, array_like=True, eq=False):
    """Slots whose logits are adjusted in the same way, by the same ids.

    The worker could not know these ids: pages found in the prefix cache are never fed.
    """

    slots: Int32Array
    adjustments: Adjustments
    # The sequence so far, as far as the adjustments read it: the prompt's ids or not, then the generated
    # ones, as many as the slot's ``num_generated``.
    ids: Int32Array


class SlotGrammar(msgspec.Struct, frozen=True, array_like=True, eq=False):
    """A grammar, and the slots whose sequences follow it; each with the ids it has generated before."""

    text: str
    slots: Int32Array
    num_generated: Int32Array  # of each slot
    generated_ids: Int32Array  # [sum(num_generated)]


class SlotParameters(msgspec.Struct, frozen=True, array_like=True, eq=False):
    """What the worker must remember of slots that a sequence enters with this batch. Columns."""

    slots: Int32Array
    temperature: Float32Array
    top_k: Int32Array
    top_p: Float32Array
    min_p: Float32Array
    seed: Int64Array
    sample_index: Int32Array
    num_generated: Int32Array  # generated position of the next draw; above 0 after a preemption
    num_logprobs: Int32Array
    logprobs_mode: Int32Array
    adjusted: tuple[AdjustedSlots, ...] = ()  # of these slots; the others' logits stay as they are
    grammars: tuple[SlotGrammar, ...] = ()  # of those slots that have one


class ForwardBatch(Message, frozen=True):
    """One forward pass, as differences to what the worker already knows.

    The worker forgets ``left_slots``, applies ``parameters``, then the page-table entries, then runs: first one token for
    every slot of ``decode_slots`` (its input is the last token sampled for that slot, its position
    the slot's length), then the chunks of prompts. Row order is decode rows, then prefill rows. Every
    decode row draws a token; then slot ``draw_slots[i]`` draws one from the last row of chunk
    ``draw_chunks[i]``, which ends a prompt. Several slots may draw from one chunk: samples that fork
    where their prompt ends. Such a slot holds the prompt's full pages, and gets a copy of its last,
    partly filled one::

        decode_slots   4 7 9
        prefill_slots           2        5
        prefill_ids             a b c d  e f
        rows           4 7 9    2        5
        drawn          4 7 9             5 6      draw_slots = [5, 6], draw_chunks = [1, 1]

    Groups say which decode rows share pages, so that the worker may read these once for all rows of a
    group; it may as well ignore them. A group is a range of decode rows and a range of page-table
    columns in which all these rows name the same full pages. A group inside another comes after it and
    goes on where it ends: the columns of the groups that a row is in follow each other from column 0 on,
    and the columns behind them are the row's own. Here 7, 2 and 6 share a page, 2 and 6 another one::

        decode_slots   4  7  2  6        group_first_rows     1  2
        column 0       a  b  b  b        group_num_rows       3  2
        column 1       c  d  e  e        group_first_columns  0  1
        column 2       .  .  f  g        group_num_columns    1  1
    """

    number: int  # 0, 1, 2 ...; a worker that sees a gap fails
    parameters: SlotParameters | None
    table_slots: Int32Array  # page_table[table_slots[i], table_columns[i]] = table_pages[i]
    table_columns: Int32Array
    table_pages: Int32Array
    decode_slots: Int32Array
    prefill_slots: Int32Array
    prefill_starts: (
        Int32Array  # position of the chunk's first token; the slot's length is set to it
    )
    prefill_lengths: Int32Array  # tokens of the chunk, at least 1
    prefill_ids: Int32Array  # [sum(prefill_lengths)]
    prefill_num_logprobs: Int32Array  # prompt logprobs of the chunk: -1 none, else top k
    # The token after the chunk, whose logprob the chunk's last row predicts; -1 where the chunk ends
    # the prompt. Only read where prompt logprobs or pooling are asked for.
    prefill_next_ids: Int32Array
    draw_chunks: Int32Array  # [draws] index into the prefill columns
    draw_slots: Int32Array  # [draws] its length becomes the chunk's end
    copy_sources: Int32Array  # [copies] pages that are copied once the pass has run ...
    copy_targets: Int32Array  # [copies] ... to these
    group_first_rows: Int32Array  # [groups] index into decode_slots
    group_num_rows: Int32Array  # [groups]
    group_first_columns: Int32Array  # [groups] of the page table
    group_num_columns: Int32Array  # [groups]
    prefill_pooling: Int32Array | None = None  # [chunks] Pooling; None where no chunk is pooled
    # Slots that sequences with adjustments have left since the batch before, so that nobody needs what is
    # remembered for these; None if there are none.
    left_slots: Int32Array | None = None


class ForwardResult(Message, frozen=True):
    """What a batch sampled, in the order of its sampling rows.

    ``logprobs`` is NaN, and ``top_ids`` is -1, where a row asked for none; K is the largest number
    any row of the batch asked for. ``prompt_*`` are the prompt logprobs of all chunks that asked,
    concatenated in row order: a chunk yields one for each token it feeds, less one at a prompt's end.
    """

    number: int
    token_ids: Int32Array  # [sampling rows]
    logprobs: Float32Array  # [sampling rows], or [0] if no row asked
    top_ids: Int32Array  # [sampling rows, K]
    top_logprobs: Float32Array  # [sampling rows, K]
    prompt_logprobs: Float32Array  # [prompt tokens]
    prompt_ranks: Int32Array  # [prompt tokens]
    prompt_top_ids: Int32Array  # [prompt tokens, K of the prompts]
    prompt_top_logprobs: Float32Array
    device_s: float  # seconds the device took for the batch
    pooled: Float32Array | None = None  # [pooled prompts that end, hidden]; None if there are none
    # Sampling rows whose sequences end here, complete or not: a grammar has become too much work to follow
    # (the token is an end-of-sequence id), or there is no room to remember what is generated, where penalties
    # need it. None if there are none.
    cut_rows: Int32Array | None = None


FromServer: TypeAlias = GenerateRequest | AbortRequest | StopSequence | Acknowledge | FlushCache
ToServer: TypeAlias = (
    SequenceUpdates
    | PromptLogprobs
    | PooledState
    | RequestRejected
    | Eta
    | CacheFlushed
    | Statistics
)
