"""lm-evaluation-harness's view of a model: its requests in, log-likelihoods and texts out.

Texts are cut into context and continuation as lm-eval's own `hf` backend does it. Every answer is
in the request log as soon as it is known, and what is there is not computed again.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import lm_eval.api.instance
import lm_eval.api.model
import lm_eval.utils

from salt_jax.data.vocabularies import Vocabulary
from salt_jax.errors import InputError
from salt_jax.evaluation.likelihood import Scorer
from salt_jax.evaluation.request_log import RequestLog
from salt_jax.training.row_progress import RowProgress

Instances = Sequence[lm_eval.api.instance.Instance]

_DEFAULT_NEW_TOKENS = 256  # lm-eval's
_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING_NAMES = ("do_sample", "temperature", "top_k", "top_p")


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What a task wants of a text to be generated.

    Attributes:
      until: The text ends before the first of these.
      max_new_tokens: The most tokens it may have.
      temperature: 0 is greedy.
      top_k: Only the k most likely tokens; 0 is all.
      top_p: Only the nucleus of this probability; 1 is all.
    """

    until: tuple[str, ...]
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float

    @classmethod
    def of(cls, task: str, settings: Mapping[str, Any]) -> "Decoding":
        """From a task's generation_kwargs.

        Raises:
          InputError: A setting that is none of ours.
        """
        known = ("until", *_LENGTH_NAMES, *_SAMPLING_NAMES)
        if unknown := sorted(settings.keys() - set(known)):
            raise InputError(
                f"The task {task} sets generation_kwargs.{unknown[0]} to "
                f"{settings[unknown[0]]!r}, and salt_jax decodes by {', '.join(known)} alone: "
                "give the task without it in a YAML file of --task_folder."
            )
        until = settings.get("until") or []
        lengths = [settings[name] for name in _LENGTH_NAMES if settings.get(name) is not None]
        temperature = float(settings.get("temperature", 1.0 if settings.get("do_sample") else 0.0))
        return cls(
            tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop),
            int(lengths[0]) if lengths else _DEFAULT_NEW_TOKENS,
            temperature if settings.get("do_sample", temperature > 0) else 0.0,
            int(settings.get("top_k") or 0),
            float(settings.get("top_p") or 1.0),
        )


class Generate(Protocol):
    """Continues prompts: a model and a way to decode it."""

    def __call__(
        self, prompts: Sequence[Sequence[int]], decoding: Decoding, repeat: int
    ) -> Sequence[str]:
        """The text after each prompt, up to the end of document or before a stop text."""


