"""The origin of a run: its inputs, recorded in checkpoints and compared when a run is resumed."""

from collections.abc import Mapping
from typing import Any

from salt_jax.data.denoisers import Denoising
from salt_jax.data.row_scores import Selection
from salt_jax.data.soft_labels import StoredLabels
from salt_jax.errors import InputError
from salt_jax.models.decoder import DecoderConfig
from salt_jax.terminal import say
from salt_jax.training.caches import Caches
from salt_jax.training.checkpoints import SavedModel
from salt_jax.training.config import TrainConfig
from salt_jax.training.ledger import Cost, known_cost


def origin_of(
    config: TrainConfig,
    student: DecoderConfig,
    caches: Caches,
    selected: Selection | None,
    teacher: SavedModel | None,
    labels: StoredLabels | None,
    denoising: Denoising | None,
) -> dict[str, Any]:
    """A run's inputs, as JSON values by name."""
    schedule = config.method.schedule
    taught_by: dict[str, Any] | None = None
    if teacher is not None:
        taught_by = {**teacher.identity, "training_cost": known_cost(teacher.counters)}
    elif labels is not None:
        given = {"soft_labels": str(labels.path), "digest": labels.digest}
        taught_by = {**labels.manifest["teacher"], **given, "training_cost": None}
    return {
        "model": student.to_json(),
        "vocabulary_fingerprint": caches.first.vocabulary_fingerprint,
        "cache_digest": caches.digest,
        "caches": caches.describe(),
        "selection_digest": selected.digest if selected else None,
        "schedule": {type(schedule).__name__: vars(schedule)},
        "teacher": taught_by,
        "objectives": denoising.identity if denoising else None,
    }


def require_same_origin(saved: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Refuses to resume a run on inputs whose contents have changed.

    Args:
      saved: A checkpoint's origin.
      now: The run's. A run without a teacher, past stage 1, may resume one that had a teacher.
      where: The checkpoint, for the error.

    Raises:
      InputError: The first input that differs.
    """
    names = ["model", "vocabulary_fingerprint", "cache_digest", "selection_digest"]
    names += ["teacher"] if now["teacher"] is not None else []
    names += ["objectives"] if "objectives" in saved else []  # older versions didn't record them
    for name in names:
        before, after = _identity(name, saved[name]), _identity(name, now[name])
        if before != after:
            raise InputError(
                f"{where} was made with the {name} {before} and this run has {after}: restore "
                "what it was started with, or choose another --output_dir."
            )


def _identity(name: str, value: Any) -> Any:
    """What must stay the same: a teacher's digest, and a model but for two settings. An older
    version's model has fewer settings."""
    if name == "model":
        settings = DecoderConfig.from_json(value).to_json()
        return {key: x for key, x in settings.items() if key not in ("remat", "attention_backend")}
    return value["digest"] if name == "teacher" and value is not None else value


def scoring_cost(selected: Selection | None, labels: StoredLabels | None, arm: str) -> Cost:
    """The cost of the scores behind a run's selection, and of its soft labels."""
    spent = [labels.cost] if labels is not None else []
    if selected is not None:
        cost = selected.manifest.get("scoring_cost")
        if cost is None:
            say(
                f"[{arm}] the selection {selected.path} doesn't say what its scores cost (another "
                "version of salt_jax made them): this run is not charged for them"
            )
        else:
            spent.append(cost)
    total = Cost()
    for cost in spent:
        total = Cost(*(x + cost[name] for name, x in vars(total).items()))
    return total
