"""`salt select`: picks the rows for stage 1, the highest scores or random ones, and audits them.

The selection is a list of row ids with a manifest of how it was made; `salt train
--selection=FOLDER` reads those rows in stage 1. The audit shows what was selected and what was not:
by subset, against other selections, and with rows as text. It is printed, written to audit.json,
and shown by `salt report`.
"""

import concurrent.futures
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from salt_jax.cli.verb import Verb
from salt_jax.data.packed_cache import PackedCache, PackedSplit
from salt_jax.data.row_scores import (
    AUDIT_FILE,
    SUBSET,
    TARGETS_HASH,
    ColumnScores,
    RowScores,
    Selection,
    targets_hash,
)
from salt_jax.data.row_text import row_as_text
from salt_jax.distill import selection
from salt_jax.distill.audit import RowFacts, by_subset, duplicates, overlap, rows_to_show, ties
from salt_jax.distill.near_duplicates import BANDS, find_near_duplicates, signatures
from salt_jax.distill.scores import LOG_PERPLEXITY, ScoreConfig
from salt_jax.errors import InputError
from salt_jax.reporting.selection_audit import audit_tables
from salt_jax.storage import durable_files
from salt_jax.storage.run_folder import RunFolder
from salt_jax.terminal import ProgressBar, print_table, say

# Settings that may differ when the command is run again: rows with NaN are never selected.
CHANGES_NO_RESULT = ("select.allow_nan",)

# The most rows to read from the cache to audit a selection without scores.
_MOST_ROWS_READ = 200_000

_TOKENS = ("targets", "segment_ids")
_BLOCK_ROWS = 1024  # that are read at once


