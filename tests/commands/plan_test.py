"""`salt plan` as a command: train's settings, a teacher of its own, what fits and what does not."""

import importlib
import json
import pathlib
import shlex
from typing import Any

import jax
import pytest

import gin
from salt_jax.cli.command_line import parse_arguments
from salt_jax.cli.configuration import configure
from salt_jax.data.packed_cache import PackedCache
from salt_jax.main import main
from salt_jax.planning import topologies
from salt_jax.planning.compile import CompiledStage, Job

IMPORTS = "from __gin__ import dynamic_registration\n"
TEACHER = (
    IMPORTS
    + "from salt_jax.models import decoder\n"
    + "decoder.DecoderConfig.embed_dim = 16\n"
    + "decoder.DecoderConfig.num_layers = 1\n"
    + "decoder.DecoderConfig.num_heads = 2\n"
    + "decoder.DecoderConfig.mlp_dim = 32\n"
)
STUDENT = (
    IMPORTS
    + "from salt_jax.commands import plan\n"
    + "from salt_jax.models import decoder\n"
    + "include 'runs/pretrain.gin'\ninclude 'hardware/fsdp.gin'\n"
    + "LEARNING_RATE = 1e-3\n"
    + "decoder.DecoderConfig.embed_dim = 64\n"
    + "decoder.DecoderConfig.num_layers = 2\n"
    + "decoder.DecoderConfig.num_heads = 4\n"
    + "decoder.DecoderConfig.num_kv_heads = 2\n"
    + "decoder.DecoderConfig.mlp_dim = 128\n"
    + "decoder.DecoderConfig.dtype = 'bfloat16'\n"
    + "plan.plan.vocab_size = 500\nplan.plan.sequence_length = 32\n"
)
SIZES = ["--steps=100", "--batch_size=32"]


@pytest.fixture
def files(tmp_path: pathlib.Path) -> dict[str, pathlib.Path]:
    """A student's run and a teacher's model, as gin files."""
    written = {"run": tmp_path / "run.gin", "teacher": tmp_path / "teacher.gin"}
    written["run"].write_text(STUDENT)
    written["teacher"].write_text(TEACHER)
    return written


@pytest.fixture
def salt(files: dict[str, pathlib.Path]) -> list[str]:
    """The arguments of a plan of SALT on the devices at hand."""
    return [
        *("plan", f"--gin_file={files['run']}", "--gin_file=methods/salt.gin", "--gin.N_KD=25"),
        *(f"--teacher_model={files['teacher']}", *SIZES),
    ]


