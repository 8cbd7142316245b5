"""A run of Weights & Biases, which metrics are sent to beside the run's own files."""

import pathlib
from collections.abc import Mapping
from typing import Any

from salt_jax.errors import InputError, needed_libraries
from salt_jax.storage.buckets import is_remote
from salt_jax.storage.durable_files import write_text

RUN_ID_FILE = "wandb_run_id"


def require_wandb(project: str | None) -> None:
    """Refuses a project (InputError) if the library is missing."""
    if project is not None:
        with needed_libraries("wandb_project", "wandb"):
            import wandb  # noqa: F401


def begin_wandb(run_path: pathlib.Path, project: str, name: str, config: Mapping[str, Any]) -> Any:
    """Begins a W&B run, or continues the one whose id an earlier start left in RUN/wandb_run_id.

    Raises:
      InputError: Weights & Biases refuses the run.
    """
    import wandb

    kept = run_path / RUN_ID_FILE
    known = kept.read_text(encoding="utf-8") if kept.exists() else None
    try:
        run = wandb.init(
            project=project,
            name=name,
            id=known,
            resume="allow",
            dir=None if is_remote(run_path) else str(run_path),
            config=config,
        )
    except wandb.Error as error:
        raise InputError(
            f"Weights & Biases refuses a run of the project {project!r} ({error}): log in with "
            "`wandb login`, set WANDB_MODE=offline, or leave out --wandb_project."
        ) from error
    write_text(kept, run.id)
    return run
