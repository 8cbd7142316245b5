"""The training loop: a validated setup in; checkpoints, metrics and a trained student out.

Stage 1 runs the distilling program, stage 2 the plain one; at the switch the teacher's memory is
freed and nothing else changes. One "step" is one update of the parameters, numbered from 0;
`step` in checkpoints and metrics counts completed steps.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from salt_jax.data.input_pipeline import InputPipeline, Position
from salt_jax.errors import InputError, Interrupted, RunFailed
from salt_jax.storage.run_folder import RunFolder
from salt_jax.terminal import ProgressBar, warn
from salt_jax.training import partitioning
from salt_jax.training.checkpointer import Checkpointer
from salt_jax.training.checkpoints import SavedModel
from salt_jax.training.config import TrainConfig
from salt_jax.training.evaluation import EvaluationResult, Evaluator, MixtureEvaluator
from salt_jax.training.finite import NotFiniteError
from salt_jax.training.hang_watch import HangWatch
from salt_jax.training.ledger import Cost, Counters, Ledger, StepCost
from salt_jax.training.metrics import MetricWriter, recorded, status_of
from salt_jax.training.stop_requests import StopRequests
from salt_jax.training.teacher import LoadedTeacher
from salt_jax.training.train_state import StateLayout, TrainState
from salt_jax.training.train_step import (
    BATCH_FEATURES,
    LABEL_FEATURES,
    Programs,
    compile_programs,
)


@dataclasses.dataclass(frozen=True)
class TrainingSetup:
    """A run's settings, and what they name, opened and checked by the caller.

    Attributes:
      config: The settings.
      layout: The student's state over the mesh.
      pipeline: The batches, from where the newest checkpoint stands.
      sequence_length: L, tokens a row.
      evaluator: For the validation split, of every cache.
      evaluation_rows: Rows of it that an evaluation reads.
      origin: What checkpoints record besides counters: model, vocabulary, cache, teacher.
      teacher: The frozen model of stage 1, or None.
      scoring: What it cost to score the rows that the selection was made from, and to make soft
        labels.
      initial: A checkpoint to start the student from; None starts from the seed.
    """

    config: TrainConfig
    layout: StateLayout
    pipeline: InputPipeline
    sequence_length: int
    evaluator: Evaluator | MixtureEvaluator
    evaluation_rows: int
    origin: Mapping[str, Any]
    teacher: SavedModel | None = None
    scoring: Cost | None = None
    initial: SavedModel | None = None

    def stage_of(self, step: int) -> int:
        """1 while the teacher runs, then 2."""
        return 1 if step < self.config.stage1_steps else 2


class Loop:
    """One run, from its newest checkpoint or its beginning to its last step."""

    def __init__(self, setup: TrainingSetup, folder: RunFolder) -> None:
        self._setup, self._config = setup, setup.config
        self._checkpointer = Checkpointer(folder.path, self._config.checkpoints, self._report)
        self._folder, self._together = folder, folder.processes.count > 1
        self._watch = HangWatch(self._config.hang_seconds, self._report)
        self._teacher: LoadedTeacher | None = None
        denoising = setup.pipeline.denoising
        self._origin = {**setup.origin, "objectives": denoising and denoising.identity}
        self._skipped = 0
        self._learning_rates = np.zeros(0)
        length, student = setup.sequence_length, setup.layout.config
        teacher = setup.teacher.config if setup.teacher else None
        self._ledger = Ledger(
            StepCost.of(setup.pipeline.batch_size, length, student, teacher),
            evaluation=Cost.of(student, setup.evaluation_rows, length),
            scoring=setup.scoring,
        )

    def run(self) -> dict[str, Any]:
        """Trains to the last step.

        Returns:
          The run's results, for summary.json.

        Raises:
          Interrupted: SIGTERM or SIGINT came; the state is saved.
          RunFailed: More non-finite updates than allowed, or a model whose losses are not finite.
        """
        setup = self._setup
        waiting_for = self._watch.waiting_for
        with (
            self._watch,
            contextlib.closing(self._checkpointer),
            StopRequests(self._together) as stop,
        ):
            with waiting_for("the state to start from, and the teacher"):
                first_step, state = self._start()
            with self._ledger.compiling():
                with waiting_for("the steps' programs to compile"):
                    programs = self._compile()
                with waiting_for("the evaluation's program to compile"):
                    self._compile_the_rest(state)
            batches = setup.pipeline.batches(first_step, self._config.steps)
            with (
                MetricWriter(self._folder.path, self._folder.processes.is_first) as writer,
                ProgressBar(self._config.method.arm, self._config.steps, first_step) as bar,
            ):
                if first_step:
                    bar.say(f"continues at step {first_step}")
                return self._train(first_step, state, programs, batches, writer, bar, stop)

    def _train(
        self,
        first_step: int,
        state: TrainState,
        programs: Programs,
        batches: Iterator[Mapping[str, np.ndarray]],
        writer: MetricWriter,
        bar: ProgressBar,
        stop: StopRequests,
    ) -> dict[str, Any]:
        """The steps themselves; the run's results."""
        evaluation: EvaluationResult | None = None
        pending: tuple[int, Any] | None = None
        self._ledger.start_clock()
        for done in range(first_step + 1, self._config.steps + 1):
            with self._watch.waiting_for(f"the input pipeline at step {done}"):
                batch = next(batches)
            with self._watch.waiting_for(f"the program of step {done}"):
                state, metrics = self._step(done - 1, state, batch, programs)
            # The previous step's numbers are fetched while this one runs.
            self._note(pending, writer, bar)
            pending = (done, metrics)
            saves = self._config.checkpoints.saves(done, self._config.steps)
            evaluates = done % self._config.evaluation.every == 0 or done == self._config.steps
            with self._watch.waiting_for(f"the processes to agree after step {done}"):
                stopped_by = stop.asked_by(done)
            if not (saves or evaluates or stopped_by):
                continue
            self._note(pending, writer, bar)
            pending = None
            if saves or stopped_by:
                self._save(done, state, done == self._config.steps or bool(stopped_by))
            if stopped_by and done < self._config.steps:
                self._require_saved(done)
                raise Interrupted(
                    f"stopped by {stopped_by} after step {done} of {self._config.steps}, which is "
                    f"saved in {self._folder.path}: run the same command again to go on."
                )
            if evaluates:
                evaluation = self._evaluate(done, state, writer, bar)
            self._ledger.start_clock()
        evaluation = evaluation or self._evaluate(self._config.steps, state, writer, bar)
        self._require_saved(self._config.steps)
        return self._summary(state, evaluation)

    def _start(self) -> tuple[int, TrainState]:
        """The newest checkpoint's state, or a fresh one; loads the teacher where it is needed."""
        setup = self._setup
        latest = self._checkpointer.latest_step()
        if latest is not None:
            state, progress = self._checkpointer.restore(setup.layout, latest)
            self._require_same_origin(progress, latest)
            self._origin["teacher"] = progress["teacher"]
            self._ledger.counters = self._counters(progress, latest)
            self._skipped = int(state.skipped_updates)
        elif setup.initial is not None:
            layout = setup.layout
            params = setup.initial.load_params(layout.mesh, layout.rules, layout.config.param_dtype)
            state = setup.layout.around(params)
        else:
            state = setup.layout.create(self._config.seed)
        first_step = latest or 0
        start = setup.pipeline.start
        assert start.step == first_step, f"a pipeline from {start} for a run at step {first_step}"
        if setup.teacher is not None and first_step < self._config.stage1_steps:
            asked = self._config.method.teacher
            assert asked is not None, "a teacher was found, so one was asked for"
            rules = asked.rules or setup.layout.rules
            self._teacher = LoadedTeacher(setup.teacher, setup.layout.mesh, rules, asked.dtype)
        return first_step, state

    def _counters(self, progress: Mapping[str, Any], step: int) -> Counters:
        """A checkpoint's counters, with the evaluation that came after it at the same step."""
        where = f"The checkpoint of step {step} in {self._folder.path}"
        counters = Counters.from_json(progress["counters"], where)
        later = recorded(self._folder.path, "eval", step) if step < self._config.steps else None
        names = ("evaluation_flops", "evaluation_tokens", "evaluation_seconds")
        return dataclasses.replace(counters, **{name: later[name] for name in names if later})

    def _require_same_origin(self, progress: Mapping[str, Any], step: int) -> None:
        """A folder's name may stay while what is in it changes: resuming goes by digests."""
        names = ["model", "vocabulary_fingerprint", "cache_digest", "selection_digest"]
        if self._setup.origin["teacher"] is not None:
            names.append("teacher")
        if "objectives" in progress:  # checkpoints of older versions don't know
            names.append("objectives")
        for name in names:
            saved, now = progress[name], self._origin[name]
            if name == "model":
                saved, now = _what_is_computed(saved), _what_is_computed(now)
            if name == "teacher" and saved is not None:
                saved, now = saved["digest"], now["digest"]
            if saved != now:
                raise InputError(
                    f"The checkpoint of step {step} in {self._folder.path} was made with the "
                    f"{name} {saved} and this run has {now}: bring back what it was started with, "
                    "or choose another --output_dir."
                )

    def _compile(self) -> Programs:
        """Both programs, or the plain one alone when stage 1 is over."""
        setup, teacher = self._setup, self._teacher
        return compile_programs(
            setup.layout,
            self._config.method.loss,
            (setup.pipeline.batch_size, setup.sequence_length),
            microbatches=self._config.devices.microbatches,
            teacher_config=teacher.model.config if teacher else None,
            teacher_params=teacher.params if teacher else None,
            distill_microbatches=self._config.devices.stage1_microbatches,
            extra_features=setup.pipeline.extra_features,
            soft_labels=self._soft_labels,
        )

    @property
    def _soft_labels(self) -> int:
        """K of the soft labels that stand for a teacher; 0 without, or when stage 1 is over."""
        pipeline = self._setup.pipeline
        if pipeline.soft_labels is None or pipeline.start.step >= self._config.stage1_steps:
            return 0
        return pipeline.soft_labels.format.k

    def _compile_the_rest(self, state: TrainState) -> None:
        """All that would else be compiled when it is first needed, while the devices wait."""
        setup = self._setup
        setup.evaluator(state.params, rows=1)
        # Asked step by step, the schedule would run on the devices, behind the steps in flight.
        schedule = self._config.optimizer.learning_rate.schedule(self._config.steps)
        rates = jax.jit(schedule)(np.arange(self._config.steps, dtype=np.int32))
        self._learning_rates = np.broadcast_to(np.asarray(rates), (self._config.steps,))

    def _step(
        self, step: int, state: TrainState, batch: Mapping[str, np.ndarray], programs: Programs
    ) -> tuple[TrainState, Any]:
        """Dispatches one step."""
        names = [*BATCH_FEATURES, *self._setup.pipeline.extra_features]
        names += [name for name in LABEL_FEATURES if name in batch]
        on_device = partitioning.to_device(
            {name: batch[name] for name in names}, self._setup.layout.mesh
        )
        if self._setup.stage_of(step) == 2:
            if self._teacher is not None:
                self._teacher.free()
                self._teacher = None
            return programs.plain(state, on_device)
        if programs.distill is None:
            raise AssertionError("stage 1 has its program")
        omega = np.float32(self._config.method.schedule.omega_at(step))
        teacher_params = self._teacher.params if self._teacher else None
        return programs.distill(state, on_device, teacher_params, omega)

    def _note(
        self, pending: tuple[int, Any] | None, writer: MetricWriter, bar: ProgressBar
    ) -> None:
        """Waits for a step's numbers, counts its cost, and writes a line at the end of a window."""
        if pending is None:
            return
        setup = self._setup
        done, metrics = pending
        with self._watch.waiting_for(f"the devices at step {done}"):
            metrics = jax.device_get(metrics)
        stage = setup.stage_of(done - 1)
        self._ledger.add(metrics, stage)
        # The optimizer counts the updates that it applied, and so does its learning rate.
        rate_step = done - 1 - self._skipped
        self._skipped = int(metrics["skipped_updates"])
        if self._skipped > self._config.max_skipped_updates:
            raise RunFailed(
                f"{self._skipped} updates were not finite, the last at step {done}, and "
                f"max_skipped_updates is {self._config.max_skipped_updates}: the parameters are "
                "still finite; start again in another --output_dir with a lower learning rate or a "
                "higher limit."
            )
        if done % self._config.log_every == 0 or done == self._config.steps:
            record = {
                "kind": "train",
                "step": done,
                "stage": stage,
                **self._ledger.close_window(),
                "omega": self._config.method.schedule.omega_at(done - 1),
                "learning_rate": float(self._learning_rates[rate_step]),
                "epochs": setup.pipeline.epochs(done),
            }
            writer.write(record)
            bar.update(done, status_of(record))

    def _evaluate(
        self, done: int, state: TrainState, writer: MetricWriter, bar: ProgressBar
    ) -> EvaluationResult:
        waiting = self._watch.waiting_for(f"the evaluation after step {done}")
        with self._ledger.evaluating(), waiting:
            try:
                evaluation = self._setup.evaluator(state.params)
            except NotFiniteError as error:
                raise RunFailed(
                    f"The run has diverged by step {done} ({str(error).partition(':')[0]}): start "
                    "again in another --output_dir with a lower learning rate."
                ) from error
        writer.write(
            {
                "kind": "eval",
                "step": done,
                "split": "validation",
                **evaluation.to_json(),
                **self._ledger.counters.to_json(),
            }
        )
        bar.say(
            f"step {done}: validation log-perplexity {evaluation.whole.log_perplexity:.4f}, "
            f"next-token accuracy {evaluation.whole.next_token_accuracy:.2%}"
        )
        return evaluation

    def _require_saved(self, step: int) -> None:
        """Waits for a checkpoint, without which the run can't end as it says it does."""
        with self._watch.waiting_for(f"the checkpoint of step {step} to be on the disk"):
            self._checkpointer.wait()
        newest = self._checkpointer.latest_step()
        if newest != step:
            where = f"step {newest}" if newest is not None else "its beginning"
            raise RunFailed(
                f"The checkpoint of step {step} could not be written to {self._folder.path}: make "
                f"room and run the same command again, which goes on from {where}."
            )

    def _save(self, done: int, state: TrainState, must: bool) -> None:
        with self._watch.waiting_for(f"the checkpoint of step {done}"):
            self._write_checkpoint(done, state, must)

    def _write_checkpoint(self, done: int, state: TrainState, must: bool) -> None:
        position = self._setup.pipeline.position(done)
        self._checkpointer.save(
            done,
            state,
            {
                **self._origin,
                "step": done,
                "rows_consumed": rows_consumed(position),
                "counters": dataclasses.asdict(self._ledger.counters),
            },
            must,
        )

    def _report(self, sentence: str) -> None:
        warn(f"[{self._config.method.arm}] {sentence}")

    def _summary(self, state: TrainState, evaluation: EvaluationResult) -> dict[str, Any]:
        setup = self._setup
        return {
            "arm": self._config.method.arm,
            "steps": self._config.steps,
            "distill_steps": self._config.stage1_steps,
            "parameters": setup.layout.config.num_parameters,
            **evaluation.to_json(),
            **self._ledger.counters.to_json(),
            "teacher": self._origin["teacher"],
            "skipped_updates": int(state.skipped_updates),
            "seed": self._config.seed,
            "cache_digest": setup.origin["cache_digest"],
            "caches": setup.origin["caches"],
            "rows_consumed": rows_consumed(setup.pipeline.position(self._config.steps)),
            "epochs": setup.pipeline.epochs(self._config.steps),
        }


def rows_consumed(position: Position) -> dict[str, int]:
    """A position as checkpoints and summary.json hold it."""
    return {"stage1": position.stage1_rows, "stage2": position.stage2_rows}


def _what_is_computed(model: Mapping[str, Any]) -> dict[str, Any]:
    """A model without what says how to compute it, which may change when a run goes on."""
    return {name: x for name, x in model.items() if name not in ("remat", "attention_backend")}
