"""config.json as it is published with models of the families that salt_jax takes in.

Only settings are read here: sizes and fields are the published ones, and so are the counts of
parameters. Fields that stand for another computation are refused unless their value is neutral.
"""

import dataclasses
from typing import Any

import pytest

from salt_jax.errors import InputError
from salt_jax.huggingface.model_config import config_from_json

_NEOX_TOKENS = {"bos_token_id": 0, "eos_token_id": 0}
_LLAMA_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}


def _neox(size: int, layers: int, heads: int, rows: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        **_NEOX_TOKENS,
        "hidden_act": "gelu",
        "hidden_size": size,
        "initializer_range": 0.02,
        "intermediate_size": 4 * size,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.24.0",
        "use_cache": True,
        "use_parallel_residual": True,
        "vocab_size": rows,
        **more,
    }


def _llama(
    size: int, layers: int, heads: int, inner: int, rows: int = 32000, **more: Any
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **_LLAMA_TOKENS,
        "hidden_act": "silu",
        "hidden_size": size,
        "initializer_range": 0.02,
        "intermediate_size": inner,
        "max_position_embeddings": 4096,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": heads,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0",
        "use_cache": True,
        "vocab_size": rows,
        **more,
    }


def _llama_1(size: int, layers: int, heads: int, inner: int, **more: Any) -> dict[str, Any]:
    settings = _llama(size, layers, heads, inner, **more)
    for later in ("num_key_value_heads", "pretraining_tp", "rope_scaling"):
        del settings[later]
    return {
        **settings,
        **{"max_position_embeddings": 2048, "max_sequence_length": 2048, "pad_token_id": 0},
        **{"rms_norm_eps": 1e-06, "transformers_version": "4.28.0"},
    }


def _smollm(
    size: int, layers: int, heads: int, kv_heads: int, inner: int, **more: Any
) -> dict[str, Any]:
    return {
        **_llama(size, layers, heads, inner, 49152),
        **{"attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False},
        **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None},
        **{"is_llama_config": True, "rope_interleaved": False, "rope_theta": 10000.0},
        **{"num_key_value_heads": kv_heads, "tie_word_embeddings": True},
        **{"torch_dtype": "bfloat16", "max_position_embeddings": 2048},
        **more,
    }


def _smollm2(*sizes: int, **more: Any) -> dict[str, Any]:
    return _smollm(*sizes, rope_theta=100000, max_position_embeddings=8192, **more)


def _instruct(name: str) -> dict[str, Any]:
    return {
        "_name_or_path": f"/fsx/loubna/{name}",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    }


