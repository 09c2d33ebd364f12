"""The messages between the rooms, grouped by direction.

    server ──GenerateRequest, AbortRequest, StopSequence, Acknowledge, Command, Watch──▶ manager
    manager ──ForwardBatch, Control──▶ worker ──ForwardResult, ControlDone──▶ manager
    manager ──SequenceUpdates, PromptLogprobs, PooledState, RequestRejected, RequestStage,
              Eta, CommandDone, CommandFailed, Statistics, Outlook──▶ server

A *sequence* is one sample of a request, identified by (request id, sample index). A *slot* is the
row that a running sequence owns in every table of the manager and the worker. A message "in
columns" has parallel arrays: entry i of each array describes the same thing.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import TypeAlias

import msgspec

from tokasaurus.protocol.arrays import (
    EMPTY_INT32,
    Float32Array,
    Float64Array,
    Int32Array,
    Int64Array,
)
from tokasaurus.protocol.commands import (
    Command,
    CommandDone,
    CommandFailed,
    Control,
    ControlDone,
    TransferDone,
)
from tokasaurus.protocol.message import Message
from tokasaurus.protocol.watching import Outlook, Watch

__all__ = [
    "MAX_PRIORITY",
    "SAMPLING_NUMBERS",
    "AbortRequest",
    "Acknowledge",
    "AdjustedSlots",
    "Adjustments",
    "CartridgeState",
    "Eta",
    "FinishReason",
    "ForwardBatch",
    "ForwardResult",
    "FromServer",
    "FromWorker",
    "GenerateRequest",
    "LogprobsMode",
    "Ping",
    "PooledState",
    "Pooling",
    "Progress",
    "PromptLogprobs",
    "RequestRejected",
    "RequestStage",
    "Sampling",
    "SequenceUpdates",
    "SlotGrammar",
    "SlotParameters",
    "Stage",
    "Statistics",
    "StopSequence",
    "ToServer",
    "ToWorker",
    "WorkerStall",
]


class FinishReason(enum.IntEnum):
    """Why a sequence ended; RUNNING if it has not."""

    RUNNING = 0
    # It sampled an end-of-sequence id, or the server sent StopSequence.
    STOP = 1
    # It reached max_tokens, even if the last token is an end-of-sequence id, or the worker cut it.
    LENGTH = 2
    # The server sent AbortRequest, or first_k other samples of the request have ended.
    ABORT = 3


class LogprobsMode(enum.IntEnum):
    """The distribution that a logprob, a natural logarithm in fp32, is taken from.

    TEMPERATURE and RAW start from the model's own logits and ignore ``Adjustments``.
    """

    # softmax(logits / temperature); temperature 0 counts as 1
    TEMPERATURE = 0
    # softmax(logits)
    RAW = 1
    # The distribution after adjustments, temperature, top_k, top_p and min_p, in which tokens that
    # were cut off are -inf. Unless the temperature is 0, tokens are drawn from it. Prompt tokens
    # are never adjusted.
    PROCESSED = 2


class Adjustments(msgspec.Struct, frozen=True, array_like=True):
    """How the logits of generated tokens change before temperature and filters, in field order.

    If the masks would leave no token, none is masked.
    """

    # Words as ids: a word's last id is masked where the ids before it have just been generated.
    bad_words: tuple[tuple[int, ...], ...] = ()
    # Until ``min_tokens`` tokens are generated, ``late_ids`` are masked.
    min_tokens: int = 0
    late_ids: tuple[int, ...] = ()
    # Pairs of an id and what is added to its logit.
    bias: tuple[tuple[int, float], ...] = ()
    # Divides the positive logits, and multiplies the others, of ids in the prompt or generated.
    repetition_penalty: float = 1.0
    # Subtracted from an id's logit for each time it was generated.
    frequency_penalty: float = 0.0
    # Subtracted once from the logit of each id that was generated.
    presence_penalty: float = 0.0

    @property
    def reads_prompt(self) -> bool:
        """Whether the adjustments depend on the prompt."""
        return self.repetition_penalty != 1

    @property
    def reads_generated(self) -> bool:
        """Whether the adjustments depend on the tokens generated so far."""
        has_penalty = self.frequency_penalty != 0 or self.presence_penalty != 0
        return self.reads_prompt or has_penalty or any(len(word) > 1 for word in self.bad_words)


class Pooling(enum.IntEnum):
    """How a prompt's hidden states, after the model's last norm, become one vector."""

    NONE = 0
    MEAN = 1  # the mean over all tokens
    LAST = 2  # the state of the last token


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """How the next token is drawn; the server has validated it.

    The filters apply in the order temperature, top_k, top_p, min_p, each to what the filter before
    it left.
    """

    temperature: float = 1.0  # 0 means argmax
    top_k: int = 0  # 0 means off
    top_p: float = 1.0  # in (0, 1]; where a client says 0, the smallest that is told apart from it
    min_p: float = 0.0  # in [0, 1]
    logprobs_mode: LogprobsMode = LogprobsMode.TEMPERATURE
    # Applied before the filters; None if there are none.
    adjustments: Adjustments | None = None


SAMPLING_NUMBERS: Mapping[str, float] = {
    name: default
    for name, default in zip(Sampling.__struct_fields__, Sampling.__struct_defaults__, strict=True)
    if type(default) in (int, float)
}
"""The numbers in ``Sampling``, with their defaults.

