"""Generates continuations of prompts, given as token ids.

The host batches prompts by length and runs the two programs of `decoding` on the mesh; after each
chunk of tokens it looks for stop texts in the text so far.
"""

import bisect
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from salt_jax.data.vocabularies import Vocabulary
from salt_jax.errors import InputError
from salt_jax.inference import decoding
from salt_jax.inference.sampling import Sampling
from salt_jax.models.decoder import DecoderConfig
from salt_jax.training import partitioning
from salt_jax.training.finite import NotFiniteError
from salt_jax.training.in_order import rounded_up

__all__ = ["Completion", "Generator", "Sampling", "continuation"]

_CHUNK = 32  # tokens that the device generates before the host looks at them
_SHORTEST = 16  # the shortest padded length of prompts, tokens
_CONTEXT = 8  # tokens of the prompt that a continuation is decoded with


@dataclasses.dataclass(frozen=True)
class Completion:
    """The continuation of a prompt.

    Attributes:
      index: The prompt's index in the order given.
      ids: The new ids, including those of a stop text but not an end id.
      text: The text that they add to the prompt's, up to the first stop text.
      log_probabilities: Each id's by the model, before temperature, top-k and top-p; nats.
      ended_by: "end of document", "stop text" or "length".
    """

    index: int
    ids: list[int]
    text: str
    log_probabilities: list[float]
    ended_by: str


@dataclasses.dataclass
class Work:
    """Tokens and seconds of a generator, without compiling.

    Attributes:
      prompt_tokens: Tokens of prompts.
      prefill_seconds: Time to read them and choose the first token of each completion.
      decoded_tokens: Tokens of completions after the first.
      decode_seconds: Time to generate those.
    """

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    decoded_tokens: int = 0
    decode_seconds: float = 0.0


