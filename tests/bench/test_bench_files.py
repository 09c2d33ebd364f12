"""toka-bench on files and in virtual time: its output, and its errors for wrong flags and lines."""

from __future__ import annotations

import json
import re
import time
import xml.etree.ElementTree

import numpy as np
import pytest

from tokasaurus.bench import compare
from tokasaurus.bench.conversations import Conversations
from tokasaurus.bench.main import COMMANDS, main
from tokasaurus.bench.output import markdown_table, table
from tokasaurus.config.engine import EngineConfig

GOOD = '{"arrival_s": 0, "prompt_tokens": 9, "output_tokens": [3, 5], "max_tokens": 8}\n'


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(GOOD * 3)
    return str(path)


def test_a_trace_is_written_and_replayed(tmp_path, capsys):
    path = tmp_path / "chat.jsonl"
    assert main(["trace", "kind=chat", f"out={path}", "size=0.01", "seed=3"]) == 0
    written = last_line(capsys)
    assert written["requests"] == written["sequences"] == 40
    assert len(path.read_text().splitlines()) == 40
    assert main(["replay", str(path), "cost=fixed:0.001"]) == 0
    replayed = last_line(capsys)
    assert replayed["num_tokens"] == written["output_tokens"]
    assert replayed["makespan_s"] > 0.1


def test_engine_flags_reach_the_engine(trace, capsys):
    assert main(["replay", trace, "cost=fixed:1", "max_seqs_per_forward=1"]) == 0
    alone = last_line(capsys)
    assert main(["replay", f"trace={trace}", "cost=fixed:1", "max_seqs_per_forward=8"]) == 0
    together = last_line(capsys)
    assert alone["makespan_s"] == 45
    assert together["makespan_s"] == 5
    assert alone["num_tokens"] == together["num_tokens"] == 24


def test_a_replay_runs_on_the_stages_of_a_pipeline(trace, capsys):
    words = ["replay", trace, "cost=fixed:1", "max_seqs_per_forward=8"]
    found = {}
    for name, flags in {
        "one": [],
        "two": ["pp_size=2"],
        "far": ["pp_size=2", "hop_ms=100"],
    }.items():
        assert main([*words, *flags]) == 0
        found[name] = last_line(capsys)
    # Prompts are fed in turn, half a second each, and each token takes both stages.
    assert found["one"]["makespan_s"] < found["two"]["makespan_s"] <= found["one"]["makespan_s"] + 1
    assert found["two"]["num_batches"] > 1.5 * found["one"]["num_batches"]
    assert found["far"]["makespan_s"] > found["two"]["makespan_s"]


def test_pipelines_are_compared_with_one_device(capsys):
    words = ["pp_sizes=1,2", "buffers=0,1", "size=0.02", "max_seqs_per_forward=8", "jobs=1"]
    assert main(["pipeline", *words]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines] == ["stages", "------", "1", "2", "2"]
    rows = json.loads(last)["pipelines"]
    assert [(row["pp_size"], row["buffer_stages"]) for row in rows] == [(1, 0), (2, 0), (2, 1)]
    assert rows[0]["of_one_device"] == 1
    assert all(row["of_one_device"] > 1.2 for row in rows[1:])
    assert all(0 <= row["bubble"] < 0.2 for row in rows)


def test_a_pipeline_for_which_no_sequence_waits_is_no_measurement(capsys):
    assert main(["pipeline", "pp_sizes=2", "size=0.001", "jobs=1"]) == 2
    assert "no sequence waits for room" in capsys.readouterr().err


def test_numbers_of_buffer_stages_are_checked(capsys):
    with pytest.raises(SystemExit):
        main(["pipeline", "buffers=-1"])
    assert "buffers=-1: expected numbers" in capsys.readouterr().err


def test_a_replay_may_measure_the_time_of_the_manager(trace, capsys):
    started = time.perf_counter()
    assert main(["replay", trace, "cost=instant", "manager_ms=None"]) == 0
    assert 0 < last_line(capsys)["makespan_s"] < time.perf_counter() - started
    assert main(["replay", trace, "cost=instant"]) == 0
    assert last_line(capsys)["makespan_s"] == 0


def test_a_replay_draws_a_plot_of_cache_use(trace, tmp_path, capsys):
    plot = tmp_path / "use.svg"
    assert main(["replay", trace, "cost=fixed:1", f"plot={plot}"]) == 0
    texts = [
        item.text for item in xml.etree.ElementTree.parse(plot).iter() if item.tag.endswith("text")
    ]
    assert trace in texts


