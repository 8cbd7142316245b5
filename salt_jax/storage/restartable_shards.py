"""A resumable pass over the rows of a split, written in shards.

    pass.json                    the pass's inputs; a pass with other inputs is refused
    shards/00003-of-00007.npy    rows 3·shard_rows … of the split, complete or absent
    shards/00003-of-00007.json   its record (job_journal.py): rows, bytes, digest, measurements
    cost.json                    FLOPs, tokens and seconds of the whole pass, where they are known
    manifest.json  COMPLETED     written once every shard is there

A killed pass resumes at the missing shards. Workers share a folder without communicating: worker w
of W writes the shards whose index is w modulo W, and any worker that finds all shards finished
completes the folder. Measurements (seconds) stay out of the manifest, so that equal input gives
equal bytes.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from salt_jax.errors import InputError, RunFailed
from salt_jax.storage import durable_files
from salt_jax.storage.block_copies import InputFolder
from salt_jax.storage.buckets import BucketError, RemoteFolder, is_remote, path_of
from salt_jax.storage.job_journal import JobJournal
from salt_jax.storage.json_files import no_link_out
from salt_jax.storage.manifests import (
    COMPLETED_FILE,
    MANIFEST_FILE,
    begin_writing,
    file_digest,
    json_digest,
    new_manifest,
    write_manifest,
)

PASS_FILE = "pass.json"
SHARDS_FOLDER = "shards"
COST_FILE = "cost.json"

_FACTS = {"rows": int, "digest": str, "measured": {}}
_OTHER = "choose another --output_dir"


@dataclasses.dataclass(frozen=True)
class Shard:
    """A shard of the pass: its index and the ids of its rows."""

    index: int
    rows: range


class RestartableShards:
    """The shards of a pass over a split's rows: of a new pass, or of the one begun in the folder,
    with its shard_rows. Writes nothing before `begin`.

    Args:
      folder: Its folder.
      rows: N, rows of the split.
      shard_rows: Rows of every shard but the last, which has the remainder.
      suffix: The suffix of the shards' files (".npy").
      made_from: The inputs that must not change during the pass, as JSON values by user-facing name
        ("cache"). Values with a "digest" are compared by it.

    Raises:
      InputError: Another pass was begun in the folder, or shard_rows is below 1.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        rows: int,
        shard_rows: int,
        suffix: str,
        made_from: Mapping[str, Any],
    ) -> None:
        if shard_rows < 1:
            raise InputError(f"shard_rows is {shard_rows} and must be at least 1.")
        self.folder = path_of(os.fspath(folder))
        self.rows, self.shard_rows, self.suffix = rows, shard_rows, suffix
        self.made_from = made_from
        self._continue()

    def begin(self) -> None:
        """Makes the folder if needed; readers refuse it while a shard is missing. InputError if
        another pass was begun here meanwhile."""
        path = self.folder / PASS_FILE
        if not path.exists():
            begin_writing(self.folder)
            # If several workers begin at the same time, the first one's plan wins.
            durable_files.write_new_text(path, json.dumps(self._plan, indent=2) + "\n")
        self._continue()
        if not is_remote(self.folder):
            no_link_out(self.folder, self._journal.path, _OTHER).mkdir(exist_ok=True)
        if self.completed and self.unfinished():
            begin_writing(self.folder)

    def unfinished(self, worker: int = 0, workers: int = 1) -> list[Shard]:
        """The shards that worker `worker` of `workers` still has to write, in order."""
        mine = range(worker, _shard_count(self.rows, self.shard_rows), workers)
        facts = self._finished(mine)
        return [self._shard(index) for index in mine if facts[index] is None]

    @contextlib.contextmanager
    def writing(self, shard: Shard) -> Iterator["ShardWriter"]:
        """A writer of a shard, which is recorded when the block ends; after an error nothing is
        left of it.

        with shards.writing(shard) as file:
            file.write(data)
            file.finish({"nan_rows": 0}, {"seconds": 1.5})
        """
        name = self._name(shard.index)
        try:
            with self._written(name, shard) as writer:
                yield writer
        except BucketError as error:
            raise RunFailed(
                f"{error} The shards that are finished are kept: run the same command again."
            ) from error

    @contextlib.contextmanager
    def _written(self, name: str, shard: Shard) -> Iterator["ShardWriter"]:
        with durable_files.whole_file(self._journal.path / f"{name}{self.suffix}") as file:
            writer = ShardWriter(file)
            yield writer
            assert writer.facts is not None, f"the shard {name} was never finished"
        self._journal.finish(name, self._plan_digest, {**writer.facts, "rows": len(shard.rows)})

    def total(self, fact: str) -> int:
        """The sum of a fact over the shards of a finished pass."""
        return sum(facts[fact] for facts in self._all_facts())

    @property
    def completed(self) -> bool:
        """Whether the folder is complete."""
        return (self.folder / COMPLETED_FILE).exists()

    def finish(self, kind: str, cost: Mapping[str, Any] | None = None, **parts: Any) -> None:
        """Writes cost.json, the manifest and COMPLETED, once every shard is finished.

        Args:
          kind: The manifest's kind.
          cost: The pass's FLOPs and tokens. Seconds are added from the shards', as if the workers
            had shared them evenly and in parallel.
          parts: The manifest's entries beside rows, shard_rows and shards.
        """
        found, own = self._all_facts(), ("plan", "measured")
        shards = [{name: facts[name] for name in facts if name not in own} for facts in found]
        if cost:
            measured = (facts["measured"] for facts in found)
            seconds = sum(one["seconds"] / one["workers"] for one in measured)
            text = json.dumps({**cost, "seconds": seconds}) + "\n"
            durable_files.write_text(self.folder / COST_FILE, text)
        if not is_remote(self.folder):  # which has no temporary files
            self._journal.remove_leftovers()
        common = {"rows": self.rows, "shard_rows": self.shard_rows, "shards": shards}
        write_manifest(self.folder, new_manifest(kind, **common, **parts))

    @property
    def _journal(self) -> JobJournal:
        return JobJournal(self.folder / SHARDS_FOLDER, "delete it, and the shard is made again")

    @property
    def _plan(self) -> dict[str, Any]:
        """The content of pass.json."""
        sizes = {"rows": self.rows, "shard_rows": self.shard_rows, "suffix": self.suffix}
        return {**sizes, **self.made_from}

    @property
    def _plan_digest(self) -> str:
        return json_digest({name: _identity(value) for name, value in self._plan.items()})

    def _continue(self) -> None:
        """Takes over the shard_rows of the pass begun in the folder, if any; refuses one with other
        inputs."""
        begun = JobJournal(self.folder, f"delete it, or {_OTHER}").read(PASS_FILE)
        if begun is None:
            return
        for name in [*self._plan, *(name for name in begun if name not in self._plan)]:
            if name == "shard_rows":
                continue  # it affects no values, so the folder's own is kept
            before, now = (_identity(each.get(name)) for each in (begun, self._plan))
            if before != now and name == "suffix":
                raise InputError(
                    f"{self.folder} was begun by another version of salt_jax, with shards in "
                    f"{before} files: finish it with that version, or {_OTHER}."
                )
            if before != now:
                raise InputError(
                    f"{self.folder} was begun with the {name} {_shown(before)}, and now the {name} "
                    f"is {_shown(now)}: go back to that {name}, or choose another --output_dir."
                )
        shard_rows = begun.get("shard_rows")
        if type(shard_rows) is not int or shard_rows < 1:
            raise InputError(f"{self.folder / PASS_FILE} has shard_rows {shard_rows!r}: {_OTHER}.")
        self.shard_rows = shard_rows
        self.made_from = {name: begun.get(name) for name in self.made_from}

    def _shard(self, index: int) -> Shard:
        first = index * self.shard_rows
        return Shard(index, range(first, min(first + self.shard_rows, self.rows)))

    def _name(self, index: int) -> str:
        return _shard_name(index, self.rows, self.shard_rows)

    def _finished(self, indices: Iterable[int]) -> dict[int, dict[str, Any] | None]:
        """The records of shards by index, None for those that are not finished."""
        names, journal = {index: self._name(index) for index in indices}, self._journal

        def record(name: str, file: pathlib.Path | int) -> dict[str, Any] | None:
            return journal.finished(name, self._plan_digest, file, _FACTS)

        if not is_remote(self.folder):
            return {i: record(n, journal.path / f"{n}{self.suffix}") for i, n in names.items()}
        remote = RemoteFolder(os.fspath(journal.path))
        there = remote.files()
        sizes = {n: there[f].bytes for n in names.values() if (f := f"{n}{self.suffix}") in there}
        with tempfile.TemporaryDirectory() as folder:  # all records are fetched at once
            journal = dataclasses.replace(journal, path=pathlib.Path(folder))
            remote.fetch(journal.path, [f for n in names.values() if (f := f"{n}.json") in there])
            return {index: record(name, sizes.get(name, 0)) for index, name in names.items()}

    def _all_facts(self) -> list[dict[str, Any]]:
        found = self._finished(range(_shard_count(self.rows, self.shard_rows))).values()
        facts = [one for one in found if one is not None]
        assert len(facts) == len(found), f"{len(found) - len(facts)} shards are not finished"
        return facts


