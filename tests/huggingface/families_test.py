"""Every family against transformers: logits, packed, cached and on a mesh, and back again."""

import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.errors import InputError
from salt_jax.huggingface.model_config import config_from_json, config_to_json
from salt_jax.huggingface.safetensors_files import SafetensorsFolder, TensorInfo, write_shards
from salt_jax.huggingface.tensors import refuse_other_tensors, rules_for_files, tensor_shapes
from salt_jax.inference import decoding
from salt_jax.models import decoder
from salt_jax.models.decoder_config import DecoderConfig
from salt_jax.training.converted_tensors import parameters_of
from salt_jax.training.partitioning import MeshConfig, param_shardings, partitioned

IDS, LENGTH, PROMPT = 40, 24, 6
SIZES = {
    **{"vocab_size": IDS, "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 24},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32},
    **{"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0},
}
MHA, MQA = {"num_key_value_heads": 4}, {"num_key_value_heads": 1}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
# A theta at which all parts of a scaling's ramp have frequencies; the original context is 8.
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 1e3, "factor": 8.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 8},
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
YARN = {
    **{"rope_type": "yarn", "rope_theta": 1e3, "factor": 4.0},
    **{"original_max_position_embeddings": 8, "beta_fast": 4.0, "beta_slow": 0.5},
}
CAPS = {"attn_logit_softcapping": 0.8, "final_logit_softcapping": 2.0}
# Fields that a GPT-2 doesn't have.
GPT2 = {"num_key_value_heads": None, "intermediate_size": None}
LONGROPE = {
    **{"rope_type": "longrope", "short_factor": [1.0, 1.5, 3.0], "long_factor": [2.0, 4.0, 9.0]},
    **{"rope_theta": 1e3, "original_max_position_embeddings": 28, "partial_rotary_factor": 0.75},
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3 scaling": ("llama", {"rope_parameters": LLAMA3, **TIED}),
    "linear scaling": ("llama", {"rope_parameters": LINEAR, **MHA}),
    "yarn": ("llama", {"rope_parameters": YARN, **MQA, "head_dim": 16}),
    "yarn with mscale": (
        *("llama",),
        {
            "rope_parameters": {
                **{**YARN, "mscale": 0.7, "mscale_all_dim": 1.2, "truncate": False},
                # With these the ends of the ramp are not whole, and have a frequency between them.
                **{"rope_theta": 20.0, "beta_fast": 0.4, "beta_slow": 0.05},
            },
        },
    ),
    "longrope": (
        *("llama",),
        {
            "rope_parameters": {
                **{"rope_type": "longrope", "rope_theta": 1e3, "attention_factor": 1.3},
                **{"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0] * 4},
                "original_max_position_embeddings": 30,
            },
        },
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral with a window": ("mistral", {"sliding_window": 5, **MQA, **TIED, "head_dim": 16}),
    "qwen2": ("qwen2", {"rope_theta": 1e6}),
    "qwen2 tied": ("qwen2", {**TIED, **MHA}),
    "qwen2 with windows": (
        *("qwen2",),
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, **MQA},
    ),
    "qwen3": ("qwen3", {"head_dim": 16, "rope_theta": 1e6}),
    "qwen3 tied, yarn": ("qwen3", {"head_dim": 8, **TIED, **MQA, "rope_parameters": YARN}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),
    "smollm3 untied": ("smollm3", {"no_rope_layers": [1, 1, 0], **UNTIED, **MQA}),
    "olmo2": ("olmo2", {}),
    "olmo2 tied": ("olmo2", {**TIED, **MQA}),
    "granite": (
        *("granite",),
        {
            **{"embedding_multiplier": 3, "residual_multiplier": 0.4, "logits_scaling": 2.0},
            **{"attention_multiplier": 0.2},
        },
    ),
    "phi3": ("phi3", {"partial_rotary_factor": 0.75, "sliding_window": None}),
    "phi3 with a window": (
        *("phi3",),
        {"partial_rotary_factor": 0.5, "sliding_window": 5, **TIED, **MQA},
    ),
    "phi3 with longrope": (
        *("phi3",),
        {
            **{"rope_parameters": LONGROPE, "partial_rotary_factor": 0.75},
            **{"max_position_embeddings": 64, "original_max_position_embeddings": 28},
        },
    ),
    "phi3 wholly rotated": ("phi3", MHA),
    "gemma2": ("gemma2", {**CAPS, "head_dim": 16, "sliding_window": 5}),
    "gemma2 untied": (
        *("gemma2",),
        {
            **{**UNTIED, **MQA, "head_dim": 8, "query_pre_attn_scalar": 12},
            **{"attn_logit_softcapping": None, "layer_types": MIXED, "sliding_window": 4},
            **{"final_logit_softcapping": 0.7, "rope_parameters": LLAMA3},
        },
    ),
    "gemma2 without windows or caps": (
        *("gemma2",),
        {
            **{"layer_types": ["full_attention"] * 3, "head_dim": 8, "query_pre_attn_scalar": 8},
            **dict.fromkeys(CAPS, None),
        },
    ),
    "gemma3": (
        *("gemma3_text",),
        {"num_hidden_layers": 7, "head_dim": 8, "sliding_window": 5, "rope_theta": 1e3},
    ),
    "gemma3 untied": (
        *("gemma3_text",),
        {
            **{**UNTIED, **MQA, "head_dim": 16, "query_pre_attn_scalar": 12},
            **{"layer_types": MIXED, "sliding_window": 4, "final_logit_softcapping": 0.7},
            "rope_parameters": {
                "full_attention": LINEAR,
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "gemma3 without windows": (
        *("gemma3_text",),
        {"head_dim": 8, "layer_types": ["full_attention"] * 3, "query_pre_attn_scalar": 8},
    ),
    "gpt2": ("gpt2", {**GPT2, "n_inner": 24}),
    "gpt2 untied": ("gpt2", {**GPT2, **UNTIED, "activation_function": "relu"}),
    "granite tied": ("granite", {**TIED, **MHA, "attention_multiplier": 1, "logits_scaling": 0.5}),
    "gpt_neox": ("gpt_neox", {"num_key_value_heads": None, "rotary_pct": 0.25}),
    "gemma": ("gemma", {"head_dim": 16}),
}


def their_model(name: str) -> Any:
    """Random weights, none at its initial 0 or 1, so that every one has an effect."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model_type, changes = CASES[name]
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **changes})
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def their_logits(model: Any, ids_BxL: np.ndarray) -> np.ndarray:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.tensor(ids_BxL.astype(np.int64))).logits.numpy()


def imported(folder: pathlib.Path) -> tuple[Any, DecoderConfig, Any]:
    """The family, the model and its parameters, from a folder."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family, config = config_from_json(settings, IDS, "config.json")
    assert not family.unread_fields(settings)
    files = SafetensorsFolder(folder)
    rules = rules_for_files(family.rules(config), files.tensors)
    shapes = {name: info.shape for name, info in files.tensors.items()}
    refuse_other_tensors(config, rules, shapes, family.head, str(folder))
    params: dict[str, Any] = {}
    for path, parameter in parameters_of(files, config, rules).items():
        *modules, leaf = path
        place = functools.reduce(lambda tree, module: tree.setdefault(module, {}), modules, params)
        place[leaf] = jnp.asarray(parameter.read())
    return family, config, params


def exported(folder: pathlib.Path, name: str, config: DecoderConfig, params: Any) -> None:
    """Writes the model as `config_to_json` and the family's rules say."""
    family, settings = config_to_json(config, config.padded_vocab_size, "float32", {})
    # A Mistral without a window is a Llama, and goes out as that; so is a Phi 3, wholly rotated.
    as_llama = ("mistral", "phi3 wholly rotated")
    assert family.model_type == ("llama" if name in as_llama else CASES[name][0])
    rules, dtype = family.rules(config), np.dtype(np.float32)

    def leaf(path: tuple[str, ...]) -> np.ndarray:
        return np.asarray(functools.reduce(lambda tree, key: tree[key], path, params))

    def tensors() -> Any:
        for rule in rules:
            if not rule.in_layers:
                yield rule.to_tensor([leaf(rule.leaves[0])], dtype)
                continue
            for layer in range(config.num_layers):
                leaves = [leaf(("layers", *path))[layer] for path in rule.leaves]
                yield rule.to_tensor(leaves, dtype)

    infos = [TensorInfo(tensor, "float32", shape) for tensor, shape in tensor_shapes(config, rules)]
    write_shards(folder, infos, tensors(), 1 << 30)
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")


def our_logits(config: DecoderConfig, params: Any, batch: Any) -> jax.Array:
    hidden_BxLxD = decoder.hidden_states(config, params, batch)
    return decoder.logits(hidden_BxLxD, decoder.head_kernel(params, config), config)


def cached_logits(config: DecoderConfig, params: Any, ids_BxL: jax.Array) -> jax.Array:
    """[L - PROMPT + 1, B, V]: of each prompt's end, padded on the left, and each token after it."""
    prompts = jnp.pad(ids_BxL[:, :PROMPT], ((0, 0), (2, 0)))
    segment_ids = jnp.pad(jnp.ones((len(ids_BxL), PROMPT), jnp.int32), ((0, 0), (2, 0)))
    first, cache = decoding.prefill(config, params, prompts, segment_ids, LENGTH + 2)

    def one(cache: decoding.DecodingCache, token_B: jax.Array) -> Any:
        logits_BxV, cache = decoding.step(config, params, cache, token_B)
        return cache, logits_BxV

    _, rest = jax.lax.scan(one, cache, ids_BxL[:, PROMPT:].T)
    return jnp.concatenate([first[None], rest])


@pytest.mark.parametrize("name", CASES)
def test_a_family_equals_transformers(name: str, tmp_path: pathlib.Path) -> None:
    model = their_model(name)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "ours").mkdir()
    model.save_pretrained(tmp_path / "theirs")
    _, config, params = imported(tmp_path / "theirs")
    assert config.num_parameters == sum(x.size for x in jax.tree.leaves(params))
    assert config.num_parameters == sum(x.numel() for x in model.parameters())
    ids_BxL = np.random.default_rng(0).integers(IDS, size=(8, LENGTH)).astype(np.int32)
    whole = their_logits(model, ids_BxL)
    assert 0.3 < np.abs(whole).max() < 100

    # The first half of the rows in one document, the second half in two.
    split = 10
    segment_ids, positions = (
        np.ones_like(ids_BxL),
        np.tile(np.arange(LENGTH, dtype=np.int32), (8, 1)),
    )
    segment_ids[4:, split:] = 2
    positions[4:, split:] -= split
    batch = {"inputs": ids_BxL, "segment_ids": segment_ids, "positions": positions}
    expected = whole.copy()
    expected[4:, split:] = their_logits(model, ids_BxL[4:, split:])
    logits = jax.jit(functools.partial(our_logits, config))(params, batch)
    np.testing.assert_allclose(logits[..., :IDS], expected, atol=1e-4, rtol=1e-4)

    mesh = MeshConfig(data=2, fsdp=2, tensor=2).make()
    shardings = param_shardings(decoder.abstract_params(config), mesh)
    with partitioned(mesh):
        placed = jax.device_put(params, shardings)
        sharded = jax.jit(functools.partial(our_logits, config))(placed, batch)
    np.testing.assert_allclose(sharded[..., :IDS], expected, atol=1e-4, rtol=1e-4)

    cached = jax.jit(functools.partial(cached_logits, config))(params, jnp.asarray(ids_BxL))
    after = whole[:, PROMPT - 1 :].swapaxes(0, 1)
    np.testing.assert_allclose(cached[..., :IDS], after, atol=1e-4, rtol=1e-4)

    exported(tmp_path / "ours", name, config, params)
    _, again, same = imported(tmp_path / "ours")
    assert again == config
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), same, params)
    transformers = pytest.importorskip("transformers")
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    )
    np.testing.assert_allclose(their_logits(reloaded, ids_BxL), whole, atol=1e-4)


def test_files_of_a_model_without_a_head(tmp_path: pathlib.Path) -> None:
    """GPT-2 as it is published: names without "transformer.", and buffers of masks."""
    model = their_model("gpt2")
    model.save_pretrained(tmp_path / "whole")
    model.transformer.save_pretrained(tmp_path / "base")
    files = SafetensorsFolder(tmp_path / "base")
    assert "wte.weight" in files.tensors
    infos = [TensorInfo(name, "float32", info.shape) for name, info in files.tensors.items()]
    tensors = [files.read(name) for name in files.tensors]
    masks = [TensorInfo(f"h.{layer}.attn.bias", "float32", (1, 1, 32, 32)) for layer in range(3)]
    ones = [np.ones((1, 1, 32, 32), np.float32)] * 3
    write_shards(tmp_path / "base", [*infos, *masks], iter([*tensors, *ones]), 1 << 30)
    of_base, of_whole = (imported(tmp_path / name) for name in ("base", "whole"))
    assert of_base[1] == of_whole[1]
    jax.tree.map(np.testing.assert_array_equal, of_base[2], of_whole[2])


SMALL = {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]}