A request may set each of them, under the same name in ``SamplingParams``. The worker keeps each in
a column of its table over slots. All but the temperature are filters, which their defaults turn
off.
"""

SAMPLING_LIMITS: Mapping[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "top_k": (-1, (1 << 31) - 1),  # -1 is off, as 0 is
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
}
"""What clients and generation configs may say of these numbers: at least, and at most."""


# --- server to manager ----------------------------------------------------------------------------

# Priorities lie between -MAX_PRIORITY and MAX_PRIORITY.
MAX_PRIORITY = 1_000_000


class Progress(msgspec.Struct, frozen=True, array_like=True, eq=False):
    """The samples of a request that one manager generates, and what they have generated elsewhere.

    The manager goes on as after a preemption: it feeds the prompt and these tokens, and draws the
    next one. It sends and counts only what comes after them.
    """

    sample_indices: Int32Array  # [samples] ascending, less than ``n``
    num_generated: Int32Array  # [samples] tokens, which the server has; fewer than ``max_tokens``
    generated_ids: Int32Array  # [sum(num_generated)]
    # Samples of the request that have ended by themselves elsewhere: they count for ``first_k``.
    num_finished: int = 0


class GenerateRequest(Message, frozen=True):
    """Generate ``n`` samples that continue one prompt.

    The draw of the token at generated position t of sample i depends on (seed, i, t) and on the
    model's logits, and on nothing else. The manager answers with exactly one final SequenceUpdates
    row for every sample, or with one RequestRejected for the whole request.
    """

    request_id: int  # unique for the life of the engine
    prompt_ids: Int32Array  # [prompt length], at least 1
    n: int
    max_tokens: int  # at least 1
    sampling: Sampling
    # 0 <= seed < 2**63; the server draws one if the client gave none.
    seed: int
    # A sequence ends after it samples one of these ids; () with ignore_eos.
    stop_token_ids: tuple[int, ...]
    # Logprobs of each generated token: -1 for none, 0 for the chosen token, k also for the top k.
    num_logprobs: int = -1
    # The same for prompt tokens.
    num_prompt_logprobs: int = -1
    # Lower runs first.
    priority: int = 0
    # Abort the remaining samples once ``first_k`` have ended; 0 waits for all.
    first_k: int = 0
    # Send updates as tokens come; otherwise send one update at the end.
    stream: bool = False
    # The request has stop strings: plan few tokens beyond the acknowledged ones.
    hold_for_acks: bool = False
    # Answer with a PooledState of the prompt. The request has one sample of one unused token.
    pooling: Pooling = Pooling.NONE
    # The grammar that every sample follows to its end; "" for none. Only the worker reads it.
    grammar: str = ""
    # The samples to generate; None generates all ``n`` from their beginning.
    progress: Progress | None = None
    # The name of a registered cartridge, which comes before the prompt; "" for none.
    cartridge: str = ""
    # A name for the client; clients get fair shares.
    client: str = ""
    # What the request is called in the log of every process; "" for nothing.
    name: str = ""
    # Send a RequestStage at each stage.
    report_stages: bool = False


class AbortRequest(Message, frozen=True):
    """The client has gone: end every sample of the request that still runs."""

    request_id: int


class Ping(Message, frozen=True):
    """Asks for Statistics, to see whether the manager still works."""


class StopSequence(Message, frozen=True):
    """The server found a stop string: end this sequence.

    The server already knows which tokens count.
    """

    request_id: int
    sample_index: int


class Acknowledge(Message, frozen=True):
    """How many generated tokens the server has searched for stop strings. In columns."""

    request_ids: Int64Array
    sample_indices: Int32Array
    num_tokens: Int32Array  # counted from the sequence's first generated token


# --- manager to server ----------------------------------------------------------------------------


class SequenceUpdates(Message, frozen=True):
    """New tokens and ends of sequences, one row for each sequence.

    Row r brings the next ``num_tokens[r]`` ids of its sequence, in ``token_ids`` after those of the
    rows before it. Weights of one version drew all of them; a sequence whose tokens come from
    several versions has several rows. If ``num_logprobs[r] >= 0``, it also brings
    ``num_tokens[r]`` entries of ``logprobs``, and ``num_tokens[r] * num_logprobs[r]`` entries of
    ``top_ids`` and ``top_logprobs`` (row-major, best first). All are concatenated in row order.
    """

    request_ids: Int64Array  # [rows]
    sample_indices: Int32Array  # [rows]
    num_tokens: Int32Array  # [rows]
    finish_reasons: Int32Array  # [rows] FinishReason
    # [rows] the prompt's own tokens found in the prefix cache at first admission
    num_cached_tokens: Int32Array
    num_logprobs: Int32Array  # [rows] as in the request
    weights_versions: Int32Array  # [rows]
    token_ids: Int32Array  # [sum(num_tokens)]
    logprobs: Float32Array
    top_ids: Int32Array
    top_logprobs: Float32Array


class PromptLogprobs(Message, frozen=True):
    """Logprobs of the prompt tokens from ``first_position`` on; a prompt's first token has none.

    A request's logprobs may come in pieces, and come again after a preemption. All pieces come
    before the final update of its sample 0.
    """

    request_id: int
    first_position: int  # in the prompt, which does not count a cartridge
    logprobs: Float32Array  # [tokens]
    ranks: Int32Array  # [tokens] 1 is the likeliest token
    top_ids: Int32Array  # [tokens, k]
    top_logprobs: Float32Array  # [tokens, k]


class PooledState(Message, frozen=True):
    """The pooled hidden state of a request's prompt; sent once, before the final update."""

    request_id: int
    state: Float32Array  # [hidden], not normalised


