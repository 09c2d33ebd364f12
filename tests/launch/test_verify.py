"""``toka-verify`` on receipts of real engines: what it accepts, and what it says of a change."""

from __future__ import annotations

import copy
import io
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from checkpoints import edit_json, make_checkpoint
from safetensors.torch import load_file, save_file
from text_cartridges import save_cartridge

from tokasaurus import LLM, AsyncLLM, SamplingParams
from tokasaurus.errors import RequestError
from tokasaurus.launch.verify import _TAKEN_FLAGS, _flags_of, _params_of_all, main
from tokasaurus.model.worker.worker import Worker
from tokasaurus.receipts.form import sealed
from tokasaurus.text import receipts as text_receipts

pytestmark = pytest.mark.engine

SET_BY_REQUEST = ("deterministic", "max_n", "max_topk_logprobs")
PROMPT = [20, 21, 22, 23, 24] * 9
ASKED = SamplingParams(
    n=2,
    max_tokens=12,
    # Its seed is the engine's: no draw may end it sooner.
    ignore_eos=True,
    logprobs=2,
    prompt_logprobs=1,
    temperature=1.0,
    top_p=0.9,
    receipt=True,
)
SMALL = ("kv_cache_num_tokens=2048", "max_seqs_per_forward=4", "max_tokens_per_forward=16")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("receipts"), "llama", num_layers=2)


@pytest.fixture(scope="module")
def receipts(model):
    """Of a prompt among others, and of one with every kind of parameter."""
    forms = SamplingParams(
        seed=-3,
        max_tokens=20,
        stop=["the end"],
        min_tokens=2,
        frequency_penalty=0.5,
        repetition_penalty=1.1,
        logit_bias={65: 2.5},
        bad_words=["zz"],
        structured_outputs={"regex": "[a-z ]{5,15}"},
        receipt=True,
    )
    with LLM(model, page_size=16, kv_cache_num_tokens=4096) as llm:
        neighbours = [[30 + number] * 20 for number in range(6)]
        params = [ASKED, forms, *[SamplingParams(max_tokens=15)] * 6]
        outputs = llm.generate([PROMPT, PROMPT[:7], *neighbours], params, use_tqdm=False)
        assert outputs[2].receipt is None
        return [output.receipt for output in outputs[:2]]


@pytest.fixture
def receipt(receipts):
    return copy.deepcopy(receipts[0])


@pytest.fixture
def verify(tmp_path, capsys):
    """Runs the command on a receipt; returns its exit status and what it says."""

    def run(receipt, *flags):
        path = tmp_path / "receipt.json"
        path.write_text(receipt if isinstance(receipt, str) else json.dumps(receipt))
        status = main([str(path), *flags])
        said = capsys.readouterr()
        return status, said.out if status < 2 else said.err

    return run


def again(receipt):
    """The receipt as a forger writes it: with digests that fit."""
    return sealed(receipt)


def test_another_engine_verifies_it_with_other_limits(receipts, verify):
    for receipt in receipts:
        for flags in (("page_size=8", *SMALL), ("bump_city_population_me=T", "use_hydragen=F")):
            status, said = verify(receipt, *flags)
            assert (status, said.splitlines()[-1].partition(":")[0]) == (0, "verified"), said


@pytest.mark.long
def test_workers_that_share_layers_are_verified_by_others_of_their_number(model, verify):
    with LLM(model, tp_size=2, pp_size=2, cpu_threads=1, kv_cache_num_tokens=4096) as llm:
        (output,) = llm.generate([PROMPT], ASKED, use_tqdm=False)
    status, said = verify(output.receipt, *SMALL, "cpu_threads=1")
    assert (status, said.splitlines()[-1].partition(":")[0]) == (0, "verified"), said
    _, said = verify(output.receipt, *SMALL, "tp_size=1")
    assert "configuration.tp_size is 1 here, and 2 in the receipt" in said


def test_a_seed_that_the_engine_drew_is_in_the_receipt(receipt):
    assert ASKED.seed is None
    assert receipt["request"][0]["seed"].isdecimal()


