"""Reads the JSON files of a model's directory before any tensor is read. No torch.

Owns the files and the choice of the architecture, which then parses the fields. Of the weights, it
reads the headers only.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, replace
from pathlib import Path

from tokasaurus.cartridges.specification import ModelShape
from tokasaurus.config.slices import ModelFacts
from tokasaurus.errors import ModelError
from tokasaurus.model.architectures.registry import ARCHITECTURES
from tokasaurus.model.checkpoint_headers import HEAD, CheckpointHeaders, check_sizes
from tokasaurus.model.config import ModelConfig
from tokasaurus.model.end_token import end_token_ids
from tokasaurus.model.json_fields import JsonFields
from tokasaurus.protocol.messages import SAMPLING_LIMITS

__all__ = ["model_facts", "model_shape", "read_model_config"]

log = logging.getLogger(__name__)

# The dtypes that a model can run in, in the words of safetensors.
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def read_model_config(path: str | Path, rope_scaling_override: str | None = None) -> ModelConfig:
    """Reads and checks ``config.json``.

    Args:
        path: the model's directory.
        rope_scaling_override: a JSON object that replaces the checkpoint's RoPE scaling. It
            stretches the positions that the model had before any scaling.

    Raises:
        ModelError: names the file and the field.
    """
    directory = Path(path)
    config = _parse(_read_config(directory), rope_scaling_override)
    adapted = _adapt(config, CheckpointHeaders.read(directory))
    if config.tie_word_embeddings and not adapted.tie_word_embeddings:
        log.warning(
            "%s: field 'tie_word_embeddings' is true, but the weights have a %s that differs from "
            "the embedding; both are kept",
            directory / "config.json",
            HEAD,
        )
    elif adapted != config:
        log.warning(
            "%s has no %s: the model embeds texts, and what it generates means nothing",
            directory,
            HEAD,
        )
    return adapted


def model_facts(
    path: str | Path,
    rope_scaling_override: str | None = None,
    load_format: str = "auto",
    tokenizer: str | Path | None = None,
) -> ModelFacts:
    """Reads what the composition root needs: sizes, and the model's defaults of generation.

    Args:
        path: the model's directory.
        rope_scaling_override: see :func:`read_model_config`.
        load_format: "auto" compares the sizes with the headers of the weights, if there are any.
        tokenizer: the directory of the tokenizer; None is the model's.

    Raises:
        ModelError: names the file and the field.
    """
    directory = Path(path)
    fields = _read_config(directory)
    config = _parse(fields, rope_scaling_override)
    headers = CheckpointHeaders.read(directory)
    if headers is not None and load_format == "auto":
        check_sizes(fields, config, headers.shapes)
    config = _adapt(config, headers)
    generation = JsonFields({}, "")
    if (directory / "generation_config.json").exists():
        generation = JsonFields.read(directory / "generation_config.json")
    # A chat's template ends messages with the tokenizer's token, which fine-tunes of base models
    # name in no other file.
    eos_token_ids = dict.fromkeys(
        (
            *generation.integers("eos_token_id"),
            *fields.integers("eos_token_id"),
            *end_token_ids(directory if tokenizer is None else Path(tokenizer)),
        )
    )
    return ModelFacts(
        path=str(directory),
        vocab_size=config.vocab_size,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_position_embeddings,
        kv_elements_per_token=config.kv_elements_per_token,
        num_parameters=config.num_parameters,
        num_product_parameters=config.num_product_parameters,
        num_product_rows=config.num_product_rows,
        activation_elements_per_token=config.activation_elements_per_token,
        # Ids beyond the vocabulary are never drawn, and some files say -1 for none.
        eos_token_ids=tuple(i for i in eos_token_ids if 0 <= i < config.vocab_size),
        dtype=_dtype(fields, headers),
        rope=_rope_digest(config),
        sampling_defaults={
            name: _sampling_number(generation, name)
            for name in SAMPLING_LIMITS
            if name in generation
        },
    )


def model_shape(
    path: str | Path, name: str, rope_scaling_override: str | None = None
) -> ModelShape:
    """What a cartridge must have in common with a model.

    Args:
        path: the model's directory.
        name: what users call the model.
        rope_scaling_override: see :func:`read_model_config`.

    Raises:
        ModelError: names the file and the field.
    """
    config = _parse(_read_config(Path(path)), rope_scaling_override)
    return ModelShape(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        name=name,
        rope=_rope_digest(config),
    )


def _rope_digest(config: ModelConfig) -> str:
    rope = {"kind": type(config.rope).__name__, **asdict(config.rope)}
    return hashlib.sha256(json.dumps(rope, sort_keys=True).encode()).hexdigest()


def _dtype(fields: JsonFields, headers: CheckpointHeaders | None) -> str | None:
    """The dtype of the files; without files the one in ``config.json``."""
    if headers is not None:
        return _DTYPES.get(headers.dtype or "")
    # transformers 4 calls it torch_dtype. Some files write "torch.bfloat16".
    value = fields.raw("dtype") or fields.raw("torch_dtype")
    name = str(value).removeprefix("torch.")
    return name if name in _DTYPES.values() else None


def _adapt(config: ModelConfig, headers: CheckpointHeaders | None) -> ModelConfig:
    """The shape of the model in the files, where it is not the one that ``config.json`` says."""
    if headers is None:
        return config
    if config.tie_word_embeddings and headers.heads_differ:
        return replace(config, tie_word_embeddings=False)
    if not headers.has_prefix and HEAD not in headers.shapes:
        return replace(config, tie_word_embeddings=True)
    return config


def _read_config(directory: Path) -> JsonFields:
    path = directory / "config.json"
    if not directory.is_dir():
        raise ModelError(f"{directory} is not a directory with a model")
    if not path.exists():
        raise ModelError(
            f"{directory} has no config.json: it is not a model that transformers saved"
        )
    return JsonFields.read(path)


def _sampling_number(generation: JsonFields, name: str) -> float:
    """A number of ``Sampling``, within the limits that requests have."""
    low, high = SAMPLING_LIMITS[name]
    value = generation.number(name, minimum=low)
    if value > high:
        raise generation.error(name, f"must be at most {high:g}, not {value!r}")
    if name != "top_k":
        return value
    if value != int(value):
        raise generation.error(name, f"must be a whole number, not {value!r}")
    return int(value)


def _parse(fields: JsonFields, rope_scaling_override: str | None) -> ModelConfig:
    names = fields.strings("architectures")
    supported = f"supported: {', '.join(ARCHITECTURES)}"
    if not names:
        raise fields.error("architectures", f"is missing; {supported}")
    if names[0] not in ARCHITECTURES:
        raise fields.error("architectures", f"is {names[0]!r}; {supported}")
    override = None
    if rope_scaling_override is not None:
        override = JsonFields.parse(rope_scaling_override, "rope_scaling=...")
    return ARCHITECTURES[names[0]].parse(fields, override)
