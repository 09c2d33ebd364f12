"""Loglikelihoods as lm-evaluation-harness reads them, from a running engine, against transformers.

The harness takes a token for greedy if ``token_logprobs[i] == max(top_logprobs[i].values())``, so
these floats must be equal exactly if no token is likelier. Each row of the model's head occurs
twice, so that ties are common. The engine preempts without need and feeds prompts in chunks.
"""

from __future__ import annotations

import json
import random
import urllib.request

import pytest
import torch
from checkpoints import make_checkpoint
from engine_process import running
from oracle import LOGPROB_TOLERANCE, TIE, reference_model
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model whose odd tokens are exactly as likely as the even tokens before them."""
    path = make_checkpoint(tmp_path_factory.mktemp("ties"), "llama", seed=2, tied=False)
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"][1::2] = weights["lm_head.weight"][0::2]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def post(model, tmp_path_factory):
    flags = (
        f"model={model}",
        "dtype=float32",
        "page_size=4",
        "kv_cache_num_tokens=512",
        "max_num_tokens_per_request=128",
        "max_tokens_per_forward=40",
        "max_seqs_per_forward=8",
        "bump_city_population_me=T",
        "uvicorn_log_level=warning",
    )
    with running(tmp_path_factory.mktemp("engine"), *flags) as engine:

        def ask(path, body):
            request = urllib.request.Request(
                engine.url + path,
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read())

        yield ask


def log_softmax(model, ids):
    with torch.inference_mode():
        return reference_model(model)(torch.tensor([ids])).logits[0].log_softmax(-1)


def requests(model, count):
    """Pairs of ids and the context's length; every other continuation is that of transformers."""
    chance = random.Random(0)
    shared = [chance.randrange(200) for _ in range(40)]
    made = []
    for number in range(count):
        context = [*shared[: chance.choice([1, 8, 40])], *range(chance.randint(0, 6))]
        ids = list(context)
        for _ in range(chance.randint(1, 12)):
            best = int(log_softmax(model, ids)[-1].argmax())
            ids.append(best + chance.randint(0, 1) if number % 2 else chance.randrange(200))
        made.append((ids, len(context)))
    return made


def test_loglikelihoods_and_ties_match_transformers(model, post):
    made = requests(model, 16)
    body = {
        "model": "m",
        "prompt": [ids for ids, _ in made],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    answer = post("/v1/completions", body)
    seen = {True: 0, False: 0}
    for choice in answer["choices"]:
        ids, start = made[choice["index"]]
        logprobs = choice["logprobs"]
        assert len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == len(ids) + 1
        chosen = logprobs["token_logprobs"][start:-1]
        tops = logprobs["top_logprobs"][start:-1]
        expected = log_softmax(model, ids)[start - 1 : -1]
        reference = expected.gather(1, torch.tensor(ids[start:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(chosen), reference, atol=LOGPROB_TOLERANCE, rtol=0)
        for one, top, row, value in zip(chosen, tops, expected, reference, strict=True):
            is_greedy = one == max(top.values())
            short = float(row.max() - value)
            assert is_greedy == (short == 0) or short < TIE
            seen[is_greedy] += 1
    assert min(seen.values()) > 20


def test_prompt_logprobs_and_ranks_match_transformers(model, post):
    """The prompts are cached by earlier requests, and their logprobs computed nevertheless."""
    made = [ids for ids, _ in requests(model, 6)]
    body = {"model": "m", "prompt": made, "n": 2, "max_tokens": 2, "prompt_logprobs": 3}
    for _ in range(2):
        answer = post("/v1/completions", {**body, "logprobs_mode": "raw"})
        assert len(answer["choices"]) == 2 * len(made)
        for choice in answer["choices"]:
            ids = made[choice["index"] // 2]
            expected = log_softmax(model, ids)
            written = choice["prompt_logprobs"]
            assert written[0] is None
            assert len(written) == len(ids)
            for row, entries, token_id in zip(expected[:-1], written[1:], ids[1:], strict=True):
                values = torch.tensor([entry["logprob"] for entry in entries.values()])
                reference = row[torch.tensor([int(key) for key in entries])]
                torch.testing.assert_close(values, reference, atol=LOGPROB_TOLERANCE, rtol=0)
                assert int((row > row[token_id] + TIE).sum()) < entries[str(token_id)]["rank"]
                assert entries[str(token_id)]["rank"] <= 1 + int((row > row[token_id] - TIE).sum())
                assert len(entries) in (3, 4)
