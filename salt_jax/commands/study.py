"""`salt study`: arms × sizes × seeds, each a `salt train`, and a report with means and intervals.

A study is a gin file (gin/studies) of inputs that are made once (the cache, the SLM, scores,
selections), arms, sizes of model if there are several, and seeds. Every step is a `salt` command,
printed before it runs. The same command resumes a study that was stopped; arms, sizes and seeds may
be added to it.
"""

import json
import pathlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from salt_jax.cli.setting_groups import settings_of
from salt_jax.cli.verb import Verb, load_verb
from salt_jax.cli.verb_process import check_verbs, run_verb
from salt_jax.errors import InputError, nearest, require_counts
from salt_jax.storage.local_copies import exists
from salt_jax.storage.run_folder import FORK_FILE, RUN_FILE, SUMMARY_FILE, RunFolder
from salt_jax.terminal import say

MAKERS = ("prepare", "train", "score", "select")
REPORT = "report"
# Names in a study's folder that are not inputs or arms.
_TAKEN = (REPORT, "processes", "work")
# Flags that the study sets itself.
_OWN_FLAGS = ("--output_dir",)
_OWN_FLAGS_OF_ARMS = (*_OWN_FLAGS, "--arm", "--seed", "--data.seed")


class Command(NamedTuple):
    """One command of a study, its placeholders filled in."""

    output: pathlib.Path
    verb: str
    arguments: tuple[str, ...]

    @property
    def finished(self) -> bool:
        """Whether its summary has been written."""
        return (self.output / SUMMARY_FILE).exists()


def study(
    run: RunFolder,
    *,
    arms: Mapping[str, Sequence[str]],
    common: Sequence[str] = (),
    inputs: Mapping[str, Sequence[str]] = {},
    given: Mapping[str, str] = {},
    seeds: Sequence[int] = (0, 1, 2),
    sizes: Mapping[str, Mapping[str, str]] = {},
    reference: str = "baseline",
    title: str = "A study",
) -> None:
    """Trains every arm with every seed, one after another, and reports on them.

    In flags, {NAME} stands for a folder: one of `given`, an input's output, or in an arm another
    arm's run with the same seed. The seed sets the initialisation and the order of rows; inputs,
    such as the SLM and the selections, are made once and are the same for all seeds.

    Args:
      run: The folder of the study: INPUT/ for each input, ARM/seed-N/ for each run, report/; with
        sizes INPUT/SIZE/ and ARM/SIZE/seed-N/.
      arms: Each arm's own flags of `salt train`: name → (flag, flag, …).
      common: Flags of `salt train` for all arms; an arm's own flags override them.
      inputs: The arms' inputs, in the order in which they are made: name → (verb, flag, flag, …).
      given: Folders that exist already: name → path.
      seeds: The seeds; all arms of one seed run before the next.
      sizes: Sizes of model that every arm is run at, one after another: name → {word: text}. In
        flags {word} stands for the size's text; inputs that need one are made for each size.
      reference: The arm that the others are compared with, seed by seed.
      title: The page's title.

    Raises:
      InputError: A name is duplicate, a placeholder or flag unknown, or a finished run was made
        with other flags.
      RunFailed: A step failed.
    """
    _check_names(arms, inputs, given)
    _check_sizes(sizes, {*given, *inputs, *arms})
    _check_seeds(seeds)
    if reference not in arms:
        raise InputError(
            f"reference is {reference!r}, and the arms are {', '.join(arms)}: name one of them."
        )
    steps = list(_commands(run.path, arms, common, inputs, given, seeds, sizes))
    for step in steps:
        _refuse_other_flags(step, run.path)
    check_verbs(
        {
            str(step.output.relative_to(run.path)): (
                step.verb,
                *step.arguments,
                f"--output_dir={step.output}",
            )
            for step in steps
            if not step.finished
        }
    )
    run.begin(replace=True)
    for number, step in enumerate(steps, start=1):
        if not step.finished:
            say("", f"── step {number} of {len(steps)}")
            run_verb(step.verb, step.arguments, step.output)
    runs_first = sorted(
        steps, key=lambda step: step.output.relative_to(run.path).parts[0] in inputs
    )
    shown = [str(step.output) for step in runs_first if step.verb in ("train", "select")]
    shown += [str(step.output) for step in steps if step.verb == "score"]
    report = run.path / REPORT
    run_verb(REPORT, [*shown, f"--reference={reference}", f"--title={title}"], report)
    numbers = json.loads((report / SUMMARY_FILE).read_text(encoding="utf-8"))
    run.write_summary(
        {
            "seeds": list(seeds),
            "arms": list(arms),
            "over_seeds": numbers["over_seeds"],
            "ladders": numbers["ladders"],
            "forks": _saved_by_forks([step.output for step in steps if step.verb == "train"]),
        }
    )


