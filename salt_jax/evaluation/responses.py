"""Examination by responses: a model's responses to prompts are compared with references.

As in training, the model reads the start and the prompt's tokens, and then generates until the end
of document.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from salt_jax.errors import InputError, nearest, needed_libraries, require_counts
from salt_jax.evaluation.answer_metrics import METRICS
from salt_jax.evaluation.answers import Decoding, logged_answers
from salt_jax.evaluation.examination import Examine, Examinee
from salt_jax.inference.generation import Sampling
from salt_jax.preparation.readers import Document
from salt_jax.preparation.text_files import TextFiles
from salt_jax.storage.durable_files import write_text
from salt_jax.storage.run_folder import to_json
from salt_jax.terminal import Table, print_table, say

RESPONSES_FILE = "responses.jsonl"


@dataclasses.dataclass(frozen=True)
class Responses:
    """Prompts, and how the responses to them are scored; an `Examination`.

    Attributes:
      examples: The files (its train files are read), and the template that makes prompts and
        responses from their rows.
      metric: "number" (GSM8K), "rouge" (summaries) or "label" (classes); see answer_metrics.py.
      max_new_tokens: The most tokens of a response. A prompt that leaves no room for them loses its
        beginning, and is counted.
      stop_texts: A response also ends before the first of these.
      sampling: How tokens are chosen; greedily by default.
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
                "The examples have no prompt: set Template.prompt (--gin.PROMPT, or a file of "
                "templates/)."
            )
        require_counts(max_new_tokens=self.max_new_tokens)
        if "" in self.stop_texts:
            raise InputError("One of Responses.stop_texts is empty: leave it out.")

    def prepare(self, examinee: Examinee) -> Examine:
        """See `Examination`; InputError for bad examples, a model without its vocabulary, or one
        too short for a response."""
        max_length = examinee.saved.config.max_length
        room = max_length - 1 - self.max_new_tokens  # 1 for the start
        if room < 1:
            raise InputError(
                f"max_new_tokens is {self.max_new_tokens} and the model {examinee.saved.path} "
                f"takes {max_length} tokens, prompt included: lower Responses.max_new_tokens."
            )
        files = self.examples if examinee.parse_special else self.examples.as_plain_text()
        with needed_libraries("This text", "prepare"):
            examples = list(files.documents("train"))
        if not examples:
            raise InputError(
                f"There are no examples in {', '.join(files.train)}: correct --gin.EXAMPLES."
            )
        for example in examples:  # fails on a bad reference or a missing library before generating
            METRICS[self.metric]("", example.text)
        prompts = examinee.vocabulary.encode_many(
            [example.prompt for example in examples], files.template.parse_special
        )
        cut = sum(len(prompt) > room for prompt in prompts)
        prompts = [prompt[-room:] for prompt in prompts]
        return functools.partial(self._examine, examinee, examples, prompts, cut)

    def _examine(
        self,
        examinee: Examinee,
        examples: Sequence[Document],
        prompts: Sequence[list[int]],
        cut: int,
        folder: pathlib.Path,
    ) -> dict[str, Any]:
        decoding = Decoding(self.max_new_tokens, tuple(self.stop_texts), self.sampling)
        with logged_answers(examinee, folder) as answers:
            start = time.perf_counter()
            texts = answers.continuations([(prompt, decoding) for prompt in prompts])
            seconds = time.perf_counter() - start
        records: list[dict[str, Any]] = [
            {
                "prompt": example.prompt,
                "reference": example.text,
                "generated": text,
                "scores": METRICS[self.metric](text, example.text),
            }
            for example, text in zip(examples, texts, strict=True)
        ]
        lines = "".join(f"{to_json(record)}\n" for record in records)
        write_text(folder / RESPONSES_FILE, lines)
        means = {
            name: float(np.mean([record["scores"][name] for record in records]))
            for name in records[0]["scores"]
        }
        rows = tuple((name, f"{mean:.2%}") for name, mean in means.items())
        print_table(Table(examinee.title, ("", f"mean of {len(records):,}"), rows))
        if cut:
            say(f"{cut:,} prompts were too long and lost their beginning.")
        facts = {"metric": self.metric, "examples": len(records), "cut_prompts": cut}
        return {"responses": facts | means | {"seconds": seconds}}
