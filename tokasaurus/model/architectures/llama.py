"""Llama 3.x, and models of the same shape (Llama 2, SmolLM, many fine-tunes). Loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from tokasaurus.model.architectures.known_fields import refuse_unknown
from tokasaurus.model.config import ModelConfig
from tokasaurus.model.json_fields import JsonFields
from tokasaurus.model.rope_config import parse_rope

if TYPE_CHECKING:
    from tokasaurus.model.architectures.llama_model import LlamaModel

__all__ = ["Llama"]

_SILU = ("silu", "swish")  # two names that transformers has for one function


class Llama:
    """Implements ``Architecture``; others of its skeleton subclass it.

    Attributes:
        model_type: the only one that files may name.
        default_positions: for files without ``max_position_embeddings``.
        default_head_dim: for files without ``head_dim``; None divides the hidden size by the heads.
    """

    model_type: ClassVar[str] = "llama"
    default_positions: ClassVar[int] = 2048
    default_head_dim: ClassVar[int | None] = None

    def parse(self, fields: JsonFields, rope_scaling: JsonFields | None) -> ModelConfig:
        refuse_unknown(fields, self.model_type)
        _refuse_unsupported(fields)
        num_heads = fields.integer("num_attention_heads")
        num_kv_heads = fields.integer("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise fields.error(
                "num_key_value_heads", f"is {num_kv_heads}, which does not divide {num_heads} heads"
            )
        max_position = fields.integer("max_position_embeddings", self.default_positions)
        rope, max_position = parse_rope(fields, max_position, rope_scaling)
        self._refuse_windows(fields, max_position)
        attention_bias = fields.flag("attention_bias", False)
        return ModelConfig(
            architecture=fields.strings("architectures")[0],
            vocab_size=fields.integer("vocab_size"),
            hidden_size=fields.integer("hidden_size"),
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=fields.integer("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=self._head_dim(fields, num_heads),
            max_position_embeddings=max_position,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6, minimum=0),
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
            qkv_bias=attention_bias,
            output_bias=attention_bias,
            mlp_bias=fields.flag("mlp_bias", False),
            qk_norm=False,
            rope=rope,
        )

    def model_class(self) -> type[LlamaModel]:
        from tokasaurus.model.architectures.llama_model import LlamaModel

        return LlamaModel

    def _refuse_windows(self, fields: JsonFields, max_position: int) -> None:
        """Refuses layers with sliding windows. A window as long as all positions is none."""
        layer_types = fields.strings("layer_types")
        other_layers = set(layer_types) - {"full_attention"}
        if other_layers:
            raise fields.error(
                "layer_types", f"has {min(other_layers)!r}; only full attention is supported"
            )
        window = fields.integer("sliding_window", 4096, 0)
        if layer_types or fields.is_null("sliding_window") or window >= max_position:
            return
        # Llama has no windows. Files that say one without this field are another model's.
        if "sliding_window" in fields and "use_sliding_window" not in fields:
            if self.model_type == "llama":
                raise fields.error("sliding_window", f"is {window}: windows are not supported")
            return
        # Layers from max_window_layers on slide.
        num_layers = fields.integer("num_hidden_layers")
        num_sliding = num_layers - fields.integer("max_window_layers", 28, 0)
        if fields.flag("use_sliding_window", False) and num_sliding > 0:
            raise fields.error("use_sliding_window", "is true: sliding windows are not supported")

    def _head_dim(self, fields: JsonFields, num_heads: int) -> int:
        hidden_size = fields.integer("hidden_size")
        if "head_dim" in fields:
            head_dim = fields.integer("head_dim")
        elif self.default_head_dim is not None:
            head_dim = self.default_head_dim
        elif hidden_size % num_heads:
            raise fields.error(
                "head_dim",
                f"is missing, and hidden_size {hidden_size} is not a multiple of {num_heads} heads",
            )
        else:
            head_dim = hidden_size // num_heads
        if head_dim % 2:
            raise fields.error("head_dim", f"is {head_dim}; rotary embeddings need an even size")
        return head_dim


def _refuse_unsupported(fields: JsonFields) -> None:
    activation = fields.text("hidden_act", "silu")
    if activation not in _SILU:
        raise fields.error("hidden_act", f"is {activation!r}; only 'silu' is supported")
    if "quantization_config" in fields:
        raise fields.error("quantization_config", "is set: quantized checkpoints are not supported")