class RequestRejected(Message, frozen=True):
    """The request can never run, or cannot go on: none of its samples sends a further update."""

    request_id: int
    reason: str
    field: str | None = None


class Stage(enum.IntEnum):
    """What has become of a request. Samples may be preempted any number of times."""

    ADMITTED = 0  # its first sample runs
    FIRST_TOKEN = 1  # and has a token, whether or not that is sent already
    PREEMPTED = 2  # a sample gave its pages to others, and will go on later


class RequestStage(Message, frozen=True):
    """A request that asked for it has reached a stage just now.

    Where several managers have samples of a request, each reports its own.
    """

    request_id: int
    stage: Stage


class Eta(Message, frozen=True):
    """Predicted ends, in seconds from now; sent about once a second. In columns."""

    request_ids: Int64Array  # [requests]
    seconds: Float64Array  # [requests] until the last sample of the request ends
    backlog_seconds: float  # until all samples of all requests have ended


class CartridgeState(msgspec.Struct, frozen=True, array_like=True):
    """What became of one registered cartridge so far."""

    name: str
    num_tokens: int  # positions that it takes
    num_copies: int  # replicas in whose KV cache it is
    num_pages: int  # that these copies take
    num_users: int  # requests that name it and have not ended
    # Since it was registered: requests that named it; of these, those that came while its pages
    # were there; how often they were written; and how often they were evicted.
    num_requests: int
    num_hits: int
    num_loads: int
    num_evictions: int
    idle_s: float  # seconds since its last request ended; 0 while there is one


