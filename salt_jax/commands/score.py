"""`salt score`: how hard and how learnable each row is, by an early checkpoint of the SLM.

One pass makes several columns: for every k METHOD's median (unlearnable tokens dropped, and as 0),
the mean loss and the share of the tokens that are among the model's k most likely; the mean loss of
all tokens; and scores of one's own. `salt select` picks rows by one of them.

With --soft_labels=K it stores the K most likely ids a token and their probabilities instead, of the
SLM's last checkpoint: what `salt train --soft_labels=FOLDER` learns from without a teacher.

The pass is cut into shards. Started again after a kill it makes those that are missing, on another
number of workers too; workers, each with its own devices, need nothing but the folder in common.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from salt_jax.data.label_format import LabelFormat
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.row_scores import RowScores, RowScoresWriter, Selection
from salt_jax.data.soft_labels import SoftLabelsWriter, StoredLabels
from salt_jax.distill import losses
from salt_jax.distill.scores import Score, checked_ks, column_names, require_scores, scores_of
from salt_jax.errors import InputError, require_counts
from salt_jax.inference.scoring import own_mesh, score_rows
from salt_jax.inference.soft_labelling import label_rows
from salt_jax.storage.run_folder import RunFolder
from salt_jax.terminal import ProgressBar, say
from salt_jax.training import compilation
from salt_jax.training.checkpoints import SavedModel, find_model
from salt_jax.training.config import Devices
from salt_jax.training.ledger import Cost

# Rows are shuffled, so the first of them are a sample.
_SAMPLE_ROWS = 1 << 20

# It may be one of several processes.
SEVERAL_PROCESSES = True

# What changes no result, but for rounding; pass.json compares the rest when a pass goes on.
CHANGES_NO_RESULT = (
    *("score.devices", "Devices", "MeshConfig", "score.batch_size", "score.chunk_tokens"),
    *("score.worker", "score.workers", "score.shard_rows"),
)


def score(
    run: RunFolder,
    *,
    scorer: str,
    cache: str,
    scorer_step: int | None = None,
    split: str = "train",
    k: int | Sequence[int] = 10,
    scores: Sequence[Score] = (),
    soft_labels: int = 0,
    soft_label_temperature: float = losses.LossConfig.teacher_temperature,
    soft_label_encoding: str = "float16",
    selection: str | None = None,
    allow_nan: bool = False,
    shard_rows: int | None = None,
    worker: int | None = None,
    workers: int | None = None,
    batch_size: int = 64,
    devices: Devices = Devices(),
    chunk_tokens: int = losses.LossConfig.chunk_tokens,
) -> None:
    """Scores every row of a split with a frozen model, or stores its soft labels.

    Args:
      run: The folder for the shards and their manifest.
      scorer: The run folder of the scoring model.
      cache: A folder made by `salt prepare`, with the scorer's vocabulary.
      scorer_step: The scorer's checkpoint, an early one for SALT; the newest by default.
      split: Which rows.
      k: A token is learnable if it is among the scorer's k most likely ones; one k, or several.
      scores: Columns beside those of k: objects of a gin file, such as scores.Mean.
      soft_labels: Above 0, store so many ids a token with their probabilities, instead of scores:
        `salt train --soft_labels=FOLDER` learns from them without a teacher.
      soft_label_temperature: τ of those probabilities.
      soft_label_encoding: Of their logs: "float16", or "uint8".
      selection: Label the rows of a selection alone.
      allow_nan: Whether to go on where the scorer's losses are not finite, for `salt select` to
        leave such rows out. Soft labels must be finite.
      shard_rows: Rows that are written, and lost by a kill, together; best a multiple of
        batch_size. By default 65,536, for soft labels 4,096.
      worker: Which of the workers this process is, from 0; jax's own number by default.
      workers: How many processes share the pass; as many as jax knows of by default.
      batch_size: Rows at once.
      devices: The mesh, and where compiled programs are kept; of several processes each has a mesh
        of its own devices, on which all but tensor are fsdp.
      chunk_tokens: Tokens whose logits a device holds at once.

    Raises:
      InputError: No such model or cache, another vocabulary, k over the vocabulary's size, scores
        of one name, a folder that was begun with another cache, model, k or scores, or a model
        that is not finite.
    """
    require_counts(batch_size=batch_size, chunk_tokens=chunk_tokens, shard_rows=shard_rows)
    ks = checked_ks(k)
    require_scores(scores)
    if soft_labels and scores:
        raise InputError(
            f"scores has {len(scores)} and soft_labels is {soft_labels}, in their place: leave one "
            "of them out."
        )
    packed = PackedCache.open(cache)
    model = find_model(scorer, scorer_step, "scorer", packed)
    worker, workers = _own_part(worker, workers)
    device_mesh = own_mesh(devices.mesh)
    where = (batch_size, device_mesh, devices.rules, chunk_tokens, worker, workers)
    writer: RowScoresWriter | SoftLabelsWriter
    settings: tuple[Any, ...]
    make: Callable[..., None]
    if soft_labels:
        form = LabelFormat(
            packed.sequence_length, packed.vocabulary_size, soft_labels, soft_label_encoding
        )
        writer = _label_writer(
            run, packed, split, model, soft_label_temperature, form, selection, shard_rows or 4096
        )
        settings = (soft_labels, soft_label_temperature, writer, *where)
        make = functools.partial(label_rows, model.config)
    else:
        _check_ks(ks, packed, selection)
        own = [one.name for one in scores]
        writer = _score_writer(run, packed, split, model, ks, own, shard_rows or 65_536)
        settings = ([*scores_of(ks), *scores], writer, *where)
        make = functools.partial(score_rows, model.config, allow_nan=allow_nan)
    if shard_rows not in (None, writer.shards.shard_rows):
        say(
            f"{run.path} was begun with shards of {writer.shards.shard_rows:,} rows, and keeps them"
        )
    # What must stay the same is in pass.json; workers share the folder.
    run.begin(replace=True, part=f"{worker}-of-{workers}" if workers > 1 else "")
    writer.begin()
    missing = writer.shards.unfinished(worker, workers)
    # Processes that know of each other wait for one another when they load a model, so those that
    # have nothing to score load it too.
    if missing or (jax.process_count() > 1 and not writer.shards.completed):
        compilation.use_compilation_cache(devices.compilation_cache)
        params = model.load_params(device_mesh, devices.rules)
        rows = sum(len(shard.rows) for shard in missing)
        with ProgressBar("score", rows, unit="rows") as progress:
            make(params, packed, split, *settings, progress.add)
    run.processes.wait("scored")
    left = len(writer.shards.unfinished())
    if left:
        say(
            f"All shards of worker {worker} of {workers} are finished; {left} are still missing: "
            "they are the other workers'; if those are gone for good, run this again with "
            "--worker=0 --workers=1."
        )
        return
    if not run.processes.is_first:
        return
    cost = Cost.of(model.config, writer.shards.rows, packed.sequence_length)
    finished = writer.complete(dataclasses.asdict(cost))
    if isinstance(finished, StoredLabels):
        _summarize_labels(run, finished)
    else:
        _summarize(run, finished)


def _check_ks(ks: Sequence[int], cache: PackedCache, selection: str | None) -> None:
    if ks[-1] > cache.vocabulary_size:
        raise InputError(
            f"k is {ks[-1]} and the vocabulary has {cache.vocabulary_size} ids: lower --k."
        )
    if selection is not None:
        raise InputError(
            f"selection is {selection}, and scores are of all rows: leave it unset, or set "
            "--soft_labels=K."
        )


def _score_writer(
    run: RunFolder,
    cache: PackedCache,
    split: str,
    model: SavedModel,
    ks: Sequence[int],
    own: Sequence[str],
    shard_rows: int,
) -> RowScoresWriter:
    return RowScoresWriter(
        run.path,
        cache_digest=cache.digest,
        split=split,
        rows=len(cache.split(split)),
        scorer=model.identity,
        ks=ks,
        columns=column_names(ks),
        own_columns=own,
        shard_rows=shard_rows,
    )


def _label_writer(
    run: RunFolder,
    cache: PackedCache,
    split: str,
    model: SavedModel,
    temperature: float,
    form: LabelFormat,
    selection: str | None,
    shard_rows: int,
) -> SoftLabelsWriter:
    """Refuses what doesn't fit the disk."""
    if not 0.0 < temperature < math.inf:
        raise InputError(f"soft_label_temperature is {temperature}; set it to a number above 0.")
    selected = Selection.open(selection, cache_digest=cache.digest) if selection else None
    if selected is not None and selected.manifest["split"] != split:
        raise InputError(
            f"The selection {selection} is of the {selected.manifest['split']} split, not of "
            f"{split}: set --split to it."
        )
    if selected is not None:
        selected.require_within(len(cache.split(split)))
    writer = SoftLabelsWriter(
        run.path,
        cache_digest=cache.digest,
        split=split,
        rows=len(cache.split(split)),
        row_ids=selected.row_ids if selected else None,
        selection_digest=selected.digest if selected else None,
        teacher=model.identity,
        temperature=temperature,
        form=form,
        shard_rows=shard_rows,
    )
    left = sum(len(shard.rows) for shard in writer.shards.unfinished())
    run.require_space(left * form.record_bytes, "the soft labels")
    return writer


