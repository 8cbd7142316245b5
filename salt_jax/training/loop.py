"""The training loop: from step 0 or a run's newest checkpoint to its last step.

Stage 1 runs the distilling program, stage 2 the plain one; at the switch the teacher's memory is
freed and nothing else changes. A step is one update of the parameters, numbered from 0; `step` in
checkpoints and metrics counts completed steps.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from salt_jax.data.input_pipeline import InputPipeline
from salt_jax.distill.schedules import Adaptive, Watched
from salt_jax.errors import Interrupted, RunFailed
from salt_jax.storage.buckets import is_remote
from salt_jax.storage.run_folder import RunFolder, to_json
from salt_jax.terminal import ProgressBar, warn
from salt_jax.training import partitioning
from salt_jax.training.checkpointer import Checkpointer
from salt_jax.training.checkpoints import watched_in
from salt_jax.training.config import TrainConfig
from salt_jax.training.evaluation import EvaluationResult, Evaluator
from salt_jax.training.finite import NotFiniteError
from salt_jax.training.flops import device_peak_flops
from salt_jax.training.hang_watch import HangWatch
from salt_jax.training.ledger import Cost, Counters, Ledger
from salt_jax.training.metrics import MetricWriter, recorded, status_of
from salt_jax.training.origin import require_same_origin
from salt_jax.training.profiling import Profile
from salt_jax.training.save_clock import SaveClock
from salt_jax.training.stop_requests import StopRequests
from salt_jax.training.teacher import LoadedTeacher, teaching_flops_per_token
from salt_jax.training.train_state import StateLayout, TrainState
from salt_jax.training.train_step import (
    BATCH_FEATURES,
    LABEL_FEATURES,
    Programs,
    compile_programs,
)
from salt_jax.training.wall_time import WallTime
from salt_jax.training.wandb_run import begin_wandb

Batch = Mapping[str, np.ndarray]
# A dispatched step: the number of completed steps including it, and its metrics on the devices.
Pending = tuple[int, Any]


@dataclasses.dataclass
class Loop:
    """One run of `salt train`: its settings, and its opened and checked inputs.

    Attributes:
      folder: The run's folder, made by the caller before `run`.
      config: The settings.
      layout: The student's state over the mesh.
      pipeline: The batches, starting at the newest checkpoint's position.
      sequence_length: L, tokens a row.
      evaluator: Evaluates on the validation split of every cache.
      origin: The inputs as checkpoints record them; see `origin.origin_of`.
      scoring: The cost of the selection and the soft labels.
      teacher: The frozen model of stage 1; None without one, or when stage 1 is over.
      initial: The state to start from; None initializes one from the seed.
    """

    folder: RunFolder
    config: TrainConfig
    layout: StateLayout
    pipeline: InputPipeline
    sequence_length: int
    evaluator: Evaluator
    origin: dict[str, Any]
    scoring: Cost
    teacher: LoadedTeacher | None = None
    initial: TrainState | None = None

    def __post_init__(self) -> None:
        self._watch = HangWatch(self.config.hang_seconds, self._report)
        monitoring = self.config.monitoring
        self._wall = WallTime(self.folder.began, jax.device_count(), monitoring.price)
        self._profile = Profile(self.folder.path, monitoring.profiled)
        self._skipped = 0
        self._watched = Watched()
        self._learning_rates = np.zeros(0)
        student, teacher = self.layout.config, self.teacher and self.teacher.model.config
        rows, length = self.pipeline.batch_size, self.sequence_length
        taught = rows * length if teacher else 0
        teaching = teacher and teaching_flops_per_token(self.config, student, teacher, length)
        peak = device_peak_flops(jax.devices()[0].device_kind)
        self._ledger = Ledger(
            student=Cost.of_training(student, rows, length),
            teacher=Cost(taught * (teaching or 0.0), taught),
            evaluation=Cost.of(student, self.evaluator.rows, length),
            scoring=self.scoring,
            peak_flops=peak * jax.device_count() if peak else None,
        )

    def run(self) -> dict[str, Any]:
        """Trains to the last step, and returns the results for summary.json.

        Raises:
          Interrupted: The run was asked to stop by a signal; the state is saved.
          RunFailed: More non-finite updates than allowed, or a model whose losses are not finite.
        """
        config, waiting_for = self.config, self._watch.waiting_for
        processes = self.folder.processes
        self._checkpointer = Checkpointer(
            self.folder.path, config.checkpoints, self._report, processes.fail
        )
        with (
            self._watch,
            self._wall,
            contextlib.closing(self._profile),
            contextlib.closing(self._checkpointer),
            StopRequests(processes.count > 1) as stop,
        ):
            with waiting_for("the state to start from"):
                first_step, state = self._start()
            with self._wall.spent_on("compile"), self._ledger.compiling():
                with waiting_for("the steps' programs to compile"):
                    programs = self._compile()
                with waiting_for("the evaluation's program to compile"):
                    self._compile_the_rest(state)
            # Before what the first process alone does, since the others ask it after each step.
            self._save_clock = SaveClock(config.checkpoints.save_minutes)
            project, wandb_run = config.monitoring.wandb_project, None
            if project is not None and processes.is_first:
                settings = json.loads(to_json(dataclasses.asdict(config)))
                wandb_run = begin_wandb(self.folder.path, project, config.method.arm, settings)
            with (
                MetricWriter(self.folder.path, processes.is_first, wandb_run) as self._writer,
                ProgressBar(config.method.arm, config.steps, first_step) as self._bar,
            ):
                if first_step:
                    self._bar.say(f"continues at step {first_step}")
                if self._profile.is_missed(first_step):
                    self._report(
                        f"profile_steps is {config.monitoring.profile_steps} and the run continues "
                        f"after step {first_step}: no profile is written; change --profile_steps."
                    )
                batches = self.pipeline.batches(first_step, config.steps)
                return self._train(first_step, state, programs, batches, stop)

    def _train(
        self,
        first_step: int,
        state: TrainState,
        programs: Programs,
        batches: Iterator[Batch],
        stop: StopRequests,
    ) -> dict[str, Any]:
        """Runs the steps, and returns the run's results."""
        last = self.config.steps
        evaluation: EvaluationResult | None = None
        pending: Pending | None = None
        self._ledger.start_clock()
        self._wall.begin_steps()
        for done in range(first_step + 1, last + 1):
            with self._profile.step(done):
                with self._watch.waiting_for(f"the input pipeline at step {done}"):
                    batch = self._next(batches, pending)
                with self._watch.waiting_for(f"the program of step {done}"):
                    state, metrics = self._step(done - 1, state, batch, programs)
                # The previous step's metrics are fetched while this step runs.
                self._note(pending)
            pending = done, metrics
            self._profile.end_after(done, metrics)
            saves = self._save_clock.is_due(done) or self.config.checkpoints.saves(done, last)
            evaluates = done % self.config.evaluation.every == 0 or done == last
            with self._watch.waiting_for(f"the processes to agree after step {done}"):
                stopped_by = stop.asked_by(done)
            if not (saves or evaluates or stopped_by):
                continue
            self._note(pending)
            pending = None
            if saves or stopped_by:
                self._save(done, state, must=done == last or bool(stopped_by))
            if stopped_by and done < last:
                self._require_saved(done)
                raise Interrupted(
                    f"stopped by {stopped_by} after step {done} of {last}, which is saved in "
                    f"{self.folder.path}: run the same command again to resume."
                )
            if evaluates:
                evaluation = self._evaluate(done, state)
            self._ledger.start_clock()
        evaluation = evaluation or self._evaluate(last, state)
        self._require_saved(last)
        return self._summary(state, evaluation)

    def _next(self, batches: Iterator[Batch], pending: Pending | None) -> Batch:
        """The next batch; waiting for it counts as waiting if the devices have nothing to do."""
        self._wall.lap("steps")
        batch = next(batches)
        idle = pending is None or all(x.is_ready() for x in jax.tree.leaves(pending[1]))
        self._wall.lap("rows" if idle else "steps")
        return batch

    def _start(self) -> tuple[int, TrainState]:
        """The completed steps and the state of the newest checkpoint, or 0 and an initial state."""
        step, start = self._checkpointer.latest_step() or 0, self.pipeline.start
        assert start.step == step, f"a pipeline from {start} for a run at step {step}"
        accounts = [recorded(self.folder.path, kind, None) or {} for kind in ("train", "eval")]
        spent = [record["wall_time"] for record in accounts if "wall_time" in record]
        latest = max(spent, key=lambda account: account["wall_seconds"], default=None)
        if not step:
            self._wall.resume(None, latest)
            return 0, self.initial or self.layout.create(self.config.seed)
        with self._wall.spent_on("restore"):
            state, progress = self._checkpointer.restore(self.layout, step)
        self._wall.resume(progress.get("wall_time"), latest)  # older versions had none
        where = f"The checkpoint of step {step} in {self.folder.path}"
        require_same_origin(progress, self.origin, where)
        self.origin["teacher"] = progress["teacher"]
        counters = Counters.from_json(progress["counters"], where)
        # The checkpoint was written before the evaluation of its step.
        later = recorded(self.folder.path, "eval", step) if step < self.config.steps else None
        names = ("evaluation_flops", "evaluation_tokens", "evaluation_seconds")
        self._ledger.counters = dataclasses.replace(
            counters, **{name: later[name] for name in names if later}
        )
        self._skipped = int(state.skipped_updates)
        self._watched = watched_in(progress)
        return step, state

    def _compile(self) -> Programs:
        """Compiles both programs, or the plain one alone when stage 1 is over."""
        teacher, labels = self.teacher, self.pipeline.soft_labels
        return compile_programs(
            self.layout,
            self.config.method.loss_of_steps,
            (self.pipeline.batch_size, self.sequence_length),
            microbatches=self.config.devices.microbatches,
            stage1_microbatches=self.config.devices.stage1_microbatches,
            teacher_config=teacher.model.config if teacher else None,
            teacher_params=teacher.params if teacher else None,
            extra_features=self.pipeline.extra_features,
            soft_labels=labels.format.k if labels else 0,
            alignment=self.config.method.alignment,
            soft_term=self.config.has_soft_term,
            slice_gradient_dtype=self.config.devices.slice_gradient_dtype,
            compiler_options=self.config.devices.compiler_options,
        )

    def _compile_the_rest(self, state: TrainState) -> None:
        """Compiles the evaluation and the learning rates, so that no step waits for them later."""
        self.evaluator(state.params, rows=1)
        # Computed step by step, the schedule would queue on the devices behind the steps in flight.
        schedule = self.config.optimizer.learning_rate.schedule(self.config.steps)
        rates = jax.jit(schedule)(np.arange(self.config.steps, dtype=np.int32))
        self._learning_rates = np.broadcast_to(np.asarray(rates), (self.config.steps,))

    def _stage_of(self, step: int) -> int:
        """The stage of a step: 1 with the teacher, then 2."""
        return 1 if step < self.config.stage1_steps_after(self._watched.n_kd) else 2

    def _step(
        self, step: int, state: TrainState, batch: Batch, programs: Programs
    ) -> tuple[TrainState, Any]:
        """Dispatches one step."""
        names = [*BATCH_FEATURES, *self.pipeline.extra_features]
        if self._stage_of(step) == 1:
            names += [name for name in LABEL_FEATURES if name in batch]
        on_device = partitioning.to_device({name: batch[name] for name in names}, self.layout.mesh)
        if self._stage_of(step) == 2:
            if self.teacher is not None:
                self.teacher.free()
            return programs.plain(state._replace(projection=None), on_device)
        assert programs.distill is not None, "stage 1 has its program"
        weights = [np.float32(weight) for weight in self._weights(step).values()]
        teacher_params = self.teacher.params if self.teacher else None
        return programs.distill(state, on_device, teacher_params, *weights)

    def _weights(self, step: int) -> dict[str, float]:
        """ω, and λ if there is an alignment."""
        method = self.config.method
        over = self._watched.n_kd is not None and step >= self._watched.n_kd
        omega = {"omega": 0.0 if over else method.schedule.omega_at(step)}
        if method.alignment is None:
            return omega
        return {**omega, "alignment_weight": method.alignment.weight_at(step)}

    def _note(self, pending: Pending | None) -> None:
        """Waits for a step's metrics, counts its cost, and writes a record if it is due."""
        if pending is None:
            return
        done, metrics = pending
        with self._watch.waiting_for(f"the devices at step {done}"):
            metrics = jax.device_get(metrics)
        config, stage = self.config, self._stage_of(done - 1)
        self._ledger.add(metrics, stage)
        schedule = config.method.schedule
        if isinstance(schedule, Adaptive) and self._weights(done - 1)["omega"] > 0:
            self._decide(schedule.after(self._watched, done, metrics), done)
        # The learning rate counts applied updates, as the optimizer does.
        rate_step = done - 1 - self._skipped
        self._skipped = int(metrics["skipped_updates"])
        if self._skipped > config.max_skipped_updates:
            raise RunFailed(
                f"{self._skipped} updates were not finite, the last at step {done}, and "
                f"max_skipped_updates is {config.max_skipped_updates}: the parameters are still "
                "finite; start again in another --output_dir with a lower learning rate or a "
                "higher limit."
            )
        if done % config.log_every == 0 or done == config.steps:
            window = self._ledger.close_window()
            self._wall.lap("steps")
            record = {
                "kind": "train",
                "step": done,
                "stage": stage,
                **window,
                "wall_time": self._wall.to_json((config.steps - done) * window["seconds_per_step"]),
                **self._weights(done - 1),
                **self._decision(),
                "learning_rate": float(self._learning_rates[rate_step]),
                "epochs": self.pipeline.epochs(done),
            }
            self._writer.write(record)
            self._bar.update(done, status_of(record))

    def _decide(self, watched: Watched, done: int) -> None:
        """Keeps what an adaptive schedule has seen, and says when it has decided."""
        self._watched, before = watched, self._watched
        if watched.n_kd is not None and before.n_kd is None:
            self._bar.say(
                f"step {done}: the running mean {watched.mean:.4f} was below the margin for "
                f"{watched.below} steps: ω is 0 from step {watched.n_kd} on"
            )

    def _evaluate(self, done: int, state: TrainState) -> EvaluationResult:
        waiting = self._watch.waiting_for(f"the evaluation after step {done}")
        with self._wall.spent_on("evaluation"), self._ledger.evaluating(), waiting:
            try:
                evaluation = self.evaluator(state.params)
            except NotFiniteError as error:
                raise RunFailed(
                    f"The run has diverged by step {done} ({str(error).partition(':')[0]}): start "
                    "again in another --output_dir with a lower learning rate."
                ) from error
        self._writer.write(
            {
                "kind": "eval",
                "step": done,
                "split": "validation",
                **evaluation.to_json(),
                **self._ledger.counters.to_json(),
                "wall_time": self._wall.to_json(),
            }
        )
        self._bar.say(
            f"step {done}: validation log-perplexity {evaluation.whole.log_perplexity:.4f}, "
            f"next-token accuracy {evaluation.whole.next_token_accuracy:.2%}"
        )
        return evaluation

    def _save(self, done: int, state: TrainState, must: bool) -> None:
        progress = {
            **self.origin,
            "step": done,
            "rows_consumed": self._rows_consumed(done),
            "counters": dataclasses.asdict(self._ledger.counters),
            **self._decision(),
            **({"total_steps": self.config.steps} if self.config.flops_of else {}),
            "wall_time": self._wall.to_json(),
        }
        if self._stage_of(done) == 2:
            state = state._replace(projection=None)
        self._writer.send()
        self._save_clock.restart()
        waiting = self._watch.waiting_for(f"the checkpoint of step {done}")
        with self._wall.spent_on("save"), waiting:
            self._checkpointer.save(done, state, progress, must)

    def _decision(self) -> dict[str, Any]:
        adaptive = isinstance(self.config.method.schedule, Adaptive)
        return {"watched": self._watched._asdict()} if adaptive else {}

    def _require_saved(self, step: int) -> None:
        """Waits for a checkpoint, and fails the run if it was not written."""
        waiting = self._watch.waiting_for(f"the checkpoint of step {step} to be on the disk")
        with self._wall.spent_on("save"), waiting:
            self._checkpointer.wait()
        newest = self._checkpointer.latest_step()
        if newest != step:
            where = f"step {newest}" if newest is not None else "its beginning"
            remedy = "restore the access to it" if is_remote(self.folder.path) else "make room"
            raise RunFailed(
                f"The checkpoint of step {step} could not be written to {self.folder.path}: "
                f"{remedy} and run the same command again, which resumes from {where}."
            )

    def _rows_consumed(self, step: int) -> dict[str, int]:
        position = self.pipeline.position(step)
        return {"stage1": position.stage1_rows, "stage2": position.stage2_rows}

    def _report(self, sentence: str) -> None:
        warn(f"[{self.config.method.arm}] {sentence}")

    def _summary(self, state: TrainState, evaluation: EvaluationResult) -> dict[str, Any]:
        config = self.config
        return {
            "arm": config.method.arm,
            "steps": config.steps,
            "distill_steps": config.stage1_steps_after(self._watched.n_kd),
            **self._decision(),
            "parameters": self.layout.config.num_parameters,
            **evaluation.to_json(),
            **self._ledger.counters.to_json(),
            "wall_time": self._wall.to_json(),
            "teacher": self.origin["teacher"],
            "skipped_updates": int(state.skipped_updates),
            "seed": config.seed,
            "cache_digest": self.origin["cache_digest"],
            "caches": self.origin["caches"],
            "rows_consumed": self._rows_consumed(config.steps),
            "epochs": self.pipeline.epochs(config.steps),
        }