class Statistics(Message, frozen=True):
    """The manager's counters; sent about once a second while it works, and once it rests."""

    # Totals since the start.
    num_batches: int
    num_prefill_tokens: int  # prompt tokens computed
    num_decode_tokens: int  # decode rows
    num_grouped_tokens: int  # decode rows whose prefix was read once for a group
    num_cached_tokens: int  # prompt tokens found in the cache, which need no computation
    num_generated_tokens: int
    num_wasted_tokens: int  # sampled after their sequence had ended
    num_finished: int  # sequences
    num_preemptions: int
    num_evicted_pages: int  # from the prefix cache
    queue_s: float  # from arrival to first admission, summed over sequences
    device_s: float  # seconds that the worker computed
    # The present state.
    num_waiting: int  # sequences
    num_running: int  # sequences
    num_pages: int
    num_free_pages: int
    num_evictable_pages: int  # cached, or of a cartridge, and held by no sequence
    step_s: float  # what a batch takes at present; 0 until one was measured
    weights_version: int = 0
    # Whether all that waits, waits for a command: for Resume, RestoreMemory or UpdateWeights.
    paused: bool = False
    num_recompiles: int = 0  # graphs that the worker compiled after its warm-up, in total
    num_grouped_prefill_tokens: int = 0  # rows of prompts whose prefix was read once for a group
    waited_s: float = 0.0  # of device_s: waiting for other workers of the replica
    # Totals over all cartridges that ever were registered; see CartridgeState.
    num_cartridge_requests: int = 0
    num_cartridge_hits: int = 0
    num_cartridge_loads: int = 0
    num_cartridge_evictions: int = 0
    num_cartridge_pages: int = 0  # that hold cartridges at present
    cartridges: tuple[CartridgeState, ...] = ()  # that are registered
    # What kept more sequences from running. Totals; a batch counts in one of them at most.
    num_full_batches: int = 0  # with as many tokens as a batch may have
    num_seat_bound_batches: int = 0  # others, while some waited and as many ran as may
    num_page_bound_batches: int = 0  # others, while some waited: there was no room in the KV cache
    active_s: float = 0.0  # seconds with batches in flight
    # How often the use of pages was compared with its forecast, and the differences, summed.
    num_forecasts: int = 0
    num_forecast_pages_off: int = 0
    # The present state.
    num_in_flight: int = 0  # batches
    num_seats: int = 0  # sequences that may run at once
    page_size: int = 0  # tokens
    num_replicas: int = 1  # that these numbers are of


class WorkerStall(Message, frozen=True):
    """The worker has not answered the oldest batch in flight for too long.

    Sent about once a second as long as this lasts, and once with 0 when it is over.
    """

    seconds: float


# --- manager to worker, and back ------------------------------------------------------------------


class AdjustedSlots(msgspec.Struct, frozen=True, array_like=True, eq=False):
    """Slots whose logits are adjusted in the same way, by the same ids.

    The worker cannot know these ids by itself: it is never fed the tokens of cached pages.
    """

    slots: Int32Array
    sampling: int  # index into ``SlotParameters.samplings``; that one has adjustments
    # The part of the sequence so far that the adjustments read: the prompt's ids, or none of them,
    # then the ``num_generated`` ids that the slot has generated.
    ids: Int32Array