def _saved_by_forks(runs: Sequence[pathlib.Path]) -> dict[str, float]:
    """The train FLOPs of all runs, each counted as if it had run alone, and those of them that
    forks have saved."""
    counted, saved = (
        [
            json.loads((run / name).read_text(encoding="utf-8"))
            for run in runs
            if (run / name).exists()
        ]
        for name in (SUMMARY_FILE, FORK_FILE)
    )
    total = sum(one["train_flops"] for one in counted)
    less = sum(one["saved_flops"] for one in saved)
    if saved:
        share = f"{less / total:.1%}"
        say(f"Forks: {len(saved)}, which saved {less:.3g} of {total:.3g} train FLOPs ({share})")
    return {"runs": len(saved), "saved_flops": less, "train_flops": total}


def _check_names(
    arms: Mapping[str, Sequence[str]],
    inputs: Mapping[str, Sequence[str]],
    given: Mapping[str, str],
) -> None:
    for name, folder in given.items():
        if not isinstance(folder, str) or not exists(folder):
            raise InputError(f"given[{name!r}] is {folder!r}, which does not exist: correct it.")
    names = [*given, *inputs, *arms]
    for name in names:
        is_word = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_]+", name)
        if not is_word or name in _TAKEN:
            raise InputError(
                f"The study has the name {name!r}: use letters, digits and _, and none of "
                f"{', '.join(_TAKEN)}, which are its own folders."
            )
        if names.count(name) > 1:
            raise InputError(
                f"The study has the name {name!r} twice among given, inputs and arms: rename one."
            )
    if not arms:
        raise InputError("The study has no arms: set arms in a gin file, as gin/studies does.")
    for name, command in inputs.items():
        _check_flags(f"inputs[{name!r}]", command)
        if not command or command[0] not in MAKERS:
            raise InputError(
                f"inputs[{name!r}] begins with {command[0] if command else 'nothing'!r}, and must "
                f"begin with one of the verbs {', '.join(MAKERS)}."
            )
    for name, flags in arms.items():
        _check_flags(f"arms[{name!r}]", flags, _OWN_FLAGS_OF_ARMS)


def _check_flags(where: str, flags: Sequence[str], own: Sequence[str] = _OWN_FLAGS) -> None:
    if not isinstance(flags, tuple | list) or not all(isinstance(flag, str) for flag in flags):
        raise InputError(f"{where} is {flags!r}, and must be a list of flags: ('--steps=3',).")
    for flag in flags:
        if flag.partition("=")[0] in own:
            raise InputError(f"{where} sets {flag}, which the study sets itself: leave it out.")


def _check_sizes(sizes: Mapping[str, Mapping[str, str]], names: Collection[str]) -> None:
    for size, words in sizes.items():
        if not isinstance(size, str) or not re.fullmatch(r"[A-Za-z0-9_]+", size):
            raise InputError(f"sizes has the name {size!r}: use letters, digits and _.")
        if not isinstance(words, Mapping) or not all(
            isinstance(part, str) for item in words.items() for part in item
        ):
            raise InputError(
                f"sizes[{size!r}] is {words!r}, and must be texts by word: {{'steps': '300'}}."
            )
        if taken := sorted({*names} & {*words}):
            raise InputError(
                f"sizes[{size!r}] has the word {taken[0]!r}, which is also the name of a folder "
                "of the study: rename one."
            )


