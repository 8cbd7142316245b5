"""The folder of intermediate files, OUTPUT/work: what is finished there is never made again.

In: what the work is for (`begin`). Out: paths by name, and files that are there whole or not at
all.

    plan.json           digests of the settings that the units and the buckets depend on
    vocabulary/         what the units are tokenized with
    train-00000.part    a unit's documents by bucket (part_files.py)
    train-00000.json    what is in it; written last, so a unit with it is finished
    shared-train.npy    digests of texts that other splits keep
    rows-train-0.json   what a merged bucket's shard holds; written last
    failure-*.json      an error of a job that Beam ran

Both records name their plan: what a late worker of another plan leaves here counts for nothing.
"""

import dataclasses
import hashlib
import json
import pathlib
import secrets
import shutil
from collections.abc import Mapping
from typing import Any

from salt_jax.data.vocabularies import Vocabulary
from salt_jax.storage.durable_files import LEFTOVERS, write_text
from salt_jax.storage.json_files import no_link_out, read_json_object, require_shape

_PLAN_FILE = "plan.json"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Digests of what work depends on.

    Attributes:
      units: Of everything that units depend on.
      buckets: Of everything else that buckets depend on.
      trained: Of what the vocabulary was trained on, if it was.
    """

    units: str
    buckets: str
    trained: str | None = None


@dataclasses.dataclass(frozen=True)
class WorkFolder:
    """Where a cache's intermediate files lie; can be sent to other processes.

    Attributes:
      path: The folder.
    """

    path: pathlib.Path

    @classmethod
    def of_cache(cls, folder: pathlib.Path) -> "WorkFolder":
        """That of a cache's folder."""
        return cls(folder / "work")

    @property
    def vocabulary(self) -> pathlib.Path:
        """The folder of the vocabulary."""
        return self.path / "vocabulary"

    def part(self, unit: str) -> pathlib.Path:
        """A unit's part file."""
        return self.path / f"{unit}.part"

    def unit_record(self, unit: str) -> pathlib.Path:
        """What is in a unit's part file."""
        return self.path / f"{unit}.json"

    def shared_texts(self, split: str) -> pathlib.Path:
        """Digests of texts that a split leaves to others."""
        return self.path / f"shared-{split}.npy"

    def bucket_record(self, split: str, index: int) -> pathlib.Path:
        """What a merged bucket holds."""
        return self.path / f"rows-{split}-{index}.json"

    def failures(self) -> list[pathlib.Path]:
        """Errors that jobs on other machines laid down."""
        return sorted(self.path.glob("failure-*.json"))

    def begin(self, plan: Plan, vocabulary: Vocabulary) -> None:
        """Makes the folder ready; what was made for another plan is removed.

        Args:
          plan: What the work is for.
          vocabulary: Kept for the units.

        Raises:
          InputError: The folder is a link that leads elsewhere, where nothing is to be removed.
        """
        no_link_out(self.path.parent, self.path, "choose another --output_dir")
        before = self.plan()
        if before is None or before.units != plan.units:
            self.discard()
        elif before.buckets != plan.buckets:
            self.discard_buckets()
        self.path.mkdir(exist_ok=True)
        for stale in self.path.glob(f"*{LEFTOVERS}"):
            stale.unlink()
        if before != plan:
            vocabulary.save(self.vocabulary)
            self.write_json(self.path / _PLAN_FILE, dataclasses.asdict(plan))

    def plan(self) -> Plan | None:
        """The plan that the folder's work is for; None where there is no work."""
        plan = self.read_json(self.path / _PLAN_FILE)
        if plan is None:
            return None
        shape = {"units": str, "buckets": str, "trained": (None, str)}
        require_shape(self.path / _PLAN_FILE, plan, shape, self._again)
        return Plan(*(plan[name] for name in shape))

    def discard(self) -> None:
        """Removes the folder; the plan first, so that no half of it is taken up again."""
        (self.path / _PLAN_FILE).unlink(missing_ok=True)
        if self.path.exists():
            shutil.rmtree(self.path)

    def discard_buckets(self) -> None:
        """Forgets what was merged."""
        for record in self.path.glob("rows-*.json"):
            record.unlink()

    def temporary(self, file: pathlib.Path) -> pathlib.Path:
        """A name for a file while it is written, which no other process uses."""
        return self.path / f"{file.name}.{secrets.token_hex(6)}.tmp"

    def write_json(self, file: pathlib.Path, value: Mapping[str, Any]) -> None:
        """Writes a record of this folder."""
        write_text(file, json.dumps(value))

    def read_json(self, file: pathlib.Path) -> dict[str, Any] | None:
        """A record of this folder; None where there is none."""
        return read_json_object(file, self._again) if file.exists() else None

    @property
    def _again(self) -> str:
        return f"delete {self.path}, which is made again"


def digest_of(value: Any) -> str:
    """SHA-256 (hex) of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
