"""Adjustments of logits, token by token in plain Python."""

from __future__ import annotations

import math
import random

from tokasaurus.protocol.messages import Adjustments


def adjusted_logits(
    logits: list[float], adjustments: Adjustments, prompt: list[int], generated: list[int]
) -> list[float]:
    """The adjusted logits in float64.

    The order is bad words, min_tokens, bias, then the repetition, frequency and presence penalties.
    """
    scores = list(logits)
    for word in adjustments.bad_words:
        before = list(word[:-1])
        if before == generated[len(generated) - len(before) :]:
            scores[word[-1]] = -math.inf
    if len(generated) < adjustments.min_tokens:
        for token_id in adjustments.late_ids:
            scores[token_id] = -math.inf
    for token_id, bias in adjustments.bias:
        scores[token_id] += bias
    if max(scores) == -math.inf:
        scores = list(logits)
    for token_id in {*prompt, *generated}:
        factor = adjustments.repetition_penalty
        scores[token_id] *= factor if scores[token_id] <= 0 else 1 / factor
    for token_id in set(generated):
        scores[token_id] -= adjustments.frequency_penalty * generated.count(token_id)
        scores[token_id] -= adjustments.presence_penalty
    return scores


def random_adjustments(chance: random.Random, vocab_size: int) -> Adjustments:
    """Random adjustments of all kinds, of few ids, so that words and repetitions occur."""

    def ids(most: int) -> tuple[int, ...]:
        return tuple(chance.sample(range(min(vocab_size, 12)), chance.randint(0, most)))

    return Adjustments(
        bad_words=tuple(
            tuple(chance.randrange(min(vocab_size, 12)) for _ in range(chance.choice([1, 2, 2, 3])))
            for _ in range(chance.choice([0, 0, 1, 6]))
        ),
        min_tokens=chance.choice([0, 3, 8]),
        late_ids=ids(2),
        bias=tuple((i, chance.choice([-100.0, -3.5, 2.0, 100.0])) for i in ids(4)),
        repetition_penalty=chance.choice([1.0, 1.0, 0.7, 1.3]),
        frequency_penalty=chance.choice([0.0, 0.0, -0.6, 1.1]),
        presence_penalty=chance.choice([0.0, 0.0, -0.4, 2.0]),
    )