def test_a_weight_that_changed_is_named(receipt, model, verify, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 0.25
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    status, said = verify(receipt, f"model={other}")
    assert status == 1
    assert "differs: weights: model.layers.1 differs\n" in said
    assert "the logprob of token" in said or "choice 0: token" in said


def test_shards_of_the_same_weights_verify(receipt, model, verify, tmp_path):
    other = make_checkpoint(tmp_path / "shards", "llama", num_layers=2, shards=3)
    assert not (other / "model.safetensors").exists()
    status, said = verify(receipt, f"model={other}", *SMALL)
    assert status == 0, said
    assert "note: environment.model" in said


def test_a_tokenizer_that_changed_is_named(receipt, model, verify, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    path = other / "tokenizer.json"
    fields = json.loads(path.read_text())
    vocabulary = fields["model"]["vocab"]
    vocabulary["x"], vocabulary["y"] = vocabulary["y"], vocabulary["x"]
    edit_json(path, model=fields["model"])
    status, said = verify(receipt, f"model={other}")
    assert status == 1
    assert "differs: the tokenizer is another\n" in said
    assert "weights" not in said


def test_a_sampling_field_that_was_changed_is_found(receipt, verify):
    receipt["request"][0]["temperature"] = 0.25
    status, said = verify(receipt)
    assert status == 1
    assert "altered: request does not fit its digest\n" in said
    status, said = verify(again(receipt))
    assert (status, "altered" in said) == (1, False)
    assert "the logprob of token" in said or ": token" in said


def test_a_token_that_was_changed_is_named(receipt, verify):
    tokens = receipt["answer"][0]["choices"][1]["token_ids"]
    before, tokens[4] = tokens[4], 7
    said_of_token = f"differs: choice 1: token 4 is {before} here, and 7 in the receipt\n"
    status, said = verify(receipt)
    assert status == 1
    assert "altered: answer does not fit its digest\n" in said
    assert said_of_token in said
    status, said = verify(again(receipt))
    assert (status, "altered" in said) == (1, False)
    assert said_of_token in said


def test_the_version_that_made_it_is_compared(receipt, verify, monkeypatch):
    monkeypatch.setattr(text_receipts, "__version__", "9.9.9")
    status, said = verify(receipt)
    made = receipt["engine"]["tokasaurus"]
    assert status == 1
    assert f"differs: engine.tokasaurus is 9.9.9 here, and {made} in the receipt\n" in said
    assert "not verified: 1 difference\n" in said


def test_another_configuration_is_named(receipt, verify):
    status, said = verify(receipt, "linear=plain")
    assert status == 1
    assert "differs: configuration.linear is plain here, and packed in the receipt\n" in said


def test_threads_are_told_and_decide_nothing(receipt, verify):
    threads = receipt["environment"]["threads"]
    status, said = verify(receipt, f"cpu_threads={3 - min(threads, 2)}")
    assert status == 0, said
    assert "note: environment.threads is" in said


def test_a_running_engine_verifies_what_it_answered_to_others(engine, verify):
    """Whole, in a stream and in a chat, while other requests run."""
    client = engine.client()
    text = {"model": "m", "prompt": ["A B C A B", "1 2 3"], "max_tokens": 24, "n": 2}
    chat = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 24}
    asked = {"receipt": True, "ignore_eos": True}
    stop = threading.Event()

    def neighbours():
        while not stop.is_set():
            client.completions.create(model="m", prompt="A B C A", max_tokens=30, n=3)

    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(neighbours)
        try:
            whole = client.completions.create(**text, extra_body={**asked, "logprobs": 1})
            stream = client.completions.create(**text, stream=True, extra_body={**asked, "seed": 5})
            *_, last = stream
            talk = client.chat.completions.create(**chat, extra_body=asked)
            for receipt in (whole.receipt, last.receipt, talk.receipt):
                status, said = verify(receipt, f"url={engine.url}")
                assert status == 0, said
        finally:
            stop.set()
        running.result()
    status, said = verify({"id": "x", "receipt": last.receipt}, f"url={engine.url}/v1")
    assert status == 0
    assert "verified: 96 tokens in 4 samples\n" in said
    # An engine of its own finds the same.
    status, said = verify(whole.receipt, "page_size=32", "kv_cache_num_tokens=4096")
    assert status == 0, said


def test_a_receipt_can_neither_set_other_flags_nor_move_the_cursor(receipt, verify):
    receipt["configuration"] |= {"trust_remote_code": True, "data_dir": "/", "dtype": "float32"}
    receipt["answer"][0]["choices"][0]["text"] += "\nverified: 7 tokens\x1b[2J"
    receipt["environment"]["\rverified"] = 1
    asked = _flags_of(receipt, _params_of_all(receipt))
    assert {word.partition("=")[0] for word in asked} <= {*_TAKEN_FLAGS, "model", *SET_BY_REQUEST}
    status, said = verify(again(receipt))
    assert status == 1
    assert not [line for line in said.splitlines() if line.startswith("verified")]
    assert not {"\x1b", "\r"} & set(said)


def test_the_name_of_a_model_cannot_move_the_cursor(receipt, monkeypatch, verify):
    said = io.StringIO()
    monkeypatch.setattr("sys.stderr", said)
    receipt["environment"]["model"] = "no/\x1b[2Jsuch/model"
    assert verify(again(receipt))[0] == 2
    assert "such/model" in said.getvalue()
    assert "\x1b" not in said.getvalue()


def test_another_model_at_the_address_is_named(engine, receipt, verify):
    status, said = verify(receipt, f"url={engine.url}")
    assert status == 1
    assert "differs: the tokenizer is another\n" in said
    assert "differs: model.config.hidden_size is" in said


def test_what_cannot_be_verified_has_status_2(
    engine, receipt, verify, tmp_path, monkeypatch, capsys
):
    def says(expected, *arguments):
        status, said = verify(*arguments)
        assert status == 2
        assert said.startswith("toka-verify: ")
        assert expected in said

    says("it is not JSON", "{oops")
    says("has no receipt", '{"id": "cmpl"}')
    says("is not complete", {key: receipt[key] for key in receipt if key != "answer"})
    says("reads 1", {**receipt, "receipt_version": 2})
    says("nothing listens", receipt, "url=http://127.0.0.1:9")
    says("url=ftp://x", receipt, "url=ftp://x")
    says("no such directory", receipt, f"model={tmp_path / 'nowhere'}")
    for field, value, expected in (
        ("oops", 1, "does not know: oops"),
        ("stream", True, "does not know: stream"),
        ("seed", "x", "seed"),
        ("logprobs", "x", "logprobs must be a whole number"),
        ("prompt_logprobs", [1], "prompt_logprobs must be a whole number"),
    ):
        changed = again({**receipt, "request": [{**receipt["request"][0], field: value}]})
        says(expected, changed)
        says(expected, changed, f"url={engine.url}")
    assert main([str(tmp_path / "missing.json")]) == 2
    assert main(["model=x"]) == 2
    assert main([]) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("{}"))
    assert main(["-"]) == 2
    assert "-: it has no receipt" in capsys.readouterr().err


