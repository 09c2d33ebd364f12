"""Programs with an engine of several replicas: LLM, AsyncLLM and toka-batch."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from checkpoints import make_checkpoint
from engine_process import eventually
from safetensors.torch import load_file, save_file

from tokasaurus import LLM, AsyncLLM, SamplingParams
from tokasaurus.demo import MODEL_DIR
from tokasaurus.errors import EngineDead, ModelError, RequestError

pytestmark = [pytest.mark.engine, pytest.mark.processes]

FLAGS = {"cpu_threads": 1, "kv_cache_num_tokens": 16384, "max_tokens_per_forward": 512}
PROMPTS = ["A B C D A B C D A B", "Once upon a time", "one two one two", [5, 6, 7]] * 6
PARAMS = [
    SamplingParams(
        temperature=0.8 if number % 2 else 0.0,
        seed=number,
        n=1 + number % 3,
        max_tokens=120,
        ignore_eos=True,
    )
    for number in range(len(PROMPTS))
]


def tokens(outputs) -> list[list[list[int]]]:
    return [[sample.token_ids for sample in output.outputs] for output in outputs]


@pytest.fixture(scope="module")
def one() -> Iterator[LLM]:
    with LLM(**FLAGS) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(one: LLM) -> list[list[list[int]]]:
    return tokens(one.generate(PROMPTS, PARAMS, use_tqdm=False))


@pytest.fixture(scope="module")
def two() -> Iterator[LLM]:
    with LLM(dp_size=2, replica_restarts=100, **FLAGS) as llm:
        yield llm


def workers(supervisor) -> dict[int, int]:
    """The process ids of the workers that the supervisor has now, by replica."""
    return {
        number: member.process.pid
        for number, replica in supervisor._replicas._replicas.items()
        for member in replica.members
        if member.role.kind == "worker"
    }


def states(generations) -> set[str]:
    return {report.state for report in generations.replicas.reports().values()}


def test_two_replicas_generate_what_one_engine_generates(one, two, expected):
    assert tokens(two.generate(PROMPTS, PARAMS, use_tqdm=False)) == expected
    conversation = [{"role": "user", "content": "Hello"}]
    params = SamplingParams(max_tokens=9, temperature=0)
    answers = [llm.chat(conversation, params, use_tqdm=False) for llm in (one, two)]
    assert tokens(answers[0]) == tokens(answers[1])
    vectors = [llm.embed(["a b", "c"], use_tqdm=False) for llm in (one, two)]
    np.testing.assert_array_equal(*vectors)
    with pytest.raises(RequestError, match="prompt number 1"):
        two.generate(["a", [10**7]], use_tqdm=False)


def test_work_goes_to_both_replicas(two):
    two.generate(PROMPTS, PARAMS, use_tqdm=False)
    eventually(lambda: two._engine.step() is None and _all_have_generated(two), "both do")


def _all_have_generated(llm) -> bool:
    reports = llm._engine.generations.replicas.reports().values()
    return all(report.statistics and report.statistics.num_generated_tokens for report in reports)


def test_a_call_gets_its_tokens_though_a_worker_dies(two, expected):
    engine = two._engine
    step, strikes = engine.step, []

    def strike_once() -> None:
        step()
        if engine.generations.statistics and not strikes:
            strikes.append(workers(engine._supervisor)[1])
            os.kill(strikes[0], signal.SIGKILL)

    engine.step = strike_once
    try:
        # Long enough to be under way when the worker dies.
        params = [
            SamplingParams(
                temperature=each.temperature,
                seed=each.seed,
                n=each.n,
                max_tokens=600,
                ignore_eos=True,
            )
            for each in PARAMS
        ]
        found = tokens(two.generate(PROMPTS, params, use_tqdm=False))
    finally:
        del engine.step
    assert [[ids[:120] for ids in each] for each in found] == expected
    assert engine.generations.replicas.losses.num_moved > 0
    eventually(lambda: two._engine.step() is None and states(engine.generations) == {"ok"}, "", 60)
    assert workers(engine._supervisor)[1] != strikes[0]
    assert tokens(two.generate(PROMPTS, PARAMS, use_tqdm=False)) == expected


def test_a_replica_that_starts_again_gets_the_newest_weights(two, tmp_path):
    weights = load_file(MODEL_DIR / "model.safetensors")
    weights["model.norm.weight"] *= 0.5
    file = tmp_path / "new.safetensors"
    save_file(weights, file)
    version = two.update_weights(file)
    generations = two._engine.generations
    outputs = two.generate(PROMPTS, PARAMS, use_tqdm=False)
    os.kill(workers(two._engine._supervisor)[0], signal.SIGKILL)
    losses = generations.replicas.losses
    before = losses.num_replicas
    eventually(lambda: two._engine.step() is None and losses.num_replicas > before, "it is gone")
    eventually(lambda: two._engine.step() is None and states(generations) == {"ok"}, "", 60)
    # Enough for both.
    again = two.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert tokens(again) == tokens(outputs)
    versions = {
        run[0] for output in again for each in output.outputs for run in each.weights_versions
    }
    assert versions == {version}


def test_a_replica_whose_weights_are_gone_waits_for_the_next_ones(two, tmp_path):
    file = tmp_path / "new.safetensors"
    weights = load_file(MODEL_DIR / "model.safetensors")
    save_file(weights, file)
    two.update_weights(file)
    expected = tokens(two.generate(PROMPTS, PARAMS, use_tqdm=False))
    weights["model.norm.weight"] *= 0.25
    save_file(weights, tmp_path / "other")
    (tmp_path / "other").rename(file)
    generations = two._engine.generations
    os.kill(workers(two._engine._supervisor)[0], signal.SIGKILL)
    waits = {"ok", "waiting for weights"}
    eventually(lambda: two._engine.step() is None and states(generations) == waits, "it waits", 60)
    assert tokens(two.generate(PROMPTS, PARAMS, use_tqdm=False)) == expected
    save_file(load_file(MODEL_DIR / "model.safetensors"), tmp_path / "third.safetensors")
    two.update_weights(tmp_path / "third.safetensors")
    assert states(generations) == {"ok"}
    assert tokens(two.generate(PROMPTS, PARAMS, use_tqdm=False)) == expected


@pytest.mark.long
def test_errors_at_the_start_and_the_end_of_the_last_replica_reach_the_program(tmp_path):
    path = make_checkpoint(tmp_path / "model", "llama")
    (path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="safetensors"):
        LLM(path, dp_size=2, **FLAGS)
    with LLM(dp_size=2, replica_restarts=0, **FLAGS) as llm:
        pids = workers(llm._engine._supervisor)
        for pid in pids.values():
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineDead, match="killed by SIGKILL"):
            llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        with pytest.raises(EngineDead, match="was closed"):
            llm.generate("a", use_tqdm=False)
    for pid in pids.values():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.long
def test_calls_of_an_async_engine_go_on_though_a_worker_dies(expected):
    async def run() -> None:
        async with AsyncLLM(dp_size=2, **FLAGS) as llm:
            calls = [
                asyncio.ensure_future(llm.generate(prompt, params))
                for prompt, params in zip(PROMPTS, PARAMS, strict=True)
            ]
            last = None
            struck = False
            async for output in llm.generate(PROMPTS[0], PARAMS[0]):
                last = output
                if not struck:
                    struck = True
                    os.kill(workers(llm._thread.supervisor)[0], signal.SIGKILL)
            assert tokens([last]) == expected[:1]
            assert tokens(await asyncio.gather(*calls)) == expected
            answers = await asyncio.gather(llm.get_tokenizer(), llm.abort_all())
            assert answers[1] == 0

    asyncio.run(run())


@pytest.mark.long
def test_a_batch_is_answered_by_two_replicas_though_one_dies(one: LLM, tmp_path: Path):
    prompts = [PROMPTS[number % 3] for number in range(60)]
    source, target, log = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "log"))
    body = {"max_tokens": 600, "temperature": 0.0, "ignore_eos": True}
    source.write_text("".join(json.dumps({"prompt": each, **body}) + "\n" for each in prompts))
    flags = [f"{name}={value}" for name, value in FLAGS.items()]
    command = [sys.executable, "-m", "tokasaurus.launch.batch_run", "run", str(source), str(target)]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, *flags, "dp_size=2", "log_level=INFO"], stdout=file, stderr=file
        )
    eventually(lambda: "toka-batch: validating" in log.read_text(), "it runs", 60)
    lines = log.read_text().splitlines()
    (line,) = (each for each in lines if "worker-1-0" in each and "process id" in each)
    os.kill(int(line.rsplit(" ", 1)[1]), signal.SIGKILL)
    assert process.wait(120) == 0, log.read_text()
    assert "the worker-1-0 ended: killed by SIGKILL" in log.read_text()
    choices = [json.loads(row)["response"]["body"]["choices"] for row in target.open()]
    params = SamplingParams(temperature=0.0, max_tokens=600, ignore_eos=True)
    outputs = one.generate(prompts, params, use_tqdm=False)
    expected = [[sample.text for sample in output.outputs] for output in outputs]
    assert [[choice["text"] for choice in each] for each in choices] == expected
