"""When FlashInfer is taken, and what is said when it is not."""

from __future__ import annotations

import logging
import random
import re
import sys

import flashinfer_stand_in as stand_in
import pytest
import torch
from attention_checks import check_greedy_tokens, check_same_samples, count_groups
from checkpoints import VOCAB_SIZE
from rows import named

from tokasaurus import LLM, SamplingParams
from tokasaurus.errors import ConfigError
from tokasaurus.model import backend as backends
from tokasaurus.model.backend import choose_backend, usable_backends
from tokasaurus.model.backend.base import DEFAULT_OPTIONS, ModelHeads
from tokasaurus.model.backend.flashinfer import backend as module
from tokasaurus.model.backend.flashinfer import library
from tokasaurus.model.backend.flashinfer.backend import FlashInferBackend
from tokasaurus.model.backend.flashinfer.probe import why_not_built
from tokasaurus.model.backend.reference import ReferenceBackend
from tokasaurus.model.backend.triton.backend import TritonBackend

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
LLAMA_1B = ModelHeads(32, 8, 64, torch.bfloat16)


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """A machine on which FlashInfer can run, as far as anybody can see."""
    monkeypatch.setitem(sys.modules, "flashinfer", stand_in)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    for program in ("nvcc", "ninja"):
        (tmp_path / program).touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(library, "_USUAL_CUDA_HOME", str(tmp_path / "cuda"))
    for name in ("CUDA_HOME", "CUDA_PATH", "LIBRARY_PATH", "FLASHINFER_DISABLE_JIT"):
        monkeypatch.delenv(name, raising=False)
    module._why_not.cache_clear()
    # There is no such device to run the probe on.
    monkeypatch.setattr(module, "_why_not_built", lambda _: None)
    yield monkeypatch
    module._why_not.cache_clear()


def test_a_machine_that_can_run_it_takes_it(hopper, caplog):
    with caplog.at_level(logging.INFO, "tokasaurus"):
        assert choose_backend("auto", CUDA, heads=LLAMA_1B) is FlashInferBackend
    assert "attention=flashinfer" in caplog.text
    assert usable_backends(CUDA, heads=LLAMA_1B)[0] is FlashInferBackend
    hopper.setattr(TritonBackend, "why_not", classmethod(lambda *_: None))
    assert choose_backend("triton", CUDA, heads=LLAMA_1B) is TritonBackend


def test_what_a_machine_lacks_is_said_and_the_next_is_taken(hopper, tmp_path, caplog):
    hopper.setattr(TritonBackend, "why_not", classmethod(lambda *_: None))

    def no_nvcc():
        (tmp_path / "nvcc").unlink()

    for change, reason in (
        (no_nvcc, "nvcc, which is neither on the PATH nor in CUDA_HOME"),
        (lambda: hopper.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5)), "7.5"),
        (lambda: hopper.setattr(stand_in, "__version__", "0.7.2.post1"), "0.7.2.post1 is inst"),
        (
            lambda: hopper.setitem(sys.modules, "flashinfer", None),
            r"cannot be imported \(.*\); pip install 'tokasaurus\[cuda\]'",
        ),
    ):
        change()
        module._why_not.cache_clear()
        with named(reason):
            with pytest.raises(ConfigError, match=f"attention=flashinfer: .*{reason}"):
                choose_backend("flashinfer", CUDA, heads=LLAMA_1B)
            assert choose_backend("auto", CUDA, heads=LLAMA_1B) is TritonBackend
    assert caplog.text.count("attention=flashinfer cannot run") == 4


def test_kernels_that_are_built_need_no_compiler(hopper, tmp_path):
    (tmp_path / "nvcc").unlink()
    hopper.setenv("FLASHINFER_DISABLE_JIT", "1")
    assert FlashInferBackend.why_not(DEFAULT_OPTIONS) is None


def test_a_model_without_kernels_is_refused_with_the_remedy():
    for heads, reason in (
        (ModelHeads(32, 8, 64, torch.float32), "no kernels for float32; set dtype=bfloat16"),
        (ModelHeads(32, 8, 80, torch.float16), "64, 128, 256 numbers, and the model's have 80"),
        (ModelHeads(72, 8, 128, torch.bfloat16), "cannot merge 72 heads of 128 .*tp_size"),
        (ModelHeads(28, 4, 128, torch.bfloat16), "with 7 query heads .*dtype=float16"),
    ):
        with named(heads):
            message = library.why_not_heads(heads) or ""
            assert re.search(reason, message)
            assert "attention=triton" in message
    assert library.why_not_heads(ModelHeads(28, 4, 128, torch.float16)) is None
    assert library.why_not_heads(ModelHeads(64, 8, 128, torch.bfloat16)) is None
    assert library.why_not_heads(ModelHeads(32, 8, 256, torch.bfloat16)) is None


