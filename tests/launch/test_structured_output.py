"""Texts that the demo model generates under a grammar follow it; other libraries check that."""

from __future__ import annotations

import ast
import json
import random
import re
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import pytest
from engine_process import running
from json_schemas import SCHEMAS

from tokasaurus import LLM, SamplingParams
from tokasaurus.demo import MODEL_DIR

pytestmark = pytest.mark.engine

PATTERNS = [
    r"[0-9]{3}-[0-9]{4}",
    r"(yes|no|maybe) (dear|sir)",
    r"[A-Z][a-z]{2,8}(, [A-Z][a-z]{2,8}){0,3}\.",
    r"\d+ (apples|pears)",
    r"(é|ü|日本|🦕){1,4}",
]
CHOICES = ["yes", "no", 'she said "so"', "line\nbreak", "日本", "yesterday"]
ARITHMETIC_GBNF = """
root ::= term (op term){0,3}
term ::= [0-9] | "(" root ")"
op ::= [-+*]
"""
ARITHMETIC_LARK = """
start: term (OP term){0,3}
term: /[0-9]/ | "(" start ")"
OP: "-" | "+" | "*"
"""


@pytest.fixture(scope="module")
def llm():
    """Plans one step ahead and never preempts."""
    with LLM(MODEL_DIR, kv_cache_num_tokens=4096, max_seqs_per_forward=64) as embedded:
        yield embedded


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """Several batches in flight, pages for few sequences, needless preemptions, small chunks."""
    with running(
        tmp_path_factory.mktemp("engine"),
        f"model={MODEL_DIR}",
        "trust_request_chat_template=T",
        "kv_cache_num_tokens=4096",
        "max_seqs_per_forward=64",
        "max_tokens_per_forward=96",
        "scheduling_steps_ahead=8",
        "bump_city_population_me=T",
    ) as engine:
        yield engine


def validate(text: str, schema: dict) -> None:
    jsonschema.validate(
        json.loads(text), schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )


def is_sum(text: str) -> bool:
    try:
        return re.fullmatch(r"[0-9()+*-]+", text) is not None and bool(ast.parse(text, mode="eval"))
    except SyntaxError:
        return False


def complete(engine, prompt="Tell me about dinosaurs.", **fields):
    body = {"max_tokens": 80, "temperature": 1.0, "n": 4, "seed": 7, **fields}
    extra = {
        k: body.pop(k)
        for k in list(body)
        if k not in ("max_tokens", "temperature", "n", "seed", "stop", "stream")
    }
    return engine.client().completions.create(model="m", prompt=prompt, extra_body=extra, **body)


def check_all(choices, check) -> int:
    """Checks the texts that ended by themselves; returns their number."""
    ended = 0
    for choice in choices:
        assert choice.finish_reason in ("stop", "length")
        if choice.finish_reason == "stop":
            check(choice.text)
            ended += 1
    return ended


def test_generated_json_validates_against_every_schema(engine):
    assert len(SCHEMAS) >= 50

    def ask(number):
        return complete(engine, seed=number, structured_outputs={"json": SCHEMAS[number]})

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(len(SCHEMAS))))
    unfinished = []
    for schema, answer in zip(SCHEMAS, answers, strict=True):
        if not check_all(answer.choices, lambda text, schema=schema: validate(text, schema)):
            unfinished.append(schema)
    assert len(unfinished) <= 6, unfinished  # their strings and objects have no limit


def test_chat_follows_a_response_format(engine):
    schema = SCHEMAS[-1]
    answer = engine.client().chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": "What will the weather be?"}],
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "weather", "schema": schema, "strict": True},
        },
        n=8,
        max_tokens=100,
    )
    texts = [c.message.content for c in answer.choices if c.finish_reason == "stop"]
    assert len(texts) >= 4
    for text in texts:
        validate(text, schema)


