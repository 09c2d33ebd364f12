"""Training a cartridge: its gradients, what stays, and what the loss means."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checkpoints import VOCAB_SIZE, make_checkpoint
from transformers import AutoModelForCausalLM

from tokasaurus.cartridge_training.distillation import (
    Settings,
    TrainableCartridge,
    _divergence,
    _loss,
    train,
)
from tokasaurus.cartridge_training.self_study import Conversation, Sample
from tokasaurus.errors import ConfigError

NUM_TOKENS = 7


@pytest.fixture(params=["llama", "qwen3"])
def model(request, tmp_path):
    directory = make_checkpoint(tmp_path, request.param)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def ids(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, count).tolist()


def conversation(model, document: list[int], seed: int, top_k: int = VOCAB_SIZE) -> Conversation:
    """A random question and answer, with what the model predicts behind the document."""
    prompt, answer = ids(3 + seed % 4, seed), ids(2 + seed % 3, 100 + seed)
    with torch.no_grad():
        logits = model(torch.tensor([document + prompt + answer])).logits[0]
    first = len(document) + len(prompt) - 1
    top = logits[first : first + len(answer)].log_softmax(-1).topk(top_k)
    return Conversation(prompt, Sample(answer, "", True, top.indices.numpy(), top.values.numpy()))


def cartridge_of(model, document: list[int], num_frozen: int = 1) -> TrainableCartridge:
    return TrainableCartridge.of_text(model, document, num_frozen)


def test_behind_the_whole_document_there_is_nothing_to_learn(model):
    """The positions are right, and padding changes nothing."""
    document = ids(NUM_TOKENS, 1)
    conversations = [conversation(model, document, seed) for seed in range(6)]
    loss = _loss(model, cartridge_of(model, document), conversations)
    assert 0 <= loss.item() < 1e-6
    other = _loss(model, cartridge_of(model, ids(NUM_TOKENS, 2)), conversations)
    assert other.item() > 1e-3


def test_the_loss_is_the_divergence_from_the_likeliest_and_all_others_together():
    torch.manual_seed(0)
    wanted, predicted = torch.randn(5, 40).log_softmax(-1), torch.randn(5, 40)
    full = torch.nn.functional.kl_div(
        predicted.log_softmax(-1), wanted, reduction="batchmean", log_target=True
    )
    top = wanted.topk(40)
    assert _divergence(predicted, top.indices, top.values).item() == pytest.approx(
        full.item(), abs=1e-4
    )
    top = wanted.topk(5)
    part = _divergence(predicted, top.indices, top.values).item()
    assert 0 < part < full.item()


def test_training_changes_only_what_is_not_frozen_and_lowers_the_loss(model):
    document = ids(30, 1)
    cartridge = cartridge_of(model, document[:NUM_TOKENS], num_frozen=2)
    before = cartridge.whole()
    weights = [each.clone() for each in model.parameters()]
    conversations = [conversation(model, document, seed, top_k=20) for seed in range(24)]
    steps: list[int] = []
    losses = train(
        model,
        cartridge,
        conversations,
        Settings(num_steps=60, batch_size=8, learning_rate=0.05, seed=0),
        lambda step, loss: steps.append(step),
    )
    for old, new in zip(before, cartridge.whole(), strict=True):
        for one, other in zip(old, new, strict=True):
            assert torch.equal(one[:, :, :2], other[:, :, :2])
            assert not torch.equal(one[:, :, 2:], other[:, :, 2:])
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert steps == list(range(1, 61))
    assert len(losses.training) == 60
    assert np.mean(losses.training[-3:]) < 0.7 * np.mean(losses.training[:3])


def test_the_state_with_the_best_validation_is_kept(model):
    """A rate that is far too high makes everything worse: then nothing has changed."""
    document = ids(NUM_TOKENS, 1)
    cartridge = cartridge_of(model, document)
    before = cartridge.whole()
    conversations = [conversation(model, document, seed) for seed in range(8)]
    losses = train(model, cartridge, conversations, Settings(20, 4, 5.0, 0))
    assert min(losses.validation, key=losses.validation.__getitem__) == 0
    for old, new in zip(before, cartridge.whole(), strict=True):
        assert all(torch.equal(one, other) for one, other in zip(old, new, strict=True))


def test_too_little_to_train_on_is_an_error(model):
    cartridge = cartridge_of(model, ids(NUM_TOKENS, 1))
    with pytest.raises(ConfigError, match="1 conversations are too few"):
        train(
            model,
            cartridge,
            [conversation(model, ids(9, 1), 0)],
            Settings(1, 1, 0.1, 0),
        )
