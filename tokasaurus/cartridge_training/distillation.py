"""Distillation: trains a cartridge so that a model behind it predicts what it would with a text.

The cartridge's keys and values are the only parameters, and begin as those of a text's first
tokens. The loss at a position of an answer is the Kullback-Leibler divergence of what the model
predicts behind the cartridge from what it predicted with the document in sight: its most likely
tokens, and all others together as one more.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from tokasaurus.cartridge_training.self_study import Conversation
from tokasaurus.errors import ConfigError

__all__ = [
    "Losses",
    "Settings",
    "TrainableCartridge",
    "answer_logits",
    "cache_argument",
    "distillation_loss",
    "train",
]

_MOST_VALIDATED = 64  # conversations
_WARM_UP = 0.05  # of all steps
_SMALLEST = 1e-6  # of the probability of all other tokens


class TrainableCartridge(nn.Module):
    """The keys and values of N positions, of which the first are never changed.

    Args:
        keys, values: for each layer [1, kv_heads, N, head_dim].
        num_frozen: positions at the beginning that are not trained: models attend to the first
            token whatever it is.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], num_frozen: int) -> None:
        super().__init__()
        self.num_tokens = keys[0].shape[2]
        self.num_frozen = num_frozen
        for name, tensors in (("keys", keys), ("values", values)):
            frozen = [t[:, :, :num_frozen].detach().clone() for t in tensors]
            # Small updates of a trained number would be lost in fewer bits.
            trained = [nn.Parameter(t[:, :, num_frozen:].detach().float().clone()) for t in tensors]
            self._frozen = {**getattr(self, "_frozen", {}), name: frozen}
            setattr(self, name, nn.ParameterList(trained))

    @classmethod
    @torch.no_grad()
    def of_text(cls, model: Any, token_ids: Sequence[int], num_frozen: int) -> TrainableCartridge:
        """What a model computes for a text."""
        ids, cache = torch.tensor([list(token_ids)], device=model.device), DynamicCache()
        model.base_model(input_ids=ids, use_cache=True, **cache_argument(model, cache))
        layers = cache.layers
        return cls([each.keys for each in layers], [each.values for each in layers], num_frozen)

    def whole(self) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of all positions, for each layer [1, kv_heads, N, head_dim]."""
        keys, values = (
            [
                torch.cat((frozen, trained.to(frozen.dtype)), dim=2)
                for frozen, trained in zip(self._frozen[name], getattr(self, name), strict=True)
            ]
            for name in ("keys", "values")
        )
        return keys, values

    def cache(self, num_rows: int) -> DynamicCache:
        """For a batch of prompts behind it."""
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(*self.whole(), strict=True)):
            rows = (num_rows, -1, -1, -1)
            cache.update(keys.expand(rows), values.expand(rows), layer)
        return cache


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        num_steps: updates of the parameters.
        batch_size: conversations of one update.
        learning_rate: the highest; it rises during the first steps, and falls to zero as a cosine.
        validation_share: of the conversations, which are not trained on.
    """

    num_steps: int
    batch_size: int
    learning_rate: float
    seed: int
    validation_share: float = 0.1


@dataclass(frozen=True)
class Losses:
    """In nats a token. The validation's are by step: before the first, and from time to time."""

    training: list[float]
    validation: dict[int, float]


