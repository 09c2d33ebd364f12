"""veRL's server actor in front of a real engine, without Ray; transformers judges its logprobs."""

from __future__ import annotations

import asyncio
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from documentation import examples, mismatch, run_python
from engine_process import EngineProcess, running
from oracle import reference_logits, reference_model
from safetensors.torch import save_file

import tokasaurus
from tokasaurus.errors import AccessDenied, RequestError, RequestTooLong
from tokasaurus.integrations.trainer import BucketSender
from tokasaurus.integrations.verl.generation import step_label
from tokasaurus.integrations.verl.server import TokasaurusHttpServer

pytestmark = [pytest.mark.engine, pytest.mark.processes]

MODEL = Path(tokasaurus.__file__).parent / "demo" / "model"
FLAGS = ("dtype=float32", "kv_cache_num_tokens=16384", "max_seqs_per_forward=64")
KEY = "sk-admin"
CONFIG = {"prompt_length": 64, "response_length": 24}
PROMPTS = [[0, 5, 295, 1488, 1503, 1509, 1514 + k, 37, 2, 6] for k in range(4)]
LONG = {"max_tokens": 1500, "ignore_eos": True, "temperature": 1.0, "logprobs": True}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with running(tmp_path_factory.mktemp("engine"), *FLAGS) as ready:
        yield ready


def run(engine: EngineProcess, work, *, config=CONFIG, **options):
    async def main():
        server = TokasaurusHttpServer(config, engine.url, **options)
        try:
            await server.launch_server()
            return await work(server)
        finally:
            await server.close()

    return asyncio.run(main())


def processed(logits: torch.Tensor, params: dict) -> torch.Tensor:
    """The distribution that tokens are drawn from, [tokens, vocabulary]."""
    logits = logits / params["temperature"]
    if params["top_k"] > 0:
        least = logits.topk(params["top_k"]).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    ordered, ids = logits.sort(descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    dropped = torch.zeros_like(before, dtype=torch.bool).scatter(1, ids, before >= params["top_p"])
    return logits.masked_fill(dropped, -torch.inf).log_softmax(-1)


def test_logprobs_are_those_that_transformers_computes_of_the_same_tokens(engine):
    asked = [
        {
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": -1,
            "repetition_penalty": 1.0,
            "logprobs": True,
        },
        {
            "temperature": 0.7,
            "top_p": 1.0,
            "top_k": -1,
            "repetition_penalty": 1.0,
            "logprobs": True,
        },
        {
            "temperature": 1.3,
            "top_p": 0.9,
            "top_k": 40,
            "repetition_penalty": 1.0,
            "logprobs": True,
        },
    ]

    async def work(server):
        asks = [
            server.generate(prompt, {**params, "seed": k}, f"{number}-{k}")
            for number, params in enumerate(asked)
            for k, prompt in enumerate(PROMPTS)
        ]
        return await asyncio.gather(*asks)

    outputs = iter(run(engine, work))
    for params in asked:
        for prompt in PROMPTS:
            output = next(outputs)
            assert 0 < len(output.token_ids) == len(output.log_probs) <= 24
            logits = reference_logits(MODEL, prompt, output.token_ids)
            expected = processed(logits, params)
            chosen = expected[torch.arange(len(output.token_ids)), output.token_ids]
            assert np.abs(np.array(output.log_probs) - chosen.numpy()).max() < 1e-4


def test_a_teacher_scores_each_token_as_transformers_does(engine):
    document, prompt, answer = PROMPTS[0][:5], PROMPTS[0][5:], [25, 1509, 1514, 1498]

    async def work(server):
        whole = [*document, *prompt, *answer]
        params = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 4, "detokenize": False}
        top = await server.generate(whole, params, "top")
        return await server.get_teacher_logprobs(prompt, answer, document, "t"), top.extra_fields

    scores, top = run(engine, work)
    logits = reference_logits(MODEL, [*document, *prompt], answer).log_softmax(-1)
    chosen = logits[torch.arange(len(answer)), answer]
    assert np.abs(np.array(scores) - chosen.numpy()).max() < 1e-4
    expected = logits.topk(4)
    rows = slice(len(PROMPTS[0]) - 1, -1)
    assert top["prompt_ids"][rows] == expected.indices.tolist()
    found = np.array(top["prompt_logprobs"][rows])
    assert np.abs(found - expected.values.numpy()).max() < 1e-4


