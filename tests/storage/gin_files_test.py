"""gin files of other people's habits: T5X's blocks, byte order marks, other line ends."""

import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest

import gin
from salt_jax.cli.command_line import SAFE_GIN, parse_arguments
from salt_jax.cli.configuration import configure
from salt_jax.errors import InputError
from salt_jax.main import main
from salt_jax.storage import gin_files

IMPORTS = """from __gin__ import dynamic_registration
from salt_jax.models import decoder
from salt_jax.training import config
"""
PLAIN = f"""{IMPORTS}
WIDTH = 32
config.TrainConfig.steps = 10
config.Data.batch_size = 8
config.Data.cache = ('one', '%OTHER = 3')
config.TrainConfig.seed = 3
decoder.DecoderConfig.embed_dim = %WIDTH
decoder.DecoderConfig.num_layers = 2
decoder.DecoderConfig.num_heads = 2
decoder.DecoderConfig.mlp_dim = 64
"""
BLOCKS = f"""{IMPORTS}
# A comment that says %OTHER = 3 and ends in a colon:
config.TrainConfig:  # with a comment
    # T5X's habit

    steps = \\
        10

# at the margin, in the middle of a block
    seed = 3
config.Data:
    batch_size = 8
    cache = (
        'one',  # as config.TrainConfig.seed = 5
    '%OTHER = 3',
    )
WIDTH = 32
decoder.DecoderConfig:
\tembed_dim = %WIDTH
\tnum_layers = 2; num_heads = 2
\tmlp_dim = 64"""
BLOCKS = BLOCKS.replace("; num", "\n\tnum")

PRETRAIN = (
    *("--gin_file=runs/pretrain.gin", "--gin.LEARNING_RATE=1e-3", "--cache=cache", "--steps=10"),
    *("--batch_size=8", "--gin_file=models/slm_smoke.gin"),
)


def settings(typed: list[str]) -> Any:
    """What `salt train` would be called with."""
    return gin.get_bindings(configure(parse_arguments(typed)))["config"]


def no_includes(name: str, _: str) -> str:
    raise AssertionError(f"{name} is included")


