"""The library: whether it imports and can run here, and which models it can run.

FlashInfer comes as source. Its kernels are built with nvcc when they are first used, which takes
minutes, and are kept in ``~/.cache/flashinfer``.
"""

from __future__ import annotations

import importlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from tokasaurus.model.backend.base import ModelHeads
from tokasaurus.model.backend.flashinfer.toolkit import set_cuda_home, set_library_path
from tokasaurus.model.capability import why_too_old

__all__ = ["import_library", "why_not", "why_not_heads"]

# The one whose signatures and behaviour this was written for.
_FAMILY = "0.6.14"

_OLDEST = (8, 0)
"""The compute capability of the first devices that its kernels are built for."""

# Where FlashInfer looks for nvcc if nothing says where it is.
_USUAL_CUDA_HOME = "/usr/local/cuda"

_DTYPES = (torch.float16, torch.bfloat16)
_HEAD_DIMS = (64, 128, 256)

# Threads of a block of the merge kernel: each has 16 bytes of a head, and a block has all heads.
_MOST_THREADS = 1024
_BYTES_OF_THREAD = 16

# With so many query heads for a key head, tensor cores gave wrong answers in bf16, it is said:
# https://github.com/flashinfer-ai/flashinfer/issues/2896
_DOUBTED_GROUP = 7


def import_library() -> Any:
    """The module ``flashinfer``. Importing it takes a second."""
    return importlib.import_module("flashinfer")


def why_not() -> str | None:
    """Why FlashInfer cannot run on this machine, and the remedy; None if it can."""
    set_cuda_home()
    try:
        version: str = import_library().__version__
    except Exception as error:  # it looks for libraries of CUDA while it is imported
        return (
            f"FlashInfer cannot be imported ({type(error).__name__}: {error}); pip install"
            " 'tokasaurus[cuda]'"
        )
    if version != _FAMILY and not version.startswith((f"{_FAMILY}.", f"{_FAMILY}+")):
        return (
            f"FlashInfer {version} is installed, and only {_FAMILY} is known to work; pip install"
            f" flashinfer-python=={_FAMILY}"
        )
    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} sees no CUDA device; install its build for CUDA"
    if reason := why_too_old(_OLDEST, "the kernels need"):
        return f"{reason}; set attention=reference"
    if reason := _missing_compiler():
        return reason
    set_library_path()
    return None


def why_not_heads(heads: ModelHeads) -> str | None:
    """Why FlashInfer has no kernels for a model, and the remedy; None if it has."""
    if heads.dtype not in _DTYPES:
        name = str(heads.dtype).removeprefix("torch.")
        return f"it has no kernels for {name}; set dtype=bfloat16 or float16, or attention=triton"
    if heads.head_dim not in _HEAD_DIMS:
        return (
            f"it has kernels for heads of {', '.join(map(str, _HEAD_DIMS))} numbers, and the"
            f" model's have {heads.head_dim}; set attention=triton"
        )
    num_threads = heads.num_heads * heads.head_dim * heads.dtype.itemsize // _BYTES_OF_THREAD
    if num_threads > _MOST_THREADS:
        return (
            f"it cannot merge {heads.num_heads} heads of {heads.head_dim} numbers on one device;"
            " set attention=triton, or a larger tp_size"
        )
    if heads.dtype == torch.bfloat16 and heads.num_heads == _DOUBTED_GROUP * heads.num_kv_heads:
        return (
            f"with {_DOUBTED_GROUP} query heads for each key head its results in bfloat16 are in"
            " doubt (its issue 2896); set attention=triton, or dtype=float16"
        )
    return None


def _missing_compiler() -> str | None:
    """What is missing to build kernels. Kernels that are built already need nothing."""
    if os.environ.get("FLASHINFER_DISABLE_JIT"):
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or _USUAL_CUDA_HOME
    if not (shutil.which("nvcc") or (Path(home) / "bin" / "nvcc").is_file()):
        return (
            "its kernels are built with nvcc, which is neither on the PATH nor in CUDA_HOME;"
            " install the CUDA toolkit, or set attention=triton"
        )
    if not shutil.which("ninja"):
        return "its kernels are built with ninja, which is not on the PATH; pip install ninja"
    return None