def test_an_abort_gives_partial_tokens_and_spares_other_clients(engine):
    async def work(server):
        other = TokasaurusHttpServer(CONFIG, engine.url)
        spared = asyncio.create_task(other.generate(PROMPTS[1], LONG, "spared"))
        mine = [asyncio.create_task(server.generate(PROMPTS[0], LONG, f"m{k}")) for k in range(8)]
        while engine.metrics()["generated_tokens_total"] < before + 200:
            await asyncio.sleep(0.01)
        await server.abort_all_requests()
        assert all(request.done() for request in mine)
        assert not spared.done()
        late = asyncio.create_task(server.generate(PROMPTS[0], {"max_tokens": 3}, "late"))
        await asyncio.sleep(0.1)
        assert not late.done()
        await server.resume_generation()
        outputs = [await request for request in mine], await late, await spared
        await other.close()
        return outputs

    before = engine.metrics()["generated_tokens_total"]
    mine, late, spared = run(engine, work)
    for output in mine:
        assert output.stop_reason == "aborted"
        assert 0 < len(output.token_ids) == len(output.log_probs) < 1500
    assert (len(late.token_ids), late.stop_reason) == (3, "completed")
    assert (len(spared.token_ids), spared.stop_reason) == (1500, "completed")


def test_a_request_that_waits_for_its_place_is_aborted_too(engine):
    """It has no tokens: more requests than the engine runs at once."""

    def all_are_there() -> bool:
        figures = engine.metrics()
        return figures["running_sequences"] + figures["waiting_sequences"] >= 90

    async def work(server):
        mine = [asyncio.create_task(server.generate(PROMPTS[0], LONG, f"w{k}")) for k in range(90)]
        while not all_are_there():
            await asyncio.sleep(0.01)
        await server.abort_all_requests()
        return await asyncio.gather(*mine)

    outputs = run(engine, work)
    assert {output.stop_reason for output in outputs} == {"aborted"}
    assert min(len(output.token_ids) for output in outputs) == 0


def test_memory_goes_and_comes_back_and_requests_wait_for_it(engine):
    greedy = {"temperature": 0, "max_tokens": 6}

    async def work(server):
        before = await server.generate(PROMPTS[0], greedy, "before")
        await server.sleep()
        await server.sleep()  # again changes nothing
        waits = asyncio.create_task(server.generate(PROMPTS[0], greedy, "waits"))
        await asyncio.sleep(0.3)
        assert not waits.done()
        await server.wake_up(tags=["weights"])
        await server.wake_up(tags=["kv_cache"])
        await server.release_kv_cache()
        await server.resume_kv_cache()
        return before, await waits, await server.generate(PROMPTS[0], greedy, "after")

    before, waited, after = run(engine, work)
    assert before.token_ids == waited.token_ids == after.token_ids


def test_new_weights_change_the_answers_and_no_cached_prompt_is_old(tmp_path: Path):
    """As veRL does it each step: memory is released, weights come, memory is restored.

    The engine has an admin key, which all of this needs.
    """
    greedy = {"temperature": 0, "max_tokens": 12, "logprobs": True}
    model = deepcopy(reference_model(MODEL))
    prompt = PROMPTS[0] * 5  # whole pages of it are cached

    async def work(server):
        outputs = [await server.generate(prompt, greedy, f"first-{k}") for k in range(2)]
        for step in (1, 2):
            with torch.no_grad():
                for name, tensor in model.named_parameters():
                    if name.endswith("down_proj.weight"):
                        tensor.mul_(0.5)
            await server.sleep()
            with BucketSender(engine.url, api_key=KEY, bucket_bytes=1 << 20) as sender:
                await asyncio.to_thread(sender.send, model.state_dict(), step_label(step))
            await server.clear_kv_cache()
            await server.set_global_steps(step)
            await server.wake_up(tags=["kv_cache"])
            asks = (server.generate(prompt, greedy, f"{step}-{k}") for k in range(2))
            outputs += await asyncio.gather(*asks)
            model.save_pretrained(tmp_path / str(step))
        return outputs

    with running(tmp_path, *FLAGS, f"admin_api_key={KEY}") as engine:
        with pytest.raises(AccessDenied, match="TOKASAURUS_ADMIN_API_KEY"):
            run(engine, work)
        outputs = run(engine, work, api_key=KEY)
    cached = [output.extra_fields["num_cached_tokens"] for output in outputs]
    assert cached[1] > 0  # the prompt is long enough to be cached
    assert cached[2] == 0  # and is not, with other weights
    assert [output.extra_fields["global_steps"] for output in outputs[2:]] == [1, 1, 2, 2]
    for step, pair in enumerate((outputs[:2], outputs[2:4], outputs[4:])):
        path = tmp_path / str(step) if step else MODEL
        for output in pair:
            logits = reference_logits(path, prompt, output.token_ids).log_softmax(-1)
            chosen = logits[torch.arange(len(output.token_ids)), output.token_ids]
            assert np.abs(np.array(output.log_probs) - chosen.numpy()).max() < 1e-4


