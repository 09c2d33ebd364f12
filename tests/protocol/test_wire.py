"""Messages survive encoding and decoding; anything else is refused."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from rows import each_row

from tokasaurus.protocol import messages
from tokasaurus.protocol.commands import (
    Command,
    CommandDone,
    CommandFailed,
    Control,
    ControlDone,
    FlushCache,
    JoinWeightsGroup,
    LeaveWeightsGroup,
    LoadCartridge,
    Pause,
    PauseMode,
    ReceiveWeights,
    TransferDone,
    UpdateWeights,
    WriteCartridge,
)
from tokasaurus.protocol.messages import (
    AbortRequest,
    Acknowledge,
    AdjustedSlots,
    Adjustments,
    CartridgeState,
    Eta,
    FinishReason,
    ForwardBatch,
    ForwardResult,
    FromServer,
    FromWorker,
    GenerateRequest,
    LogprobsMode,
    Ping,
    PooledState,
    Pooling,
    Progress,
    PromptLogprobs,
    RequestRejected,
    RequestStage,
    Sampling,
    SequenceUpdates,
    SlotParameters,
    Stage,
    Statistics,
    StopSequence,
    ToServer,
    ToWorker,
    WorkerStall,
)
from tokasaurus.protocol.watching import Outlook, Watch
from tokasaurus.protocol.wire import Codec

rng = np.random.default_rng(0)


def ints(*shape):
    return rng.integers(-(2**31), 2**31, shape).astype(np.int32)


def longs(*shape):
    return rng.integers(0, 2**63 - 1, shape)


def floats(*shape):
    values = rng.standard_normal(shape).astype(np.float32)
    values.flat[:1] = np.nan
    return values


EXAMPLES = [
    GenerateRequest(
        request_id=2**62,
        prompt_ids=ints(5),
        n=1024,
        max_tokens=7,
        sampling=Sampling(0.5, 3, 0.25, 0.125, LogprobsMode.PROCESSED, Adjustments(min_tokens=3)),
        seed=2**63 - 1,
        stop_token_ids=(1, 2),
        num_logprobs=0,
        num_prompt_logprobs=20,
        priority=-(10**6),
        first_k=3,
        stream=True,
        hold_for_acks=True,
        pooling=Pooling.MEAN,
        progress=Progress(ints(2), ints(2), ints(1), 1),
        cartridge="notes@1",
        client="key",
        name="req_1",
        report_stages=True,
    ),
    AbortRequest(3),
    Ping(),
    WorkerStall(61.5),
    Command(7, FlushCache()),
    Command(8, Pause(PauseMode.DRAIN)),
    Command(9, UpdateWeights(1, ("a.safetensors",), ("00ff",))),
    Command(10, JoinWeightsGroup("g", "host", 1234, 1, 3, "gloo", 0.5)),
    Command(11, ReceiveWeights("g", ("a",), ("bfloat16",), ((2, 3),), True, False, 9.0)),
    Command(12, LeaveWeightsGroup("g")),
    StopSequence(3, 4),
    Acknowledge(longs(2), ints(2), ints(2)),
    SequenceUpdates(
        request_ids=longs(2),
        sample_indices=ints(2),
        num_tokens=ints(2),
        finish_reasons=np.array([FinishReason.STOP, FinishReason.RUNNING], np.int32),
        num_cached_tokens=ints(2),
        num_logprobs=ints(2),
        weights_versions=ints(2),
        token_ids=ints(9),
        logprobs=floats(9),
        top_ids=ints(0),
        top_logprobs=floats(0),
    ),
    PromptLogprobs(5, 1, floats(4), ints(4), ints(4, 2), floats(4, 2)),
    RequestRejected(5, "too long", "prompt"),
    RequestStage(5, Stage.PREEMPTED),
    PooledState(5, floats(8)),
    CommandDone(7, 3, 48),
    CommandFailed(8, "no such file", "files"),
    Control(3, WriteCartridge(("notes.safetensors", "more.safetensors"), 5, ints(2))),
    ControlDone(3, "it is damaged", False),
    TransferDone(3, 1, 2, None, True),
    Eta(longs(3), np.array([0.5, 1e9, np.nan]), 7.25),
    Statistics(*range(10), 2.5, 3.5, *range(5), 0.125, 3, True),
    Statistics(
        *[*range(10), 2.5, 3.5, *range(5), 0.125, 3, True, 4, 5, 0.5, *range(5)],
        cartridges=(CartridgeState("notes@1", *range(8), 1.5),),
    ),
    Watch(2.5),
    Outlook(7, 0.25, 2, 3, 90, ints(4), ints(4), ints(4), ints(4), 5),
    Command(10, LoadCartridge("notes@1", ("a.safetensors", "b.safetensors"), 7)),
    ForwardBatch(
        number=8,
        parameters=SlotParameters(
            ints(2),
            (
                Sampling(
                    adjustments=Adjustments(((1, 2), (3,)), 4, (5, 6), ((7, 0.5),), 1.5, 0.25, -1.0)
                ),
                Sampling(0.25, 7),
            ),
            *(ints(2), longs(2), ints(2), ints(2), ints(2)),
            adjusted=(AdjustedSlots(ints(1), 0, ints(9)),),
            names=("req_1", "mine/7"),
            name_index=ints(2),
        ),
        table_slots=ints(3),
        table_columns=ints(3),
        table_pages=ints(3),
        decode_slots=ints(4),
        prefill_slots=ints(1),
        prefill_starts=ints(1),
        prefill_lengths=ints(1),
        prefill_ids=ints(6),
        prefill_num_logprobs=ints(1),
        prefill_next_ids=ints(1),
        draw_chunks=ints(2),
        draw_slots=ints(2),
        copy_sources=ints(1),
        copy_targets=ints(1),
        early_copy_sources=ints(3),
        early_copy_targets=ints(4),
        group_first_decodes=ints(2),
        group_num_decodes=ints(2),
        group_first_chunks=ints(2),
        group_num_chunks=ints(2),
        group_first_columns=ints(2),
        group_num_columns=ints(2),
        prefill_pooling=ints(1),
        left_slots=ints(2),
    ),
    ForwardResult(
        number=8,
        token_ids=ints(5),
        logprobs=floats(5),
        top_ids=ints(5, 3),
        top_logprobs=floats(5, 3),
        prompt_logprobs=floats(0),
        prompt_ranks=ints(0),
        prompt_top_ids=ints(0, 0),
        prompt_top_logprobs=floats(0, 0),
        device_s=0.25,
        pooled=floats(1, 8),
        num_grouped_tokens=4,
        num_grouped_prefill_tokens=9,
    ),
]


def assert_same(a, b):
    assert type(a) is type(b)
    for name in a.__struct_fields__:
        left, right = getattr(a, name), getattr(b, name)
        if isinstance(left, msgspec.Struct):
            assert_same(left, right)
        elif isinstance(left, tuple) and any(isinstance(each, msgspec.Struct) for each in left):
            for pair in zip(left, right, strict=True):
                assert_same(*pair)
        elif isinstance(left, np.ndarray):
            assert left.dtype == right.dtype
            assert left.shape == right.shape
            assert left.tobytes() == right.tobytes()  # bit for bit, NaN included
        else:
            assert left == right
            assert type(left) is type(right)


@each_row("message", EXAMPLES)
def test_a_decoded_message_equals_the_sent_one(message):
    codec = Codec(FromServer | ToServer | FromWorker | ToWorker | WorkerStall)
    assert_same(codec.decode(codec.encode(message)), message)


def test_columns_that_a_batch_leaves_out_travel_as_empty_arrays():
    """``parameters`` and the last six columns are optional, the others are int32 arrays."""
    names = ForwardBatch.__struct_fields__
    optional = ("number", "parameters", *names[-6:])
    columns = [name for name in names if name not in optional]
    codec = Codec(ForwardBatch)
    sent = codec.encode(ForwardBatch(number=8))
    empty = (np.zeros(0, np.int32) for _ in columns)
    spelled_out = ForwardBatch(8, None, *empty, *[None] * 6)
    assert sent == codec.encode(spelled_out)
    assert_same(codec.decode(sent), spelled_out)


def test_every_message_has_an_example():
    classes = {
        value
        for value in vars(messages).values()
        if isinstance(value, type)
        and issubclass(value, messages.Message)
        and value is not messages.Message
    }
    assert classes == {type(example) for example in EXAMPLES}


@each_row("dtype", ["int32", "int64", "float32", "float64", "bool"])
@each_row("shape", [(), (0,), (1,), (0, 5), (3, 0), (2, 3), (2, 0, 3)])
def test_arrays_of_every_shape_and_type(shape, dtype):
    codec = Codec(list[np.ndarray])
    array = rng.integers(0, 2, shape).astype(dtype)
    (received,) = codec.decode(codec.encode([array]))
    assert (received.shape, received.dtype) == (array.shape, array.dtype)
    assert np.array_equal(received, array)
    assert not received.flags.writeable


def test_received_arrays_cannot_be_written():
    codec = Codec(PromptLogprobs)
    received = codec.decode(
        codec.encode(PromptLogprobs(5, 1, floats(4), ints(4), ints(4, 0), floats(4, 0)))
    )
    with pytest.raises(ValueError, match="read-only"):
        received.logprobs[0] = 1.0


@each_row(
    "array",
    [np.zeros(2, np.float16), np.array(["a"]), np.array([object()])],
)
def test_other_array_types_are_refused(array):
    with pytest.raises(TypeError, match="int32, int64, float32, float64 or bool"):
        Codec(PromptLogprobs).encode(PromptLogprobs(1, 1, array, ints(0), ints(0, 0), floats(0, 0)))


@each_row("data", [b"", b"\x00", b"\x91\xa5Bogus", b"\xff" * 40])
def test_bytes_that_are_not_a_message_are_refused(data):
    with pytest.raises((msgspec.ValidationError, msgspec.DecodeError)):
        Codec(FromServer).decode(data)


def test_a_message_of_another_direction_is_refused():
    with pytest.raises(msgspec.ValidationError):
        Codec(ToServer).decode(Codec(FromServer).encode(AbortRequest(1)))
