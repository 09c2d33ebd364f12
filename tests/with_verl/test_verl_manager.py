"""The real veRL generates through real engines, with a real Ray on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engine_process import EngineProcess, eventually, running, started
from oracle import reference_logits, reference_model
from safetensors.torch import save_file

import tokasaurus

pytest.importorskip("verl", reason="veRL is not installed: make test-verl")

IS_FIRST_LINE = version("verl") < "0.8"
later_only = pytest.mark.skipif(IS_FIRST_LINE, reason="this veRL has no such client")

MODEL = Path(tokasaurus.__file__).parent / "demo" / "model"
FLAGS = ("dtype=float32", "kv_cache_num_tokens=16384", "max_seqs_per_forward=64")
PROMPT = [0, 5, 295, 1488, 1503, 1509, 1514, 37, 2, 6]
PARAMS = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "repetition_penalty": 1.0,
    "logprobs": True,
}
GREEDY = {**PARAMS, "temperature": 0.0}


@dataclass
class Rollout:
    """veRL's managers, of whichever version.

    Attributes:
        generate: of veRL's client.
        replicas: those that veRL has started.
        addresses: by which veRL tells them apart.
    """

    generate: Callable[..., Awaitable[Any]]
    replicas: list[Any]
    addresses: list[str]
    config: Any
    manager: Any

    async def on_each(self, method: str, *args: Any) -> None:
        await asyncio.gather(*(getattr(each, method)(*args) for each in self.replicas))

    async def close(self) -> None:
        import ray

        from tokasaurus.integrations.verl.replica import server_name

        for replica in self.replicas:
            await replica.server_handle.close.remote()
            ray.kill(replica.server_handle)
        # The next servers have their names, which are free only when Ray has noticed.
        names = [server_name(each.replica_rank) for each in self.replicas]
        eventually(lambda: not any(map(is_running, names)), "the servers have ended")


def is_running(name: str) -> bool:
    import ray

    try:
        ray.get_actor(name)
    except ValueError:
        return False
    return True


def veRL_config(*overrides: str) -> Any:  # noqa: N802
    """veRL's shipped configuration, with what a user sets on the command line."""
    import verl
    from hydra import compose, initialize_config_dir

    directory = str(Path(verl.__file__).parent / "trainer" / "config")
    with initialize_config_dir(directory, version_base=None):
        return compose(
            "ppo_trainer",
            [
                "actor_rollout_ref.rollout.name=tokasaurus",
                f"actor_rollout_ref.model.path={MODEL}",
                "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
                "actor_rollout_ref.rollout.prompt_length=64",
                "actor_rollout_ref.rollout.response_length=24",
                *overrides,
            ],
        )


async def started_rollout(urls: list[str], num_replicas: int, *options: str, hybrid=False):
    """Lets veRL start replicas, beside the ranks of a trainer or by themselves."""
    config = veRL_config(
        f"+actor_rollout_ref.rollout.custom.tokasaurus_url=[{','.join(urls)}]",
        f"actor_rollout_ref.rollout.n_gpus_per_node={num_replicas}",
        "actor_rollout_ref.rollout.nnodes=1",
        *options,
    )
    trainers = SimpleNamespace(workers=[None] * num_replicas, world_size=num_replicas)
    group = trainers if hybrid else None
    if IS_FIRST_LINE:
        from verl.experimental.agent_loop.agent_loop import AgentLoopManager, AsyncLLMServerManager

        manager = AgentLoopManager(config, group)
        await manager._initialize_llm_servers()
        await manager._init_global_load_balancer()
        servers = list(zip(manager.server_addresses, manager.server_handles, strict=True))
        client = AsyncLLMServerManager(config, servers, manager.global_load_balancer)
    else:
        from verl.workers.rollout.llm_server import LLMServerManager

        manager = await LLMServerManager.create(config, group)
        client = manager.get_client()
    return Rollout(
        client.generate, manager.rollout_replicas, manager.server_addresses, config, manager
    )


def run(urls: list[str], num_replicas: int, work, *options: str, **named: Any) -> Any:
    async def main():
        rollout = await started_rollout(urls, num_replicas, *options, **named)
        try:
            return await work(rollout)
        finally:
            await rollout.close()

    return asyncio.run(main())


@pytest.fixture(scope="module")
def engine(ray_cluster, tmp_path_factory) -> Iterator[EngineProcess]:
    with running(tmp_path_factory.mktemp("engine"), *FLAGS) as ready:
        yield ready


