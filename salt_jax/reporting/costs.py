"""What a run had cost by some step, part by part.

In: the counters of metrics.jsonl, summary.json or a checkpoint (`training/ledger.py` defines them).
Out: the same as numbers, NaN where a record of another version doesn't say.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Costs:
    """FLOPs, tokens and seconds by what they were spent on, cumulative from step 0.

    Attributes:
      student_flops, teacher_flops, scoring_flops: What a run's train FLOPs consist of.
      teacher_training_flops: Of making the teacher; 0 where that is not charged.
      evaluation_flops: Of evaluations; never charged.
      stage1_tokens, stage2_tokens, scoring_tokens: Trained on in each stage, and scored.
      stage1_seconds, stage2_seconds, scoring_seconds: What a run's time consists of.
      teacher_training_seconds: Of making the teacher; 0 where that is not charged.
      evaluation_seconds, compile_seconds: Never charged.
    """

    student_flops: float = math.nan
    teacher_flops: float = math.nan
    scoring_flops: float = math.nan
    teacher_training_flops: float = 0.0
    evaluation_flops: float = math.nan
    stage1_tokens: float = math.nan
    stage2_tokens: float = math.nan
    scoring_tokens: float = math.nan
    stage1_seconds: float = math.nan
    stage2_seconds: float = math.nan
    scoring_seconds: float = math.nan
    teacher_training_seconds: float = 0.0
    evaluation_seconds: float = math.nan
    compile_seconds: float = math.nan

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Costs":
        """The parts that a record has."""
        found = {field.name: record.get(field.name) for field in dataclasses.fields(cls)}
        return cls(
            **{
                name: float(value)
                for name, value in found.items()
                if isinstance(value, int | float) and not isinstance(value, bool)
            }
        )

    @property
    def flops_parts(self) -> tuple[float, ...]:
        """What is charged as train FLOPs: student, teacher, scoring, making the teacher."""
        return (
            self.student_flops,
            self.teacher_flops,
            self.scoring_flops,
            self.teacher_training_flops,
        )

    @property
    def seconds_parts(self) -> tuple[float, ...]:
        """What is charged as time: stage 1, stage 2, scoring, making the teacher."""
        return (
            self.stage1_seconds,
            self.stage2_seconds,
            self.scoring_seconds,
            self.teacher_training_seconds,
        )

    def towards(self, later: "Costs", part: float) -> "Costs":
        """What lies `part` of the way from these costs to later ones, each number by itself."""
        return Costs(
            **{
                name: value + part * (getattr(later, name) - value)
                for name, value in dataclasses.asdict(self).items()
            }
        )


@dataclasses.dataclass(frozen=True)
class TeacherTraining:
    """What it took to train a run's teacher, up to the checkpoint that taught.

    Attributes:
      name: The teacher's folder and step.
      digest: Of the checkpoint.
      train_flops, seconds, tokens: As of any training run; NaN where they are not known.
      costs: Their parts.
    """

    name: str
    digest: str
    train_flops: float
    seconds: float
    tokens: float
    costs: Costs

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "TeacherTraining | None":
        """The teacher of a run's summary; None for a run without one."""
        teacher = facts.get("teacher")
        if not isinstance(teacher, Mapping):
            return None
        cost = teacher.get("training_cost") or {}
        folder = str(teacher.get("path", "")).rstrip("/").rsplit("/", 1)[-1]
        return cls(
            name=f"{folder} at step {teacher.get('step')}",
            digest=str(teacher.get("digest")),
            train_flops=cost.get("train_flops", math.nan),
            seconds=cost.get("seconds", math.nan),
            tokens=cost.get("tokens", math.nan),
            costs=Costs.of(cost),
        )

    @property
    def known(self) -> bool:
        """Whether its cost is known: a converted model has none."""
        return math.isfinite(self.train_flops) and math.isfinite(self.seconds)
