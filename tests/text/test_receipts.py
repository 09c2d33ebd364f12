"""Receipts of the text core, on the fake engine."""

from __future__ import annotations

import dataclasses
import json
import os

import msgspec
import pytest
import torch
from fake_engine import (
    CONFIG,
    EOS_ID,
    IDENTITY,
    TOKENIZER,
    VOCAB_SIZE,
    FakeEngine,
    make_wrapped,
    updates,
)
from rows import check_each
from safetensors.torch import save_file

from tokasaurus.errors import RequestError
from tokasaurus.launch.verify import _params_of
from tokasaurus.protocol.commands import AbortAll
from tokasaurus.protocol.identity import WeightFile
from tokasaurus.protocol.messages import FinishReason
from tokasaurus.receipts.form import altered_parts, checked
from tokasaurus.text.generations import Generations
from tokasaurus.text.params import SamplingParams
from tokasaurus.text.preparation import Preparer
from tokasaurus.text.receipts import Receipts
from tokasaurus.text.tokenizer import Tokenizer

PROMPT = [10, 11, 12]
ASKED = SamplingParams(n=2, seed=4, max_tokens=9, logprobs=1, receipt=True)


class Core:
    """A text core whose answers have receipts."""

    def __init__(self, *workers):
        self.fake = FakeEngine()
        self.receipts = Receipts(CONFIG, TOKENIZER)
        self.receipts.adopt(workers or (IDENTITY,))
        self.preparer = Preparer(CONFIG, TOKENIZER, self.receipts)
        self.generations = Generations(CONFIG, TOKENIZER, self.fake.send, receipts=self.receipts)

    def start(self, params, **options):
        return self.generations.start(self.preparer.prepare(PROMPT, params), **options)

    def receipt(self, params=ASKED):
        """Of a whole answer."""
        generation = self.start(params)
        self.fake.run(self.generations)
        generation.take_all()
        return self.receipts.write([generation])


def worker(**changes):
    return msgspec.structs.replace(IDENTITY, **changes)


def test_a_receipt_has_the_request_and_the_answer():
    core = Core()
    receipt = checked(core.receipt())
    assert altered_parts(receipt) == []
    (request,) = receipt["request"]
    assert request["prompt_ids"] == PROMPT
    assert (request["n"], request["seed"], request["max_tokens"]) == (2, "4", 9)
    assert (request["temperature"], request["logprobs_mode"]) == (1.0, "temperature")
    assert not {"priority", "first_k", "receipt"} & request.keys()
    plain = core.start(dataclasses.replace(ASKED, receipt=False))
    core.fake.run(core.generations)
    outputs = plain.take_all()
    (answer,) = receipt["answer"]
    for choice, output in zip(answer["choices"], outputs, strict=True):
        assert (choice["index"], choice["text"]) == (output.index, output.text)
        assert (choice["token_ids"], choice["finish_reason"]) == (output.token_ids, "length")
        assert bytes.fromhex(choice["logprobs"]["chosen"]) == (
            output.logprobs.logprobs.astype(">f4").tobytes()
        )
    assert json.loads(json.dumps(receipt)) == receipt


def test_streams_and_wholes_have_the_same_receipt():
    core = Core()
    params = dataclasses.replace(ASKED, stop=["zz"], max_tokens=40)
    generation = core.start(params, stream=True)
    pieces = 0
    while not generation.finished:
        for message in core.fake.step():
            core.generations.absorb(message)
        pieces += len(generation.take_news())
    assert pieces > 4
    assert core.receipts.write([generation]) == core.receipt(params)


REQUESTS = {
    "a seed that was drawn": {},
    "greedy": {"temperature": 0},
    "numbers that are rounded": {"temperature": 1e-7, "top_p": 0, "top_k": -1, "min_p": 1},
    "the largest seed": {"seed": (1 << 63) - 1},
    "a negative seed": {"seed": -7},
    "penalties": {
        "frequency_penalty": 0.1,
        "presence_penalty": -2,
        "repetition_penalty": 1.3,
        "logit_bias": {70: -100, 71: 1e-3},
        "bad_words": ["the cat", "mat"],
    },
    "ends": {
        "stop": ["on", "</s>"],
        "stop_token_ids": [70, 69],
        "min_tokens": 3,
        "ignore_eos": True,
    },
    "no limit": {"max_tokens": None},
    "logprobs": {"logprobs": 0, "prompt_logprobs": 2, "logprobs_mode": "processed"},
    "a schema": {
        "structured_outputs": {
            "json": {"properties": {"z": {"type": "integer"}, "a": {"enum": ["é"]}}}
        }
    },
    "a grammar": {"structured_outputs": {"regex": "[a-z]+", "disable_any_whitespace": None}},
}


def test_a_receipt_asks_for_the_same_request_again():
    """Whatever was left out, rounded or spelled in another way."""
    core = Core()

    def check(name):
        prepared = core.preparer.prepare(PROMPT, SamplingParams(**REQUESTS[name], receipt=True))
        generation = core.generations.start(prepared)
        receipt = core.receipts._sections([generation], [[]], 0)
        (request,) = json.loads(json.dumps(receipt["request"]))
        again = core.preparer.prepare(request["prompt_ids"], SamplingParams(**_params_of(request)))
        core.generations.abort(generation)
        sent, sent_again = (
            msgspec.msgpack.encode(
                each.message(1, stream=False, client=""), enc_hook=lambda array: array.tolist()
            )
            for each in (prepared, again)
        )
        assert sent == sent_again

    check_each(REQUESTS, check)


def test_nothing_but_these_fields_is_left_out():
    """Everything else that a client may set is in the receipt, also what is still to come."""
    core = Core()
    (request,) = core.receipt()["request"]
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    assert fields - request.keys() == {"priority", "first_k", "receipt"}


