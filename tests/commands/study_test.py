"""A study: what is run, in which order, with which flags, and what is not run twice."""

import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from salt_jax.commands import study
from salt_jax.data.packed_cache import PackedCache
from salt_jax.errors import INTERRUPTED, InputError, Interrupted
from salt_jax.main import main
from salt_jax.storage.run_folder import RunFolder

STUDIES = pathlib.Path(__file__).parents[2] / "gin" / "studies"
ROOT = pathlib.Path("study")
INPUTS = {"slm": ("train", "--cache={cache}"), "scores": ("score", "--scorer={slm}")}
ARMS = {"baseline": ("--steps=3",), "salt": ("--teacher={slm}", "--flops_of={baseline}")}
GIVEN = {"cache": "."}


def test_inputs_are_made_in_order_from_what_is_there() -> None:
    slm, scores = study._commands(ROOT, {}, (), INPUTS, GIVEN, (0,), {})
    assert slm == study.Command(ROOT / "slm", "train", ("--cache=.",))
    assert scores == study.Command(ROOT / "scores", "score", ("--scorer=study/slm",))


def test_arms_by_seed_with_their_own_flags_last() -> None:
    common = ("--cache={cache}", "--steps=9")
    _, _, *steps = study._commands(ROOT, ARMS, common, INPUTS, GIVEN, (0, 4), {})
    assert [str(step.output) for step in steps] == [
        *("study/baseline/seed-0", "study/salt/seed-0"),
        *("study/baseline/seed-4", "study/salt/seed-4"),
    ]
    assert steps[2].arguments == (
        *("--cache=.", "--steps=9", "--steps=3"),
        *("--arm=baseline", "--seed=4", "--data.seed=4"),
    )
    assert "--flops_of=study/baseline/seed-4" in steps[3].arguments


def test_every_arm_at_every_size_with_the_inputs_of_that_size() -> None:
    inputs = {"text": ("prepare",), "slm": ("train", "--cache={text}", "--embed_dim={slm_width}")}
    inputs["scores"] = ("score", "--scorer={slm}")
    arms = {"baseline": ("--steps={steps}",), "salt": ("--teacher={slm}", "--flops_of={baseline}")}
    sizes = {
        "small": {"steps": "3", "slm_width": "8"},
        "large": {"steps": "5", "slm_width": "16"},
    }
    steps = list(study._commands(ROOT, arms, (), inputs, {}, (0, 1), sizes))
    assert [str(step.output.relative_to(ROOT)) for step in steps] == [
        *("text", "slm/small", "slm/large", "scores/small", "scores/large"),
        *("baseline/small/seed-0", "salt/small/seed-0", "baseline/small/seed-1"),
        *("salt/small/seed-1", "baseline/large/seed-0", "salt/large/seed-0"),
        *("baseline/large/seed-1", "salt/large/seed-1"),
    ]
    arguments = {str(step.output.relative_to(ROOT)): step.arguments for step in steps}
    assert arguments["slm/large"] == ("--cache=study/text", "--embed_dim=16")
    assert arguments["scores/large"] == ("--scorer=study/slm/large",)
    assert arguments["baseline/small/seed-1"][:2] == ("--steps=3", "--arm=baseline")
    assert arguments["salt/large/seed-1"][:2] == (
        *("--teacher=study/slm/large", "--flops_of=study/baseline/large/seed-1"),
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"arms": {}}, "no arms"),
        ({"arms": {**ARMS, "a b": ()}}, "the name 'a b'"),
        ({"arms": {**ARMS, "report": ()}}, "the name 'report'"),
        ({"arms": {**ARMS, "slm": ()}}, "the name 'slm' twice"),
        ({"arms": {"baseline": "--steps=3"}}, "must be a list of flags"),
        ({"arms": {"baseline": ("--seed=3",)}}, "sets --seed=3, which the study sets itself"),
        ({"arms": {"baseline": ("--cache={cahce}",)}}, r"needs \{cahce\}.*nearest: cache"),
        ({"arms": {"baseline": ("--flops_of={salt}",), "salt": ()}}, r"needs \{salt\}"),
        ({"arms": {"baseline": ("--flops_of={baseline}",)}}, r"needs \{baseline\}"),
        ({"common": ("--arm=x",)}, "common sets --arm=x"),
        ({"arms": {"baseline": 3}}, "must be a list of flags"),
        ({"given": {"cache": "nowhere"}}, r"given\['cache'\] is 'nowhere', which does not exist"),
        ({"given": {"cache": 3}}, r"given\['cache'\] is 3"),
        ({"inputs": {"slm": ("plan",)}}, r"inputs\['slm'\] begins with 'plan'"),
        ({"inputs": {"slm": ()}}, "begins with 'nothing'"),
        ({"seeds": ()}, "seeds is"),
        ({"seeds": (0, 0)}, "each once"),
        ({"seeds": (-1,)}, "seeds is -1"),
        ({"sizes": {"a b": {}}}, "sizes has the name 'a b'"),
        ({"sizes": {"small": {"steps": 3}}}, r"sizes\['small'\] is .*must be texts by word"),
        ({"sizes": {"small": {"slm": "x"}}}, "has the word 'slm', which is also the name"),
        ({"sizes": {"s": {"x": "1"}, "m": {}}, "common": ("--steps={x}",)}, r"needs \{x\}"),
        ({"reference": "salt_ds"}, "reference is 'salt_ds', and the arms are baseline, salt"),
    ],
)
def test_bad_settings_are_one_sentence_and_write_nothing(
    changed: dict[str, Any], message: str, tmp_path: pathlib.Path
) -> None:
    settings: dict[str, Any] = {"arms": ARMS, "inputs": INPUTS, "given": GIVEN, **changed}
    with pytest.raises(InputError, match=message):
        study.study(RunFolder(tmp_path / "out", "study"), **settings)
    assert not (tmp_path / "out").exists()


