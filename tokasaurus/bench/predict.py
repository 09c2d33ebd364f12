"""``toka-bench predict``: what a calibrated cost model predicts, against real runs.

    toka-bench predict output=predictions.json plot=docs/images/predictions.svg
    toka-bench predict dtypes=bfloat16 workloads=mixed size=0.3
    toka-bench predict repetitions=0 output=predictions.json plot=predictions.svg   draws only

In each dtype the cost model is measured first, as by ``toka-bench calibrate``. Then an engine in a
process of its own runs the workloads of ``toka-bench peers``, and a replay of the same prompts
predicts how long that takes: the real manager plans for a device that the cost model describes. The
time of the manager's turns is measured in the replay. Nothing is fitted to the runs.

Needs a machine that does nothing else: runs, and rounds of the calibration, are repeated if other
work took more than 5% of the cores. The model has random weights, so nothing is downloaded.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from tokasaurus.bench.calibrate import calibrated, print_held_out
from tokasaurus.bench.cpu_time import process_cpu_s
from tokasaurus.bench.flags import scale
from tokasaurus.bench.machine import machine
from tokasaurus.bench.output import markdown_table, print_json, progress
from tokasaurus.bench.peers.checkpoint import (
    SHAPES,
    cache_directory,
    make_checkpoint,
    make_once,
)
from tokasaurus.bench.peers.processes import EngineProcess
from tokasaurus.bench.peers.workloads import WORKLOADS, Request, Workload
from tokasaurus.bench.plot import check_plot
from tokasaurus.bench.predictions_plot import Point, write_predictions_plot
from tokasaurus.calibration.other_work import OtherWork, undisturbed
from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.schema import Schema, check_fields, flag
from tokasaurus.errors import ConfigError
from tokasaurus.planner.cost_model import CostModel
from tokasaurus.planner.replay import Timing, replay
from tokasaurus.planner.trace import TraceRequest, generate_request
from tokasaurus.protocol.messages import GenerateRequest

if TYPE_CHECKING:
    from tokasaurus.calibration.calibrate import Calibration

__all__ = ["SCHEMA", "PredictConfig", "Prediction", "predict_s", "run"]

_MAX_SEQUENCES, _MAX_BATCH_TOKENS = 256, 2048  # as in toka-bench peers


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """What to run and to predict."""

    workloads: tuple[str, ...] = flag(
        ("mixed", "repeated"), choices=tuple(WORKLOADS), help="See toka-bench peers."
    )
    dtypes: tuple[str, ...] = flag(
        ("float32", "bfloat16"),
        choices=("float32", "bfloat16"),
        help="Of weights and products.",
    )
    repetitions: int = flag(
        3, minimum=0, help="How often each workload runs. 0: show what output has."
    )
    rounds: int = flag(3, minimum=1, help="Of the calibration; see toka-bench calibrate.")
    size: float = flag(1.0, help="The number of requests, as a multiple of the usual number.")
    shape: str = flag(
        "smollm2-135m", choices=tuple(SHAPES), help="The model's shape; its weights are random."
    )
    kv_cache_num_tokens: int = flag(65536, minimum=1, help="Tokens of the KV cache.")
    output: str = flag(
        "",
        may_be_empty=True,
        help=(
            "A file of JSON for the results. What it already has of other workloads, dtypes and"
            " sizes stays there."
        ),
    )
    plot: str = flag(
        "",
        may_be_empty=True,
        help="The file of an SVG with a point for each workload: predicted against measured.",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        scale(self.size)
        if not self.repetitions and not self.output:
            raise ConfigError("repetitions=0 shows the results of a file; name it with output=FILE")


SCHEMA = Schema(
    target=PredictConfig,
    program="toka-bench predict",
    summary="What a calibrated cost model predicts, against real runs of the same workloads.",
    examples=(
        "toka-bench predict output=predictions.json plot=predictions.svg",
        "toka-bench predict dtypes=bfloat16 workloads=mixed size=0.3",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One workload in one dtype.

    Attributes:
        tokens: generated in each repetition.
        seconds: of each repetition.
        predicted_s: of one.
        error: of the cost model, as a share.
        other_work: the share of the cores that went to other work meanwhile, at most.
    """

    dtype: str
    workload: str
    size: float
    shape: str
    tokens: int
    seconds: list[float]
    predicted_s: float
    error: float
    other_work: float
    date: str
    machine: dict[str, Any] = field(default_factory=machine)

    @property
    def key(self) -> tuple[str, str, float, str]:
        """What a later one of the same replaces."""
        return self.dtype, self.workload, self.size, self.shape

    @property
    def wrong(self) -> float:
        """How far the prediction is off, as a share of the measured time."""
        return self.predicted_s / median(self.seconds) - 1

    def row(self) -> tuple[str, ...]:
        """A line of the table."""
        rates = [self.tokens / each for each in self.seconds]
        return (
            f"{self.workload}, {self.dtype}",
            f"{self.size:g}",
            f"{median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})",
            f"{self.tokens / self.predicted_s:,.0f}",
            f"{self.error:.0%}",
            f"{self.wrong:+.1%}",
            f"{self.other_work:.0%}",
        )

    def point(self) -> Point:
        """A point of the plot."""
        rates = [self.tokens / each for each in self.seconds]
        return Point(
            name=f"{self.workload}, {self.dtype}" + (f", {self.size:g}" if self.size != 1 else ""),
            measured=median(rates),
            measured_range=(min(rates), max(rates)),
            predicted=self.tokens / self.predicted_s,
            error=self.error,
        )


