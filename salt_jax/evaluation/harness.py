"""lm-evaluation-harness's view of a model: its requests in, log-likelihoods and texts out.

Texts are cut into context and continuation as lm-eval's own `hf` backend does it. Every answer is
in the request log as soon as it is known, and what is there is not computed again.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import lm_eval.api.instance
import lm_eval.api.model
import lm_eval.utils

from salt_jax.data.vocabularies import Vocabulary
from salt_jax.errors import InputError
from salt_jax.evaluation.continuations import Continuations, Decoding
from salt_jax.evaluation.likelihood import Scorer
from salt_jax.evaluation.request_log import RequestLog
from salt_jax.inference.generation import Sampling
from salt_jax.terminal import ProgressBar

Instances = Sequence[lm_eval.api.instance.Instance]

_DEFAULT_NEW_TOKENS = 256  # lm-eval's
_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING_NAMES = ("do_sample", "temperature", "top_k", "top_p")


@dataclasses.dataclass(frozen=True)
class Limits:
    """How tasks may use the model.

    Attributes:
      max_length: The longest sequence that it reads, tokens.
      prepend_start: Whether the vocabulary's start comes before every text, as it does before every
        segment that our models are trained on. Imported Pythias have none.
      max_new_tokens: At most so many tokens are generated, whatever a task asks for.
      seed: Of tasks that draw tokens by lot.
      parse_special: Whether names of special tokens in a text stand for these tokens, as for
        lm-eval's own `hf` backend.
    """

    max_length: int
    prepend_start: bool = True
    max_new_tokens: int | None = None
    seed: int = 0
    parse_special: bool = True

    def __post_init__(self) -> None:
        Sampling(seed=self.seed)  # which refuses a bad one

    @property
    def room(self) -> int:
        """The tokens that a prompt and its answer may have together."""
        return self.max_length - self.prepend_start

    def decoding(self, task: str, settings: Mapping[str, Any]) -> Decoding:
        """From a task's generation_kwargs.

        Raises:
          InputError: A setting that is none of ours, or more tokens than the model takes.
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
        new = int(lengths[0]) if lengths else _DEFAULT_NEW_TOKENS
        new = min(new, self.max_new_tokens or new)
        if not 1 <= new < self.room:
            raise InputError(
                f"The task {task} generates up to {new} tokens, and prompt and answer together may "
                f"have {self.max_length}, the model's max_length: set --max_new_tokens to less, "
                "at least 1."
            )
        stops = tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop)
        return Decoding(new, stops, self._sampling(settings))

    def _sampling(self, settings: Mapping[str, Any]) -> Sampling:
        temperature = float(settings.get("temperature", 1.0 if settings.get("do_sample") else 0.0))
        if temperature == 0 or not settings.get("do_sample", True):
            return Sampling()
        top_k, top_p = int(settings.get("top_k") or 0), float(settings.get("top_p") or 1.0)
        return Sampling(temperature, top_k, top_p, self.seed)


class HarnessModel(lm_eval.api.model.TemplateLM):
    """A model that lm-eval can ask.

    Args:
      scorer: Scores sequences.
      continuations: Continues prompts.
      vocabulary: The model's.
      log: Entered; what it holds is not computed again.
      limits: How tasks may use the model.
    """

    def __init__(
        self,
        scorer: Scorer,
        continuations: Continuations,
        vocabulary: Vocabulary,
        log: RequestLog,
        limits: Limits,
    ) -> None:
        super().__init__()
        self._scorer, self._continuations, self._vocabulary = scorer, continuations, vocabulary
        self._log, self._limits = log, limits

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
        starts = self._limits.prepend_start if add_special_tokens is None else add_special_tokens
        ids = self._vocabulary.encode(string, self._limits.parse_special)
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
                    self._vocabulary.encode(request.args[0], self._limits.parse_special),
                    self.prefix_token_id,
                    self._limits.max_length,
                    context_len=1,
                )
            ]
            for request in requests
        ]
        scored = iter(self._scored([window for text in windows for window in text]))
        return [sum(next(scored)[0] for _ in text) for text in windows]

    def generate_until(self, requests: Instances, disable_tqdm: bool = False) -> list[str]:
        """The texts that continue contexts, up to what a task stops them at."""
        asked = []
        for request in requests:
            context, settings = request.args
            decoding = self._limits.decoding(request.task_name or "", settings)
            prompt = self._vocabulary.encode(context, self._limits.parse_special)
            prompt = prompt[-(self._limits.room - decoding.max_new_tokens) :]
            if not prompt and not self._limits.prepend_start:
                prompt = [self.prefix_token_id]
            asked.append((prompt, decoding))
        return self._continuations(asked)

    def _scored(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """(log p of the target after the context, whether it is greedy's choice) of each pair."""
        keys: list[str] = []
        missing: dict[str, tuple[list[int], int]] = {}
        longest = self._limits.max_length
        for context, target in pairs:
            if len(target) > longest:
                raise InputError(
                    f"A continuation has {len(target)} tokens and the model takes {longest}: leave "
                    "the task out, or use a model of longer max_length."
                )
            # White space moves from a context to the target, and may leave nothing.
            ids = ((context or [self.prefix_token_id]) + target)[-(longest + 1) :]
            keys.append(self._log.key(["score", ids, len(target)]))
            if target and keys[-1] not in self._log:
                missing[keys[-1]] = (ids, len(target))
        left = list(missing)
        with ProgressBar("score", len(left), unit="sequences") as progress:
            for batch in self._scorer(list(missing.values())):
                answers = {left[one.index]: [one.log_likelihood, one.greedy] for one in batch}
                self._log.add(answers)
                progress.add(len(batch))
        return [
            (float(self._log[key][0]), bool(self._log[key][1])) if target else (0.0, True)
            for key, (_, target) in zip(keys, pairs, strict=True)
        ]