def finished_run(folder: pathlib.Path, arguments: list[str]) -> pathlib.Path:
    folder.mkdir(parents=True)
    typed = ["salt", "train", *arguments, f"--output_dir={folder}"]
    (folder / "run.json").write_text(json.dumps({"verb": "train", "command_line": typed}))
    (folder / "summary.json").write_text("{}")
    return folder


def test_a_finished_run_must_be_the_one_that_is_asked_for(tmp_path: pathlib.Path) -> None:
    folder = finished_run(tmp_path / "salt" / "seed-0", ["--steps=3", "--seed=0"])
    step = study.Command(folder, "train", ("--steps=3", "--seed=0"))
    assert step.finished
    study._refuse_other_flags(step, tmp_path)
    with pytest.raises(
        InputError, match=r"made with other flags \(they differ in --steps=3, --steps=4\)"
    ):
        study._refuse_other_flags(step._replace(arguments=("--steps=4", "--seed=0")), tmp_path)
    with pytest.raises(InputError, match="their order"):
        study._refuse_other_flags(step._replace(arguments=("--seed=0", "--steps=3")), tmp_path)
    with pytest.raises(InputError):
        study._refuse_other_flags(step._replace(verb="score"), tmp_path)
    study._refuse_other_flags(step._replace(output=tmp_path / "elsewhere"), tmp_path)


def test_flags_that_change_no_result_may_be_others(tmp_path: pathlib.Path) -> None:
    folder = finished_run(tmp_path / "salt" / "seed-0", ["--steps=3", "--log_every=1", "--seed=0"])
    step = study.Command(
        folder, "train", ("--steps=3", "--seed=0", "--microbatches=2", "--fork_from=x")
    )
    study._refuse_other_flags(step, tmp_path)
    for other in ("--batch_size=9", "--cache=moved", "--gin_file=log_every"):
        with pytest.raises(InputError, match=rf"they differ in {other}\)"):
            study._refuse_other_flags(step._replace(arguments=(*step.arguments, other)), tmp_path)


@pytest.mark.parametrize("root", ["study", "/data/study"])
def test_a_study_that_was_moved_is_the_same_study(tmp_path: pathlib.Path, root: str) -> None:
    def flags(folder: str, cache: str) -> tuple[str, ...]:
        own = (f"--cache={cache}", f"--teacher={folder}/slm", f"--gin.LIKE='{folder}/top'")
        return (*own, f"--gin_file=my{folder}/a.gin")

    step = finished_run(tmp_path / "new" / "salt" / "seed-0", [])
    typed = ["salt", "train", *flags(root, "c"), f"--output_dir={root}/salt/seed-0"]
    (step / "run.json").write_text(json.dumps({"verb": "train", "command_line": typed}))
    new = str(tmp_path / "new")
    asked = [flag.replace(f"my{new}", f"my{root}") for flag in flags(new, "c")]
    study._refuse_other_flags(study.Command(step, "train", tuple(asked)), tmp_path / "new")
    for other in ("another", f"{new}/c"):
        asked[0] = f"--cache={other}"
        with pytest.raises(InputError, match="they differ in --cache="):
            study._refuse_other_flags(study.Command(step, "train", tuple(asked)), tmp_path / "new")