class SlotGrammar(msgspec.Struct, frozen=True, array_like=True, eq=False):
    """A grammar, the slots whose sequences follow it, and the ids that each has generated."""

    text: str
    slots: Int32Array
    num_generated: Int32Array  # [slots]
    generated_ids: Int32Array  # [sum(num_generated)]


class SlotParameters(msgspec.Struct, frozen=True, array_like=True, eq=False):
    """What the worker must remember of slots that a sequence enters with this batch. In columns."""

    slots: Int32Array
    samplings: tuple[Sampling, ...]  # of all slots; the samples of a request share one
    sampling_index: Int32Array  # [slots] index into samplings
    seed: Int64Array
    sample_index: Int32Array
    num_generated: Int32Array  # generated position of the next draw; above 0 after a preemption
    num_logprobs: Int32Array
    # The slots with adjustments; the logits of the others stay as they are.
    adjusted: tuple[AdjustedSlots, ...] = ()
    # The slots with a grammar.
    grammars: tuple[SlotGrammar, ...] = ()
    # What the slots' requests are called in logs. () if none has a name.
    names: tuple[str, ...] = ()
    name_index: Int32Array = EMPTY_INT32  # [slots] index into names; [0] without names


class ForwardBatch(Message, frozen=True):
    """One forward pass, as differences to what the worker already knows.

    The worker works in this order:

    1. It forgets ``left_slots``.
    2. It applies ``parameters``, then the page-table entries, then the early copies of pages.
    3. It computes one token for each slot of ``decode_slots``. The input is the last token sampled
       for that slot, and its position is the slot's length. Then it computes the chunks of prompts.
       So the decode rows come first, then the prefill rows.
    4. Every decode row draws a token. Then slot ``draw_slots[i]`` draws one from the last row of
       chunk ``draw_chunks[i]``, which ends a prompt.
    5. It makes the other copies of pages.

    Several slots may draw from one chunk, when samples fork where their prompt ends. Such a slot
    holds the prompt's full pages, and gets a copy of the last one, which is partly filled::

        decode_slots   4 7 9
        prefill_slots           2        5
        prefill_ids             a b c d  e f
        rows           4 7 9    2        5
        drawn          4 7 9             5 6      draw_slots = [5, 6], draw_chunks = [1, 1]

    Groups say which slots of the batch share pages, so that the worker may read these pages once
    for all rows of a group; it may also ignore the groups. A group is a range of decode slots, a
    range of prefill slots (one of them may be empty), and a range of page-table columns in which
    all these slots name the same full pages. Chunks begin behind the pages of their groups. A group
    inside another one comes after it and continues where it ends: the columns of the groups that a
    slot is in follow each other from column 0 on, and the columns behind them are the slot's own.
    Here slots 7, 2, 6 and 5 share a page, and slots 6 and 5 share another::

        decode_slots   4  7  2  6        group_first_decodes  1  3
        prefill_slots              5     group_num_decodes    3  1
                                         group_first_chunks   0  0
        column 0       a  b  b  b  b     group_num_chunks     1  1
        column 1       c  d  f  e  e     group_first_columns  0  1
        column 2       .  .  .  g  h     group_num_columns    1  1
    """

    number: int  # 0, 1, 2 ...; a worker that sees a gap fails
    parameters: SlotParameters | None = None
    # page_table[table_slots[i], table_columns[i]] = table_pages[i]
    table_slots: Int32Array = EMPTY_INT32
    table_columns: Int32Array = EMPTY_INT32
    table_pages: Int32Array = EMPTY_INT32
    decode_slots: Int32Array = EMPTY_INT32
    prefill_slots: Int32Array = EMPTY_INT32
    # Position of the chunk's first token; the slot's length is set to it.
    prefill_starts: Int32Array = EMPTY_INT32
    prefill_lengths: Int32Array = EMPTY_INT32  # tokens of the chunk, at least 1
    prefill_ids: Int32Array = EMPTY_INT32  # [sum(prefill_lengths)]
    # Prompt logprobs of the chunk: -1 none, else top k.
    prefill_num_logprobs: Int32Array = EMPTY_INT32
    # The token after the chunk, which the chunk's last row predicts; -1 if the chunk ends the
    # prompt. Only read if prompt logprobs or pooling are asked for.
    prefill_next_ids: Int32Array = EMPTY_INT32
    draw_chunks: Int32Array = EMPTY_INT32  # [draws] index into the prefill columns
    draw_slots: Int32Array = EMPTY_INT32  # [draws] the slot's length becomes the chunk's end
    # [copies] After the pass, page copy_sources[i] is copied to page copy_targets[i].
    copy_sources: Int32Array = EMPTY_INT32
    copy_targets: Int32Array = EMPTY_INT32
    group_first_decodes: Int32Array = EMPTY_INT32  # [groups] index into decode_slots
    group_num_decodes: Int32Array = EMPTY_INT32  # [groups]
    group_first_columns: Int32Array = EMPTY_INT32  # [groups] of the page table
    group_num_columns: Int32Array = EMPTY_INT32  # [groups]
    prefill_pooling: Int32Array | None = None  # [chunks] Pooling; None if no chunk is pooled
    # Slots that sequences with adjustments have left since the previous batch: what the worker
    # remembers for them is no longer needed. None if there are none.
    left_slots: Int32Array | None = None
    # [copies] Before the pass, page early_copy_sources[i] is copied to page early_copy_targets[i]:
    # the end of a cartridge, or of the same prompt in the cache, in a page that a prompt goes on to
    # fill. None if there are none.
    early_copy_sources: Int32Array | None = None
    early_copy_targets: Int32Array | None = None
    # [groups] index into the prefill columns, and how many; None if no group has chunks.
    group_first_chunks: Int32Array | None = None
    group_num_chunks: Int32Array | None = None


