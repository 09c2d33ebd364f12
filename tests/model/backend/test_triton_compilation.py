"""Every Triton kernel is compiled for sm_90, for each dtype; none is run. It needs no device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rows import named

pytestmark = pytest.mark.triton

KERNELS = {
    "prepare_heads",
    "attend_task",
    "merge_partials",
    "rms_norm",
    "add_rms_norm",
    "silu_multiply",
    "draw_token",
    "sum_row",
    "mask_row",
}
DTYPES = {"torch.float32", "torch.float16", "torch.bfloat16"}


@pytest.fixture(scope="module")
def result():
    """From a process of its own: here Triton interprets."""
    tests = Path(__file__).parents[2]
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(tests / "compile_triton_kernels.py")],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout)


def test_each_kernel_becomes_a_cubin_for_sm_90_in_each_dtype(result):
    compiled = result["compiled"]
    assert {each["kernel"] for each in compiled} == KERNELS
    for dtype in DTYPES:
        assert {each["kernel"] for each in compiled if each["label"].startswith(dtype)} == KERNELS
    for each in compiled:
        with named(each):
            assert each["is_elf"]
            assert each["target"] == "sm_90a"


def test_attention_over_a_cache_in_e4m3_is_compiled_for_both_half_precisions(result):
    narrow = [each for each in result["compiled"] if "float8" in each["label"]]
    for dtype in ("torch.float16", "torch.bfloat16"):
        of_dtype = {each["kernel"] for each in narrow if each["label"].startswith(dtype)}
        assert of_dtype >= {"prepare_heads", "attend_task"}
    assert not any(each["label"].startswith("torch.float32") for each in narrow)


def test_attention_in_half_precision_runs_on_tensor_cores_and_copies_ahead(result):
    for each in result["compiled"]:
        if each["kernel"] == "attend_task":
            with named(each):
                assert each["uses_tensor_cores"] == ("float32" not in each["label"])
                assert each["copies_ahead"]


def test_no_kernel_spills_registers_or_takes_much_shared_memory(result):
    """At least two programs of 227 KiB fit in a multiprocessor at a time."""
    for each in result["compiled"]:
        with named(each):
            assert each["stack_bytes"] == 0
            assert each["shared_bytes"] <= 113 << 10


def test_weights_of_tokens_are_computed_without_fused_operations(result):
    """So they have the same bits as on the CPU. The logarithm of a sum may fuse its own."""
    for each in result["compiled"]:
        if each["kernel"] == "draw_token":
            with named(each):
                assert each["num_fused"] == 0


def test_no_batch_compiles_anything_after_the_first_ones(result):
    for label, count in result["num_later"].items():
        assert count == 0, label
