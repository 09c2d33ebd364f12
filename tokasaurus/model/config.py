"""What a checkpoint's ``config.json`` and ``generation_config.json`` say, parsed by ourselves. No torch.

Owns the decision which checkpoints can be served at all: a field that would change the result and is
not implemented is refused by name, never ignored. Knows nothing of weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tokasaurus.config.slices import ModelFacts
from tokasaurus.errors import ModelError
from tokasaurus.model.architectures.registry import ARCHITECTURES
from tokasaurus.model.json_fields import JsonFields
from tokasaurus.model.layers.rope_config import LinearRope, RopeConfig, YarnRope, parse_rope

__all__ = ["ModelConfig", "model_facts", "read_model_config"]

T = TypeVar("T")

_SILU = ("silu", "swish")  # two names that transformers has for one function
_QWEN3_HEAD_DIM = 128  # Qwen3Config's default; the others derive it


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only transformer."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention_bias: bool  # as the field says; an architecture may not ask
    mlp_bias: bool
    rope: RopeConfig

    @property
    def kv_elements_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


def read_model_config(path: str | Path, rope_scaling_override: str | None = None) -> ModelConfig:
    """Reads and checks ``config.json``.

    Args:
        path: the model's directory.
        rope_scaling_override: JSON object that replaces the checkpoint's RoPE scaling. If it stretches
            positions (linear, yarn), ``max_position_embeddings`` grows with it.

    Raises:
        ModelError: naming the file and the field.
    """
    fields = _read_config(Path(path))
    architecture = _architecture(fields)
    _refuse_unsupported(fields)
    num_heads = fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise fields.error(
            "num_key_value_heads", f"is {num_kv_heads}, which does not divide {num_heads} heads"
        )
    max_position = fields.integer("max_position_embeddings")
    override = None
    if rope_scaling_override is not None:
        override = JsonFields.parse(rope_scaling_override, "rope_scaling=...")
    rope = parse_rope(fields, max_position, override)
    if override is not None:
        max_position = _stretched(rope, max_position)
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(fields, architecture, num_heads),
        max_position_embeddings=max_position,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6, minimum=0),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        attention_bias=fields.flag("attention_bias", False),
        mlp_bias=fields.flag("mlp_bias", False),
        rope=rope,
    )


def model_facts(path: str | Path, rope_scaling_override: str | None = None) -> ModelFacts:
    """What the composition root needs before any tensor is read: sizes, and the defaults of generation.

    Raises:
        ModelError: naming the file and the field.
    """
    directory = Path(path)
    config = read_model_config(directory, rope_scaling_override)
    generation = JsonFields({}, "")
    if (directory / "generation_config.json").exists():
        generation = JsonFields.read(directory / "generation_config.json")

    def said(name: str, read: Callable[[str], T]) -> T | None:
        return read(name) if name in generation else None

    eos_token_ids = generation.integers("eos_token_id")
    if not eos_token_ids:
        eos_token_ids = _read_config(directory).integers("eos_token_id")
    return ModelFacts(
        path=str(directory),
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        kv_elements_per_token=config.kv_elements_per_token,
        # What is beyond the vocabulary is never drawn, and a -1 stands for none.
        eos_token_ids=tuple(i for i in eos_token_ids if 0 <= i < config.vocab_size),
        temperature=said("temperature", lambda name: generation.number(name, minimum=0)),
        top_p=said("top_p", lambda name: generation.positive(name, maximum=1)),
        top_k=said("top_k", lambda name: generation.integer(name, minimum=0)),
        min_p=said("min_p", lambda name: generation.number(name, minimum=0)),
    )


def _read_config(directory: Path) -> JsonFields:
    path = directory / "config.json"
    if not directory.is_dir():
        raise ModelError(f"{directory} is not a directory with a model")
    if not path.exists():
        raise ModelError(
            f"{directory} has no config.json: it is not a model that transformers saved"
        )
    return JsonFields.read(path)


def _architecture(fields: JsonFields) -> str:
    names = fields.strings("architectures")
    supported = f"supported: {', '.join(ARCHITECTURES)}"
    if not names:
        raise fields.error("architectures", f"is missing; {supported}")
    if names[0] not in ARCHITECTURES:
        raise fields.error("architectures", f"is {names[0]!r}; {supported}")
    return names[0]


def _refuse_unsupported(fields: JsonFields) -> None:
    activation = fields.text("hidden_act", "silu")
    if activation not in _SILU:
        raise fields.error("hidden_act", f"is {activation!r}; only 'silu' is supported")
    if "quantization_config" in fields:
        raise fields.error("quantization_config", "is set: quantized checkpoints are not supported")
    other_layers = set(fields.strings("layer_types")) - {"full_attention"}
    if other_layers:
        raise fields.error(
            "layer_types", f"has {min(other_layers)!r}; only full attention is supported"
        )
    # Layers from max_window_layers on slide.
    num_sliding = fields.integer("num_hidden_layers") - fields.integer("max_window_layers", 28, 0)
    if fields.flag("use_sliding_window", False) and num_sliding > 0:
        raise fields.error("use_sliding_window", "is true: sliding windows are not supported")


def _head_dim(fields: JsonFields, architecture: str, num_heads: int) -> int:
    hidden_size = fields.integer("hidden_size")
    if "head_dim" in fields:
        head_dim = fields.integer("head_dim")
    elif architecture == "Qwen3ForCausalLM":
        head_dim = _QWEN3_HEAD_DIM
    elif hidden_size % num_heads:
        raise fields.error(
            "head_dim",
            f"is missing, and hidden_size {hidden_size} is no multiple of {num_heads} heads",
        )
    else:
        head_dim = hidden_size // num_heads
    if head_dim % 2:
        raise fields.error("head_dim", f"is {head_dim}; rotary embeddings need an even size")
    return head_dim


def _stretched(rope: RopeConfig, max_position: int) -> int:
    if isinstance(rope, YarnRope):
        return max(max_position, int(rope.factor * rope.original_max_position))
    if isinstance(rope, LinearRope):
        return int(rope.factor * max_position)
    return max_position
