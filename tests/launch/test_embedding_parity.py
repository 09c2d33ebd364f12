"""Embeddings against transformers' hidden states, under chunking, preemption and other load."""

from __future__ import annotations

import random
import shutil

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from oracle import reference_model
from safetensors.torch import load_file, save_file

from tokasaurus import LLM, SamplingParams
from tokasaurus.config.engine import EngineConfig
from tokasaurus.errors import RequestError
from tokasaurus.launch.assemble import assemble
from tokasaurus.launch.embedded import EmbeddedEngine
from tokasaurus.protocol.messages import Pooling

pytestmark = pytest.mark.engine

TOLERANCE = 1e-4
FLAGS = {
    "dtype": "float32",
    "page_size": 4,
    "kv_cache_num_tokens": 256,
    "max_num_tokens_per_request": 128,
    "max_tokens_per_forward": 24,  # prompts come in chunks
    "max_seqs_per_forward": 6,
    "allocator_sanity_checks": True,
}


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def model(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    return make_checkpoint(directory, request.param, seed=5, tied=request.param == "qwen3")


def prompts(count, seed, longest=110):
    source = random.Random(seed)
    beginning = [source.randrange(200) for _ in range(longest)]
    return [
        beginning[: source.randrange(40)]
        + [source.randrange(200) for _ in range(source.randint(1, longest - 40))]
        for _ in range(count)
    ]


def reference(path, ids, pooling):
    with torch.inference_mode():
        output = reference_model(path)(torch.tensor([ids]), output_hidden_states=True)
    states = output.hidden_states[-1][0]  # after the last norm
    state = states.mean(0) if pooling == "mean" else states[-1]
    return torch.nn.functional.normalize(state, dim=0).numpy()


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_with_chunks_and_preemptions(model, pooling):
    texts = prompts(20, seed=1)
    with LLM(model, bump_city_population_me=True, **FLAGS) as llm:
        vectors = llm.embed(texts, pooling=pooling, use_tqdm=False)
        again = llm.embed(texts[:5], pooling=pooling, use_tqdm=False)  # some are in the cache
        assert llm.num_preemptions > 0
    for ids, vector in zip(texts + texts[:5], [*vectors, *again], strict=True):
        np.testing.assert_allclose(vector, reference(model, ids, pooling), atol=TOLERANCE)


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_without_prefix_and_head_embeds(tmp_path, tied):
    """The layout of Qwen3-Embedding."""
    whole = make_checkpoint(tmp_path / "whole", "qwen3", seed=5, tied=tied)
    bare = tmp_path / "bare"
    shutil.copytree(whole, bare)
    tensors = load_file(bare / "model.safetensors")
    tensors.pop("lm_head.weight", None)
    renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(renamed, bare / "model.safetensors")
    texts = prompts(5, seed=3)
    with LLM(bare, bump_city_population_me=True, **FLAGS) as llm:
        vectors = llm.embed(texts, pooling="last", use_tqdm=False)
    for ids, vector in zip(texts, vectors, strict=True):
        np.testing.assert_allclose(vector, reference(whole, ids, "last"), atol=TOLERANCE)


def test_embeddings_beside_generation(model):
    """Embeddings and generation do not affect each other."""
    texts = prompts(8, seed=2, longest=60)
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    with LLM(model, bump_city_population_me=True, **FLAGS) as llm:
        alone = llm.generate(texts, params, use_tqdm=False)
    flags = EngineConfig.from_flags(model=str(model), bump_city_population_me=True, **FLAGS)
    engine = EmbeddedEngine(assemble(flags), steps_ahead=2)
    requests = [engine.prepare(ids, params) for ids in texts]
    pooled = [engine.prepare_embedding(ids, Pooling.MEAN) for ids in texts]
    mixed = [each for pair in zip(requests, pooled, strict=True) for each in pair]
    generations = [engine.generations.start(each) for each in mixed]
    while not engine.idle:
        engine.step()
    for output, generation in zip(alone, generations[::2], strict=True):
        assert generation.take_all()[0].token_ids == output.outputs[0].token_ids
    for ids, generation in zip(texts, generations[1::2], strict=True):
        state = generation.pooled_state
        vector = state / np.linalg.norm(state)
        np.testing.assert_allclose(vector, reference(model, ids, "mean"), atol=TOLERANCE)


def test_embeddings_of_one_prompt_no_prompt_and_a_wrong_one(model):
    with LLM(model, embedding_pooling="last", **FLAGS) as llm:
        text = "hello"
        ids = llm.get_tokenizer().encode(text)
        vectors = llm.embed(text, use_tqdm=False)
        assert vectors.shape[0] == 1
        np.testing.assert_allclose(vectors[0], reference(model, ids, "last"), atol=TOLERANCE)
        assert len(llm.embed([], use_tqdm=False)) == 0
        with pytest.raises(RequestError, match="prompt number 1"):
            llm.embed([[1], [10**6]], use_tqdm=False)
        with pytest.raises(RequestError, match="pooling"):
            llm.embed([[1]], pooling="max", use_tqdm=False)