def _check_seeds(seeds: Sequence[int]) -> None:
    if not seeds or len({*seeds}) < len(seeds):
        raise InputError(
            f"seeds is {seeds!r}: give whole numbers, each once, as in --seeds=0 --seeds=1."
        )
    for seed in seeds:
        require_counts(0, seeds=seed)


def _commands(
    root: pathlib.Path,
    arms: Mapping[str, Sequence[str]],
    common: Sequence[str],
    inputs: Mapping[str, Sequence[str]],
    given: Mapping[str, str],
    seeds: Sequence[int],
    sizes: Mapping[str, Mapping[str, str]],
) -> Iterator[Command]:
    """The inputs in order, then at each size, for each seed, all arms."""
    texts = {size: {**given, **words} for size, words in (sizes or {"": {}}).items()}
    differing = {word for words in sizes.values() for word in words}
    for name, (verb, *flags) in inputs.items():
        outputs = dict.fromkeys(texts, root / name)
        if any(f"{{{word}}}" in flag for word in differing for flag in flags):
            differing.add(name)
            outputs = {size: root / name / size for size in texts}
        for output, size in {output: size for size, output in outputs.items()}.items():
            yield Command(output, verb, _filled(f"inputs[{name!r}]", flags, texts[size]))
        for size, output in outputs.items():
            texts[size][name] = str(output)
    _check_flags("common", common, _OWN_FLAGS_OF_ARMS)
    for size, folders in texts.items():
        for seed in seeds:
            made = dict(folders)  # plus the runs of this size and seed
            for arm in arms:
                output = root / arm / size / f"seed-{seed}"
                filled = _filled(f"arms[{arm!r}]", [*common, *arms[arm]], made)
                own = (f"--arm={arm}", f"--seed={seed}", f"--data.seed={seed}")
                yield Command(output, "train", (*filled, *own))
                made[arm] = str(output)


def _filled(where: str, flags: Sequence[str], texts: Mapping[str, str]) -> tuple[str, ...]:
    """The flags with folders, and a size's words, in place of {names}."""

    def text(match: re.Match[str]) -> str:
        if match[1] not in texts:
            raise InputError(
                f"{where} needs {{{match[1]}}}, which is neither given nor made before it"
                f"{nearest(match[1], texts)}: correct the name, or the order."
            )
        return texts[match[1]]

    return tuple(re.sub(r"\{(\w+)\}", text, flag) for flag in flags)


def _refuse_other_flags(step: Command, root: pathlib.Path) -> None:
    """Refuses an existing run whose flags differ from the study's, apart from the study's folder,
    which may have been moved."""
    if not (step.output / RUN_FILE).exists():
        return
    typed = json.loads((step.output / RUN_FILE).read_text(encoding="utf-8"))["command_line"]
    flag, inside = "--output_dir=", f"/{step.output.relative_to(root)}"
    before = [part for part in typed[2:] if not part.startswith(flag)]
    then = next((part.removeprefix(flag) for part in typed if part.startswith(flag)), "")
    if then.endswith(inside):
        folder = re.compile(rf"(?<![\w./-]){re.escape(then.removesuffix(inside))}(?=/)")
        before = [folder.sub(lambda _: str(root), part) for part in before]
    if typed[1] == step.verb and before == list(step.arguments):
        return
    before, now = (_changing_results(step.verb, flags) for flags in (before, step.arguments))
    if typed[1] != step.verb or before != now:
        changed = sorted({*before} ^ {*now}) or ["their order"]
        raise InputError(
            f"{step.output} was made with other flags (they differ in {', '.join(changed)}): "
            "give the arm or input another name, or choose another --output_dir."
        )


def _changing_results(verb: str, flags: Sequence[str]) -> list[str]:
    """The flags of settings that change the verb's results."""
    known = load_verb(verb)
    names = {
        setting.name
        for setting in settings_of(known.function)
        for name in (setting.owner.__qualname__, f"{setting.owner.__qualname__}.{setting.name}")
        if name in known.changes_no_result
    }
    # Compared by the last part: --devices.mesh is --mesh.
    return [flag for flag in flags if re.split("--|[.]", flag.partition("=")[0])[-1] not in names]


VERB = Verb(study)
