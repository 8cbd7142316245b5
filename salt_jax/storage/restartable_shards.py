"""A long pass over the rows of a split, cut into shards that are finished one by one.

In: what the pass is made from (cache, model, settings), its rows, and each shard's bytes as they
come. Out: a folder

    pass.json                        what it was begun with: anything else is refused by name
    shards/00003-of-00007.columns    rows 3·shard_rows … of the split, whole or absent
    shards/00003-of-00007.json       written after it: rows, bytes, digest, what was measured
    manifest.json  COMPLETED         once every shard is there

A killed pass starts again where it was: a shard counts when its .json is there, and nothing else is
kept. Workers share a folder without knowing of each other: worker w of W makes the shards whose
index is w modulo W, and whoever finds all of them finished completes the folder. What was measured
(seconds) is left out of the manifest, so that equal input gives equal bytes.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

from salt_jax.errors import InputError
from salt_jax.storage import durable_files
from salt_jax.storage.json_files import no_link_out, read_json_object, require_shape
from salt_jax.storage.manifests import (
    COMPLETED_FILE,
    MANIFEST_FILE,
    begin_writing,
    file_digest,
    manifest_digest,
    new_manifest,
    write_manifest,
)

PASS_FILE = "pass.json"
SHARDS_FOLDER = "shards"

_FACTS = {"rows": int, "bytes": int, "digest": str, "measured": {}}
_OTHER = "choose another --output_dir"


@dataclasses.dataclass(frozen=True)
class Shard:
    """A part of the pass: its index, and the ids of its rows."""

    index: int
    rows: range


@dataclasses.dataclass(frozen=True)
class RestartableShards:
    """A pass; make one with `RestartableShards.of`, then `begin` it.

    Attributes:
      folder: Where it lies.
      rows: N, rows of the split.
      shard_rows: Rows of every shard but the last, which has what is left.
      suffix: What the shards' file names end in (".columns").
      made_from: What must not change in the middle, by the name that a user knows it by ("cache");
        JSON values. Of one with a "digest" the digest alone must stay the same.
    """

    folder: pathlib.Path
    rows: int
    shard_rows: int
    suffix: str
    made_from: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        folder: str | os.PathLike[str],
        *,
        rows: int,
        shard_rows: int,
        suffix: str,
        made_from: Mapping[str, Any],
    ) -> "RestartableShards":
        """A new pass, or the one that the folder holds, in shards of its size; nothing is written
        yet.

        Raises:
          InputError: The folder was begun with something else, or shard_rows is below 1.
        """
        if shard_rows < 1:
            raise InputError(f"shard_rows is {shard_rows} and must be at least 1.")
        shards = cls(pathlib.Path(folder), rows, shard_rows, suffix, made_from)
        begun = _read_json(shards.folder / PASS_FILE)
        return shards if begun is None else shards._as_begun(begun)

    def begin(self) -> "RestartableShards":
        """Makes the folder if need be, and keeps readers from a folder that lacks a shard.

        Returns:
          The pass as the folder has it.

        Raises:
          InputError: Another one was begun here in the meantime.
        """
        path = self.folder / PASS_FILE
        if not path.exists():
            begin_writing(self.folder)
            # Several workers may begin it at the same time: the first one's plan stays.
            durable_files.write_new_text(path, json.dumps(self._plan, indent=2) + "\n")
        shards = self._as_begun(_read_json(path) or self._plan)
        no_link_out(self.folder, self.folder / SHARDS_FOLDER, _OTHER).mkdir(exist_ok=True)
        if shards.completed and shards.unfinished():
            begin_writing(self.folder)
        return shards

    def unfinished(self, worker: int = 0, workers: int = 1) -> list[Shard]:
        """The shards that worker `worker` of `workers` has still to make, in order."""
        mine = range(worker, shard_count(self.rows, self.shard_rows), workers)
        return [self._shard(index) for index in mine if self._facts(index) is None]

    def write(self, shard: Shard) -> "ShardWriter":
        """Begins to write a shard; see ShardWriter."""
        path = shard_path(self.folder, shard.index, self.rows, self.shard_rows, self.suffix)
        return ShardWriter(path, len(shard.rows), self._plan_digest)

    def measured(self) -> list[Mapping[str, Any]]:
        """What was measured while each shard was made; for finished passes."""
        return [facts["measured"] for facts in self._all_facts()]

    def total(self, fact: str) -> int:
        """The sum of a fact over the shards of a finished pass."""
        return sum(facts[fact] for facts in self._all_facts())

    @property
    def completed(self) -> bool:
        """Whether the folder is complete."""
        return (self.folder / COMPLETED_FILE).exists()

    def complete(self, kind: str, **parts: Any) -> None:
        """Writes the manifest and COMPLETED; every shard must be finished.

        Args:
          kind: The manifest's.
          parts: What it holds beside rows, shard_rows and shards.
        """
        shards = [
            {name: value for name, value in facts.items() if name not in ("plan", "measured")}
            for facts in self._all_facts()
        ]
        # What killed workers left; those that still write are making what is there already.
        for left in (self.folder / SHARDS_FOLDER).glob("*" + durable_files.LEFTOVERS):
            left.unlink(missing_ok=True)
        common = {"rows": self.rows, "shard_rows": self.shard_rows, "shards": shards}
        write_manifest(self.folder, new_manifest(kind, **common, **parts))

    @property
    def _plan(self) -> dict[str, Any]:
        """What pass.json holds."""
        sizes = {"rows": self.rows, "shard_rows": self.shard_rows, "suffix": self.suffix}
        return {**sizes, **self.made_from}

    @property
    def _plan_digest(self) -> str:
        """What a shard says that it is part of."""
        return manifest_digest({name: _identity(value) for name, value in self._plan.items()})

    def _as_begun(self, begun: Mapping[str, Any]) -> "RestartableShards":
        """This pass, in the words it was begun with."""
        for name in [*self._plan, *(name for name in begun if name not in self._plan)]:
            if name == "shard_rows":
                continue  # which changes no value: the folder keeps the shards that it has
            before, now = (_identity(each.get(name)) for each in (begun, self._plan))
            if before != now:
                raise InputError(
                    f"{self.folder} was begun with the {name} {_shown(before)}, and now the {name} "
                    f"is {_shown(now)}: go back to that {name}, or choose another --output_dir."
                )
        shard_rows = begun.get("shard_rows")
        if type(shard_rows) is not int or shard_rows < 1:
            raise InputError(f"{self.folder / PASS_FILE} has shard_rows {shard_rows!r}: {_OTHER}.")
        made_from = {name: begun.get(name) for name in self.made_from}
        return dataclasses.replace(self, shard_rows=shard_rows, made_from=made_from)

    def _shard(self, index: int) -> Shard:
        first = index * self.shard_rows
        return Shard(index, range(first, min(first + self.shard_rows, self.rows)))

    def _facts(self, index: int) -> dict[str, Any] | None:
        """What the shard's .json says; None while the shard is not finished."""
        path = shard_path(self.folder, index, self.rows, self.shard_rows, self.suffix)
        facts = _read_json(_facts_path(path))
        if facts is None or facts.get("plan") != self._plan_digest or not path.exists():
            return None
        require_shape(_facts_path(path), facts, _FACTS, "delete it, and the shard is made again")
        return facts if path.stat().st_size == facts["bytes"] else None

    def _all_facts(self) -> list[dict[str, Any]]:
        found = [self._facts(i) for i in range(shard_count(self.rows, self.shard_rows))]
        facts = [one for one in found if one is not None]
        assert len(facts) == len(found), f"{len(found) - len(facts)} shards are not finished"
        return facts


