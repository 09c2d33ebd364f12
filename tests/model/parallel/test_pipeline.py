"""Stages of a model in processes of their own compute, bit for bit, what one worker does."""

from __future__ import annotations

import pytest
from rows import named
from worker_driver import worker_config
from worker_script import contents, load_vocabulary, run, script

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