def _own_part(worker: int | None, workers: int | None) -> tuple[int, int]:
    """Which part of the pass is this process's."""
    if (worker is None) != (workers is None):
        raise InputError(
            f"worker is {worker} and workers is {workers}: set both, or neither of them, as in "
            "--worker=0 --workers=4."
        )
    if worker is None or workers is None:
        return jax.process_index(), jax.process_count()
    if not 0 <= worker < workers:
        raise InputError(
            f"worker is {worker} of {workers} workers, which count from 0: change --worker."
        )
    return worker, workers


def _summarize(run: RunFolder, scores: RowScores) -> None:
    """Prints what the scores are, and writes summary.json."""
    manifest, cost = scores.manifest, scores.cost or {}
    sample = slice(0, min(_SAMPLE_ROWS, scores.rows))
    summary: dict[str, Any] = {
        "rows": scores.rows,
        "nan_rows": manifest["nan_rows"],
        "k": manifest["k"],
        "scorer": manifest["scorer"],
        "sampled_rows": sample.stop,
        "columns": {},
        **cost,
    }
    scorer = manifest["scorer"]
    say(
        f"{scores.rows:,} rows of {manifest['split']} scored by {scorer['path']} at step "
        f"{scorer['step']} in {cost.get('seconds', float('nan')):.1f} s"
    )
    for name in scores.columns:
        values_n = scores.column(name)[sample]
        finite_n = values_n[np.isfinite(values_n)]
        without = int(np.count_nonzero(values_n == -np.inf))
        quantiles = _quantiles(finite_n)
        summary["columns"][name] = {"without_value": without, "quantiles": quantiles}
        nothing = f"; {without:,} rows have none" if without else ""
        say(f"  {name:18} median {quantiles.get('0.5', -np.inf):.3f}{nothing}")
    if manifest["nan_rows"]:
        say(
            f"  {manifest['nan_rows']:,} rows have scores that are not finite: the scorer is "
            "broken there; `salt select` refuses them unless --allow_nan=True leaves them out."
        )
    run.write_summary(summary)


def _summarize_labels(run: RunFolder, labels: StoredLabels) -> None:
    """Prints what the labels are, and writes summary.json."""
    manifest, form, cost = labels.manifest, labels.format, labels.cost
    stored = labels.rows * form.record_bytes
    say(
        f"{labels.rows:,} rows of {manifest['split']} labelled by {manifest['teacher']['path']} at "
        f"step {manifest['teacher']['step']} in {cost['seconds']:.1f} s: {form.k} ids a token at "
        f"the temperature {manifest['temperature']:g}, {form.bytes_per_token:.1f} bytes a token, "
        f"{stored / 1e6:,.1f} MB"
    )
    run.write_summary(
        {
            "rows": labels.rows,
            "teacher": manifest["teacher"],
            "temperature": manifest["temperature"],
            "format": manifest["format"],
            "bytes_per_token": form.bytes_per_token,
            "bytes": stored,
            **cost,
        }
    )


def _quantiles(values_n: np.ndarray) -> dict[str, float]:
    shares = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
    if not len(values_n):
        return {}
    return {f"{q:g}": float(np.quantile(values_n, q)) for q in shares}
