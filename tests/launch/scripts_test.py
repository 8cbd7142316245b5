"""All launchers: syntax, shellcheck, flags, quoting, and the container file."""

import pathlib
import re
import shutil
import subprocess
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

ROOT = pathlib.Path(__file__).parent.parent.parent
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
LAUNCHERS = {
    "tpu_vm.sh": ["--name=n", "--zone=z", "--accelerator-type=v4-8"],
    "gke_xpk.sh": ["--cluster=c", "--workload=w", "--tpu-type=v4-8", "--image=i"],
    "slurm.sh": ["--name=n"],
    "gpu.sh": [],
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_it(script: pathlib.Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say() -> None:
    checked = subprocess.run(["shellcheck", *SCRIPTS], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("script", "flag"), [(script, flag) for script in LAUNCHERS for flag in LAUNCHERS[script]]
)
def test_a_missing_flag_is_one_sentence(launch: Any, script: str, flag: str) -> None:
    others = [other for other in LAUNCHERS[script] if other != flag]
    ended = launch(script, *others, "--", "train")
    name = flag.partition("=")[0]
    assert ended.returncode == 2
    assert ended.stderr == f"{script}: {name} is missing: add {name}=VALUE before --.\n"
    assert not launch.log()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nodse=2", "--", "train"], "there is no flag --nodse=2: choose from"),
        (["train"], "there is no flag train: "),
        (["--nodes=two", "--", "train"], "--nodes is 'two', expected a whole number"),
        (["--nodes", "2", "--", "train"], "--nodes has no value: write --nodes=VALUE"),
        (["--nodes=", "--", "train"], "--nodes has no value"),
        (["--dry-run=no", "--", "train"], "--dry-run takes no value"),
        (["--cuda=11", "--", "train", "--output_dir=/x"], "--cuda is '11', expected 12 or 13"),
        ([], "the command to run is missing"),
        (["--"], "the command to run is missing"),
        (["--", "salt"], "the command to run is missing"),
        (["--", "--gin_file=x"], "the command to run is missing"),
        (["--", "trian", "--output_dir=/x"], "there is no verb trian"),
        (["--", "train"], "--output_dir is missing"),
        (["--", "train", "--output_dir="], "--output_dir is missing"),
        (["--", "train", "--output_dir"], "--output_dir is missing"),
        (["--", "train", "--output_dir=run"], "--output_dir is 'run', expected the whole path"),
        (["--", "train", "--output_dir=s3://b/run"], "--output_dir is 's3://b/run', expected the"),
        (["--", "train", "--output_dir=/x", "--output_dir", "y"], "--output_dir is 'y', expected"),
        (["--", "generate", "--output_dir=/x"], "salt generate runs in one process"),
    ],
)
def test_bad_flags_are_one_sentence(launch: Any, arguments: list[str], said: str) -> None:
    ended = launch("slurm.sh", "--name=n", *arguments)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert not launch.log()
    assert not ended.stdout


@pytest.mark.parametrize("bucket", ["gs://texts", "texts/", "a/b"])
def test_a_bucket_is_its_name_alone(launch: Any, bucket: str) -> None:
    flags = LAUNCHERS["tpu_vm.sh"]
    ended = launch("tpu_vm.sh", *flags, f"--bucket={bucket}", *launch.train)
    assert ended.returncode == 2
    assert f"--bucket is '{bucket}', expected the name alone" in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert not launch.log()


def test_one_machine_runs_any_verb_into_any_folder(launch: Any) -> None:
    assert launch("gpu.sh", "--dry-run", "--", "generate", "--output_dir=texts").returncode == 0


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_several_processes_evaluate_into_a_bucket(launch: Any, scheme: str) -> None:
    flags = ["--dry-run", *LAUNCHERS["slurm.sh"], "--", "evaluate"]
    assert launch("slurm.sh", *flags, f"--output_dir={scheme}://b/e").returncode == 0


@pytest.mark.parametrize("script", LAUNCHERS)
def test_help_names_every_flag(launch: Any, script: str) -> None:
    shown = launch(script, "--help").stdout
    known = re.findall(r"--[a-z-]+", launch(script, "--no-such-flag").stderr)
    assert len(known) >= 5
    for flag in known:
        if flag not in ("--", "--no-such-flag"):
            assert re.search(rf"^ *{flag}\b", shown, re.MULTILINE), flag


@pytest.mark.parametrize("script", LAUNCHERS)
def test_help_tells_the_numbers_that_it_has(script: str) -> None:
    text = (ROOT / "launch" / script).read_text()
    said = dict(re.findall(r"^# +--([a-z-]+)=(\d+)\b", text, re.MULTILINE))
    has = dict(re.findall(r"\[([a-z-]+)\]=(\d+)", text))
    [numbers] = re.findall(r"^numbers=\((.*)\)", text, re.MULTILINE)
    assert said == has
    assert {*numbers.split()} | {"cuda"} == {*has} | {"cuda"}, "cuda is checked by itself"


