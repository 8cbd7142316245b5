"""A small model as the harness asks it; data sets from local files alone."""

import os
import tempfile

os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="salt_jax_hub_")
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import pathlib
import shutil
import types
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import lm_eval.evaluator
import pytest
from lm_eval.tasks._index import TaskIndex

from salt_jax.data.vocabularies import ByteVocabulary, Vocabulary
from salt_jax.evaluation.answers import Answers, RequestLog
from salt_jax.evaluation.examination import Examinee
from salt_jax.evaluation.few_shot import FewShot
from salt_jax.evaluation.harness import HarnessModel
from salt_jax.models import decoder
from salt_jax.training.partitioning import MeshConfig, param_shardings

CONFIG = decoder.DecoderConfig(
    embed_dim=32, num_layers=2, num_heads=2, mlp_dim=64, max_length=96, vocab_size=259
)


@pytest.fixture(scope="session", autouse=True)
def _index_once() -> Iterator[None]:
    """lm-eval reads its 14,000 files of tasks once, and not for each test."""
    read, whole = TaskIndex.build, {}

    def build(paths: Any, **settings: Any) -> Any:
        index = {}
        for path in paths:
            if "lm_eval" not in str(path):
                index |= read([path])
            elif path not in whole:
                whole[path] = read([path])
            index = {**whole.get(path, {}), **index}
        return index

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskIndex, "build", staticmethod(build))
        yield
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def params() -> Any:
    """Of CONFIG, large enough that tokens differ in likelihood; on one device."""
    fresh = nn.unbox(decoder.init_params(CONFIG, jax.random.key(3)))
    return jax.tree.map(lambda x: 3.0 * x, fresh)


@pytest.fixture(scope="session", autouse=True)
def _no_facts_of_the_machine() -> Iterator[None]:
    """lm-eval asks pip and others for them after each evaluation, for a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
        yield


@pytest.fixture
def harness(params: Any, tmp_path: pathlib.Path) -> Iterator[Callable[..., HarnessModel]]:
    """Makes harness models of CONFIG, or of another model."""
    logs = []

    def make(
        config: decoder.DecoderConfig = CONFIG,
        params: Any = params,
        vocabulary: Vocabulary | None = None,
        mesh: MeshConfig | None = None,
        log: str = "requests.jsonl",
        batch_size: int = 4,
        **settings: Any,
    ) -> HarnessModel:
        vocabulary = vocabulary or ByteVocabulary()
        devices = jax.devices() if mesh else jax.devices()[:1]
        grid = (mesh or MeshConfig(fsdp=1)).make(devices)
        placed = jax.device_put(params, param_shardings(decoder.abstract_params(config), grid))
        saved: Any = types.SimpleNamespace(
            config=config,
            load_vocabulary=lambda: vocabulary,
            load_params=lambda mesh, rules: placed,
            end_ids=lambda: (),
        )
        examinee = Examinee(saved, grid, batch_size=batch_size, chunk_tokens=64)
        few_shot = FewShot(**settings)
        context = {"prepend_start": few_shot.prepend_start}
        opened = RequestLog(tmp_path / log, context).__enter__()
        logs.append(opened)
        answers = Answers(examinee, opened, few_shot.prepend_start)
        return HarnessModel(examinee, answers, few_shot)

    yield make
    for opened in logs:
        opened.__exit__(None, None, None)