def run(arguments: list[str], folder: pathlib.Path, code: int = 0) -> dict[str, Any]:
    assert main([*arguments, f"--output_dir={folder}"]) == code
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def error_of(arguments: list[str], folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main([*arguments, f"--output_dir={folder}"]) == 2
    assert not folder.exists()
    return capsys.readouterr().err


def test_plans_both_stages(
    salt: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No cache, no teacher's folder: train's required settings that a plan has no use for."""
    summary = run(salt, tmp_path / "plan")
    (plan,) = summary["plans"]
    assert summary["arm"] == "salt"
    assert plan["topology"] == "local"
    assert plan["chips"] == len(jax.devices())
    assert plan["mesh"]["fsdp"] == len(jax.devices())
    assert [stage["stage"] for stage in plan["stages"]] == [1, 2]
    first, second = plan["stages"]
    assert first["fits"] is second["fits"] is None  # a CPU's memory is not known
    assert first["peak_hbm_gib"] == pytest.approx(sum(first["breakdown_gib"].values()))
    assert first["flops_per_step"] > second["flops_per_step"]
    assert first["breakdown_gib"]["teacher"] > 0 == second["breakdown_gib"]["teacher"]
    assert first["collective_bytes_per_step"]["all-gather"] > 0
    assert plan["run"]["stage1_steps"] == 25
    assert plan["run"]["flops"] == pytest.approx(
        25 * first["flops_per_step"] + 75 * second["flops_per_step"]
    )
    printed = capsys.readouterr().out
    assert "25 of them with a teacher" in printed
    assert "Soft labels of 64 ids for each token of stage 1:" in printed
    assert plan["stored_labels"]["terabytes"]["float16"] > 0
    assert "1 distil" in printed
    assert "2 plain" in printed


def test_settings_come_from_train(salt: list[str]) -> None:
    typed = [*salt, "--gin.config.Devices.microbatches=2", "--stage1_microbatches=4"]
    seen = gin.get_bindings(configure(parse_arguments(typed)))["config"]
    assert (seen.steps, seen.method.schedule.n_kd, seen.method.arm) == (100, 25, "salt")
    assert (seen.devices.microbatches, seen.devices.stage1_microbatches) == (2, 4)
    assert seen.data.cache is seen.method.teacher.path is None


def test_own_settings_come_first(salt: list[str]) -> None:
    typed = [*salt, "--gin.config.TrainConfig.steps=7", "--gin.config.Method.arm='x'"]
    seen = gin.get_bindings(configure(parse_arguments(typed)))["config"]
    assert (seen.steps, seen.method.arm) == (100, "x")


def test_what_both_need_is_demanded(
    salt: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without = [argument for argument in salt if not argument.startswith("--steps")]
    assert (
        "salt: steps must be set (runs/pretrain.gin leaves it open): add --steps=VALUE"
        in error_of(without, tmp_path / "plan", capsys)
    )
    without = [argument for argument in salt if "N_KD" not in argument]
    assert "N_KD must be set" in error_of(without, tmp_path / "plan", capsys)
    without = [argument for argument in salt if "teacher_model" not in argument]
    assert "add --teacher_model=models/" in error_of(without, tmp_path / "plan", capsys)


def test_the_teacher_is_read_in_isolation(salt: list[str], tmp_path: pathlib.Path) -> None:
    configure(parse_arguments(salt))
    seen = gin.get_bindings("plan.plan")
    assert seen["config"].model.num_kv_heads == 2
    assert seen["config"].model.dtype == "bfloat16"
    teacher = seen["teacher_model"]
    assert (teacher.embed_dim, teacher.num_layers) == (16, 1)
    assert teacher.num_kv_heads is None
    assert teacher.dtype == "float32"


def test_the_teacher_computes_as_the_student(
    salt: list[str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[Job] = []

    def compile_stage(job: Job, topology: object, stage: int) -> CompiledStage:
        jobs.append(job)
        return CompiledStage(0.0, None)

    monkeypatch.setattr("salt_jax.planning.stage_plan.compile_stage", compile_stage)
    run([*salt, "--try_changes=false"], tmp_path / "plan", code=2)
    teacher = jobs[0].teacher
    assert teacher is not None
    assert (teacher.embed_dim, teacher.vocab_size, teacher.dtype) == (16, 500, "bfloat16")


def test_a_file_of_the_package_with_includes(salt: list[str]) -> None:
    configure(parse_arguments([*salt, "--teacher_model=models/slm_1_5b.gin"]))
    teacher = gin.get_bindings("plan.plan")["teacher_model"]
    assert teacher.embed_dim == 2048
    assert teacher.dtype == "bfloat16"  # of the file that it includes


def test_any_model_setting_may_name_a_file(files: dict[str, pathlib.Path]) -> None:
    arguments = ["train", "--gin_file=runs/pretrain.gin", "--gin_file=methods/baseline.gin", *SIZES]
    arguments += ["--gin.LEARNING_RATE=1e-3", "--cache=x", f"--model={files['teacher']}"]
    configure(parse_arguments(arguments))
    assert gin.get_bindings("train.train")["config"].model.embed_dim == 16


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("decoder.DecoderConfig.mlp_dim = %MLP\n", "%MLP has no place in a model's file"),
        ("decoder.DecoderConfig.mlp_dim = @x.y()\n", "@x.y() has no place in a model's file"),
        ("config.TrainConfig.steps = 3\n", "config.TrainConfig has no place in a model's file"),
        ("MLP = 3\n", "MLP has no place"),
        ("decoder.DecoderConfig.mlp_dims = 3\n", "nearest: mlp_dim"),
        ("decoder.DecoderConfig.mlp_dim = 0\n", "mlp_dim is 0"),
        ("decoder.DecoderConfig.mlp_dim = [3\n", "teacher.gin"),
        ("include 'models/none.gin'\n", "There is no gin file models/none.gin"),
    ],
)
def test_a_teacher_that_cannot_be_read(
    salt: list[str],
    files: dict[str, pathlib.Path],
    text: str,
    expected: str,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files["teacher"].write_text(TEACHER + text)
    error = error_of(salt, tmp_path / "plan", capsys)
    assert expected in error
    assert len(error.strip().splitlines()) == 1


def test_a_teacher_with_missing_settings(
    salt: list[str],
    files: dict[str, pathlib.Path],
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files["teacher"].write_text(TEACHER.replace("decoder.DecoderConfig.mlp_dim = 32\n", ""))
    assert "does not set mlp_dim" in error_of(salt, tmp_path / "plan", capsys)
    missing = [*salt, "--teacher_model=models/slm_15b.gin"]
    assert "nearest: models/slm_1_5b.gin" in error_of(missing, tmp_path / "plan", capsys)


def test_config_of_a_plan_plans_again(salt: list[str], tmp_path: pathlib.Path) -> None:
    first = run(salt, tmp_path / "a")
    again = run(["plan", f"--gin_file={tmp_path / 'a' / 'config.gin'}"], tmp_path / "b")
    for summary in (first, again):
        for stage in summary["plans"][0]["stages"]:
            del stage["compile_seconds"]
    assert first == again


def test_plain_training_has_one_stage(
    files: dict[str, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    arguments = ["plan", f"--gin_file={files['run']}", "--gin_file=methods/baseline.gin", *SIZES]
    summary = run([*arguments, "--hbm_gib=1"], tmp_path / "plan")
    (plan,) = summary["plans"]
    assert [stage["stage"] for stage in plan["stages"]] == [2]
    assert summary["teacher_parameters"] is None
    assert plan["hbm_gib"] == 1


def test_what_does_not_fit_gets_a_change_that_does(
    salt: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sized = [*salt, "--gin.losses.LossConfig.chunk_tokens=64", "--sequence_length=64"]
    free = run(sized, tmp_path / "free")["plans"][0]["stages"]
    limit = free[0]["peak_hbm_gib"] * 0.9
    stages = run([*sized, f"--hbm_gib={limit}"], tmp_path / "plan")["plans"][0]["stages"]
    first = stages[0]
    assert not first["fits"]
    assert first["needed_gib"] == first["peak_hbm_gib"] > limit
    assert "config.Devices.stage1_microbatches" in first["change"]["settings"]
    assert first["change"]["peak_hbm_gib"] <= limit
    assert first["tried"][-1]["settings"].items() <= first["change"]["settings"].items()
    printed = capsys.readouterr().out
    assert "It fits, as shown, with --stage1_microbatches=" in printed
    # What it proposes does what it says.
    flags = shlex.split(first["change"]["flags"])
    after = run([*sized, f"--hbm_gib={limit}", *flags], tmp_path / "after")["plans"][0]["stages"][0]
    assert after["fits"]
    assert after["peak_hbm_gib"] == first["change"]["peak_hbm_gib"]


def test_what_cannot_fit_says_so(
    salt: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = [*salt, "--hbm_gib=1e-6", "--try_changes=false"]
    stages = run(nothing, tmp_path / "plan", code=2)["plans"][0]["stages"]
    assert [stage["fits"] for stage in stages] == [False, False]
    assert all(stage["change"] is None and stage["tried"] == [] for stage in stages)
    printed = capsys.readouterr()
    assert "local, stage 1 needs" in printed.out
    assert printed.err.startswith("salt: The run does not fit local: stage 1 needs 0.0")
    assert len(printed.err.splitlines()) == 1


def test_one_topology_that_fits_is_enough(
    salt: list[str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = importlib.import_module("salt_jax.commands.plan")
    found = iter([topologies.find("local", 1e-6), topologies.find("local", 1e3)])
    monkeypatch.setattr(command.topologies, "find", lambda *_: next(found))
    both = ["--topology=local", "--topology=local", "--try_changes=false"]
    plans = run([*salt, *both], tmp_path / "plan")["plans"]
    assert [plan["stages"][0]["fits"] for plan in plans] == [False, True]


def test_stored_soft_labels_stand_for_the_teacher(
    salt: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder need not be there; the teacher of the run before is not in memory."""
    stored = [*salt, "--gin_file=methods/soft_labels.gin"]
    error = error_of(stored, tmp_path / "plan", capsys)
    assert "salt: soft_labels must be set (methods/soft_labels.gin leaves it open)" in error
    stored += ["--soft_labels=not/there/yet", "--stored_ids=8"]
    summary = run(stored, tmp_path / "labels")
    (plan,) = summary["plans"]
    first, second = plan["stages"]
    assert first["breakdown_gib"]["teacher"] == 0
    assert first["flops_per_step"] == second["flops_per_step"]
    # int32 ids and float16 log q, and two float16 a token more than a plain step's batch.
    own_tokens = summary["tokens_per_step"] / plan["chips"]
    more = first["breakdown_gib"]["batch"] - second["breakdown_gib"]["batch"]
    assert more * 2**30 == pytest.approx(own_tokens * (8 * 6 + 2 * 2))
    assert plan["stored_labels"] is None
    assert plan["read_labels"]["k"] == 8
    tokens = 25 * summary["tokens_per_step"]
    for encoding, size in plan["read_labels"]["bytes_per_token"].items():
        assert plan["read_labels"]["terabytes"][encoding] == pytest.approx(size * tokens / 1e12)
    printed = capsys.readouterr().out
    assert "25 of them with stored soft labels of 8 ids a token" in printed
    assert "Stage 1 reads soft labels of 8 ids per token" in printed
    objectives = [*stored, "--gin_file=objectives/ul2.gin"]
    assert "objectives changes rows" in error_of(objectives, tmp_path / "plan", capsys)


def test_objectives_are_planned_with(
    salt: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = run(salt, tmp_path / "plain")
    ul2 = [*salt, "--gin_file=objectives/ul2.gin", "--teacher.objectives=causal"]
    ul2 += ["--gin.denoisers.Objectives.bidirectional_prefix=True"]
    changed = run(ul2, tmp_path / "ul2")
    rows = changed["tokens_per_step"] / 32 / changed["plans"][0]["chips"]
    for before, after in zip(
        *(summary["plans"][0]["stages"] for summary in (plain, changed)), strict=True
    ):
        assert after["flops_per_step"] == before["flops_per_step"]  # rows stay as long
        more = after["breakdown_gib"]["batch"] - before["breakdown_gib"]["batch"]
        assert more * 2**30 == pytest.approx(rows * (4 + 32))  # a weight a row, a bool a token
    splash = [*ul2, "--gin.decoder.DecoderConfig.attention_backend='splash'"]
    assert "bidirectional_prefix" in error_of(splash, tmp_path / "plan", capsys)
    some = [*ul2, "--teacher.objectives=some"]
    assert "The teacher's objectives are 'some'" in error_of(some, tmp_path / "plan", capsys)


def test_cache_gives_vocabulary_and_length(
    salt: list[str], cache: PackedCache, tmp_path: pathlib.Path
) -> None:
    summary = run([*salt, f"--cache={cache.path}"], tmp_path / "plan")
    assert summary["tokens_per_step"] == 32 * cache.sequence_length
    padded = -(-cache.vocabulary_size // 128) * 128
    blocks = summary["parameters"] - 64 * padded
    without = run(salt, tmp_path / "other")
    assert without["tokens_per_step"] == 32 * 32
    assert without["parameters"] == blocks + 64 * 512


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--topology=v9:4x4", "There is no topology 'v9:4x4'; known are local, v4:"),
        ("--sequence_length=4096", "DecoderConfig.max_length is 2048"),
        ("--batch_size=0", "batch_size is 0"),
        ("--batch_size=12", "can't be split over"),
        ("--gin.partitioning.MeshConfig.tensor=3", "MeshConfig"),
        ("--cache=nowhere", "nowhere"),
    ],
)
def test_bad_input(
    salt: list[str],
    flag: str,
    expected: str,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert expected in error_of([*salt, flag], tmp_path / "plan", capsys)


def test_slices_that_are_not_there(salt: list[str], tmp_path: pathlib.Path) -> None:
    pytest.importorskip("libtpu", reason="it is not installed: pip install 'salt_jax[plan]'")
    plans = run([*salt, "--topology=v5e:2x2", "--topology=v4:2x2x1"], tmp_path / "plan")["plans"]
    assert [plan["topology"] for plan in plans] == ["v5e:2x2", "v4:2x2x1"]
    for plan in plans:
        assert plan["chips"] == 4
        for stage in plan["stages"]:
            assert stage["fits"]
            assert 0 < stage["mfu_estimate"] < 1
        assert plan["run"]["chip_hours"] == pytest.approx(plan["run"]["days"] * 24 * 4)
        assert plan["run"]["teacher_overhead"] > 0