class ShardWriter:
    """The bytes of one shard; used as a context, in which `finish` makes them count.

        with shards.write(shard) as file:
            file.write(data)
            file.finish({"nan_rows": 0}, {"seconds": 1.5})

    Without `finish`, or after an error, nothing is left.
    """

    def __init__(self, path: pathlib.Path, rows: int, plan_digest: str) -> None:
        self._path, self._rows, self._plan_digest = path, rows, plan_digest
        self._digest = hashlib.sha256()
        self._bytes = 0
        self._facts: dict[str, Any] | None = None

    def __enter__(self) -> "ShardWriter":
        self._opened = durable_files.whole_file(self._path)
        self._file: BinaryIO = self._opened.__enter__()
        return self

    def write(self, data: bytes | memoryview) -> None:
        """Appends to the shard."""
        self._file.write(data)
        self._digest.update(data)
        self._bytes += len(data)

    def finish(self, facts: Mapping[str, Any], measured: Mapping[str, Any]) -> None:
        """Says that all is written.

        Args:
          facts: For the manifest: the same whenever the shard is made from the same.
          measured: What is not, seconds for one.
        """
        self._facts = {
            **facts,
            "rows": self._rows,
            "bytes": self._bytes,
            "digest": self._digest.hexdigest(),
            "plan": self._plan_digest,
            "measured": dict(measured),
        }

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        assert kind or self._facts, f"the shard {self._path} was never finished"
        self._opened.__exit__(kind, error, traceback)
        if kind is None:
            text = json.dumps(self._facts, indent=2) + "\n"
            durable_files.write_text(_facts_path(self._path), text)


