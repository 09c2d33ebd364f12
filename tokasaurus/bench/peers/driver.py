"""Runs one engine for ``toka-bench peers``: a script for the Python that has this engine.

    python driver.py '{"engine": "vllm", "model": "DIR", ...}'

It needs the standard library and that engine. It loads the model, says that it is ready, and then
carries out commands. Commands and answers are lines of JSON on standard input and output; whatever
else the engine prints goes to standard error.

=============================  =====================================================================
``{"run": [request, ...]}``    runs the requests, all given at once: ``{"seconds", "tokens"}``
``{"products": rounds}``       ours replays the last run's products alone: ``{"seconds"}``
=============================  =====================================================================
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    from tokasaurus.bench.peers.products import RecordedBatches

_LENGTH_LIMIT = 2048


class Engine(Protocol):
    """An engine with its model loaded.

    Attributes:
        version: of the engine.
    """

    version: str

    def run(self, requests: list[dict[str, Any]]) -> int:
        """Samples every request to its full length, at temperature 1. Returns generated tokens."""
        ...


class Tokasaurus:
    """Ours."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from tokasaurus import LLM, SamplingParams
        from tokasaurus.version import __version__

        self.version = __version__
        self._params = SamplingParams
        flags = {
            "dtype": settings["dtype"],
            "kv_cache_num_tokens": settings["cache_tokens"],
            "max_seqs_per_forward": settings["max_seqs"],
            "max_tokens_per_forward": settings["batch_tokens"],
            **settings["flags"],
        }
        self._llm = LLM(settings["model"], **flags)
        self._batches: RecordedBatches | None = None
        if settings["products"]:
            from tokasaurus.bench.peers.products import RecordedBatches

            self._batches = RecordedBatches(self._llm)

    def run(self, requests: list[dict[str, Any]]) -> int:
        if self._batches is not None:
            self._batches.clear()
        params = [
            self._params(
                max_tokens=request["max_tokens"], n=request["n"], temperature=1.0, ignore_eos=True
            )
            for request in requests
        ]
        prompts = [request["prompt"] for request in requests]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return sum(len(each.token_ids) for output in outputs for each in output.outputs)

    def products(self, rounds: int) -> float:
        """Seconds that the products of the last run take alone, the median of several rounds."""
        assert self._batches is not None
        return self._batches.replay(rounds)


class TokasaurusProcesses:
    """Ours in processes of its own: the manager plans ahead while the device computes."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from tokasaurus.bench.peers.loads import loaded_engine
        from tokasaurus.bench.peers.workloads import Request
        from tokasaurus.version import __version__

        self.version, self._request = __version__, Request
        flags = {
            "model": settings["model"],
            "device": settings["device"],
            "dtype": settings["dtype"],
            "kv_cache_num_tokens": settings["cache_tokens"],
            "max_seqs_per_forward": settings["max_seqs"],
            "max_tokens_per_forward": settings["batch_tokens"],
            **settings["flags"],
        }
        self._stack = contextlib.ExitStack()
        self._engine = self._stack.enter_context(loaded_engine(flags))
        atexit.register(self.close)

    def run(self, requests: list[dict[str, Any]]) -> int:
        self._engine.run([self._request(**each) for each in requests])
        return sum(each["max_tokens"] * each["n"] for each in requests)

    def close(self) -> None:
        """Ends the processes."""
        self._stack.close()


class Vllm:
    """vLLM: on a CPU its build for CPUs, with the engine in this process."""

    def __init__(self, settings: dict[str, Any]) -> None:
        room: dict[str, Any] = {}
        if settings["device"] == "cpu":
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(settings["cache_gib"]))
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        else:
            room["kv_cache_memory_bytes"] = settings["cache_gib"] << 30
        import vllm

        self.version: str = vllm.__version__
        self._params = vllm.SamplingParams
        self._llm = vllm.LLM(
            settings["model"],
            dtype=settings["dtype"],
            max_model_len=_LENGTH_LIMIT,
            max_num_seqs=settings["max_seqs"],
            max_num_batched_tokens=settings["batch_tokens"],
            enable_prefix_caching=True,
            seed=0,
            **room,
        )

    def run(self, requests: list[dict[str, Any]]) -> int:
        params = [
            self._params(
                temperature=1.0,
                max_tokens=request["max_tokens"],
                min_tokens=request["max_tokens"],
                ignore_eos=True,
                n=request["n"],
                detokenize=False,
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": request["prompt"]} for request in requests]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return sum(len(each.token_ids) for output in outputs for each in output.outputs)


class SGLang:
    """SGLang's engine for programs, on CUDA."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import sglang

        self.version: str = sglang.__version__
        self._engine = sglang.Engine(
            model_path=settings["model"],
            dtype=settings["dtype"],
            context_length=_LENGTH_LIMIT,
            max_total_tokens=settings["cache_tokens"],
            max_running_requests=settings["max_seqs"],
            chunked_prefill_size=settings["batch_tokens"],
            random_seed=0,
        )

    def run(self, requests: list[dict[str, Any]]) -> int:
        outputs = self._engine.generate(
            input_ids=[request["prompt"] for request in requests],
            sampling_params=[
                {
                    "temperature": 1.0,
                    "max_new_tokens": request["max_tokens"],
                    "ignore_eos": True,
                    "n": request["n"],
                }
                for request in requests
            ],
        )
        return sum(output["meta_info"]["completion_tokens"] for output in outputs)


