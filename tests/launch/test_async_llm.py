"""The embedded engine in an event loop: many callers, streams, cancellation, ends, HTTP inside."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from checkpoints import make_checkpoint

from tokasaurus import LLM, AsyncLLM, SamplingParams
from tokasaurus.errors import (
    ConfigError,
    Conflict,
    EngineAborted,
    EngineDead,
    EngineError,
    ModelError,
    RequestError,
)

pytestmark = pytest.mark.engine

FLAGS = {"dtype": "float32", "kv_cache_num_tokens": 4096, "max_seqs_per_forward": 32}
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=400, ignore_eos=True)
PROMPTS = [f"prompt {number} " * (number % 5 + 1) for number in range(40)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("async")
    make_checkpoint(directory, "llama", seed=3, num_heads=4, num_kv_heads=2, tied=True)
    return directory


@pytest.fixture(scope="module")
def expected(model):
    """What LLM answers to PROMPTS."""
    with LLM(model, **FLAGS) as llm:
        return llm.generate(PROMPTS, GREEDY, use_tqdm=False)


@pytest.fixture(scope="module")
def run(model):
    """Runs a coroutine that takes the engine. All share one, and one event loop."""
    loop, others = asyncio.new_event_loop(), engine_threads()
    llm = AsyncLLM(model, **FLAGS)
    loop.run_until_complete(llm.get_tokenizer())  # loads it

    def run_in_loop(use: Callable[[AsyncLLM], Coroutine[Any, Any, None]]) -> None:
        loop.run_until_complete(asyncio.wait_for(use(llm), 120))

    yield run_in_loop
    loop.run_until_complete(llm.close())
    loop.close()
    assert engine_threads() == others


def engine_threads() -> set[threading.Thread]:
    return {each for each in threading.enumerate() if each.name == "tokasaurus-engine"}


def manager_of(llm: AsyncLLM):
    return llm._thread._engine.manager


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


async def until_empty(llm: AsyncLLM) -> None:
    """Returns when the manager has nothing and every page is free."""
    await until(lambda: manager_of(llm).idle)
    gauges = manager_of(llm).gauges()
    assert gauges.num_free_pages + gauges.num_evictable_pages == gauges.num_pages


def test_many_callers_share_batches_and_get_the_tokens_of_the_sync_engine(run, expected):
    async def use(llm):
        assert (await llm.generate(PROMPTS[0], GREEDY)).outputs == expected[0].outputs
        before = manager_of(llm).counters.num_batches
        outputs = await asyncio.gather(*[llm.generate(each, GREEDY) for each in PROMPTS])
        assert [output.prompt for output in outputs] == PROMPTS
        assert [output.outputs for output in outputs] == [each.outputs for each in expected]
        num_batches = manager_of(llm).counters.num_batches - before
        assert num_batches < len(PROMPTS) * GREEDY.max_tokens / 5

    run(use)


def test_an_answer_is_awaited_iterated_over_or_made_a_task(run, expected):
    async def use(llm):
        whole = await llm.generate(PROMPTS[3], GREEDY)
        task = await asyncio.create_task(llm.generate(PROMPTS[3], GREEDY))
        pieces = [output async for output in llm.generate(PROMPTS[3], GREEDY)]
        for output in (whole, task, pieces[-1]):
            assert output.outputs == expected[3].outputs
            assert output.prompt_token_ids == expected[3].prompt_token_ids
            assert output.finished
        assert not any(output.finished for output in pieces[:-1])
        async for output in llm.generate(PROMPTS[3], ENDLESS):
            assert not output.finished, "nothing comes before the end"
            break
        for before, after in pairwise(pieces):
            assert after.outputs[0].text.startswith(before.outputs[0].text)
            assert len(after.outputs[0].token_ids) >= len(before.outputs[0].token_ids)
        by_ids = await llm.generate(expected[3].prompt_token_ids, GREEDY)
        assert (by_ids.prompt, by_ids.outputs) == (None, expected[3].outputs)

    run(use)


def test_streams_end_as_whole_answers_do(run):
    """With logprobs, stop strings, several samples, and samples that are cancelled."""
    varied = (
        replace(GREEDY, logprobs=2, prompt_logprobs=1),
        replace(GREEDY, max_tokens=60, stop=["a", "e"], logprobs=0),
        SamplingParams(n=5, seed=1, max_tokens=30),
        SamplingParams(n=6, seed=2, max_tokens=40, stop=["a"], ignore_eos=True, first_k=2),
    )

    async def use(llm):
        for params in varied:
            whole = await llm.generate("a text", params)
            async for output in llm.generate("a text", params):
                last = output
            assert last.finished, params
            assert len(last.outputs) == len(whole.outputs), params
            for one, other in zip(last.outputs, whole.outputs, strict=True):
                assert one.finish_reason in ("stop", "length")
                if params.first_k is None:  # otherwise other samples may end first
                    assert one.index == other.index, params
                    assert (one.text, one.token_ids) == (other.text, other.token_ids), params
                    assert one.finish_reason == other.finish_reason
                    assert one.logprobs == other.logprobs, params
            assert last.prompt_logprobs == whole.prompt_logprobs, params
        await until_empty(llm)

    run(use)


def test_chat_and_embeddings_are_those_of_the_sync_engine(model, run):
    conversation = [{"role": "user", "content": "hello"}]
    with LLM(model, **FLAGS) as sync:
        (answer,) = sync.chat(conversation, GREEDY, use_tqdm=False)
        (vector,) = sync.embed("some text", pooling="last", use_tqdm=False)

    async def use(llm):
        ours, embedded = await asyncio.gather(
            llm.chat(conversation, GREEDY), llm.embed("some text", pooling="last")
        )
        assert ours.outputs == answer.outputs
        assert ours.prompt_token_ids == answer.prompt_token_ids
        np.testing.assert_allclose(embedded, vector, atol=1e-5)
        assert (await llm.get_tokenizer()).encode("x") == sync.get_tokenizer().encode("x")

    run(use)


def test_wrong_requests_are_errors_and_others_go_on(run, expected):
    async def use(llm):
        good = asyncio.ensure_future(llm.generate(PROMPTS[0], GREEDY))
        with pytest.raises(RequestError) as refused:
            await llm.generate([10**6], GREEDY)
        assert refused.value.field == "prompt"
        with pytest.raises(RequestError, match="pooling"):
            await llm.embed("a", pooling="max")
        with pytest.raises(RequestError, match="prompt"):
            async for _ in llm.generate("", replace(GREEDY, max_tokens=10**6)):
                pass
        assert (await good).outputs == expected[0].outputs

    run(use)


# --- cancellation and ends ------------------------------------------------------------------------


def test_a_cancelled_task_ends_its_request_and_only_that(run, expected):
    async def use(llm):
        endless = [asyncio.ensure_future(llm.generate("x", ENDLESS)) for _ in range(5)]
        kept = asyncio.ensure_future(llm.generate(PROMPTS[1], replace(GREEDY, max_tokens=40)))
        before = manager_of(llm).counters.num_generated_tokens
        await until(lambda: manager_of(llm).counters.num_generated_tokens > before + 20)
        for task in endless:
            task.cancel()
        ended = await asyncio.gather(*endless, return_exceptions=True)
        assert [type(each) for each in ended] == [asyncio.CancelledError] * 5
        output = (await kept).outputs[0]
        assert output.token_ids[:12] == expected[1].outputs[0].token_ids
        await until_empty(llm)

    run(use)


def test_a_timeout_and_a_stream_that_is_left_end_their_requests(run):
    async def use(llm):
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(llm.generate("x", ENDLESS), 0.05)
        async for _ in llm.generate("x", ENDLESS):
            break
        gc.collect()
        await until_empty(llm)
        assert (await llm.generate("x", GREEDY)).finished

    run(use)


def test_close_ends_what_is_in_flight_and_later_calls(model):
    others = engine_threads()

    async def main():
        llm = AsyncLLM(model, **FLAGS)  # loaded by the first call
        running = [asyncio.ensure_future(llm.generate("x", ENDLESS)) for _ in range(3)]
        await until(lambda: llm._thread is not None and llm._thread._engine is not None)
        await llm.close()
        for each in await asyncio.gather(*running, return_exceptions=True):
            assert isinstance(each, EngineDead)
        with pytest.raises(EngineDead, match="closed"):
            await llm.generate("x", GREEDY)
        await llm.close()
        never_used = AsyncLLM(model, **FLAGS)
        await never_used.close()
        with pytest.raises(EngineDead, match="closed"):
            await never_used.generate("x", GREEDY)

    asyncio.run(main())
    assert engine_threads() == others


def test_a_failed_batch_ends_every_call_with_its_reason(model):
    others = engine_threads()

    def fail(batch):
        raise EngineError("batch 7: the device is on fire")

    async def main():
        llm = AsyncLLM(model, **FLAGS)
        running = [asyncio.ensure_future(llm.generate("x", ENDLESS)) for _ in range(3)]
        await until(lambda: llm._thread is not None and llm._thread._engine is not None)
        await until(lambda: manager_of(llm).counters.num_generated_tokens > 3)
        llm._thread._engine._worker.submit = fail
        for each in await asyncio.gather(*running, return_exceptions=True):
            assert isinstance(each, EngineDead)
            assert "on fire" in str(each)
        with pytest.raises(EngineDead, match="on fire"):
            await llm.generate("x", GREEDY)
        await llm.close()

    asyncio.run(main())
    assert engine_threads() == others


def test_wrong_flags_and_models_are_errors(model, tmp_path):
    others = engine_threads()
    with pytest.raises(ConfigError, match="page_size"):
        AsyncLLM(model, page_sise=16)

    async def load(path):
        async with AsyncLLM(path, kv_cache_num_tokens=10**12):
            raise AssertionError("it loaded")

    for path, error in ((tmp_path, ModelError), (model, ConfigError)):
        with pytest.raises(error):
            asyncio.run(load(path))
    assert engine_threads() == others


def test_another_event_loop_is_refused_and_a_closed_one_ends_the_thread(model):
    others = engine_threads()
    llm = AsyncLLM(model, **FLAGS)

    async def leave_running():
        await llm.generate("x", GREEDY)
        task = asyncio.ensure_future(llm.generate("x", ENDLESS))
        await until(lambda: not manager_of(llm).idle)
        task.cancel()  # without a turn of the loop, so the engine goes on

    async def use_again():
        await llm.generate("x", GREEDY)

    asyncio.run(leave_running())
    with pytest.raises(RuntimeError, match="event loop"):
        asyncio.run(use_again())
    asyncio.run(llm.close())
    assert engine_threads() == others


# --- control --------------------------------------------------------------------------------------


def test_calls_wait_while_the_engine_is_paused_or_asleep(run, expected):
    async def use(llm):
        rests = [(llm.pause, ("keep",), llm.resume), (llm.sleep, (1, "keep"), llm.wake_up)]
        greedy = replace(ENDLESS, temperature=0.0)
        whole = await llm.generate("x", greedy)
        for stop, arguments, go_on in rests:
            stream = aiter(llm.generate("x", greedy))
            pieces = [await anext(stream)]
            await stop(*arguments)
            waiting = asyncio.ensure_future(llm.generate(PROMPTS[1], GREEDY))
            done, _ = await asyncio.wait({waiting}, timeout=0.2)
            assert not done
            assert not manager_of(llm).idle
            await go_on()
            pieces += [piece async for piece in stream]
            assert pieces[-1].outputs == whole.outputs
            assert (await waiting).outputs == expected[1].outputs

    run(use)


def test_an_abort_keeps_the_tokens_so_far(run):
    async def use(llm):
        for abort in (llm.abort_all, partial(llm.pause, "abort")):
            several = replace(ENDLESS, n=2, logprobs=0)
            whole = asyncio.ensure_future(llm.generate("y", several))
            stream = aiter(llm.generate("x", several))
            await anext(stream)
            assert len(llm._state.engine().generations) == 2
            assert await abort() in (4, None)  # a pause does not say how many
            pieces = [piece async for piece in stream]
            for output in (pieces[-1], await whole):
                assert [each.index for each in output.outputs] == [0, 1]
                assert {each.finish_reason for each in output.outputs} == {"abort"}
            for sample in pieces[-1].outputs:
                assert sample.token_ids
                assert sample.weights_versions == [(0, len(sample.token_ids))]
            await llm.resume()
            await until_empty(llm)

    run(use)


def test_an_embedding_that_is_aborted_before_its_prompt_ran_is_an_error(run):
    async def use(llm):
        await llm.pause("keep")
        vector = asyncio.ensure_future(llm.embed("x"))
        await until(lambda: not manager_of(llm).idle)
        assert await llm.abort_all() == 1
        with pytest.raises(EngineAborted):
            await vector
        await llm.resume()

    run(use)


def test_a_call_goes_on_with_new_weights(model):
    async def use():
        async with AsyncLLM(model, **FLAGS) as llm:
            stream = aiter(llm.generate("x", ENDLESS))
            pieces = [await anext(stream)]
            assert await llm.update_weights(model) == 1
            pieces += [piece async for piece in stream]
        runs = pieces[-1].outputs[0].weights_versions
        assert [version for version, _ in runs] == [0, 1]
        assert sum(count for _, count in runs) == 400

    asyncio.run(use())


def test_reset_prefix_cache_drops_the_pages_of_a_prompt(run):
    async def use(llm):
        cached = []
        for reset in (False, False, True):
            if reset:
                await llm.reset_prefix_cache()
            output = await llm.generate("a prompt of several pages " * 8, GREEDY)
            cached.append(output.num_cached_tokens > 0)
        assert cached == [False, True, False]

    run(use)


def test_refused_commands_are_errors_and_the_engine_goes_on(run, expected):
    async def use(llm):
        wrong = [(llm.pause, "stop", "mode"), (llm.sleep, 3, "level"), (llm.wake_up, "kv", "tags")]
        for call, argument, field in wrong:
            with pytest.raises(RequestError, match=rf"^{field}\b"):
                await call(argument)
        await llm.sleep()
        with pytest.raises(Conflict, match="released"):
            await llm.resume()
        await llm.wake_up()
        await llm.wake_up()  # there is nothing left to restore
        output = await llm.generate(PROMPTS[0], GREEDY)
        assert output.outputs[0].token_ids == expected[0].outputs[0].token_ids

    run(use)


def test_a_sleep_in_python_is_ended_over_http(run, expected):
    async def use(llm):
        transport = httpx2.ASGITransport(app=await llm.asgi_app())
        async with httpx2.AsyncClient(transport=transport, base_url="http://x") as http:
            await llm.sleep()
            assert (await http.get("/is_sleeping")).json() == {"is_sleeping": True}
            assert (await http.post("/wake_up")).json() == {"status": "awake"}
        output = await llm.generate(PROMPTS[0], GREEDY)
        assert output.outputs[0].token_ids == expected[0].outputs[0].token_ids

    run(use)


# --- HTTP inside the process ----------------------------------------------------------------------


def test_the_http_api_serves_without_a_port(run, expected):
    async def use(llm):
        transport = httpx2.ASGITransport(app=await llm.asgi_app())
        http = httpx2.AsyncClient(transport=transport)
        client = openai.AsyncOpenAI(api_key="none", base_url="http://x/v1", http_client=http)
        asked = {"model": "default", "temperature": 0, "max_tokens": 12}
        asked["extra_body"] = {"ignore_eos": True}
        answers = await asyncio.gather(
            *[client.completions.create(prompt=each, **asked) for each in PROMPTS[:5]],
            llm.generate(PROMPTS[5], GREEDY),
        )
        texts = [each.choices[0].text for each in answers[:5]]
        assert texts == [each.outputs[0].text for each in expected[:5]]
        assert answers[5].outputs == expected[5].outputs
        stream = await client.completions.create(prompt=PROMPTS[0], stream=True, **asked)
        streamed = [chunk.choices[0].text async for chunk in stream]
        assert "".join(streamed) == expected[0].outputs[0].text
        assert (await http.get("http://x/health")).status_code == 200
        assert "tokasaurus_prompts_total" in (await http.get("http://x/metrics")).text
        await http.aclose()

    run(use)
