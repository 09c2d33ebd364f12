"""A model in stages, each with a range of the layers and with the weights of these alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checkpoints import VOCAB_SIZE
from rows import named

from tokasaurus.errors import ModelError
from tokasaurus.model.backend.base import SequenceRows
from tokasaurus.model.backend.reference import ReferenceBackend
from tokasaurus.model.facts import read_model_config
from tokasaurus.model.kv_cache import KVCache
from tokasaurus.model.placement import Placement
from tokasaurus.model.weights.loader import fill_all, load_model

PLACE = Placement(torch.float32, torch.device("cpu"), "plain")
VARIANTS = (
    ("llama", {"tied": True}),
    ("llama", {"tied": False, "attention_bias": True, "mlp_bias": True, "shards": 3}),
    ("qwen2", {"tied": True}),
    ("qwen3", {"tied": False}),
)
NUM_TOKENS = 20


def attention_of(num_layers, config):
    """One sequence whose whole prompt is fed, over a cache of this many layers."""
    cache = KVCache.allocate(
        num_layers=num_layers,
        num_pages=2,
        page_size=16,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    rows = SequenceRows(
        slots=np.array([0], np.int32),
        query_starts=np.array([0, NUM_TOKENS], np.int32),
        kv_lengths=np.array([NUM_TOKENS], np.int32),
        positions=np.arange(NUM_TOKENS, dtype=np.int32),
        page_table=torch.tensor([[0, 1]], dtype=torch.int32),
    )
    return ReferenceBackend(cache, config.num_heads).plan(rows)


def logits_of(path, config, stages):
    """The logits after all stages, one after the other; and the tensors of each."""
    x = torch.arange(NUM_TOKENS) * 7 % VOCAB_SIZE
    names = []
    for stage in stages:
        model, weights, _ = load_model(path, config, PLACE, stage=stage)
        num_layers = config.num_layers if stage is None else len(stage)
        with torch.inference_mode():
            x = model(x, torch.arange(NUM_TOKENS), attention_of(num_layers, config))
        names.append(set(weights.shapes))
    with torch.inference_mode():
        return model.logits(x), names


def test_stages_in_sequence_are_the_whole_model_bit_for_bit(checkpoint):
    for architecture, options in VARIANTS:
        path = checkpoint(architecture, **options)
        config = read_model_config(path)
        last = config.num_layers
        expected, (all_names,) = logits_of(path, config, [None])
        for stages in (
            [range(1), range(1, last)],
            [range(last - 1), range(last - 1, last)],
            [range(1), range(1, last - 1), range(last - 1, last)],
        ):
            with named(f"{architecture} {options} {stages}"):
                logits, names = logits_of(path, config, [s for s in stages if len(s)])
                assert torch.equal(logits, expected)
                assert set().union(*names) == all_names
                twice = sum(map(len, names)) - len(all_names)
                # The head of a tied model is the embedding.
                assert twice == int(options["tied"])


def test_a_stage_still_refuses_what_no_stage_has(checkpoint):
    path = checkpoint("llama", tied=False)
    config = read_model_config(path)
    _, weights, _ = load_model(path, config, PLACE, stage=range(1))
    tensors = [(name, torch.zeros(shape)) for name, shape in weights.shapes.items()]
    other = "model.layers.1.self_attn.q_proj.weight"
    fill_all(weights, [*tensors, (other, torch.zeros(1))], "it")
    for name in (
        f"model.layers.{config.num_layers}.self_attn.q_proj.weight",
        "model.layers.1.self_attn.q_norm.weight",
        "model.layers.1.self_attn.q_proj.bias",
        "model.norm.bias",
    ):
        with pytest.raises(ModelError, match=f"does not use: {name}"):
            fill_all(weights, [*tensors, (name, torch.zeros(1))], "it")
