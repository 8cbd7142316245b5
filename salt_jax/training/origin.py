"""Where a run comes from: what its checkpoints record of it, and what was spent before it.

In: what the run reads. Out: JSON values by name, and costs.
"""

from typing import Any

from salt_jax.data.row_scores import Selection
from salt_jax.data.soft_labels import StoredLabels
from salt_jax.distill import schedules
from salt_jax.models.decoder import DecoderConfig
from salt_jax.terminal import say
from salt_jax.training.caches import Caches
from salt_jax.training.checkpoints import SavedModel
from salt_jax.training.ledger import Cost, known_cost


def scoring_cost(selected: Selection | None, labels: StoredLabels | None, arm: str) -> Cost | None:
    """What a run begins with spent: the scores behind its selection, and its soft labels."""
    spent = [cost for cost in (_selection_cost(selected, arm), labels and labels.cost) if cost]
    if not spent:
        return None
    return Cost(**{name: sum(cost[name] for cost in spent) for name in spent[0]})


def _selection_cost(selected: Selection | None, arm: str) -> dict[str, Any] | None:
    if selected is None:
        return None
    cost = selected.manifest.get("scoring_cost")
    if cost is None:
        say(
            f"[{arm}] the selection {selected.path} doesn't say what its scores cost (another "
            "version of salt_jax made them): this run is not charged for them"
        )
    return cost


def origin_of(
    config: DecoderConfig,
    caches: Caches,
    schedule: schedules.Schedule,
    selected: Selection | None,
    teacher: SavedModel | None,
    labels: StoredLabels | None,
) -> dict[str, Any]:
    """What checkpoints record of where a run comes from."""
    taught_by: dict[str, Any] | None = None
    if teacher is not None:
        taught_by = {**teacher.identity, "training_cost": known_cost(teacher.counters)}
    elif labels is not None:
        given = {"soft_labels": str(labels.path), "digest": labels.digest}
        taught_by = {**labels.manifest["teacher"], **given, "training_cost": None}
    return {
        "model": config.to_json(),
        "vocabulary_fingerprint": caches.first.vocabulary_fingerprint,
        "cache_digest": caches.digest,
        "caches": caches.describe(),
        "selection_digest": selected.digest if selected else None,
        "schedule": {type(schedule).__name__: vars(schedule)},
        "teacher": taught_by,
    }
