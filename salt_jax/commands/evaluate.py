"""`salt evaluate`: log-perplexity and next-token accuracy of a checkpoint on held-out rows."""

import dataclasses
import time

import rich.console
import rich.table

from salt_jax.data.packed_cache import PackedCache
from salt_jax.distill import losses
from salt_jax.errors import InputError
from salt_jax.run_folder import RunFolder
from salt_jax.training import compilation, partitioning
from salt_jax.training.checkpoints import find_model
from salt_jax.training.evaluation import Evaluation, Evaluator
from salt_jax.training.ledger import Cost


def evaluate(
    run: RunFolder,
    *,
    model: str,
    cache: str,
    step: int | None = None,
    split: str = "test",
    rows: int | None = None,
    batch_size: int = 64,
    mesh: partitioning.MeshConfig = partitioning.MeshConfig(),  # noqa: B008 (frozen)
    rules: partitioning.Rules = partitioning.DEFAULT_RULES,
    chunk_tokens: int = losses.LossConfig.chunk_tokens,
    compilation_cache: str = compilation.DEFAULT_FOLDER,
) -> None:
    """Evaluates a checkpoint, whole and by subset.

    Args:
      run: The folder for the results.
      model: The run folder of the model.
      cache: A packed cache with the model's vocabulary.
      step: The checkpoint; the newest by default.
      split: "test" or "validation".
      rows: Rows to read, from the first on; all by default.
      batch_size: Rows at once.
      mesh: How many devices along each mesh axis.
      rules: From the model's logical axes to the mesh's.
      chunk_tokens: Tokens whose logits a device holds at once.
      compilation_cache: Where compiled programs are kept between runs; "" keeps none.

    Raises:
      InputError: No such model, cache or split, or another vocabulary.
    """
    packed = PackedCache.open(cache)
    saved = find_model(model, step, "model", packed)
    if batch_size < 1 or (rows is not None and rows < 1):
        raise InputError(f"batch_size is {batch_size} and rows {rows}: both must be at least 1.")
    if chunk_tokens < 1:
        raise InputError(f"chunk_tokens is {chunk_tokens} and must be at least 1.")
    device_mesh = mesh.make()
    evaluator = Evaluator(
        saved.config, packed, split, batch_size, device_mesh, rules, rows, chunk_tokens
    )
    run.begin()
    compilation.use_compilation_cache(compilation_cache)
    params = saved.load_params(device_mesh, rules)
    start = time.perf_counter()
    evaluation = evaluator(params)
    seconds = time.perf_counter() - start
    _print(evaluation, f"{saved.path} at step {saved.step} on {split}")
    read = min(rows or len(packed.split(split)), len(packed.split(split)))
    run.write_summary(
        {
            "model": saved.identity,
            "split": split,
            "rows": read,
            **evaluation.to_json(),
            **dataclasses.asdict(Cost.of(saved.config, read, packed.sequence_length, seconds)),
        }
    )


def _print(evaluation: Evaluation, title: str) -> None:
    table = rich.table.Table(title=title)
    for column in ("", "log-perplexity", "bits per byte", "next-token accuracy", "tokens"):
        table.add_column(column, justify="right" if column else "left")
    for name, quality in [("all", evaluation.whole), *evaluation.by_subset.items()]:
        table.add_row(
            name,
            f"{quality.log_perplexity:.4f}",
            f"{quality.bits_per_byte:.4f}",
            f"{quality.next_token_accuracy:.2%}",
            f"{quality.tokens:,}",
        )
    rich.console.Console().print(table)
