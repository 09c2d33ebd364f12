"""A KV cache in e4m3: what is written is rounded, and attention is to what was rounded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from attention_batches import CPU, MAX_LENGTH, DenseOracle, attend, random_steps
from checkpoints import make_checkpoint
from worker_driver import Driver, Enter, worker_config

from tokasaurus import LLM, SamplingParams
from tokasaurus.errors import ConfigError
from tokasaurus.model.backend import choose_backend, usable_backends
from tokasaurus.model.backend.base import ModelHeads
from tokasaurus.model.backend.flashinfer.library import why_not_heads
from tokasaurus.model.backend.reference import ReferenceBackend
from tokasaurus.model.backend.triton import backend as triton_backend
from tokasaurus.model.backend.triton.backend import TritonBackend
from tokasaurus.model.float8 import E4M3
from tokasaurus.model.kv_cache import KVCache
from tokasaurus.model.worker.worker import Worker
from tokasaurus.rounding import ceil_div

NARROW = ModelHeads(4, 2, 16, torch.bfloat16, E4M3)


def narrow_cache(num_pages, page_size, num_kv_heads=2, head_dim=16, dtype=torch.float32):
    """Full of NaN, so that what was not written shows."""
    cache = KVCache.allocate(
        num_layers=2,
        num_pages=num_pages,
        page_size=page_size,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        device=CPU,
        kept_dtype=E4M3,
    )
    for tensor in cache.keys + cache.values:
        tensor.view(torch.uint8).fill_(0x7F)
    return cache


def rounded(x):
    """The nearest numbers; what is larger than the largest becomes it."""
    return x.clamp(-448, 448).to(E4M3).to(x.dtype)


def test_attention_is_to_keys_and_values_that_were_rounded():
    for page_size in (1, 7, 16):
        rng = np.random.default_rng(page_size)
        torch.manual_seed(page_size)
        cache = narrow_cache(4 * ceil_div(MAX_LENGTH, page_size), page_size)
        backend, oracle = ReferenceBackend(cache, 4), DenseOracle()
        for rows in random_steps(rng, 4, 5, page_size):
            count = len(rows.positions)
            query, key, value = (torch.randn(count, heads, 16) for heads in (4, 2, 2))
            # Some keys lie beyond the largest number; scores are of the usual size.
            key, query = key * torch.randint(1, 300, (count, 1, 1)), query / 100
            found = attend(backend, rows, query, key, value)
            expected = oracle.attend(rows, query, rounded(key), rounded(value))
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_cache_in_e4m3_takes_a_byte_for_each_number():
    narrow = narrow_cache(3, 16)
    assert narrow.num_bytes == 2 * 2 * 3 * 2 * 16 * 16
    assert narrow.heads_dtype == torch.float32
    assert narrow.dtype == E4M3
    narrow.resize(5)
    assert narrow.num_bytes == 2 * 2 * 5 * 2 * 16 * 16
    assert narrow.keys[0].dtype == E4M3


def test_whole_pages_are_written_read_and_copied():
    cache = narrow_cache(6, 4, dtype=torch.bfloat16)
    keys, values = ([torch.randn(2, 7, 16) * 9 for _ in range(2)] for _ in range(2))
    pages = torch.tensor([4, 1])
    cache.write_pages(pages, keys, values, 7)
    assert cache.keys[0].float()[1, :, 3].isnan().all(), "behind the last position"
    cache.copy_pages(pages, torch.tensor([0, 5]))
    for place in (pages, torch.tensor([0, 5])):
        for found, written in zip(cache.read_pages(place, 7), (keys, values), strict=True):
            for one, other in zip(found, written, strict=True):
                assert one.dtype == torch.bfloat16
                assert torch.equal(one, rounded(other).to(torch.bfloat16))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama")


def test_a_worker_with_such_a_cache_is_near_one_without(checkpoint):
    """It decodes in steps what it would have computed at once, from the same rounded numbers."""
    ids = list(range(5, 45))
    logprobs = {}
    for kept in ("auto", "fp8_e4m3"):
        config = worker_config(checkpoint, attention="reference", kv_cache_dtype=kept)
        driver = Driver(Worker(config), config)
        driver.start(3, num_logprobs=5)
        result = driver.step(prefill=[Enter(3, ids, num_prompt_logprobs=0)])
        logprobs[kept] = result.prompt_logprobs
    difference = np.abs(logprobs["auto"] - logprobs["fp8_e4m3"]).max()
    assert 0 < difference < 0.5


def test_the_log_names_the_dtype_of_the_cache(checkpoint, caplog):
    for kept, named in (("auto", "float32"), ("fp8_e4m3", "float8_e4m3fn")):
        config = worker_config(checkpoint, attention="reference", kv_cache_dtype=kept)
        caplog.clear()
        with caplog.at_level("INFO"):
            Worker(config).warm_up()
        assert f"tokens in {named}:" in caplog.text


def test_backends_that_cannot_say_what_can(monkeypatch):
    monkeypatch.setattr(triton_backend, "is_interpreted", lambda: False)
    capability = (8, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert "needs 8.9; leave kv_cache_dtype out" in (TritonBackend.why_not_model(NARROW) or "")
    capability = (9, 0)
    assert TritonBackend.why_not_model(NARROW) is None
    wide = replace(NARROW, dtype=torch.float32)
    assert "needs dtype=bfloat16 or float16" in (TritonBackend.why_not_model(wide) or "")
    assert "set attention=triton" in (why_not_heads(NARROW) or "")
    with pytest.raises(ConfigError, match=r"attention=compiled: .* set attention=reference"):
        choose_backend("compiled", CPU, heads=NARROW)
    assert usable_backends(CPU, heads=NARROW) == (ReferenceBackend,)
    assert choose_backend("auto", CPU, heads=NARROW) is ReferenceBackend


@pytest.mark.engine
def test_the_bundled_model_answers_nearly_the_same():
    """Its prompts share pages, and one begins inside a page that is copied."""
    prompt = "Once upon a time a clever Stegosaurus lived near a quiet lake"
    params = SamplingParams(max_tokens=16, n=3, temperature=0.0, logprobs=1)
    totals = {}
    for kept in ("auto", "fp8"):
        with LLM(device="cpu", dtype="float32", attention="reference", kv_cache_dtype=kept) as llm:
            (output,) = llm.generate([prompt], params, use_tqdm=False)
        totals[kept] = [each.cumulative_logprob for each in output.outputs]
        assert len({tuple(each.token_ids) for each in output.outputs}) == 1
    assert totals["fp8"] != totals["auto"]
    assert totals["fp8"] == pytest.approx(totals["auto"], abs=3)
