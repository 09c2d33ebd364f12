"""Compiles every Triton kernel for sm_90, and runs none: it needs Triton and no device.

    python tests/compile_triton_kernels.py

The backend launches its kernels on tensors of the CPU. A driver in the place of CUDA's says that
the device is one of sm_90, and a launch ends once its kernel is compiled. So each kernel is
compiled for the very arguments that an engine gives it, and one that a later batch would compile
anew shows.

It prints JSON: what was compiled, and how often batches after the first two compiled anything.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import triton
from attention_batches import add_prefill, large_group, random_steps, random_world
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from tokasaurus.model.backend.base import DRAW, HeadNorms, Rotation, SequenceRows
from tokasaurus.model.backend.triton.backend import TritonBackend
from tokasaurus.model.backend.triton.operators import TRITON_OPERATORS
from tokasaurus.model.backend.triton.sampling import TRITON_SAMPLING
from tokasaurus.model.kv_cache import KVCache

_TARGET = GPUTarget("cuda", 90, 32)
_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_SHAPES = [  # num_heads, num_kv_heads, head_dim, page_size
    (32, 8, 64, 16),
    (28, 4, 128, 16),
    (6, 2, 80, 16),
]
_SIZES = (576, 2048)
_VOCABULARY = 128_256
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Driver:
    """Says what a compiler asks, and nothing that a launch would."""

    def get_current_target(self):
        return _TARGET

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def main() -> None:
    compiled = []
    triton.runtime.driver.set_active(Driver())
    run = JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **constants):
        assert grid[0] > 0
        known = {id(each) for each in _kernels(self)}
        kernel = run(self, *arguments, grid=grid, warmup=True, **constants)
        if id(kernel) not in known:
            compiled.append({"kernel": self.fn.__name__, "label": label, **_described(kernel)})
        return kernel

    JITFunction.run = compile_only
    num_later = {}
    for dtype in _DTYPES:
        # The backend refuses a cache in e4m3 if attention is in fp32.
        kept_dtypes = (None,) if dtype == torch.float32 else (None, torch.float8_e4m3fn)
        for shape, kept in itertools.product(_SHAPES, kept_dtypes):
            label = f"{dtype} {shape}" if kept is None else f"{dtype} {shape} {kept}"
            backend, batches = _attention(dtype, kept, *shape)
            for number, (rows, norms) in enumerate(batches):
                if number == 4:
                    num_first = len(compiled)
                heads = torch.zeros(len(rows.positions), shape[0] + 2 * shape[1], shape[2]).to(
                    dtype
                )
                angles = torch.zeros(len(heads), 1, shape[2] // 2)
                backend.plan(rows).attend(0, heads, Rotation(angles, angles), norms)
            num_later[label] = len(compiled) - num_first
        for size in _SIZES:
            label = f"{dtype} {size}"
            for num_rows in (1, 2, 16, 33):
                if num_rows == 2:
                    num_first = len(compiled)
                x = torch.zeros(num_rows, size, dtype=dtype)
                TRITON_OPERATORS.rms_norm(x, x[0], 1e-5)
                TRITON_OPERATORS.add_rms_norm(x, x, x[0], 1e-5)
                TRITON_OPERATORS.silu_multiply(x)
            num_later[label] = len(compiled) - num_first
        label = f"{dtype} {_VOCABULARY}"
        num_first = _sample(dtype, compiled)
        num_later[label] = len(compiled) - num_first
    json.dump({"compiled": compiled, "num_later": num_later}, sys.stdout)


def _attention(dtype, kept, num_heads, num_kv_heads, head_dim, page_size):
    """A backend, and batches: one row or many, with groups and without, of prompts and decodes."""
    cache = KVCache.allocate(
        num_layers=1,
        num_pages=1000,
        page_size=page_size,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        device=torch.device("cpu"),
        kept_dtype=kept,
    )
    norms = HeadNorms(*torch.ones(2, head_dim, dtype=dtype), 1e-5)
    plain, grouped = large_group(40, 40, page_size)
    first = [add_prefill(plain, 70), grouped]
    later = [_one_row(1), _one_row(900), _one_row(16)]
    for seed in range(4):
        rng = np.random.default_rng(seed)
        later += list(random_steps(rng, 3, 2, page_size))
        later += random_world(rng, page_size)[:2]
    return (
        TritonBackend(cache, num_heads),
        [(rows, norms) for rows in first]
        + [(rows, None) for rows in first]
        + [(rows, each) for rows in later for each in (norms, None)],
    )


def _sample(dtype, compiled):
    """Draws, sums up and counts. Returns how many kernels had been compiled after the first row."""
    for num_rows in (1, 2, 16, 33):
        if num_rows == 2:
            num_first = len(compiled)
        logits = torch.zeros(num_rows, _VOCABULARY, dtype=dtype)
        # Parts of a staging buffer, which begin anywhere.
        draws = torch.zeros(num_rows * DRAW.itemsize + num_rows, dtype=torch.uint8)[num_rows:]
        index = torch.zeros(num_rows + num_rows, dtype=torch.int64)[num_rows:]
        TRITON_SAMPLING.draw(logits, draws.view(num_rows, -1))
        TRITON_SAMPLING.log_sums(logits, None, None)
        TRITON_SAMPLING.log_sums(logits, index, index.float(), index)
        bits = torch.zeros(2 * num_rows, _VOCABULARY // 8, dtype=torch.uint8)[num_rows:]
        TRITON_SAMPLING.mask(logits, logits, index, bits)
        TRITON_SAMPLING.mask(logits + 1, logits, index, bits)
    return num_first


def _one_row(length):
    return SequenceRows(
        slots=np.zeros(1, np.int32),
        query_starts=np.arange(2, dtype=np.int32),
        kv_lengths=np.full(1, length, np.int32),
        positions=np.full(1, length - 1, np.int32),
        page_table=torch.zeros(16, 64, dtype=torch.int32),
        num_decodes=1,
    )


def _kernels(function):
    return function.device_caches[0][0].values()


def _described(kernel):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [_CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    assert found, usage
    return {
        "is_elf": kernel.asm["cubin"][:4] == b"\x7fELF",
        "target": re.search(r"\.target (\w+)", kernel.asm["ptx"]).group(1),
        "uses_tensor_cores": bool(re.search(r"wgmma|mma\.sync", kernel.asm["ptx"])),
        "num_fused": len(re.findall(r"\bfma\.", kernel.asm["ptx"])),
        "copies_ahead": "cp.async" in kernel.asm["ptx"],
        "registers": int(found.group(1)),
        "stack_bytes": int(found.group(2)),
        "shared_bytes": kernel.metadata.shared,
    }


if __name__ == "__main__":
    main()