async def generating(engine: EngineProcess) -> None:
    """Waits until requests are under way; veRL's actors take a while to get there."""
    before = engine.metrics()["generated_tokens_total"]
    while engine.metrics()["generated_tokens_total"] < before + 100:
        await asyncio.sleep(0.05)


def check_logprobs(output: Any, prompt: list[int], model: Path = MODEL) -> None:
    logits = reference_logits(model, prompt, output.token_ids).log_softmax(-1)
    chosen = logits[torch.arange(len(output.token_ids)), output.token_ids]
    # Of a token that is drawn once in a hundred times or less, single precision rounds more, on
    # either side.
    bounds = 1e-4 * np.maximum(1.0, -chosen.numpy() / 5)
    assert (np.abs(np.array(output.log_probs) - chosen.numpy()) < bounds).all()


def test_veRL_generates_and_two_replicas_share_an_engine(engine):  # noqa: N802
    """Both have addresses of their own, so veRL sends requests to both."""

    async def work(rollout):
        assert len({*rollout.addresses}) == 2
        requests = [
            rollout.generate(f"r{k}", prompt_ids=PROMPT, sampling_params=PARAMS) for k in range(16)
        ]
        return await asyncio.gather(*requests)

    for output in run([engine.url], 2, work):
        assert output.stop_reason == "completed"
        assert 0 < len(output.token_ids) <= 24
        check_logprobs(output, PROMPT)


def test_256_prompts_are_answered_although_an_engine_is_killed(engine, tmp_path: Path):
    """One of two engines ends, and starts again at its address."""
    prompts = [[*PROMPT[:4], 1500 + k % 40, *PROMPT[5:]] for k in range(256)]
    params = {**PARAMS, "max_tokens": 200, "ignore_eos": True}

    async def work(rollout):
        requests = [
            asyncio.ensure_future(
                rollout.generate(f"q{k}", prompt_ids=prompt, sampling_params=params)
            )
            for k, prompt in enumerate(prompts)
        ]
        while victim.metrics().get("generated_tokens_total", 0) < 500:
            await asyncio.sleep(0.05)
        os.killpg(victim.process.pid, 9)
        victim.process.wait()
        again = stack.enter_context(started(tmp_path / "again", *FLAGS, port=victim.port))
        outputs = await asyncio.gather(*requests)
        return outputs, again.metrics()["generated_tokens_total"]

    with contextlib.ExitStack() as stack:
        for name in ("first", "again"):
            (tmp_path / name).mkdir()
        victim = stack.enter_context(running(tmp_path / "first", *FLAGS))
        outputs, num_after = run([engine.url, victim.url], 2, work)
    assert len(outputs) == 256
    assert {len(output.token_ids) for output in outputs} == {200}
    assert num_after > 200
    for k in (0, 1, 100, 255):
        check_logprobs(outputs[k], prompts[k])


def test_weights_of_a_trainer_change_the_answers(engine, tmp_path: Path, monkeypatch):
    """As the colocated trainer does it: sleep, weights, update, cache."""
    from verl.workers.rollout.base import get_rollout_class

    model = reference_model(MODEL).__class__.from_pretrained(MODEL, dtype=torch.float32)

    async def work(rollout):
        def ask(name):
            return rollout.generate(name, prompt_ids=PROMPT * 5, sampling_params=GREEDY)

        section = rollout.config.actor_rollout_ref
        adapters = []
        for rank in (0, 1):
            monkeypatch.setenv("RANK", str(rank))
            kind = get_rollout_class("tokasaurus", "async")
            adapters.append(
                kind(config=section.rollout, model_config=section.model, device_mesh=None)
            )
        assert [each.replica_rank for each in adapters] == [0, 1]
        outputs = [await ask("a"), await ask("b")]
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                if name.endswith("down_proj.weight"):
                    tensor.mul_(0.5)
        await rollout.on_each("sleep")
        read = []

        def pairs(rank):
            for pair in model.state_dict().items():
                read.append(rank)
                yield pair

        for step in ("weights", "update", "kv_cache"):
            for rank, adapter in enumerate(adapters):
                if step == "update":
                    await adapter.update_weights(
                        pairs(rank), peft_config=None, base_sync_done=True, global_steps=7
                    )
                else:
                    await adapter.resume([step])
        assert {*read} == {0, 1}  # all ranks gather, one sends
        outputs += [await ask("c"), await ask("d")]
        return outputs

    with running(tmp_path, *FLAGS) as own:
        outputs = run([own.url], 2, work, hybrid=True)
        assert '"global-step-7"' in own.get("/get_weight_version")[1]
        assert own.log.count("weights/updates/") > 0
    model.save_pretrained(tmp_path / "new")
    for output in outputs[:2]:
        check_logprobs(output, PROMPT * 5)
    for output in outputs[2:]:
        check_logprobs(output, PROMPT * 5, tmp_path / "new")
        assert output.extra_fields["global_steps"] == 7


