"""Models of transformers' with random weights, in folders as it saves them, and their logits."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from salt_jax.commands.train import train
from salt_jax.data.packed_cache import PackedCache
from salt_jax.distill import losses, schedules
from salt_jax.models import decoder
from salt_jax.models.decoder import DecoderConfig
from salt_jax.storage.run_folder import RunFolder
from salt_jax.training.checkpoints import find_model
from salt_jax.training.learning_rates import WarmupCosine
from salt_jax.training.optimizers import AdamW
from salt_jax.training.partitioning import MeshConfig
from tests.run_settings import train_config

IDS, ROWS = 300, 320

_SIZES = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}


def _neox(rotary: float, parallel: bool, **more: Any) -> dict[str, Any]:
    own = {"model_type": "gpt_neox", "rotary_pct": rotary, "use_parallel_residual": parallel}
    return {**_SIZES, **own, **more}


def _llama(**more: Any) -> dict[str, Any]:
    return {**_SIZES, "model_type": "llama", **more}


def _gemma(**more: Any) -> dict[str, Any]:
    return {**_SIZES, "model_type": "gemma", "head_dim": 8, **more}


CONFIGS: dict[str, dict[str, Any]] = {
    "neox": _neox(0.25, True),
    "neox_sequential": _neox(1.0, False, rotary_emb_base=500, layer_norm_eps=1e-3),
    "neox_tied": _neox(0.5, True, tie_word_embeddings=True, hidden_act="gelu_new"),
    "llama": _llama(),
    "llama_grouped_tied": _llama(num_key_value_heads=2, tie_word_embeddings=True, rope_theta=5e5),
    "llama_head_dim": _llama(num_key_value_heads=1, head_dim=16, rms_norm_eps=1e-3),
    "gemma": _gemma(num_key_value_heads=1),
    "gemma_head_dim": _gemma(num_key_value_heads=2, head_dim=16),
    "gemma2": {**_SIZES, "model_type": "gemma2", "head_dim": 8, "sliding_window": 5},
    "gpt2": {**_SIZES, "model_type": "gpt2", "n_inner": 48},
    "phi3": {
        **{**_SIZES, "model_type": "phi3", "partial_rotary_factor": 0.5},
        **{"max_position_embeddings": 256, "original_max_position_embeddings": 64},
        "rope_scaling": {"type": "longrope", "short_factor": [1, 2], "long_factor": [3, 4]},
    },
    "starcoder2": {**_SIZES, "model_type": "starcoder2"},
}


class RandomModels:
    """Makes models, and gives logits of a few sequences of random ids."""

    ids, rows = IDS, ROWS

    def save_tokenizer(self, folder: pathlib.Path) -> None:
        """A BPE of IDS ids with Pythia's special tokens, <|endoftext|> at id 0."""
        _save_tokenizer(folder)

    def make(
        self, folder: pathlib.Path, name: str, dtype: str = "float32", scale: float = 0.1
    ) -> Any:
        """Saves one of CONFIGS, no weight of it at its initial 0 or 1; gives the model."""
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")

        torch.manual_seed(0)
        given = dict(CONFIGS[name])
        config = transformers.AutoConfig.for_model(given.pop("model_type"), **given)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(scale * torch.randn_like(parameter))
        model = model.to(getattr(torch, dtype))
        model.save_pretrained(folder)
        _save_tokenizer(folder)
        return model

    def their_logits(self, model: Any) -> np.ndarray:
        """[B, L, rows] of a model, or of the one in a folder."""
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")

        if isinstance(model, pathlib.Path):
            model = transformers.AutoModelForCausalLM.from_pretrained(model)
        with torch.no_grad():
            return model.float()(torch.tensor(_some_ids().astype(np.int64))).logits.numpy()

    def our_logits(self, run: pathlib.Path, step: int | None = None) -> np.ndarray:
        """[B, L, rows] of a run's model."""
        saved = find_model(run, step, "model")
        params = saved.load_params(MeshConfig(fsdp=1).make(jax.devices()[:1]))
        ids = jnp.asarray(_some_ids())
        batch = {
            "inputs": ids,
            "segment_ids": jnp.ones_like(ids),
            "positions": jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape),
        }
        hidden = decoder.hidden_states(saved.config, params, batch)
        kernel = decoder.head_kernel(params, saved.config)
        return np.asarray(decoder.logits(hidden, kernel, saved.config))


@pytest.fixture(scope="session")
def tiny_run(cache: PackedCache, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run of the house's own kind of model: gated, tied, scaled, its layers not scanned."""
    folder = tmp_path_factory.mktemp("run")
    config = DecoderConfig(
        embed_dim=32, num_layers=2, num_heads=2, mlp_dim=64, max_length=64, scan_layers=False
    )
    train(
        RunFolder(folder, "train"),
        config=train_config(
            model=config,
            cache=str(cache.path),
            steps=2,
            batch_size=8,
            optimizer=AdamW(WarmupCosine(5e-3, warmup_steps=1)),
            schedule=schedules.NoDistillation(),
            loss=losses.LossConfig(),
            arm="test",
            evaluate_every=2,
            compilation_cache="",
        ),
    )
    return folder


@pytest.fixture(scope="session")
def random_models() -> RandomModels:
    """What needs torch and transformers skips where they are not installed."""
    return RandomModels()


def _save_tokenizer(folder: pathlib.Path) -> None:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=IDS,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([pathlib.Path(json.__file__).read_text()], trainer)
    assert tokenizer.get_vocab_size() == IDS
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "GPTNeoXTokenizer", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _some_ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, 20)).astype(np.int32)
