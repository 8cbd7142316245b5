"""A model's responses to prompts, held against those that it should give.

In: a saved model, files of examples, a metric. Out: each example's generated response with its
scores, and their means. A prompt is given as in training: the model reads the start and the
prompt's tokens, and says what follows, until the end of document.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from salt_jax.errors import InputError, nearest
from salt_jax.evaluation.answer_metrics import METRICS, Scores
from salt_jax.preparation.mapping import needed_libraries
from salt_jax.preparation.readers import Document
from salt_jax.preparation.text_files import TextFiles
from salt_jax.training import partitioning
from salt_jax.training.checkpoints import SavedModel
from salt_jax.training.generation import Generator, Sampling


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
    sampling: Sampling = Sampling()  # noqa: RUF009 (frozen)

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


class Examination:
    """Asks one model all examples.

    Args:
      responses: What to ask.
      saved: The model.
      mesh: Where its parameters will live.
      rules: From logical to mesh axes.
      batch_size: Prompts at once.

    Attributes:
      examples: Those that were read.
      cut_prompts: How many lost their beginning.

    Raises:
      InputError: Bad examples, or a model without its vocabulary or without room for a response.
    """

    def __init__(
        self,
        responses: Responses,
        saved: SavedModel,
        mesh: Mesh,
        rules: partitioning.Rules = partitioning.DEFAULT_RULES,
        batch_size: int = 64,
    ) -> None:
        self._responses = responses
        self._vocabulary = saved.load_vocabulary()
        self._generator = Generator(
            saved.config, self._vocabulary, mesh, rules, batch_size=batch_size
        )
        self.examples = responses.read()
        for example in self.examples:  # a bad reference, or no library, before hours of generating
            METRICS[responses.metric]("", example.text)
        room = saved.config.max_length - 1 - responses.max_new_tokens  # 1 for the start
        if room < 1:
            raise InputError(
                f"max_new_tokens is {responses.max_new_tokens} and the model {saved.path} takes "
                f"{saved.config.max_length} tokens, prompt included: lower "
                "Responses.max_new_tokens."
            )
        prompts = self._vocabulary.encode_many([example.prompt for example in self.examples])
        self.cut_prompts = sum(len(prompt) > room for prompt in prompts)
        self._prompts = [prompt[-room:] for prompt in prompts]

    def __call__(self, params: Any) -> list[Answer]:
        """The answers, in the order of the examples."""
        ids = self._generator(
            params,
            self._prompts,
            self._responses.max_new_tokens,
            sampling=self._responses.sampling,
            stop_texts=self._responses.stop_texts,
        )
        return list(self._judged(ids))

    def _judged(self, ids: Sequence[Sequence[int]]) -> Iterator[Answer]:
        scored = METRICS[self._responses.metric]
        for example, own in zip(self.examples, ids, strict=True):
            generated = self._vocabulary.decode(own)
            for stop in self._responses.stop_texts:
                generated = generated.partition(stop)[0]
            scores = scored(generated, example.text)
            yield Answer(example.prompt, example.text, generated, scores)


def mean_scores(answers: Sequence[Answer]) -> dict[str, float]:
    """Each score's mean over at least one answer."""
    return {
        name: float(np.mean([answer.scores[name] for answer in answers]))
        for name in answers[0].scores
    }
