"""A journal of finished jobs in a folder, so that a killed command resumes where it was.

A job writes a file and then NAME.json, its record: the plan (a digest of everything that the result
depends on), the file's size in bytes, and facts about it. A record of another plan, or of a missing
or truncated file, is ignored; so workers can share a folder, and a late worker of an abandoned plan
does no harm.
"""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from salt_jax.storage.durable_files import LEFTOVERS, write_text
from salt_jax.storage.json_files import Shape, read_json_object, require_shape


@dataclasses.dataclass(frozen=True)
class JobJournal:
    """The records in a folder; picklable.

    Attributes:
      path: The folder.
      remedy: What to do about a malformed record, for messages.
    """

    path: pathlib.Path
    remedy: str

    def write(self, name: str, value: Mapping[str, Any]) -> None:
        """Writes a JSON object into the folder."""
        write_text(self.path / name, json.dumps(value, indent=2) + "\n")

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON object in the folder, None if there is no such file; InputError if malformed."""
        file = self.path / name
        return read_json_object(file, self.remedy) if file.exists() else None

    def finish(self, name: str, plan: str, facts: Mapping[str, Any]) -> None:
        """Records that a job is finished; `facts` has at least the file's size, "bytes"."""
        self.write(f"{name}.json", {**facts, "plan": plan})

    def finished(
        self, name: str, plan: str, file: pathlib.Path | int, shape: Shape = None
    ) -> dict[str, Any] | None:
        """A job's record, None if the job is not finished for this plan; InputError if malformed.
        Its file, of which the size is enough, may be missing if it has 0 bytes; `shape` is that of
        the record's other members."""
        record = self.read(f"{name}.json")
        if record is None or record.get("plan") != plan:
            return None
        require_shape(
            self.path / f"{name}.json", record, {"bytes": int, **(shape or {})}, self.remedy
        )
        if isinstance(file, pathlib.Path):
            file = file.stat().st_size if file.exists() else 0
        return record if file == record["bytes"] else None

    def remove_leftovers(self) -> None:
        """Removes the temporary files of killed writers."""
        for left in self.path.glob(f"*{LEFTOVERS}"):
            left.unlink(missing_ok=True)

    def discard(self, first: str) -> None:
        """Removes the folder, starting with the file `first`, so that a half-removed folder is not
        resumed."""
        (self.path / first).unlink(missing_ok=True)
        if self.path.exists():
            shutil.rmtree(self.path)
