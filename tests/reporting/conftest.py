"""Run folders made by hand, so that reports are tested without training anything."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from salt_jax.data.row_scores import (
    SUBSET,
    TARGETS_HASH,
    RowScores,
    RowScoresWriter,
    Selection,
)
from salt_jax.distill.scores import ScoreConfig, column_names

WriteRun = Callable[..., pathlib.Path]


def evaluation(
    step: int, log_perplexity: float = 4.0, accuracy: float = 0.3, **values: Any
) -> dict[str, Any]:
    """A line of metrics.jsonl; a step costs 1e9 FLOPs, 4,096 tokens and half a second."""
    return {
        "kind": "eval",
        "step": step,
        "split": "validation",
        "log_perplexity": log_perplexity,
        "next_token_accuracy": accuracy,
        "by_subset": {},
        "train_flops": 1e9 * step,
        "tokens": 4096 * step,
        "seconds": 0.5 * step,
        **values,
    }


def training(step: int, loss: float = 4.0, stage: int = 2, **values: Any) -> dict[str, Any]:
    """A line of training metrics, with the costs of `evaluation`."""
    return {
        "kind": "train",
        "step": step,
        "stage": stage,
        "loss": loss,
        "log_perplexity": loss,
        "next_token_accuracy": 0.3,
        "omega": 0.0,
        "learning_rate": 1e-3,
        "grad_norm": 1.0,
        "tokens_per_second": 8192.0,
        "mfu": None,
        "train_flops": 1e9 * step,
        "tokens": 4096 * step,
        "seconds": 0.5 * step,
        "skipped_updates": 0,
        **values,
    }


def parts(
    student: float,
    teacher: float = 0.0,
    scoring: float = 0.0,
    evaluation: float = 0.0,
    stage1: tuple[float, float] = (0.0, 0.0),
    stage2: tuple[float, float] = (0.0, 0.0),
    scored: tuple[float, float] = (0.0, 0.0),
) -> dict[str, float]:
    """All counters as the ledger writes them, from FLOPs and from (tokens, seconds)."""
    return {
        "train_flops": student + teacher + scoring,
        "tokens": stage1[0] + stage2[0],
        "seconds": stage1[1] + stage2[1] + scored[1],
        "student_flops": student,
        "teacher_flops": teacher,
        "scoring_flops": scoring,
        "evaluation_flops": evaluation,
        **{"stage1_tokens": stage1[0], "stage1_seconds": stage1[1]},
        **{"stage2_tokens": stage2[0], "stage2_seconds": stage2[1]},
        **{"scoring_tokens": scored[0], "scoring_seconds": scored[1]},
        "evaluation_tokens": evaluation / 1000,
        "evaluation_seconds": 7.0,
        "compile_seconds": 11.0,
    }


def write_run(
    folder: pathlib.Path,
    lines: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any] | None = None,
    tail: str = "",
) -> pathlib.Path:
    """Writes a folder of `salt train`; without a summary it is one that has not finished."""
    write_origin(folder, "train")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + tail)
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_origin(folder: pathlib.Path, verb: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    origin = {
        "verb": verb,
        "command_line": ["salt", verb, "--gin_file=runs/smoke.gin", f"--output_dir={folder.name}"],
        "versions": {"python": "3.11.2", "jax": "0.10.1", "salt_jax": "0.1.0"},
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
        "started": "2025-01-31T12:00:00+00:00",
    }
    (folder / "run.json").write_text(json.dumps(origin))
    (folder / "config.gin").write_text(f"{verb}.{verb}.seed = 0\nconfig.TrainConfig.steps = 750\n")


def summary_of(arm: str, last: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    """summary.json of a run that ended with the evaluation `last`."""
    kept = ("log_perplexity", "next_token_accuracy", "by_subset", "train_flops", "tokens")
    return {
        "arm": arm,
        "steps": last["step"],
        "distill_steps": 0,
        "parameters": 2_200_000,
        "seconds": last["seconds"],
        "skipped_updates": 0,
        "seed": 0,
        **{name: last[name] for name in kept},
        **values,
    }


def write_arm(
    folder: pathlib.Path,
    arm: str,
    *,
    floor: float,
    distill_steps: int = 0,
    steps: int = 750,
    parameters: int = 2_200_000,
    noise_seed: int = 0,
    scoring: float = 0.0,
    **facts: Any,
) -> pathlib.Path:
    """Writes a finished run whose losses fall like a real small run's towards `floor`.

    A step of stage 2 costs 6 · N FLOPs a token and 0.08 s, one of stage 1 9% and 15% more; what
    was spent on scoring is so many FLOPs and 2 s.
    """
    noise = np.random.default_rng(noise_seed)
    lines = []
    per_step = 6 * parameters * 4096
    for step in range(1, steps + 1):
        stage1 = min(step, distill_steps)
        distils = step == stage1
        costs = parts(
            per_step * step,
            teacher=0.09 * per_step * stage1,
            scoring=scoring,
            evaluation=1e9 * (step // 50),
            stage1=(4096 * stage1, 0.092 * stage1),
            stage2=(4096 * (step - stage1), 0.08 * (step - stage1)),
            scored=(5e6, 2.0) if scoring else (0.0, 0.0),
        )
        hard = floor + 4.6 * math.exp(-step / 110) + 0.45 * (1 - step / steps)
        if step % 5 == 0:
            batch = hard + 0.06 * noise.normal()
            loss = batch - 0.5 if distils else batch
            stage = 1 if distils else 2
            lines.append(training(step, loss, stage, log_perplexity=batch, **costs))
        if step % 50 == 0:
            names = {"Wikipedia (en)": 0.0, "Github": -0.6, "PubMed Abstracts": 0.2}
            by_subset = {
                name: {
                    "log_perplexity": hard + offset,
                    "next_token_accuracy": 0.34 - 0.09 * (hard + offset - 3.65),
                    "tokens": tokens,
                }
                for (name, offset), tokens in zip(names.items(), (9000, 22000, 4000), strict=True)
            }
            accuracy = 0.34 - 0.09 * (hard - 3.65)
            lines.append(evaluation(step, hard, accuracy, by_subset=by_subset, **costs))
    last = lines[-1]
    costs = {name: last[name] for name in parts(0.0)}
    facts = {"distill_steps": distill_steps, "parameters": parameters, **costs, **facts}
    summary = summary_of(arm, last, **facts)
    return write_run(folder, lines, summary)


def write_scores(folder: pathlib.Path, rows: int = 20_000) -> RowScores:
    """Writes scores with a long tail and a few rows that have none."""
    noise = np.random.default_rng(1)
    scores_N = noise.gamma(9.0, 0.09, rows).astype(np.float32)
    scores_N[::97] = -np.inf
    write_origin(folder, "score")
    writer = RowScoresWriter(
        folder,
        cache_digest="c" * 64,
        split="train",
        rows=rows,
        scorer={"path": "slm/checkpoints/93", "step": 93, "digest": "d" * 64},
        ks=(10,),
        columns=column_names((10,)),
        shard_rows=rows,
    )
    writer.begin()
    columns = {
        **dict.fromkeys(column_names((10,)), scores_N),
        TARGETS_HASH: np.arange(rows, dtype=np.uint64),
        SUBSET: np.zeros(rows, np.uint16),
    }
    for shard in writer.unfinished():
        writer.write(shard, columns, {"seconds": 1.0, "workers": 1})
    return writer.complete()


def write_selection(
    folder: pathlib.Path, scores: RowScores, rows: int = 5_000, unlearnable: str = "drop"
) -> Selection:
    """Writes the selection of the highest scores."""
    write_origin(folder, "select")
    score = ScoreConfig(10, unlearnable=unlearnable)
    scores_N = scores.column(score.column)[:]
    row_ids_m = np.sort(np.argsort(-scores_N, kind="stable")[:rows])
    return Selection.write(
        folder,
        row_ids_m,
        cache_digest="c" * 64,
        split="train",
        how={"rule": "TopRows", "m": rows},
        scores=scores,
        score=dataclasses.asdict(score),
        cut=float(scores_N[row_ids_m].min()),
    )


def write_experiment(folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes the folders of a whole small experiment: an SLM, four arms, scores and a selection."""
    scores = write_scores(folder / "scores")
    slm = write_arm(folder / "slm", "baseline", floor=3.99, parameters=560_000)
    last = json.loads((slm / "summary.json").read_text())
    cost = {name: last[name] for name in parts(0.0)}
    teacher = {"path": str(slm), "step": 750, "digest": "d" * 64, "training_cost": cost}
    salt: dict[str, Any] = {"distill_steps": 187, "teacher": teacher}
    rkd: dict[str, Any] = {"distill_steps": 750, "teacher": teacher}
    return [
        slm,
        write_arm(folder / "baseline", "baseline", floor=3.671, noise_seed=1, teacher=None),
        write_arm(folder / "rkd", "rkd", floor=3.778, noise_seed=2, **rkd),
        write_arm(folder / "salt", "salt", floor=3.632, noise_seed=3, **salt),
        write_arm(folder / "salt_ds", "salt_ds", floor=3.645, noise_seed=4, scoring=2e12, **salt),
        scores.path,
        write_selection(folder / "selected", scores).path,
    ]


class Folders:
    """The writers above, at hand in every test."""

    evaluation = staticmethod(evaluation)
    training = staticmethod(training)
    parts = staticmethod(parts)
    run = staticmethod(write_run)
    origin = staticmethod(write_origin)
    summary_of = staticmethod(summary_of)
    arm = staticmethod(write_arm)
    scores = staticmethod(write_scores)
    selection = staticmethod(write_selection)
    experiment = staticmethod(write_experiment)


@pytest.fixture
def folders() -> type[Folders]:
    return Folders
