"""The command: every slip of the pen is one sentence with the name and the nearest valid one."""

import importlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

import gin
from salt_jax.cli.command_line import parse_arguments, shortest, verbs
from salt_jax.cli.configuration import configure
from salt_jax.cli.setting_groups import settings_of
from salt_jax.commands.generate import generate
from salt_jax.commands.report import report
from salt_jax.commands.score import score
from salt_jax.commands.study import study
from salt_jax.data.packed_cache import PackedCache
from salt_jax.distill import schedules, scores
from salt_jax.main import main

ROOT = pathlib.Path(__file__).parent.parent
PRETRAIN = ["train", "--gin_file=runs/pretrain.gin", "--gin.LEARNING_RATE=1e-3"]
BASELINE = [*PRETRAIN, "--gin_file=methods/baseline.gin", "--gin_file=models/slm_smoke.gin"]
IMPORTS = (
    "from __gin__ import dynamic_registration\nfrom salt_jax.commands import train\n"
    "from salt_jax.training import config\n"
)
FULL = [*BASELINE, "--cache=nowhere", "--steps=3", "--batch_size=8"]


def test_scopes_and_booleans() -> None:
    scoped = "--gin.config.TrainConfig.model=@big/decoder.DecoderConfig()"
    arguments = [*FULL, scoped, "--gin.big/decoder.DecoderConfig.embed_dim=320"]
    seen = gin.get_bindings(configure(parse_arguments(arguments)))["config"]
    assert seen.model.embed_dim == 320
    for typed, value in (("false", False), ("True", True)):
        configure(parse_arguments(["prepare", f"--drop_unknown={typed}"]))
        assert gin.get_bindings("prepare.prepare")["drop_unknown"] is value


def test_later_files_and_flags_override(tmp_path: pathlib.Path) -> None:
    arguments = [*FULL, "--gin_file=methods/salt.gin", "--gin.N_KD=5", "--teacher=here"]
    function = configure(parse_arguments([*arguments, "--gin.OMEGA=0.25", "--seed=7"]))
    seen = gin.get_bindings(function)["config"]
    assert seen.method.schedule == schedules.Step(omega=0.25, n_kd=5)
    assert (seen.seed, seen.method.arm, seen.method.teacher.path) == (7, "salt", "here")


def test_a_folder_of_results_named_like_a_folder_of_configurations_is_no_package(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "smoke").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as `python -m salt_jax` does
    includes = ["train", "--gin_file=runs/smoke_slm.gin", "--gin_file=methods/baseline.gin"]
    function = configure(
        parse_arguments([*includes, "--cache=here", "--steps=3", "--gin.KEEP_STEPS=(2,)"])
    )
    assert gin.get_bindings(function)["config"].data.batch_size == 16