def test_a_worker_without_deterministic_results_gives_none(model, monkeypatch, receipt, verify):
    monkeypatch.setattr(Worker, "is_deterministic", False)
    monkeypatch.setattr(Worker, "determinism_reason", "attention=reference")
    with LLM(model, kv_cache_num_tokens=2048) as llm:
        with pytest.raises(RequestError, match="attention=reference; start it with determ") as no:
            llm.generate(PROMPT, ASKED, use_tqdm=False)
        assert no.value.field == "receipt"
    status, said = verify(receipt)
    assert status == 2
    assert "attention=reference" in said


async def _whole_and_stream(model):
    params = SamplingParams(seed=3, max_tokens=10, receipt=True)
    async with AsyncLLM(model, kv_cache_num_tokens=2048) as llm:
        whole = await llm.generate(PROMPT, params)
        outputs = [output async for output in llm.generate(PROMPT, params)]
    return whole, outputs


def test_an_event_loop_gets_the_same_receipt(model, verify):
    import asyncio

    whole, outputs = asyncio.run(_whole_and_stream(model))
    assert [output.receipt is None for output in outputs] == [True] * (len(outputs) - 1) + [False]
    assert outputs[-1].receipt == whole.receipt
    status, said = verify(whole.receipt, *SMALL)
    assert status == 0, said


def test_new_weights_are_in_the_next_receipt(model, tmp_path, verify):
    other = shutil.copytree(model, tmp_path / "other")
    torch.manual_seed(5)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 0.5
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with LLM(model, kv_cache_num_tokens=2048) as llm:
        before = llm.generate(PROMPT, ASKED, use_tqdm=False)[0].receipt
        llm.update_weights(other)
        after = llm.generate(PROMPT, ASKED, use_tqdm=False)[0].receipt
    assert before["model"]["weights"]["digest"] != after["model"]["weights"]["digest"]
    status, said = verify(after, f"model={other}", *SMALL)
    assert status == 0, said
    status, said = verify(after, f"model={model}", *SMALL)
    assert status == 1
    assert "weights: model.norm.weight differs" in said


# --- cartridges -----------------------------------------------------------------------------------


def test_a_receipt_of_a_request_with_cartridges_is_verified_with_their_files(
    model, tmp_path, verify
):
    first = save_cartridge(model, PROMPT[:21], tmp_path / "first.safetensors")
    second = save_cartridge(model, PROMPT[21:30], tmp_path / "second.safetensors")
    files = [str(first), str(second)]
    flags = {"cartridge_dir": str(tmp_path), "page_size": 16, "kv_cache_num_tokens": 4096}
    with LLM(model, **flags) as llm:
        outputs = llm.generate([PROMPT], ASKED, use_tqdm=False, cartridges=files)
    receipt = outputs[0].receipt
    assert len(receipt["request"][0]["cartridges"]) == 2
    named = f"cartridges={','.join(files)}"
    status, said = verify(receipt, *SMALL, named)
    assert (status, said) == (0, "verified: 24 tokens in 2 samples\n")
    status, said = verify(receipt, *SMALL, f"cartridges={','.join(reversed(files))}")
    assert status == 1
    assert "cartridges" in said
    for given, problem in ((), "0 are given"), ((f"cartridges={first}",), "1 are given"):
        status, said = verify(receipt, *SMALL, *given)
        assert status == 2
        assert problem in said
        assert "cartridges=FILE" in said


def test_cartridges_for_a_receipt_without_any_are_refused(receipt, verify):
    status, said = verify(receipt, *SMALL, "cartridges=a.pt")
    assert status == 2
    assert "has no cartridges" in said