@pytest.fixture
def mine(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A folder of files of one's own, in which `salt` is typed."""
    for name, text in (("plain.gin", PLAIN), ("blocks.gin", BLOCKS)):
        includes = "include 'runs/pretrain.gin'\ninclude 'methods/salt.gin'\n"
        (tmp_path / name).write_text(f"{includes}LEARNING_RATE = 1e-3\nN_KD = 5\n{text}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(SAFE_GIN, "")
    return tmp_path


def bindings(file: pathlib.Path) -> dict[str, object]:
    statements = gin_files.statements_of(str(file), no_includes)
    return {name: binding.value for name, binding in gin_files.bindings_in(statements)}


def test_a_block_is_its_lines(tmp_path: pathlib.Path) -> None:
    (tmp_path / "plain.gin").write_text(PLAIN)
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "blocks.gin").write_bytes(BLOCKS.replace("\n", end).encode("utf-8-sig"))
        assert bindings(tmp_path / "blocks.gin") == bindings(tmp_path / "plain.gin")
    assert bindings(tmp_path / "plain.gin")["WIDTH"] == 32


def test_includes_take_effect_where_they_stand(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a").write_text("A = 1\ninclude 'b'\na/B = (1, {%C: @x/y.Z()})\n")
    (tmp_path / "b").write_text("C = %gin.REQUIRED\n")
    found = gin_files.statements_of(str(tmp_path / "a"), lambda name, _: str(tmp_path / name))
    named = list(gin_files.bindings_in(found))
    assert [name for name, _ in named] == ["A", "C", "a/B"]
    assert named[1][1].value == gin_files.REQUIRED
    assert gin_files.place_of(named[1][1]) == f"{tmp_path / 'b'}, line 1"
    references = list(gin_files.references_in(named[2][1].value))
    assert [one.macro for one in references] == ["C", ""]
    assert [one.configurable for one in references] == ["", "y.Z"]


@pytest.mark.parametrize("safe", [(), ("--safe_gin",)])
@pytest.mark.parametrize("name", ["plain.gin", "blocks.gin"])
def test_blocks_mean_the_same_to_a_verb(
    name: str, safe: tuple[str, ...], mine: pathlib.Path
) -> None:
    (mine / "outer.gin").write_text(f"include '{name}'\n")
    typed = ["train", *safe, "--gin_file=outer.gin", "--teacher=slm", "--gin.OMEGA=0.5"]
    seen = settings(typed)
    assert (seen.steps, seen.seed, seen.data.cache) == (10, 3, ("one", "%OTHER = 3"))
    assert seen.model.embed_dim == 32
    assert seen.method.schedule.omega == 0.5


def test_an_unsafe_line_of_a_block_is_named(
    mine: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "from salt_jax.commands import train\nconfig.TrainConfig:\n  seed = 3\n"
    (mine / "bad.gin").write_text(f"{IMPORTS}{text}  steps = @train.train()\n")
    assert main(["train", "--safe_gin", "--gin_file=bad.gin", "--output_dir=out"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("salt: bad.gin, line 7: train.train is not among the names that --safe_")


def test_with_a_schedule_of_ones_own_nothing_uses_what_files_set_or_leave_open(
    mine: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(mine)
    (mine / "own_ramp.py").write_text(
        "class Ramp:\n  def __init__(self, top): self.top = top\n"
        "class Other:\n  def __init__(self, size): pass\n"
    )
    ramp = "import own_ramp\nconfig.Method.schedule = @own_ramp.Ramp()\nown_ramp.Ramp.top = %TOP\n"
    for include in ("distillation", "salt", "salt_linear"):
        text = f"{IMPORTS}\n{ramp}TOP = %gin.REQUIRED\ninclude 'methods/{include}.gin'\n"
        text += "config.Method.schedule = @own_ramp.Ramp()\n"
        (mine / "own.gin").write_text(text)
        typed = ["train", *PRETRAIN, "--gin_file=own.gin", "--teacher=slm", "--arm=own"]
        with pytest.raises(InputError, match=r"^TOP must be set \(own.gin leaves it open\)"):
            configure(parse_arguments(typed))
        assert settings([*typed, "--gin.TOP=3"]).method.schedule.top == 3
    # Code of one's own may ask gin for what no setting refers to.
    (mine / "own.gin").write_text(f"{text}own_ramp.Other.size = %gin.REQUIRED\n")
    with pytest.raises(InputError, match=r"^own_ramp\.Other\.size must be set"):
        configure(parse_arguments([*typed, "--gin.TOP=3"]))


def test_what_a_block_leaves_open_is_asked_for_where_it_is_used(
    mine: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (mine / "open.gin").write_text(
        "include 'blocks.gin'\nfrom __gin__ import dynamic_registration\n"
        "from salt_jax.training import config as settings\nsettings.Data:\n"
        "  cache = %gin.REQUIRED\nsettings.Teacher:\n  path = 'slm'\n"
    )
    assert main(["train", "--gin_file=open.gin", "--output_dir=out"]) == 2
    said = capsys.readouterr().err
    assert said == "salt: cache must be set (open.gin leaves it open): add --cache=VALUE.\n"
    # `salt plan` needs no cache, and takes the rest from train's blocks
    typed = ["plan", "--gin_file=open.gin", "--teacher_model=models/slm_smoke.gin"]
    seen = gin.get_bindings(configure(parse_arguments(typed)))
    config = seen["config"]
    assert (config.steps, config.data.batch_size, config.data.cache) == (10, 8, None)
    assert config.model.mlp_dim == 64
    assert seen["teacher_model"].num_layers > 0


def test_the_file_of_a_model_has_blocks_and_a_byte_order_mark(mine: pathlib.Path) -> None:
    text = BLOCKS[BLOCKS.index("decoder.DecoderConfig") :].replace("%WIDTH", "48")
    imports = IMPORTS.replace("from salt_jax.training import config\n", "")
    (mine / "teacher.gin").write_bytes((imports + text).encode("utf-8-sig"))
    typed = ["plan", "--gin_file=blocks.gin", "--teacher_model=teacher.gin"]
    for safe in ([], ["--safe_gin"]):
        seen = gin.get_bindings(configure(parse_arguments([*typed, *safe])))
        assert (seen["teacher_model"].embed_dim, seen["config"].model.embed_dim) == (48, 32)


def test_a_flag_sets_a_macro_that_something_uses(mine: pathlib.Path) -> None:
    """What only a comment or a text speaks of is not used."""
    typed = ["train", "--gin_file=blocks.gin", "--teacher=slm", "--gin.OTHER=3"]
    with pytest.raises(InputError, match=r"There is no macro --gin\.OTHER; the macros are: "):
        configure(parse_arguments(typed))
    typed[-1] = "--gin.big/WIDTH=3"
    with pytest.raises(InputError, match=r"There is no macro --gin\.big/WIDTH \(nearest: WIDTH\)"):
        configure(parse_arguments(typed))


def test_files_are_utf_8_whatever_the_locale(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.gin").write_text("A = 'fumé ▁'\n", encoding="utf-8")
    code = (
        "import sys; from salt_jax.storage import gin_files as g\n"
        "[(_, b)] = g.bindings_in(g.statements_of(sys.argv[1], None))\n"
        "print(ascii(b.value))"
    )
    told = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", code, str(tmp_path / "a.gin")],
        env={**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout == ascii("fumé ▁") + "\n"


def test_a_group_in_a_scope_takes_flags_and_asks_for_what_is_open(mine: pathlib.Path) -> None:
    (mine / "scoped.gin").write_text(
        f"include 'runs/pretrain.gin'\ninclude 'methods/baseline.gin'\n{IMPORTS}"
        "config.TrainConfig.data = @mine/config.Data()\nmine/config.Data.seed = 5\n"
    )
    typed = ["train", "--gin_file=scoped.gin", *PRETRAIN[1:]]
    config = settings(typed)
    assert (config.data.cache, config.data.batch_size, config.data.seed) == ("cache", 8, 5)
    with pytest.raises(InputError, match=r"^cache must be set .* add --cache"):
        settings([flag for flag in typed if not flag.startswith("--cache")])
    with pytest.raises(InputError, match=r"^mine/config\.Data\.seed is 'x'"):
        settings([*typed, "--data.seed=x"])


@pytest.mark.parametrize("flag", ["--initial=base", "--initial.path=base"])
def test_a_flag_of_a_group_makes_it_where_a_file_says_none(mine: pathlib.Path, flag: str) -> None:
    (mine / "none.gin").write_text(f"{IMPORTS}config.TrainConfig.initial = None\n")
    typed = ["train", *PRETRAIN, "--gin_file=methods/baseline.gin", "--gin_file=none.gin"]
    assert settings(typed).initial is None
    assert settings([*typed, flag]).initial.path == "base"


@pytest.mark.parametrize(
    ("line", "brackets"),
    [
        ("config.TrainConfig.data = @config.Data", "@Data()"),
        ("config.Method.schedule = @big/schedules.NoDistillation", "@big/NoDistillation()"),
    ],
)
def test_a_class_without_its_brackets_is_refused(
    mine: pathlib.Path, line: str, brackets: str
) -> None:
    text = f"{IMPORTS}from salt_jax.distill import schedules\n{line}\n"
    (mine / "class.gin").write_text(text)
    typed = ["train", *PRETRAIN, "--gin_file=methods/baseline.gin", "--gin_file=class.gin"]
    with pytest.raises(InputError, match=re.escape(f"{line.partition(' ')[0]} is the class")) as it:
        settings(typed)
    assert str(it.value).endswith(f"add the brackets, {brackets}.")


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("seed", "config.Data"),
        ("data", "config.Teacher"),
        ("teacher", "config.Data"),
        ("schedule", "config.Data"),
        ("learning_rate", "config.Data"),
    ],
)
def test_an_object_of_another_kind_is_refused(mine: pathlib.Path, name: str, made: str) -> None:
    typed = ["train", *PRETRAIN, "--gin_file=methods/salt.gin", "--gin.N_KD=3", "--teacher=base"]
    settings(typed)
    with pytest.raises(InputError, match=rf"{name} is set to @{made.partition('.')[2]}\(\), "):
        settings([*typed, f"--{name}=@{made}()"])


@pytest.mark.parametrize("group", ["data", "method", "method.loss", "devices.mesh", "checkpoints"])
def test_a_group_that_must_be_is_not_none(mine: pathlib.Path, group: str) -> None:
    typed = ["train", *PRETRAIN, "--gin_file=methods/baseline.gin", f"--{group}=None"]
    with pytest.raises(InputError, match=rf"{group.rpartition('.')[2]} is None, expected an? "):
        settings(typed)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("seed", "config.TrainConfig.seed"),
        ("data_seed", "config.Data.seed"),
        ("teacher", "config.Teacher.path"),
        ("teacher_step", "config.Teacher.step"),
        ("evaluation_rows", "config.Evaluation.rows"),
    ],
)
def test_settings_of_older_versions_are_answered_by_the_new_ones(
    mine: pathlib.Path, capsys: pytest.CaptureFixture[str], old: str, new: str
) -> None:
    header = "from __gin__ import dynamic_registration\nfrom salt_jax.commands import train\n"
    (mine / "old.gin").write_text(f"{header}train.train.{old} = 3\n")
    assert main(["train", "--gin_file=old.gin", "--output_dir=out"]) == 2
    assert f"old.gin, line 3: train.train has no setting {old} (nearest: {new})" in (
        capsys.readouterr().err
    )
    if old.endswith(("_step", "_rows", "_seed")):
        assert main(["train", *PRETRAIN, f"--{old}=3", "--output_dir=out"]) == 2
        assert re.search(rf"nearest: --[\w.]*{old.split('_')[1]}\)", capsys.readouterr().err)