class HarnessModel(lm_eval.api.model.TemplateLM):
    """A model that lm-eval can ask.

    Args:
      scorer: Scores sequences.
      generate: Continues prompts.
      vocabulary: The model's.
      max_length: The longest sequence that the model reads, tokens.
      log: Entered; what it holds is not computed again.
      batch_size: Prompts that are generated, and lost by a kill, together.
      prepend_start: Whether the vocabulary's start comes before every text, as it does before every
        segment that our models are trained on. Imported Pythias have none.
      max_new_tokens: At most so many tokens are generated, whatever a task asks for.
    """

    def __init__(
        self,
        scorer: Scorer,
        generate: Generate,
        vocabulary: Vocabulary,
        max_length: int,
        log: RequestLog,
        *,
        batch_size: int = 16,
        prepend_start: bool = True,
        max_new_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self._scorer, self._generate, self._vocabulary = scorer, generate, vocabulary
        self._max_length, self._log, self._batch_size = max_length, log, batch_size
        self._prepend_start, self._max_new_tokens = prepend_start, max_new_tokens

    @property
    def eot_token_id(self) -> int:
        """The end of document."""
        return self._vocabulary.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context."""
        return self._vocabulary.start_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """A text's ids, after the start where that is wanted."""
        starts = self._prepend_start if add_special_tokens is None else add_special_tokens
        ids = self._vocabulary.encode(string)
        return [self._vocabulary.start_id, *ids] if starts else ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self._scored([(context, target) for _, context, target in requests])

    def loglikelihood_rolling(self, requests: Instances, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows that predict each token once, nats."""
        windows = [
            [
                lm_eval.utils.make_disjoint_window(window)
                for window in lm_eval.utils.get_rolling_token_windows(
                    self._vocabulary.encode(request.args[0]),
                    self.prefix_token_id,
                    self._max_length,
                    context_len=1,
                )
            ]
            for request in requests
        ]
        scored = iter(self._scored([window for text in windows for window in text]))
        return [sum(next(scored)[0] for _ in text) for text in windows]

    def generate_until(self, requests: Instances, disable_tqdm: bool = False) -> list[str]:
        """The texts that continue contexts, up to what a task stops them at."""
        repeats: dict[str, int] = {}
        wanted: dict[Any, dict[str, list[int]]] = {}  # prompts by key, by how to decode them
        keys = []
        for request in requests:
            context, settings = request.args
            decoding = self._decoding(request.task_name or "", settings)
            prompt = self._prompt(context, decoding)
            asked = ["generate", prompt, dataclasses.asdict(decoding)]
            # A task may ask several times, and by lot each answer is another one.
            seed = 0
            if decoding.temperature:
                seed = repeats.get(key := self._log.key(asked), 0)
                repeats[key] = seed + 1
            keys.append(self._log.key([*asked, seed]))
            if keys[-1] not in self._log:
                wanted.setdefault((decoding, seed), {})[keys[-1]] = prompt
        with RowProgress("generate", sum(map(len, wanted.values()))) as progress:
            for (decoding, seed), prompts in wanted.items():
                self._generate_all(prompts, decoding, seed, progress.add)
        return [self._log[key] for key in keys]

    def _decoding(self, task: str, settings: Mapping[str, Any]) -> Decoding:
        decoding = Decoding.of(task, settings)
        new = min(decoding.max_new_tokens, self._max_new_tokens or decoding.max_new_tokens)
        if not 1 <= new < self._max_length - self._prepend_start:
            raise InputError(
                f"The task {task} generates up to {new} tokens, and prompt and answer together may "
                f"have {self._max_length}, the model's max_length: set --max_new_tokens to less, "
                "at least 1."
            )
        return dataclasses.replace(decoding, max_new_tokens=new)

    def _prompt(self, context: str, decoding: Decoding) -> list[int]:
        room = self._max_length - decoding.max_new_tokens - self._prepend_start
        prompt = self._vocabulary.encode(context)[-room:]
        return prompt if prompt or self._prepend_start else [self.prefix_token_id]

    def _generate_all(
        self,
        prompts: Mapping[str, list[int]],
        decoding: Decoding,
        seed: int,
        progress: Callable[[int], None],
    ) -> None:
        ordered = sorted(prompts, key=lambda key: (-len(prompts[key]), prompts[key]))
        for first in range(0, len(ordered), self._batch_size):
            keys = ordered[first : first + self._batch_size]
            texts = self._generate([prompts[key] for key in keys], decoding, seed)
            self._log.add(dict(zip(keys, texts, strict=True)))
            progress(len(keys))

    def _scored(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """(log p of the target after the context, whether it is greedy's choice) of each pair."""
        keys: list[str] = []
        missing: dict[str, tuple[list[int], int]] = {}
        for context, target in pairs:
            if len(target) > self._max_length:
                raise InputError(
                    f"A continuation has {len(target)} tokens and the model takes "
                    f"{self._max_length}: leave the task out, or use a model of longer max_length."
                )
            ids = (context + target)[-(self._max_length + 1) :]
            keys.append(self._log.key(["score", ids, len(target)]))
            if keys[-1] not in self._log:
                missing[keys[-1]] = (ids, len(target))
        self._log.add({key: [0.0, True] for key, (_, count) in missing.items() if not count})
        left = [(key, request) for key, request in missing.items() if request[1]]
        with RowProgress("score", len(left)) as progress:
            for batch in self._scorer([request for _, request in left]):
                answers = {left[one.index][0]: [one.log_likelihood, one.greedy] for one in batch}
                self._log.add(answers)
                progress.add(len(batch))
        return [(float(self._log[key][0]), bool(self._log[key][1])) for key in keys]