@pytest.mark.parametrize(
    ("codes", "code", "said"),
    [
        (("0", "0"), 0, "finished"),
        (("0", "75"), 99, "interrupted and saved"),
        (("75", "75"), 99, "interrupted and saved"),
        (("75", "1"), 99, "salt failed (exit code 1), failure 1 of the 1 in a row"),
        (("0", "137"), 99, "salt failed (exit code 137), failure 1 of the 1 in a row"),
        (("75", "2"), 2, "refused its input"),
        (("1", "2"), 2, "refused its input"),
    ],
)
def test_what_the_exit_codes_of_all_mean(codes: tuple[str, str], code: int, said: str) -> None:
    """In any order; 99 stands for a start."""
    endings = [f"{ending} 600" for ending in codes]
    for order in (endings, endings[::-1]):
        ended = judged('again_after "$@"; exit 99', 1, *order)
        assert ended.returncode == code
        assert said in ended.stderr


def judged(text: str, max_failures: int, *endings: str) -> subprocess.CompletedProcess[str]:
    """What common.sh makes of endings, with --min-run-seconds=600."""
    flags = f"flag+=([max-failures]={max_failures} [min-run-seconds]=600)"
    command = ["bash", "-c", f'source "$0"; {flags}; {text}', str(ROOT / "launch/common.sh")]
    return subprocess.run([*command, *endings], capture_output=True, text=True)


def test_failures_are_counted_in_a_row() -> None:
    """A row ends with an interruption after long enough; a failure never ends it."""
    endings = ["75 599", "75 0", "1 9999", "137 0", "75 600", "75 0", "1 600", "75 601"]
    ended = judged('for one; do again_after "$one"; echo "$failures"; done', 9, *endings)
    assert ended.stdout.split() == ["1", "2", "3", "4", "0", "1", "2", "0"], ended.stderr


def test_of_several_processes_the_longest_says_how_long_the_start_ran() -> None:
    """Of what was killed with its recorder nobody knows the time."""
    for endings in (["75 600", "75 0"], ["75 0", "75 600"], ["75", "75 600"]):
        ended = judged('again_after "$@"; exit 99', 0, *endings)
        assert ended.returncode == 99, ended.stderr


@pytest.mark.parametrize("seconds", [0, 599])
def test_interruptions_that_come_soon_end_in_one_sentence(seconds: int) -> None:
    ended = judged('again_after "$@"; again_after "$@"; again_after "$@"', 1, f"75 {seconds}")
    assert ended.returncode == 1
    first, last = ended.stderr.splitlines()
    said = (
        f"common.sh: salt was interrupted (exit code 75) {seconds} seconds after its start, "
        "which counts as a failure before --min-run-seconds=600, failure "
    )
    assert first == (
        f"{said}1 of the 1 in a row that --max-failures allows: the same command is started again."
    )
    assert last == (
        f"{said}2 in a row, more than --max-failures=1 allows: it is not started again; mend what "
        "is said above, or raise --max-failures."
    )


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8"))))
def test_quoted_words_mean_themselves(words: list[str]) -> None:
    text = 'source "$1"; shift; eval "set -- $(quoted "$@")"; printf "%s\\0" "$@"'
    common = str(ROOT / "launch/common.sh")
    said = subprocess.run(
        ["bash", "-c", text, "bash", common, *words], capture_output=True, check=True
    ).stdout
    assert said == b"".join(word.encode() + b"\0" for word in words or [""])


def container_file() -> list[tuple[str, str]]:
    """The instructions of launch/Dockerfile."""
    text = (ROOT / "launch/Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines)]


def test_the_container_has_the_locked_versions() -> None:
    lines = container_file()
    assert lines[0] == ("FROM", "python:3.12-slim")
    assert ("ARG", "JAX=cpu") in lines
    assert lines[-1] == ("ENTRYPOINT", '["salt"]')
    versions, package = [rest for name, rest in lines if name == "RUN"]
    lock = "requirements/lock-3.12.txt"
    assert versions.endswith(f'--requirement={lock} "jax[$JAX]"')
    assert (ROOT / lock).exists()
    assert {"--no-deps", "--no-build-isolation"} < set(package.split())
    # What is changed often comes last: COPY of the lock, its wheels, COPY of the code.
    order = [rest for name, rest in lines if name in ("COPY", "RUN")]
    assert order == [f"{lock} requirements/", versions, ". .", package]


def test_the_lock_has_what_the_container_builds_with() -> None:
    lock = (ROOT / "requirements/lock-3.12.txt").read_text()
    for name in ("jax", "setuptools"):
        assert re.search(rf"^{name}==", lock, re.MULTILINE)


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_what_extras_add_fits_the_lock(python: str) -> None:
    pins = [
        dict(line.partition(";")[0].strip().split("==") for line in path.read_text().splitlines())
        for path in (ROOT / f"requirements/{kind}-{python}.txt" for kind in ("lock", "extras"))
    ]
    assert pins[1]["jax-cuda13-plugin"] == pins[1]["jax-cuda13-pjrt"] == pins[0]["jax"]
    assert "wandb" in pins[1]
    assert not pins[0].keys() & pins[1].keys()


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no clone")
def test_an_archive_knows_its_commit() -> None:
    """`git archive` replaces the marker by the commit; a clone has the marker."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run(
        [*git, "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    archive = subprocess.run(
        [*git, "archive", "HEAD", "salt_jax/storage/run_folder.py"], capture_output=True
    )
    text = subprocess.run(["tar", "-xO"], input=archive.stdout, capture_output=True).stdout.decode()
    assert f'_ARCHIVED_COMMIT = "{head}"' in text
    assert (
        '_ARCHIVED_COMMIT = "$Format:%H$"' in (ROOT / "salt_jax/storage/run_folder.py").read_text()
    )