@dataclass(frozen=True)
class _Batch:
    """Conversations side by side, padded on the right.

    Attributes:
        ids: [rows, tokens].
        mask: [rows, cartridge + tokens].
        positions: [targets] of the predictions, in the flat [rows x tokens].
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor


def train(
    model: Any,
    cartridge: TrainableCartridge,
    conversations: Sequence[Conversation],
    settings: Settings,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Losses:
    """Trains a cartridge in place, and leaves it as it was where the validation was best.

    Args:
        model: of transformers; its own parameters stay as they are.
        cartridge: to be trained.
        conversations: at least two.
        on_step: called with the number of steps done and the last loss.

    Raises:
        ConfigError: there are too few conversations, or the loss is not a number any more.
    """
    if len(conversations) < 2:
        raise ConfigError(
            f"{len(conversations)} conversations are too few to train on; raise conversations, or"
            " use a model that asks and answers questions"
        )
    model.requires_grad_(False)
    shuffled = Random(settings.seed).sample(conversations, len(conversations))
    share = max(1, round(settings.validation_share * len(shuffled)))
    validated, trained = shuffled[:share][:_MOST_VALIDATED], shuffled[share:]
    optimizer = torch.optim.AdamW(cartridge.parameters(), settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(settings.num_steps))
    batches = _batches(trained, settings)
    losses = Losses([], {})
    best = (math.inf, cartridge.state_dict())
    between = max(1, settings.num_steps // 20)
    for step in range(settings.num_steps + 1):
        if step % between == 0 or step == settings.num_steps:
            losses.validation[step] = _validate(model, cartridge, validated, settings.batch_size)
            if losses.validation[step] < best[0]:
                state = {name: each.clone() for name, each in cartridge.state_dict().items()}
                best = (losses.validation[step], state)
        if step == settings.num_steps:
            break
        loss = _loss(model, cartridge, next(batches))
        if not math.isfinite(value := loss.item()):
            raise ConfigError(f"the loss is {value} after {step} steps; lower learning_rate")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        losses.training.append(value)
        on_step(step + 1, value)
    cartridge.load_state_dict(best[1])
    return losses


def _schedule(num_steps: int) -> Callable[[int], float]:
    warm_up = max(1, round(_WARM_UP * num_steps))

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, num_steps - warm_up)))

    return factor


def _batches(
    conversations: Sequence[Conversation], settings: Settings
) -> Iterator[list[Conversation]]:
    """Every conversation once, in a random order, then again in another one."""
    rng = Random(settings.seed + 1)
    while True:
        order = rng.sample(conversations, len(conversations))
        for start in range(0, len(order), settings.batch_size):
            yield order[start : start + settings.batch_size]


@torch.no_grad()
def _validate(
    model: Any, cartridge: TrainableCartridge, conversations: Sequence[Conversation], size: int
) -> float:
    """The mean over all tokens of the answers."""
    total, num_tokens = 0.0, 0
    for start in range(0, len(conversations), size):
        chosen = conversations[start : start + size]
        count = sum(len(each.answer.token_ids) for each in chosen)
        total += _loss(model, cartridge, chosen).item() * count
        num_tokens += count
    return total / num_tokens


def _loss(
    model: Any, cartridge: TrainableCartridge, conversations: Sequence[Conversation]
) -> Tensor:
    """In nats a token of the answers."""
    return distillation_loss(answer_logits(model, cartridge, conversations), conversations)


def answer_logits(
    model: Any, cartridge: TrainableCartridge, conversations: Sequence[Conversation]
) -> Tensor:
    """What a model predicts behind a cartridge.

    Returns:
        float32 [targets, vocabulary]: of the tokens of all answers, one after the other.
    """
    batch = _padded(conversations, cartridge.num_tokens, model.device)
    num_rows, length = batch.ids.shape
    past = cartridge.num_tokens
    hidden = model.base_model(
        input_ids=batch.ids,
        attention_mask=batch.mask,
        position_ids=torch.arange(past, past + length, device=model.device).expand(num_rows, -1),
        use_cache=True,
        **cache_argument(model, cartridge.cache(num_rows)),
    ).last_hidden_state
    logits: Tensor = model.get_output_embeddings()(hidden.flatten(0, 1)[batch.positions])
    return logits.float()


def cache_argument(model: Any, cache: DynamicCache) -> dict[str, DynamicCache]:
    """The argument of a forward pass that reads a cache and adds to it.

    transformers calls it ``cache`` since 5.24, and will forget the older name in 5.40.
    """
    names = inspect.signature(model.base_model.forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}


def distillation_loss(logits: Tensor, conversations: Sequence[Conversation]) -> Tensor:
    """The divergence of predictions from those with the document in sight.

    Args:
        logits: of ``answer_logits`` for the same conversations.
        conversations: whose answers have what was predicted with the document in sight.

    Returns:
        The mean, in nats a token.
    """
    top_ids = torch.cat([torch.as_tensor(each.answer.top_ids) for each in conversations])
    top_logprobs = torch.cat([torch.as_tensor(each.answer.top_logprobs) for each in conversations])
    return _divergence(logits, top_ids.to(logits.device), top_logprobs.to(logits.device))


def _divergence(logits: Tensor, top_ids: Tensor, top_logprobs: Tensor) -> Tensor:
    """Of predictions [targets, vocabulary] from the likeliest tokens and all others together."""
    predicted = logits.log_softmax(-1).gather(1, top_ids)
    wanted = top_logprobs.exp()
    rest = (1 - wanted.sum(-1)).clamp(min=_SMALLEST)
    others = (1 - predicted.exp().sum(-1)).clamp(min=_SMALLEST)
    divergence = (wanted * (top_logprobs - predicted)).sum(-1) + rest * (rest / others).log()
    return divergence.mean()


def _padded(conversations: Sequence[Conversation], past: int, device: torch.device) -> _Batch:
    rows = [each.prompt_ids + each.answer.token_ids[:-1] for each in conversations]
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), past + length, dtype=torch.long)
    positions: list[int] = []
    for row, (line, each) in enumerate(zip(rows, conversations, strict=True)):
        ids[row, : len(line)] = torch.tensor(line)
        mask[row, : past + len(line)] = 1
        first = row * length + len(each.prompt_ids) - 1  # predicts the answer's first token
        positions += range(first, first + len(each.answer.token_ids))
    return _Batch(ids.to(device), mask.to(device), torch.tensor(positions, device=device))