class ShardWriter:
    """Receives the bytes of one shard, and the facts for its record."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self._bytes = file, hashlib.sha256(), 0
        self.facts: dict[str, Any] | None = None

    def write(self, data: bytes | memoryview) -> None:
        """Appends to the shard."""
        self._file.write(data)
        self._digest.update(data)
        self._bytes += len(data)

    def finish(self, facts: Mapping[str, Any], measured: Mapping[str, Any]) -> None:
        """Ends the shard. `facts` go into the manifest and depend only on the input; `measured`
        (seconds, say) may vary."""
        own = {"bytes": self._bytes, "digest": self._digest.hexdigest(), "measured": dict(measured)}
        self.facts = {**facts, **own}


class FinishedShards:
    """The files of a completed pass, each compared with its digest on first access.

    Args:
      folder: The pass's folder.
      manifest: Its manifest: rows, shard_rows and shards.
      suffix: The suffix of the shards' files.
      made_by: The command that made it, for errors.

    Raises:
      InputError: A shard is missing or truncated, or the manifest is inconsistent.
    """

    def __init__(
        self, folder: InputFolder, manifest: Mapping[str, Any], suffix: str, made_by: str
    ) -> None:
        self.suffix, self._folder = suffix, folder
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
                f"{folder.path / MANIFEST_FILE} names {len(sizes)} shards, expected "
                f"{_shard_count(self.rows, max(self.shard_rows, 1))} of {self.shard_rows} rows, "
                f"{self.rows} in all: {again}."
            )
        names = (_shard_name(index, self.rows, self.shard_rows) for index in range(len(sizes)))
        self._files = [f"{SHARDS_FOLDER}/{name}{suffix}" for name in names]
        found = folder.sizes(self._files, again)
        for index, (file, info) in enumerate(zip(self._files, self._infos, strict=True)):
            if found.get(file) != info["bytes"]:
                has = f"has {found[file]:,} bytes" if file in found else "does not exist"
                raise self.damage(index, f"{has}, expected {info['bytes']:,} bytes")

    def rows_of(self, index: int) -> int:
        """Rows of a shard."""
        return self._infos[index]["rows"]

    def fetch(self, parts: Iterable[tuple[int, int, int]]) -> None:
        """Fetches parts of shards in a bucket that `path` is to have without `verify`: each a
        shard, its first byte and the one after its last."""
        if self._folder.remote is not None:
            self._folder.fetch(
                (self._folder.copy(self._files[index]), start, end) for index, start, end in parts
            )

    def path(self, index: int, verify: bool = True) -> os.PathLike[str]:
        """The file of a shard; with `verify` it is read and compared with its digest."""
        file = self._files[index]
        if not verify and self._folder.remote is not None:
            return self._folder.copy(file)
        path = self._folder.whole(file)
        if verify and index not in self._verified:
            digest, expected = file_digest(path), self._infos[index]["digest"]
            if digest != expected:
                raise self.damage(
                    index, f"has the digest {digest[:12]}…, its manifest says {expected[:12]}…"
                )
            self._verified.add(index)
        return path

    def damage(self, index: int, what: str) -> InputError:
        """The error for a damaged shard, with what to do about it."""
        return InputError(
            f"The shard {self._folder.url}/{self._files[index]} {what}: copy the folder again, or "
            f"delete that file and run its `{self._made_by}` again, which makes what is missing."
        )


def _shard_count(rows: int, shard_rows: int) -> int:
    return -(-rows // shard_rows)


def _shard_name(index: int, rows: int, shard_rows: int) -> str:
    """ "00003-of-00007"."""
    return f"{index:05d}-of-{_shard_count(rows, shard_rows):05d}"


def _identity(value: Any) -> Any:
    return value["digest"] if isinstance(value, Mapping) and "digest" in value else value


def _shown(value: Any) -> str:
    """A value for a message, digests abbreviated."""
    text = str(value)
    return f"{text[:12]}…" if isinstance(value, str) and len(text) == 64 else text
