"""`salt transplant`: gives a model the vocabulary of a cache, so that it can teach on its rows.

    salt transplant --model=out/smollm --cache=out/cache --output_dir=out/teacher

Each id of the cache's vocabulary gets the embedding and the head's row of the model's id with the
same bytes. An id without one is read as the longest piece that ends alike, and never predicted. The
model's probabilities are those that it gives the shared pieces, renormalised; how much that is of
all, on the cache's own rows, is measured, since a tokenizer that cuts text otherwise leaves little.
Train with the teacher's likeliest tokens (methods/salt_top_k.gin), or by stored soft labels: what
the model cannot predict is then in their one outcome for all other tokens.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from salt_jax.cli.verb import Verb
from salt_jax.commands._hub_models import local_model
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.shared_pieces import SharedPieces, shared_pieces
from salt_jax.data.vocabularies import VOCABULARY_FOLDER
from salt_jax.distill import chunked_loss
from salt_jax.errors import InputError, require_counts
from salt_jax.inference.model_pass import ModelPass
from salt_jax.models import decoder
from salt_jax.models.decoder_config import DecoderConfig
from salt_jax.storage.run_folder import RunFolder
from salt_jax.terminal import say
from salt_jax.training import compilation, partitioning
from salt_jax.training.checkpoint_items import require_path
from salt_jax.training.checkpoints import SavedModel, complete_steps, find_model, read_progress
from salt_jax.training.config import Devices
from salt_jax.training.converted_checkpoints import save_streamed

# exp(-10,000 + any logit) is 0 in every dtype that a model is stored in.
_ABSENT = -1e4


def transplant(
    run: RunFolder,
    *,
    model: str,
    cache: str,
    step: int | None = None,
    split: str = "train",
    rows: int = 256,
    least_shared: float = 0.9,
    batch_size: int = 8,
    devices: Devices = Devices(),
) -> None:
    """Writes a checkpoint of a model with another vocabulary, and measures what it keeps.

    Args:
      run: The folder for the new run.
      model: The run folder of the model, or hf:OWNER/NAME.
      cache: A folder made by `salt prepare`, whose vocabulary the model gets.
      step: The model's checkpoint; the newest by default.
      split: The split of the cache that the shared probability is measured on.
      rows: How many of its rows; they are shuffled, so the first ones are a sample.
      least_shared: The least share of the model's probability that must be on pieces that both
        vocabularies have.
      batch_size: Rows at once.
      devices: The mesh, and where compiled programs are kept.

    Raises:
      InputError: No such model or cache, longer rows than the model takes, or less of the
        probability is shared. Nothing is written.
    """
    require_counts(rows=rows, batch_size=batch_size)
    if not 0.0 <= least_shared <= 1.0:
        raise InputError(f"least_shared is {least_shared}; set it to a share, from 0 to 1.")
    require_path(run.path)
    packed = PackedCache.open(cache)
    saved = _find_original(model, step, packed)
    if complete_steps(run.path):
        _require_same(run, saved, packed)
        return
    pieces = shared_pieces(packed.vocabulary, saved.load_vocabulary())
    mesh = devices.mesh.make()
    compilation.use_compilation_cache(devices.compilation_cache)
    original = saved.load_params(mesh, devices.rules)
    config = dataclasses.replace(
        saved.config,
        vocab_size=packed.vocabulary_size,
        vocab_multiple=DecoderConfig.vocab_multiple,
        tied_embeddings=False,
        absent_ids=True,
    )
    params = _with_vocabulary(original, saved.config, config, pieces)
    of_rows = list(range(min(rows, len(packed.split(split)))))
    if not of_rows:
        raise InputError(f"The {split} split of {cache} has no rows: set --split to another.")
    over = ModelPass(config, packed, split, batch_size, mesh, devices.rules)
    found = _measured(over, params, original, saved, pieces, of_rows)
    say(
        f"{int(pieces.shared.sum()):,} of the {packed.vocabulary_size:,} ids of {cache} are shared "
        f"with {saved.path}: {found['shared_tokens']:.1%} of the cache's tokens, "
        f"{found['shared_probability']:.1%} of the model's probability, {found['loss']:.3f} nats a "
        "token on those."
    )
    if found["shared_probability"] < least_shared:
        raise InputError(
            f"{saved.path} gives {found['shared_probability']:.1%} of its probability to pieces "
            f"that the vocabulary of {cache} has, and least_shared is {least_shared}: choose a "
            "teacher that cuts text more alike, prepare the cache with the model's own vocabulary "
            "(data/model_text.gin), or lower --least_shared."
        )
    run.require_space(config.num_parameters * jnp.dtype(config.param_dtype).itemsize, "the model")
    run.begin()
    packed.vocabulary.save(run.path / VOCABULARY_FOLDER)
    progress = {
        "model": config.to_json(),
        "vocabulary_fingerprint": packed.vocabulary_fingerprint,
        "counters": {},
        "transplanted_from": saved.identity,
    }
    save_streamed(run.path, saved.step, _streamed(params), progress)
    say(
        f"{run.path} has the model with these ids: it teaches by "
        "--gin_file=methods/salt_top_k.gin, or by what `salt score --soft_labels=64` stores."
    )
    run.write_summary({"model": saved.identity, "num_parameters": config.num_parameters, **found})


def _find_original(name: str, step: int | None, cache: PackedCache) -> SavedModel:
    """The model to transplant; refuses one that cannot read the cache's rows, or that lacks ids."""
    saved = find_model(local_model(name), step, "model")
    if saved.config.absent_ids:
        source = read_progress(saved.path, saved.step)["transplanted_from"]["path"]
        raise InputError(
            f"model is {saved.path}, which `salt transplant` made and which lacks ids: name the "
            f"model that it made it of, {source}."
        )
    if cache.sequence_length > saved.config.max_length:
        raise InputError(
            f"The cache {cache.path} has rows of {cache.sequence_length} tokens and the model "
            f"{saved.path} takes {saved.config.max_length}: prepare shorter rows."
        )
    return saved