def run(config: PredictConfig) -> None:
    """Calibrates, runs, predicts and prints the results."""
    if config.plot:
        check_plot(config.plot)
    found = {each.key: each for each in _read(config.output)}
    if config.repetitions:
        checkpoint = cache_directory() / config.shape / "checkpoint"
        if not checkpoint.is_dir():
            progress(f"making a checkpoint in {checkpoint}")
            make_once(checkpoint, partial(make_checkpoint, SHAPES[config.shape]))
        for dtype in config.dtypes:
            for each in _predictions(config, dtype, checkpoint):
                found[each.key] = each
                _write(config.output, list(found.values()))
    heads = (
        "workload",
        "size",
        "measured tokens/s",
        "predicted",
        "error",
        "time wrong by",
        "other work",
    )
    print(markdown_table(heads, [each.row() for each in found.values()]))
    if config.plot:
        write_predictions_plot(config.plot, [each.point() for each in found.values()])
    print_json({"predictions": [{**asdict(each), "wrong": each.wrong} for each in found.values()]})


def _predictions(config: PredictConfig, dtype: str, checkpoint: Path) -> Iterator[Prediction]:
    """Calibrates in one dtype, then runs and predicts every workload, one after the other."""
    engine = EngineConfig.from_flags(
        model=str(checkpoint),
        dtype=dtype,
        kv_cache_num_tokens=config.kv_cache_num_tokens,
        max_seqs_per_forward=_MAX_SEQUENCES,
        max_tokens_per_forward=_MAX_BATCH_TOKENS,
    )
    progress(f"{dtype}: calibrating")
    calibration = calibrated(engine, config.rounds)
    print_held_out(calibration)
    settings = {
        "engine": "tokasaurus",
        "model": str(checkpoint),
        "dtype": dtype,
        "device": "cpu",
        "cache_tokens": config.kv_cache_num_tokens,
        "max_seqs": _MAX_SEQUENCES,
        "batch_tokens": _MAX_BATCH_TOKENS,
        "flags": {},
        "products": False,
    }
    with EngineProcess(sys.executable, settings) as process:
        process.await_ready()
        for name in config.workloads:
            yield _prediction(config, name, engine, calibration, process)


def _prediction(
    config: PredictConfig,
    name: str,
    engine: EngineConfig,
    calibration: Calibration,
    process: EngineProcess,
) -> Prediction:
    """Runs a workload, and predicts it."""
    workload = Workload(name, SHAPES[config.shape].vocab_size, config.size)
    work = OtherWork(partial(process_cpu_s, process.pid))
    seconds, other_work = undisturbed(
        lambda: process.run(workload.requests()), config.repetitions, work, progress
    )
    requests = workload.requests()
    predicted_s = predict_s(engine, calibration.cost, requests)
    runs = ", ".join(f"{each:.2f}" for each in seconds)
    progress(f"{engine.dtype} {name}: {runs} s, and {predicted_s:.2f} s were predicted")
    return Prediction(
        dtype=engine.dtype,
        workload=name,
        size=config.size,
        shape=config.shape,
        tokens=sum(each.max_tokens * each.n for each in requests),
        seconds=seconds,
        predicted_s=predicted_s,
        error=calibration.cost.error,
        other_work=max(other_work, calibration.other_work),
        date=time.strftime("%Y-%m-%d"),
    )


def predict_s(config: EngineConfig, cost: CostModel, requests: Sequence[Request]) -> float:
    """The seconds that ``LLM.generate`` takes for requests, all given at once.

    Args:
        config: of the engine.
        cost: of its device.
        requests: each generates all its tokens.
    """
    from tokasaurus.launch.assemble import assemble

    # LLM finishes every batch before it plans the next.
    manager = replace(assemble(config).replicas[0].manager, scheduling_steps_ahead=1)
    trace = [
        TraceRequest(
            arrival_s=0.0,
            prompt_tokens=len(request.prompt),
            output_tokens=(request.max_tokens,) * request.n,
            max_tokens=request.max_tokens,
        )
        for request in requests
    ]

    def with_ids(request: TraceRequest, number: int) -> GenerateRequest:
        ids = np.array(requests[number].prompt, np.int32)
        return msgspec.structs.replace(generate_request(request, number), prompt_ids=ids)

    return replay(trace, manager, Timing(cost, manager_s=None), with_ids).makespan_s


def _read(path: str) -> list[Prediction]:
    """The results of a file; none if there is no file or no path."""
    if not path:
        return []
    try:
        Path(path).open("ab").close()
        text = Path(path).read_text()
    except OSError as error:
        raise ConfigError(f"output={path}: {error.strerror}") from None
    if not text:
        return []
    try:
        return [Prediction(**each) for each in json.loads(text)["predictions"]]
    except (ValueError, TypeError, KeyError):
        raise ConfigError(f"output={path}: this is not a file of this command") from None


def _write(path: str, predictions: Sequence[Prediction]) -> None:
    if path:
        values = {"predictions": [asdict(each) for each in predictions]}
        Path(path).write_text(json.dumps(values, indent=1) + "\n")
