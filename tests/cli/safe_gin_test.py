"""--safe_gin: our own files pass, and a file that would run anything is one sentence."""

import importlib
import inspect
import os
import pathlib
import re

import pytest

import gin
from salt_jax.cli import safe_gin
from salt_jax.cli.command_line import SAFE_GIN, parse_arguments, verb_help, verbs
from salt_jax.cli.config_files import CONFIGS, find_gin_file
from salt_jax.errors import InputError
from salt_jax.main import main
from salt_jax.training import compilation

OWN_FILES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.gin"))
OURS = (
    "from __gin__ import dynamic_registration\nfrom salt_jax.commands import train\n"
    "from salt_jax.training import config\n"
)
FEW_SHOT = "from salt_jax.evaluation import few_shot"
MARK = "run_by_gin"

_calls: list[str] = []


@gin.register(module="anyones_library")
def run_it() -> int:
    """What any module that is there may have given gin, by a name that files may use."""
    _calls.append("run")
    return 3


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flag is handed on by the environment, which other tests read too."""
    monkeypatch.setenv(SAFE_GIN, "")


@pytest.fixture
def bad_module(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A module that gin could import; gives the file that importing it makes."""
    made = tmp_path / MARK
    (tmp_path / "not_ours.py").write_text(f"open({str(made)!r}, 'w').close()\nseed = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    return made


def refusal(
    text: str, folder: pathlib.Path, capsys: pytest.CaptureFixture[str], *flags: str
) -> str:
    """What `salt train --safe_gin` says of a file of this text."""
    (folder / "mine.gin").write_text(text)
    output = folder / "out"
    typed = ["train", "--safe_gin", f"--gin_file={folder}/mine.gin", *flags]
    assert main([*typed, f"--output_dir={output}"]) == 2
    assert not output.exists()
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize("file", OWN_FILES)
def test_our_own_files_pass(file: str) -> None:
    path = find_gin_file(file)
    # Those of T5X's own train.py, and a task that a module of anyone's registers.
    if file.startswith("t5x/") or file == "data/registered.gin":
        with pytest.raises(InputError, match=r"line \d+: .*--safe_gin"):
            safe_gin.require_safe_file(path, find_gin_file)
    else:
        safe_gin.require_safe_file(path, find_gin_file)


@pytest.mark.parametrize("name", sorted(safe_gin.NAMES))
def test_every_name_is_a_public_one_of_ours(name: str) -> None:
    module, _, last = name.rpartition(".")
    found = getattr(importlib.import_module(module), last)
    assert callable(found)
    assert found.__module__.startswith("salt_jax.")


def test_every_setting_that_runs_code_is_one_of_a_verb() -> None:
    for name, harmless in safe_gin.RUN_CODE.items():
        owner, _, setting = name.partition(".")
        groups = {"Devices": "training.config", "FewShot": "evaluation.few_shot"}
        groups["JobRunner"] = "preparation.runners"
        module = groups.get(owner, f"commands.{owner}")
        function = getattr(importlib.import_module(f"salt_jax.{module}"), owner)
        assert inspect.signature(function).parameters[setting].default in harmless


IMPORTS = [
    "import not_ours",
    "import not_ours as train",
    "from not_ours import seed",
    "import salt_jax_and_more",
    "import os.path",
    "from salt_jax import not_of_ours",
    "import salt_jax.preparation.registered_task",
    "from salt_jax.evaluation.tasks import programs",
    "import __gin__.dynamic_registration",
]


@pytest.mark.parametrize("line", IMPORTS)
def test_other_modules_are_not_imported(
    line: str,
    bad_module: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = refusal(f"{OURS}{line}\n", bad_module.parent, capsys)
    assert "mine.gin, line 4: --safe_gin keeps gin from importing" in said
    assert not bad_module.exists()


def test_gin_itself_would_import_them(
    bad_module: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the flag is for."""
    (bad_module.parent / "mine.gin").write_text("import not_ours\n")
    typed = ["train", f"--gin_file={bad_module.parent}/mine.gin"]
    assert main([*typed, f"--output_dir={bad_module.parent / 'out'}"]) == 2
    assert bad_module.exists()


@pytest.mark.parametrize(
    "typed",
    [
        ["--gin.config.TrainConfig.seed=3\nimport not_ours"],
        ["--seed=@train.train\nimport not_ours"],
        ["--cache=nowhere", "--gin.config.TrainConfig.seed=%X\nX = 1\nimport not_ours"],
    ],
)
def test_nor_by_a_binding(
    typed: list[str], bad_module: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal("", bad_module.parent, capsys, *typed)
    # What is no single value, or a verb as one, is refused before that, or is a text.
    assert re.search(r"--safe_gin|cannot be parsed|is not set|expected a whole number", said)
    assert not bad_module.exists()
    with pytest.raises(InputError, match="the command line: --safe_gin keeps gin from importing"):
        safe_gin.require_safe_bindings(f"{OURS}config.TrainConfig.seed = 3\nimport not_ours")


def test_nor_by_an_included_file(
    bad_module: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = bad_module.parent
    (folder / "inner.gin").write_text("\nimport not_ours\n")
    (folder / "outer.gin").write_text(f"include '{folder}/inner.gin'\n")
    said = refusal(f"include '{folder}/outer.gin'\n", folder, capsys)
    assert f"{folder}/inner.gin, line 2: --safe_gin" in said
    assert not bad_module.exists()


@pytest.mark.parametrize(
    ("imported", "line"),
    [
        ("from salt_jax.distill import schedules as losses", "X = @losses.LossConfig()"),
        ("import salt_jax.distill.losses", "X = @losses.LossConfig()"),
        ("", "X = @evaluate.evaluate"),
        ("", "config.Teacher.path = @train.train()"),
        (
            "from salt_jax.commands import convert",
            "config.Data.seed = (1, @convert.convert())",
        ),
        ("", "X = @run_it()"),
        ("", "X = @anyones_library.run_it()"),
        ("", "singleton.constructor = @train.train"),
        ("", "gin.singleton.constructor = @train.train"),
        ("", "config.TrainConfig.seed = @train.pathlib.Path.cwd()"),
        ("", "train.pathlib.os.system.command = 'touch x'"),
        ("", "X = {'a': [(1, @train.RunFolder)]}"),
        ("", "train.RunFolder:\n  path = 'x'"),
        ("", "X = @gin.macro.__globals__.get()"),
        (FEW_SHOT, "few_shot.FewShot.task_folder = 'tasks'"),
        (FEW_SHOT, "a/few_shot.FewShot.task_folder = %X\nX = ''"),
        (FEW_SHOT, "few_shot.FewShot.allow_code_execution = True"),
        (
            "from salt_jax.preparation import runners",
            "runners.JobRunner.runner = 'not_ours.Runner'",
        ),
    ],
)
def test_only_settings_are_bound(
    imported: str, line: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(f"{OURS}{imported}\n{line}\n", tmp_path, capsys)
    assert said.startswith(f"salt: {tmp_path}/mine.gin, line ")
    assert "--safe_gin" in said


@pytest.mark.parametrize(
    "text",
    [
        "RUN = @run_it()",
        "RUN = @anyones_library.run_it()",
        "import salt_jax.commands.train\nRUN = @run_it()",
        "RUN = @singleton()\nRUN/singleton.constructor = @run_it",
        "singleton.constructor = @macro",
        "x/macro.value = 3",
        "X = @x/macro()",
        "from salt_jax.training import config\nconfig.TrainConfig.steps = 3",
        "singleton:\n  constructor = 3",
        f"import salt_jax.commands.train as run_it\n{OURS}RUN = @run_it()",
    ],
)
def test_what_is_registered_elsewhere_is_out_of_reach(
    text: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without dynamic registration gin finds names wherever any module has registered them."""
    (tmp_path / "inner.gin").write_text(f"{text}\n")
    outer = f"{OURS}include '{tmp_path}/inner.gin'\nconfig.TrainConfig.steps = %RUN\n"
    said = refusal(outer, tmp_path, capsys, "--cache=nowhere")
    assert said.startswith(f"salt: {tmp_path}/inner.gin, line ")
    assert "not imported there" in said
    assert "--safe_gin" in said
    assert not _calls


def test_compiled_programs_are_ones_own(tmp_path: pathlib.Path) -> None:
    """Those of a folder are run as they are."""
    file, text = tmp_path / "mine.gin", f"{OURS}config.Devices.compilation_cache"
    for value in (compilation.DEFAULT_FOLDER, ""):
        file.write_text(f"{text} = {value!r}\n")
        safe_gin.require_safe_file(str(file), find_gin_file)
    file.write_text(f"{text} = 'theirs'\n")
    with pytest.raises(
        InputError, match=r"allows compilation_cache of Devices to be only '~.* or ''"
    ):
        safe_gin.require_safe_file(str(file), find_gin_file)


@pytest.mark.parametrize("line", ["import salt_jax.not_of_ours", "X = @run_it()"])
def test_the_file_of_a_model(
    line: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A setting names it, so that it is none of the gin files."""
    model = tmp_path / "model.gin"
    model.write_text(f"include '{CONFIGS}/models/llm_smoke.gin'\n{line}\n")
    files = ("runs/pretrain.gin", "methods/baseline.gin")
    said = refusal("".join(f"include '{f}'\n" for f in files), tmp_path, capsys, f"--model={model}")
    assert said.startswith(f"salt: {model}, line 2: ")
    assert "--safe_gin" in said


def test_harmless_values_of_those_settings_pass(tmp_path: pathlib.Path) -> None:
    """config.gin of a run holds them all."""
    file = tmp_path / "config.gin"
    lines = [f"from salt_jax.commands import {verb}\n" for verb in verbs()]
    lines.insert(0, "from __gin__ import dynamic_registration\n")
    lines += ["from salt_jax.training import config\n", f"{FEW_SHOT}\n"]
    lines.append("from salt_jax.preparation import runners\n")
    for name, harmless in safe_gin.RUN_CODE.items():
        owner = name.partition(".")[0]
        module = {"Devices": "config", "FewShot": "few_shot", "JobRunner": "runners"}.get(
            owner, owner
        )
        lines += [f"{module}.{name} = {value!r}\n" for value in harmless]
    file.write_text("".join(lines))
    safe_gin.require_safe_file(str(file), find_gin_file)


def test_the_flag_of_a_setting_that_runs_code(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = ["evaluate", "--safe_gin", "--task_folder=mine", f"--output_dir={tmp_path / 'out'}"]
    assert main(typed) == 2
    assert "--safe_gin allows task_folder of FewShot to be only None" in (capsys.readouterr().err)


def test_commands_that_a_command_starts_are_asked_for_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "mine.gin").write_text("import os\n")
    typed = ["report", "--safe_gin", f"--gin_file={tmp_path}/mine.gin", "--output_dir=x"]
    assert main(typed) == 2
    assert os.environ[SAFE_GIN] == "1"
    assert parse_arguments(["train", "--safe_gin=False"]).safe_gin
    monkeypatch.setenv(SAFE_GIN, "")
    assert not parse_arguments(["train", "--safe_gin=False"]).safe_gin
    assert not parse_arguments(["train"]).safe_gin
    with pytest.raises(InputError, match="--safe_gin is 'maybe', expected True or False"):
        parse_arguments(["train", "--safe_gin=maybe"])


def test_help_says_so() -> None:
    for verb in verbs():
        assert "can run any code by importing it" in verb_help(verb)
