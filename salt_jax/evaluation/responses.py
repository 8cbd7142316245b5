"""The examination by responses: what a model says to prompts, against what it should say.

In: files of examples and a metric. Out: each example's generated response with its scores, and
their means. A prompt is given as in training: the model reads the start and the prompt's tokens,
and says what follows, until the end of document.
"""

import dataclasses
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from salt_jax.errors import InputError, nearest
from salt_jax.evaluation.answer_metrics import METRICS, Scores
from salt_jax.evaluation.continuations import Continuations, Decoding
from salt_jax.evaluation.examination import Examinee
from salt_jax.inference.generation import Sampling
from salt_jax.preparation.mapping import needed_libraries
from salt_jax.preparation.readers import Document
from salt_jax.preparation.text_files import TextFiles
from salt_jax.storage.durable_files import write_text
from salt_jax.storage.run_folder import to_json
from salt_jax.terminal import Table, print_table, say

RESPONSES_FILE = "responses.jsonl"


@dataclasses.dataclass(frozen=True)
class Responses:
    """What to ask a model, and how its responses are judged.

    Attributes:
      examples: The files, and the template that makes prompts and responses of their rows; its
        train files are what is read.
      metric: "number" (GSM8K), "rouge" (summaries) or "label" (classes); see answer_metrics.py.
      max_new_tokens: The most that a response has. A prompt that leaves the model no room for so
        many loses its beginning, and is counted.
      stop_texts: A response ends before the first of these, too.
      sampling: How tokens are chosen; the likeliest ones by default.
    """

    examples: TextFiles
    metric: str
    max_new_tokens: int = 256
    stop_texts: Sequence[str] = ()
    sampling: Sampling = Sampling()

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise InputError(
                f"metric is {self.metric!r}{nearest(self.metric, METRICS)}, expected one of "
                f"{', '.join(METRICS)}: correct Responses.metric."
            )
        if not self.examples.template.prompt:
            raise InputError(
                "The examples have no prompt to give a model: set Template.prompt (--gin.PROMPT, "
                "or a file of templates/)."
            )
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens} and must be at least 1.")
        if "" in self.stop_texts:
            raise InputError("One of Responses.stop_texts is empty: leave it out.")

    def read(self) -> list[Document]:
        """The examples.

        Raises:
          InputError: See TextFiles.documents; or there are none.
        """
        with needed_libraries():
            examples = list(self.examples.documents("train"))
        if not examples:
            raise InputError(
                f"There are no examples in {', '.join(self.examples.train)}: correct "
                "--gin.EXAMPLES."
            )
        return examples


@dataclasses.dataclass(frozen=True)
class Answer:
    """One example, answered.

    Attributes:
      prompt: What the model was given.
      reference: What it should say.
      generated: What it said.
      scores: By name, 0 to 1.
    """

    prompt: str
    reference: str
    generated: str
    scores: Scores


class Responding:
    """Asks a model all examples; an `Examination`.

    Args:
      examinee: The model.
      responses: What to ask.

    Raises:
      InputError: Bad examples, or a model without its vocabulary or without room for a response.
    """

    def __init__(self, examinee: Examinee, responses: Responses) -> None:
        self._examinee, self._responses = examinee, responses
        self._vocabulary = examinee.saved.load_vocabulary()
        max_length = examinee.saved.config.max_length
        room = max_length - 1 - responses.max_new_tokens  # 1 for the start
        if room < 1:
            raise InputError(
                f"max_new_tokens is {responses.max_new_tokens} and the model "
                f"{examinee.saved.path} takes {max_length} tokens, prompt included: lower "
                "Responses.max_new_tokens."
            )
        self._examples = responses.read()
        for example in self._examples:  # a bad reference, or no library, before hours of generating
            METRICS[responses.metric]("", example.text)
        prompts = self._vocabulary.encode_many(
            [example.prompt for example in self._examples],
            responses.examples.template.parse_special,
        )
        self._cut_prompts = sum(len(prompt) > room for prompt in prompts)
        self._prompts = [prompt[-room:] for prompt in prompts]

    def __call__(self, params: Any, folder: pathlib.Path) -> dict[str, Any]:
        """See Examination; the means. Writes responses.jsonl, an answer a line."""
        decoding = Decoding(
            self._responses.max_new_tokens,
            tuple(self._responses.stop_texts),
            self._responses.sampling,
        )
        start = time.perf_counter()
        generator = self._examinee.generator(self._vocabulary)
        with self._examinee.request_log(folder, self._vocabulary, prepend_start=True) as log:
            continuations = Continuations(generator, params, log)
            texts = continuations([(prompt, decoding) for prompt in self._prompts])
        seconds = time.perf_counter() - start
        scored = METRICS[self._responses.metric]
        answers = [
            Answer(example.prompt, example.text, text, scored(text, example.text))
            for example, text in zip(self._examples, texts, strict=True)
        ]
        lines = "".join(f"{to_json(dataclasses.asdict(answer))}\n" for answer in answers)
        write_text(folder / RESPONSES_FILE, lines)
        means = {
            name: float(np.mean([answer.scores[name] for answer in answers]))
            for name in answers[0].scores
        }
        self._print(means)
        return {
            "responses": {
                "metric": self._responses.metric,
                "examples": len(answers),
                "cut_prompts": self._cut_prompts,
                **means,
                "seconds": seconds,
            }
        }

    def _print(self, means: Scores) -> None:
        columns = ("", f"mean of {len(self._examples):,}")
        rows = tuple((name, f"{score:.2%}") for name, score in means.items())
        print_table(Table(self._examinee.title, columns, rows))
        if self._cut_prompts:
            say(f"{self._cut_prompts:,} prompts were too long and lost their beginning.")
