"""The simulated device keeps the worker's contract: batch numbers, forks, results and tokens."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from batches_by_hand import NEVER, Entering, Fed, Hand

from tokasaurus.errors import ProtocolError
from tokasaurus.planner.cost_model import AttentionCosts, CostModel, DrawCosts, fixed
from tokasaurus.planner.curve import Curve
from tokasaurus.planner.lengths import DrawnLengths, ListedLengths
from tokasaurus.planner.simulated_device import STOP_ID, VOCAB_SIZE, SimulatedDevice
from tokasaurus.protocol.commands import Control, UpdateWeights
from tokasaurus.protocol.messages import ForwardBatch, ForwardResult
from tokasaurus.protocol.wire import Codec

SEQUENCES = [Entering(slot, seed=5, sample_index=slot - 1) for slot in (1, 2, 3)]


def alone(seed, sample_index, count):
    """The first ``count`` tokens of a sequence that is alone in its batches."""
    hand = Hand()
    result = hand.run([Entering(0, seed, sample_index)], fed=[Fed(0, 0, 3, (0,))])
    ids = [int(result.token_ids[0])]
    while len(ids) < count:
        ids.append(int(hand.run(decode=[0]).token_ids[0]))
    return ids


def test_results_list_decodes_before_draws_and_samples_may_fork():
    hand = Hand()
    first = hand.run(SEQUENCES, fed=[Fed(1, 0, 30), Fed(2, 0, 20, (2,))])
    assert first.token_ids.tolist() == alone(5, 1, 1)
    forked = hand.run(decode=[2], fed=[Fed(1, 30, 10, (1, 3))])
    assert forked.token_ids.tolist() == [alone(5, 1, 2)[1], alone(5, 0, 1)[0], alone(5, 2, 1)[0]]
    assert hand.run(decode=[3, 2, 1]).token_ids.tolist() == [
        alone(5, 2, 2)[1],
        alone(5, 1, 3)[2],
        alone(5, 0, 2)[1],
    ]


def test_a_fork_costs_the_length_of_its_prompt():
    # A second for each position that is read.
    per_position = CostModel(attention=AttentionCosts(position_s=1.0, layout_s=1.0))
    hand = Hand(cost=per_position)
    assert hand.run(SEQUENCES, fed=[Fed(1, 0, 40, (1, 3))]).device_s == 40
    assert hand.run(decode=[1, 3]).device_s == 82


def test_tokens_are_the_same_after_a_preemption():
    whole = alone(9, 4, 6)
    hand = Hand()
    again = hand.run([Entering(7, 9, 4, num_generated=4)], fed=[Fed(7, 0, 3 + 4, (7,))])
    assert [again.token_ids[0], hand.run(decode=[7]).token_ids[0]] == whole[4:]


def test_drawn_ids_spread_over_the_vocabulary_and_are_never_the_stop_id():
    ids = alone(0, 0, 500)
    assert len(set(ids)) > 480
    assert min(ids) > 0
    assert max(ids) < VOCAB_SIZE


def test_a_completion_ends_with_one_stop_id_and_continues_if_decoded_further():
    hand = Hand(ListedLengths([[1], [3, 2]]))
    entering = [Entering(0, 0, 0), Entering(1, 1, 0), Entering(2, 1, 1)]
    results = [hand.run(entering, fed=[Fed(slot, 0, 4, (slot,)) for slot in range(3)])]
    results += [hand.run(decode=[0, 1, 2]) for _ in range(4)]
    stops = np.array([result.token_ids for result in results]) == STOP_ID
    assert [np.flatnonzero(column).tolist() for column in stops.T] == [[0], [2], [1]]


def test_drawn_lengths_depend_on_the_sequence_alone_and_all_occur():
    lengths = DrawnLengths(np.array([3, 8, 21]))
    seeds, indices = np.arange(300), np.arange(300, dtype=np.int32) % 7
    drawn = lengths.lengths(seeds, indices)
    assert set(drawn.tolist()) == {3, 8, 21}
    assert (lengths.lengths(seeds[::-1], indices[::-1]) == drawn[::-1]).all()


def test_logprobs_have_the_requested_shapes():
    hand = Hand()
    entering = [Entering(0), Entering(1, num_logprobs=0), Entering(2, num_logprobs=3)]
    result = hand.run(
        entering,
        fed=[Fed(0, 0, 5, (0,)), Fed(1, 0, 6, (1,), num_logprobs=2), Fed(2, 0, 4, num_logprobs=0)],
    )
    assert np.isnan(result.logprobs).tolist() == [True, False]
    assert result.top_ids.shape == (2, 0)
    assert len(result.prompt_logprobs) == 5 + 4  # one less where the prompt ends
    assert result.prompt_top_ids.shape == result.prompt_top_logprobs.shape == (9, 2)
    assert (result.prompt_top_ids >= 0).sum(1).tolist() == [2] * 5 + [0] * 4
    hand.run(fed=[Fed(2, 4, 1, (2,))])
    mixed = hand.run(decode=[2, 0])
    assert (mixed.top_ids >= 0).sum(1).tolist() == [3, 0]
    assert mixed.top_ids[0, 0] == mixed.token_ids[0]
    assert mixed.top_logprobs[0, 0] == mixed.logprobs[0]
    assert (np.diff(mixed.top_logprobs[0]) < 0).all()


def test_logprobs_that_were_not_requested_are_empty():
    result = Hand().run(SEQUENCES, fed=[Fed(1, 0, 5, (1,))])
    assert result.logprobs.shape == result.prompt_logprobs.shape == (0,)
    assert result.top_ids.shape == (1, 0)
    assert result.prompt_top_ids.shape == (0, 0)


def test_results_pass_the_wire():
    results = Codec(ForwardResult)
    result = Hand().run([Entering(1, num_logprobs=2)], fed=[Fed(1, 0, 5, (1,), num_logprobs=1)])
    copy = results.decode(results.encode(result))
    assert msgspec.structs.asdict(copy).keys() == msgspec.structs.asdict(result).keys()
    for name in ForwardResult.__struct_fields__:
        np.testing.assert_array_equal(getattr(copy, name), getattr(result, name))


def test_a_gap_in_the_numbers_is_noticed():
    hand = Hand()
    hand.run()
    with pytest.raises(ProtocolError, match="batch 2 came, batch 1 was due"):
        hand.run(number=2)


def test_a_slot_without_tokens_does_not_decode():
    with pytest.raises(ProtocolError, match="no tokens"):
        Hand().run(SEQUENCES, decode=[1])


def test_a_new_sequence_in_a_slot_cannot_decode_before_its_prompt():
    hand = Hand()
    hand.run(SEQUENCES, fed=[Fed(1, 0, 5, (1,))])
    with pytest.raises(ProtocolError, match="no tokens"):
        hand.run([Entering(1)], decode=[1])


def test_a_chunk_must_begin_where_the_previous_one_ended():
    for chunk in (Fed(1, 4, 3), Fed(1, 2, 3)):
        hand = Hand()
        hand.run(SEQUENCES, fed=[Fed(1, 0, 3)])
        with pytest.raises(ProtocolError, match=rf"slot 1 has 3 tokens.* at {chunk.start}"):
            hand.run(fed=[chunk])


def test_a_token_can_only_be_drawn_at_the_end_of_a_prompt():
    hand = Hand()
    chunk = Fed(1, 0, 3, (1,))
    hand.run(SEQUENCES)
    with pytest.raises(ProtocolError, match="does not end"):
        hand.run(fed=[chunk, Fed(2, 0, 3)], draw_chunks=np.array([1]))


def test_controls_are_numbered_with_the_batches():
    device = SimulatedDevice(fixed(0.5), NEVER, num_slots=1, page_size=16)
    action = UpdateWeights(1, ("a.safetensors",))
    done = device.carry_out(Control(0, action))
    assert (done.number, done.error, done.weights_ready) == (0, None, True)
    with pytest.raises(ProtocolError, match="control 0 came, 1 was due"):
        device.carry_out(Control(0, action))
    with pytest.raises(ProtocolError, match="batch 0 came, batch 1 was due"):
        device.run(ForwardBatch(0))


def test_a_group_costs_its_pages_once():
    """Three rows share two pages of four tokens, and two of them a third page."""
    per_read = CostModel(attention=AttentionCosts(position_s=1.0, layout_s=1.0))
    hand = Hand(cost=per_read)
    hand.run(SEQUENCES, fed=[Fed(slot, 0, 14, (slot,)) for slot in (1, 2, 3)])
    groups = {
        "group_first_decodes": np.array([0, 1]),
        "group_num_decodes": np.array([3, 2]),
        "group_first_columns": np.array([0, 2]),
        "group_num_columns": np.array([2, 1]),
    }
    assert hand.run(decode=[1, 2, 3], **groups).device_s == 3 * 15 - 2 * 8 - 4
    assert hand.run(decode=[1, 2, 3]).device_s == 3 * 16


def test_a_group_may_have_chunks():
    per_read = CostModel(attention=AttentionCosts(position_s=1.0, layout_s=1.0))
    hand = Hand(cost=per_read)
    hand.run(SEQUENCES, fed=[Fed(slot, 0, 8, (1,) if slot == 1 else ()) for slot in (1, 2, 3)])
    groups = {
        "group_first_decodes": np.array([0]),
        "group_num_decodes": np.array([1]),
        "group_first_columns": np.array([0]),
        "group_num_columns": np.array([2]),
        "group_first_chunks": np.array([0]),
        "group_num_chunks": np.array([2]),
    }
    fed = [Fed(2, 8, 3), Fed(3, 8, 2)]
    assert hand.run(decode=[1], fed=fed, **groups).device_s == 9 + 11 + 10 - 2 * 8


def test_draws_cost_by_the_sampling_of_their_slots_and_scored_prompts_pass_the_head():
    cost = CostModel(
        head=Curve.roofline(0.0, 100.0), draws=DrawCosts(sampled_s=1.0, logprobs_s=10.0)
    )
    hand = Hand(cost=cost)
    entering = [Entering(0), Entering(1, num_logprobs=3)]
    first = hand.run(entering, fed=[Fed(0, 0, 5, (0,)), Fed(1, 0, 4, (1,))])
    assert first.device_s == 200 + 1 + 11
    assert hand.run(decode=[0]).device_s == 101
    assert hand.run(decode=[0, 1]).device_s == 200 + 1 + 11
    scored = hand.run([Entering(2)], fed=[Fed(2, 0, 6, num_logprobs=0)])
    assert scored.device_s == 600 + 60
