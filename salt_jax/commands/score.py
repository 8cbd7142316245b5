"""`salt score`: how hard and how learnable each row is, by an early checkpoint of the SLM.

One pass makes several columns: for each k the median loss of the learnable tokens (with the others
dropped, and counted as 0), their mean loss and their share of all tokens; the mean loss of all
tokens; and scores of your own. `salt select` picks rows by one of them.

With --soft_labels=K it stores the K most likely ids of each token with their probabilities instead,
by the SLM's last checkpoint; `salt train --soft_labels=FOLDER` learns from them without a teacher.

The pass is divided into shards. The same command resumes it at the missing shards, also with
another number of workers; workers, each with its own devices, share only the folder, on disk or in
gs://.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from salt_jax.cli.verb import Verb
from salt_jax.commands._hub_models import local_model
from salt_jax.data.label_format import LabelFormat
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.row_scores import RowScores, RowScoresWriter, Selection
from salt_jax.data.soft_labels import SoftLabelsWriter, StoredLabels
from salt_jax.distill import losses
from salt_jax.distill.scores import Score, checked_ks, column_names, require_scores, scores_of
from salt_jax.errors import InputError, require_counts
from salt_jax.inference.model_pass import ModelPass, own_mesh
from salt_jax.inference.scoring import score_rows
from salt_jax.inference.soft_labelling import label_rows
from salt_jax.storage.run_folder import RunFolder
from salt_jax.terminal import ProgressBar, say
from salt_jax.training import compilation
from salt_jax.training.checkpoints import SavedModel, find_model
from salt_jax.training.config import Devices
from salt_jax.training.ledger import Cost

# Rows are shuffled, so the first ones are a random sample.
_SAMPLE_ROWS = 1 << 20
_QUANTILES = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)

# Settings that change the result by rounding at most; pass.json has the others, for resuming.
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
      scores: More columns: objects of a gin file, such as scores.Mean.
      soft_labels: Above 0, store that many ids per token with their probabilities instead of
        scores: `salt train --soft_labels=FOLDER` learns from them without a teacher.
      soft_label_temperature: τ of those probabilities.
      soft_label_encoding: The encoding of their logarithms: "float16", or "uint8".
      selection: Label only the rows of this selection.
      allow_nan: Continue if the scorer's losses are not finite; `salt select` can leave those rows
        out. Soft labels must be finite.
      shard_rows: Rows per shard, the unit of work lost by a kill; best a multiple of batch_size.
        By default 65,536, for soft labels 4,096.
      worker: This worker's number, from 0; jax's process index by default.
      workers: How many processes share the pass; jax's process count by default.
      batch_size: Rows at once.
      devices: The mesh and the compilation cache; each of several processes has a mesh of its own
        devices, on which all axes but tensor are fsdp.
      chunk_tokens: Tokens whose logits a device holds at once.

    Raises:
      InputError: There is no such model or cache, vocabularies differ, k exceeds the vocabulary,
        two scores have one name, the folder was begun with another cache, model, k or scores, or
        the model is not finite.
    """
    require_counts(batch_size=batch_size, chunk_tokens=chunk_tokens, shard_rows=shard_rows)
    ks = checked_ks(k)
    require_scores(scores)
    _require_one_kind(soft_labels, scores, selection)
    packed = PackedCache.open(cache)
    model = find_model(local_model(scorer), scorer_step, "scorer", packed)
    worker, workers = _own_part(worker, workers)
    writer: RowScoresWriter | SoftLabelsWriter
    if soft_labels:
        form = LabelFormat(
            packed.sequence_length, packed.vocabulary_size, soft_labels, soft_label_encoding
        )
        writer = _label_writer(
            run, packed, split, model, soft_label_temperature, form, selection, shard_rows or 4096
        )
    else:
        writer = _score_writer(run, packed, split, model, ks, scores, shard_rows or 65_536)
    if shard_rows not in (None, writer.shard_rows):
        say(f"{run.path} was begun with shards of {writer.shard_rows:,} rows, and keeps them")
    mesh = own_mesh(devices.mesh)
    missing, params = writer.unfinished(worker, workers), None
    part = f"{worker}-of-{workers}" if workers > 1 else ""
    run.resume(replace=True, part=part)
    run.processes.watch()
    # Processes that know of each other wait for one another when they load a model, so those that
    # have nothing to score load it too.
    if missing or (jax.process_count() > 1 and writer.unfinished()):
        compilation.use_compilation_cache(devices.compilation_cache)
        # Before the folder is begun, so that a model that can't be loaded leaves nothing there.
        params = model.load_params(mesh, devices.rules)
    # What must stay the same is in pass.json; workers share the folder.
    run.begin(replace=True, part=part)
    writer.begin()
    if params is not None:
        left = sum(len(shard.rows) for shard in missing)
        where = (batch_size, mesh, devices.rules, chunk_tokens, worker, workers)
        with ProgressBar("score", left, unit="rows") as bar:
            rows = ModelPass(model.config, packed, split, *where, bar.add)
            if isinstance(writer, SoftLabelsWriter):
                label_rows(rows, params, soft_labels, soft_label_temperature, writer)
            else:
                score_rows(rows, params, [*scores_of(ks), *scores], writer, allow_nan)
    run.processes.wait("scored")
    left = len(writer.unfinished())
    if left:
        say(
            f"All shards of worker {worker} of {workers} are finished; {left} are still missing: "
            "they are the other workers'; if those are gone for good, run this again with "
            "--worker=0 --workers=1."
        )
    elif run.processes.is_first:
        cost = dataclasses.asdict(Cost.of(model.config, writer.rows, packed.sequence_length))
        if isinstance(writer, SoftLabelsWriter):
            run.write_summary(_label_summary(writer.complete(cost)))
        else:
            run.write_summary(_score_summary(writer.complete(cost)))