class Generator:
    """Continues prompts with one model.

    Args:
      config: The model.
      vocabulary: Its vocabulary.
      mesh: The mesh of the parameters.
      rules: Logical-axis rules.
      batch_size: Prompts at once, rounded up to what the mesh needs.
      end_ids: Ids that end a continuation, besides the vocabulary's end of document.

    Raises:
      InputError: The model has fewer ids than the vocabulary, or batch_size is below 1.
    """

    def __init__(
        self,
        config: DecoderConfig,
        vocabulary: Vocabulary,
        mesh: Mesh,
        rules: partitioning.Rules = partitioning.DEFAULT_RULES,
        *,
        batch_size: int = 16,
        end_ids: Sequence[int] = (),
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size} and must be at least 1.")
        if config.padded_vocab_size < vocabulary.size:
            raise InputError(
                f"The vocabulary has {vocabulary.size} ids and the model {config.vocab_size}: use "
                "the vocabulary that the model was trained with."
            )
        self._config, self._vocabulary = config, vocabulary
        self._mesh, self._rules, self._batch_size = mesh, rules, batch_size
        self._end_ids = tuple(sorted({vocabulary.eos_id, *end_ids}))
        self._compiled: dict[Any, Any] = {}
        self.work = Work()

    def __call__(
        self, params: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, **settings: Any
    ) -> list[list[int]]:
        """The new ids of each prompt, in the order given; the settings are those of `stream`."""
        completions = self.stream(params, prompts, max_new_tokens, **settings)
        ids = {completion.index: completion.ids for completion in completions}
        return [ids[index] for index in range(len(prompts))]

    def stream(
        self,
        params: Any,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        stop_texts: Sequence[str] = (),
        prepend_start: bool = True,
        draws: Sequence[int] | None = None,
    ) -> Iterator[Completion]:
        """Yields completions, a batch at a time; the longest first, to run out of memory early.

        Args:
          params: The model's parameters, on the mesh.
          prompts: The ids of each.
          max_new_tokens: The most new tokens of a prompt.
          sampling: How tokens are chosen. A row's random keys depend on the seed, its number in
            `draws` and the token's position alone, not on the rest of its batch.
          stop_texts: A continuation ends with the token that completes one of these in its text.
          prepend_start: Whether to put the vocabulary's start before each prompt, as before each
            segment in training.
          draws: A number for each prompt, 0 to 2³¹ − 1; by default its index.

        Raises:
          InputError: See `check`; or the model's logits are not finite.
        """
        read = self.check(prompts, max_new_tokens, stop_texts, prepend_start)
        ends = _Ends(self._vocabulary, self._end_ids, tuple(stop_texts), max_new_tokens)
        numbers = range(len(read)) if draws is None else draws
        rows = [
            _Row(index, draw, prompt, ends)
            for index, (draw, prompt) in enumerate(zip(numbers, read, strict=True))
        ]
        rows.sort(key=lambda row: -len(row.prompt))
        size = rounded_up(min(self._batch_size, max(len(rows), 1)), self._mesh)
        batches = (rows[first : first + size] for first in range(0, len(rows), size))
        return itertools.chain.from_iterable(
            self._completions(params, batch, size, max_new_tokens, sampling) for batch in batches
        )

    def check(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_texts: Sequence[str] = (),
        prepend_start: bool = True,
    ) -> list[list[int]]:
        """The ids that the model will read of each prompt.

        Raises:
          InputError: max_new_tokens below 1, an empty stop text, or a prompt that is empty, too
            long with max_new_tokens, or has an id outside the vocabulary.
        """
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens} and must be at least 1.")
        if "" in stop_texts:
            raise InputError("A stop text is empty: leave it out, or give it a character.")
        start = [self._vocabulary.start_id] if prepend_start else []
        rows = [[*start, *map(int, prompt)] for prompt in prompts]
        size, longest = self._vocabulary.size, self._config.max_length
        for index, row in enumerate(rows):
            if not row:
                raise InputError(
                    f"Prompt {index} is empty, and prepend_start is False: give it some text."
                )
            if len(row) + max_new_tokens > longest:
                raise InputError(
                    f"Prompt {index} has {len(row)} tokens and max_new_tokens is {max_new_tokens}, "
                    f"together more than the {longest} that the model takes: shorten the prompt or "
                    "lower max_new_tokens."
                )
            if bad := [i for i in row if not 0 <= i < size]:
                raise InputError(
                    f"Prompt {index} has the id {bad[0]} and the vocabulary has {size} ids: encode "
                    "it with the model's own vocabulary."
                )
        return rows

    def _completions(
        self, params: Any, rows: list["_Row"], size: int, max_new_tokens: int, sampling: Sampling
    ) -> Iterator[Completion]:
        """The completions of a batch, which is padded to `size` rows."""
        # The seed is an argument, so that changing it does not compile the programs again.
        choice = decoding.Choice(
            dataclasses.replace(sampling, seed=0), self._vocabulary.size, self._end_ids
        )
        arrays = self._padded(rows, size)
        slots = arrays["prompts"].shape[1] + -(-max_new_tokens // _CHUNK) * _CHUNK
        on_device = partitioning.to_device(arrays, self._mesh).values()
        begin = functools.partial(decoding.begin, self._config, slots=slots, choice=choice)
        advance = functools.partial(decoding.advance, self._config, chunk=_CHUNK, choice=choice)
        (state, *made), seconds = self._run(begin, params, *on_device, np.uint32(sampling.seed))
        self.work.prompt_tokens += sum(len(row.prompt) for row in rows)
        self.work.prefill_seconds += seconds
        yield from _taken(rows, *made)
        count = 1
        while any(not row.ended_by for row in rows):
            finished_B = np.array([bool(row.ended_by) for row in rows])
            finished_B = np.pad(finished_B, (0, size - len(rows)), constant_values=True)
            state = state._replace(finished=jax.device_put(finished_B, state.finished.sharding))
            limit = min(_CHUNK, max_new_tokens - count)
            (state, *made), seconds = self._run(advance, params, state, np.int32(limit))
            before = sum(len(row.ids) for row in rows)
            yield from _taken(rows, *made)
            self.work.decoded_tokens += sum(len(row.ids) for row in rows) - before
            self.work.decode_seconds += seconds
            count += limit

    def _padded(self, rows: list["_Row"], size: int) -> dict[str, np.ndarray]:
        """A batch's prompts, padded on the left, and filler rows."""
        longest = max(len(row.prompt) for row in rows)
        length = padded_length(longest, _SHORTEST, self._config.max_length)
        prompts_BxL = np.full((size, length), self._vocabulary.pad_id, np.int32)
        segment_ids_BxL = np.zeros((size, length), np.int32)
        for prompt_L, segment_ids_L, row in zip(prompts_BxL, segment_ids_BxL, rows, strict=False):
            prompt_L[-len(row.prompt) :] = row.prompt
            segment_ids_L[-len(row.prompt) :] = 1
        draws = [row.draw for row in rows] + [-1] * (size - len(rows))
        return {
            "prompts": prompts_BxL,
            "segment_ids": segment_ids_BxL,
            "rows": np.array(draws, np.int32),
        }

    def _run(self, function: Any, params: Any, *arrays: Any) -> tuple[Any, float]:
        """Runs a program, and returns its results and seconds without compiling."""
        leaves = jax.tree.leaves((params, arrays))
        key = (function.func, *function.keywords.values(), *((x.shape, x.dtype) for x in leaves))
        with partitioning.partitioned(self._mesh, self._rules):
            if key not in self._compiled:
                # The second argument is the state, whose cache is updated in place.
                donated = (1,) if function.func is decoding.advance else ()
                jitted = jax.jit(function, donate_argnums=donated)
                self._compiled[key] = jitted.lower(params, *arrays).compile()
            start = time.perf_counter()
            results = jax.block_until_ready(self._compiled[key](params, *arrays))
            return results, time.perf_counter() - start


@dataclasses.dataclass(frozen=True)
class _Ends:
    """What ends a continuation."""

    vocabulary: Vocabulary
    ids: tuple[int, ...]
    texts: tuple[str, ...]
    max_new_tokens: int


@dataclasses.dataclass
class _Row:
    """A prompt and its continuation so far."""

    index: int
    draw: int
    prompt: list[int]
    ends: _Ends
    ids: list[int] = dataclasses.field(default_factory=list)
    log_probabilities: list[float] = dataclasses.field(default_factory=list)
    ended_by: str = ""

    def take(self, tokens: list[int], log_probabilities: list[float]) -> None:
        """Adds tokens, up to the end of the row."""
        old = len(self.ids)
        for token, log_p in zip(tokens, log_probabilities, strict=True):
            if token == decoding.NO_TOKEN:
                break
            if not math.isfinite(log_p):
                raise NotFiniteError(
                    f"The model's logits after {len(self.ids)} new tokens of prompt {self.index} "
                    "are not finite: use another checkpoint."
                )
            if token in self.ends.ids:
                self.ended_by = "end of document"
                break
            self.ids.append(token)
            self.log_probabilities.append(log_p)
        if self._has_stop(len(self.ids)):
            # The text only grows, so bisection finds the first length with a stop text.
            length = bisect.bisect_left(range(len(self.ids)), True, old, key=self._has_stop)
            del self.ids[length:], self.log_probabilities[length:]
            self.ended_by = "stop text"
        elif not self.ended_by and len(self.ids) == self.ends.max_new_tokens:
            self.ended_by = "length"

    def completion(self) -> Completion:
        """The completion of a finished row."""
        text = self._text(len(self.ids))
        text = text[: min((text.index(s) for s in self.ends.texts if s in text), default=None)]
        return Completion(self.index, self.ids, text, self.log_probabilities, self.ended_by)

    def _has_stop(self, length: int) -> bool:
        text = self._text(length) if self.ends.texts else ""
        return any(stop in text for stop in self.ends.texts)

    def _text(self, length: int) -> str:
        return continuation(self.ends.vocabulary, self.prompt, self.ids[:length])


def _taken(rows: Sequence[_Row], tokens_BxC: Any, log_p_BxC: Any) -> Iterator[Completion]:
    """Adds new tokens to rows; yields the completions of those that they finish."""
    for row, tokens_C, log_p_C in zip(
        rows, np.asarray(tokens_BxC), np.asarray(log_p_BxC), strict=False
    ):
        if not row.ended_by:
            row.take(tokens_C.tolist(), log_p_C.tolist())
            if row.ended_by:
                yield row.completion()


def padded_length(length: int, shortest: int, longest: int) -> int:
    """The first of shortest · 1, 2, 4, … that is at least `length`, capped at `longest`."""
    return min(shortest << max(math.ceil(math.log2(length / shortest)), 0), longest)


def continuation(vocabulary: Vocabulary, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The text that ids add after a prompt, including a leading space that a token implies.

    That is the text of both without the prompt's, or of the new ids alone if they complete the
    prompt's last character. The last ids of the prompt suffice.
    """
    context = prompt[-_CONTEXT:]
    before, both = vocabulary.decode(context), vocabulary.decode([*context, *ids])
    return both[len(before) :] if both.startswith(before) else vocabulary.decode(ids)
