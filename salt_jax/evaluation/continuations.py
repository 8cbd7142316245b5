"""What a model writes after prompts, kept as it comes: prompts as ids in, texts out.

Every text is in the request log as soon as it has ended, and what is there is not made again.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from salt_jax.evaluation.request_log import RequestLog
from salt_jax.inference.generation import Generator, Sampling
from salt_jax.terminal import ProgressBar


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How a prompt is continued.

    Attributes:
      max_new_tokens: The most tokens that the text may have.
      stop_texts: It ends before the first of these.
      sampling: How tokens are chosen.
    """

    max_new_tokens: int
    stop_texts: tuple[str, ...] = ()
    sampling: Sampling = Sampling()


class Continuations:
    """Continues prompts with one model.

    Args:
      generator: Of the model.
      params: Its parameters, on the mesh.
      log: Entered; of this model, and of `prepend_start`.
      prepend_start: Whether the vocabulary's start comes before every prompt.
    """

    def __init__(
        self, generator: Generator, params: Any, log: RequestLog, prepend_start: bool = True
    ) -> None:
        self._generator, self._params, self._log = generator, params, log
        self._prepend_start = prepend_start

    def __call__(self, requests: Sequence[tuple[Sequence[int], Decoding]]) -> list[str]:
        """The text after each prompt. By lot, what is asked for again gets another one."""
        keys = self._keys(requests)
        missing: dict[Decoding, dict[str, Sequence[int]]] = {}
        for key, (prompt, decoding) in zip(keys, requests, strict=True):
            if key not in self._log:
                missing.setdefault(decoding, {})[key] = prompt
        with ProgressBar("generate", sum(map(len, missing.values())), unit="prompts") as progress:
            for decoding, prompts in missing.items():
                self._generate(prompts, decoding, progress.add)
        return [self._log[key] for key in keys]

    def _keys(self, requests: Sequence[tuple[Sequence[int], Decoding]]) -> list[str]:
        repeats: collections.Counter[str] = collections.Counter()
        keys = []
        for prompt, decoding in requests:
            asked = ["generate", list(prompt), dataclasses.asdict(decoding)]
            first = self._log.key([*asked, 0])
            if decoding.sampling.temperature and repeats[first]:
                keys.append(self._log.key([*asked, repeats[first]]))
            else:
                keys.append(first)
            repeats[first] += 1
        return keys

    def _generate(
        self,
        prompts: Mapping[str, Sequence[int]],
        decoding: Decoding,
        progress: Callable[[int], None],
    ) -> None:
        keys = list(prompts)
        completions = self._generator.stream(
            self._params,
            list(prompts.values()),
            decoding.max_new_tokens,
            sampling=decoding.sampling,
            stop_texts=decoding.stop_texts,
            prepend_start=self._prepend_start,
            # By its key, which says what was asked: what else is asked, or was already, is nothing
            # to a prompt's draws.
            draws=[int(key[:8], 16) >> 1 for key in keys],
        )
        for completion in completions:
            self._log.add({keys[completion.index]: completion.text})
            progress(1)
