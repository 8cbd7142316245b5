"""A small run to plan, and what tests that need libtpu ask for."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from salt_jax.distill.losses import LossConfig
from salt_jax.models.decoder import DecoderConfig
from salt_jax.planning.compile import Job
from salt_jax.training import partitioning
from salt_jax.training.learning_rates import WarmupCosine
from salt_jax.training.optimizers import AdamW

STUDENT = DecoderConfig(
    embed_dim=64, num_layers=2, num_heads=2, mlp_dim=128, vocab_size=1000, max_length=64
)
TEACHER = dataclasses.replace(STUDENT, embed_dim=32, num_layers=1)


@pytest.fixture
def make_job() -> Callable[..., Job]:
    """Makes a job of a few thousand parameters; settings override."""

    def make(**settings: Any) -> Job:
        defaults: dict[str, Any] = {
            "model": STUDENT,
            "teacher": TEACHER,
            "teacher_dtype": "bfloat16",
            "optimizer": AdamW(WarmupCosine(1e-3)),
            "loss": LossConfig(chunk_tokens=64),
            "steps": 100,
            "stage1_steps": 25,
            "batch_size": 32,
            "sequence_length": 16,
            "microbatches": 1,
            "stage1_microbatches": 1,
            "mesh": partitioning.MeshConfig(),
            "rules": partitioning.DEFAULT_RULES,
        }
        return Job(**{**defaults, **settings})

    return make


@pytest.fixture
def libtpu() -> None:
    """Skips a test that compiles for TPUs where that cannot be done."""
    pytest.importorskip("libtpu", reason="it is not installed: pip install 'salt_jax[plan]'")
