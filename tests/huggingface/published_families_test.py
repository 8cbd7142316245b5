"""config.json as it is published with models of the later families.

As `tests/models/published_configs_test.py`, which has GPT-NeoX, Llama and Gemma 1: sizes, fields
and counts of parameters are the published ones.
"""

from typing import Any

import pytest

from salt_jax.errors import InputError
from salt_jax.huggingface.model_config import config_from_json

_SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "vocab_size"),
)
_USUAL = {
    **{"attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02},
    **{"bos_token_id": 1, "eos_token_id": 2, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
    **{"torch_dtype": "bfloat16", "transformers_version": "4.45.0", "use_cache": True},
}
_LLAMA3 = {
    **{"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0},
    **{"original_max_position_embeddings": 8192, "rope_type": "llama3"},
}
_MISTRAL = {"max_position_embeddings": 32768, "rms_norm_eps": 1e-5}
_LLAMA = {
    **{"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "rms_norm_eps": 1e-5},
    **{"max_position_embeddings": 131072, "rope_theta": 500000.0},
}
_QWEN = {"max_position_embeddings": 32768, "rope_theta": 1000000.0, "use_sliding_window": False}
_QWEN2 = {**_QWEN, "sliding_window": 32768, "use_mrope": False}
_QWEN3 = {
    **{**_QWEN, "max_position_embeddings": 40960, "sliding_window": None, "head_dim": 128},
    **{"attention_bias": False, "rope_scaling": None},
}
_OLMO = {
    **{"attention_bias": False, "max_position_embeddings": 4096, "pad_token_id": 100277},
    **{"rope_scaling": None, "rope_theta": 500000},
}
_GRANITE = {
    **{"attention_bias": False, "attention_dropout": 0.1, "embedding_multiplier": 12.0},
    **{"max_position_embeddings": 131072, "mlp_bias": False, "residual_multiplier": 0.22},
    **{"rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 5000000.0},
    "tie_word_embeddings": True,
}
_LONGROPE = {"long_factor": [1.5] * 48, "short_factor": [1.0] * 48, "type": "longrope"}
_PHI = {
    **{"attention_bias": False, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "rms_norm_eps": 1e-5},
    "rope_scaling": None,
}
_GEMMA = {
    **{"attention_bias": False, "cache_implementation": "hybrid", "head_dim": 256},
    **{"hidden_activation": "gelu_pytorch_tanh", "pad_token_id": 0, "query_pre_attn_scalar": 256},
    **{"hidden_act": ..., "tie_word_embeddings": ...},  # not in the files
}
_GEMMA2 = {
    **{**_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    **{"max_position_embeddings": 8192, "rope_theta": 10000.0, "sliding_window": 4096},
    "hidden_act": "gelu_pytorch_tanh",
}
_GEMMA3 = {
    **{**_GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    **{"max_position_embeddings": 32768, "rope_local_base_freq": 10000, "rope_scaling": None},
    **{"rope_theta": 1000000, "sliding_window": 512},
}
_GPT2 = {
    **{"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"]},
    **{"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1, "initializer_range": 0.02},
    **{"bos_token_id": 50256, "eos_token_id": 50256, "layer_norm_epsilon": 1e-5},
    **{"model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12},
    **{"n_positions": 1024, "predict_special_tokens": True, "vocab_size": 50257},
    **{"summary_activation": None, "summary_first_dropout": 0.1, "summary_type": "cls_index"},
    **{"summary_proj_to_labels": True, "summary_use_proj": True},
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}


def _of(model_type: str, sizes: tuple[int, ...], *parts: dict[str, Any], **more: Any) -> Any:
    settings: dict[str, Any] = {"model_type": model_type, **dict(zip(_SIZES, sizes, strict=True))}
    for part in (_USUAL, *parts, more):
        settings |= part
    return {name: value for name, value in settings.items() if value is not ...}


# By name: config.json, ids of the tokenizer, parameters, and settings of the decoder.
PUBLISHED: dict[str, tuple[dict[str, Any], int, int, dict[str, Any]]] = {
    "Mistral-7B-v0.1": (
        _of(
            *("mistral", (4096, 32, 32, 8, 14336, 32000), _MISTRAL),
            **{"rope_theta": 10000.0, "sliding_window": 4096},
        ),
        *(32000, 7_241_732_096, {"layer_kinds": ("local",), "window": 4096}),
    ),
    "Mistral-7B-v0.3": (
        _of(
            *("mistral", (4096, 32, 32, 8, 14336, 32768), _MISTRAL),
            **{"rope_theta": 1000000.0, "sliding_window": None},
        ),
        *(32768, 7_248_023_552, {"layer_kinds": ("global",), "rope_theta": 1e6}),
    ),
    "Llama-3.2-1B": (
        _of(
            *("llama", (2048, 16, 32, 8, 8192, 128256), _LLAMA),
            **{"head_dim": 64, "rope_scaling": _LLAMA3, "tie_word_embeddings": True},
        ),
        *(128256, 1_235_814_400, {"tied_embeddings": True}),
    ),
    "Llama-3.1-8B": (
        _of(
            *("llama", (4096, 32, 32, 8, 14336, 128256), _LLAMA),
            rope_scaling={**_LLAMA3, "factor": 8.0},
        ),
        *(128256, 8_030_261_248, {"rope_theta": 5e5}),
    ),
    "Qwen2.5-0.5B": (
        _of(
            *("qwen2", (896, 24, 14, 2, 4864, 151936), _QWEN2),
            **{"max_window_layers": 24, "tie_word_embeddings": True},
        ),
        *(151665, 494_032_768, {"qkv_bias": True, "window": None}),
    ),
    "Qwen2.5-1.5B": (
        _of(
            *("qwen2", (1536, 28, 12, 2, 8960, 151936), _QWEN2),
            **{"max_window_layers": 28, "tie_word_embeddings": True},
        ),
        *(151665, 1_543_714_304, {}),
    ),
    "Qwen2.5-7B": (
        _of(*("qwen2", (3584, 28, 28, 4, 18944, 152064), _QWEN2), max_window_layers=28),
        *(151665, 7_615_616_512, {}),
    ),
    "Qwen3-0.6B": (
        _of(
            *("qwen3", (1024, 28, 16, 8, 3072, 151936), _QWEN3),
            **{"max_window_layers": 28, "tie_word_embeddings": True},
        ),
        *(151669, 596_049_920, {"qk_norm": "head", "head_dim": 128}),
    ),
    "Qwen3-8B": (
        _of(*("qwen3", (4096, 36, 32, 8, 12288, 151936), _QWEN3), max_window_layers=36),
        *(151669, 8_190_735_360, {}),
    ),
    "SmolLM3-3B": (
        _of(
            *("smollm3", (2048, 36, 16, 4, 11008, 128256)),
            **{"attention_bias": False, "mlp_bias": False, "pretraining_tp": 2},
            **{"layer_types": ["full_attention"] * 36, "no_rope_layers": [1, 1, 1, 0] * 9},
            **{"max_position_embeddings": 65536, "max_window_layers": 28, "rope_scaling": None},
            **{"no_rope_layer_interval": 4, "rope_theta": 5000000.0, "sliding_window": None},
            **{"tie_word_embeddings": True, "use_sliding_window": False},
        ),
        *(128256, 3_075_098_624, {"layer_kinds": ("global", "global", "global", "nope")}),
    ),
    "OLMo-2-0425-1B": (
        _of("olmo2", (2048, 16, 16, 16, 8192, 100352), _OLMO),
        *(100278, 1_484_916_736, {"qk_norm": "heads", "norm_placement": "after"}),
    ),
    "OLMo-2-1124-7B": (
        _of("olmo2", (4096, 32, 32, 32, 11008, 100352), _OLMO),
        *(100278, 7_298_617_344, {}),
    ),
    "granite-3.1-2b-base": (
        _of(
            *("granite", (2048, 40, 32, 8, 8192, 49155), _GRANITE),
            **{"attention_multiplier": 0.015625, "logits_scaling": 8.0},
        ),
        *(49155, 2_533_531_648, {"attention_scale": 1 / 64, "embedding_multiplier": 12.0}),
    ),
    "Phi-3-mini-4k-instruct": (
        _of(
            *("phi3", (3072, 32, 32, 32, 8192, 32064), _PHI),
            auto_map={"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
            **{"max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
            **{"rope_theta": 10000.0, "sliding_window": 2047},
        ),
        *(32011, 3_821_079_552, {"window": 2047}),
    ),
    "phi-4": (
        _of(
            *("phi3", (5120, 40, 40, 10, 17920, 100352), _PHI),
            **{"max_position_embeddings": 16384, "original_max_position_embeddings": 16384},
            **{"rope_theta": 250000, "sliding_window": None},
        ),
        *(100352, 14_659_507_200, {"window": None, "rope_theta": 2.5e5}),
    ),
    "Phi-4-mini-instruct": (
        _of(
            *("phi3", (3072, 32, 24, 8, 8192, 200064), _PHI),
            **{"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False},
            **{"max_position_embeddings": 131072, "original_max_position_embeddings": 4096},
            **{"mlp_bias": False, "partial_rotary_factor": 0.75, "rope_theta": 10000.0},
            **{"sliding_window": 262144, "tie_word_embeddings": True, "rope_scaling": _LONGROPE},
        ),
        *(200029, 3_836_021_760, {"rope_fraction": 0.75, "max_length": 4096}),
    ),
    "gpt2": (_GPT2, 50257, 124_439_808, {"max_length": 1024, "mlp_dim": 3072}),
    "gpt2-medium": (
        {**_GPT2, "n_embd": 1024, "n_head": 16, "n_layer": 24, "n_special": 0},
        *(50257, 354_823_168, {"learned_positions": True}),
    ),
    "gemma-2-2b": (
        _of("gemma2", (2304, 26, 8, 4, 9216, 256000), _GEMMA2),
        *(256000, 2_614_341_888, {"layer_kinds": ("local", "global"), "window": 4096}),
    ),
    "gemma-2-9b": (
        _of(
            *("gemma2", (3584, 42, 16, 8, 14336, 256000), _GEMMA2),
            sliding_window_size=4096,
        ),
        *(256000, 9_241_705_984, {"attention_scale": None, "logits_soft_cap": 30.0}),
    ),
    "gemma-2-27b": (
        _of(
            *("gemma2", (4608, 46, 32, 16, 36864, 256000), _GEMMA2),
            **{"head_dim": 128, "query_pre_attn_scalar": 144},
        ),
        *(256000, 27_227_128_320, {"attention_scale": 1 / 12, "attention_soft_cap": 50.0}),
    ),
    "gemma-3-1b-pt": (
        _of("gemma3_text", (1152, 26, 4, 1, 6912, 262144), _GEMMA3, sliding_window_pattern=6),
        *(262144, 999_885_952, {"logits_soft_cap": None, "local_rope_theta": 1e4}),
    ),
    "gemma-3-270m": (
        _of(
            *("gemma3_text", (640, 18, 4, 1, 2048, 262144), _GEMMA3),
            **{"_sliding_window_pattern": 6, "use_bidirectional_attention": False},
            layer_types=[*["sliding_attention"] * 5, "full_attention"] * 3,
        ),
        *(262144, 268_098_176, {"layer_kinds": (*("local",) * 5, "global"), "window": 512}),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_comes_in(name: str) -> None:
    settings, num_ids, parameters, expected = PUBLISHED[name]
    family, config = config_from_json(settings, num_ids, "config.json")
    assert family.model_type == settings["model_type"]
    assert config.num_parameters == parameters
    assert config.padded_vocab_size == settings["vocab_size"]
    assert not family.unread_fields(settings)
    for setting, value in expected.items():
        assert getattr(config, setting) == value, setting


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_reads_the_same_of_it(name: str) -> None:
    settings, num_ids, _, _ = PUBLISHED[name]
    assert_read_as_by_transformers(settings, num_ids)


@pytest.mark.parametrize(
    "model_type", sorted({case[0]["model_type"] for case in PUBLISHED.values()})
)
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    sizes |= {"intermediate_size": 64, "vocab_size": 1000}
    sizes = {"vocab_size": 1000} if model_type == "gpt2" else sizes
    assert_read_as_by_transformers({"model_type": model_type, **sizes}, 1000)


def test_the_first_layer_with_a_window_is_that_of_transformers() -> None:
    windows = {"use_sliding_window": True, "max_window_layers": 21}
    assert_read_as_by_transformers(PUBLISHED["Qwen2.5-0.5B"][0] | windows, 151665)


def assert_read_as_by_transformers(settings: dict[str, Any], num_ids: int) -> None:
    transformers = pytest.importorskip("transformers")
    family, config = config_from_json(settings, num_ids, "config.json")
    theirs = transformers.AutoConfig.for_model(**settings)
    ours = {**vars(config), "num_kv_heads": config.kv_heads, "head_dim": config.head_width}
    ours["attention_scale"] = config.attention_scale or config.head_width**-0.5
    if config.rope_scaling is not None and config.rope_scaling.kind == "longrope":
        ours["max_length"] = settings["max_position_embeddings"]
    for field, (setting, _) in family.fields.items():
        assert getattr(theirs, field) == ours[setting], field
    if hasattr(theirs, "query_pre_attn_scalar"):
        assert theirs.query_pre_attn_scalar**-0.5 == ours["attention_scale"]
    assert getattr(theirs, "attn_logit_softcapping", None) == config.attention_soft_cap
    assert getattr(theirs, "final_logit_softcapping", None) == config.logits_soft_cap
    if config.learned_positions:
        return
    rope = theirs.rope_parameters
    if config.local_rope_theta is not None:
        assert rope["sliding_attention"]["rope_theta"] == config.local_rope_theta
        rope = rope["full_attention"]
    assert rope["rope_theta"] == config.rope_theta
    assert rope.get("partial_rotary_factor", 1.0) == config.rope_fraction
    if "nope" in config.layer_kinds:
        assert theirs.no_rope_layers == [int(kind != "nope") for kind in config.kinds_of_layers]
    elif (types := getattr(theirs, "layer_types", None)) is not None:
        names = {"full_attention": "global", "sliding_attention": "local"}
        assert tuple(names[one] for one in types) == config.kinds_of_layers
    if "local" in config.layer_kinds:
        assert theirs.sliding_window == config.window


def test_two_names_of_a_window_must_agree() -> None:
    settings = PUBLISHED["gemma-2-9b"][0] | {"sliding_window_size": 512}
    with pytest.raises(InputError, match="sets sliding_window_size to 512"):
        config_from_json(settings, 256000, "config.json")
