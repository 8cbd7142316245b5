"""`salt smoke`: the whole method on real text in some minutes, with a table and a page.

It prepares a cache, trains a small SLM and keeps an early checkpoint of it, scores, selects, trains
the LLM as baseline, RKD, SALT and SALT_DS with one seed, evaluates them on held-out text, and makes
the report. Every step is an ordinary `salt` command, printed before it runs.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from salt_jax.cli.verb import Verb
from salt_jax.cli.verb_process import check_verbs, run_verb
from salt_jax.data.packed_cache import PackedCache
from salt_jax.errors import InputError, RunFailed, require_counts
from salt_jax.storage.run_folder import SUMMARY_FILE, RunFolder
from salt_jax.terminal import Table, print_table, say
from salt_jax.training import compilation, partitioning
from salt_jax.training.bigram import bigram_log_perplexity
from salt_jax.training.checkpoints import find_model
from salt_jax.training.evaluation import Evaluator

ARMS = ("baseline", "rkd", "salt", "salt_ds")
SPLIT = "test"

# The entries that the summary copies from those of `salt train`.
_TRAINING_FIGURES = (
    *("steps", "distill_steps", "parameters", "train_flops", "seconds", "tokens", "seed"),
)


def smoke(
    run: RunFolder,
    *,
    text: str = "",
    data: Sequence[str] = ("--gin_file=data/smoke.gin",),
    slm_gin: str = "runs/smoke_slm.gin",
    llm_gin: str = "runs/smoke_llm.gin",
    slm_steps: int = 350,
    scorer_step: int = 50,
    llm_steps: int = 400,
    n_kd: int = 100,
    selected_fraction: float = 0.5,
    temperature: float = 1.0,
    seed: int = 0,
) -> None:
    """Runs SALT end to end.

    Args:
      run: The folder for everything; the same command resumes one that was interrupted.
      text: A pattern of files to train on ("notes/**/*.md"); by default this machine's own text,
        the Python library.
      data: Arguments of `salt prepare`: text, vocabulary and length; data/smoke.gin reads `text`.
      slm_gin: Settings of the SLM's run.
      llm_gin: Settings of the LLM's runs.
      slm_steps: Steps of the SLM.
      scorer_step: The step of the SLM's early checkpoint, the scorer.
      llm_steps: Steps of every LLM.
      n_kd: Steps of stage 1, for SALT and SALT_DS.
      selected_fraction: Share of the rows that SALT_DS reads in stage 1.
      temperature: τ, the teacher's temperature.
      seed: The seed of both models and of the order of rows.

    Raises:
      InputError: There is no text, or the numbers of steps are incompatible.
      RunFailed: A step failed, or a model learned too little for the comparison to mean anything.
    """
    if not 0 < scorer_step <= slm_steps or not 0 < n_kd <= llm_steps:
        raise InputError(
            f"scorer_step is {scorer_step} of {slm_steps} slm_steps and n_kd {n_kd} of {llm_steps} "
            "llm_steps: each must be at least 1 and at most the steps it is part of."
        )
    if not 0 < selected_fraction <= 1:
        raise InputError(
            f"selected_fraction is {selected_fraction}, expected above 0 and at most 1: change "
            "--selected_fraction."
        )
    if temperature <= 0:
        raise InputError(f"temperature is {temperature}, expected above 0: change --temperature.")
    require_counts(0, seed=seed)
    folder = run.path
    fresh = not run.begun
    if fresh and (folder / "cache").exists():
        raise InputError(
            f"{folder / 'cache'} exists and {folder} is not a folder of `salt smoke`: choose "
            "another --output_dir."
        )
    cache, seeds = f"--cache={folder / 'cache'}", (f"--seed={seed}", f"--data.seed={seed}")
    commands: dict[str, tuple[str, ...]] = {
        "cache": ("prepare", *data),
        "slm": (
            *("train", f"--gin_file={slm_gin}", "--gin_file=methods/baseline.gin", cache, *seeds),
            *(f"--steps={slm_steps}", f"--gin.KEEP_STEPS=({scorer_step},)", "--arm=slm"),
        ),
        "scores": ("score", f"--scorer={folder / 'slm'}", f"--scorer_step={scorer_step}", cache),
        "selection": (
            *("select", cache, f"--scores={folder / 'scores'}"),
            *("--gin_file=methods/top_fraction.gin", f"--gin.FRACTION={selected_fraction}"),
        ),
    }
    for arm, flags in _methods(folder, n_kd, temperature).items():
        method = f"--gin_file=methods/{arm}.gin", *flags
        llm = ("train", f"--gin_file={llm_gin}", *method, cache, f"--steps={llm_steps}", *seeds)
        commands[arm] = llm
    check_verbs(commands)
    run.begin()
    for name, (verb, *arguments) in commands.items():
        output = folder / name
        if verb != "train" and (output / SUMMARY_FILE).exists():
            say("", f"{output} is finished already")
            continue
        try:
            run_verb(verb, arguments, output, {"SALT_TEXT": text})
        except InputError:
            if fresh and name == "cache":
                run.withdraw()
            raise
    summary = _evaluate(folder)
    run.write_summary(summary)
    runs = [str(folder / name) for name in (*ARMS, "slm", "scores", "selection")]
    run_verb("report", [*runs, "--title=SALT on this machine"], folder / "report")
    _print_table(summary)
    _require_learning(summary)
    say(f"The page: {(folder / 'report' / 'index.html').resolve()}")


def _methods(folder: pathlib.Path, n_kd: int, temperature: float) -> dict[str, tuple[str, ...]]:
    """Flags of `salt train` for each arm, beside its gin file."""
    teacher = f"--teacher={folder / 'slm'}", f"--gin.TEACHER_TEMPERATURE={temperature}"
    salt = *teacher, f"--gin.N_KD={n_kd}"
    salt_ds = *salt, f"--selection={folder / 'selection'}"
    return dict(zip(ARMS, ((), teacher, salt, salt_ds), strict=True))


def _evaluate(folder: pathlib.Path) -> dict[str, Any]:
    """Evaluates every model and the bigram model on the test split; the run's summary."""
    compilation.use_compilation_cache(compilation.DEFAULT_FOLDER)
    cache = PackedCache.open(folder / "cache")
    mesh = partitioning.MeshConfig().make()
    results = {}
    for name in ("slm", *ARMS):
        model = find_model(folder / name, None, "model")
        quality = Evaluator(model.config, cache, SPLIT, 64, mesh)(model.load_params(mesh)).whole
        training = json.loads((folder / name / SUMMARY_FILE).read_text(encoding="utf-8"))
        results[name] = {
            "log_perplexity": quality.log_perplexity,
            "next_token_accuracy": quality.next_token_accuracy,
            **{figure: training[figure] for figure in _TRAINING_FIGURES},
        }
    return {
        "arms": [{"arm": arm, **results[arm]} for arm in ARMS],
        "slm": results["slm"],
        "bigram_log_perplexity": bigram_log_perplexity(
            cache.split("train"), cache.split(SPLIT), cache.vocabulary_size, cache.start_id
        ),
        "split": SPLIT,
        "device": jax.devices()[0].device_kind,
    }


