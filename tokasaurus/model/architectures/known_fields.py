"""The fields of ``config.json`` that change no result of a model of Llama's skeleton. No torch.

Every other field that is not read is refused: a model that loads and answers wrongly is worse than
one that does not load.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokasaurus.model.json_fields import JsonFields

__all__ = ["refuse_unknown"]

_READ = """
    architectures attention_bias eos_token_id head_dim hidden_act hidden_size intermediate_size
    layer_types max_position_embeddings max_window_layers mlp_bias model_type num_attention_heads
    num_hidden_layers num_key_value_heads original_max_position_embeddings partial_rotary_factor
    quantization_config rms_norm_eps rope_parameters rope_scaling rope_theta sliding_window
    tie_word_embeddings use_sliding_window vocab_size
"""

# Of the last line, the names of the tensors tell which biases there are.
_HARMLESS = """
    attention_dropout attn_dropout attn_pdrop classifier_dropout dropout embd_pdrop hidden_dropout
    resid_pdrop residual_dropout

    attn_implementation cache_implementation chunk_size_feed_forward dtype gradient_checkpointing
    initializer_range pretraining_tp tensor_parallel_degree torch_dtype torchscript use_bfloat16
    use_cache use_flash_attention use_flash_attn

    bos_token_id decoder_start_token_id ignore_index mask_token_id pad_token_id prefix sep_token_id
    unk_token_id

    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id
    forced_eos_token_id length_penalty max_length max_new_tokens min_length no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states
    output_scores remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    suppress_tokens temperature top_k top_p typical_p

    finetuning_task id2label is_decoder label2id num_labels problem_type task_specific_params
    tf_legacy_loss

    auto_map author description license max_sequence_length model_max_length model_name name
    name_or_path tokenizer_class tokenizer_model_max_length tokenizer_padding_side version

    attention_out_bias bias qkv_bias use_bias
"""
_KNOWN = frozenset(f"{_READ} {_HARMLESS}".split())
_HARMLESS_PREFIXES = ("_", "transformers", "unsloth")

# Values of fields that ask for what these models do anyway.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "causal": (True,),
    "embedding_multiplier": (1.0,),
    "hidden_activation": ("silu", "swish"),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "mlp_only_layers": ([],),
    "output_router_logits": (False,),
    "pruned_heads": ({}, []),
    "qk_norm": (False,),
    "residual_multiplier": (1.0,),
    "rope_interleaved": (False,),
    "scale_embeddings": (False,),
    "tie_encoder_decoder": (False,),
    "use_bidirectional_attention": (False,),
    "use_mrope": (False,),
    "use_parallel_residual": (False,),
    "use_qk_norm": (False,),
    "use_rope": (True,),
}


def refuse_unknown(fields: JsonFields, model_type: str) -> None:
    """Refuses what contradicts an architecture, and what it does not know.

    Args:
        fields: the whole ``config.json``.
        model_type: of the architecture.

    Raises:
        ModelError: names the field.
    """
    if fields.text("model_type", model_type) != model_type:
        raise fields.error(
            "model_type",
            f"is {fields.raw('model_type')!r}, which contradicts {fields.strings('architectures')};"
            f" it must be {model_type!r}",
        )
    for name in fields.names():
        if name in _KNOWN or name.startswith(_HARMLESS_PREFIXES):
            continue
        value = fields.raw(name)
        if name not in _NEUTRAL:
            raise fields.error(
                name,
                f"is {_shortened(value)}: {model_type} models do not have it, and it may change "
                "the result; remove it if it does not",
            )
        if not any(type(value) is type(each) and value == each for each in _neutral(name)):
            raise fields.error(name, f"is {_shortened(value)}, which is not supported")


def _neutral(name: str) -> list[Any]:
    """The neutral values of a field; a whole number may stand for a float."""
    values = list(_NEUTRAL[name])
    return values + [int(value) for value in values if isinstance(value, float)]


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
