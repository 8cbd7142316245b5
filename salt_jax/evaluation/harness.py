"""Runs tasks of lm-evaluation-harness on a model.

Texts are split into context and continuation as by lm-eval's own `hf` backend. Answers to tasks
that execute what a model writes are generated but not scored, unless that is allowed.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lm_eval.api.instance
import lm_eval.api.model
import lm_eval.evaluator
import lm_eval.models.utils
import lm_eval.tasks
import lm_eval.utils
from lm_eval.api.group import Group
from lm_eval.api.task import Task

from salt_jax.errors import InputError
from salt_jax.evaluation.answers import Answers, Decoding
from salt_jax.evaluation.examination import Examinee
from salt_jax.evaluation.few_shot import FewShot
from salt_jax.evaluation.harness_tasks import Loaded, leaves
from salt_jax.inference.generation import Sampling

Instances = Sequence[lm_eval.api.instance.Instance]
# By task or group: "shots", "documents" (None for a group) and "metrics". These have a "value" and
# a "stderr" (or None) by metric and, where there is one, filter ("exact_match,strict-match").
Results = dict[str, dict[str, Any]]

# The supported generation_kwargs of a task, as lm-eval normalizes them.
_KNOWN = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")


def decoding_of(
    task: str, generation_kwargs: Mapping[str, Any], settings: FewShot, max_length: int
) -> Decoding:
    """How prompts of a task are continued, with at most `settings.max_new_tokens`; InputError for
    an unsupported setting, or more tokens than fit `max_length`, the model's."""
    asked: dict[str, Any] = dict(lm_eval.models.utils.normalize_gen_kwargs(dict(generation_kwargs)))
    if unknown := sorted(asked.keys() - set(_KNOWN)):
        raise InputError(
            f"The task {task} sets generation_kwargs.{unknown[0]} to {asked[unknown[0]]!r}, and "
            f"salt_jax supports only {', '.join(_KNOWN)}: give the task without it in a YAML file "
            "of --task_folder."
        )
    new = min(asked["max_gen_toks"], settings.max_new_tokens or asked["max_gen_toks"])
    if not 1 <= new < max_length - settings.prepend_start:
        raise InputError(
            f"The task {task} generates up to {new} tokens, and prompt and answer together may "
            f"have {max_length}, the model's max_length: set --max_new_tokens to less, at least 1."
        )
    temperature = float(asked.get("temperature", 1.0)) if asked["do_sample"] else 0.0
    sampling = Sampling()
    if temperature:
        top_k, top_p = int(asked.get("top_k") or 0), float(asked.get("top_p") or 1.0)
        sampling = Sampling(temperature, top_k, top_p, settings.seed)
    return Decoding(new, tuple(filter(None, asked["until"])), sampling)


