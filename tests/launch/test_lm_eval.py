"""lm-evaluation-harness itself against a running engine, on local data; transformers is the oracle.

The harness cuts text into tokens by itself, with a tokenizer that it loads or with the engine's
``/tokenize``, and sends ids or text, one prompt or several at a time. In every way its numbers must
be those of the model.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import subprocess
import sys
from functools import cache, lru_cache
from types import SimpleNamespace

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
import torch
import yaml
from engine_process import running
from oracle import LOGPROB_TOLERANCE, TIE, assert_greedy, reference_generate, reference_model
from transformers import AutoTokenizer

from tokasaurus.demo import MODEL_DIR
from tokasaurus.errors import ConfigError, RequestError

pytestmark = [pytest.mark.engine, pytest.mark.processes]

TOKENIZER = AutoTokenizer.from_pretrained(MODEL_DIR)
CONTEXTS = [
    "Why did the Tyrannosaurus",
    "Once upon a time,",
    "A B C D A B C D A B",
    "The Stegosaurus was a",
    "2 + 3 =",
    "",
]
PASSAGES = [
    "Once upon a time, a big Kentrosaurus lived near a wide river.",
    "One day it met a Iguanodon, who was looking for soup. " * 8,
]
QUESTIONS = ["tell me a joke", "What is 3 + 4?", "Say back: mellow"]
END = TOKENIZER.eos_token


@cache
def greedy_ids(prompt_ids: tuple[int, ...], num_tokens: int) -> list[int]:
    """What greedy decoding says; the harness asks the same in many ways."""
    ids = reference_generate(MODEL_DIR, list(prompt_ids), num_tokens)
    assert_greedy(MODEL_DIR, list(prompt_ids), ids)
    return ids


def greedy_text(context: str, num_tokens: int) -> str:
    return TOKENIZER.decode(greedy_ids(tuple(TOKENIZER(context).input_ids), num_tokens))


TASKS = {
    "toka_continuations": {
        "documents": [
            {"context": context, "text": " spoon of the moon"} for context in CONTEXTS
        ],  # and what greedy decoding would say
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "toka_choices": {
        "documents": [
            {"question": context, "choices": ["blue", "two", "4", "dinosaur"], "label": 2}
            for context in CONTEXTS[:3]
        ],
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "target_delimiter": " ",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "toka_passages": {
        "documents": [{"text": text} for text in PASSAGES],
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "toka_questions": {
        "documents": [{"question": question, "answer": "7"} for question in QUESTIONS],
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["?", "\n\n"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}
LOGLIKELIHOODS = ["toka_continuations", "toka_choices"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A directory with a YAML file and data for each task."""
    directory = tmp_path_factory.mktemp("tasks")
    likeliest = [{"context": context, "text": greedy_text(context, 6)} for context in CONTEXTS]
    for name, task in TASKS.items():
        data = directory / f"{name}.jsonl"
        documents = task["documents"] + (likeliest if name == "toka_continuations" else [])
        data.write_text("".join(json.dumps(each) + "\n" for each in documents))
        fields = {key: value for key, value in task.items() if key != "documents"}
        config = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(data)},
                "cache_dir": str(directory / "cache"),
            },
            "test_split": "test",
            "target_delimiter": "",
            **fields,
        }
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return directory


@pytest.fixture(scope="module")
def evaluate(tasks, tmp_path_factory):
    """Runs tasks against one engine; returns the harness's results for each task."""
    from lm_eval import evaluator, simple_evaluate  # slow to import
    from lm_eval.tasks import TaskManager

    import tokasaurus.integrations.lm_eval  # noqa: F401, registers the model type

    flags = (
        f"model={MODEL_DIR}",
        "dtype=float32",
        "max_num_tokens_per_request=1024",
        "uvicorn_log_level=warning",
    )
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    with (
        running(tmp_path_factory.mktemp("engine"), *flags) as engine,
        pytest.MonkeyPatch.context() as patch,
    ):
        # It asks pip, which takes half a second each time, what is installed.
        patch.setattr(evaluator, "add_env_info", lambda results: None)

        def run(names, *, model="local-completions", batch_size=1, chat=False, **arguments):
            path = "chat/completions" if model == "local-chat-completions" else "completions"
            if model == "tokasaurus":
                own = {
                    "model": str(MODEL_DIR),
                    "dtype": "float32",
                    "max_num_tokens_per_request": 1024,
                }
            else:
                own = {"model": "demo", "base_url": f"{engine.url}/v1/{path}", "max_retries": 1}
            return simple_evaluate(
                model,
                {"max_length": 1024, **own, **arguments},
                tasks=names,
                batch_size=batch_size,
                apply_chat_template=chat,
                task_manager=manager,
                bootstrap_iters=0,
            )

        yield run