class ForwardResult(Message, frozen=True):
    """What a batch sampled, in the order of its sampling rows.

    ``logprobs`` is NaN, and ``top_ids`` is -1, where a row asked for none; K is the largest number
    that any row of the batch asked for. ``prompt_*`` are the prompt logprobs of all chunks that
    asked for them, concatenated in row order. A chunk yields one for each token that it feeds, and
    one fewer if it ends a prompt.
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
    device_s: float  # seconds that the device took for the batch
    pooled: Float32Array | None = None  # [pooled prompts that end, hidden]; None if there are none
    # Sampling rows whose sequences end here, complete or not. None if there are none. Either
    # - the sequence's grammar has become too much work to follow (the token is an end-of-sequence
    #   id), or
    # - penalties need the generated tokens, and there is no room left to remember them.
    cut_rows: Int32Array | None = None
    num_grouped_tokens: int = 0  # decode rows whose prefix was read once for a group
    num_grouped_prefill_tokens: int = 0  # the same for rows of chunks
    # Graphs that the worker has compiled since its warm-up, in total.
    num_recompiles: int = 0
    # Of device_s: the seconds in which the worker waited for other workers of its replica.
    waited_s: float = 0.0


FromServer: TypeAlias = (
    GenerateRequest | AbortRequest | StopSequence | Acknowledge | Command | Ping | Watch
)
ToServer: TypeAlias = (
    SequenceUpdates
    | PromptLogprobs
    | PooledState
    | RequestRejected
    | RequestStage
    | Eta
    | CommandDone
    | CommandFailed
    | Statistics
    | Outlook
)
ToWorker: TypeAlias = ForwardBatch | Control
FromWorker: TypeAlias = ForwardResult | ControlDone | TransferDone
