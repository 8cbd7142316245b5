"""`salt select`: the rows for stage 1: the highest scores, or as many at random.

The selection is a list of row ids with a manifest that says what made it; `salt train
--selection=FOLDER` reads those rows in stage 1.
"""

import numpy as np

from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.row_scores import RowScores, Selection
from salt_jax.distill import selection
from salt_jax.errors import InputError
from salt_jax.run_folder import RunFolder


def select(
    run: RunFolder,
    *,
    cache: str,
    rule: selection.SelectionRule,
    scores: str | None = None,
    split: str = "train",
) -> None:
    """Picks rows of a cache.

    Args:
      run: The folder for row_ids.npy and its manifest.
      cache: The packed cache.
      rule: selection.TopRows, TopFraction, Threshold, or RandomRows as the control.
      scores: A folder made by `salt score`; not needed for RandomRows.
      split: Which rows, where there are no scores to say so.

    Raises:
      InputError: Scores of another cache, or a rule that asks for more rows than there are.
    """
    packed = PackedCache.open(cache)
    is_random = isinstance(rule, selection.RandomRows)
    if is_random:
        row_scores = None
        scores_N = np.zeros(len(packed.split(split)), np.float32)
    elif scores is None:
        raise InputError(
            f"The rule {type(rule).__name__} needs scores: add --scores=FOLDER, the output of "
            "`salt score`."
        )
    else:
        row_scores = RowScores.open(scores, cache_digest=packed.digest)
        scores_N, split = row_scores.scores, row_scores.manifest["split"]
    row_ids_m = rule.select(scores_N)
    if not len(row_ids_m):
        raise InputError(
            f"The rule {rule} selects none of {len(scores_N):,} rows: lower its threshold, or look "
            "at the scores with `salt report`."
        )
    run.begin()
    chosen = Selection.write(
        run.path,
        row_ids_m,
        cache_digest=packed.digest,
        split=split,
        how={"rule": type(rule).__name__, **vars(rule)},
        scores=row_scores,
    )
    rows = chosen.manifest["rows"]
    cut = chosen.manifest["cut"]
    print(
        f"{rows:,} of {len(scores_N):,} rows selected by {rule}"
        + (f"; the lowest score among them is {cut:.4f} nats" if cut is not None else "")
    )
    run.write_summary(
        {
            "rows": rows,
            "of_rows": len(scores_N),
            "cut": cut,
            "how": chosen.manifest["how"],
            "scoring_cost": chosen.manifest["scoring_cost"],
            "by_subset": _by_subset(packed, split, row_ids_m),
        }
    )


def _by_subset(cache: PackedCache, split: str, row_ids_m: np.ndarray) -> dict[str, int]:
    """Selected rows of each subset."""
    rows = cache.split(split)
    counts = np.zeros(len(cache.subsets), np.int64)
    for first in range(0, len(row_ids_m), 1024):
        for row in rows.__getitems__(row_ids_m[first : first + 1024].tolist()):
            counts[row["subset"]] += 1
    return dict(zip(cache.subsets, counts.tolist(), strict=True))
