"""Checkpoints with random weights, made from a shape alone, that every engine can load.

The tokenizer has one token for each byte, and one for each of the first pairs of bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokasaurus.errors import ConfigError

__all__ = [
    "SHAPES",
    "Shape",
    "cache_directory",
    "make_checkpoint",
    "make_once",
    "make_without_weights",
]

_SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>")
_LENGTH_LIMIT = 8192


@dataclass(frozen=True)
class Shape:
    """The numbers of a Llama."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def kv_bytes(self, element_bytes: int) -> int:
        """Bytes of the keys and values of one token."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * element_bytes

    def config(self) -> dict[str, Any]:
        """The fields of config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": _LENGTH_LIMIT,
            "rms_norm_eps": 1e-5,
            "rope_theta": 100000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            "torch_dtype": "float32",
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor of the checkpoint."""
        hidden, inner = self.hidden_size, self.intermediate_size
        kv_size = self.num_kv_heads * self.head_dim
        layer = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv_size, hidden),
            "self_attn.v_proj": (kv_size, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, hidden),
            "model.norm.weight": (hidden,),
        }
        for number in range(self.num_layers):
            for name, shape in layer.items():
                shapes[f"model.layers.{number}.{name}.weight"] = shape
        return shapes


SHAPES = {
    "smollm2-135m": Shape(576, 1536, 30, 9, 3, 49152),
    # The same, with heads that two ranks share.
    "smollm2-8-heads": Shape(512, 1536, 30, 8, 4, 49152),
    "llama-1b": Shape(2048, 8192, 16, 32, 8, 128256),
    "tiny": Shape(64, 128, 2, 2, 1, 512),
}


def cache_directory() -> Path:
    """Where the command keeps what it makes."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "tokasaurus" / "bench"


def make_once(directory: Path, fill: Callable[[Path], None]) -> None:
    """Makes a directory, unless it exists. It gets its name when it is complete.

    Raises:
        ConfigError: the directory cannot be written.
    """
    if directory.is_dir():
        return
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename}: {error.strerror}") from None
    try:
        fill(unfinished)
        unfinished.rename(directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def make_checkpoint(shape: Shape, directory: Path) -> None:
    """Fills a directory with a checkpoint in fp32 and its tokenizer."""
    from safetensors.torch import save_file

    from tokasaurus.model.weights.dummy import dummy_tensors

    tensors = dict(dummy_tensors(shape.tensors()))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    make_without_weights(shape, directory)


def make_without_weights(shape: Shape, directory: Path) -> None:
    """Fills a directory with all of a checkpoint but its weights: for load_format=dummy."""
    files = {
        "config.json": shape.config(),
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": _SPECIAL_TOKENS[0],
            "eos_token": _SPECIAL_TOKENS[1],
            "pad_token": _SPECIAL_TOKENS[2],
            "model_max_length": _LENGTH_LIMIT,
        },
    }
    for name, fields in files.items():
        (directory / name).write_text(json.dumps(fields, indent=2) + "\n")
    _write_tokenizer(shape.vocab_size, directory / "tokenizer.json")


def _write_tokenizer(vocab_size: int, path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(left, right) for left in alphabet for right in alphabet]
    merges = pairs[: vocab_size - len(_SPECIAL_TOKENS) - len(alphabet)]
    tokens = (*_SPECIAL_TOKENS, *alphabet, *(left + right for left, right in merges))
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in _SPECIAL_TOKENS]
    )
    tokenizer.save(str(path))
