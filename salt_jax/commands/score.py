"""`salt score`: one score a row, from an early checkpoint of the SLM.

The score is METHOD's S: the median loss over the tokens that are among the model's k most likely.
High scores are hard yet learnable. `salt select` picks rows by them.
"""

import dataclasses
import time

import numpy as np

from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.row_scores import RowScores
from salt_jax.distill import losses
from salt_jax.distill.scores import ScoreConfig
from salt_jax.errors import InputError
from salt_jax.run_folder import RunFolder
from salt_jax.training import compilation, partitioning
from salt_jax.training.checkpoints import find_model
from salt_jax.training.ledger import Cost
from salt_jax.training.scoring import score_rows


def score(
    run: RunFolder,
    *,
    scorer: str,
    cache: str,
    scorer_step: int | None = None,
    split: str = "train",
    k: int = 10,
    unlearnable: str = "drop",
    min_learnable_fraction: float = 0.0,
    batch_size: int = 64,
    mesh: partitioning.MeshConfig = partitioning.MeshConfig(),  # noqa: B008 (frozen)
    rules: partitioning.Rules = partitioning.DEFAULT_RULES,
    chunk_tokens: int = losses.LossConfig.chunk_tokens,
    compilation_cache: str = compilation.DEFAULT_FOLDER,
) -> None:
    """Scores every row of a split with a frozen model.

    Args:
      run: The folder for scores.npy and its manifest.
      scorer: The run folder of the scoring model.
      cache: A folder made by `salt prepare`, with the scorer's vocabulary.
      scorer_step: The scorer's checkpoint, an early one for SALT; the newest by default.
      split: Which rows.
      k: A token is learnable if it is among the scorer's k most likely ones.
      unlearnable: What becomes of the others in the median: "drop", or "zero" to count them as 0.
      min_learnable_fraction: Rows with a smaller share of learnable tokens are never selected.
      batch_size: Rows at once.
      mesh: How many devices along each mesh axis.
      rules: From the model's logical axes to the mesh's.
      chunk_tokens: Tokens whose logits a device holds at once.
      compilation_cache: Where compiled programs are kept between runs; "" keeps none.

    Raises:
      InputError: No such model or cache, another vocabulary, or k over the vocabulary's size.
    """
    config = ScoreConfig(k, unlearnable, min_learnable_fraction)
    packed = PackedCache.open(cache)
    model = find_model(scorer, scorer_step, "scorer", packed)
    if k > packed.vocabulary_size:
        raise InputError(
            f"k is {k} and the vocabulary has {packed.vocabulary_size} ids: lower --k."
        )
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size} and must be at least 1.")
    if chunk_tokens < 1:
        raise InputError(f"chunk_tokens is {chunk_tokens} and must be at least 1.")
    rows = len(packed.split(split))
    device_mesh = mesh.make()
    run.begin()
    compilation.use_compilation_cache(compilation_cache)
    params = model.load_params(device_mesh, rules)
    start = time.perf_counter()
    scores_N = score_rows(
        model.config, params, packed, split, config, batch_size, device_mesh, rules, chunk_tokens
    )
    seconds = time.perf_counter() - start
    cost = Cost.of(model.config, rows, packed.sequence_length, seconds)
    RowScores.write(
        run.path,
        scores_N,
        cache_digest=packed.digest,
        split=split,
        scorer=model.identity,
        score=dataclasses.asdict(config),
        cost=dataclasses.asdict(cost),
    )
    learnable_N = np.isfinite(scores_N)
    print(
        f"{rows:,} rows of {split} scored by {model.path} at step {model.step} in {seconds:.1f} s; "
        f"median {np.median(scores_N[learnable_N]) if learnable_N.any() else -np.inf:.3f} nats, "
        f"{int((~learnable_N).sum()):,} rows without enough learnable tokens"
    )
    run.write_summary(
        {
            "rows": rows,
            "rows_without_score": int((~learnable_N).sum()),
            "score": dataclasses.asdict(config),
            "scorer": model.identity,
            "quantiles": _quantiles(scores_N[learnable_N]),
            **dataclasses.asdict(cost),
        }
    )


def _quantiles(scores_n: np.ndarray) -> dict[str, float]:
    shares = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
    if not len(scores_n):
        return {}
    return {f"{q:g}": float(np.quantile(scores_n, q)) for q in shares}
