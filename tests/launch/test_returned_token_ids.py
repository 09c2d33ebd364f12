"""``return_token_ids`` with the unmodified openai client and an engine that preempts without need.

The oracles are transformers' tokenizer, the text of the answers and their fingerprints.
"""

from __future__ import annotations

import json
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import pytest
from engine_process import EngineProcess, eventually, running
from transformers import AutoTokenizer

pytestmark = [pytest.mark.engine, pytest.mark.processes]

PROMPTS = ["A B C D A B C D A B", "tell me a joke"]
CHATS = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
ASKED = {
    "model": "m",
    "n": 3,
    "temperature": 1,
    "seed": 7,
    "max_tokens": 100,
    "extra_body": {"return_token_ids": True},
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """It has few pages, so that the sequences of a crowd preempt one another, too."""
    flags = ("uvicorn_log_level=warning", "bump_city_population_me=T", "kv_cache_num_tokens=2048")
    with running(tmp_path_factory.mktemp("engine"), *flags) as ready:
        yield ready


@pytest.fixture(scope="module")
def client(engine: EngineProcess):
    with engine.client(timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def tokenizer(engine: EngineProcess):
    return AutoTokenizer.from_pretrained(json.loads(engine.get("/model_info")[1])["model_path"])


def fingerprint_ids(answer):
    return json.loads(answer.system_fingerprint)["completion_ids"]


def joined(stream, prompt_of):
    """Prompt, generated ids and text of each choice of a stream, by index.

    Args:
        stream: of chunks, of which the first of each choice has the prompt.
        prompt_of: finds the prompt's ids in a chunk.
    """
    prompts, ids, texts = {}, defaultdict(list), defaultdict(str)
    for chunk in stream:
        (choice,) = chunk.choices
        assert [choice.token_ids] == fingerprint_ids(chunk)
        prompt = prompt_of(chunk)
        assert (prompt is None) == (choice.index in prompts)
        prompts.setdefault(choice.index, prompt)
        ids[choice.index] += choice.token_ids
        texts[choice.index] += (
            choice.text if hasattr(choice, "text") else choice.delta.content or ""
        )
    return {index: (prompts[index], ids[index], texts[index]) for index in sorted(prompts)}


def completion(client, prompts, **more):
    answer = client.completions.create(**{**ASKED, **more}, prompt=prompts)
    assert [choice.token_ids for choice in answer.choices] == fingerprint_ids(answer)
    return {
        choice.index: (choice.prompt_token_ids, choice.token_ids, choice.text)
        for choice in answer.choices
    }


def streamed_completion(client, prompts, **more):
    stream = client.completions.create(**{**ASKED, **more}, prompt=prompts, stream=True)
    return joined(stream, lambda chunk: chunk.choices[0].prompt_token_ids)


def chat(client, messages):
    answer = client.chat.completions.create(**ASKED, messages=messages)
    assert [choice.token_ids for choice in answer.choices] == fingerprint_ids(answer)
    return {
        choice.index: (answer.prompt_token_ids, choice.token_ids, choice.message.content)
        for choice in answer.choices
    }


def streamed_chat(client, messages):
    stream = client.chat.completions.create(**ASKED, messages=messages, stream=True)
    return joined(stream, lambda chunk: chunk.prompt_token_ids)


def check(found, prompts, tokenizer):
    """Three choices for each prompt, whose ids are spelled as their texts."""
    assert len(found) == 3 * len(prompts)
    for index, (prompt, ids, text) in found.items():
        assert prompt == prompts[index // 3]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert 0 < len(ids) <= 100


@pytest.mark.parametrize("ask", [completion, streamed_completion])
def test_completions(client, tokenizer, ask):
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    check(ask(client, PROMPTS), prompts, tokenizer)
    check(ask(client, prompts), prompts, tokenizer)


@pytest.mark.parametrize("ask", [chat, streamed_chat])
def test_chats(client, tokenizer, ask):
    for messages in CHATS:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer.encode(text, add_special_tokens=False)
        check(ask(client, messages), [prompt], tokenizer)


@pytest.mark.parametrize("ask", [completion, streamed_completion])
def test_a_stop_string_ends_the_ids_with_the_token_that_completes_it(client, tokenizer, ask):
    (_, unstopped, text) = completion(client, PROMPTS[1], n=1, temperature=0)[0]
    stop = text[len(text) // 2 :][:4]
    (_, ids, stopped) = ask(client, PROMPTS[1], n=1, temperature=0, stop=stop)[0]
    assert ids == unstopped[: len(ids)]
    assert stopped == text[: text.index(stop)]
    assert stop not in tokenizer.decode(ids[:-1])
    assert stop in tokenizer.decode(ids)


def test_preempted_sequences_have_each_id_once(engine, client, tokenizer):
    """A crowd, whole and streamed."""
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    before = engine.metrics()["preemptions_total"]
    with ThreadPoolExecutor(16) as pool:
        running = [
            pool.submit((completion, streamed_completion)[number % 2], client, PROMPTS, seed=number)
            for number in range(16)
        ]
        for each in running:
            check(each.result(), prompts, tokenizer)
    eventually(lambda: engine.metrics()["preemptions_total"] > before, "a preemption")


def test_the_lines_of_a_batch_have_ids(engine, tokenizer):
    body = {"max_tokens": 20, "seed": 1, "n": 2, "return_token_ids": True}
    lines = [
        {
            "custom_id": f"{number}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {**body, "prompt": prompt},
        }
        for number, prompt in enumerate(PROMPTS)
    ]
    for line in engine.answered_batch(lines):
        answer = line["response"]["body"]
        ids = json.loads(answer["system_fingerprint"])["completion_ids"]
        assert [choice["token_ids"] for choice in answer["choices"]] == ids
        prompt = tokenizer.encode(PROMPTS[int(line["custom_id"])])
        assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [prompt] * 2