class FinishedShards:
    """The files of a completed pass, each compared with its digest when it is first asked for.

    Args:
      folder: The pass's.
      manifest: Its manifest: rows, shard_rows and shards.
      suffix: What the shards' file names end in.
      made_by: The command that made it, for errors.

    Raises:
      InputError: A shard is missing or cut short, or what the manifest says of them can't be.
    """

    def __init__(
        self, folder: pathlib.Path, manifest: Mapping[str, Any], suffix: str, made_by: str
    ) -> None:
        self.rows: int = manifest["rows"]
        self.shard_rows: int = manifest["shard_rows"]
        self._infos: Sequence[Mapping[str, Any]] = manifest["shards"]
        self._made_by = made_by
        self._verified: set[int] = set()
        again = f"make the folder again with `{made_by}`"
        sizes = [info["rows"] for info in self._infos]
        last = self.rows - self.shard_rows * (len(sizes) - 1)
        expected = [*[self.shard_rows] * (len(sizes) - 1), last]
        if not 0 < last <= self.shard_rows or sizes != expected:
            raise InputError(
                f"{folder / MANIFEST_FILE} names {len(sizes)} shards, expected "
                f"{-(-self.rows // max(self.shard_rows, 1))} of {self.shard_rows} rows, "
                f"{self.rows} in all: {again}."
            )
        self._paths = [
            no_link_out(
                folder, shard_path(folder, index, self.rows, self.shard_rows, suffix), again
            )
            for index in range(len(sizes))
        ]
        for path, info in zip(self._paths, self._infos, strict=True):
            found = f"has {path.stat().st_size:,} bytes" if path.exists() else "does not exist"
            if found != f"has {info['bytes']:,} bytes":
                raise self._damage(path, f"{found}, expected {info['bytes']:,} bytes")

    def rows_of(self, index: int) -> int:
        """Rows of a shard."""
        return self._infos[index]["rows"]

    def path(self, index: int, verify: bool = True) -> pathlib.Path:
        """The file of a shard.

        Args:
          index: Which.
          verify: Compare its digest, which reads all of it; else its size has to do.

        Raises:
          InputError: Its bytes have changed.
        """
        path = self._paths[index]
        if verify and index not in self._verified:
            digest, expected = file_digest(path), self._infos[index]["digest"]
            if digest != expected:
                raise self._damage(
                    path, f"has the digest {digest[:12]}…, its manifest says {expected[:12]}…"
                )
            self._verified.add(index)
        return path

    def damage(self, index: int, what: str) -> InputError:
        """The error that says of a shard what is wrong with it, and what to do."""
        return self._damage(self._paths[index], what)

    def _damage(self, path: pathlib.Path, what: str) -> InputError:
        return InputError(
            f"The shard {path} {what}: copy the folder again, or delete that file and run its "
            f"`{self._made_by}` again, which makes what is missing."
        )


def shard_count(rows: int, shard_rows: int) -> int:
    """How many shards there are."""
    return -(-rows // shard_rows)


def shard_path(
    folder: pathlib.Path, index: int, rows: int, shard_rows: int, suffix: str
) -> pathlib.Path:
    """FOLDER/shards/00003-of-00007.columns."""
    name = f"{index:05d}-of-{shard_count(rows, shard_rows):05d}{suffix}"
    return folder / SHARDS_FOLDER / name


def _facts_path(path: pathlib.Path) -> pathlib.Path:
    return path.with_suffix(".json")


def _read_json(path: pathlib.Path) -> dict[str, Any] | None:
    """The object in a file; None where there is none."""
    if not path.exists():
        return None
    return read_json_object(path, f"delete it, or {_OTHER}")


def _identity(value: Any) -> Any:
    return value["digest"] if isinstance(value, Mapping) and "digest" in value else value


def _shown(value: Any) -> str:
    """A value for a sentence; a digest by its first digits."""
    text = str(value)
    return f"{text[:12]}…" if isinstance(value, str) and len(text) == 64 else text
