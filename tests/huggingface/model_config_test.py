"""Hugging Face's settings and tensors: there and back is the same, what has no name is refused."""

import contextlib
import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salt_jax.errors import InputError
from salt_jax.huggingface.families import FAMILIES, gemma3, phi3
from salt_jax.huggingface.family import vocab_multiple
from salt_jax.huggingface.model_config import config_from_json, config_to_json
from salt_jax.huggingface.tensors import leaf_shapes, tensor_shapes
from salt_jax.models.decoder_config import DecoderConfig
from salt_jax.models.rope_scaling import RopeScaling

NEOX = {
    "norm": "layernorm",
    "use_bias": True,
    "gated_mlp": False,
    "scale_embeddings": False,
}
GEMMA2 = {"norm_placement": "both", "logits_soft_cap": 30.0}


@st.composite
def models(draw: st.DrawFn) -> tuple[str, DecoderConfig]:
    """A model that one family can express, with the name of that."""
    # families_test.py has the others.
    kind = draw(st.sampled_from(["gpt_neox", "llama", "gemma"]))
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    heads = kv_heads * draw(st.sampled_from([1, 2]))
    width = draw(st.sampled_from([4, 8]))
    activations = ["silu", "gelu_tanh", "relu"]
    common: dict[str, Any] = {
        "embed_dim": heads * width,
        "num_layers": draw(st.integers(1, 3)),
        "num_heads": heads,
        "mlp_dim": draw(st.integers(1, 20)),
        "vocab_size": draw(st.integers(1, 300)),
        "vocab_multiple": 1,
        "max_length": draw(st.integers(1, 99)),
        "tied_embeddings": draw(st.booleans()),
        "norm_epsilon": draw(st.sampled_from([1e-6, 1e-5])),
        "rope_theta": draw(st.sampled_from([1e4, 5e5])),
    }
    if kind == "gpt_neox":
        activation = draw(st.sampled_from([*activations, "gelu"]))
        own = {
            **NEOX,
            "mlp_activation": activation,
            "parallel_residual": draw(st.booleans()),
            "rope_fraction": draw(st.sampled_from([0.0, 0.5, 1.0])),
        }
    else:
        own = {
            "mlp_activation": draw(st.sampled_from(activations)),
            "scale_embeddings": kind == "gemma",
            "num_kv_heads": None if kv_heads == heads else kv_heads,
            "head_dim": draw(st.sampled_from([None, 2 * width])),
        }
    return kind, DecoderConfig(**{**common, **own})


@settings(max_examples=100, deadline=None)
@given(found=models(), ids=st.integers(1, 300))
def test_a_config_comes_back(found: tuple[str, DecoderConfig], ids: int) -> None:
    kind, config = found
    rows = config.padded_vocab_size
    family, written = config_to_json(config, rows, "float32", {"eos_token_id": 3})
    assert (family.model_type, written["model_type"]) == (kind, kind)
    ids = min(ids, rows)
    _, read = config_from_json(written, ids, "config.json")
    assert read.padded_vocab_size == rows
    changed = {"vocab_size": ids, "vocab_multiple": read.vocab_multiple}
    assert read == dataclasses.replace(config, **changed)


@settings(max_examples=60, deadline=None)
@given(found=models())
def test_tensors_hold_every_parameter_once(found: tuple[str, DecoderConfig]) -> None:
    kind, config = found
    rules = next(one for one in FAMILIES if one.model_type == kind).rules(config)
    shapes = leaf_shapes(config)
    held = [("layers", *leaf) if r.in_layers else leaf for r in rules for leaf in r.leaves]
    assert sorted(held) == sorted(shapes)
    tensors = list(tensor_shapes(config, rules))
    assert len({name for name, _ in tensors}) == len(tensors)
    assert sum(math.prod(shape) for _, shape in tensors) == config.num_parameters
    rng = np.random.default_rng(0)
    for rule in rules:
        leaves = {}
        for leaf in rule.leaves:
            shape = shapes["layers", *leaf][1:] if rule.in_layers else shapes[leaf]
            leaves[leaf] = rng.integers(1, 99, shape).astype(np.float32)
        tensor = rule.to_tensor(list(leaves.values()), np.dtype(np.float32))
        for leaf, value in leaves.items():
            back = rule.to_leaf(tensor, leaf, value.shape, value.dtype)
            np.testing.assert_array_equal(back, value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_fraction": 0.5}, "nearest is gemma, .*rope_fraction = 1.0 and has 0.5"),
        ({"parallel_residual": True}, "nearest is gemma, .*parallel_residual = False"),
        ({"scale_embeddings": False, "use_bias": True}, "nearest is llama, .*use_bias = False"),
        ({**NEOX, "num_kv_heads": 1}, "nearest is gpt_neox, .*num_kv_heads = None and has 1"),
        ({**NEOX, "head_dim": 4}, "nearest is gpt_neox, .*head_dim = None and has 4"),
        ({"mlp_activation": "gelu"}, "nearest is llama, .*scale_embeddings = False"),
        ({**GEMMA2, "attention_scale": 0.3}, "nearest is gemma2, .*√n with a whole n and has 0.3"),
        ({**GEMMA2, "layer_kinds": ("nope",)}, "nearest is gemma2, .*layer_kinds without 'nope'"),
    ],
)
def test_what_no_architecture_expresses_is_refused(changes: dict[str, Any], expected: str) -> None:
    sizes = {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 8, "vocab_size": 9}
    config = DecoderConfig(**{**sizes, **changes})
    with pytest.raises(InputError, match=expected):
        config_to_json(config, 128, "float32", {})


