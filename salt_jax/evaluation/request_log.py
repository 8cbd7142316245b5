"""A log of a model's answers, from which an interrupted evaluation resumes.

It is a JSONL file; each line is an object with a key and an answer. The key is a digest of all that
the answer depends on, so that tasks can share a log.
"""

import hashlib
import json
import os
import pathlib
from typing import Any


class RequestLog:
    """Answers by key, on disk as soon as they are added; a context manager. Truncated and malformed
    lines are dropped.

    Args:
      path: The file, in a folder that exists.
      context: What every answer depends on, such as the model's digest.
    """

    def __init__(self, path: pathlib.Path, context: Any) -> None:
        self._path, self._context = path, context
        self._answers: dict[str, Any] = {}
        self._file: Any = None

    def __enter__(self) -> "RequestLog":
        self._file = open(self._path, "a+b")
        self._file.seek(0)
        whole = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            try:
                record = json.loads(line)
                self._answers[record["key"]] = record["answer"]
            except (ValueError, KeyError, TypeError):
                continue
        self._file.truncate(whole)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def key(self, request: Any) -> str:
        """The key of a request, which is a JSON value."""
        text = json.dumps([self._context, request], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Any:
        return self._answers[key]

    def add(self, answers: dict[str, Any]) -> None:
        """Writes answers by key."""
        self._answers |= answers
        lines = [json.dumps({"key": key, "answer": answer}) for key, answer in answers.items()]
        self._file.write("".join(f"{line}\n" for line in lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
