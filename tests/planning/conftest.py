"""A small run to plan, and a fixture for tests that need JAX's CUDA plugin."""

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from salt_jax.distill.losses import LossConfig
from salt_jax.distill.schedules import NoDistillation, Step
from salt_jax.models.decoder import DecoderConfig
from salt_jax.planning.compile import Job
from salt_jax.training.config import Data, Devices, Method, Teacher, TrainConfig
from salt_jax.training.learning_rates import WarmupCosine
from salt_jax.training.optimizers import AdamW

STUDENT = DecoderConfig(
    embed_dim=64, num_layers=2, num_heads=2, mlp_dim=128, vocab_size=1000, max_length=64
)
TEACHER = dataclasses.replace(STUDENT, embed_dim=32, num_layers=1)


@pytest.fixture
def make_job() -> Callable[..., Job]:
    """Makes a job of a few thousand parameters; settings of any group override."""
    return small_job


def small_job(
    *,
    teacher: DecoderConfig | None = TEACHER,
    sequence_length: int = 16,
    soft_labels: int = 0,
    devices: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Job:
    has_stage1 = teacher is not None or soft_labels
    defaults: dict[str, Any] = {
        "model": STUDENT,
        "data": Data(None, batch_size=32),
        "method": Method(
            "test",
            Step(omega=0.5, n_kd=25) if has_stage1 else NoDistillation(),
            LossConfig(chunk_tokens=64),
            Teacher(None, dtype="bfloat16"),
        ),
        "optimizer": AdamW(WarmupCosine(1e-3)),
        "steps": 100,
        "devices": Devices(**(devices or {})),
    }
    return Job(TrainConfig(**{**defaults, **settings}), teacher, sequence_length, soft_labels)


@pytest.fixture
def cuda_plugin() -> None:
    """Skips a test that compiles for GPUs where that cannot be done."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("JAX's CUDA plugin is not installed: pip install 'salt_jax[plan_gpu]'")
