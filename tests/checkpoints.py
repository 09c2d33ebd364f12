"""Tiny checkpoints with random weights, which transformers makes, for tests that load a model.

Weights have a wide spread, so that logits have margins and greedy decoding visits many tokens of
the vocabulary instead of repeating one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}

# The major version of the installed one, which spells config.json in its own way.
TRANSFORMERS = int(transformers.__version__.partition(".")[0])

# Contexts are so short that all branches of a scaling matter within a few dozen tokens.
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
# Bytes, special tokens, and a few rows without a token.
VOCAB_SIZE = 256 + 3 + 5
EOS_ID = 257

_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '[' + message['role'] + ']' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


def make_checkpoint(
    directory: Path,
    architecture: str,
    *,
    tied: bool = False,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    num_layers: int = 3,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    rope: str | dict[str, Any] = "default",
    config_style: int = 5,
    seed: int = 0,
    **config_fields: Any,
) -> Path:
    """Writes a model, tokenizer and generation config to a directory.

    Args:
        directory: created if it does not exist.
        architecture: "llama", "qwen2" or "qwen3".
        tied: the head shares the embedding's weight.
        head_dim: written explicitly, except for qwen2, which has no such field.
        shards: the least number of safetensors files.
        rope: a name in ROPES, or ``rope_parameters`` in the spelling of transformers 5.
        config_style: 4 or 5, for the config.json of transformers 4 or 5, whichever is installed.
        **config_fields: other fields of the architecture's config.

    Returns:
        The directory.
    """
    config_class, model_class = ARCHITECTURES[architecture]
    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": num_heads * head_dim,
        "intermediate_size": 96,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "initializer_range": 0.18,
        "bos_token_id": 256,
        "eos_token_id": EOS_ID,
        "pad_token_id": 258,
        **rope_fields(ROPES[rope] if isinstance(rope, str) else rope),
    }
    if architecture != "qwen2":
        fields["head_dim"] = head_dim
    config = config_class(**{**fields, **config_fields})
    torch.manual_seed(seed)
    model = model_class(config).to(dtype)
    _spread_biases_and_norms(model)
    model.generation_config = GenerationConfig(bos_token_id=256, eos_token_id=EOS_ID)
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(directory, max_shard_size=num_bytes // shards if shards > 1 else "1GB")
    make_tokenizer().save_pretrained(directory)
    _RESPELL[config_style](directory / "config.json")
    return directory


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, three special tokens, a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast


def edit_json(path: Path, **fields: Any) -> None:
    """Sets fields of a JSON file; None removes one."""
    values = json.loads(path.read_text())
    for name, value in fields.items():
        if value is None:
            values.pop(name, None)
        else:
            values[name] = value
    path.write_text(json.dumps(values))


def _spread_biases_and_norms(model: torch.nn.Module) -> None:
    """transformers sets biases to 0 and norms to 1, which hides a loader that mixes them up."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif "norm" in name:
                parameter.normal_(1, 0.2)


def rope_fields(rope: dict[str, Any]) -> dict[str, Any]:
    """``rope_parameters`` of transformers 5 as fields of the config of the installed one."""
    return {"rope_parameters": dict(rope)} if TRANSFORMERS > 4 else _older_fields(rope)


def _older_fields(rope: dict[str, Any]) -> dict[str, Any]:
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    return {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
    }


def _respell_as_older(path: Path) -> None:
    fields = json.loads(path.read_text())
    if "rope_parameters" in fields:
        edit_json(path, rope_parameters=None, **_older_fields(fields["rope_parameters"]))
    edit_json(path, dtype=None, torch_dtype=fields["dtype"], transformers_version="4.57.1")


def _respell_as_newer(path: Path) -> None:
    fields = json.loads(path.read_text())
    if "rope_parameters" in fields:
        return
    scaling = fields.get("rope_scaling") or {"rope_type": "default"}
    rope = {**scaling, "rope_theta": fields["rope_theta"]}
    edit_json(path, rope_parameters=rope, rope_theta=None, rope_scaling=None)
    edit_json(path, transformers_version="5.0.0")


_RESPELL = {4: _respell_as_older, 5: _respell_as_newer}