def asked(results, name):
    """Pairs of the arguments of a call and its answer."""
    for sample in results["samples"][name]:
        for arguments, (answer,) in zip(sample["arguments"], sample["resps"], strict=True):
            yield arguments, answer


@lru_cache(maxsize=1)
def exact_model():
    """The model in double precision, so that what is off in a sum is the engine's share alone."""
    return copy.deepcopy(reference_model(MODEL_DIR)).double()


def sum_tolerance(num_tokens: int) -> float:
    """How far a sum of logprobs in single precision may be off, whatever the processor.

    A single logprob may be off by LOGPROB_TOLERANCE; on average, a tenth of it must suffice.
    """
    return max(LOGPROB_TOLERANCE, LOGPROB_TOLERANCE / 10 * num_tokens)


@cache
def score(ids: tuple[int, ...], start: int) -> tuple[float, bool, float]:
    """Logprob of ids[start:], whether it is greedy, and by how much it misses being so."""
    with torch.inference_mode():
        logits = exact_model()(torch.tensor([ids])).logits[0]
    rows = logits.log_softmax(-1)[start - 1 : -1]
    chosen = rows.gather(1, torch.tensor(ids[start:])[:, None])[:, 0]
    short = rows.max(1).values - chosen
    return float(chosen.sum()), bool((short == 0).all()), float(short.max())


LOCAL = {"tokenizer_backend": "huggingface", "tokenizer": str(MODEL_DIR)}
WAYS = {
    "remote-tokenizer": {},
    "ids": LOCAL,
    "ids-batches": {**LOCAL, "batch_size": 5},
    "ids-concurrent": {**LOCAL, "num_concurrent": 6, "batch_size": 2},
    "bos-ids": {**LOCAL, "add_bos_token": True, "num_concurrent": 4},
    "text": {**LOCAL, "add_bos_token": True, "tokenized_requests": False},
    "text-concurrent": {
        **LOCAL,
        "add_bos_token": True,
        "tokenized_requests": False,
        "num_concurrent": 4,
        "batch_size": 3,
    },
    "embedded": {"model": "tokasaurus", "add_bos_token": True},
}


def first_id(way: str) -> int:
    """What the harness puts before a text: BOS, unless /tokenize said that its id is 0."""
    return TOKENIZER.eos_token_id if way == "remote-tokenizer" else TOKENIZER.bos_token_id


@pytest.mark.parametrize("way", WAYS)
def test_loglikelihoods_of_continuations(evaluate, way):
    results = evaluate(LOGLIKELIHOODS, **WAYS[way])
    bos = [TOKENIZER.bos_token_id] if WAYS[way].get("add_bos_token") else []
    seen = set()
    for name in LOGLIKELIHOODS:
        for (context, text), (logprob, is_greedy) in asked(results, name):
            whole = bos + TOKENIZER(context + text, add_special_tokens=False).input_ids
            start = len(bos + TOKENIZER(context, add_special_tokens=False).input_ids)
            if start == 0:
                whole, start = [first_id(way), *whole], 1
            expected, greedy, short = score(tuple(whole), start)
            tolerance = sum_tolerance(len(whole) - start)
            assert logprob == pytest.approx(expected, abs=tolerance), (context, text)
            assert is_greedy == greedy or short < TIE
            seen.add(is_greedy)
    assert seen == {True, False} or not bos