def _require_one_kind(soft_labels: int, scores: Sequence[Score], selection: str | None) -> None:
    """Refuses settings of scores for soft labels, and the other way round."""
    if soft_labels and scores:
        raise InputError(
            f"scores has {len(scores)} and soft_labels is {soft_labels}, which replaces them: "
            "leave one of them out."
        )
    if not soft_labels and selection is not None:
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
    scores: Sequence[Score],
    shard_rows: int,
) -> RowScoresWriter:
    own = {f"{type(score).__name__}.k": getattr(score, "k", None) for score in scores}
    for name, k in {"--k": ks[-1], **own}.items():
        if isinstance(k, int) and k > cache.vocabulary_size:
            raise InputError(
                f"{name.strip('-')} is {k} and the vocabulary has {cache.vocabulary_size} ids: "
                f"lower {name}."
            )
    return RowScoresWriter(
        run.path,
        cache_digest=cache.digest,
        split=split,
        rows=len(cache.split(split)),
        scorer=model.identity,
        ks=ks,
        columns=column_names(ks),
        own_columns=[score.name for score in scores],
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
    """Also refuses labels that don't fit on the disk."""
    if not 0.0 < temperature < math.inf:
        raise InputError(f"soft_label_temperature is {temperature}; set it to a number above 0.")
    rows, selected = len(cache.split(split)), None
    if selection is not None:
        selected = Selection.open(selection, cache_digest=cache.digest)
        if selected.manifest["split"] != split:
            raise InputError(
                f"The selection {selection} is of the {selected.manifest['split']} split, not of "
                f"{split}: set --split to it."
            )
        selected.require_within(rows)
    writer = SoftLabelsWriter(
        run.path,
        cache_digest=cache.digest,
        split=split,
        rows=rows,
        row_ids=selected.row_ids if selected else None,
        selection_digest=selected.digest if selected else None,
        teacher=model.identity,
        temperature=temperature,
        form=form,
        shard_rows=shard_rows,
    )
    left = sum(len(shard.rows) for shard in writer.unfinished())
    run.require_space(left * form.record_bytes, "the soft labels")
    return writer


def _own_part(worker: int | None, workers: int | None) -> tuple[int, int]:
    """This process's number among the workers, and how many there are."""
    if (worker is None) != (workers is None):
        raise InputError(
            f"worker is {worker} and workers is {workers}: set both, or neither of them, as in "
            "--worker=0 --workers=4."
        )
    if worker is None or workers is None:
        return jax.process_index(), jax.process_count()
    if not 0 <= worker < workers:
        raise InputError(
            f"worker is {worker} of {workers} workers, numbered from 0: change --worker."
        )
    return worker, workers


def _score_summary(scores: RowScores) -> dict[str, Any]:
    """Prints a summary of the scores, and returns it for summary.json."""
    manifest, cost = scores.manifest, scores.cost or {}
    scorer, nan_rows = manifest["scorer"], manifest["nan_rows"]
    say(
        f"{scores.rows:,} rows of {manifest['split']} scored by {scorer['path']} at step "
        f"{scorer['step']} in {cost.get('seconds', float('nan')):.1f} s"
    )
    sampled = min(_SAMPLE_ROWS, scores.rows)
    columns = {}
    for name in scores.columns:
        values_n = scores.column(name)[:sampled]
        without = int(np.count_nonzero(values_n == -np.inf))
        finite_n = values_n[np.isfinite(values_n)]
        shares = _QUANTILES if len(finite_n) else ()
        quantiles = {f"{q:g}": float(np.quantile(finite_n, q)) for q in shares}
        columns[name] = {"without_value": without, "quantiles": quantiles}
        nothing = f"; {without:,} rows have none" if without else ""
        say(f"  {name:18} median {quantiles.get('0.5', -np.inf):.3f}{nothing}")
    if nan_rows:
        say(
            f"  {nan_rows:,} rows have scores that are not finite: the scorer is broken there; "
            "`salt select` refuses them unless --allow_nan=True leaves them out."
        )
    return {
        "rows": scores.rows,
        "nan_rows": nan_rows,
        "k": manifest["k"],
        "scorer": scorer,
        "sampled_rows": sampled,
        "columns": columns,
        **cost,
    }


def _label_summary(labels: StoredLabels) -> dict[str, Any]:
    """Prints a summary of the soft labels, and returns it for summary.json."""
    manifest, form, cost = labels.manifest, labels.format, labels.cost
    teacher, stored_bytes = manifest["teacher"], labels.rows * form.record_bytes
    say(
        f"{labels.rows:,} rows of {manifest['split']} labelled by {teacher['path']} at step "
        f"{teacher['step']} in {cost['seconds']:.1f} s: {form.k} ids a token at the temperature "
        f"{manifest['temperature']:g}, {form.bytes_per_token:.1f} bytes a token, "
        f"{stored_bytes / 1e6:,.1f} MB"
    )
    return {
        "rows": labels.rows,
        "teacher": teacher,
        "temperature": manifest["temperature"],
        "format": manifest["format"],
        "bytes_per_token": form.bytes_per_token,
        "bytes": stored_bytes,
        **cost,
    }


VERB = Verb(
    score,
    several_processes=True,
    writes_to_buckets=True,
    changes_no_result=CHANGES_NO_RESULT,
)
