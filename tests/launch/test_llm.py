"""The embedded engine as a user of vLLM's offline API would use it."""

from __future__ import annotations

import dataclasses
import math
import shutil
import signal
import threading

import pytest
from checkpoints import make_checkpoint
from safetensors.numpy import load_file, save_file

from tokasaurus import LLM, SamplingParams
from tokasaurus.errors import ConfigError, Conflict, EngineDead, ModelError, RequestError

pytestmark = pytest.mark.engine

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llm")
    make_checkpoint(directory, "llama", seed=3, num_heads=4, num_kv_heads=2, tied=True)
    return directory


@pytest.fixture(scope="module")
def llm(model):
    with LLM(model, kv_cache_num_tokens=4096, max_seqs_per_forward=32) as engine:
        yield engine


def test_prompts_of_strings_and_ids_are_answered_in_order(llm):
    prompts = ["one", [20, 21, 22], "three", [23]]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [output.prompt for output in outputs] == ["one", None, "three", None]
    assert outputs[1].prompt_token_ids == [20, 21, 22]
    assert outputs[0].prompt_token_ids == llm.get_tokenizer().encode("one")
    for prompt, output in zip(prompts, outputs, strict=True):
        alone = llm.generate(prompt, GREEDY, use_tqdm=False)
        assert len(alone) == 1
        assert alone[0].outputs == output.outputs


def test_parameters_for_each_prompt(llm):
    params = [SamplingParams(max_tokens=k, n=k, ignore_eos=True) for k in (1, 2, 3)]
    outputs = llm.generate(["a", "b", "c"], params, use_tqdm=False)
    for k, output in zip((1, 2, 3), outputs, strict=True):
        assert [sample.index for sample in output.outputs] == list(range(k))
        assert {len(sample.token_ids) for sample in output.outputs} == {k}
        assert {sample.finish_reason for sample in output.outputs} == {"length"}
    with pytest.raises(RequestError, match="3 sampling_params for 2 prompts"):
        llm.generate(["a", "b"], params, use_tqdm=False)


@pytest.mark.parametrize("stop", [None, ["a", "e"]])
def test_first_k_samples_are_those_of_the_whole(llm, stop):
    """The manager cancels the others; those that remain are the same as without first_k."""
    params = SamplingParams(
        n=8, max_tokens=40, seed=5, stop=stop, ignore_eos=True, prompt_logprobs=1, priority=-3
    )
    prompts = ["one", "and another"]
    wholes = llm.generate(prompts, params, use_tqdm=False)
    firsts = llm.generate(prompts, dataclasses.replace(params, first_k=3), use_tqdm=False)
    for whole, first in zip(wholes, firsts, strict=True):
        assert len(first.outputs) == 3
        assert [sample.index for sample in first.outputs] == sorted(
            {sample.index for sample in first.outputs}
        )
        for sample in first.outputs:
            assert sample == whole.outputs[sample.index]
        assert len(first.prompt_logprobs) == len(first.prompt_token_ids)
        lengths = sorted(len(sample.token_ids) for sample in whole.outputs)
        assert sorted(len(sample.token_ids) for sample in first.outputs) == lengths[:3]
    assert llm.generate("still works", GREEDY, use_tqdm=False)[0].finished


def test_no_prompts_give_no_outputs(llm):
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_logprobs_have_ranks_and_texts(llm):
    params = SamplingParams(
        temperature=0.0, max_tokens=5, ignore_eos=True, logprobs=3, prompt_logprobs=2
    )
    output = llm.generate([[20, 21, 22, 23]], params, use_tqdm=False)[0]
    sample = output.outputs[0]
    for token_id, entry in zip(sample.token_ids, sample.logprobs, strict=True):
        assert entry[token_id].rank == 1
        assert sorted(value.rank for value in entry.values()) == [1, 2, 3]
        assert entry[token_id].decoded_token == llm.get_tokenizer().token_text(token_id)
    chosen = [e[t].logprob for e, t in zip(sample.logprobs, sample.token_ids, strict=True)]
    assert math.isclose(sum(chosen), sample.cumulative_logprob, rel_tol=1e-5)
    assert output.prompt_logprobs[0] is None
    assert [
        set(entry) >= {i} for i, entry in zip((21, 22, 23), output.prompt_logprobs[1:], strict=True)
    ]