class HarnessModel(lm_eval.api.model.TemplateLM):
    """A model in lm-eval's interface."""

    def __init__(self, examinee: Examinee, answers: Answers, settings: FewShot) -> None:
        super().__init__()
        self._vocabulary, self._parse_special = examinee.vocabulary, examinee.parse_special
        self._max_length = examinee.saved.config.max_length
        self._answers, self._settings = answers, settings

    @property
    def eot_token_id(self) -> int:
        """The end of document."""
        return self._vocabulary.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The id used as an empty context."""
        return self._vocabulary.start_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """A text's ids, with the start if prepend_start is set."""
        starts = self._settings.prepend_start if add_special_tokens is None else add_special_tokens
        ids = self._vocabulary.encode(string, self._parse_special)
        return [self._vocabulary.start_id, *ids] if starts else ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self._scored([(context, target) for _, context, target in requests])

    def loglikelihood_rolling(self, requests: Instances, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, nats, in windows that predict each token once."""
        windows = [
            [
                lm_eval.utils.make_disjoint_window(window)
                for window in lm_eval.utils.get_rolling_token_windows(
                    self.tok_encode(request.args[0], add_special_tokens=False),
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
        """The continuations of contexts, up to the task's stop texts."""
        asked = []
        for request in requests:
            context, given = request.args
            task = request.task_name or ""
            decoding = decoding_of(task, given, self._settings, self._max_length)
            room = self._max_length - self._settings.prepend_start - decoding.max_new_tokens
            prompt = self.tok_encode(context, add_special_tokens=False)[-room:]
            if not prompt and not self._settings.prepend_start:
                prompt = [self.prefix_token_id]
            asked.append((prompt, decoding))
        return self._answers.continuations(asked)

    def _scored(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """(log p of the target after the context, whether greedy gives it) of each pair."""
        sequences = []
        for context, target in pairs:
            if len(target) > self._max_length:
                raise InputError(
                    f"A continuation has {len(target)} tokens and the model takes "
                    f"{self._max_length}: leave the task out, or use a model of longer max_length."
                )
            # Trailing white space moves from a context to the target, and may leave nothing.
            ids = (context or [self.prefix_token_id]) + target
            if target:
                sequences.append((ids[-(self._max_length + 1) :], len(target)))
        scored = iter(self._answers.log_likelihoods(sequences))
        return [next(scored) if target else (0.0, True) for _, target in pairs]


def evaluate(
    model: HarnessModel, loaded: Loaded, settings: FewShot
) -> tuple[Results, dict[str, list[dict[str, Any]]]]:
    """Runs the tasks on the model. Returns the results by task and group, and samples by task: of
    all with save_samples, else of those that are not scored."""
    results, samples = Results(), {}
    for task in leaves(loaded):
        if _is_unscored(task, settings):
            name = task.task_name
            samples[name] = _generate_only(model, task, settings.limit)
            shots = task.get_config("num_fewshot")
            results[name] = {"shots": shots, "documents": len(samples[name]), "metrics": {}}
    if scored := [part for one in loaded for part in _scored(one, settings)]:
        found: Any = lm_eval.evaluator.simple_evaluate(
            model=model,
            tasks=scored,
            task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
            limit=settings.limit,
            bootstrap_iters=settings.bootstrap_iters,
            log_samples=settings.save_samples,
            confirm_run_unsafe_code=settings.allow_code_execution,
        )
        results |= {name: _result(found, name) for name in found["results"]}
        samples |= found.get("samples", {})
    return results, samples


def _is_unscored(task: Task, settings: FewShot) -> bool:
    return getattr(task, "UNSAFE_CODE", False) and not settings.allow_code_execution


def _scored(one: Task | Group, settings: FewShot) -> Iterator[Task | Group]:
    """The scored tasks, and groups of which every task is scored: only those have an average."""
    if not any(_is_unscored(task, settings) for task in leaves([one])):
        yield one
    elif isinstance(one, Group):
        for member in one:
            yield from _scored(member, settings)


def _generate_only(model: HarnessModel, task: Task, limit: int | None) -> list[dict[str, Any]]:
    """A task's prompts and answers.

    Not by lm-eval's `predict_only`, which would run the task's filters, its own code, on answers.
    """
    task.build_all_requests(limit=limit)
    answers = model.generate_until(task.instances)
    return [
        {"doc_id": request.doc_id, "doc": request.doc, "prompt": request.args[0], "answer": answer}
        for request, answer in zip(task.instances, answers, strict=True)
    ]


def _result(found: Any, name: str) -> dict[str, Any]:
    values, counts = found["results"][name], found["n-samples"].get(name)
    metrics = {}
    for key, value in values.items():
        metric, comma, chosen = key.partition(",")
        if comma and not metric.endswith("_stderr") and not isinstance(value, str):
            stderr = values.get(f"{metric}_stderr,{chosen}")
            is_number = isinstance(stderr, int | float)
            metrics[metric if chosen == "none" else key] = {
                "value": float(value),
                "stderr": float(stderr) if is_number else None,
            }
    shots = found["n-shot"].get(name) if counts else None
    return {"shots": shots, "documents": counts and counts["effective"], "metrics": metrics}