def _require_same(run: RunFolder, saved: SavedModel, cache: PackedCache) -> None:
    """Refuses a folder that holds anything but this model with this vocabulary."""
    steps = complete_steps(run.path)
    there = read_progress(run.path, steps[-1])
    made_of = there.get("transplanted_from", {}).get("digest")
    if (made_of, there["vocabulary_fingerprint"]) != (saved.digest, cache.vocabulary_fingerprint):
        raise InputError(f"{run.path} holds another model: choose another --output_dir.")
    say(f"{run.path} has this model with this vocabulary already: nothing was done.")


def _with_vocabulary(
    params: Any, old: DecoderConfig, config: DecoderConfig, pieces: SharedPieces
) -> dict[str, Any]:
    """The parameters with an embedding, a head and its bias for the ids of `pieces`."""
    padding = config.padded_vocab_size - len(pieces.ids)
    ids_V = jnp.asarray(np.pad(np.maximum(pieces.ids, 0), (0, padding)))
    known_V = jnp.asarray(np.pad(pieces.ids >= 0, (0, padding)))
    bias_V = params["head_bias"][ids_V] if old.absent_ids else jnp.zeros(len(ids_V))
    shared_V = jnp.asarray(np.pad(pieces.shared, (0, padding)))
    head_VxD = params["embedding" if old.tied_embeddings else "head"]
    return {
        **params,
        "embedding": jnp.where(known_V[:, None], params["embedding"][ids_V], 0),
        "head": head_VxD[ids_V],
        "head_bias": jnp.where(shared_V, bias_V, _ABSENT).astype(config.param_dtype),
    }


def _measured(
    over: ModelPass,
    params: Any,
    original: Any,
    saved: SavedModel,
    pieces: SharedPieces,
    rows: list[int],
) -> dict[str, float]:
    """How much of the model's probability the shared pieces have on rows of the cache.

    Of one hidden state both heads give a loss of the same token, log Σ exp z over their own ids
    minus its logit: the difference is the logarithm of the share.
    """
    ids_V, shared_V = jnp.asarray(pieces.ids), jnp.asarray(pieces.shared)
    end = over.cache.vocabulary.eos_id  # is shared
    ranks = functools.partial(
        chunked_loss.target_ranks,
        chunk_tokens=over.chunk_tokens,
        sharding=partitioning.head_sharding(over.mesh, over.rules),
    )

    def program(trees: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, ...]:
        new, old = trees
        new_head_VxD, old_head_VxD = (
            decoder.head_kernel(new, over.config),
            decoder.head_kernel(old, saved.config),
        )
        hidden_BxLxD = decoder.hidden_states(over.config, new, batch)
        old_hidden_BxLxD = hidden_BxLxD[..., : old_head_VxD.shape[1]]
        weights_BxL, targets_BxL = batch["loss_weights"], batch["targets"]
        counts_BxL, known_BxL = weights_BxL > 0, (weights_BxL > 0) & shared_V[targets_BxL]
        targets_BxL = jnp.where(known_BxL, targets_BxL, end)
        new_size, old_size = over.config.vocab_size or 0, saved.config.vocab_size or 0
        loss_BxL, _ = ranks(hidden_BxLxD, new_head_VxD, targets_BxL, weights_BxL, new_size)
        of_all_BxL, _ = ranks(
            old_hidden_BxLxD, old_head_VxD, ids_V[targets_BxL], weights_BxL, old_size
        )
        share_BxL = jnp.where(counts_BxL, jnp.exp(loss_BxL - of_all_BxL), 0.0)
        loss_BxL = jnp.where(known_BxL, loss_BxL, 0.0)
        return tuple(map(jnp.sum, (share_BxL, known_BxL, loss_BxL, counts_BxL)))

    (batches,) = over.results(program, (params, original), [rows])
    sums = np.sum([np.asarray(result, np.float64) for _, result in batches], axis=0)
    share, known, loss, tokens = map(float, sums)
    return {
        "shared_probability": share / tokens,
        "shared_tokens": known / tokens,
        "loss": loss / max(known, 1.0),
    }


@dataclasses.dataclass(frozen=True)
class _Array:
    """An array in memory as a parameter to save."""

    array: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.array.dtype)

    def read(self, rows: slice = slice(None)) -> np.ndarray:
        return np.asarray(self.array[rows])


def _streamed(params: Any) -> dict[tuple[str, ...], _Array]:
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    return {tuple(key.key for key in path): _Array(leaf) for path, leaf in flat}


VERB = Verb(transplant)