def _gemma(size: int, layers: int, heads: int, kv_heads: int, inner: int, **more: Any) -> Any:
    return {
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        **{"attention_bias": False, "attention_dropout": 0.0},
        **{"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0},
        "head_dim": 256,
        "hidden_act": "gelu",
        "hidden_size": size,
        "initializer_range": 0.02,
        "intermediate_size": inner,
        "max_position_embeddings": 8192,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.38.0.dev0",
        "use_cache": True,
        "vocab_size": 256000,
        **more,
    }


# By name: config.json, ids of the tokenizer, parameters, and what differs from the family's usual.
PUBLISHED: dict[str, tuple[dict[str, Any], int, int, dict[str, Any]]] = {
    # Deduped ones, and all steps of one, have the same.
    "pythia-14m": (
        _neox(128, 6, 4, 50304, attention_bias=True, classifier_dropout=0.1, rope_scaling=None),
        *(50277, 14_067_712, {}),
    ),
    "pythia-31m": (_neox(256, 6, 8, 50304, attention_dropout=0.0), 50277, 30_494_720, {}),
    "pythia-70m": (_neox(512, 6, 8, 50304), 50277, 70_426_624, {}),
    "pythia-160m": (_neox(768, 12, 12, 50304), 50277, 162_322_944, {}),
    "pythia-410m": (_neox(1024, 24, 16, 50304), 50277, 405_334_016, {}),
    "pythia-1b": (_neox(2048, 16, 8, 50304, torch_dtype="bfloat16"), 50277, 1_011_781_632, {}),
    "pythia-1.4b": (_neox(2048, 24, 16, 50304), 50277, 1_414_647_808, {}),
    "pythia-2.8b": (_neox(2560, 32, 32, 50304), 50277, 2_775_208_960, {}),
    "pythia-6.9b": (_neox(4096, 32, 32, 50432), 50277, 6_857_302_016, {}),
    "pythia-12b": (_neox(5120, 36, 40, 50688), 50277, 11_846_072_320, {}),
    # As transformers 4.45 to 4.57 saves one, with both names of each.
    "pythia-70m saved again": (
        _neox(512, 6, 8, 50304, rope_theta=10000, partial_rotary_factor=0.25, rope_scaling=None),
        *(50277, 70_426_624, {}),
    ),
    "gpt-neox-20b": (
        _neox(
            *(6144, 44, 64, 50432),
            **{"attention_probs_dropout_prob": 0, "hidden_dropout_prob": 0},
            hidden_act="gelu_fast",
        ),
        *(50277, 20_554_567_680, {"mlp_activation": "gelu_tanh"}),
    ),
    "dolly-v2-3b": (
        _neox(
            *(2560, 32, 32, 50280),
            custom_pipelines={"text-generation": {"impl": "x.P", "pt": "AutoModelForCausalLM"}},
        ),
        *(50280, 2_775_086_080, {}),
    ),
    "RedPajama-INCITE-3B": (
        _neox(2560, 32, 32, 50432, rotary_pct=1.0, use_parallel_residual=False),
        *(50277, 2_775_864_320, {"parallel_residual": False, "rope_fraction": 1.0}),
    ),
    "polyglot-ko-1.3b": (
        _neox(2048, 24, 16, 30080, num_steps="global_step213000", rotary_pct=0.5),
        *(30003, 1_331_810_304, {"rope_fraction": 0.5}),
    ),
    "llama-7b": (_llama_1(4096, 32, 32, 11008), 32000, 6_738_415_616, {}),
    "llama-30b": (_llama_1(6656, 60, 52, 17920), 32000, 32_528_943_616, {}),
    "open_llama_3b": (_llama_1(3200, 26, 32, 8640), 32000, 3_426_473_600, {}),
    "vicuna-7b-v1.3": (
        _llama_1(4096, 32, 32, 11008, _name_or_path="/home/models/vicuna_7b"),
        *(32000, 6_738_415_616, {}),
    ),
    "Llama-2-7b-hf": (_llama(4096, 32, 32, 11008), 32000, 6_738_415_616, {}),
    "Llama-2-13b-hf": (
        _llama(5120, 40, 40, 13824, pretraining_tp=2, _name_or_path="meta-llama/Llama-2-13b-hf"),
        *(32000, 13_015_864_320, {}),
    ),
    "Llama-2-70b-hf": (
        _llama(8192, 80, 64, 28672, num_key_value_heads=8),
        *(32000, 68_976_648_192, {"num_kv_heads": 8}),
    ),
    "vicuna-7b-v1.5": (
        _llama(4096, 32, 32, 11008, pad_token_id=0, max_position_embeddings=4096),
        *(32000, 6_738_415_616, {}),
    ),
    "CodeLlama-7b-hf": (
        _llama(4096, 32, 32, 11008, 32016, rope_theta=1000000, max_position_embeddings=16384),
        *(32016, 6_738_546_688, {"rope_theta": 1e6}),
    ),
    "Meta-Llama-3-8B-Instruct": (
        _llama(
            *(4096, 32, 32, 14336, 128256),
            **{"attention_bias": False, "attention_dropout": 0.0, "num_key_value_heads": 8},
            **{"bos_token_id": 128000, "eos_token_id": [128001, 128009], "rope_theta": 500000.0},
        ),
        *(128256, 8_030_261_248, {"num_kv_heads": 8, "rope_theta": 5e5}),
    ),
    # A base beyond what whole numbers of 31 bits are.
    "Llama-3-8B-Instruct-Gradient-1048k": (
        _llama(
            *(4096, 32, 32, 14336, 128256),
            **{"num_key_value_heads": 8, "rope_theta": 3580165449.0},
            max_position_embeddings=1048576,
        ),
        *(128256, 8_030_261_248, {"num_kv_heads": 8, "rope_theta": 3580165449.0}),
    ),
    "TinyLlama-1.1B": (
        _llama(2048, 22, 32, 5632, num_key_value_heads=4, attention_bias=False),
        *(32000, 1_100_048_384, {"num_kv_heads": 4}),
    ),
    "TinyLlama fine-tuned with unsloth": (
        _llama(
            *(2048, 22, 32, 5632),
            **{"num_key_value_heads": 4, "unsloth_version": "2024.8", "unsloth_fixed": True},
            **{"_attn_implementation_autoset": True, "unk_token_id": 3, "head_dim": 64},
        ),
        *(32000, 1_100_048_384, {"num_kv_heads": 4}),
    ),
    "Yi-6B": (
        _llama(4096, 32, 32, 11008, 64000, num_key_value_heads=4, rope_theta=5000000.0),
        *(64000, 6_061_035_520, {"num_kv_heads": 4, "rope_theta": 5e6}),
    ),
    "SmolLM-135M": (
        _smollm(576, 30, 9, 3, 1536),
        *(49152, 134_515_008, {"num_kv_heads": 3, "tied_embeddings": True}),
    ),
    "SmolLM-360M": (
        _smollm(960, 32, 15, 5, 2560),
        *(49152, 361_821_120, {"num_kv_heads": 5, "tied_embeddings": True}),
    ),
    "SmolLM-1.7B": (_smollm(2048, 24, 32, 32, 8192), 49152, 1_711_376_384, {}),
    "SmolLM2-135M": (
        _smollm2(576, 30, 9, 3, 1536),
        *(49152, 134_515_008, {"num_kv_heads": 3, "rope_theta": 1e5}),
    ),
    "SmolLM2-135M-Instruct": (
        _smollm2(576, 30, 9, 3, 1536, **_instruct("smollm2-135M")),
        *(49152, 134_515_008, {"num_kv_heads": 3, "rope_theta": 1e5}),
    ),
    "SmolLM2-360M-Instruct": (
        _smollm2(960, 32, 15, 5, 2560, **_instruct("smollm2-360M"), unk_token_id=0),
        *(49152, 361_821_120, {"num_kv_heads": 5, "rope_theta": 1e5}),
    ),
    "SmolLM2-1.7B-Instruct": (
        {**_smollm2(2048, 24, 32, 32, 8192, **_instruct("smollm2-1.7B")), "rope_theta": 130000},
        *(49152, 1_711_376_384, {"rope_theta": 1.3e5}),
    ),
    "gemma-2b": (_gemma(2048, 18, 8, 1, 16384), 256000, 2_506_172_416, {"num_kv_heads": 1}),
    "gemma-7b": (
        _gemma(3072, 28, 16, 16, 24576, hidden_activation=None),
        *(256000, 8_537_680_896, {"head_dim": 256}),
    ),
    "gemma-1.1-2b-it": (
        _gemma(
            *(2048, 18, 8, 1, 16384),
            **dict.fromkeys(("hidden_act", "hidden_activation"), "gelu_pytorch_tanh"),
        ),
        *(256000, 2_506_172_416, {"num_kv_heads": 1}),
    ),
    "codegemma-2b": (
        _gemma(
            *(2048, 18, 8, 1, 16384),
            **{"hidden_activation": "gelu_pytorch_tanh", "use_bidirectional_attention": False},
        ),
        *(256000, 2_506_172_416, {"num_kv_heads": 1}),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_comes_in(name: str) -> None:
    settings, num_ids, parameters, expected = PUBLISHED[name]
    family, config = config_from_json(settings, num_ids, "config.json")
    assert family.model_type == settings["model_type"]
    assert config.num_parameters == parameters
    assert config.padded_vocab_size == settings["vocab_size"]
    usual = {"parallel_residual": family.model_type == "gpt_neox", "rope_theta": 10_000.0}
    usual |= {"rope_fraction": 0.25 if family.model_type == "gpt_neox" else 1.0}
    usual |= {
        "mlp_activation": {"gpt_neox": "gelu", "llama": "silu", "gemma": "gelu_tanh"}[
            family.model_type
        ]
    }
    for setting, value in {**usual, **expected}.items():
        assert getattr(config, setting) == value, setting


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_reads_the_same_sizes_of_it(name: str) -> None:
    """What transformers makes of the file, and of nothing but what our reading of it says."""
    transformers = pytest.importorskip("transformers")
    settings, num_ids, _, _ = PUBLISHED[name]
    family, config = config_from_json(settings, num_ids, "config.json")
    theirs = transformers.AutoConfig.for_model(**settings)
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert theirs.rope_parameters.get("partial_rotary_factor", 1.0) == config.rope_fraction
    assert theirs.max_position_embeddings == config.max_length
    assert theirs.tie_word_embeddings == config.tied_embeddings
    if family.model_type != "gpt_neox":
        assert (theirs.num_key_value_heads, theirs.head_dim) == (config.kv_heads, config.head_width)


def test_what_nothing_reads_is_named_and_what_is_usual_is_not() -> None:
    def unread(name: str) -> list[str]:
        settings, num_ids, _, _ = PUBLISHED[name]
        return config_from_json(settings, num_ids, "config.json")[0].unread_fields(settings)

    assert unread("SmolLM2-135M-Instruct") == ["is_llama_config", "transformers.js_config"]
    assert unread("TinyLlama fine-tuned with unsloth") == ["unsloth_fixed", "unsloth_version"]
    assert unread("dolly-v2-3b") == ["custom_pipelines"]
    for name in ("pythia-14m", "gpt-neox-20b", "vicuna-7b-v1.3", "gemma-7b", "codegemma-2b"):
        assert not unread(name)


SMOL = _smollm2(576, 30, 9, 3, 1536)
COMPUTATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # A value that changes logits, and one that doesn't.
    "attn_logit_softcapping": ({"": 50.0}, {"": None}),
    "final_logit_softcapping": ({"": 30.0}, {"": None}),
    "query_pre_attn_scalar": ({"": 256}, {"": 64}),
    "sliding_window": ({"": 4096}, {"": None}),
    "use_sliding_window": ({"": True}, {"": False, "sliding_window": 4096}),
    "attention_multiplier": ({"": 0.0078125}, {"": 0.125}),
    "residual_multiplier": ({"": 0.22}, {"": 1.0}),
    "embedding_multiplier": ({"": 12}, {"": 1}),
    "logits_scaling": ({"": 8.0}, {"": 1.0}),
    "logit_scale": ({"": 0.0625}, {"": 1.0}),
    "partial_rotary_factor": ({"": 0.0}, {"": 1.0}),
    "rotary_pct": ({"": 0.25}, {"": 1.0}),
    "mlp_bias": ({"": True}, {"": False}),
    "attention_bias": ({"": True}, {"": False}),
    "qkv_bias": ({"": True}, {"": None}),
    "quantization_config": ({"": {"quant_method": "gptq"}}, {"": {}}),
    "compression_config": ({"": {"format": "dense"}}, {"": None}),
    "layer_types": (
        {"": ["full_attention"] * 29 + ["sliding_attention"]},
        {"": ["full_attention"] * 30},
    ),
    "layer_norm_eps": ({"": 1e-12}, {"": 1e-5}),
    "num_experts": ({"": 8}, {"": 0}),
    "use_qk_norm": ({"": True}, {"": False}),
    "alibi": ({"": True}, {"": False}),
    "is_causal": ({"": False}, {"": True}),
    "use_rope": ({"": False}, {"": True}),
    "position_embedding_type": ({"": "alibi"}, {"": "rope"}),
    "rope_interleaved": ({"": True}, {"": False}),
    "rope_scaling": (
        {"": {"rope_type": "llama3", "factor": 8.0}},
        {"": {"type": "linear", "factor": 1.0}},
    ),
    "rope_parameters": (
        {"": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
        {"": {"rope_type": "default", "rope_theta": 1e5}},
    ),
    "use_parallel_residual": ({"": True}, {"": False}),
    "no_rope_layers": ({"": [1, 1, 1, 0]}, {"": []}),
    "per_layer_config": ({"": {"0": {"head_dim": 32}}}, {"": {}}),
    "is_encoder_decoder": ({"": True}, {"": False}),
    "pruned_heads": ({"": {"0": [1]}}, {"": {}}),
    "auto_map": ({"": {"AutoModelForCausalLM": "modeling_x.X"}}, {"": None}),
}


@pytest.mark.parametrize("field", COMPUTATIONS)
def test_another_computation_is_refused_and_a_neutral_value_is_not(field: str) -> None:
    changes, neutral = COMPUTATIONS[field]
    config = config_from_json(SMOL, 49152, "config.json")[1]
    same = {name or field: value for name, value in neutral.items()}
    assert config_from_json({**SMOL, **same}, 49152, "config.json")[1] == config
    other = {name or field: value for name, value in changes.items()}
    with pytest.raises(InputError, match=rf"^config\.json sets {field} to "):
        config_from_json({**SMOL, **other}, 49152, "config.json")


def test_a_gemma_that_looks_ahead_is_refused() -> None:
    settings = PUBLISHED["codegemma-2b"][0] | {"use_bidirectional_attention": True}
    with pytest.raises(InputError, match="sets use_bidirectional_attention to True"):
        config_from_json(settings, 256000, "config.json")


def test_two_names_of_one_setting_must_agree() -> None:
    """transformers 4 reads rope_theta of a GPT-NeoX, and 5 rotary_emb_base."""
    pythia = PUBLISHED["pythia-70m saved again"][0]
    for field, value in (("rope_theta", 500), ("partial_rotary_factor", 0.5)):
        with pytest.raises(InputError, match=f"sets {field} to"):
            config_from_json({**pythia, field: value}, 50277, "config.json")
    with pytest.raises(InputError, match="sets head_dim to 128"):
        config_from_json({**pythia, "head_dim": 128}, 50277, "config.json")


def test_the_rotary_embedding_is_read_as_by_transformers_5() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = _llama(64, 2, 4, 128)
    for rotary in (
        {"rope_theta": 500.0},
        {"rope_theta": 500.0, "rope_parameters": {"rope_theta": 700.0}},
        {"rope_theta": 500.0, "rope_parameters": {"rope_type": "default"}},
        {"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_theta": 700.0}},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 900.0}, "rope_theta": 500.0},
    ):
        settings = {**{k: v for k, v in sizes.items() if k != "rope_scaling"}, **rotary}
        theirs = transformers.AutoConfig.for_model(**settings).rope_parameters["rope_theta"]
        assert config_from_json(settings, 32000, "config.json")[1].rope_theta == theirs, rotary


def test_defaults_are_those_of_transformers_5() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    for name in ("pythia-70m", "Llama-2-7b-hf", "gemma-7b"):
        full = PUBLISHED[name][0]
        settings = {field: full[field] for field in ("model_type", "vocab_size", *sizes)}
        settings["num_attention_heads"] = 32  # so that 16 for keys and values is seen
        family, config = config_from_json(settings, settings["vocab_size"], "config.json")
        theirs = transformers.AutoConfig.for_model(**settings).to_dict()
        for field, (setting, _) in family.fields.items():
            value = dataclasses.asdict(config)[setting]
            if setting == "num_kv_heads":
                value = config.kv_heads
            if setting == "head_dim":
                value = config.head_width
            assert theirs[field] == value, (name, field)
        rope = theirs["rope_parameters"]
        assert rope["rope_theta"] == config.rope_theta
        assert rope.get("partial_rotary_factor", 1.0) == config.rope_fraction
