"""LLM and AsyncLLM with cartridges: a cartridge of a text stands for the text."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import numpy as np
import pytest
from checkpoints import make_checkpoint
from text_cartridges import save_cartridge

from tokasaurus import LLM, AsyncLLM, SamplingParams
from tokasaurus.errors import RequestError

pytestmark = pytest.mark.engine

IDS = [random.Random(7).randrange(256) for _ in range(40)]
N = 21  # not a whole number of pages
PARAMS = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    return make_checkpoint(directory, "llama", seed=3, num_heads=4, num_kv_heads=2)


@pytest.fixture(scope="module")
def flags(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    return {
        "model": model,
        "kv_cache_num_tokens": 1024,
        "max_seqs_per_forward": 16,
        "page_size": 16,
        "cartridge_dir": str(tmp_path_factory.mktemp("cartridges")),
    }


@pytest.fixture(scope="module")
def directory(flags: dict[str, object], model: Path) -> Path:
    path = Path(str(flags["cartridge_dir"]))
    save_cartridge(model, IDS[:N], path / "first.safetensors")
    save_cartridge(model, IDS[:8], path / "short.safetensors")
    return path


def assert_alike(got: object, expected: object) -> None:
    """The same tokens, and logprobs to 1e-5."""
    for one, other in zip(got.outputs, expected.outputs, strict=True):
        assert one.token_ids == other.token_ids
        for a, b in zip(one.logprobs, other.logprobs, strict=True):
            assert a.keys() == b.keys()
            values = [[each[key].logprob for key in a] for each in (a, b)]
            np.testing.assert_allclose(*values, rtol=0, atol=1e-5)


def test_a_cartridge_stands_for_the_text_that_it_was_made_of(flags, directory, model):
    with LLM(**flags) as llm:
        (whole,) = llm.generate(IDS, PARAMS, use_tqdm=False)
        for named in (
            str(directory / "first.safetensors"),
            {"id": "first.safetensors", "source": "local"},
        ):
            (behind,) = llm.generate(IDS[N:], PARAMS, use_tqdm=False, cartridges=[named])
            assert_alike(behind, whole)
        # Rotated for other positions, the rest of the text is another one.
        (behind,) = llm.generate(
            IDS[N:], PARAMS, use_tqdm=False, cartridges=directory / "short.safetensors"
        )
        assert behind.outputs != whole.outputs
        # Another version under the same name.
        changing = directory / "changing.safetensors"
        save_cartridge(model, IDS[:8], changing)
        named = {"id": "changing.safetensors", "source": "local"}
        (before,) = llm.generate(IDS[8:], PARAMS, use_tqdm=False, cartridges=[named])
        assert_alike(before, whole)
        save_cartridge(model, IDS[:N], changing)
        (after,) = llm.generate(IDS[N:], PARAMS, use_tqdm=False, cartridges=[named])
        assert_alike(after, whole)
        # The engine goes on after a refusal, and without cartridges.
        for wrong, said in (
            ("nothing.safetensors", "nothing"),
            ({"id": ""}, "id"),
            ({"id": 3}, "id=3"),
            ({"name": "a"}, "name='a'"),
            ([named, named], "named twice"),
        ):
            with pytest.raises(RequestError, match=said) as raised:
                llm.generate("a", PARAMS, use_tqdm=False, cartridges=wrong)
            assert raised.value.field == "cartridges"
        assert llm.generate(IDS, PARAMS, use_tqdm=False)[0].outputs == whole.outputs


@pytest.mark.long
def test_replicas_in_processes_have_cartridges_too(flags, directory):
    named = {"id": "first.safetensors", "source": "local"}
    with LLM(**flags, dp_size=2) as llm:
        (whole,) = llm.generate(IDS, PARAMS, use_tqdm=False)
        prompts = [IDS[N:]] * 8
        for behind in llm.generate(prompts, PARAMS, use_tqdm=False, cartridges=[named]):
            assert_alike(behind, whole)


def test_calls_of_an_async_engine_share_a_cartridge(flags, directory):
    named = {"id": "first.safetensors", "source": "local"}

    async def main() -> None:
        async with AsyncLLM(**flags) as llm:
            whole = await llm.generate(IDS, PARAMS)
            calls = [llm.generate(IDS[N:], PARAMS, cartridges=[named]) for _ in range(4)]
            for behind in await asyncio.gather(*calls):
                assert_alike(behind, whole)
            stream = llm.generate(IDS[N:], PARAMS, cartridges=[named])
            outputs = [each async for each in stream]
            assert outputs[-1].outputs[0].token_ids == whole.outputs[0].token_ids
            conversation = [{"role": "user", "content": "abc"}]
            answer = await llm.chat(conversation, PARAMS, cartridges=[named])
            plain = await llm.chat(conversation, PARAMS)
            assert plain.prompt_token_ids[1:] == answer.prompt_token_ids
            with pytest.raises(RequestError, match="nothing"):
                await llm.generate("a", PARAMS, cartridges="nothing")
            assert llm._thread is not None
            engine = await llm._thread.engine()
            (use,) = engine.cartridges.uses().values()
            assert use.num_users == 0

    asyncio.run(main())
