"""What a worker says of itself for receipts."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import msgspec
import pytest
from checkpoints import make_checkpoint
from worker_driver import worker_config

from tokasaurus.config.slices import WorkerConfig
from tokasaurus.launch.lifeline import Lifeline, Ready, Start
from tokasaurus.model.worker.identity import _WITHOUT_EFFECT
from tokasaurus.model.worker.worker import Worker


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("identity"), "llama", num_layers=1, shards=2)


def identity_of(model, **changes):
    return Worker(worker_config(model, **changes)).identity()


def test_a_flag_is_recorded_unless_no_result_depends_on_it(model):
    """A new flag is in receipts unless it is listed as one without effect."""
    fields = {field.name for field in dataclasses.fields(WorkerConfig)}
    identity = identity_of(model)
    assert set(identity.configuration) == fields - _WITHOUT_EFFECT
    assert _WITHOUT_EFFECT - fields <= {"deterministic"}


def test_auto_is_recorded_as_what_it_stands_for(model):
    identity = identity_of(model, attention="auto", linear="auto", instruction_set="auto")
    configuration = identity.configuration
    assert configuration["attention"] in ("compiled", "reference")
    assert configuration["linear"] in ("packed", "plain")
    if configuration["attention"] == "compiled":
        assert "auto" not in configuration["instruction_set"]
        assert {"paged_attention", "operators", "sampling"} <= set(identity.kernels)
        assert "replay" not in identity.kernels
    assert identity_of(model, attention="reference").configuration["attention"] == "reference"


def test_sizes_of_the_engine_do_not_change_what_it_is(model):
    one = identity_of(model)
    other = identity_of(model, page_size=32, num_pages=50, num_slots=9, max_request_tokens=40)
    assert one == other


def test_the_files_of_the_weights_are_those_that_were_read(model):
    identity = identity_of(model)
    files = sorted(model.glob("*.safetensors"))
    assert [Path(file.path) for file in identity.weight_files] == files
    for file, path in zip(identity.weight_files, files, strict=True):
        status = os.stat(path)
        assert (file.num_bytes, file.modified_ns) == (status.st_size, status.st_mtime_ns)
    assert identity_of(model, load_format="dummy").weight_files == ()


def test_an_identity_travels_on_a_lifeline_as_json(model):
    identity = identity_of(model)
    assert json.loads(msgspec.json.encode(identity)) == msgspec.to_builtins(identity) | {
        "weight_files": [msgspec.to_builtins(file) for file in identity.weight_files]
    }
    ours, theirs = Lifeline.pair()
    for note in (Ready(0.5, identity), Start({0: (identity,)})):
        ours.send(note)
        assert theirs.receive() == [note]
    ours.close()
    theirs.close()
