"""What differs between two receipts is said in plain words."""

from __future__ import annotations

import pytest
from example_receipt import example_receipt

from tokasaurus.receipts.comparison import differences


def in_answer(receipt):
    return receipt["answer"][0]["choices"][1]


def set_part(receipt, **parts):
    receipt["model"]["weights"] |= {"digest": "other", "parts": parts}


def cut(receipt):
    in_answer(receipt)["token_ids"] = [1, 2]


CHANGES = {
    "weights: model.layers.1 differs": lambda r: set_part(
        r, **{**r["model"]["weights"]["parts"], "model.layers.1": "b1"}
    ),
    "weights: model.layers.0, model.layers.1 differ; only the receipt has lm_head.weight;"
    " only this engine has head": lambda r: set_part(
        r, **{"model.layers.0": "b0", "model.layers.1": "b1", "head": "a2"}
    ),
    "weights: lm_head.weight differs": lambda r: r["model"]["weights"]["parts"].update(
        {"lm_head.weight": "b2"}
    ),
    "model.tokenizer.more is 1 here, and missing in the receipt": lambda r: r["model"][
        "tokenizer"
    ].update(more=1),
    "choice 1.more is 1 here, and missing in the receipt": lambda r: in_answer(r).update(more=1),
    "answer.more is 1 here, and missing in the receipt": lambda r: r["answer"][0].update(more=1),
    "the tokenizer is another": lambda r: r["model"]["tokenizer"].update(digest="other"),
    "the chat template is another": lambda r: r["model"]["tokenizer"].update(chat_template="x"),
    "model.config.rms_norm_eps is 1e-06 here, and 1e-05 in the receipt": lambda r: r["model"][
        "config"
    ].update(rms_norm_eps=1e-6),
    "engine.tokasaurus is 1.2.4 here, and 1.2.3 in the receipt": lambda r: r["engine"].update(
        tokasaurus="1.2.4"
    ),
    "engine.kernels.attention is missing here, and {'source': 'dd'} in the receipt": lambda r: r[
        "engine"
    ].update(kernels={}),
    "engine.kernels.other is 7 here, and missing in the receipt": lambda r: r["engine"][
        "kernels"
    ].update(other=7),
    "configuration.dtype is bfloat16 here, and float32 in the receipt": lambda r: r[
        "configuration"
    ].update(dtype="bfloat16"),
    "configuration.torch_compile is 0 here, and False in the receipt": lambda r: r[
        "configuration"
    ].update(torch_compile=0),
    "request.top_p is 0.8 here, and 0.9 in the receipt": lambda r: r["request"][0].update(
        top_p=0.8
    ),
    "request: prompt token 2 is 8 here, and 7 in the receipt": lambda r: r["request"][0].update(
        prompt_ids=[5, 6, 8]
    ),
    "choice 1: token 1 is 9 here, and 2 in the receipt": lambda r: in_answer(r).update(
        token_ids=[1, 9, 9], text="other"
    ),
    "choice 1: token 2 is missing here, and 3 in the receipt": cut,
    "choice 1: finish_reason is stop here, and length in the receipt": lambda r: in_answer(
        r
    ).update(finish_reason="stop"),
    "choice 1: text is other here, and naïve \U0001f600 in the receipt": lambda r: in_answer(
        r
    ).update(text="other"),
    "choice 1: the logprob of token 1 is -1.0000001192092896 here, and -1.0 in the receipt": (
        lambda r: in_answer(r)["logprobs"].update(chosen="bf000000bf800001c0000000")
    ),
    "choice 1: the likeliest tokens or their logprobs differ, at token 2": lambda r: in_answer(r)[
        "logprobs"
    ].update(top_ids=[[1], [2], [4]]),
    "choice 1: logprobs are only in the receipt": lambda r: in_answer(r).pop("logprobs"),
    "choice 1 is only in the receipt": lambda r: r["answer"][0]["choices"].pop(),
    "prompt: the logprob of token 1 is -1.0 here, and -0.5 in the receipt": lambda r: r["answer"][
        0
    ]["prompt_logprobs"].update(chosen="bf800000"),
}


@pytest.mark.parametrize("said", CHANGES)
def test_a_difference_is_named(said):
    again = example_receipt()
    CHANGES[said](again)
    (found,) = differences(example_receipt(), again)
    assert (found.text, found.decides) == (said, True)


def test_the_environment_is_told_and_decides_nothing():
    again = example_receipt()
    again["environment"] |= {"threads": 8, "model": "m"}
    assert [(each.text, each.decides) for each in differences(example_receipt(), again)] == [
        ("environment.threads is 8 here, and 2 in the receipt", False),
        ("environment.model is m here, and missing in the receipt", False),
    ]


def test_equal_receipts_have_no_difference_and_prompts_are_numbered():
    assert differences(example_receipt(), example_receipt()) == []
    one, other = example_receipt(), example_receipt()
    for receipt in (one, other):
        for section in ("request", "answer"):
            receipt[section] = [*receipt[section], *example_receipt()[section]]
    other["request"][1]["top_p"] = 1
    in_answer({"answer": [other["answer"][1]]})["token_ids"][0] = 4
    assert [each.text for each in differences(one, other)] == [
        "request 1.top_p is 1 here, and 0.9 in the receipt",
        "prompt 1, choice 1: token 0 is 4 here, and 1 in the receipt",
    ]


def test_of_long_values_the_part_that_differs_is_shown():
    one, other = example_receipt(), example_receipt()
    one["engine"]["flags"] = f"{'-O3 ' * 30}-mavx2{' -x' * 30}"
    other["engine"]["flags"] = f"{'-O3 ' * 30}-mamx{' -x' * 30}"
    (difference,) = differences(one, other)
    here, there = difference.text.split(" here, and ")
    assert ("-mamx" in here, "-mavx2" in there) == (True, True), difference.text
    assert len(difference.text) < 200