class OpenVino:
    """OpenVINO GenAI's continuous batching; the model is an export of the checkpoint."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import openvino_genai as genai

        self.version: str = genai.__version__
        self._genai = genai
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = settings["cache_gib"]
        scheduler.max_num_seqs = settings["max_seqs"]
        scheduler.max_num_batched_tokens = settings["batch_tokens"]
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = True
        precision = {"float32": "f32", "bfloat16": "bf16"}[settings["dtype"]]
        options = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": len(os.sched_getaffinity(0)),
        }
        self._pipeline = genai.ContinuousBatchingPipeline(
            settings["model"], scheduler, "CPU", options
        )

    def run(self, requests: list[dict[str, Any]]) -> int:
        import numpy as np
        import openvino

        handles = []
        for number, request in enumerate(requests):
            config = self._genai.GenerationConfig()
            config.num_return_sequences = request["n"]
            config.max_new_tokens = config.min_new_tokens = request["max_tokens"]
            config.ignore_eos = True
            config.do_sample = True
            config.temperature = 1.0
            prompt = openvino.Tensor(np.array([request["prompt"]], dtype=np.int64))
            handles.append(self._pipeline.add_request(number, prompt, config))
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        return sum(len(each.generated_ids) for handle in handles for each in handle.read_all())


ENGINES: dict[str, Callable[[dict[str, Any]], Engine]] = {
    "tokasaurus": Tokasaurus,
    "int8": Tokasaurus,
    "vllm": Vllm,
    "sglang": SGLang,
    "openvino": OpenVino,
}


def make_engine(settings: dict[str, Any]) -> Engine:
    """Loads the engine that the settings name."""
    name = settings["engine"]
    if name == "tokasaurus" and settings["device"] != "cpu":
        return TokasaurusProcesses(settings)
    return ENGINES[name](settings)


def main() -> None:
    settings = json.loads(sys.argv[1])
    answers = _take_standard_output()
    engine = make_engine(settings)
    engine.run([{"prompt": [11, 12, 13], "max_tokens": 4, "n": 1}])
    _answer(answers, {"version": engine.version})
    for line in sys.stdin:
        command = json.loads(line)
        if "products" in command:
            assert isinstance(engine, Tokasaurus)  # of others, the products are unknown
            _answer(answers, {"seconds": engine.products(command["products"])})
            continue
        started = time.perf_counter()
        tokens = engine.run(command["run"])
        _answer(answers, {"seconds": time.perf_counter() - started, "tokens": tokens})


def _take_standard_output() -> TextIO:
    """Standard output for answers alone: what engines print there goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _answer(answers: TextIO, fields: dict[str, Any]) -> None:
    print(json.dumps(fields), file=answers, flush=True)


if __name__ == "__main__":
    main()