def test_a_frozen_model_is_not_sent(engine, monkeypatch):
    from verl.workers.rollout.base import get_rollout_class

    def never():
        raise AssertionError("the weights are read")
        yield

    async def work(rollout):
        section = rollout.config.actor_rollout_ref
        monkeypatch.setenv("RANK", "0")
        kind = get_rollout_class("tokasaurus", "async")
        adapter = kind(config=section.rollout, model_config=section.model, device_mesh=None)
        await adapter.update_weights(never(), global_steps=3)
        return await rollout.generate("a", prompt_ids=PROMPT, sampling_params=GREEDY)

    output = run(
        [engine.url], 1, work, "+actor_rollout_ref.rollout.custom.weight_sync=none", hybrid=True
    )
    assert output.extra_fields["global_steps"] == 3


def test_a_cartridge_is_synchronised_to_all_replicas(engine):
    """veRL's process uploads each content once, where it shares no disk with the engine."""
    path = Path(engine.private) / "cartridge.safetensors"

    def save(seed: int) -> None:
        numbers = torch.Generator().manual_seed(seed)
        tensors = {
            f"{kind}.{layer}": torch.randn((21, 2, 32), generator=numbers)
            for kind in ("keys", "values")
            for layer in range(6)
        }
        save_file(tensors, path.with_suffix(".new"))
        path.with_suffix(".new").rename(path)

    async def work(rollout):
        found = []
        for seed in (1, 2):
            save(seed)
            for replica in rollout.replicas:
                await replica.sync_cartridge(str(path))
            asks = [
                rollout.generate(f"{seed}-{k}", prompt_ids=PROMPT, sampling_params=GREEDY)
                for k in range(4)
            ]
            found.append(await asyncio.gather(*asks))
        return found

    option = "+actor_rollout_ref.rollout.custom.cartridge_upload=always"
    first, second = run([engine.url], 2, work, option)
    for outputs in (first, second):
        assert len({tuple(output.log_probs) for output in outputs}) == 1
    assert first[0].log_probs != second[0].log_probs
    assert engine.log.count('"POST /v1/cartridges ') == 2


def test_an_abort_parks_requests_and_a_resume_lets_them_in(engine):
    async def work(rollout):
        long = {**PARAMS, "max_tokens": 1500, "ignore_eos": True}
        running = [
            asyncio.ensure_future(
                rollout.generate(f"l{k}", prompt_ids=PROMPT, sampling_params=long)
            )
            for k in range(4)
        ]
        await generating(engine)
        await rollout.on_each("abort_all_requests")
        partial = await asyncio.gather(*running)
        parked = asyncio.ensure_future(
            rollout.generate("p", prompt_ids=PROMPT, sampling_params=GREEDY)
        )
        await asyncio.sleep(0.5)
        assert not parked.done()
        await rollout.on_each("resume_generation")
        return partial, await parked

    partial, parked = run([engine.url], 2, work)
    assert {output.stop_reason for output in partial} == {"aborted"}
    assert all(len(output.token_ids) == len(output.log_probs or []) for output in partial)
    assert parked.stop_reason == "completed"


@later_only
def test_a_partial_rollout_goes_on_behind_an_abort(engine):
    """veRL's client sends the tokens so far again, and hides the interruption."""
    from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient

    async def work(rollout):
        client = rollout.manager.get_client(FullyAsyncLLMServerClient)
        params = {**PARAMS, "max_tokens": 1200, "ignore_eos": True}
        whole = asyncio.ensure_future(
            client.generate("w", prompt_ids=PROMPT, sampling_params=params)
        )
        await generating(engine)
        await rollout.on_each("abort_all_requests")
        await rollout.on_each("release_kv_cache")
        await rollout.on_each("resume_kv_cache")
        for replica in rollout.replicas:
            await replica.server_handle.set_global_steps.remote(5)
        await rollout.on_each("resume_generation")
        return await whole

    output = run([engine.url], 2, work)
    assert len(output.token_ids) == len(output.log_probs) == 1200
    check_logprobs(output, PROMPT)
    assert output.extra_fields["max_global_steps"] == 5