def save_cartridge(path: Path, seed: int) -> None:
    """Random keys and values of 21 positions, in trainers' layout or in ours."""
    numbers = torch.Generator().manual_seed(seed)
    kinds = ("keys", "values")
    tensors = {
        kind: [torch.randn((21, 2, 32), generator=numbers) for _ in range(6)] for kind in kinds
    }
    new = path.with_suffix(".new")
    if path.suffix == ".pt":
        layers = {
            f"trainable_{kind}": torch.nn.ParameterList(
                [each.transpose(0, 1)[None] for each in own]
            )
            for kind, own in tensors.items()
        }
        torch.save(layers, new)
    else:
        flat = ((kind, layer) for kind in kinds for layer in range(6))
        save_file({f"{kind}.{layer}": tensors[kind][layer] for kind, layer in flat}, new)
    new.rename(path)


@pytest.mark.parametrize(("upload", "ending"), [("never", ".pt"), ("always", ".safetensors")])
def test_a_cartridge_that_is_trained_reaches_the_next_request(engine, upload, ending):
    path = Path(engine.private) / f"trained{ending}"  # a place from which the engine may read
    spec = {"id": str(path), "source": "local", "force_redownload": True}
    params = {"temperature": 0, "max_tokens": 8, "logprobs": True}

    async def work(server):
        outputs = [await server.generate(PROMPTS[0], params, "plain")]
        for seed in (1, 2, 1):
            save_cartridge(path, seed)
            await server.update_cartridges([spec])
            outputs.append(await server.generate(PROMPTS[0], params, f"seed-{seed}"))
        await server.update_cartridges([])
        outputs.append(await server.generate(PROMPTS[0], params, "plain"))
        return outputs

    plain, one, two, again, plain_again = run(engine, work, cartridge_upload=upload)
    assert one.log_probs == again.log_probs != two.log_probs
    assert plain.token_ids == plain_again.token_ids
    assert plain.log_probs not in (one.log_probs, two.log_probs)


def test_what_is_wrong_is_said_once_and_by_name(engine, tmp_path: Path):
    async def work(server):
        for params, field in (
            ({"top_p": 2.0}, "top_p"),
            ({"temprature": 1.0}, "temprature"),
            ({"prompt_logprobs": 99}, "prompt_logprobs"),
        ):
            with pytest.raises(RequestError, match=field):
                await server.generate(PROMPTS[0], params, "wrong")
        with pytest.raises(RequestError, match="leaves no room"):
            await server.generate([5] * 4000, {}, "long")
        await server.update_cartridges([{"id": "/nowhere.pt", "source": "local"}])
        with pytest.raises(RequestError, match=r"/nowhere\.pt"):
            await server.generate(PROMPTS[0], {}, "no cartridge")

    run(engine, work)


def test_a_prompt_behind_a_cartridge_gets_what_fits(engine):
    path = Path(engine.private) / "fits.safetensors"
    save_cartridge(path, 3)
    spec = {"id": str(path), "source": "local"}

    async def work(server):
        limit = await server._engine.max_model_len()
        prompt = PROMPTS[0] * ((limit - 40) // 10)
        params = {"max_tokens": 1000, "ignore_eos": True}
        outputs = [await server.generate(prompt, params, f"fits-{k}") for k in range(2)]
        with pytest.raises((RequestError, RequestTooLong), match="leaves no room"):
            await server.generate([5] * (limit - 20), {}, "long")
        return limit - len(prompt) - 21, outputs

    room, outputs = run(engine, work, cartridges=[spec])
    assert [len(output.token_ids) for output in outputs] == [room] * 2


def test_the_example_of_the_page_prints_what_the_page_says(engine):
    (example,) = [each for each in examples("docs/verl.md") if each.language == "python"]
    assert not mismatch(example.printed or "", run_python(example.at(engine.port), {}))
