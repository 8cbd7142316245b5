"""Classifies the fields of a config.json that a family doesn't read.

Many are harmless: settings of training and generation, or notes by the program that wrote the file.
But a field that names a computation of another family (soft caps, multipliers, windows) may have
changed logits in the code that trained the model, even if transformers' class ignores it.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from salt_jax.models.decoder_config import DecoderConfig

# Fields that transformers writes or once read, and that no forward pass needs.
_WITHOUT_EFFECT = frozenset(
    (
        *("architectures", "model_type", "transformers_version", "vocab_size", "is_decoder"),
        *("torch_dtype", "dtype", "use_bfloat16", "torchscript", "return_dict", "use_cache"),
        *("initializer_range", "pretraining_tp", "gradient_checkpointing", "neftune_noise_alpha"),
        *("output_attentions", "output_hidden_states", "chunk_size_feed_forward"),
        *("tie_encoder_decoder", "tie_last_hidden_states", "tf_legacy_loss", "keys_to_ignore"),
        *("num_labels", "id2label", "label2id", "problem_type", "finetuning_task"),
        *("task_specific_params", "tokenizer_class", "prefix", "name_or_path", "_name_or_path"),
        *("max_sequence_length", "max_seq_len", "max_seq_length", "model_max_length"),
        *("n_positions", "n_ctx", "original_max_position_embeddings", "max_window_layers"),
        *("n_special", "predict_special_tokens"),
        # Of generation.
        *("max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams"),
        *("num_beam_groups", "temperature", "top_k", "top_p", "typical_p", "diversity_penalty"),
        *("repetition_penalty", "length_penalty", "no_repeat_ngram_size", "bad_words_ids"),
        *("encoder_no_repeat_ngram_size", "num_return_sequences", "output_scores"),
        *("return_dict_in_generate", "remove_invalid_values", "suppress_tokens"),
        *("begin_suppress_tokens", "exponential_decay_length_penalty", "cache_implementation"),
    )
)
# Token ids, dropout, choice of kernel, number of devices.
_WITHOUT_EFFECT_PATTERN = re.compile(
    r"_token_ids?$|dropout|pdrop|layerdrop|layer_drop|attn_implementation|flash_attn"
    r"|flash_attention|^summary_|(model|tensor|pipeline|sequence)_parallel|vocab_size_multiple"
)

# Words in the names of fields that other families' forward passes read.
_OF_A_COMPUTATION = re.compile(
    r"rope|rotary|yarn|alibi|nope|theta|freq|interleav|position_emb|position_bias|softcap|capping"
    r"|clip|scal|multipl|factor|pct|fraction|mup|norm|bias|window|sliding|chunk|expert|moe|router"
    r"|gate|gating|atten|attn|mask|causal|bidirection|head|query|key_|value_|qk|kv|residual"
    r"|parallel|layer|block|hidden|mlp|ffn|swiglu|glu|activation|_act|embed|conv|ssm|mamba|memory"
    r"|recurr|logit|quant|compress|lora|adapter|peft|prun|spars|skip|loop|cross|encoder|prompt"
    r"|weight|text_config|auto_map|type_vocab|share|sink",
    re.IGNORECASE,
)
# Factors, for which 1 is neutral, not 0.
_FACTORS = re.compile(r"scal|multipl|factor|pct|fraction", re.IGNORECASE)

# Neutral values that are not "off": with them a field agrees with our decoder.
_NEUTRAL: Mapping[str, Any] = {
    **dict.fromkeys(("is_causal", "causal", "use_rope", "use_rotary", "rotary"), True),
    **dict.fromkeys(("scale_attn_weights", "rms_norm", "use_rms_norm", "pre_norm"), True),
    **dict.fromkeys(("swiglu", "use_swiglu", "gated_mlp"), True),
    **dict.fromkeys(("rope_type", "rotary_type"), "default"),
    "position_embedding_type": "rope",
    "full_attn_mod": 1,  # of Phi 4 mini: every layer
}


def other_computations(
    settings: Mapping[str, Any], read: Collection[str], config: DecoderConfig
) -> Iterator[str]:
    """The fields of `settings` that are not in `read` and may change logits: their value differs
    from what `config` implies."""
    for field in _not_read(settings, read):
        if _OF_A_COMPUTATION.search(field) and not _is_neutral(field, settings, config):
            yield field


def unknown_fields(settings: Mapping[str, Any], read: Collection[str]) -> list[str]:
    """The fields that are set and are neither read, known, nor named like a computation."""
    return [
        field
        for field in _not_read(settings, read)
        if not _OF_A_COMPUTATION.search(field) and not _is_off(settings[field])
    ]


def _not_read(settings: Mapping[str, Any], read: Collection[str]) -> Iterator[str]:
    for field in sorted(settings.keys() - set(read) - _WITHOUT_EFFECT):
        if not _WITHOUT_EFFECT_PATTERN.search(field):
            yield field


def _is_neutral(field: str, settings: Mapping[str, Any], config: DecoderConfig) -> bool:
    value = settings[field]
    if value is None or value in ("", [], {}):
        return True
    if field == "layer_types":
        return value == ["full_attention"] * config.num_layers
    if field == "sliding_window" and settings.get("use_sliding_window") is False:
        return True
    if (same := _implied_settings(config).get(field)) is not None:
        return _is_number(value) and abs(value - same) <= 1e-6 * abs(same)
    if field in _NEUTRAL:
        return bool(value == _NEUTRAL[field])
    if _FACTORS.search(field):
        return value is False or (_is_number(value) and value == 1)
    return _is_off(value)


def _implied_settings(config: DecoderConfig) -> dict[str, float | None]:
    """Settings that the model has already, under other families' names."""
    return {
        **dict.fromkeys(("num_layers", "n_layer", "n_layers"), config.num_layers),
        **dict.fromkeys(("num_heads", "n_head", "n_heads"), config.num_heads),
        **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), config.kv_heads),
        **dict.fromkeys(("head_dim", "kv_channels", "query_pre_attn_scalar"), config.head_width),
        **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "norm_eps"), config.norm_epsilon),
        **dict.fromkeys(("rope_theta", "rotary_emb_base"), config.rope_theta),
        **dict.fromkeys(("partial_rotary_factor", "rotary_pct"), config.rope_fraction),
        "rotary_dim": config.rotary_dim,
        "sliding_window_size": config.window,
        "attention_multiplier": config.head_width**-0.5,
    }


def _is_off(value: Any) -> bool:
    return value is None or value in (False, "", [], {})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