def test_the_probe_accepts_kernels_that_are_right(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", stand_in)
    narrow = ModelHeads(32, 8, 64, torch.bfloat16, torch.float8_e4m3fn)
    for heads in (LLAMA_1B, narrow, ModelHeads(3, 3, 128, torch.float16)):
        with named(heads):
            assert why_not_built(FlashInferBackend, heads, CPU) is None


def test_the_reason_of_a_failed_build_is_what_the_compiler_says(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "flashinfer", stand_in)
    command = "[1/9] /usr/local/cuda/bin/nvcc -c page.cu -Werror -o page.o"
    for line in (
        "/include/page.cuh(3): fatal error: curand.h: No such file or directory",
        "nvcc fatal   : Unsupported gpu architecture 'compute_90a'",
        "/usr/bin/ld: cannot find -lcuda: No such file or directory",
    ):
        output = f"Ninja build failed. Ninja output:\n{command}\n{line}\nninja: build stopped."

        def failing(*_, output=output):
            raise RuntimeError(output)

        monkeypatch.setattr(stand_in, "merge_state_in_place", failing)
        with caplog.at_level("INFO"):
            found = why_not_built(FlashInferBackend, LLAMA_1B, CPU) or ""
        assert f"cannot be built or run: {line}; nvcc must be" in found
        assert output in caplog.text, "all of it is in the log"


def test_the_probe_finds_what_is_wrong(monkeypatch):
    """A merge that does nothing, and a compiler that fails."""
    monkeypatch.setitem(sys.modules, "flashinfer", stand_in)

    def failing(*_):
        raise RuntimeError("ninja: build stopped")

    for merge, reason in (
        (lambda *_: None, "compute something else here: .* set attention=triton"),
        (failing, "cannot be built or run: ninja: build stopped; nvcc must be"),
    ):
        monkeypatch.setattr(stand_in, "merge_state_in_place", merge)
        with named(reason):
            found = why_not_built(FlashInferBackend, LLAMA_1B, CPU) or ""
            assert re.search(reason, found)


@pytest.fixture
def on_cpu(monkeypatch):
    """An engine on the CPU takes FlashInfer, whose stand-in computes in fp32, too."""
    monkeypatch.setitem(sys.modules, "flashinfer", stand_in)
    monkeypatch.setattr(stand_in, "DTYPES", [*stand_in.DTYPES, torch.float32])
    monkeypatch.setattr(library, "_DTYPES", tuple(stand_in.DTYPES))
    monkeypatch.setattr(module, "_why_not", lambda: None)
    monkeypatch.setattr(module, "_why_not_built", lambda _: None)
    monkeypatch.setitem(backends._BACKENDS, "cpu", (FlashInferBackend, ReferenceBackend))


def test_greedy_tokens_are_those_of_transformers(checkpoint, on_cpu):
    check_greedy_tokens(checkpoint, "flashinfer")


@pytest.mark.engine
def test_an_engine_with_shared_prefixes_draws_the_tokens_of_the_reference(
    checkpoint, on_cpu, monkeypatch
):
    path = checkpoint("llama", num_heads=4, num_kv_heads=2, head_dim=64)
    header = [random.Random(1).randrange(VOCAB_SIZE) for _ in range(60)]
    prompts = [[*header, number, 7] for number in range(3)]
    grouped = count_groups(monkeypatch, FlashInferBackend)

    def samples(attention, **flags):
        params = SamplingParams(n=4, temperature=0.8, max_tokens=5, seed=3, logprobs=0)
        flags = {"device": "cpu", "dtype": "float32", "page_size": 4, **flags}
        with LLM(path, attention=attention, kv_cache_num_tokens=2048, **flags) as llm:
            llm.generate([header], SamplingParams(max_tokens=1), use_tqdm=False)
            outputs = llm.generate(prompts, params, use_tqdm=False)
        return [sample for output in outputs for sample in output.outputs]

    expected = samples("reference", use_hydragen=False)
    sharing = {"hydragen_min_group_size": 2, "hydragen_min_prefix_len": 8}
    found = samples("flashinfer", use_hydragen=True, **sharing)
    check_same_samples(found, expected, grouped)