def _print_table(summary: dict[str, Any]) -> None:
    columns = ("", "steps", "with teacher", "log-perplexity", "next-token accuracy")
    bigram = ("bigram", "", "", f"{summary['bigram_log_perplexity']:.4f}", "", "", "")
    models = [("slm", summary["slm"]), *((arm["arm"], arm) for arm in summary["arms"])]
    rows = tuple(
        (
            name,
            str(result["steps"]),
            str(result["distill_steps"]),
            f"{result['log_perplexity']:.4f}",
            f"{result['next_token_accuracy']:.2%}",
            f"{result['train_flops']:.3g}",
            f"{result['seconds']:.0f}",
        )
        for name, result in models
    )
    title = f"On held-out text (the {summary['split']} split)"
    print_table(Table(title, (*columns, "train FLOPs", "seconds"), (bigram, *rows)))
    say("One seed an arm says nothing about which arm is better; docs/RESULTS.md has more.")


def _require_learning(summary: dict[str, Any]) -> None:
    bigram, slm = summary["bigram_log_perplexity"], summary["slm"]["log_perplexity"]
    if slm >= bigram:
        raise RunFailed(
            f"the SLM's held-out log-perplexity {slm:.4f} doesn't beat a bigram model's "
            f"{bigram:.4f}: raise slm_steps, or give it more text."
        )
    for arm in summary["arms"]:
        if arm["log_perplexity"] >= slm:
            raise RunFailed(
                f"the LLM's held-out log-perplexity {arm['log_perplexity']:.4f} ({arm['arm']}) "
                f"doesn't beat the SLM's {slm:.4f}: raise llm_steps, or give it more text."
            )


VERB = Verb(smoke)
