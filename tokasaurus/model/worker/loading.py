"""What a worker decides before it runs batches, and loads: kernels, layers, weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tokasaurus.config.slices import WorkerConfig
from tokasaurus.errors import ConfigError
from tokasaurus.model.architectures.llama_model import LlamaModel
from tokasaurus.model.backend import choose_backend
from tokasaurus.model.backend.base import Backend, BackendOptions, ModelHeads, SamplingKernels
from tokasaurus.model.backend.reference_operators import REFERENCE_OPERATORS
from tokasaurus.model.config import ModelConfig
from tokasaurus.model.facts import read_model_config
from tokasaurus.model.float8 import E4M3
from tokasaurus.model.linear_methods.registry import choose_linear
from tokasaurus.model.parallel.async_tp import Overlap, open_overlap
from tokasaurus.model.parallel.collectives import open_tensor_parallel
from tokasaurus.model.parallel.ranks import Ranks
from tokasaurus.model.parallel.tensor_parallel import dealt
from tokasaurus.model.placement import Placement
from tokasaurus.model.weights.loader import load_model
from tokasaurus.model.weights.weight_files import WeightFiles
from tokasaurus.model.weights.weights import Weights
from tokasaurus.model.worker.determinism import Determinism, settle_determinism
from tokasaurus.model.worker.stage_costs import choose_stage

__all__ = ["Kernels", "LoadedModel", "choose_kernels", "load"]

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Kernels:
    """What a rank will run a model with, before it has met the other ranks.

    Attributes:
        model: the sizes of the whole model.
        heads: of the rank.
        backend: of the attention.
        options: of the backend.
        place: dtype, device, linear method and operators.
    """

    model: ModelConfig
    heads: ModelHeads
    backend: type[Backend]
    options: BackendOptions
    place: Placement


@dataclass(frozen=True)
class LoadedModel:
    """The layers of a rank, with their weights.

    Attributes:
        model: the layers.
        weights: of them; they can be filled anew.
        files: that the weights came from, closed; None if they are random.
        stage: the numbers of the layers.
        overlap: of products with what ranks exchange; None for none.
        sampling: kernels; None if torch samples.
        determinism: of all ranks.
    """

    model: LlamaModel
    weights: Weights
    files: WeightFiles | None
    stage: range
    overlap: Overlap | None
    sampling: SamplingKernels | None
    determinism: Determinism


def choose_kernels(config: WorkerConfig, device: torch.device) -> Kernels:
    """Reads the sizes of the model, and chooses the kernels for it.

    Raises:
        ModelError: the checkpoint's description is wrong; it names the file or the field.
        ConfigError: what was asked for is not available on this machine.
    """
    options = BackendOptions(config.instruction_set, config.use_groups)
    model = read_model_config(config.model_path, config.rope_scaling)
    heads = _heads(config, model)
    backend = choose_backend(config.attention, device, options, heads)
    place = Placement(
        _DTYPES[config.dtype],
        device,
        config.linear,
        REFERENCE_OPERATORS if config.torch_compile else backend.operators(options),
        config.instruction_set,
        is_traced=config.torch_compile,
        quantization=config.quantization,
    )
    return Kernels(model, heads, backend, options, choose_linear(place))


def load(config: WorkerConfig, kernels: Kernels, ranks: Ranks) -> LoadedModel:
    """Loads the layers of this rank. All ranks of a replica call it.

    Raises:
        ModelError: the checkpoint cannot be served. It names the file, tensor or field.
        ConfigError: ranks run different attention, or determinism was asked for and cannot be.
    """
    _refuse_other_attention(ranks, kernels.backend.name)
    backend, options, place = kernels.backend, kernels.options, kernels.place
    stage = choose_stage(ranks, kernels.model, place, backend, options)
    overlap = open_overlap(ranks, place.linear, config.async_tp_threshold)
    parallel = open_tensor_parallel(ranks.tp_group, place.device, config.instruction_set)
    place = replace(place, parallel=parallel, overlap=overlap)
    model, weights, files = load_model(
        config.model_path, kernels.model, place, config.load_format, stage
    )
    sampling = backend.sampling(options)
    determinism = settle_determinism(config.deterministic, model, place, backend, sampling, ranks)
    return LoadedModel(model, weights, files, stage, overlap, sampling, determinism)


def _heads(config: WorkerConfig, model: ModelConfig) -> ModelHeads:
    """Those that this rank has."""
    tp_rank = config.rank % config.tp_size
    num_heads, num_kv_heads = (
        len(dealt(count, tp_rank, config.tp_size))
        for count in (model.num_heads, model.num_kv_heads)
    )
    kept_dtype = E4M3 if config.kv_cache_dtype == "fp8_e4m3" else None
    dtype = _DTYPES[config.dtype]
    return ModelHeads(num_heads, num_kv_heads, model.head_dim, dtype, kept_dtype)


def _refuse_other_attention(ranks: Ranks, name: str) -> None:
    """What ranks measure and agree upon depends on their attention: it must be the same.

    Raises:
        ConfigError: at all ranks, where one of them has chosen another one.
    """
    first = ranks.agreed(name)
    reason = None
    if name != first:
        reason = (
            f"the machine of worker {ranks.rank} runs attention={name}, and that of the first"
            f" worker attention={first}; set attention to one of"
            " them: a machine that cannot run it says what it lacks"
        )
    if (reason := ranks.agreed(reason)) is not None:
        raise ConfigError(reason)
