"""Models that give no numbers: no verb takes what they give for a result."""

import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from salt_jax.commands.evaluate import evaluate
from salt_jax.commands.generate import generate
from salt_jax.commands.score import score
from salt_jax.commands.select import select
from salt_jax.data.features import make_batch
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.row_scores import RowScores, Selection
from salt_jax.distill import chunked_loss, schedules
from salt_jax.distill.selection import TopRows
from salt_jax.errors import InputError, RunFailed
from salt_jax.evaluation.held_out import HeldOut
from salt_jax.inference import scoring
from salt_jax.main import main
from salt_jax.models import decoder
from salt_jax.storage.run_folder import RunFolder
from salt_jax.training import evaluation
from salt_jax.training.checkpoints import find_model
from salt_jax.training.config import Devices
from salt_jax.training.partitioning import MeshConfig

Run = Callable[..., pathlib.Path]
QUIET = Devices(compilation_cache="")
TENSOR = r"layers\.mlp\.down\.kernel \(float32\)"


def changed(
    slm: pathlib.Path, folder: pathlib.Path, change: Callable[[Any], Any]
) -> tuple[pathlib.Path, Any]:
    """A run's folder with other parameters in its newest checkpoint."""
    shutil.copytree(slm, folder)
    model = find_model(slm, None, "model")
    params = jax.device_get(model.load_params(MeshConfig(fsdp=1).make(jax.devices()[:1])))
    params = change(jax.tree.map(np.array, params))
    step = (folder / "checkpoints" / str(model.step)).absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(step / "params", params, force=True)
    (step / "digests.json").unlink()
    return folder, params


