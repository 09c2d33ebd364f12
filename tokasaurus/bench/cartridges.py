"""``toka-bench cartridges``: requests behind a cartridge against the same text in their prompts.

    toka-bench cartridges                                 64 requests at once, 512 tokens; minutes
    toka-bench cartridges shape=tiny num_requests=8 repetitions=1

Three ways to give a text to requests, in turns, on one engine:

==============  ====================================================================================
prompt          in front of each question. The first token differs from request to request, so that
                the prefix cache finds nothing, and every request reads the whole text
cached prompt   the same text for all: one request reads it, the others find it in the prefix cache
cartridge       nothing is read but the questions
==============  ====================================================================================

The model has random weights, and the cartridge random numbers: speed depends on neither.
Then the manager: the CPU time that its process takes for a request of one token, with a question
alone, with one behind a cartridge, and with the text in the prompt, against a simulated device.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from tokasaurus.bench.clients import Clients
from tokasaurus.bench.manager_cost import Effort, Setting, start_us
from tokasaurus.bench.output import markdown_table, print_json, progress
from tokasaurus.bench.peers.checkpoint import (
    SHAPES,
    Shape,
    cache_directory,
    make_checkpoint,
    make_once,
)
from tokasaurus.bench.requests import Requests
from tokasaurus.config.schema import Schema, check_fields, flag
from tokasaurus.protocol.commands import Command, LoadCartridge
from tokasaurus.text.params import SamplingParams

if TYPE_CHECKING:
    from tokasaurus.launch.async_llm import AsyncLLM

__all__ = ["SCHEMA", "CartridgesConfig", "run"]

_WAYS = ("prompt", "cached prompt", "cartridge")
_FIRST_ID = 10  # ids below are special tokens


@dataclass(frozen=True, kw_only=True)
class CartridgesConfig:
    """What to compare."""

    num_requests: int = flag(64, minimum=1, help="Requests that arrive at once.")
    cartridge_tokens: int = flag(512, minimum=1, help="Of the cartridge, and of the text.")
    question_tokens: int = flag(32, minimum=1, help="Of each request's own prompt.")
    max_tokens: int = flag(64, minimum=1, help="Of each answer.")
    repetitions: int = flag(3, minimum=1, help="How often each way is measured.")
    shape: str = flag("smollm2-135m", choices=tuple(SHAPES), help="Of the model.")
    dtype: str = flag("float32", choices=("float32", "bfloat16"), help="Of weights and products.")

    def __post_init__(self) -> None:
        check_fields(self)


SCHEMA = Schema(
    target=CartridgesConfig,
    program="toka-bench cartridges",
    summary="Requests behind a cartridge against the same text in their prompts.",
    examples=(
        "toka-bench cartridges",
        "toka-bench cartridges shape=tiny num_requests=8 repetitions=1",
    ),
)


@dataclass
class _Times:
    """Of one way.

    Attributes:
        first_s: of each repetition, the median time to the first token.
        rates: of each repetition, generated tokens a second.
    """

    first_s: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)


def run(config: CartridgesConfig) -> None:
    """Measures and prints the results."""
    checkpoint = cache_directory() / config.shape / "checkpoint"
    if not checkpoint.is_dir():
        progress(f"making a checkpoint in {checkpoint}")
        make_once(checkpoint, partial(make_checkpoint, SHAPES[config.shape]))
    with tempfile.TemporaryDirectory(prefix="tokasaurus-") as directory:
        cartridge = Path(directory) / "cartridge.safetensors"
        _make_cartridge(cartridge, SHAPES[config.shape], config.cartridge_tokens)
        times = asyncio.run(_compare(config, checkpoint, cartridge))
    _report(config, times)
    _report_manager(config)


def _make_cartridge(path: Path, shape: Shape, num_tokens: int) -> None:
    import torch

    from tokasaurus.launch.cartridges.tensors import save_tensors

    sizes = (shape.num_kv_heads, num_tokens, shape.head_dim)
    keys, values = ([torch.randn(sizes) for _ in range(shape.num_layers)] for _ in range(2))
    save_tensors(path, keys, values)


# --- the whole engine -----------------------------------------------------------------------------


async def _compare(
    config: CartridgesConfig, checkpoint: Path, cartridge: Path
) -> dict[str, _Times]:
    from tokasaurus.launch.async_llm import AsyncLLM

    length = config.cartridge_tokens + config.question_tokens + config.max_tokens + 1
    times = {way: _Times() for way in _WAYS}
    async with AsyncLLM(
        checkpoint,
        dtype=config.dtype,
        kv_cache_num_tokens=2 * config.num_requests * length,
        max_num_tokens_per_request=length,
        cartridge_dir=str(cartridge.parent / "store"),
        cartridge_roots=(str(cartridge.parent),),
    ) as llm:
        begun = time.perf_counter()
        one = SamplingParams(max_tokens=1)
        await llm.generate([_FIRST_ID], one, cartridges=str(cartridge))
        progress(f"first use of the cartridge: {time.perf_counter() - begun:.2f} s")
        for repetition in range(config.repetitions):
            # Each way is first about equally often.
            shift = repetition % len(_WAYS)
            for way in (*_WAYS[shift:], *_WAYS[:shift]):
                prompts = _prompts(config, way, repetition)
                behind = str(cartridge) if way == "cartridge" else None
                await _measure(llm, prompts, config.max_tokens, behind, times[way])
                progress(
                    f"{repetition + 1}/{config.repetitions}: {way} {times[way].rates[-1]:,.0f}"
                    f" tokens/s, first tokens after {times[way].first_s[-1]:.2f} s"
                )
    return times


def _prompts(config: CartridgesConfig, way: str, repetition: int) -> list[list[int]]:
    """Prompts that no earlier repetition had."""
    source = random.Random(f"{way} {repetition}")
    last_id = SHAPES[config.shape].vocab_size - 1

    def ids(count: int) -> list[int]:
        return [source.randint(_FIRST_ID, last_id) for _ in range(count)]

    text = ids(config.cartridge_tokens)
    made = []
    for _ in range(config.num_requests):
        question = ids(config.question_tokens)
        if way == "prompt":
            made.append([*ids(1), *text[1:], *question])
        elif way == "cached prompt":
            made.append([*text, *question])
        else:
            made.append(question)
    return made


async def _measure(
    llm: AsyncLLM,
    prompts: Sequence[list[int]],
    max_tokens: int,
    cartridge: str | None,
    times: _Times,
) -> None:
    params = SamplingParams(max_tokens=max_tokens, temperature=1.0, ignore_eos=True)
    begun = time.perf_counter()

    async def first_s(prompt: list[int]) -> float:
        first = 0.0
        async for _ in llm.generate(prompt, params, cartridges=cartridge):
            first = first or time.perf_counter() - begun
        return first

    firsts = await asyncio.gather(*map(first_s, prompts))
    times.rates.append(len(prompts) * max_tokens / (time.perf_counter() - begun))
    times.first_s.append(statistics.median(firsts))


def _report(config: CartridgesConfig, times: dict[str, _Times]) -> None:
    base = times["prompt"]
    rows, ratios = [], {}
    for way, own in times.items():
        sooner = statistics.median(
            one / other for one, other in zip(base.first_s, own.first_s, strict=True)
        )
        faster = statistics.median(
            other / one for one, other in zip(base.rates, own.rates, strict=True)
        )
        ratios[way] = {"first_token": round(sooner, 3), "rate": round(faster, 3)}
        rows.append(
            (
                way,
                f"{statistics.median(own.first_s):.2f} s",
                f"{sooner:.1f} x sooner",
                f"{statistics.median(own.rates):,.0f}",
                f"{faster:.2f} x",
            )
        )
    print(
        f"{config.num_requests} requests at once, a text of {config.cartridge_tokens} tokens,"
        f" questions of {config.question_tokens}, answers of {config.max_tokens}:\n"
    )
    print(markdown_table(("text as", "first token", "", "tokens/s", ""), rows))
    print_json({"ratios": ratios})


# --- the manager ----------------------------------------------------------------------------------

_EFFORT = Effort(num_windows=5, steps=0, num_starts=512, num_waves=2)
_NAME = "text"


def _report_manager(config: CartridgesConfig) -> None:
    text, question = config.cartridge_tokens, config.question_tokens
    costs = {
        "the question alone": _manager_us(question),
        "behind a cartridge": _manager_us(question, cartridge_tokens=text),
        "text and question": _manager_us(text + question),
    }
    rows = [(name, f"{us:.1f} us") for name, us in costs.items()]
    print("\n" + markdown_table(("prompt", "manager's CPU time of a request"), rows))
    print_json({"manager_us": {name: round(us, 1) for name, us in costs.items()}})


def _manager_us(prompt_tokens: int, cartridge_tokens: int = 0) -> float:
    """The manager's CPU time of a request that generates one token: the median of windows."""
    length = prompt_tokens + cartridge_tokens + 1
    setting = Setting("easy", "instant", 8, _EFFORT)
    with setting.engine(
        kv_cache_num_tokens=_EFFORT.num_starts * (prompt_tokens + 32) + 2 * cartridge_tokens,
        max_num_tokens_per_request=length,
        max_seqs_per_forward=1024,
        max_tokens_per_forward=16384,
    ) as engine:
        clients, requests = Clients(engine), Requests()
        if cartridge_tokens:
            engine.send(Command(0, LoadCartridge(_NAME, ("nowhere",), cartridge_tokens)))

        def send() -> int:
            for request in requests.series(clients.num_sent, _EFFORT.num_starts, prompt_tokens, 1):
                name = _NAME if cartridge_tokens else ""
                clients.send(msgspec.structs.replace(request, cartridge=name))
            return _EFFORT.num_starts

        start_us(clients, send)  # fills the cache
        return statistics.median(start_us(clients, send) for _ in range(_EFFORT.num_windows))
