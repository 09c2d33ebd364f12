"""Each backend of a device against the reference on the same device: part of ``make gpu-check``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from attention_batches import HEADS, make_cache, random_steps, random_world
from sampling_driver import draw, random_batch, sent
from torch import Tensor

from tokasaurus.model.backend import usable_backends
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
from tokasaurus.model.sampling.draws import plan_row_draws

__all__ = ["check_kernels"]

# Beside the shapes of the tests, those of real models.
_SHAPES = [*HEADS, (32, 8, 64), (28, 4, 128)]
_TOLERANCES = {torch.float32: 5e-5, torch.float16: 0.004, torch.bfloat16: 0.03}
# Rows and sizes of the element-wise kernels.
_SIZES = [(1, 64), (7, 576), (300, 2048), (33, 4096)]
_PAGE_SIZES = (16, 20, 64)
_VOCABULARIES = (1, 300, 9000, 128_256)


def check_kernels(device: str) -> list[str]:
    """What is wrong. Prints the largest difference of each backend in each dtype."""
    failures = []
    for backend in usable_backends(torch.device(device)):
        if backend is ReferenceBackend:
            continue
        for dtype, tolerance in _TOLERANCES.items():
            for name, differences in (
                ("attention", _of_attention(backend, device, dtype)),
                ("operators", _of_operators(backend, device, dtype)),
            ):
                what = f"{backend.name}, {name} in {_name(dtype)}"
                found = list(differences)
                if not found:
                    print(f"  {what}: not compared, since it runs none of the shapes")
                    continue
                largest, where = max(found, key=lambda each: (each[0] != each[0], each[0]))
                print(f"  {what}: differs from the reference by {largest:.2g}, of {tolerance:.2g}")
                # Not a number is not near either.
                if not largest <= tolerance:
                    failures.append(
                        f"{what}: {where} differs by {largest:.2g}, over {tolerance:.2g}"
                    )
        failures += _check_sampling(backend, device)
    return failures


def _check_sampling(backend: type[Backend], device: str) -> list[str]:
    """Tokens, sums and rankings against those that torch finds on the CPU, from the same logits."""
    kernels = backend.sampling(DEFAULT_OPTIONS)
    if kernels is None:
        return []
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
            what = f"{backend.name}, {_name(dtype)}, {vocab_size} tokens"
            if not torch.allclose(norms.cpu().double(), sums, rtol=1e-6, atol=1e-6):
                failures.append(f"{what}: logarithms of sums differ from the CPU's")
            if not torch.equal(ids.cpu(), order.indices[:, :depth]):
                failures.append(f"{what}: rankings differ from the CPU's")
    print(f"  {backend.name}: {num_wrong} of {num_tokens} drawn tokens differ from the CPU's")
    if num_wrong:
        failures.append(f"{backend.name}: {num_wrong} drawn tokens differ from the CPU's")
    return failures


def _of_attention(
    backend: type[Backend], device: str, dtype: torch.dtype
) -> Iterator[tuple[float, str]]:
    """The largest difference of each batch, and what the batch was."""
    for seed in range(2 * len(_SHAPES)):
        num_heads, num_kv_heads, head_dim = shape = _SHAPES[seed % len(_SHAPES)]
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