def test_only_some_families_have_a_rotary_scaling() -> None:
    scaling = RopeScaling("linear", 2.0)
    config = DecoderConfig(16, 1, 2, 8, 9, scale_embeddings=False, rope_scaling=scaling)
    assert config_to_json(config, 128, "float32", {})[0].model_type == "llama"
    [obstacle] = phi3.FAMILY.obstacles(config)
    assert obstacle.startswith("rope_scaling of ('longrope',) and has RopeScaling(kind='linear'")


def test_local_layers_of_a_gemma_3_have_their_own_base() -> None:
    local = {"layer_kinds": ("local",), "window": 4, "qk_norm": "head", "norm_placement": "both"}
    config = DecoderConfig(16, 1, 2, 8, 9, **local)  # type: ignore[arg-type]
    assert gemma3.FAMILY.obstacles(config) == ["local_rope_theta a number and has None"]
    assert not gemma3.FAMILY.obstacles(dataclasses.replace(config, local_rope_theta=1e4))


def test_a_width_that_heads_do_not_divide_is_no_llama() -> None:
    config = DecoderConfig(15, 1, 2, 8, 9, head_dim=8, scale_embeddings=False)
    assert config_to_json(config, 128, "float32", {})[0].model_type == "mistral"


@pytest.mark.parametrize(
    ("rows", "multiple"),
    [(50_304, 128), (50_432, 256), (50_688, 512), (50_277, 1), (50_280, 8), (50_300, 50_300)],
)
def test_pythias_rows(rows: int, multiple: int) -> None:
    """Of its published sizes, 70M to 2.8B, 6.9B and 12B; and of others."""
    assert vocab_multiple(50_277, rows) == multiple
    config = DecoderConfig(1, 1, 1, 1, 50_277, multiple, rope_fraction=0.0)
    assert config.padded_vocab_size == rows


# As it is published, by a version before transformers' rope_parameters.
PYTHIA_1_4B = {
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.24.0",
    "use_cache": True,
    "use_parallel_residual": True,
    "vocab_size": 50304,
}


def test_old_and_new_spellings_are_the_same_model() -> None:
    _, old = config_from_json(PYTHIA_1_4B, 50_277, "config.json")
    assert old.num_parameters == 1_414_647_808
    changed = {name: value for name, value in PYTHIA_1_4B.items() if "rotary" not in name}
    changed["rope_parameters"] = {
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000.0,
        "rope_type": "default",
    }
    assert config_from_json(changed, 50_277, "config.json")[1] == old
    del changed["rope_parameters"]  # transformers' defaults are these
    assert config_from_json(changed, 50_277, "config.json")[1] == old
    rotary = {"rotary_pct": 1.0, "rotary_emb_base": 500}
    _, other = config_from_json({**PYTHIA_1_4B, **rotary}, 50_277, "config.json")
    assert (other.rope_fraction, other.rope_theta) == (1.0, 500.0)


GEMMA = {
    "model_type": "gemma",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 8,
    "vocab_size": 9,
}


def test_gemma_says_gelu_and_means_its_approximation() -> None:
    for named in ({"hidden_act": "gelu"}, {"hidden_act": "gelu", "hidden_activation": None}, {}):
        config = config_from_json({**GEMMA, **named}, 9, "config.json")[1]
        assert config.mlp_activation == "gelu_tanh"
        assert (config.head_width, config.tied_embeddings, config.scale_embeddings) == (
            256,
            True,
            True,
        )


@pytest.mark.parametrize(
    "named",
    [
        {"hidden_act": "gelu", "hidden_activation": "relu"},
        {"hidden_act": "relu", "hidden_activation": "gelu_pytorch_tanh"},
        {"hidden_activation": "relu"},
        {"hidden_activation": "gelu_pytorch_tanh"},
    ],
)
def test_gemmas_hidden_act_alone_is_read_as_by_transformers_5(named: dict[str, str]) -> None:
    transformers = pytest.importorskip("transformers")
    family, config = config_from_json({**GEMMA, **named}, 9, "config.json")
    theirs = transformers.AutoConfig.for_model(**{**GEMMA, **named}).hidden_act
    ours = {"gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}[config.mlp_activation]
    assert ours == theirs
    differs = named["hidden_activation"] != theirs
    assert family.unread_fields({**GEMMA, **named}) == ["hidden_activation"] * differs


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(
    changes=st.dictionaries(
        st.sampled_from([*PYTHIA_1_4B, "rope_parameters", "rope_scaling"]), JSON
    )
)
def test_any_config_is_taken_or_refused(changes: dict[str, Any]) -> None:
    with contextlib.suppress(InputError):
        config_from_json({**PYTHIA_1_4B, **changes}, 50_277, "config.json")