@pytest.mark.parametrize(("verb", "advice"), [("train", "microbatches"), ("score", "batch_size")])
def test_too_little_memory_is_one_sentence(
    verb: str,
    advice: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import jax.numpy as jnp

    monkeypatch.setattr("salt_jax.main.configure", lambda _: lambda _: jnp.zeros(2**50))
    assert main([verb, f"--output_dir={tmp_path}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("salt: The devices' memory is too small for this run (Out of memory")
    assert f"--{advice}" in error
    assert "`salt plan`" in error


def test_text_flags_stay_text() -> None:
    configure(parse_arguments(["report", "1", "2e3", "--title=3"]))
    assert gin.get_bindings(report) == {"runs": ("1", "2e3"), "title": "3"}


@pytest.mark.parametrize(
    "text", ["@ada says", "%d of %s", "@a.b() and", "100%", "[@x.Y()]", "None?"]
)
def test_a_text_may_begin_as_a_reference_does(text: str) -> None:
    configure(parse_arguments(["generate", "--model=run", f"--prompt={text}"]))
    assert gin.get_bindings(generate)["prompt"] == (text,)


def test_a_flag_may_be_a_list_of_references(tmp_path: pathlib.Path) -> None:
    imports = "from __gin__ import dynamic_registration\nfrom salt_jax.distill import scores\n"
    (tmp_path / "scores.gin").write_text(imports)
    typed = ["score", f"--gin_file={tmp_path / 'scores.gin'}", "--scorer=run", "--cache=cache"]
    configure(parse_arguments([*typed, "--scores=[@scores.Mean()]"]))
    assert gin.get_bindings(score)["scores"] == [scores.Mean()]


def test_a_dictionary_may_be_a_flag() -> None:
    configure(parse_arguments(["study", "--arms={'a': ('--steps=3',)}", "--given={'slm': 'x'}"]))
    assert gin.get_bindings(study) == {"arms": {"a": ("--steps=3",)}, "given": {"slm": "x"}}


def test_folder_records_configuration_and_refuses_another(
    tmp_path: pathlib.Path, cache: PackedCache, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["select", f"--cache={cache.path}", "--gin_file=methods/random_rows.gin"]
    output = f"--output_dir={tmp_path / 'out'}"
    assert main([*arguments, "--gin.ROWS=5", output]) == 0
    config = (tmp_path / "out" / "config.gin").read_text()
    assert "selection.RandomRows.m = %ROWS" in config
    assert "ROWS = 5" in config
    origin = json.loads((tmp_path / "out" / "run.json").read_text())
    assert origin["verb"] == "select"
    assert origin["command_line"][:2] == ["salt", "select"]
    assert origin["versions"]["jax"]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["rows"] == 5
    before = sorted(p.name for p in (tmp_path / "out").iterdir())
    capsys.readouterr()
    assert main([*arguments, "--gin.ROWS=6", output]) == 2
    error = capsys.readouterr().err
    assert "ROWS was 5 and is now 6" in error
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == before
    assert main(["evaluate", "--model=x", f"--cache={cache.path}", output]) == 2
    assert main([*arguments, "--gin.ROWS=5", output]) == 0


def test_config_of_a_run_runs_again(tmp_path: pathlib.Path, cache: PackedCache) -> None:
    arguments = ["select", f"--cache={cache.path}", "--gin_file=methods/random_rows.gin"]
    assert main([*arguments, "--gin.ROWS=5", f"--output_dir={tmp_path / 'a'}"]) == 0
    config = tmp_path / "a" / "config.gin"
    assert main(["select", f"--gin_file={config}", f"--output_dir={tmp_path / 'b'}"]) == 0
    assert (tmp_path / "b" / "row_ids.npy").read_bytes() == (
        tmp_path / "a" / "row_ids.npy"
    ).read_bytes()


@pytest.mark.parametrize("verb", verbs())
def test_help_lists_and_explains_every_setting(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    function = getattr(importlib.import_module(f"salt_jax.commands.{verb}"), verb)
    gin.clear_config()
    settings = [one for one in settings_of(function) if one.path and one.group is None]
    paths = [one.path for one in settings_of(function) if one.path]
    assert settings
    for one in settings:
        name = shortest(paths, one.path.removesuffix(".path"))
        assert text.count(f"  --{name}: ") == 1
        above = re.findall(r"^  ([\w.]+) \(.*\)$", text.partition(f"  --{name}: ")[0], re.M)
        assert (above or [""])[-1].removeprefix("all") == one.path.rpartition(".")[0]
        assert re.search(rf"^  --{name}: .*\n      \S", text, re.M), f"{name} is not explained"
    assert "Raises:" not in text


def test_version_and_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert "salt_jax" in capsys.readouterr().out
    assert main([]) == 2
    assert "verbs:" in capsys.readouterr().out


@pytest.mark.parametrize(
    "verb", ["train", "score", "select", "evaluate", "generate", "plan", "report"]
)
def test_no_verb_but_prepare_imports_tensorflow_or_torch(verb: str) -> None:
    code = (
        "import sys; from salt_jax.cli.command_line import parse_arguments\n"
        "from salt_jax.cli.configuration import configure\n"
        f"import salt_jax.commands.{verb}\n"
        "bad = {'tensorflow', 'seqio', 'tensorflow_datasets', 'torch'} & set(sys.modules)\n"
        "sys.exit(f'imported: {bad}' if bad else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_plain_install_holds_configs_and_tasks(tmp_path: pathlib.Path) -> None:
    """A plain install finds gin files and tasks by the names that a clone has."""
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"),
            *("--no-build-isolation", "--target", str(tmp_path / "site"), str(ROOT)),
        ],
        check=True,
    )
    code = (
        "import pathlib, salt_jax; p = pathlib.Path(salt_jax.__file__).parent; print(p)\n"
        "assert (p / 'configs' / 'methods' / 'salt_ds.gin').is_file()\n"
        "import importlib.util; assert importlib.util.find_spec('salt_jax.tasks')\n"
        "import salt_jax.commands, gin; assert hasattr(gin, 'parse_config')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert str(tmp_path / "site") in result.stdout
    assert (
        not (tmp_path / "site" / "gin").exists()
        or (tmp_path / "site" / "gin" / "__init__.py").exists()
    )
    assert not (tmp_path / "site" / "tasks").exists()


def test_gin_stays_importable_in_a_clone() -> None:
    code = "import gin; assert hasattr(gin, 'parse_config'), gin"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_start_ends_in_one_sentence(number: signal.Signals) -> None:
    code = (
        "import salt_jax.__main__ as m, salt_jax.main as n, time\n"
        "n.main = lambda: (print('ready', flush=True), time.sleep(99))\n"
        "m.run()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, error = process.communicate()
    assert process.returncode == 75
    assert error == f"salt: stopped by {number.name}: run the same command again.\n"