def test_policies_are_different_flags_of_the_engine():
    configs = [EngineConfig.from_flags(**flags) for flags in compare.POLICIES.values()]
    assert len(set(map(repr, configs))) == 3


def test_policies_are_compared(tmp_path, monkeypatch, capsys):
    flags = {"forecast": {}, "greedy": {"max_seqs_per_forward": 2}}
    monkeypatch.setattr(compare, "POLICIES", flags)
    plot = tmp_path / "use.svg"
    words = ["policies=forecast,greedy", "traces=chat", "caches=4096,8192", "size=0.005"]
    assert main(["compare", *words, "cost=fixed:0.01", "jobs=1", f"plot={plot}"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split("|")[2].strip() for line in lines] == [
        "cache tokens",
        "-----------:",
        "4096",
        "8192",
    ]
    cells = json.loads(last)["cells"]
    assert [(cell["cache_tokens"], cell["policy"]) for cell in cells] == [
        (4096, "forecast"),
        (4096, "greedy"),
        (8192, "forecast"),
        (8192, "greedy"),
    ]
    assert cells[1]["makespan_s"] > cells[0]["makespan_s"]
    assert cells[1]["mean_batch_size"] < 2
    assert json.loads(last)["forecast_behind"] == 0
    assert json.loads(last)["sizes_ahead_of_all"] == {"chat": 2}
    assert plot.read_text().count("<polyline") == 2


def test_throughput_grows_with_replicas_until_the_server_is_busy(tmp_path, capsys):
    plot = tmp_path / "scaling.svg"
    words = ["replicas=1,4", "seats=16", "cost=fixed:0.005", "request_us=1000", f"plot={plot}"]
    assert main(["scaling", *words]) == 0
    cells = {(cell["replicas"], cell["server"]): cell for cell in last_line(capsys)["cells"]}
    one, four = cells[1, "free"], cells[4, "free"]
    # 16 sequences, and a step of 5 ms.
    assert 2500 < one["tokens_per_s"] <= 3200
    assert 3.6 < four["tokens_per_s"] / one["tokens_per_s"] < 4.4
    assert four["server_busy"] == 0
    # 4 replicas end about 200 requests a second. A server that takes 1 ms for each begins 1,000;
    # one that takes 20 ms begins 50.
    assert cells[4, "charged"]["tokens_per_s"] > 0.9 * four["tokens_per_s"]
    assert plot.read_text().count("<polyline") == 2
    assert main(["scaling", *words, "replicas=4,8", "request_us=20000"]) == 0
    cells = {(cell["replicas"], cell["server"]): cell for cell in last_line(capsys)["cells"]}
    slow = cells[4, "charged"]
    assert slow["server_busy"] > 0.99
    assert slow["tokens_per_s"] < 0.6 * four["tokens_per_s"]
    assert (8, "charged") not in cells


def test_the_router_keeps_conversations_where_they_are_cached(tmp_path, capsys):
    plot = tmp_path / "routing.svg"
    words = ["replicas=2", "clients=24", "seats=32", "cache_tokens=32768", "pause_s=1"]
    policies = "policies=router,round_robin,sticky"
    spans = ["warm_up_s=6", "span_s=6", "sizes=1,4", "jobs=1", f"plot={plot}"]
    assert main(["routing", *words, policies, *spans]) == 0
    found = last_line(capsys)
    cells = {cell["policy"]: cell for cell in found["cells"]}
    assert cells.keys() == {"router", "round_robin", "sticky"}
    assert cells["router"]["cached_share"] > cells["round_robin"]["cached_share"] + 0.1
    assert cells["router"]["request_s"] < 0.95 * cells["round_robin"]["request_s"]
    assert all(0.8 < cell["least_share"] <= 1 for cell in cells.values())
    assert 0 < cells["router"]["request_s"] < cells["router"]["request_p95_s"]
    assert [each["replicas"] for each in found["router"]] == [1, 4]
    texts = [
        item.text for item in xml.etree.ElementTree.parse(plot).iter() if item.tag.endswith("text")
    ]
    assert {"Tokens a second", "\N{BLACK SQUARE} sticky"} <= set(texts)


def test_conversations_are_the_same_in_any_order_and_each_turn_has_all_that_was_said():
    def hold(order: int) -> dict[int, list[int]]:
        """The prompts of three clients, of whom the one after the latest, or before it, is next."""
        clients = Conversations(3.0, 5.0, 512, 8192, seed=1)
        waiting = [clients.first() for _ in range(3)]
        prompts = {}
        while len(prompts) < 60:
            request = waiting.pop(0 if order > 0 else len(waiting) - 1)
            prompts[request.request_id] = request.prompt_ids.tolist()
            answer = np.array([request.request_id % 100] * 3, np.int32)
            pause_s, following = clients.following(request.request_id, answer)
            assert pause_s > 0
            waiting.append(following)
        return prompts

    first, second = hold(1), hold(-1)
    both = first.keys() & second.keys()
    assert len(both) > 10
    assert all(first[request_id] == second[request_id] for request_id in both)
    turns = [request_id for request_id in first if request_id % 256]
    assert len(turns) > 10
    for request_id in turns:
        said = [*first[request_id - 1], *[(request_id - 1) % 100] * 3]
        assert first[request_id][: len(said)] == said
        assert len(said) < len(first[request_id]) <= 8192 - 512


WRONG = {
    "routing clients=few": "clients=few: expected a whole number",
    "routing cache_tokens=4096": "cache_tokens=4096 is less than request_tokens=8192; raise",
    "routing plot=/nowhere/routing.svg": "plot=/nowhere/routing.svg",
    "scaling replicas=none": "replicas=none: expected a whole number",
    "scaling cost=slow": "cost=slow",
    "replay": "trace is required",
    "replay /nowhere.jsonl": "trace=/nowhere.jsonl: No such file",
    "replay TRACE cost=slow": "cost=slow: expected one of",
    "replay TRACE kv_cache_num_token=5": "the nearest is 'kv_cache_num_tokens'",
    "replay TRACE kv_cache_num_tokens=16": "line 1 of the trace: .*refuses",
    "replay TRACE plot=/nowhere/use.svg": "plot=/nowhere/use.svg",
    "trace kind=poem out=x": "kind='poem'.*sampling",
    "trace kind=chat out=/nowhere/x size=0.01": "out=/nowhere/x",
    "trace kind=chat out=x size=0": "size=0",
    "manager mix=hard": "mix='hard'",
    "manager running=many": "running=many: expected a whole number",
    "manager cost=slow": "cost=slow",
    "lookahead fixed=0": "fixed=0: expected a whole number",
    "compare policies=lucky": "policies=.*must be one of",
    "compare cost=slow": "cost=slow",
    "compare traces=chat policies=forecast caches=100 jobs=1": "caches=100: the longest request",
    "replai": "not a command; the commands are .*replay",
}


def test_the_error_of_a_wrong_command_line_names_what_is_wrong(trace, capsys):
    for line, complaint in WRONG.items():
        try:
            status = main([trace if word == "TRACE" else word for word in line.split()])
        except SystemExit as end:
            status = end.code
        printed = capsys.readouterr()
        assert (status, printed.out) == (2, ""), line
        assert printed.err.startswith("toka-bench"), line
        assert re.search(complaint, printed.err), line


def test_the_error_of_a_wrong_line_of_a_trace_names_the_line(trace, tmp_path, capsys):
    path = tmp_path / "wrong.jsonl"
    path.write_text(GOOD + GOOD.replace("9", "0"))
    assert main(["replay", str(path)]) == 2
    error = capsys.readouterr().err
    assert "line 2 of the trace" in error
    assert "prompt_tokens must be at least 1" in error


def test_help_lists_the_commands(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in COMMANDS)
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == printed


def test_every_command_has_help(capsys):
    for name in COMMANDS:
        with pytest.raises(SystemExit) as end:
            main([name, "--help"])
        printed = capsys.readouterr().out
        assert end.value.code == 0, name
        assert printed.startswith(f"toka-bench {name}: ")
        assert f"  toka-bench {name}" in printed  # an example


def test_tables_have_aligned_columns():
    rows = [("first", 1), ("b", 100)]
    assert table(("name", "count"), rows) == "name   count\nfirst      1\nb        100"
    assert markdown_table(("name", "count"), rows).splitlines() == [
        "| name  | count |",
        "| ----- | ----: |",
        "| first |     1 |",
        "| b     |   100 |",
    ]


def test_the_cost_of_each_kind_of_row_is_measured(capsys):
    assert main(["sampling", "num_rows=9", "vocab_size=700", "rounds=1"]) == 0
    result = last_line(capsys)
    assert result["rows"] == 9
    assert {"greedy", "top_k 50", "mixed", "logprobs 5"} < set(result["us_per_row"])
    assert min(result["us_per_row"].values()) > 0