def refusal(core, params=ASKED):
    with pytest.raises(RequestError) as raised:
        core.preparer.prepare(PROMPT, params)
    assert raised.value.field == "receipt"
    return raised.value.message


def test_an_engine_that_is_not_deterministic_gives_no_receipt():
    core = Core(worker(is_deterministic=False, determinism_reason="attention=reference"))
    message = refusal(core)
    assert "attention=reference" in message
    assert "deterministic=T" in message
    core.preparer.prepare(PROMPT, dataclasses.replace(ASKED, receipt=False))
    assert "not available" in refusal(type("", (), {"preparer": Preparer(CONFIG, TOKENIZER)}))


def test_replicas_must_compute_alike():
    assert "replicas" in refusal(Core(IDENTITY, worker(kernels={"a": 1})))
    unstable = worker(is_deterministic=False, determinism_reason="the second one")
    assert "the second one" in refusal(Core(IDENTITY, unstable))
    other_file = worker(weight_files=(WeightFile("a", 1, 2),))
    assert "replicas" in refusal(Core(worker(weight_files=(WeightFile("a", 1, 1),)), other_file))
    assert "digest" in Core(IDENTITY, worker()).receipt()


def test_the_samples_that_end_first_have_no_receipt():
    assert "first_k=1" in refusal(Core(), dataclasses.replace(ASKED, first_k=1))
    assert "digest" in Core().receipt(dataclasses.replace(ASKED, first_k=2))


def test_an_answer_that_a_command_ended_has_no_receipt():
    core = Core()
    core.fake.hold_at = 3
    generation = core.start(ASKED, stream=True)
    core.generations.command(AbortAll(), lambda result: None)
    core.fake.run(core.generations)
    generation.take_news()
    assert core.receipts.write([generation])["void"].startswith("a command ended")


def write_weights(path, seed=0):
    torch.manual_seed(seed)
    save_file({"model.layers.0.weight": torch.randn(2, 2)}, path)
    status = path.stat()
    return WeightFile(str(path), status.st_size, status.st_mtime_ns)


def test_new_weights_have_their_own_digest(tmp_path):
    first, second = (tmp_path / f"{name}.safetensors" for name in "ab")
    core = Core(worker(weight_files=(write_weights(first),)))
    before = core.receipt()
    write_weights(second, seed=1)
    core.generations.update_weights([str(second)], lambda result: None)
    # Since receipts are wanted, the files are read at once, and may go afterwards.
    core.receipts._weights[1].result()
    second.unlink()
    core.fake.run(core.generations)
    core.fake.weights_version = 1
    after = core.receipt()
    digests = [each["model"]["weights"]["digest"] for each in (before, after)]
    assert len({"random", *digests}) == 3
    assert (before["environment"]["weights_version"], after["environment"]["weights_version"]) == (
        0,
        1,
    )


def test_digests_of_old_versions_are_forgotten(tmp_path):
    core = Core()
    path = tmp_path / "a.safetensors"
    write_weights(path)
    for version in range(1, 30):
        core.receipts.note_update(version, [str(path)])
    assert list(core.receipts._weights) == list(range(22, 30))
    assert "nothing is known" in core.receipt()["void"]
    core.fake.weights_version = 29
    assert "digest" in core.receipt()


def test_an_answer_of_two_versions_has_no_receipt():
    core = Core()
    generation = core.start(dataclasses.replace(ASKED, n=1))
    (request,) = core.fake.requests
    for version, reason in ((0, FinishReason.RUNNING), (1, FinishReason.LENGTH)):
        row = (request, 0, [70, 71, 72], reason, 0, version)
        core.generations.absorb(updates([row]))
    generation.take_all()
    receipt = core.receipts.write([generation])
    assert receipt["void"].startswith("weights of several versions drew its tokens: 0, 1")


def test_files_that_have_changed_void_the_receipt(tmp_path):
    path = tmp_path / "model.safetensors"
    file = write_weights(path)
    write_weights(path, seed=1)
    os.utime(path, ns=(1, 1))  # the clock of the disk may not have moved on
    core = Core(worker(weight_files=(file,)))
    receipt = core.receipt()
    assert "have no digest" in receipt["void"]
    assert "changed since the engine read it" in receipt["void"]


def test_a_digest_is_read_only_when_a_receipt_is_wanted(tmp_path):
    file = write_weights(tmp_path / "model.safetensors")
    core = Core(worker(weight_files=(file,)))
    core.start(dataclasses.replace(ASKED, receipt=False))
    core.fake.run(core.generations)
    core.generations.update_weights([file.path], lambda result: None)
    core.fake.run(core.generations)
    assert not any(each._has_begun for each in core.receipts._weights.values())
    assert not core.receipts._tokenizer._has_begun


def test_a_tokenizer_that_differs_has_another_digest():
    """In a token's bytes, a special token, or the chat template alone."""
    digests = TOKENIZER.digests()
    wrapped = make_wrapped()
    assert Tokenizer(wrapped, VOCAB_SIZE, [EOS_ID]).digests() == digests
    wrapped.chat_template = "{{ messages }}"
    other = Tokenizer(wrapped, VOCAB_SIZE, [EOS_ID]).digests()
    assert other["digest"] == digests["digest"]
    assert other["chat_template"] != digests["chat_template"]
    wrapped.add_tokens(["<new>"])
    for changed in (
        Tokenizer(wrapped, VOCAB_SIZE, [EOS_ID]),
        Tokenizer(make_wrapped(), VOCAB_SIZE, [EOS_ID, 70]),
    ):
        assert changed.digests()["digest"] != digests["digest"]
