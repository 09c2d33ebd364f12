"""Stages of a model in processes of their own compute, bit for bit, what one worker does."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rows import named
from worker_driver import worker_config
from worker_script import contents, load_vocabulary, run, script

from tokasaurus.model.parallel.ranks import Ranks
from tokasaurus.model.worker.pipeline import Pipeline
from tokasaurus.model.worker.worker import Worker

MODELS = (
    ("llama", {"tied": True, "num_layers": 4}, 2),
    ("llama", {"tied": True, "num_layers": 4}, 4),
    ("qwen3", {"num_layers": 4}, 3),
    ("qwen2", {"tied": True, "num_layers": 2}, 2),
)


def config_of(path, **fields):
    sizes = {"num_slots": 12, "max_seqs_per_forward": 12, "deterministic": True}
    return worker_config(path, **{**sizes, **fields})


def results_of(meeting, path, in_flight):
    """What the script gives; None at a stage that does not answer."""
    config = config_of(path, rank=meeting.rank, pp_size=meeting.size)
    worker = Worker(config, load_vocabulary, meeting.rendezvous)
    worker.warm_up()
    results = run(worker, script(config), in_flight)
    assert worker.is_deterministic
    worker.ranks.agreed(None)  # what is on the way arrives before a rank leaves
    return [without_waiting(each) for each in results] if worker.ranks.samples else None


def without_waiting(result):
    values = contents(result)
    del values["waited_s"]
    return values


@pytest.mark.parametrize("in_flight", [1, 5])
def test_stages_compute_what_one_worker_does(checkpoint, ranks, in_flight):
    for architecture, options, pp_size in MODELS:
        with named(f"{pp_size} stages, {architecture} {options}"):
            path = checkpoint(architecture, **options)
            config = config_of(path)
            alone = Worker(config, load_vocabulary)
            expected = [without_waiting(each) for each in run(alone, script(config), in_flight)]
            *others, last = ranks.run(pp_size, results_of, path, in_flight)
            assert last == expected
            assert others == [None] * (pp_size - 1)


def most_kept(meeting, num_batches):
    """Tensors that the first of two stages keeps after it has sent those of many batches."""
    ranks = Ranks(meeting.rank, 1, 2, meeting.rendezvous)
    pipeline = Pipeline(ranks, 4, 8, torch.float32, lambda rows, token_ids: None)
    alive = weakref.WeakSet()
    for number in range(num_batches):
        if ranks.is_first_stage:
            hidden = torch.full((3, 8), float(number))
            alive.add(hidden)
            pipeline.send_hidden(hidden)
            del hidden
        else:
            assert (pipeline.receive_hidden(3) == number).all()
    ranks.agreed(None)
    return len(alive)


def test_a_stage_does_not_keep_what_it_has_sent(ranks):
    first, _ = ranks.run(2, most_kept, 100)
    assert first <= 8


def most_tokens_kept(meeting, num_batches):
    """Tensors that the rank that samples keeps, while the other one never decodes."""
    ranks = Ranks(meeting.rank, 2, 1, meeting.rendezvous)
    pipeline = Pipeline(ranks, 4, 8, torch.float32, lambda rows, token_ids: None)
    nothing, slots = np.empty(0, np.int32), np.arange(2, dtype=np.int32)
    alive = weakref.WeakSet()
    for _ in range(num_batches):
        pipeline.need_tokens_of(nothing)
        dist.barrier()  # in place of the layers, which all ranks run together
        if ranks.samples:
            token_ids = torch.zeros(2, dtype=torch.int64)
            alive.add(token_ids)
            pipeline.send_tokens(token_ids)
            del token_ids
        else:
            pipeline.expect_tokens(SimpleNamespace(slots=slots))
    ranks.agreed(None)
    pipeline.clear()
    ranks.agreed(None)
    return len(alive)


def test_the_rank_that_samples_does_not_keep_what_it_has_sent(ranks):
    first, _ = ranks.run(2, most_tokens_kept, 300)
    assert first <= 80