def test_texts_follow_patterns_choices_and_grammars(engine):
    for pattern in PATTERNS:
        answer = complete(engine, structured_outputs={"regex": pattern})
        check_all(answer.choices, lambda text, p=pattern: re.fullmatch(p, text).group())
    answer = complete(engine, n=16, structured_outputs={"choice": CHOICES})
    assert check_all(answer.choices, lambda text: CHOICES.index(text)) == 16
    for grammar in (ARITHMETIC_GBNF, ARITHMETIC_LARK):
        answer = complete(engine, n=8, structured_outputs={"grammar": grammar})
        assert check_all(answer.choices, is_sum)
        assert all(
            is_sum(choice.text) for choice in answer.choices if choice.finish_reason == "stop"
        )


def test_a_stream_has_the_same_text_as_a_whole_answer(engine):
    fields = {"structured_outputs": {"json": SCHEMAS[-1]}, "n": 3, "max_tokens": 100}
    whole = complete(engine, **fields)
    texts = ["", "", ""]
    for chunk in complete(engine, stream=True, **fields):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]


def test_stop_strings_end_a_text_before_its_grammar_does(engine):
    schema = SCHEMAS[34]
    free = complete(engine, structured_outputs={"json": schema})
    stopped = complete(engine, structured_outputs={"json": schema}, stop=['"age"'])
    for one, other in zip(free.choices, stopped.choices, strict=True):
        assert other.finish_reason == "stop"
        assert other.text == one.text.partition('"age"')[0]


def test_many_grammars_at_once_beside_requests_without_one(engine):
    """Sequences with other grammars, or with none, use slots again."""
    rng = random.Random(3)
    client = engine.client()
    with_grammar = [rng.choice(SCHEMAS[28:]) if i % 3 else None for i in range(48)]

    def ask(number):
        schema = with_grammar[number]
        extra = {} if schema is None else {"structured_outputs": {"json": schema}}
        return client.completions.create(
            model="m",
            prompt=f"Question {number}:",
            max_tokens=rng.choice([5, 40, 90]),
            n=2,
            seed=number,
            temperature=1.0,
            extra_body=extra,
        )

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(48)))
    for schema, answer in zip(with_grammar, answers, strict=True):
        if schema is not None:
            check_all(answer.choices, lambda text, schema=schema: validate(text, schema))


def test_preemption_and_steps_ahead_do_not_change_the_text(engine, llm):
    """Greedy: to compute a sequence anew may round otherwise, which a draw would show."""
    for schema in (SCHEMAS[1], SCHEMAS[-1]):
        for prompt in ("A dinosaur:", "Question 7:", "Once upon", "1, 2, 3,", "A B C D A B"):
            asked = {"max_tokens": 60, "structured_outputs": {"json": schema}, "temperature": 0}
            (alone,) = llm.generate(prompt, SamplingParams(**asked), use_tqdm=False)
            answer = complete(engine, prompt, **asked)
            assert alone.outputs[0].text == answer.choices[0].text, (schema, prompt)


def test_logprobs_modes_see_the_grammar_or_the_model_alone(llm):
    """If a single token is allowed, it has probability 1; the model itself was less sure."""
    drawn, raw = (
        llm.generate(
            "A",
            SamplingParams(
                max_tokens=9,
                seed=1,
                logprobs=2,
                logprobs_mode=mode,
                structured_outputs={"choice": ["zebra"]},
            ),
            use_tqdm=False,
        )[0].outputs[0]
        for mode in ("processed", "raw")
    )
    assert drawn.text == raw.text == "zebra"
    assert drawn.token_ids == raw.token_ids
    assert drawn.cumulative_logprob > raw.cumulative_logprob


TOOL_TEMPLATE = (
    "{{ bos_token }}{% for t in tools or [] %}{{ t.function.name }} {% endfor %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
    "{# calls: MARK #}"
)