def test_a_stop_string_ends_the_text_and_is_left_out(llm):
    whole = llm.generate("stop", GREEDY, use_tqdm=False)[0].outputs[0]
    stop = whole.text[3:6]
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop=stop)
    cut = llm.generate("stop", params, use_tqdm=False)[0].outputs[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert whole.token_ids[: len(cut.token_ids)] == cut.token_ids


def test_chat_uses_the_chat_template(llm):
    one = [{"role": "user", "content": "hello"}]
    single = llm.chat(one, GREEDY, use_tqdm=False)
    several = llm.chat([one, one], GREEDY, use_tqdm=False)
    assert len(single) == 1
    assert [output.outputs for output in several] == [single[0].outputs] * 2
    assert single[0].prompt_token_ids == llm.get_tokenizer().render_chat(one)


def test_a_wrong_prompt_is_named_and_nothing_is_generated(llm):
    with pytest.raises(RequestError, match="prompt number 1") as refused:
        llm.generate(["fine", [10**6]], GREEDY, use_tqdm=False)
    assert refused.value.field == "prompt"
    with pytest.raises(RequestError, match="top_p"):
        SamplingParams(top_p=-0.1)
    assert llm.generate("fine", GREEDY, use_tqdm=False)[0].finished


def test_the_engine_is_usable_after_an_interrupt(llm, monkeypatch):
    before = llm.generate("again", GREEDY, use_tqdm=False)[0].outputs
    endless = SamplingParams(max_tokens=400, n=20, ignore_eos=True)
    timers = [threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])]
    step = llm._engine.step

    def step_after_timer():
        while timers:  # it begins when nothing but the engine can be interrupted
            timers.pop().start()
        step()

    with monkeypatch.context() as patch:
        patch.setattr(llm._engine, "step", step_after_timer)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["again"] * 20, endless, use_tqdm=False)
    assert llm.generate("again", GREEDY, use_tqdm=False)[0].outputs == before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_failed_batch_ends_the_engine(model, monkeypatch):
    engine = LLM(model, kv_cache_num_tokens=512)

    def fail(batch):
        raise RuntimeError("the device is on fire")

    monkeypatch.setattr(engine._engine._worker, "submit", fail)
    with pytest.raises(RuntimeError, match="on fire"):
        engine.generate("a", GREEDY, use_tqdm=False)
    with pytest.raises(EngineDead):
        engine.generate("a", GREEDY, use_tqdm=False)


