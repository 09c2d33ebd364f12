"""A trainer's tensors in buckets over HTTP, to real engines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracle import reference_logits
from transformers import AutoModelForCausalLM

import tokasaurus.demo
from tokasaurus.errors import ConfigError, Conflict, NotFound, RequestError
from tokasaurus.integrations.trainer import BucketSender

pytestmark = pytest.mark.engine

DEMO = Path(tokasaurus.demo.__file__).parent / "model"
PROMPT = list(range(20, 40))


def noisy_model(seed):
    """The bundled model as a trainer has it, with noise on its weights."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor += 0.1 * tensor.std() * torch.randn_like(tensor)
    return model


def check_weights(client, model, directory):
    """The engine's logprobs are those of transformers with this model."""
    answer = client.generate(PROMPT, max_tokens=8, temperature=0, logprobs=0, ignore_eos=True)
    model.save_pretrained(directory)
    logits = reference_logits(directory, PROMPT, answer.token_ids.tolist())
    chosen = torch.tensor(answer.token_ids)[:, None]
    expected = logits.log_softmax(dim=-1).gather(1, chosen)[:, 0]
    torch.testing.assert_close(torch.tensor(answer.logprobs.chosen), expected, atol=1e-4, rtol=0)
    assert answer.token_ids.tolist() == logits.argmax(dim=-1).tolist()


def test_an_engine_runs_the_weights_that_a_trainer_sends(client, tmp_path):
    with BucketSender(client.base_url, bucket_bytes=1 << 20) as sender:
        for step in (1, 2):
            model = noisy_model(step)
            before = client.weights.version().version
            assert sender.send(model.state_dict(), f"step-{step}") == [before + 1]
            version = client.weights.version()
            assert (version.version, version.label) == (before + 1, f"step-{step}")
            check_weights(client, model, tmp_path / str(step))


def test_what_an_engine_refuses_changes_nothing_and_leaves_nothing(client):
    before = client.weights.version()
    left_behind = client.weights.begin()
    tensors = noisy_model(3).state_dict()
    del tensors["model.norm.weight"]
    with BucketSender(client.base_url, bucket_bytes=1 << 20) as sender:
        with pytest.raises(RequestError, match=r"lacks tensors: model\.norm\.weight"):
            sender.send(tensors)
        with pytest.raises(ConfigError, match="has x twice"):
            sender.send([("x", torch.ones(1)), ("x", torch.ones(1))])
    assert client.weights.version() == before
    with pytest.raises(NotFound):
        client.weights.commit(left_behind, 1)
    client.weights.discard(client.weights.begin())  # none is in the way


def test_an_unfinished_update_is_in_the_way_unless_it_is_replaced(client):
    first = client.weights.begin("first")
    with pytest.raises(Conflict, match=first):
        client.weights.begin("second")
    second = client.weights.begin("second", replace=True)
    with pytest.raises(NotFound):
        client.weights.discard(first)
    client.weights.discard(second)


def test_arguments_that_are_wrong():
    for urls, message in (([], "names no engine"), (["http://a", "http://a"], "twice")):
        with pytest.raises(ConfigError, match=message):
            BucketSender(urls)
    with pytest.raises(ConfigError, match="bucket_bytes=0"):
        BucketSender("http://a", bucket_bytes=0)
