"""What a replica learns from its sequences, and what it does not."""

from __future__ import annotations

import numpy as np
from simulation import make_admission, make_config, make_request, prompt

from tokasaurus.manager.counters import Counters
from tokasaurus.manager.forecast.learning import LengthLearning
from tokasaurus.manager.forecast.lengths import NO_GROUP
from tokasaurus.manager.running import RunningSequences
from tokasaurus.manager.sequence import GeneratedTokens, Request
from tokasaurus.manager.shares import Shares
from tokasaurus.manager.waiting import Backlog

LIMIT = 60  # max_tokens


class Replica:
    """Requests whose samples end without ever having had a slot, or after they lost it."""

    def __init__(self, **admission: object) -> None:
        config = make_config(admission=make_admission(std_scale=0.0, **admission))
        self.backlog = Backlog(config.stop_lag, Shares(lambda priority: None, float))
        self.learning = LengthLearning(config, RunningSequences(config, self.backlog, Counters()))
        self.num_requests = 0

    def open(self, n: int) -> Request:
        self.num_requests += 1
        message = make_request(self.num_requests, prompt(4), LIMIT, n=n)
        request = self.backlog.add(message, 0.0)
        self.learning.open(request)
        return request

    def end(self, request: Request, num_tokens: int, *, by_itself: bool = True) -> None:
        sequences = list(request.sequences.values())
        for sequence in sequences:
            ids = np.zeros(num_tokens, np.int32)
            sequence.stored = [GeneratedTokens.without_logprobs(ids)]
            sequence.num_stored = num_tokens
        self.learning.end(sequences, [by_itself] * len(sequences))
        self.learning.close(request)

    def predicted_mean(self) -> float:
        """Of many sequences that have generated nothing yet."""
        count = 4096
        predicted = self.learning.predict(
            np.full(count, NO_GROUP),
            np.zeros(count, np.int64),
            np.full(count, LIMIT),
            np.arange(count),
        )
        return float(predicted.mean())


def test_lengths_change_predictions_after_the_next_refresh() -> None:
    replica = Replica()
    at_first = replica.predicted_mean()
    for _ in range(200):
        replica.end(replica.open(n=1), 20)
    assert replica.learning.num_unlearned == 200
    assert replica.predicted_mean() == at_first
    replica.learning.refresh()
    assert replica.learning.num_unlearned == 0
    assert 19 < replica.predicted_mean() < 21


def test_aborted_sequences_do_not_count_as_ends() -> None:
    replica = Replica()
    for _ in range(200):
        replica.end(replica.open(n=1), 20, by_itself=False)
    assert replica.learning.num_unlearned == 200
    replica.learning.refresh()
    assert replica.predicted_mean() > 50


def test_sequences_without_a_token_teach_nothing() -> None:
    replica = Replica()
    replica.end(replica.open(n=2), 0)
    assert replica.learning.num_unlearned == 0


def test_samples_of_one_request_are_a_group() -> None:
    replica = Replica()
    assert replica.open(n=1).length_group == NO_GROUP
    assert replica.open(n=2).length_group != replica.open(n=2).length_group != NO_GROUP


def test_without_learning_no_lengths_are_kept() -> None:
    replica = Replica(learn_lengths=False)
    for _ in range(200):
        request = replica.open(n=3)
        assert request.length_group == NO_GROUP
        replica.end(request, 20)
    assert replica.learning.num_unlearned == 0
    replica.learning.refresh()
    assert replica.predicted_mean() == LIMIT


def test_without_predictions_every_sequence_counts_with_max_tokens() -> None:
    replica = Replica(predict_lengths=False)
    for _ in range(200):
        replica.end(replica.open(n=1), 20)
    replica.learning.refresh()
    assert replica.predicted_mean() == LIMIT
