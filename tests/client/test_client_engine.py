"""The client with a running engine, and with one in this process."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest
from safetensors.numpy import save

from tokasaurus.client import AsyncClient, Client, RetryPolicy
from tokasaurus.errors import ConfigError, EngineError, NotFound, RequestError, RequestTooLong

pytestmark = pytest.mark.engine

PROMPT = "A B C D A B C D A B"
SAID = " C D A B C D A B"
QUESTION = "What is 3 + 4?"
GREEDY = {"temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def client(engine):
    with Client(f"http://127.0.0.1:{engine.port}") as made:
        made.wait_until_ready(60)
        yield made


@pytest.fixture(scope="module")
def embedded():
    with Client.embedded() as made:
        yield made


@pytest.fixture(params=["client", "embedded"])
def either(request):
    """A client of an engine's port, and one with an engine in this process."""
    return request.getfixturevalue(request.param)


def ids_of(client, text):
    return client.generate(text, max_tokens=1).prompt_ids.tolist()


def test_all_routes_give_the_same_tokens_and_logprobs(either):
    chat = either.chat(QUESTION, temperature=0, logprobs=3)
    native = either.generate(QUESTION, temperature=0, logprobs=3)
    by_ids = either.complete(native.prompt_ids, temperature=0, max_tokens=100, logprobs=3)
    assert chat.text == native.text == by_ids.text
    assert len(chat.token_ids) == chat.usage.completion_tokens > 3
    for other in (native, by_ids):
        assert np.array_equal(chat.token_ids, other.token_ids)
        assert np.array_equal(chat.logprobs.top_ids, other.logprobs.top_ids)
        np.testing.assert_allclose(chat.logprobs.chosen, other.logprobs.chosen, atol=1e-4)
        np.testing.assert_allclose(chat.logprobs.top, other.logprobs.top, atol=1e-4)
    assert np.array_equal(chat.logprobs.top_ids[:, 0], chat.token_ids)
    assert np.array_equal(chat.logprobs.top[:, 0], chat.logprobs.chosen)


def test_streams_give_what_whole_answers_give(either):
    for whole, stream, prompt in (
        (either.complete, either.stream_complete, PROMPT),
        (either.chat, either.stream_chat, QUESTION),
        (either.generate, either.stream_generate, QUESTION),
    ):
        options = {"temperature": 0, "max_tokens": 200, "ignore_eos": True, "logprobs": 2}
        answer = whole(prompt, **options)
        with stream(prompt, **options) as pieces:
            seen = list(pieces)
        assert len(seen) > 1
        assert "".join(piece.text for piece in seen) == answer.text
        ids = np.concatenate([piece.token_ids for piece in seen])
        assert np.array_equal(ids, answer.token_ids)
        chosen = [piece.logprobs.chosen for piece in seen if piece.logprobs is not None]
        np.testing.assert_allclose(np.concatenate(chosen), answer.logprobs.chosen, atol=1e-4)
        assert [piece.finish_reason for piece in seen][-1] == answer.finish_reason
        assert pieces.usage.completion_tokens == answer.usage.completion_tokens


def test_ids_of_prompts(either):
    """Each choice has those of its prompt, and in a stream its first piece."""
    prompts = [ids_of(either, QUESTION), [0, 39, 1504]]
    options = {"temperature": 1, "seed": 1, "n": 2, "max_tokens": 8}
    chat = either.chat(QUESTION, return_token_ids=True, **options)
    assert [choice.prompt_ids.tolist() for choice in chat.choices] == prompts[:1] * 2
    answer = either.complete(prompts, return_token_ids=True, **options)
    expected = [each for prompt in prompts for each in (prompt, prompt)]
    assert [choice.prompt_ids.tolist() for choice in answer.choices] == expected
    assert answer.prompt_ids.tolist() == prompts[0]
    assert either.complete(prompts, **options).prompt_ids is None
    with either.stream_complete(prompts, return_token_ids=True, **options) as pieces:
        began = {}
        for piece in pieces:
            assert (piece.prompt_ids is None) == (piece.index in began)
            began.setdefault(piece.index, piece.prompt_ids)
    assert [began[index].tolist() for index in range(4)] == expected
    with either.stream_generate(QUESTION, max_tokens=4) as pieces:
        assert [each.prompt_ids.tolist() for each in pieces if each.prompt_ids is not None] == [
            prompts[0]
        ]


def test_several_prompts_and_samples(either):
    answer = either.complete([PROMPT, "Once"], n=2, logprobs=0, **GREEDY)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices[:2]] == [SAID] * 2
    assert [len(choice.token_ids) for choice in answer.choices] == [8] * 4
    assert answer.choices[3].logprobs.top.shape == (8, 0)


def test_prompt_logprobs(either):
    answer = either.generate(QUESTION, max_tokens=1, prompt_logprobs=2)
    of_prompt = answer.prompt_logprobs
    assert of_prompt.chosen.shape == answer.prompt_ids.shape
    assert np.isnan(of_prompt.chosen[0])
    assert (of_prompt.chosen[1:] <= 0).all()
    assert of_prompt.top_ids.shape == (len(answer.prompt_ids), 2)


