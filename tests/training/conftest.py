"""Small runs for the tests of the training part: everything real but the sizes."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from salt_jax.commands.train import train
from salt_jax.data.packed_cache import PackedCache
from salt_jax.distill import losses, schedules
from salt_jax.models.decoder import DecoderConfig
from salt_jax.storage.run_folder import RunFolder
from salt_jax.training import ledger, wall_time
from salt_jax.training.checkpoints import CheckpointConfig
from salt_jax.training.learning_rates import WarmupCosine
from salt_jax.training.optimizers import AdamW
from salt_jax.training.partitioning import MeshConfig
from tests.run_settings import train_config
from tests.training.doubles import Clock

STUDENT = DecoderConfig(embed_dim=32, num_layers=2, num_heads=2, mlp_dim=64, max_length=64)
TEACHER = dataclasses.replace(STUDENT, embed_dim=16, mlp_dim=32)


@pytest.fixture(scope="session")
def run_train(
    cache: PackedCache, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., pathlib.Path]:
    """Calls the train verb with small settings; gives the run's folder."""

    def run(folder: pathlib.Path | None = None, **settings: Any) -> pathlib.Path:
        folder = folder or tmp_path_factory.mktemp("run")
        defaults: dict[str, Any] = {
            "model": STUDENT,
            "cache": str(cache.path),
            "steps": 6,
            "batch_size": 8,
            "optimizer": AdamW(WarmupCosine(5e-3, warmup_steps=2), weight_decay=0.1),
            "schedule": schedules.NoDistillation(),
            "loss": losses.LossConfig(teacher_temperature=1.0, z_loss=1e-4),
            "arm": "test",
            "mesh": MeshConfig(),
            "checkpoints": CheckpointConfig(save_every=2, keep_every=2),
            "evaluate_every": 3,
            "log_every": 1,
            "compilation_cache": "",
        }
        config = train_config(**{**defaults, **settings})
        train(RunFolder(folder, "train"), config=config)
        return folder

    return run


@pytest.fixture(scope="session")
def slm(run_train: Callable[..., pathlib.Path]) -> pathlib.Path:
    """A trained teacher with an early checkpoint."""
    return run_train(
        model=TEACHER, steps=12, checkpoints=CheckpointConfig(save_every=0, keep_steps=(4,))
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (ledger, wall_time):
        monkeypatch.setattr(module, "time", clock)
    return clock
