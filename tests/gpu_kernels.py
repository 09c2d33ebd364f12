"""Each backend of a device against the reference on the same device: part of ``make gpu-check``."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

import numpy as np
import torch
from attention_batches import (
    HEADS,
    add_prefill,
    large_group,
    make_cache,
    random_steps,
    random_world,
)
from gpu_jobs import Job
from gpu_parity import backend_names
from sampling_driver import draw, random_batch, sent
from torch import Tensor

from tokasaurus.model.backend import choose_backend
from tokasaurus.model.backend.base import (
    DEFAULT_OPTIONS,
    Backend,
    HeadNorms,
    ModelHeads,
    Rotation,
    SequenceRows,
)
from tokasaurus.model.backend.reference import ReferenceBackend
from tokasaurus.model.backend.reference_operators import REFERENCE_OPERATORS
from tokasaurus.model.kv_cache import KVCache
from tokasaurus.model.sampling.draws import plan_row_draws
from tokasaurus.rounding import ceil_div

__all__ = ["kernel_jobs"]

# Beside the shapes of the tests, those of real models.
_SHAPES = [*HEADS, (32, 8, 64), (28, 4, 128)]
_TOLERANCES = {torch.float32: 5e-5, torch.float16: 0.004, torch.bfloat16: 0.03}
# Of most models, and of the model of the other parts: one build of FlashInfer serves all.
_BUILT_DTYPE, _BUILT_HEAD_DIM = torch.bfloat16, 64
# Rows, columns of shared pages, and numbers of a cache, of which 32 bits cannot count all.
_LARGE, _SMALL = (1500, 64, 1 << 31), (20, 4, 0)
# Rows and sizes of the element-wise kernels.
_SIZES = [(1, 64), (7, 576), (300, 2048), (33, 4096)]
_PAGE_SIZES = (16, 20, 64)
_VOCABULARIES = (1, 300, 9000, 128_256)


def kernel_jobs(device: str, *, builds_all: bool) -> list[Job]:
    """Jobs, each of which returns a result in short, and what is wrong. What builds comes first.

    Args:
        device: to check.
        builds_all: also dtypes and sizes of heads for which FlashInfer builds more kernels, which
            takes a minute or more for each.
    """
    jobs = []
    # FlashInfer's are the last backend of a GPU.
    for name in reversed(backend_names(device)):
        if name == "reference":
            continue
        is_built = name == "flashinfer"
        for dtype in _TOLERANCES:
            if is_built and (dtype == torch.float32 or not (builds_all or dtype == _BUILT_DTYPE)):
                continue
            head_dims = (_BUILT_HEAD_DIM,) if is_built and not builds_all else None
            what = f"attention={name}, kernels in {_name(dtype)}"
            jobs.append(Job(what, check_layers, (name, device, dtype, head_dims)))
        jobs.append(Job(f"attention={name}, draws", check_sampling, (name, device)))
        large = _LARGE if device == "cuda" else _SMALL
        jobs.append(Job(f"attention={name}, large batches", check_large, (name, device, *large)))
    return jobs


def _runnable(name: str, device: str) -> type[Backend]:
    """The backend, if it runs here at all."""
    return choose_backend(name, torch.device(device))


def check_layers(
    name: str, device: str, dtype: torch.dtype, head_dims: Collection[int] | None
) -> tuple[str, list[str]]:
    """Attention and element-wise work of a backend, against the reference.

    Args:
        name: of the backend.
        device: of both.
        dtype: of both.
        head_dims: sizes of heads; None for all that the backend runs.

    Raises:
        ConfigError: the backend does not run here.
    """
    backend, tolerance = _runnable(name, device), _TOLERANCES[dtype]
    failures, results = [], []
    for what, differences in (
        ("attention", _of_attention(backend, device, dtype, head_dims)),
        ("operators", _of_operators(backend, device, dtype)),
    ):
        found = list(differences)
        if not found:
            failures.append(f"{what} was not compared, since it runs none of the shapes")
            continue
        largest, where = max(found, key=lambda each: (each[0] != each[0], each[0]))
        results.append(f"{what} {largest:.2g}")
        # Not a number is not near either.
        if not largest <= tolerance:
            failures.append(f"{what} of {where} differs by {largest:.2g}, over {tolerance:.2g}")
    return f"{', '.join(results)} of {tolerance:.2g}", failures


def check_large(
    name: str, device: str, num_rows: int, num_columns: int, least_numbers: int
) -> tuple[str, list[str]]:
    """Many decodes, with a group and without, and a chunk: all in the last pages of a cache.

    Args:
        name: of the backend.
        device: of it.
        num_rows: that decode.
        num_columns: of pages that they share.
        least_numbers: in the keys of the cache.

    Raises:
        ConfigError: the backend does not run here.
    """
    backend, dtype, page_size = _runnable(name, device), _BUILT_DTYPE, 16
    num_heads, num_kv_heads = 32, 8
    plain, grouped = large_group(num_rows, num_columns, page_size)
    batches = add_prefill(plain, num_columns * page_size), grouped
    used = max(int(rows.page_table.max()) for rows in batches) + 1
    in_page = num_kv_heads * page_size * _BUILT_HEAD_DIM
    num_pages = ceil_div(least_numbers, in_page) + used
    cache = KVCache.allocate(
        num_layers=1,
        num_pages=num_pages,
        page_size=page_size,
        num_kv_heads=num_kv_heads,
        head_dim=_BUILT_HEAD_DIM,
        dtype=dtype,
        device=torch.device(device),
    )
    torch.manual_seed(0)
    for tensor in cache.keys + cache.values:
        tensor[-used:].normal_()
    tolerance, differences = _TOLERANCES[dtype], []
    for rows in batches:
        page_table = (rows.page_table + (num_pages - used)).to(device)
        rows = replace(rows, page_table=page_table)
        inputs = _inputs(rows, num_heads + 2 * num_kv_heads, _BUILT_HEAD_DIM, dtype, device)
        output, expected = (
            each(cache, num_heads).plan(rows).attend(0, *inputs, None)
            for each in (backend, ReferenceBackend)
        )
        differences.append(_difference(output, expected))
    result = f"{', '.join(f'{each:.2g}' for each in differences)} of {tolerance:.2g}"
    # Not a number is not near either.
    is_near = all(each <= tolerance for each in differences)
    return result, [] if is_near else [f"attention differs by {result}"]


def check_sampling(name: str, device: str) -> tuple[str, list[str]]:
    """Tokens, sums and rankings against those that torch finds on the CPU, from the same logits.

    Args:
        name: of the backend.
        device: of it.

    Raises:
        ConfigError: the backend does not run here.
    """
    kernels = _runnable(name, device).sampling(DEFAULT_OPTIONS)
    if kernels is None:
        return "it has no kernels for draws", []
    failures, num_tokens, num_wrong = [], 0, 0
    for seed, vocab_size in enumerate(_VOCABULARIES):
        for dtype in _TOLERANCES:
            logits, chosen = random_batch(60, vocab_size, seed)
            logits = logits.to(dtype)
            plan = sent(plan_row_draws, chosen, vocab_size, kernels=kernels, device=device)
            tokens = plan.draw(logits.to(device)).cpu()
            wrong = tokens != draw(logits.float(), chosen)
            num_tokens, num_wrong = num_tokens + len(tokens), num_wrong + int(wrong.sum())
            norms, _ = kernels.log_sums(logits.to(device), None, None)
            depth = min(20, vocab_size)
            _, ids = kernels.ranked(logits.to(device), None, None, depth)
            sums = logits.double().logsumexp(-1)
            order = logits.float().sort(dim=-1, descending=True, stable=True)
            what = f"{_name(dtype)}, {vocab_size} tokens"
            if not torch.allclose(norms.cpu().double(), sums, rtol=1e-6, atol=1e-6):
                failures.append(f"{what}: logarithms of sums differ from the CPU's")
            if not torch.equal(ids.cpu(), order.indices[:, :depth]):
                failures.append(f"{what}: rankings differ from the CPU's")
    if num_wrong:
        failures.append(f"{num_wrong} drawn tokens differ from the CPU's")
    return f"{num_wrong} of {num_tokens} drawn tokens differ", failures


def _of_attention(
    backend: type[Backend], device: str, dtype: torch.dtype, head_dims: Collection[int] | None
) -> Iterator[tuple[float, str]]:
    """The largest difference of each batch, and what the batch was."""
    for seed in range(2 * len(_SHAPES)):
        num_heads, num_kv_heads, head_dim = shape = _SHAPES[seed % len(_SHAPES)]
        if head_dims is not None and head_dim not in head_dims:
            continue
        if reason := backend.why_not_model(ModelHeads(*shape, dtype)):
            if seed < len(_SHAPES):
                print(f"  {backend.name} does not run {shape} in {_name(dtype)}: {reason}")
            continue
        page_size = _PAGE_SIZES[seed % len(_PAGE_SIZES)]
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        for rows in (*random_world(rng, page_size)[:2], *random_steps(rng, 3, 2, page_size)):
            cache = make_cache(
                rows.page_table.numel(), page_size, num_kv_heads, head_dim, dtype, device=device
            )
            for tensor in cache.keys + cache.values:
                tensor.normal_()
            heads, rotation = _inputs(rows, num_heads + 2 * num_kv_heads, head_dim, dtype, device)
            weights = (torch.rand(2, head_dim, device=device) + 0.5).to(dtype)
            norms = HeadNorms(weights[0], weights[1], 1e-5) if seed % 2 else None
            rows = replace(rows, page_table=rows.page_table.to(device))
            output, expected = (
                each(cache, num_heads).plan(rows).attend(0, heads, rotation, norms)
                for each in (backend, ReferenceBackend)
            )
            where = f"batch {seed} of {num_heads} heads, {num_kv_heads} key heads of {head_dim}"
            yield _difference(output, expected), where


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _inputs(
    rows: SequenceRows, num_heads: int, head_dim: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Rotation]:
    num_rows = len(rows.positions)
    heads = torch.randn(num_rows, num_heads, head_dim, device=device).to(dtype)
    angles = torch.rand(num_rows, 1, head_dim // 2, device=device) * 6
    return heads, Rotation(angles.cos(), angles.sin())


def _of_operators(
    backend: type[Backend], device: str, dtype: torch.dtype
) -> Iterator[tuple[float, str]]:
    operators = backend.operators(DEFAULT_OPTIONS)
    torch.manual_seed(0)
    for num_rows, size in _SIZES:
        x, added = torch.randn(2, num_rows, size, device=device).to(dtype)
        gate_up = torch.randn(num_rows, 2 * size, device=device).to(dtype)
        weight = (torch.rand(size, device=device) + 0.5).to(dtype)
        where = f"{num_rows} rows of {size}"
        yield (
            _difference(
                operators.rms_norm(x, weight, 1e-5), REFERENCE_OPERATORS.rms_norm(x, weight, 1e-5)
            ),
            f"rms_norm of {where}",
        )
        streams = x.clone(), x.clone()
        sums = (
            each.add_rms_norm(stream, added, weight, 1e-5)
            for each, stream in zip((operators, REFERENCE_OPERATORS), streams, strict=True)
        )
        yield max(_difference(*sums), _difference(*streams)), f"add_rms_norm of {where}"
        yield (
            _difference(
                operators.silu_multiply(gate_up), REFERENCE_OPERATORS.silu_multiply(gate_up)
            ),
            f"silu_multiply of {where}",
        )


def _difference(output: Tensor, expected: Tensor) -> float:
    """The largest one; of numbers above 1, in parts of them."""
    wide = expected.float()
    return float(((output.float() - wide).abs() / wide.abs().clamp(min=1)).max())
