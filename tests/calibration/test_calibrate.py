"""A tiny model is measured, and what is written runs replays. No time is compared with another."""

from __future__ import annotations

import json
import xml.etree.ElementTree
from functools import partial

import numpy as np
import pytest

from tokasaurus import LLM, SamplingParams
from tokasaurus.bench import calibrate, predict
from tokasaurus.bench.main import main
from tokasaurus.bench.peers.checkpoint import SHAPES, make_checkpoint, make_once
from tokasaurus.bench.peers.workloads import Workload
from tokasaurus.bench.predict import Prediction, predict_s
from tokasaurus.calibration.cases import Case
from tokasaurus.config.engine import EngineConfig
from tokasaurus.launch.assemble import assemble
from tokasaurus.model.worker.timed_worker import TimedWorker
from tokasaurus.planner.cost_model import fixed
from tokasaurus.planner.named_costs import cost_model

LIMITS = {
    "max_tokens_per_forward": 64,
    "max_seqs_per_forward": 8,
    "kv_cache_num_tokens": 4096,
    "cpu_threads": 1,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bench") / "tiny" / "checkpoint"
    make_once(directory, partial(make_checkpoint, SHAPES["tiny"]))
    return directory


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_calibration_is_written_checked_and_replayed(checkpoint, tmp_path, capsys):
    out, trace = tmp_path / "cost.yaml", tmp_path / "trace.jsonl"
    flags = [f"{name}={value}" for name, value in LIMITS.items()]
    words = ["calibrate", f"model={checkpoint}", "dtype=float32", f"out={out}", "rounds=1"]
    assert main([*words, *flags]) == 0
    found = last_line(capsys)
    assert found["out"] == str(out)
    assert len(found["held_out"]) >= 1
    cost = cost_model(str(out))
    assert cost.error >= found["spread"] - 1e-4
    assert cost.host.batch_s > 0
    assert cost.layers.counts[:3] == cost.head.counts[:3] == (1, 2, 3)
    assert min(cost.head.seconds) > 0
    assert max(cost.layers.seconds) > 0
    assert "AMD" in out.read_text() or "processor:" in out.read_text()
    trace.write_text(
        '{"arrival_s": 0, "prompt_tokens": 9, "output_tokens": [3], "max_tokens": 8}\n'
    )
    assert main(["replay", str(trace), f"cost={out}"]) == 0
    assert last_line(capsys)["makespan_s"] > 3 * cost.host.batch_s


def test_a_file_that_cannot_be_written_is_refused_before_measurements(
    tmp_path, monkeypatch, capsys
):
    def measured(*_):
        raise AssertionError("it measured")

    monkeypatch.setattr(calibrate, "calibrated", measured)
    out = tmp_path / "none" / "cost.yaml"
    assert main(["calibrate", f"out={out}"]) == 2
    assert f"out={out}: No such file or directory" in capsys.readouterr().err


def test_several_workers_and_tiny_batches_are_refused(checkpoint, tmp_path, capsys):
    words = ["calibrate", f"model={checkpoint}", "dtype=float32", f"out={tmp_path}/cost.yaml"]
    assert main([*words, "tp_size=2"]) == 2
    assert "leave out tp_size" in capsys.readouterr().err
    small = ["max_tokens_per_forward=2", "max_seqs_per_forward=1", "kv_cache_num_tokens=64"]
    assert main([*words, *small]) == 2
    assert "raise max_tokens_per_forward" in capsys.readouterr().err


def test_a_timed_worker_splits_a_batch_into_its_parts(checkpoint):
    """All rows decode, so the head is there; a chunk that ends no prompt needs none."""
    slices = assemble(EngineConfig.from_flags(model=str(checkpoint), dtype="float32", **LIMITS))
    worker = TimedWorker(slices.replicas[0].workers[0])
    worker.fill_cache()
    for case, has_head in (
        (Case(num_decodes=4, length=20), True),
        (Case(num_chunks=1, chunk_rows=8, chunk_end=16), False),
    ):
        worker.time(case.entering(16))
        seconds = worker.time(case.timed(16))
        assert seconds.layers_s > 0
        assert seconds.rest_s > 0
        assert (seconds.head_s > 0) == has_head


@pytest.mark.parametrize("name", ["mixed", "repeated", "separate", "single"])
def test_a_replay_plans_the_batches_that_the_engine_runs(checkpoint, name):
    """A second for each batch: the predicted time is the number of the engine's batches."""
    flags = {**LIMITS, "max_tokens_per_forward": 256, "kv_cache_num_tokens": 16384}
    flags["max_seqs_per_forward"] = 16
    requests = Workload(name, SHAPES["tiny"].vocab_size, 0.12).requests()
    requests = [limited(each) for each in requests]
    with LLM(str(checkpoint), dtype="float32", **flags) as llm:
        worker = llm._engine._worker
        submit, sizes = worker.submit, []

        def counted(message):
            sizes.append(len(message.decode_slots) + len(message.prefill_ids))
            return submit(message)

        worker.submit = counted
        params = [
            SamplingParams(max_tokens=each.max_tokens, n=each.n, temperature=1.0, ignore_eos=True)
            for each in requests
        ]
        llm.generate([each.prompt for each in requests], params, use_tqdm=False)
    config = EngineConfig.from_flags(model=str(checkpoint), dtype="float32", **flags)
    assert len(sizes) > 20
    # The manager's own turns are measured in a replay; together they take far less than a second.
    assert predict_s(config, fixed(100.0), requests) == pytest.approx(100.0 * len(sizes), abs=50)


def limited(request):
    return type(request)(request.prompt, min(request.max_tokens, 40), min(request.n, 12))


@pytest.mark.engine
@pytest.mark.processes
def test_predictions_are_kept_beside_real_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predict, "cache_directory", lambda: tmp_path / "cache")
    monkeypatch.setattr(predict, "_MAX_BATCH_TOKENS", 128)
    monkeypatch.setattr(predict, "_MAX_SEQUENCES", 32)
    output, plot = tmp_path / "predictions.json", tmp_path / "predictions.svg"
    words = ["predict", "shape=tiny", "rounds=1", f"output={output}", "size=0.03"]
    words += ["workloads=single,repeated", "kv_cache_num_tokens=8192"]
    assert main([*words, "dtypes=float32", "repetitions=2"]) == 0
    found = last_line(capsys)["predictions"]
    assert [each["workload"] for each in found] == ["single", "repeated"]
    for each in found:
        assert len(each["seconds"]) == 2
        assert each["predicted_s"] > 0
    assert main(["predict", "repetitions=0", f"output={output}", f"plot={plot}"]) == 0
    assert "| repeated, float32 " in capsys.readouterr().out
    texts = "".join(xml.etree.ElementTree.parse(plot).getroot().itertext())
    assert "single, float32, 0.03" in texts
    output.write_text("[]")
    assert main(["predict", "repetitions=0", f"output={output}"]) == 2
    assert "not a file of this command" in capsys.readouterr().err


def test_a_prediction_is_wrong_by_a_share_of_the_median_run():
    each = Prediction(
        dtype="float32",
        workload="mixed",
        size=1.0,
        shape="tiny",
        tokens=100,
        seconds=[2.0, 4.0, 5.0],
        predicted_s=3.0,
        error=0.2,
        other_work=0.0,
        date="2026-01-01",
    )
    assert each.wrong == -0.25
    assert each.row()[2:] == ("25 (20 to 50)", "33", "20%", "-25.0%", "0%")
    assert each.point().predicted_range == pytest.approx((100 / 3.6, 100 / 2.4))
    assert np.isfinite(each.point().measured)


def test_a_file_and_no_runs_need_a_name(capsys):
    with pytest.raises(SystemExit):
        main(["predict", "repetitions=0"])
    assert "output=FILE" in capsys.readouterr().err