@pytest.mark.parametrize(
    ("way", "max_length"),
    [
        ("remote-tokenizer", 1024),
        ("text-concurrent", 1024),
        ("ids", 1024),
        ("ids-concurrent", 50),
        ("embedded", 1024),
        ("embedded", 50),
    ],
)
def test_loglikelihoods_of_whole_texts(evaluate, way, max_length):
    """Longer texts come in windows; each begins with the last token of the one before."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    options = {**WAYS[way], "add_bos_token": False, "max_length": max_length}
    results = evaluate(["toka_passages"], **options)
    num_windows = 0
    for (text,), logprob in asked(results, "toka_passages"):
        windows = get_rolling_token_windows(
            token_list=TOKENIZER(text, add_special_tokens=False).input_ids,
            prefix_token=first_id(way),
            max_seq_len=max_length - 2,
            context_len=1,
        )
        expected, num_tokens = 0.0, 0
        for context, continuation in map(make_disjoint_window, windows):
            expected += score(tuple(context + continuation), len(context))[0]
            num_tokens += len(continuation)
            num_windows += 1
        assert logprob == pytest.approx(expected, abs=sum_tolerance(num_tokens))
    assert (num_windows > len(PASSAGES)) == (max_length == 50)


def check_generated(prompt_ids: list[int], said: str, until: list[str], num_tokens: int) -> None:
    """It is what greedy decoding says, up to a stop string, the end of the answer, or the limit."""
    text = TOKENIZER.decode(greedy_ids(tuple(prompt_ids), num_tokens))
    for stop in [*until, END, "<|end_of_text|>"]:
        text = text.split(stop)[0]
    assert said == text


GENERATION = TASKS["toka_questions"]["generation_kwargs"]


@pytest.mark.parametrize(
    "way",
    [
        "remote-tokenizer",
        "ids",
        "ids-batches",
        "ids-concurrent",
        "bos-ids",
        "text-concurrent",
        "embedded",
    ],
)
def test_generated_texts_are_greedy(evaluate, way):
    options = {"add_bos_token": True, **WAYS[way]}
    results = evaluate(["toka_questions"], **options)
    bos = options["add_bos_token"] and way != "remote-tokenizer"
    for (context, _), text in asked(results, "toka_questions"):
        ids = TOKENIZER(context, add_special_tokens=bos).input_ids
        check_generated(ids, text, GENERATION["until"], GENERATION["max_gen_toks"])


@pytest.mark.parametrize("options", [{}, {"num_concurrent": 3}], ids=str)
def test_chat_answers_are_greedy(evaluate, options):
    results = evaluate(["toka_questions"], model="local-chat-completions", chat=True, **options)
    for (messages, _), text in asked(results, "toka_questions"):
        ids = TOKENIZER.apply_chat_template(
            json.loads(messages[0]), add_generation_prompt=True, return_dict=False
        )
        check_generated(ids, text, GENERATION["until"], GENERATION["max_gen_toks"])


def test_chat_answers_of_the_embedded_engine_are_greedy(evaluate):
    results = evaluate(["toka_questions"], model="tokasaurus", chat=True)
    for (context, _), text in asked(results, "toka_questions"):
        assert context.startswith(TOKENIZER.bos_token)
        ids = TOKENIZER(context, add_special_tokens=False).input_ids
        check_generated(ids, text, GENERATION["until"], GENERATION["max_gen_toks"])


def test_the_embedded_engine_refuses_what_it_does_not_have():
    from tokasaurus.integrations.lm_eval import TokasaurusLM

    with pytest.raises(ConfigError, match="page_sizes"):
        TokasaurusLM(page_sizes=3)
    with contextlib.closing(TokasaurusLM(max_num_tokens_per_request=64)) as model:
        for wrong, match in (({"num_beams": 4}, "num_beams"), ({"max_gen_toks": 64}, "no room")):
            with pytest.raises(RequestError, match=match):
                model.generate_until([SimpleNamespace(args=("text", wrong))])
        # A sampled text, and a context that does not fit: its end is what counts.
        warm = {"do_sample": True, "temperature": 0.5, "seed": 1, "max_gen_toks": 8}
        long = "word " * 500 + "A B C D A B C D A B"
        texts = [model.generate_until([SimpleNamespace(args=(long, warm))]) for _ in range(2)]
        assert texts[0] == texts[1]


@pytest.mark.long
def test_the_command_runs_the_embedded_engine(tasks):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tokasaurus.integrations.lm_eval", "run"),
            *("--model", "tokasaurus", "--model_args", f"model={MODEL_DIR},page_size=32"),
            *("--include_path", str(tasks), "--tasks", "toka_questions"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "toka_questions" in done.stdout
