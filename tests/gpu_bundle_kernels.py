"""``make gpu-kernels``: FlashInfer's kernels for Hopper, built where nvcc is, for a GPU machine.

    python tests/gpu_bundle_kernels.py BUILD DIRECTORY

They are those that ``make gpu-check`` and Llama's smaller models need: attention in bf16 with heads
of 64, over a cache in bf16 or e4m3. Objects stay in BUILD, so what was interrupted goes on. The
libraries go to DIRECTORY, where ``install.sh`` of the bundle finds them. They depend on the version
of FlashInfer and on that of CUDA, and not on Python's or PyTorch's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tokasaurus.model.backend.flashinfer.toolkit import set_cuda_home

__all__ = ["main"]

_HOPPER = "9.0a"
_HEAD_DIM = 64


def main(build: str, directory: str) -> int:
    whole = Path(build).resolve()
    set_cuda_home()
    home = os.environ.get("CUDA_HOME")
    if home is None:
        sys.exit("gpu-kernels: there is no nvcc on the PATH, which builds them; set CUDA_HOME")
    # FlashInfer reads these as it is imported.
    os.environ["FLASHINFER_WORKSPACE_BASE"] = str(whole)
    os.environ["FLASHINFER_CUDA_ARCH_LIST"] = _HOPPER
    os.environ["LIBRARY_PATH"] = _libraries(Path(home), whole / "links")
    import torch
    from flashinfer.jit import gen_batch_prefill_module
    from flashinfer.jit.cascade import gen_cascade_module
    from flashinfer.jit.page import gen_page_module

    heads = torch.bfloat16
    specs = [gen_cascade_module(), gen_page_module()]
    for kept in (torch.bfloat16, torch.float8_e4m3fn):
        dtypes = heads, kept, heads, torch.int32
        # No rotation within the kernel, no window, no cap of the scores, sums in fp32.
        options = 0, False, False, False
        specs.append(gen_batch_prefill_module("fa2", *dtypes, _HEAD_DIM, _HEAD_DIM, *options))
    for spec in specs:
        started = time.perf_counter()
        spec.build(verbose=False)
        target = Path(directory) / spec.name
        target.mkdir(parents=True, exist_ok=True)
        library = shutil.copy(spec.jit_library_path, target)
        size, seconds = Path(library).stat().st_size / 2**20, time.perf_counter() - started
        print(f"{size:5.1f} MiB in {seconds:3.0f} s  {spec.name}", flush=True)
    return 0


def _libraries(home: Path, directory: Path) -> str:
    """A directory with what kernels are linked with. An empty library stands for the driver's."""
    directory.mkdir(parents=True, exist_ok=True)
    driver = directory / "libcuda.so"
    command = ["c++", "-shared", "-Wl,-soname,libcuda.so.1", "-x", "c++", os.devnull]
    subprocess.run([*command, "-o", str(driver)], check=True)
    runtime = directory / "libcudart.so"
    runtime.unlink(missing_ok=True)
    runtime.symlink_to(next(home.glob("lib*/libcudart.so.*")))
    return str(directory)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
