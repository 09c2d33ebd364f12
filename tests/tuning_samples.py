"""Engines that are formulas, for tests of the tuner."""

from __future__ import annotations

from collections.abc import Callable

from described_models import LLAMA_1B, describe

from tokasaurus.model.facts import model_facts
from tokasaurus.planner.candidates import Question
from tokasaurus.planner.demand import Demand, demand_of_shape
from tokasaurus.planner.devices import Device, Figure
from tokasaurus.tuning.machine import Here
from tokasaurus.tuning.trial import Task
from tokasaurus.tuning.trial_process import Measured
from tokasaurus.tuning.tuner import Tuner

DEMAND = demand_of_shape("prompt=64,output=32,n=4,requests=50")


def here(num_cores: int = 4, memory_gb: float = 64.0) -> Here:
    """A machine without a GPU."""
    figures = {
        "memory_gb": Figure(value=memory_gb, measured="a test"),
        "read_gb_per_s": Figure(value=20, measured="a test"),
        "tflop_per_s.float32": Figure(value=0.1, measured="a test"),
    }
    return Here(Device("here", "A test's", "cpu", figures), 1, num_cores)


class Formula:
    """Runs tasks by a formula, and remembers them."""

    def __init__(self, rate: Callable[[dict], float | str]) -> None:
        self._rate = rate
        self.tasks: list[Task] = []

    def __call__(self, task: Task, ready_s: float, run_s: float) -> Measured:
        self.tasks.append(task)
        rate = self._rate(task.flags)
        if isinstance(rate, str):
            return Measured(problem=rate)
        tokens = sum(sum(each.output_tokens) for each in task.trace)
        seconds = tokens / rate
        if seconds > run_s:
            return Measured(problem="late", is_late=True)
        return Measured((seconds * 1.1, seconds)[-task.repetitions :], tokens, 1.0)


def tuner(directory, rate, demand: Demand = DEMAND, **changes) -> Tuner:
    """A tuner for a described model, whose engines are a formula."""
    question = Question(model_facts(describe(directory, LLAMA_1B)), here().device, 1)
    fields = {
        "question": question,
        "demand": demand,
        "model": "a-model",
        "repetitions": 2,
        "run_s": 1e6,
        "max_s": 1e6,
        "progress": lambda _: None,
        "run": Formula(rate),
    }
    return Tuner(**{**fields, **changes})
