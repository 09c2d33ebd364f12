"""The tuner's decisions, with engines that are formulas: which trials run, and what is kept."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from tuning_samples import DEMAND, Formula, here, tuner

from tokasaurus.config.engine import EngineConfig
from tokasaurus.errors import ConfigError
from tokasaurus.planner.candidates import Layout
from tokasaurus.planner.search import Search
from tokasaurus.tuning.sizing import sized
from tokasaurus.tuning.space import coordinates_of, layouts_here, planned, start_of
from tokasaurus.tuning.trial_log import TrialLog
from tokasaurus.tuning.tuned_file import write_tuned

PREMISES = {"version": "1", "num_sequences": 200}


def rate(flags):
    """The most with 64 sequences, 512 tokens, and two replicas of two threads."""
    found = 1000.0
    for name, best in (("max_seqs_per_forward", 64), ("max_tokens_per_forward", 512)):
        found -= 40 * abs(math.log2(flags.get(name, 4096) / best))
    found += 100 * ((flags.get("dp_size"), flags.get("cpu_threads")) == (2, 2))
    return found + 50 * (flags.get("dp_size") == 2)


def search(directory, each, machine=None, log=None, **flags):
    machine = machine or here()
    plan = Search(planned(each.question), DEMAND, max_simulations=1).run()
    start = start_of(plan.best, machine, flags)
    layouts = layouts_here(each.question, plan, machine)
    log = log or TrialLog(directory / "log", PREMISES)
    return each.tune(start, coordinates_of(start, layouts, machine), DEMAND, log)


def test_the_best_setting_is_found_measured_again_and_compared_with_the_defaults(tmp_path):
    each = tuner(tmp_path, rate)
    result = search(tmp_path, each)
    assert result.is_complete
    chosen = {
        name: result.flags[name]
        for name in ("max_seqs_per_forward", "max_tokens_per_forward", "dp_size", "cpu_threads")
    }
    assert chosen == {
        "max_seqs_per_forward": 64,
        "max_tokens_per_forward": 512,
        "dp_size": 2,
        "cpu_threads": 2,
    }
    assert result.best.measured.tokens_per_s == pytest.approx(1150)
    assert result.best.name.endswith(" (again)")
    assert result.defaults.name == "the engine's defaults (again)"
    assert result.rows[0].name == "the engine's defaults"
    config = EngineConfig.from_flags(**result.flags)  # an engine takes them
    # No more KV cache than all 64 sequences of 96 tokens can fill, in whole pages of 64.
    assert config.kv_cache_num_tokens == 64 * 128
    assert {tuple(task.trace) for task in each.run.tasks} == {tuple(DEMAND.trace)}


def test_a_lucky_setting_that_is_slower_than_the_defaults_afterwards_is_not_written(tmp_path):
    seen = []

    def lucky_once(flags):
        if "max_seqs_per_forward" not in flags:
            return 500.0
        seen.append(flags)
        return 900.0 if len(seen) == 1 else 300.0

    result = search(tmp_path, tuner(tmp_path, lucky_once))
    assert result.best is result.defaults
    assert "max_seqs_per_forward" not in result.flags


def test_a_second_search_measures_nothing_anew(tmp_path):
    first = tuner(tmp_path, rate)
    result = search(tmp_path, first)
    second = tuner(tmp_path, rate)
    again = search(tmp_path, second)
    assert len(first.run.tasks) > 8
    assert second.run.tasks == []
    assert again == result


def test_a_search_that_ran_out_of_time_goes_on(tmp_path):
    class Interrupted(Formula):
        def __call__(self, *arguments):
            if len(self.tasks) == 5:
                raise KeyboardInterrupt
            return super().__call__(*arguments)

    stopped = tuner(tmp_path, rate, run=Interrupted(rate))
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path, stopped)
    whole, rest = tuner(tmp_path, rate), tuner(tmp_path, rate)
    resumed = search(tmp_path, rest)
    expected = search(tmp_path, whole, log=TrialLog(tmp_path / "other", PREMISES))
    assert len(rest.run.tasks) == len(whole.run.tasks) - 5
    assert resumed == expected


def test_without_time_nothing_but_an_error_comes(tmp_path):
    with pytest.raises(ConfigError, match="max_s=0 leaves no time"):
        search(tmp_path, tuner(tmp_path, rate, max_s=0))


def test_without_time_for_more_than_the_defaults_it_is_said_and_the_next_search_has_them(tmp_path):
    def run(task, ready_s, run_s):
        each.max_s = 0
        each.__post_init__()  # the first trial has taken all time
        return Formula(rate)(task, ready_s, run_s)

    each = tuner(tmp_path, rate, run=run)
    with pytest.raises(ConfigError, match="max_s=0 leaves no time for a trial beside"):
        search(tmp_path, each)
    assert TrialLog(tmp_path / "log", PREMISES).num_found == 1


def test_when_no_setting_runs_the_reasons_are_told(tmp_path):
    with pytest.raises(ConfigError, match="no setting runs:\nthe weights are missing"):
        search(tmp_path, tuner(tmp_path, lambda _: "the weights are missing"))


def test_decided_flags_are_in_every_trial_and_not_changed(tmp_path):
    flags = {"max_seqs_per_forward": 24, "dtype": "float32"}
    each = tuner(tmp_path, rate)
    each.question = dataclasses.replace(each.question, flags=flags, sizes={"tp_size": 1})
    search(tmp_path, each, **flags, tp_size=1)
    for task in each.run.tasks:
        assert (task.flags["max_seqs_per_forward"], task.flags["dtype"]) == (24, "float32")
        assert task.flags["tp_size"] == 1


@pytest.mark.parametrize("sizes", [{"dp_size": 2}, {"tp_size": 2}, {"dp_size": 2, "tp_size": 2}])
def test_a_decided_layout_of_a_machine_without_gpus_shares_its_cores(tmp_path, sizes):
    each = tuner(tmp_path, rate)
    each.question = dataclasses.replace(each.question, sizes=sizes)
    search(tmp_path, each, **sizes)
    defaults, first, *others = each.run.tasks
    assert first.flags["cpu_threads"] == 4 // math.prod(sizes.values())
    for task in (defaults, first, *others):
        assert {name: task.flags[name] for name in sizes} == sizes


def test_layouts_of_a_machine_without_gpus_share_its_cores(tmp_path):
    each = tuner(tmp_path, rate)
    plan = Search(each.question, DEMAND, max_simulations=1).run()
    found = layouts_here(each.question, plan, here(num_cores=4))
    assert found == [
        Layout(1, 1, 1),
        Layout(2, 1, 1),
        Layout(4, 1, 1),
        Layout(1, 2, 1),
        Layout(1, 4, 1),
    ]
    start = start_of(plan.best, here(), {})
    layouts = coordinates_of(start, found, here())[-1]
    assert [
        (each["dp_size"], each["tp_size"], each["cpu_threads"]) for each in layouts.options
    ] == [
        (1, 1, 4),
        (2, 1, 2),
        (4, 1, 1),
        (1, 2, 2),
        (1, 4, 1),
    ]


def test_a_run_takes_a_part_of_the_workload_that_lasts_as_long_as_asked(tmp_path):
    def sequences(tokens_per_s, predicted, run_s=1.0, **changes):
        each = tuner(tmp_path, lambda _: tokens_per_s, run_s=run_s, **changes)
        start = {"max_seqs_per_forward": 64, "max_tokens_per_forward": 512}
        path = tmp_path / "none"
        return sized(path, {}, each, start, predicted, fresh=False), len(each.run.tasks)

    assert sequences(320.0, 320.0) == (10, 1)  # answers of 32 tokens
    assert sequences(320.0, 3200.0) == (10, 1)
    # Much slower than predicted: the first parts take more than four times as long as they may.
    assert sequences(64.0, 32000.0) == (2, 3)
    assert sequences(1e9, 320.0) == (DEMAND.num_sequences, 1)
    with pytest.raises(ConfigError, match="the first setting does not run a part of the workload"):
        sequences(1.0, 3200.0)


def test_an_earlier_search_decides_the_part(tmp_path):
    path = tmp_path / "log"
    each = tuner(tmp_path, rate)
    TrialLog(path, {"version": "1", "num_sequences": 77})
    assert sized(path, {"version": "1"}, each, {}, 1.0, fresh=False) == 77
    assert each.run.tasks == []
    assert sized(path, {"version": "2"}, each, {}, 1.0, fresh=False) != 77
    assert sized(path, {"version": "1"}, each, {}, 1.0, fresh=True) != 77


def test_a_log_keeps_whole_lines_of_the_same_premises(tmp_path):
    path = tmp_path / "log"
    log = TrialLog(path, PREMISES)
    measured = Formula(rate)(tuner(tmp_path, rate)._task({}, DEMAND, 2), 1, 1e9)
    log.add("one", measured)
    log.add("two", measured)
    cut = path.read_text()[:-10]
    path.write_text(cut)  # the machine went down while the last line was written
    log = TrialLog(path, PREMISES)
    assert (log.num_found, log.get("one"), log.get("two")) == (1, measured, None)
    log.add("three", measured)
    log = TrialLog(path, PREMISES)
    assert (log.num_found, log.get("one"), log.get("three")) == (2, measured, measured)
    assert TrialLog(path, {**PREMISES, "version": "2"}).num_found == 0
    assert [*map(json.loads, path.read_text().splitlines())] == [
        {"premises": {**PREMISES, "version": "2"}}
    ]
    TrialLog(path, PREMISES).add("one", measured)
    assert TrialLog(path, PREMISES, fresh=True).num_found == 0


def test_the_file_is_what_config_reads_and_comments_are_ignored(tmp_path):
    path = tmp_path / "tuned.yaml"
    flags = {"model": "a model: 'x'", "max_seqs_per_forward": 64, "dp_size": 2}
    write_tuned(path, flags, ["measured: 5 tokens/s " * 20])
    assert EngineConfig.from_flags(config=str(path)) == EngineConfig.from_flags(**flags)
    assert max(map(len, path.read_text().splitlines())) <= 100
    assert [each.name for each in tmp_path.iterdir()] == ["tuned.yaml"]
    with pytest.raises(ConfigError, match=r"out=.*: No such file or directory; set another"):
        write_tuned(tmp_path / "none" / "tuned.yaml", flags, [])