@pytest.fixture(scope="module")
def with_nan(slm: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A model with a NaN in one weight."""

    def change(params: Any) -> Any:
        params["layers"]["mlp"]["down"]["kernel"].flat[7] = np.nan
        return params

    return changed(slm, tmp_path_factory.mktemp("nan") / "run", change)[0]


@pytest.fixture(scope="module")
def too_large(slm: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A model of finite weights, of which the sums are not."""

    def change(params: Any) -> Any:
        scale_D = params["final_norm"]["scale"]
        params["final_norm"]["scale"] = np.full_like(scale_D, 3e38)
        return params

    return changed(slm, tmp_path_factory.mktemp("large") / "run", change)[0]


def settings(cache: PackedCache, **changes: Any) -> dict[str, Any]:
    return {"cache": str(cache.path), "batch_size": 8, "devices": QUIET, **changes}


def held_out(cache: PackedCache, model: str) -> dict[str, Any]:
    rows = HeldOut(str(cache.path))
    return {"model": model, "held_out": rows, "batch_size": 8, "devices": QUIET}


def test_a_tensor_that_is_not_finite_is_named_by_every_verb(
    with_nan: pathlib.Path, cache: PackedCache, run_train: Run, tmp_path: pathlib.Path
) -> None:
    model = str(with_nan)
    verbs: list[Callable[[], Any]] = [
        lambda: evaluate(RunFolder(tmp_path / "a", "evaluate"), **held_out(cache, model)),
        lambda: score(RunFolder(tmp_path / "b", "score"), **settings(cache, scorer=model)),
        lambda: score(
            RunFolder(tmp_path / "c", "score"), **settings(cache, scorer=model, soft_labels=3)
        ),
        lambda: generate(
            RunFolder(tmp_path / "d", "generate"),
            model=model,
            prompt=("a",),
            max_new_tokens=4,
            devices=QUIET,
        ),
        lambda: run_train(tmp_path / "e", initial=model, model=None),
        lambda: run_train(tmp_path / "f", teacher=model, schedule=schedules.Step(0.5, 3)),
    ]
    for verb in verbs:
        with pytest.raises(InputError, match=rf"not finite, in {TENSOR}: use another one"):
            verb()
    assert not list(tmp_path.rglob("summary.json"))
    for refused in "bcef":
        assert not (tmp_path / refused).exists(), refused


def test_a_model_that_is_refused_leaves_no_folder(
    with_nan: pathlib.Path, slm: pathlib.Path, cache: PackedCache, tmp_path: pathlib.Path
) -> None:
    out = tmp_path / "out"
    evaluating = ["evaluate", f"--cache={cache.path}", "--compilation_cache="]
    assert main([*evaluating, f"--model={with_nan}", f"--output_dir={out}"]) == 2
    assert not out.exists()
    assert main([*evaluating, f"--model={slm}", f"--output_dir={out}"]) == 0
    held = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main([*evaluating, f"--model={with_nan}", f"--output_dir={out}"]) == 2
    assert {path.name: path.read_bytes() for path in out.iterdir()} == held


def test_rows_that_get_no_numbers_are_named(
    too_large: pathlib.Path, cache: PackedCache, tmp_path: pathlib.Path
) -> None:
    model = str(too_large)
    with pytest.raises(
        InputError, match=r"losses are not finite among the rows \d+ to \d+ of test"
    ):
        evaluate(RunFolder(tmp_path / "a", "evaluate"), **held_out(cache, model))
    with pytest.raises(
        InputError, match=r"not finite on \d of the rows 0 to 7 of train, the first"
    ):
        score(RunFolder(tmp_path / "b", "score"), **settings(cache, scorer=model))
    with pytest.raises(InputError, match=r"not finite for row \d of train"):
        score(RunFolder(tmp_path / "c", "score"), **settings(cache, scorer=model, soft_labels=3))
    with pytest.raises(InputError, match="logits after 0 new tokens of prompt 0 are not finite"):
        generate(
            RunFolder(tmp_path / "d", "generate"),
            model=model,
            prompt=("a",),
            max_new_tokens=4,
            devices=QUIET,
        )
    assert not list(tmp_path.rglob("summary.json"))


def test_an_infinite_loss_is_no_score() -> None:
    values_CxB = np.array([[-np.inf, 1.0, np.inf, np.nan, 1.0], [2.0, 1.0, 1.0, 1.0, np.inf]])
    ids_B = np.array([4, 5, 6, 7, -1])
    with pytest.raises(InputError, match="on 2 of the rows 4 to 7 of train, the first of them 6:"):
        scoring._require_numbers(ids_B, values_CxB, "train")
    scoring._require_numbers(ids_B[:2], values_CxB[:, :2], "train")


def test_rows_without_scores_are_left_out_where_they_are_allowed(
    slm: pathlib.Path, cache: PackedCache, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = decoder.hidden_states
    batch = make_batch(cache.split("train").__getitems__(list(range(48))), cache.start_id)
    first = batch["targets"][0, 1]
    broken_N = ((batch["inputs"] == first) & (batch["loss_weights"] > 0))[:, 1:].any(axis=1)
    assert 0 < broken_N.sum() < 48

    def hidden_states(config: Any, params: Any, batch: Any) -> jax.Array:
        is_first_BxL = (batch["inputs"] == first)[..., None]
        return jnp.where(is_first_BxL, jnp.nan, right(config, params, batch))

    monkeypatch.setattr(decoder, "hidden_states", hidden_states)
    asked, folder = settings(cache, scorer=str(slm)), tmp_path / "scores"
    with pytest.raises(InputError, match=rf"on {broken_N[:8].sum()} of the rows 0 to 7 of train"):
        score(RunFolder(tmp_path / "refused", "score"), **asked)
    score(RunFolder(folder, "score"), **asked, allow_nan=True)
    scores = RowScores.open(folder)
    assert np.isnan(scores.column("log_perplexity")[:]).tolist() == broken_N.tolist()
    chosen = RunFolder(tmp_path / "chosen", "select")
    which = {"cache": str(cache.path), "scores": str(folder), "rule": TopRows(4)}
    with pytest.raises(InputError, match=rf"{broken_N.sum()} of the 48 rows .* not finite"):
        select(chosen, **which)
    select(chosen, **which, allow_nan=True)
    assert not broken_N[Selection.open(chosen.path).row_ids].any()


def test_a_run_whose_evaluation_is_not_finite_has_failed(
    run_train: Run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Updates that are not finite are skipped; the losses of finite parameters may not be."""
    sums, calls = evaluation.over_batches, iter(range(9))

    def over_batches(*arguments: Any) -> Iterator[tuple[Any, np.ndarray]]:
        bad = next(calls) > 0  # the first one compiles
        return ((batch, x * np.nan if bad else x) for batch, x in sums(*arguments))

    monkeypatch.setattr(evaluation, "over_batches", over_batches)
    with pytest.raises(RunFailed, match=r"diverged by step 3 .*among the rows 0 to 7 of"):
        run_train(tmp_path / "run")
    assert '"eval"' not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert not (tmp_path / "run" / "summary.json").exists()


def test_no_prediction_is_right_among_logits_that_are_not_finite() -> None:
    hidden_BxLxD = jnp.array([[[1.0, 0.0], [jnp.nan, 0.0], [jnp.inf, 1.0]]])
    head_VxD = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.5]])
    loss_BxL, greater_BxL = chunked_loss.target_ranks(
        hidden_BxLxD,
        head_VxD,
        jnp.zeros((1, 3), jnp.int32),
        jnp.ones((1, 3)),
        3,
        chunk_tokens=3,
    )
    assert np.isfinite(loss_BxL).tolist() == [[True, False, False]]
    assert greater_BxL.tolist() == [[0, 3, 3]]