def test_a_stream_that_is_left_ends_its_request(either):
    with either.stream_complete("Once", max_tokens=1000, ignore_eos=True, n=4) as pieces:
        next(pieces)
        assert either.health().running == 1
    deadline = time.monotonic() + 30
    while either.health().running:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_wrong_requests_name_their_field(either):
    with pytest.raises(RequestError, match="did you mean temperature") as caught:
        either.chat(QUESTION, temprature=0)
    assert caught.value.field == "temprature"
    assert caught.value.answer.status == 400
    with pytest.raises(RequestTooLong):
        either.complete("a", max_tokens=100_000)
    with pytest.raises(RequestError):
        list(either.stream_chat(QUESTION, top_p=7))


def test_embeddings(either):
    vectors = either.embed(["one text", "another"])
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(either.embed("one text")[0], vectors[0], atol=1e-5)


def test_the_engine_itself(either):
    assert either.ping()
    assert either.health().serves
    (model,) = either.models()
    assert model.max_model_len == 2048


def test_cartridges(either):
    numbers = np.random.default_rng(0)
    tensors = {
        f"{kind}.{layer}": numbers.standard_normal((21, 2, 32), np.float32)
        for kind in ("keys", "values")
        for layer in range(6)
    }
    uploaded = either.cartridges.upload(save(tensors), name="of-the-client")
    assert (uploaded.id, uploaded.tokens, uploaded.source) == ("of-the-client", 21, "local")
    for answer in (
        either.complete("A B C", cartridges="of-the-client", max_tokens=3),
        either.chat(QUESTION, cartridges=["of-the-client"], max_tokens=3),
        either.generate(QUESTION, cartridges=[{"id": uploaded.id, "source": "local"}]),
    ):
        assert answer.usage.cartridge_tokens == 21
    assert "of-the-client" in [each.id for each in either.cartridges.list()]
    assert either.cartridges.get("of-the-client").digest == uploaded.digest
    either.cartridges.delete("of-the-client")
    with pytest.raises(NotFound):
        either.cartridges.get("of-the-client")
    with pytest.raises(RequestError) as caught:
        either.complete("A B C", cartridges="of-the-client")
    assert caught.value.field == "cartridges"


def test_a_batch_from_its_creation_to_its_results(client):
    bodies = [{"prompt": PROMPT, **GREEDY}, {"prompt": "a", "top_p": 7}, {"prompt": "b", **GREEDY}]
    good, wrong, _ = client.batches.run(
        bodies, endpoint="/v1/completions", metadata={"run": "7"}, progress=True, timeout_s=60
    )
    assert good.custom_id == "0"
    assert good.answer.text == SAID
    assert len(good.answer.token_ids) == 8
    assert wrong.answer is None
    assert isinstance(wrong.error, RequestError)
    assert wrong.error.field == "top_p"

    batch = client.batches.list(limit=1)[0]
    assert (batch.status, batch.num_total, batch.num_failed) == ("completed", 3, 1)
    assert batch.raw["metadata"]["run"] == "7"
    file = client.files.get(batch.output_file_id)
    content = client.files.content(file.id)
    assert len(content) == file.bytes
    assert content.decode().splitlines() == list(client.files.lines(file.id))
    client.files.delete(file.id)
    assert file.id not in [each.id for each in client.files.list()]
    with pytest.raises(NotFound):
        client.files.get(file.id)


def test_a_batch_that_fails_and_one_that_is_cancelled(client):
    file = client.files.upload(b"no json\n")
    batch = client.batches.wait(client.batches.start(file.id), timeout_s=60)
    assert batch.status == "failed"
    with pytest.raises(EngineError, match="no results"):
        list(client.batches.results(batch))
    lines = [
        {"custom_id": name, "body": {"prompt": PROMPT, "max_tokens": 1900, "ignore_eos": True}}
        for name in ("one", "two")
    ]
    batch = client.batches.create(lines, endpoint="/v1/completions")
    with pytest.raises(EngineError, match="has not ended"):
        list(client.batches.results(batch))
    client.batches.cancel(batch.id)
    assert client.batches.wait(batch, timeout_s=60).status == "cancelled"
    ends = {each.custom_id: each for each in client.batches.results(batch)}
    assert "cancelled" in str(ends["two"].error)


def test_many_requests_at_once(engine):
    async def ask():
        url = f"http://127.0.0.1:{engine.port}"
        async with AsyncClient(url, max_connections=300) as client:
            return await asyncio.gather(*(client.complete(PROMPT, **GREEDY) for _ in range(600)))

    assert {answer.text for answer in asyncio.run(ask())} == {SAID}


def test_an_embedded_engine_in_an_event_loop():
    async def ask():
        client = AsyncClient.embedded(page_size=32)
        async with client:
            answers = await asyncio.gather(*(client.complete(PROMPT, **GREEDY) for _ in range(5)))
        with pytest.raises(EngineError, match="closed"):
            await client.complete(PROMPT)
        return answers

    assert {answer.text for answer in asyncio.run(ask())} == {SAID}


def test_an_embedded_engine_with_keys_knows_its_client():
    with Client.embedded(api_key=["sk-test max_request_priority=5"]) as client:
        assert client.complete(PROMPT, **GREEDY).text == SAID


def test_wrong_flags_and_models_of_embedded_engines_are_named(tmp_path):
    with pytest.raises(ConfigError, match="page_sizes"):
        Client.embedded(page_sizes=3)
    with pytest.raises(Exception, match=str(tmp_path)):
        Client.embedded(tmp_path, retry=RetryPolicy(max_retries=0))
