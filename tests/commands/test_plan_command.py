"""``toka plan`` as a program: tables, JSON, workloads from files, and errors."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from described_models import LLAMA_8B, LLAMA_70B, describe

from tokasaurus import entry
from tokasaurus.commands.batch_demand import batch_demand
from tokasaurus.config.parser import parse_command_line
from tokasaurus.demo import MODEL_DIR
from tokasaurus.errors import ConfigError
from tokasaurus.model.facts import model_facts
from tokasaurus.planner.cost_file import CostFile, write_cost
from tokasaurus.planner.cost_model import INSTANT, fixed
from tokasaurus.planner.trace import write_trace
from tokasaurus.planner.workloads import WORKLOADS

SHAPE = "workload=prompt=200,output=40,requests=100"


@pytest.fixture
def plan(monkeypatch, capsys, tmp_path):
    """Runs ``toka plan`` for a model of which only config.json is there."""

    def run(*words, model=LLAMA_8B):
        described = describe(tmp_path, model)
        monkeypatch.setattr("sys.argv", ["toka", "plan", f"model={described}", *words])
        with pytest.raises(SystemExit) as ended:
            entry.main()
        return ended.value.code or 0, *capsys.readouterr()

    return run


def test_a_plan_prints_its_premises_a_table_and_a_command_that_toka_reads(plan):
    status, out, err = plan(SHAPE, "device=l4", "gpus=2", "price_per_hour=1.5", "simulations=3")
    assert status == 0
    assert "model: 8,030,261,248 parameters in 32 layers" in out
    assert "workload: 100 requests, 100 samples, 20,000 prompt tokens, 4,000 to generate" in out
    assert "  read_gb_per_s 300 (data sheet: NVIDIA L4)" in out
    assert "a million generated tokens cost " in out
    assert "memory: cuda has 24.0 GB free; " in out
    assert "simulating 1 of at most 3: " in err
    command = out.splitlines()[-1].split()
    assert command[0] == "toka"
    config = parse_command_line(command[1:], {})
    assert config.kv_cache_num_tokens == "auto"
    assert config.dp_size * config.tp_size * config.pp_size == 2


def test_the_json_of_a_plan_holds_what_the_table_says(plan):
    words = (SHAPE, "device=h200", "price_per_hour=3.6", "simulations=2", "output=json")
    status, out, _ = plan(*words)
    assert status == 0
    found = json.loads(out)
    best = found["configurations"][0]
    assert best["why"] == ""
    assert best["tokens_per_s"] == pytest.approx(4000 / best["seconds"])
    assert best["cost_per_million_tokens"] == pytest.approx(3.6 / 3600 / best["tokens_per_s"] * 1e6)
    assert found["device"]["figures"]["read_gb_per_s"]["value"] == 4300
    assert found["device"]["figures"]["read_gb_per_s"]["source"].startswith("measured: ")
    assert found["command"].startswith("toka model=")
    assert plan(*words)[1] == out


def test_a_trace_is_planned_and_its_broken_line_is_named(plan, tmp_path):
    path = tmp_path / "chat.jsonl"
    with path.open("wb") as file:
        write_trace(WORKLOADS["chat"](0, 0.02), file)
    status, out, _ = plan(f"workload={path}", "device=h100", "simulations=1")
    assert status == 0
    assert "workload: 80 requests, 80 samples" in out
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], '{"arrival_s": 0}']))
    status, _, err = plan(f"workload={path}", "device=h100")
    assert status == 2
    assert f"toka plan: error: workload={path}: line 3 of the trace: " in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"url": "/v1/completions", "body": {"prompt": "Hi"}}', "line 1: custom_id must be a"),
        ('{"promt": "Hi", "max_tokens": 5}', "line 1: the line is not a request: it must have"),
        ('{"prompt_tokens": 5, "max_tokens": 5}', "line 1 of the trace: Object missing"),
        ("workload", "line 1 of the trace: JSON is malformed"),
        ("", "the trace is empty"),
    ],
)
def test_a_first_line_that_is_wrong_is_taken_for_what_it_was_meant_as(
    plan, tmp_path, line, message
):
    path = tmp_path / "requests.jsonl"
    path.write_text(line)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIR / name, tmp_path)
    status, _, err = plan(f"workload={path}", "device=h100")
    assert (status, err.startswith(f"toka plan: error: workload={path}: {message}")) == (2, True), (
        err
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("device=l4", "workload=nowhere.jsonl"), "workload=nowhere.jsonl: No such file"),
        (("device=l4", "workload=prompt=4"), "workload=prompt=4: a shape needs output"),
        (("device=l4", "workload=prompt=200000,output=4"), "and the model has 131072 positions"),
        (("device=l4", SHAPE, "gpus=2", "cost=x.yaml"), "cost=x.yaml is for one device"),
        (("device=l4", SHAPE, "cost=x.yaml"), "cost=x.yaml: No such file or directory"),
        (("device=l4", SHAPE, "cost=zero.yaml"), "cost=zero.yaml: a batch takes no time"),
        (("device=l4", SHAPE, "gpu=2"), "unknown flag 'gpu': the nearest is 'gpus'"),
    ],
)
def test_errors_name_the_flag(plan, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_cost("zero.yaml", CostFile({}, INSTANT))
    status, _, err = plan(*words)
    assert status == 2
    assert message in err


def test_a_measured_cost_takes_the_place_of_arithmetic(plan, tmp_path):
    path = str(tmp_path / "cost.yaml")
    write_cost(path, CostFile({"machine": "a test's"}, fixed(0.05)))
    words = (SHAPE, "device=h200", f"cost={path}", "output=json", "manager_ms=0")
    status, out, _ = plan(*words, "max_seqs_per_forward=128", "max_tokens_per_forward=8192")
    assert status == 0
    best = json.loads(out)["configurations"][0]
    # Three batches for 20,000 tokens of prompts, which 39 more follow.
    assert best["seconds"] == pytest.approx(42 * 0.05, abs=0.051)


def test_a_processor_is_a_whole_machine(plan, tmp_path):
    path = tmp_path / "board.yaml"
    text = "{name: A board, kind: cpu, memory_gb: 64, read_gb_per_s: 50, tflop_per_s: %s}"
    path.write_text(text % "{float32: 1}")
    status, out, _ = plan(SHAPE, f"device={path}", "simulations=1")
    assert status == 0
    assert "memory: cpu has 64.0 GB free; 32.1 GB for weights in float32" in out
    status, _, err = plan(SHAPE, f"device={path}", "gpus=2")
    assert status == 2
    assert "is a whole machine (kind: cpu); leave out gpus=2" in err


def test_a_model_that_does_not_fit_gets_a_number_of_devices(plan):
    status, out, err = plan(SHAPE, "device=h100", model=LLAMA_70B)
    assert (status, out) == (2, "")
    assert err.splitlines()[-1] == "gpus=2 would do, with pp 2"


SYSTEM = {"role": "system", "content": "You are a terse assistant who never guesses."}


def chat_line(name, question, **fields):
    messages = [SYSTEM, {"role": "user", "content": question}]
    body = {"messages": messages, "max_tokens": 32, **fields}
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}


def test_a_file_of_requests_is_measured_by_the_models_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    path = tmp_path / "requests.jsonl"
    lines = [
        chat_line("a", "How much is 12 + 30?", n=4),
        chat_line("b", "Name a dinosaur with three horns."),
        {"prompt": "Once upon a time", "max_tokens": 8},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    facts = model_facts(MODEL_DIR)
    demand = batch_demand(path, facts, output_tokens=20)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    prompts = [
        tokenizer.apply_chat_template(
            line["body"]["messages"], add_generation_prompt=True, return_dict=False
        )
        for line in lines[:2]
    ]
    prompts.append(tokenizer("Once upon a time")["input_ids"])
    assert [each.prompt_tokens for each in demand.trace] == [len(each) for each in prompts]
    assert [each.output_tokens for each in demand.trace] == [(20,) * 4, (20,), (8,)]
    shortest = min(map(len, prompts[:2]))
    same = np.array(prompts[0][:shortest]) == np.array(prompts[1][:shortest])
    common = int(same.argmin())
    assert common > 16
    assert [each.prefix_tokens for each in demand.trace] == [common, common, 0]


def test_a_line_that_the_engine_would_refuse_is_named(tmp_path):
    path = tmp_path / "requests.jsonl"
    facts = model_facts(MODEL_DIR)
    path.write_text("\n".join(json.dumps(chat_line(name, "Hi")) for name in "ab") + "\n{}\n")
    with pytest.raises(ConfigError, match=r"requests.jsonl: line 3: .*custom_id"):
        batch_demand(path, facts, None)
    path.write_text(json.dumps(chat_line("a", "Hi", max_tokens=-1)))
    with pytest.raises(ConfigError, match=r"requests.jsonl: line 1: .*max_tokens"):
        batch_demand(path, facts, None)
