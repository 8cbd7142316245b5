"""What a bucket emulator holds: objects, uploads of which parts have come, and failures on demand.

In: calls by their kind, in no service's words. Out: objects, pages of their names, and counts.
"""

import base64
import dataclasses
import hashlib
import itertools
import pathlib
import re
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

# As an answer: the call is done, and the connection closed in the middle of what is said of it.
CUT = 0
Answer = int | Callable[[], object] | None


@dataclasses.dataclass
class Upload:
    """One in parts: the name it is to have, and what has come, by number or by first byte."""

    name: str
    parts: dict[int, bytes] = dataclasses.field(default_factory=dict)
    is_complete: bool = False

    @property
    def size(self) -> int:
        """Bytes that have come."""
        return sum(map(len, self.parts.values()))

    @property
    def content(self) -> bytes:
        """All parts, in order."""
        return b"".join(self.parts[number] for number in sorted(self.parts))


class Page(NamedTuple):
    """Some of a listing: names, what stands for folders, the last of both if others follow."""

    names: list[str]
    folders: list[str]
    last: str


class BucketStore:
    """Buckets in memory.

    Attributes:
      objects: Contents by "BUCKET/NAME"; may be changed from outside.
      asked: How often each kind of call came: "list", "read", "write", "delete"; of uploads in
        parts "begin", "part", "complete", "abort".
      failing: Kinds of call that are answered with 403.
      denying: Whether all calls are answered with 401, as when credentials have ended.
      failing_names: Objects, "BUCKET/NAME", whose calls are.
      answers: What the next calls of a kind are answered with: a status; CUT; None, as they should
        be; or so after a function was called.
      changed: What was written and deleted, in order: ("write", "BUCKET/NAME").
      uploads: Those in parts that were begun and not given up, by their ids.
      page: Names in an answer to a listing, at most.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.asked: Counter[str] = Counter()
        self.failing: set[str] = set()
        self.denying = False
        self.failing_names: set[str] = set()
        self.answers: dict[str, list[Answer]] = {}
        self.changed: list[tuple[str, str]] = []
        self.uploads: dict[str, Upload] = {}
        self.page = 1000
        self._called = threading.Condition()
        self._generations: Counter[str] = Counter()
        self._numbers = itertools.count()
        self._etags: dict[str, tuple[bytes, str]] = {}

    def names(self, folder: str) -> set[str]:
        """Of a folder's objects, relative to it."""
        names = list(self.objects)  # which other threads change
        return {name.removeprefix(f"{folder}/") for name in names if name.startswith(f"{folder}/")}

    def wait_for(self, name: str) -> bool:
        """Returns when there is an object whose name matches; False after three minutes."""

        def is_there() -> bool:
            return any(re.fullmatch(name, found) for found in self.objects)

        with self._called:
            return self._called.wait_for(is_there, timeout=180)

    def wait_for_call(self, writes: int) -> bool:
        """Returns when so many writes were asked for; False after three minutes."""
        with self._called:
            return self._called.wait_for(lambda: self.asked["write"] >= writes, timeout=180)

    def count(self, kind: str) -> Answer:
        """Counts a call, and says what it is to be answered with."""
        with self._called:
            self.asked[kind] += 1
            self._called.notify_all()
            planned = self.answers.get(kind)
            return planned.pop(0) if planned else None

    def store(self, name: str, content: bytes, etag: str = "") -> None:
        """Writes an object; its ETag is the hash of its content where none is given."""
        with self._called:
            self.objects[name] = content
            self._etags[name] = (content, etag or hashlib.md5(content).hexdigest())
            self._generations[name] += 1
            self._called.notify_all()

    def take(self, folder: pathlib.Path, name: str) -> None:
        """Copies the files of a folder on disk to "BUCKET/FOLDER"."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.store(f"{name}/{path.relative_to(folder)}", path.read_bytes())

    def delete(self, name: str) -> None:
        """Removes an object, if it is there."""
        self.objects.pop(name, None)

    def etag(self, name: str) -> str:
        """An object's, in quotes."""
        content, etag = self._etags.get(name, (None, ""))
        if content is not self.objects[name]:
            etag = hashlib.md5(self.objects[name]).hexdigest()
        return f'"{etag}"'

    def generation(self, name: str) -> str:
        """An object's, "0" if there is none."""
        return str(self._generations[name] if name in self.objects else 0)

    def described(self, name: str) -> dict[str, Any]:
        """An object's resource in GCS's words."""
        bucket, _, path = name.partition("/")
        digest = base64.b64encode(hashlib.md5(self.objects[name]).digest()).decode()
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": path,
            "size": str(len(self.objects[name])),
            "generation": self.generation(name),
            "md5Hash": digest,
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
        }

    def begin_upload(self, name: str) -> str:
        """An id for an upload in parts."""
        number = f"upload-{next(self._numbers)}"
        self.uploads[number] = Upload(name)
        return number

    def complete_upload(self, upload: Upload, etag: str = "") -> None:
        """Makes an object of its parts; a second time is no other."""
        if not upload.is_complete:
            upload.is_complete = True
            self.changed.append(("write", upload.name))
            self.store(upload.name, upload.content, etag)

    def listed(self, bucket: str, prefix: str, delimiter: str, after: str, most: int) -> Page:
        """The first names of a bucket's objects after one, in order, relative to the bucket.

        Args:
          bucket: The bucket.
          prefix: What they begin with.
          delimiter: Names that go on with it, somewhere after the prefix, are one folder; or "".
          after: A name or a folder.
          most: Names and folders.
        """
        page, last = Page([], [], ""), ""
        for name in sorted(self.names(bucket)):
            end = name.find(delimiter, len(prefix)) if delimiter else -1
            entry = name if end < 0 else name[: end + len(delimiter)]
            if not name.startswith(prefix) or entry <= after or entry == last:
                continue
            if len(page.names) + len(page.folders) == min(most, self.page):
                return page._replace(last=last)
            (page.names if end < 0 else page.folders).append(entry)
            last = entry
        return page