def test_progress_is_shown_when_asked_for(llm, capsys):
    llm.generate(["a", "b"], GREEDY)
    assert "2/2" in capsys.readouterr().err
    llm.generate(["a", "b"], GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""


def test_wrong_flags_and_models_are_errors(model, tmp_path):
    with pytest.raises(ConfigError, match="page_size"):
        LLM(model, page_sise=16)
    with pytest.raises(ModelError, match=r"config\.json"):
        LLM(tmp_path)


def test_a_closed_engine_is_dead(model):
    engine = LLM(model, kv_cache_num_tokens=512)
    engine.close()
    with pytest.raises(EngineDead, match="closed"):
        engine.generate("a", GREEDY, use_tqdm=False)


# --- control --------------------------------------------------------------------------------------


@pytest.fixture
def own(model, tmp_path):
    """An engine of its own, and the directory of its weights, which a test may replace."""
    directory = shutil.copytree(model, tmp_path / "own")
    with LLM(directory, kv_cache_num_tokens=4096) as engine:
        yield engine, directory


def other_weights(model, directory):
    """Writes weights of the same shapes with other values; returns the directory."""
    directory.mkdir(exist_ok=True)
    tensors = load_file(model / "model.safetensors")
    changed = {name: tensor[..., ::-1].copy() for name, tensor in tensors.items()}
    save_file(changed, directory / "model.safetensors")
    return directory


def test_an_engine_that_sleeps_refuses_to_generate_and_wakes_up_unchanged(llm):
    before = llm.generate("again", GREEDY, use_tqdm=False)[0].outputs
    for level in (0, 1, 2):
        llm.sleep(level)
        for use in (llm.generate, llm.embed):
            with pytest.raises(Conflict, match=r"asleep.*wake_up\(\)"):
                use("again", use_tqdm=False)
        llm.wake_up()
        assert llm.generate("again", GREEDY, use_tqdm=False)[0].outputs == before, level


def test_the_engine_wakes_up_when_the_last_memory_is_restored(llm):
    llm.sleep()
    llm.wake_up(["weights"])
    with pytest.raises(Conflict, match="asleep"):
        llm.generate("again", GREEDY, use_tqdm=False)
    llm.wake_up(["kv_cache"])
    assert llm.generate("again", GREEDY, use_tqdm=False)[0].finished


def test_wrong_levels_tags_and_paths_name_their_argument(llm, tmp_path):
    wrong = [
        (llm.sleep, 3, "level"),
        (llm.wake_up, ["wieghts"], "tags"),
        (llm.wake_up, "weights", "tags"),
        (llm.update_weights, tmp_path / "absent", "path"),
        (llm.update_weights, tmp_path, "path"),
        (llm.update_weights, [], "path"),
    ]
    for call, argument, field in wrong:
        with pytest.raises(RequestError, match=rf"^{field}\b") as refused:
            call(argument)
        assert refused.value.field == field
    assert llm.generate("again", GREEDY, use_tqdm=False)[0].finished


def test_new_weights_come_between_two_calls(own, model, tmp_path):
    engine, _ = own
    old = engine.generate("again", GREEDY, use_tqdm=False)[0].outputs[0]
    other = other_weights(model, tmp_path / "other")
    assert engine.update_weights(other) == 1
    new = engine.generate("again", GREEDY, use_tqdm=False)[0].outputs[0]
    assert new.token_ids != old.token_ids
    assert (old.weights_versions, new.weights_versions) == ([(0, 12)], [(1, 12)])
    assert engine.update_weights([str(model / "model.safetensors")]) == 2
    again = engine.generate("again", GREEDY, use_tqdm=False)[0].outputs[0]
    assert again.token_ids == old.token_ids


def test_weights_that_do_not_fit_are_refused_and_change_nothing(own, tmp_path):
    engine, directory = own
    old = engine.generate("again", GREEDY, use_tqdm=False)[0].outputs
    tensors = load_file(directory / "model.safetensors")
    tensors.popitem()
    save_file(tensors, tmp_path / "part.safetensors")
    with pytest.raises(RequestError, match="lack"):
        engine.update_weights(tmp_path / "part.safetensors")
    assert engine.generate("again", GREEDY, use_tqdm=False)[0].outputs == old
    engine.sleep()
    engine.update_weights(directory)  # it restores the weights, and not the KV cache
    with pytest.raises(Conflict, match="asleep"):
        engine.generate("again", GREEDY, use_tqdm=False)
    engine.wake_up()
    new = engine.generate("again", GREEDY, use_tqdm=False)[0].outputs
    assert [each.token_ids for each in new] == [each.token_ids for each in old]


def test_an_engine_whose_files_are_gone_wakes_up_after_an_update(own, model, tmp_path):
    engine, directory = own
    engine.sleep()
    (directory / "model.safetensors").unlink()
    with pytest.raises(Conflict, match="update"):
        engine.wake_up()
    with pytest.raises(Conflict, match="asleep"):
        engine.generate("again", GREEDY, use_tqdm=False)
    engine.update_weights(other_weights(model, tmp_path / "other"))
    engine.wake_up()
    output = engine.generate("again", GREEDY, use_tqdm=False)[0].outputs[0]
    assert output.weights_versions == [(1, 12)]


def test_reset_prefix_cache_drops_the_pages_of_a_prompt(llm):
    prompt = "a prompt of several pages " * 8
    cached = []
    for reset in (False, False, True):
        if reset:
            llm.reset_prefix_cache()
        cached.append(llm.generate(prompt, GREEDY, use_tqdm=False)[0].num_cached_tokens > 0)
    assert cached == [False, True, False]


def test_an_interrupt_waits_for_a_command(own, monkeypatch):
    engine, directory = own
    step = engine._engine.step

    def interrupted_step():
        signal.raise_signal(signal.SIGINT)
        step()

    with monkeypatch.context() as patch:
        patch.setattr(engine._engine, "step", interrupted_step)
        with pytest.raises(KeyboardInterrupt):
            engine.update_weights(directory)
    output = engine.generate("again", GREEDY, use_tqdm=False)[0].outputs[0]
    assert output.weights_versions == [(1, 12)]