@later_only
def test_a_teacher_of_veRL_gets_its_logprobs(engine):  # noqa: N802
    async def work(rollout):
        teacher = {
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": 0,
            "detokenize": False,
        }
        return await rollout.generate("t", prompt_ids=PROMPT, sampling_params=teacher)

    output = run([engine.url], 1, work)
    found = torch.tensor(output.extra_fields["prompt_logprobs"])
    ids = torch.tensor(output.extra_fields["prompt_ids"], dtype=torch.int32)
    assert found.shape == ids.shape == (len(PROMPT), 1)
    logits = reference_logits(MODEL, PROMPT[:1], PROMPT[1:]).log_softmax(-1)
    expected = logits[torch.arange(len(PROMPT) - 1), PROMPT[1:]]
    assert (found[:-1, 0] - expected).abs().max() < 1e-4
    assert ids[:-1, 0].tolist() == PROMPT[1:]


def test_wrong_options_are_refused_where_veRL_starts(ray_cluster):  # noqa: N802
    from tokasaurus.errors import ConfigError

    async def nothing(rollout):
        pass

    with pytest.raises(ConfigError, match=r"max_retrys is unknown; did you mean max_retries"):
        run(["http://127.0.0.1:1"], 1, nothing, "+actor_rollout_ref.rollout.custom.max_retrys=3")


def test_an_engine_that_is_not_there_is_said_soon(ray_cluster):
    async def nothing(rollout):
        pass

    with pytest.raises(Exception, match="does not serve within 1 s: nothing answers at"):
        run(
            ["http://127.0.0.1:1"],
            1,
            nothing,
            "+actor_rollout_ref.rollout.custom.startup_timeout=1",
        )


@later_only
def test_a_trainer_elsewhere_sends_weights_by_the_checkpoint_engine(ray_cluster, tmp_path: Path):
    """veRL's manager aborts, sends and resumes; two replicas have two engines."""
    import ray
    from verl.checkpoint_engine.base import CheckpointEngineManager

    @ray.remote
    class Trainer:
        """A rank of a trainer, as far as this manager asks it."""

        def __init__(self, rank: int) -> None:
            from verl.checkpoint_engine.base import CheckpointEngineRegistry

            import tokasaurus.integrations.verl.checkpoint_engine  # noqa: F401

            self._engine = CheckpointEngineRegistry.new(
                "tokasaurus", is_master=rank == 0, bucket_size=1 << 20
            )

        def call(self, method: str, **options: Any) -> Any:
            return getattr(self._engine, method)(**options)

        async def update(self, global_steps: int) -> Any:
            model = reference_model(MODEL).__class__.from_pretrained(MODEL, dtype=torch.float32)
            pairs = ((name, tensor * 0.5) for name, tensor in model.state_dict().items())
            return await self._engine.send_weights(pairs, global_steps=global_steps)

    class Trainers:
        world_size = 2

        def __init__(self) -> None:
            self.ranks = [Trainer.remote(rank) for rank in range(2)]

        def execute_checkpoint_engine(self, method: list[str], **options: Any) -> list[Any]:
            return [rank.call.remote(name) for rank, name in zip(self.ranks, method, strict=True)]

        def update_weights(self, global_steps: int, mode: str) -> list[Any]:
            assert mode == "tokasaurus"
            return [rank.update.remote(global_steps) for rank in self.ranks]

    async def work(rollout):
        settings = SimpleNamespace(
            backend="tokasaurus",
            custom_backend_module="tokasaurus.integrations.verl.checkpoint_engine",
        )
        manager = CheckpointEngineManager(settings, Trainers(), rollout.replicas)
        await manager.update_weights(global_steps=4)
        asks = (
            rollout.generate(f"r{k}", prompt_ids=PROMPT, sampling_params=GREEDY) for k in range(4)
        )
        return await asyncio.gather(*asks)

    with contextlib.ExitStack() as stack:
        engines = []
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            engines.append(stack.enter_context(running(tmp_path / name, *FLAGS)))
        outputs = run([each.url for each in engines], 2, work)
        for each in engines:
            assert '"global-step-4"' in each.get("/get_weight_version")[1]
    assert [output.extra_fields["global_steps"] for output in outputs] == [4] * 4