@pytest.mark.parametrize("mark", ["<tool_call>", "<|python_tag|>"])
def test_enforced_tool_calls_validate(engine, mark):
    """A model that was never trained on tools calls one, with arguments that validate."""
    parameters = SCHEMAS[-1]
    tools = [
        {"type": "function", "function": {"name": "weather", "parameters": parameters}},
        {"type": "function", "function": {"name": "nothing"}},
    ]
    named = {"type": "function", "function": {"name": "weather"}}
    template = TOOL_TEMPLATE.replace("MARK", mark)
    for choice, stream in ((named, False), (named, True), ("required", False)):
        answer = engine.client().chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": "What will the weather be?"}],
            tools=tools,
            tool_choice=choice,
            parallel_tool_calls=False,
            n=4,
            seed=3,
            max_tokens=300,
            stream=stream,
            extra_body={"chat_template_kwargs": {"chat_template": template}},
        )
        calls, reasons = _calls_of_stream(answer) if stream else _calls_of_whole(answer)
        assert "tool_calls" in reasons.values()
        for index, (name, arguments) in calls.items():
            if reasons[index] == "tool_calls":
                assert name == "weather" or choice == "required"
                validate(arguments, parameters if name == "weather" else {"const": {}})


def test_an_enforced_tool_call_of_the_responses_api_validates(engine):
    parameters = SCHEMAS[-1]
    template = TOOL_TEMPLATE.replace("MARK", "<tool_call>")
    body = {
        "model": "m",
        "input": "What will the weather be?",
        "tools": [{"type": "function", "name": "weather", "parameters": parameters}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_output_tokens": 300,
        "extra_body": {"seed": 3, "chat_template_kwargs": {"chat_template": template}},
    }
    with engine.client() as client:
        whole = client.responses.create(**body)
        streamed = list(client.responses.create(stream=True, **body))[-1].response
    for answer in (whole, streamed):
        (call,) = answer.output
        assert (answer.status, call.type, call.name) == ("completed", "function_call", "weather")
        validate(call.arguments, parameters)
    assert whole.output[0].arguments == streamed.output[0].arguments


def _calls_of_whole(answer):
    called = [(c.index, c.message.tool_calls[0].function) for c in answer.choices]
    calls = {index: (function.name, function.arguments) for index, function in called}
    return calls, {c.index: c.finish_reason for c in answer.choices}


def _calls_of_stream(stream):
    calls, reasons = {}, {}
    for chunk in stream:
        for choice in chunk.choices:
            reasons[choice.index] = choice.finish_reason
            for call in choice.delta.tool_calls or []:
                name, arguments = calls.get(choice.index, ("", ""))
                function = call.function
                calls[choice.index] = (name + (function.name or ""), arguments + function.arguments)
    return calls, reasons


def test_a_grammar_that_gets_too_hard_ends_by_length(engine):
    """Not by stop, which would claim a complete text. Other sequences of the batch are unharmed."""
    rules = "\n".join(
        f"r{i}: "
        + " | ".join(f"/[a-z]/ r{(7 * i + 13 * j + 1) % 300}" for j in range(6))
        + ' | "x"'
        for i in range(300)
    )
    # The beginning is easy, since a grammar that is hard from the start is refused.
    grammar = f'start: "a long and simple beginning: " r0\n{rules}'
    with ThreadPoolExecutor() as pool:
        mates = pool.submit(complete, engine, guided_regex="[a-z]{60}")
        for stream in (False, True):
            answer = complete(engine, guided_grammar=grammar, n=1, max_tokens=200, stream=stream)
            choices = [c for event in answer for c in event.choices] if stream else answer.choices
            assert choices[-1].finish_reason == "length"
            text = "".join(choice.text for choice in choices)
            assert text.startswith("a long and simple beginning:")
            assert len(text) < 100
    for choice in mates.result().choices:
        assert choice.finish_reason == "stop"
        assert re.fullmatch("[a-z]{60}", choice.text)
    assert "cannot be followed any further" in engine.log