@pytest.mark.parametrize(
    ("model_type", "changes", "expected"),
    [
        (
            "llama",
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "linear, llama3",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "yarn", "factor": 2.0}},
            "without original_max",
        ),
        ("llama", {"rope_scaling": {**LLAMA3, "beta_fast": 3}}, "sets beta_fast of the rotary"),
        ("llama", {"rope_scaling": {**LLAMA3, "factor": "8"}}, "whose factor is no number"),
        ("llama", {"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor is 4.0"),
        ("llama", {"rope_scaling": LLAMA3, "rope_parameters": YARN}, "which differ"),
        (
            *("llama", {"rope_scaling": LLAMA3, "original_max_position_embeddings": 9}),
            "original_max_position_embeddings to 9",
        ),
        ("llama", {"sliding_window": 5}, "sets sliding_window to 5"),
        ("mistral", {**SMALL, "sliding_window": 5}, "mistral has layers of one kind"),
        ("mistral", {"sliding_window": "5"}, "its sliding window is '5'"),
        ("mistral", {"attention_bias": True}, "sets attention_bias to True"),
        ("qwen2", SMALL, "its sliding window is None"),
        ("qwen2", {"layer_types": ["full_attention"]}, "for each of 3 layers"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "sets layer_types"),
        ("qwen3", {"attention_bias": True}, "sets attention_bias to True"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "sets no_rope_layers to"),
        ("smollm3", {"use_sliding_window": True}, "sets use_sliding_window to True"),
        ("smollm3", SMALL, "sets layer_types to"),
        ("phi3", {"rope_scaling": {"type": "longrope"}}, "without short_factor"),
        (
            *("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0, "2"]}}),
            "whose divisors is no number",
        ),
        (
            *("phi3", {"rope_scaling": {"type": "longrope", "short_factor": 1.0}}),
            "whose divisors is no number",
        ),
        (
            *("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1, 1, 0, 1]}}),
            "set one above 0 for each of 4",
        ),
        (
            *("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}),
            "set one above 0 for each of 4",
        ),
        (
            *("phi3", {"rope_scaling": LONGROPE, "max_position_embeddings": None}),
            "sets max_position_embeddings to None",
        ),
        ("phi3", {"rope_scaling": LLAMA3}, "by 'llama3', which phi3 doesn't have"),
        ("gemma2", {"sliding_window": None}, "its sliding window is None"),
        ("gemma2", {"sliding_window_pattern": 6}, "sets sliding_window_pattern to 6"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "attention_scale is 0.0"),
        ("gemma2", {"attn_logit_softcapping": True}, "sets attn_logit_softcapping to True"),
        ("gemma2", {"use_bidirectional_attention": True}, "sets use_bidirectional_attention to"),
        ("gemma3_text", {"attn_logit_softcapping": 5.0}, "gemma3_text with None only"),
        ("gemma3_text", {"rope_parameters": LINEAR}, "expected those of full_attention and"),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": LINEAR}},
            "without a scaling, of sliding_attention",
        ),
        ("olmo2", {"attention_bias": True}, "sets attention_bias to True"),
        ("olmo2", {"clip_qkv": 8.0}, "sets clip_qkv to 8.0"),
    ],
)
def test_what_the_decoder_lacks_is_refused(
    model_type: str, changes: dict[str, Any], expected: str
) -> None:
    settings = {"model_type": model_type, **SIZES, **changes}
    with pytest.raises(InputError, match=expected):
        config_from_json(settings, IDS, "config.json")
