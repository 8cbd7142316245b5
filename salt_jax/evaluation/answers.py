"""A model's answers: log-likelihoods and continuations, each computed once and logged.

Every answer is written to the request log as soon as it is known, and read from there later.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from salt_jax.evaluation.examination import Examinee
from salt_jax.evaluation.likelihood import Scorer
from salt_jax.inference.generation import Generator, Sampling
from salt_jax.terminal import ProgressBar

REQUESTS_FILE = "requests.jsonl"


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How a prompt is continued: up to max_new_tokens, or before the first of stop_texts."""

    max_new_tokens: int
    stop_texts: tuple[str, ...] = ()
    sampling: Sampling = Sampling()


class RequestLog:
    """Answers by key, on disk as soon as they are added; a context manager. Truncated and malformed
    lines are dropped. `context` is what every answer depends on, such as the model's digest."""

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


class Answers:
    """The answers of one model, kept in its request log, already entered; `prepend_start` says
    whether the vocabulary's start comes before every prompt that is continued."""

    def __init__(self, examinee: Examinee, log: RequestLog, prepend_start: bool = True) -> None:
        self._log, self._params, self._prepend_start = log, examinee.params, prepend_start
        self._scorer = Scorer(examinee)
        self._generator = Generator(
            examinee.saved.config,
            examinee.vocabulary,
            examinee.mesh,
            examinee.rules,
            batch_size=examinee.batch_size,
            end_ids=examinee.saved.end_ids(),
        )

    def log_likelihoods(
        self, sequences: Sequence[tuple[Sequence[int], int]]
    ) -> list[tuple[float, bool]]:
        """The log-likelihoods of the last tokens of sequences; see `Scorer`."""
        keys = [self._log.key(["score", list(ids), count]) for ids, count in sequences]
        missing = {
            key: sequence
            for key, sequence in zip(keys, sequences, strict=True)
            if key not in self._log
        }
        names = list(missing)
        with ProgressBar("score", len(names), unit="sequences") as progress:
            for batch in self._scorer(list(missing.values())):
                self._log.add({names[index]: list(scored) for index, scored in batch.items()})
                progress.add(len(batch))
        return [(float(self._log[key][0]), bool(self._log[key][1])) for key in keys]

    def continuations(self, requests: Sequence[tuple[Sequence[int], Decoding]]) -> list[str]:
        """The text after each prompt; if it is sampled, repeated requests get different texts."""
        keys = self._keys(requests)
        missing: dict[Decoding, dict[str, Sequence[int]]] = {}
        for key, (prompt, decoding) in zip(keys, requests, strict=True):
            if key not in self._log:
                missing.setdefault(decoding, {})[key] = prompt
        with ProgressBar("generate", sum(map(len, missing.values())), unit="prompts") as progress:
            for decoding, prompts in missing.items():
                names = list(prompts)
                for completion in self._generator.stream(
                    self._params,
                    list(prompts.values()),
                    decoding.max_new_tokens,
                    sampling=decoding.sampling,
                    stop_texts=decoding.stop_texts,
                    prepend_start=self._prepend_start,
                    # From the key, so that random draws depend on the request alone.
                    draws=[int(name[:8], 16) >> 1 for name in names],
                ):
                    self._log.add({names[completion.index]: completion.text})
                    progress.add()
        return [self._log[key] for key in keys]

    def _keys(self, requests: Sequence[tuple[Sequence[int], Decoding]]) -> list[str]:
        repeats: collections.Counter[str] = collections.Counter()
        keys = []
        for prompt, decoding in requests:
            asked = ["generate", list(prompt), dataclasses.asdict(decoding)]
            first = self._log.key([*asked, 0])
            is_drawn_again = decoding.sampling.temperature and repeats[first]
            keys.append(self._log.key([*asked, repeats[first]]) if is_drawn_again else first)
            repeats[first] += 1
        return keys


@contextlib.contextmanager
def logged_answers(
    examinee: Examinee, folder: pathlib.Path, prepend_start: bool = True
) -> Iterator[Answers]:
    """A model's answers, logged in a run's folder for all examinations."""
    context = {
        "model": examinee.saved.digest,
        "config": examinee.saved.config.to_json(),
        "vocabulary": examinee.vocabulary.fingerprint,
        "prepend_start": prepend_start,
    }
    if ends := set(examinee.saved.end_ids()) - {examinee.vocabulary.eos_id}:
        context["end_ids"] = sorted(ends)
    with RequestLog(folder / REQUESTS_FILE, context) as log:
        yield Answers(examinee, log, prepend_start)