def select(
    run: RunFolder,
    *,
    cache: str,
    rule: selection.SelectionRule,
    scores: str | None = None,
    later_scores: str | None = None,
    split: str = "train",
    k: int | None = None,
    statistic: str = "median",
    unlearnable: str = "drop",
    min_learnable_fraction: float = 0.0,
    near_duplicates: float | None = None,
    allow_nan: bool = False,
    compare: Sequence[str] = (),
) -> None:
    """Picks rows of a cache.

    Args:
      run: The folder for row_ids.npy and its manifest.
      cache: The packed cache.
      rule: selection.TopRows, TopFraction, Threshold, or RandomRows as the control.
      scores: A folder made by `salt score`; RandomRows needs none, but has a fuller audit with it.
      later_scores: Scores by a later checkpoint of the same scorer: a row's score is then what it
        had less what it has now, what the scorer has learned of it since.
      split: The split, if there are no scores.
      k: Which k, if the scores have several.
      statistic: A row's score: "median" (METHOD's S) or "mean" of its learnable tokens' losses,
        "perplexity", the mean loss of all its tokens, or any other column of the scores by name.
      unlearnable: Whether the median drops the other tokens ("drop") or counts them as 0 ("zero").
      min_learnable_fraction: Rows with a smaller share of learnable tokens are not selected.
      near_duplicates: Rows that are at least so similar to one of a higher score are not selected:
        the estimated Jaccard index of their sets of 5 successive tokens, from 0.5.
      allow_nan: Whether some scores may be NaN; such rows are never selected.
      compare: Folders of other selections of the cache, whose overlap with this one is audited.

    Raises:
      InputError: The scores are of another cache or another k, or NaN; or the rule asks for more
        rows than there are.
    """
    packed = PackedCache.open(cache)
    others = {folder: Selection.open(folder, cache_digest=packed.digest) for folder in compare}
    config = ScoreConfig(k, statistic, unlearnable, min_learnable_fraction)
    row_scores = _open_scores(scores, rule, packed, allow_nan)
    later = _open_later(later_scores, rule, row_scores, config, packed, allow_nan)
    _check_near_duplicates(near_duplicates, rule)
    if row_scores is None:
        facts = None
        candidates = selection.Candidates(rows=len(packed.split(split)))
    else:
        config = config.among(row_scores.manifest["k"], row_scores.columns)
        split = row_scores.manifest["split"]
        facts = _facts(packed, row_scores, config, later, near_duplicates)
        candidates = selection.Candidates(
            len(facts), facts.scores, facts.subsets, len(packed.subsets)
        )
    for folder, other in others.items():
        if other.manifest["split"] != split:
            raise InputError(
                f"compare names {folder}, a selection of the {other.manifest['split']} split, and "
                f"this one is of {split}: leave it out."
            )
        other.require_within(len(packed.split(split)))
    by_score, sized = not isinstance(rule, selection.RandomRows), rule
    if isinstance(rule, selection.RandomRows) and rule.like:
        like = Selection.open(rule.like, cache_digest=packed.digest)
        sized = dataclasses.replace(rule, m=like.manifest["rows"], like="")
    choice = sized.select(candidates)
    run.begin(may_change=CHANGES_NO_RESULT)
    chosen = Selection.write(
        run.path,
        choice.blocks(),
        cache_digest=packed.digest,
        split=split,
        how=_how(rule, near_duplicates),
        scores=row_scores if by_score else None,
        score=dataclasses.asdict(config) if by_score else None,
        later=later,
        cut=choice.cut,
    )
    audit = _audit(packed, chosen, facts, others)
    text = json.dumps(audit, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    durable_files.write_text(run.path / AUDIT_FILE, text)
    _say(chosen, candidates.rows, audit)
    run.write_summary(_summary(chosen, candidates.rows, audit))


def _open_scores(
    folder: str | None, rule: selection.SelectionRule, cache: PackedCache, allow_nan: bool
) -> RowScores | None:
    name = type(rule).__name__
    if folder is None:
        if not isinstance(rule, selection.RandomRows):
            needed = f"The rule {name} needs scores"
        elif rule.stratified:
            needed = f"{name}.stratified is set, and scores say of which subset each row is"
        else:
            return None
        raise InputError(f"{needed}: add --scores=FOLDER, the output of `salt score`.")
    scores = RowScores.open(folder, cache_digest=cache.digest)
    broken = scores.manifest["nan_rows"]
    if broken and not allow_nan:
        raise InputError(
            f"{broken:,} of the {scores.rows:,} rows in {folder} have scores that are not finite, "
            "so the scorer was broken there: score with another checkpoint, or add "
            "--allow_nan=True to leave those rows out."
        )
    return scores


def _open_later(
    folder: str | None,
    rule: selection.SelectionRule,
    scores: RowScores | None,
    config: ScoreConfig,
    cache: PackedCache,
    allow_nan: bool,
) -> RowScores | None:
    """Scores to subtract, of the same rows and with the same column."""
    if folder is None:
        return None
    if scores is None or isinstance(rule, selection.RandomRows):
        raise InputError(
            f"later_scores is {folder}, and {type(rule).__name__} selects without scores: leave it "
            "unset, or select by scores (--gin_file=methods/top_fraction.gin)."
        )
    later = _open_scores(folder, rule, cache, allow_nan)
    assert later is not None, "a rule by score needs scores"
    if later.manifest["split"] != scores.manifest["split"]:
        raise InputError(
            f"later_scores is {folder}, of the {later.manifest['split']} split, and the scores are "
            f"of {scores.manifest['split']}: score that split."
        )
    if later.digest == scores.digest:
        raise InputError(
            f"later_scores is {folder}, the scores themselves: name those of a later checkpoint."
        )
    first, then = scores.manifest["scorer"], later.manifest["scorer"]
    if first["path"] == then["path"] and first["step"] > then["step"]:
        raise InputError(
            f"later_scores is {folder}, of step {then['step']}, and scores are of step "
            f"{first['step']}: swap the two."
        )
    config.among(scores.manifest["k"], scores.columns).among(later.manifest["k"], later.columns)
    return later


def _check_near_duplicates(similarity: float | None, rule: selection.SelectionRule) -> None:
    if similarity is not None and not 0.5 <= similarity <= 1.0:
        raise InputError(f"near_duplicates is {similarity}; set it from 0.5 to 1.")
    if similarity is not None and isinstance(rule, selection.RandomRows):
        raise InputError(
            f"near_duplicates is {similarity}, and RandomRows selects without scores, and "
            "of near-duplicates the highest score is kept: leave it unset."
        )


def _facts(
    cache: PackedCache,
    scores: RowScores,
    config: ScoreConfig,
    later: RowScores | None,
    similarity: float | None,
) -> RowFacts:
    columns = config.column, config.learnable_column
    of_rows = scores.scores(*columns, config.min_learnable_fraction, later)
    if similarity is not None:
        of_rows = _without_near_duplicates(
            cache.split(scores.manifest["split"]), of_rows, similarity
        )
    return RowFacts(
        subset_names=cache.subsets,
        subsets=scores.column(SUBSET),
        scores=of_rows,
        losses=scores.column(LOG_PERPLEXITY),
        learnable=scores.column(config.learnable_column),
        hashes=scores.column(TARGETS_HASH),
    )


def _without_near_duplicates(
    rows: PackedSplit, scores: ColumnScores, similarity: float
) -> ColumnScores:
    """The scores with −inf for near-duplicates; threads read the rows in blocks."""

    def of_block(first: int) -> np.ndarray:
        block = rows.__getitems__(range(first, min(first + _BLOCK_ROWS, len(rows))))
        return signatures(*(np.stack([row[name] for row in block]) for name in _TOKENS))

    signatures_NxK = np.empty((len(rows), BANDS), np.uint64)
    firsts = range(0, len(rows), _BLOCK_ROWS)
    with (
        ProgressBar("compare", len(rows), unit="rows") as bar,
        concurrent.futures.ThreadPoolExecutor() as threads,
    ):
        for first, block_BxK in zip(firsts, threads.map(of_block, firsts), strict=True):
            signatures_NxK[first : first + len(block_BxK)] = block_BxK
            bar.add(len(block_BxK))
    found_N = find_near_duplicates(scores, signatures_NxK, similarity)
    say(f"{np.count_nonzero(found_N):,} of {len(rows):,} rows have a near-duplicate that is better")
    return dataclasses.replace(scores, left_out=found_N)


def _how(rule: selection.SelectionRule, near_duplicates: float | None) -> dict[str, Any]:
    """The rule's name and the settings that are set."""
    settings = {
        name: value
        for name, value in {**vars(rule), "near_duplicates": near_duplicates}.items()
        if value is not None and value is not False and value != ""
    }
    return {"rule": type(rule).__name__, **settings}


def _audit(
    cache: PackedCache,
    chosen: Selection,
    facts: RowFacts | None,
    others: Mapping[str, Selection],
) -> dict[str, Any]:
    """The contents of audit.json."""
    manifest, row_ids_m = chosen.manifest, chosen.row_ids
    rows, cut = cache.split(manifest["split"]), manifest["cut"]
    by_score = manifest["score"] is not None
    # With either, each subset has its own cut.
    stratified = by_score and bool({"stratified", "most_of_subset"} & manifest["how"].keys())
    if facts is None:
        numbers = _audit_without_scores(cache, chosen)
        shown = {"sample": row_ids_m[np.linspace(0, len(row_ids_m) - 1, 20).astype(int)].tolist()}
    else:
        numbers = by_subset(facts, row_ids_m)
        numbers["duplicates"] = duplicates(facts.hashes, row_ids_m)
        if by_score and not stratified:
            numbers["ties"] = ties(facts, row_ids_m, cut)
        shown = rows_to_show(facts, row_ids_m, by_score, stratified)
    return {
        "cut": cut,
        "stratified": stratified,
        "score": manifest["score"],
        **numbers,
        "overlaps": [
            {
                "selection": folder,
                **{name: other.manifest[name] for name in ("how", "score", "scorer")},
                **overlap(row_ids_m, other.row_ids, len(rows)),
            }
            for folder, other in others.items()
        ],
        "examples": {
            name: [_excerpt(cache, rows[row_id], facts) for row_id in dict.fromkeys(ids)]
            for name, ids in shown.items()
        },
    }


def _excerpt(
    cache: PackedCache, row: Mapping[str, np.ndarray], facts: RowFacts | None
) -> dict[str, Any]:
    ids = row["row_id"].reshape(1)
    return {
        "row_id": int(row["row_id"]),
        "subset": cache.subsets[int(row["subset"])],
        "score": float(facts.scores[ids][0]) if facts else None,
        "learnable": float(facts.learnable[ids][0]) if facts else None,
        "text": row_as_text(dict(row), cache.vocabulary),
    }


def _audit_without_scores(cache: PackedCache, chosen: Selection) -> dict[str, Any]:
    """The audit of a random control without scores, from its rows if they are few enough."""
    rows, kept = cache.split(chosen.manifest["split"]), len(chosen.row_ids)
    whole = {"rows": len(rows), "kept": kept, "kept_share": kept / len(rows), "share_of_kept": 1.0}
    if kept > _MOST_ROWS_READ:
        return {"whole": whole, "by_subset": {}, "duplicates": {}}
    counts, hashes = np.zeros(len(cache.subsets), np.int64), set()
    for first in range(0, kept, _BLOCK_ROWS):
        for row in rows.__getitems__(chosen.row_ids[first : first + _BLOCK_ROWS].tolist()):
            counts[row["subset"]] += 1
            hashes.add(targets_hash(row["targets"], row["segment_ids"]))
    of_all = {name: info["rows"] for name, info in rows.info["by_subset"].items()}
    parts = {
        name: {
            "rows": of_all[name],
            "kept": int(count),
            "kept_share": count / of_all[name],
            "share_of_kept": count / kept,
        }
        for name, count in zip(cache.subsets, counts, strict=True)
        if of_all.get(name)
    }
    return {"whole": whole, "by_subset": parts, "duplicates": {"kept": kept - len(hashes)}}


def _say(chosen: Selection, of_rows: int, audit: Mapping[str, Any]) -> None:
    cut, how = chosen.manifest["cut"], dict(chosen.manifest["how"])
    rule = how.pop("rule")
    settings = ", ".join(f"{name} {value}" for name, value in how.items())
    say(
        f"{chosen.manifest['rows']:,} of {of_rows:,} rows selected by {rule} ({settings})"
        + (f"; the lowest score among them is {cut:.4f} nats" if cut is not None else "")
    )
    for table in audit_tables(chosen.path.name, audit):
        print_table(table)
    say(f"Rows to look at: {chosen.path / AUDIT_FILE}, or `salt report {chosen.path}`.")


def _summary(chosen: Selection, of_rows: int, audit: Mapping[str, Any]) -> dict[str, Any]:
    manifest, whole = chosen.manifest, audit["whole"]
    return {
        "of_rows": of_rows,
        **{name: manifest[name] for name in ("rows", "cut", "how", "score", "scoring_cost")},
        "by_subset": {name: part["kept"] for name, part in audit["by_subset"].items()},
        # Without the histograms.
        "whole": {name: value for name, value in whole.items() if not isinstance(value, list)},
        "duplicates": audit["duplicates"],
        "overlaps": audit["overlaps"],
    }


VERB = Verb(
    select, changes_no_result=CHANGES_NO_RESULT, gin_files={"rule": "methods/top_fraction.gin"}
)