def test_the_last_arms_flags_are_checked_before_anything_runs(tmp_path: pathlib.Path) -> None:
    common = ["--gin_file=runs/smoke_llm.gin", "--cache={cache}", "--steps=2"]
    plain = ("--gin_file=methods/baseline.gin",)
    for wrong, message in (
        ("--gin_file=methods/salt_dss.gin", r"last/seed-0: There is no gin file .*salt_ds\.gin"),
        ("--stepss=3", r"last/seed-0: There is no setting --stepss \(nearest: --steps\)"),
        ("--gin_file=methods/salt.gin", r"last/seed-0: .*must be set"),
    ):
        arms = {"baseline": plain, "last": (*plain, wrong)}
        with pytest.raises(InputError, match=message) as caught:
            study.study(RunFolder(tmp_path / "out", "study"), arms=arms, common=common, given=GIVEN)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", sorted(path.name for path in STUDIES.glob("*.gin")))
def test_the_flags_of_the_studies_that_come_along(
    name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []

    def begin(verb: str, arguments: tuple[str, ...], output: pathlib.Path) -> None:
        begun.append(output.name)
        raise Interrupted("after the check of all flags")

    monkeypatch.setattr(study, "run_verb", begin)
    pile = f"--gin.PILE='{tmp_path}'"
    typed = ["study", f"--gin_file=studies/{name}", pile, f"--output_dir={tmp_path / 'out'}"]
    assert main(typed) == INTERRUPTED
    assert begun == ["cache"]


@pytest.mark.slow
def test_arms_and_seeds_to_a_page_with_intervals(
    cache: PackedCache, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    gin = tmp_path / "study.gin"
    gin.write_text(
        "from __gin__ import dynamic_registration\n"
        "from salt_jax.commands import study\n"
        f"study.study.given = {{'cache': '{cache.path}'}}\n"
        "study.study.inputs = {'slm': ('train', '--gin_file=runs/smoke_llm.gin',\n"
        "    '--gin_file=models/slm_smoke.gin', '--gin_file=methods/baseline.gin',\n"
        "    '--cache={cache}', '--steps=2', '--arm=slm')}\n"
        "study.study.common = ('--gin_file=runs/smoke_llm.gin',\n"
        "    '--gin_file=models/slm_smoke.gin', '--cache={cache}', '--steps=2')\n"
        "study.study.arms = {'baseline': ('--gin_file=methods/baseline.gin',),\n"
        "    'salt': ('--gin_file=methods/salt.gin', '--teacher={slm}', '--gin.N_KD=1',\n"
        "        '--keep_steps=(1,)'),\n"
        "    'fork': ('--gin_file=methods/salt.gin', '--teacher={slm}', '--gin.N_KD=2',\n"
        "        '--fork_from={salt}')}\n"
    )
    output = tmp_path / "out"
    command = ["study", f"--gin_file={gin}", "--seeds=0", f"--output_dir={output}"]
    first = subprocess.run([sys.executable, "-m", "salt_jax", *command])
    assert first.returncode == 0
    before = (output / "salt" / "seed-0" / "run.json").read_bytes()
    capfd.readouterr()
    # Seeds may be added to it, and what is there is not made again.
    again = subprocess.run([sys.executable, "-m", "salt_jax", *command, "--seeds=1"])
    assert again.returncode == 0
    printed = capfd.readouterr().out
    assert printed.count("$ salt train") == 3
    assert (output / "salt" / "seed-0" / "run.json").read_bytes() == before
    summary = json.loads((output / "summary.json").read_text())
    arms = {one["arm"]: one for one in summary["over_seeds"]}
    assert arms["baseline"]["seeds"] == [0, 1]
    salt = arms["salt"]
    assert salt["final"]["log_perplexity"]["difference"]["count"] == 2
    assert salt["final"]["log_perplexity"]["level"]["half_width"] > 0
    runs = [
        output / "slm",
        *(output / arm / f"seed-{n}" for arm in summary["arms"] for n in (0, 1)),
    ]
    spent = [json.loads((run / "summary.json").read_text())["train_flops"] for run in runs]
    forks = summary["forks"]
    assert forks["runs"] == 2
    assert forks["train_flops"] == pytest.approx(sum(spent))
    student = json.loads((output / "baseline/seed-0/summary.json").read_text())["student_flops"]
    teacher = json.loads((output / "salt/seed-0/summary.json").read_text())["teacher_flops"]
    assert forks["saved_flops"] == pytest.approx(2 * (student / 2 + teacher))
    assert f"Forks: 2, which saved {forks['saved_flops']:.3g} of " in printed
    # Another step count under a finished arm's name is refused before anything runs.
    gin.write_text(gin.read_text().replace("'--gin.N_KD=1'", "'--gin.N_KD=0'"))
    assert main([*command, "--seeds=2"]) == 2
    assert "other flags (they differ in --gin.N_KD=0, --gin.N_KD=1)" in capfd.readouterr().err
    assert not (output / "baseline" / "seed-2").exists()
