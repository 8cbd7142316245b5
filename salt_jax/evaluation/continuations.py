"""What a model writes after prompts, as the harness asks for it: prompts in, texts out."""

from collections.abc import Sequence
from typing import Any

from salt_jax.evaluation.harness import Decoding
from salt_jax.training.generation import Generator, Sampling


class Continuations:
    """Continues prompts with one model; a `harness.Generate`.

    Args:
      generator: Of the model.
      params: Its parameters, on the mesh.
      prepend_start: Whether the vocabulary's start comes before every prompt.
      seed: Of tasks that draw tokens by lot.
    """

    def __init__(
        self, generator: Generator, params: Any, prepend_start: bool = True, seed: int = 0
    ) -> None:
        self._generator, self._params = generator, params
        self._prepend_start, self._seed = prepend_start, seed

    def __call__(
        self, prompts: Sequence[Sequence[int]], decoding: Decoding, repeat: int
    ) -> list[str]:
        """The texts, in the order of the prompts."""
        seed = (self._seed + repeat) % 2**32
        texts = [""] * len(prompts)
        for completion in self._generator.stream(
            self._params,
            prompts,
            decoding.max_new_tokens,
            sampling=Sampling(decoding.temperature, decoding.top_k, decoding.top_p, seed),
            stop_texts=decoding.until,
            prepend_start=self._prepend_start,
        ):
            texts[completion.index] = completion.text
        return texts
