"""What SamplingParams accepts, and how it refuses the rest."""

from __future__ import annotations

import numpy as np
import pytest
from rows import each_row

from tokasaurus import SamplingParams
from tokasaurus.errors import RequestError
from tokasaurus.protocol.messages import LogprobsMode
from tokasaurus.text.params import renamed


@each_row(
    "field, value",
    [
        ("n", 0),
        ("n", 1 << 17),
        ("n", True),
        ("n", 1.5),
        ("n", None),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", 10**400),
        ("logit_bias", {5: 10**400}),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 0.5),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("seed", -(1 << 63) - 1),
        ("seed", 1 << 63),
        ("stop", 5),
        ("stop", [""]),
        ("stop", [5]),
        ("stop", ["x" * 2000]),
        ("stop", [str(i) for i in range(129)]),
        ("ignore_eos", 1),
        ("max_tokens", 0),
        ("logprobs", -1),
        ("prompt_logprobs", -1),
        ("logprobs_mode", "hot"),
        ("frequency_penalty", 2.5),
        ("frequency_penalty", float("nan")),
        ("frequency_penalty", None),
        ("presence_penalty", -2.5),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("inf")),
        ("min_tokens", -1),
        ("min_tokens", 1.5),
        ("stop_token_ids", 5),
        ("stop_token_ids", [1 << 40]),
        ("stop_token_ids", ["5"]),
        ("stop_token_ids", list(range(129))),
        ("logit_bias", [5]),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {1.5: 1}),
        ("logit_bias", {5: 101}),
        ("logit_bias", {5: float("nan")}),
        ("logit_bias", {5: 1, "5": 1}),
        ("bad_words", "word"),
        ("bad_words", [""]),
        ("bad_words", [b"word"]),
        ("priority", 1_000_001),
        ("priority", -1_000_001),
        ("priority", True),
        ("priority", 1.0),
        ("priority", None),
        ("first_k", 0),
        ("first_k", 2),
        ("first_k", True),
        ("first_k", 1.0),
    ],
)
def test_wrong_values_name_their_field(field, value):
    with pytest.raises(RequestError, match=rf"^{field} ") as error:
        SamplingParams(**{field: value})
    assert error.value.field == field


@each_row(
    "params",
    [
        {"n": 1 << 16, "temperature": 0, "top_p": 1, "top_k": -1, "min_p": 1, "seed": 0},
        {"max_tokens": None},
        {"temperature": 1e-5, "top_k": 0, "seed": (1 << 63) - 1, "logprobs": 0},
        {"stop": ("x" * 1024,)},
        {"n": np.int64(3), "temperature": np.float32(0.5), "first_k": np.int64(3)},
        {"priority": 1_000_000, "n": 2, "first_k": 1},
        {"priority": -1_000_000, "n": 2, "first_k": 2},
    ],
)
def test_values_at_the_edge_are_kept(params):
    kept = SamplingParams(**params)
    assert {name: getattr(kept, name) for name in params} == params


def test_stop_is_one_tuple_however_it_was_given():
    assert SamplingParams().stop_strings == ()
    assert SamplingParams(stop="a").stop_strings == ("a",)
    assert SamplingParams(stop="x" * 1024).stop_strings == ("x" * 1024,)
    assert SamplingParams(stop=["b", "a", "b"]).stop_strings == ("b", "a")


def test_lists_and_dictionaries_are_normalized():
    params = SamplingParams(
        stop_token_ids=[5, np.int64(5), 3], bad_words=["b", "b", " a"], logit_bias={"7": -1, 3: 2}
    )
    assert params.stop_token_ids == (5, 3)
    assert params.bad_words == ("b", " a")
    assert params.logit_bias == {3: 2.0, 7: -1.0}
    assert SamplingParams(**vars(params)) == params


def test_logprobs_mode_by_name():
    assert SamplingParams(logprobs_mode="raw").logprobs_mode is LogprobsMode.RAW
    assert SamplingParams(logprobs_mode=LogprobsMode.PROCESSED).logprobs_mode == 2


def test_renaming_changes_whole_words_only():
    error = RequestError("logprobs must be at most 3: max_topk_logprobs=3", "logprobs")
    other = renamed(error, {"logprobs": "top_logprobs"})
    assert str(other) == "top_logprobs must be at most 3: max_topk_logprobs=3"
    assert other.field == "top_logprobs"
    assert renamed(error, {"n": "m"}) is error
