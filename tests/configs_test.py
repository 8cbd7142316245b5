"""The gin files of models, hardware and the paper's runs: each says what its name promises."""

import dataclasses
import pathlib
import re
import sys
from typing import Any

import pytest

import gin
from salt_jax.cli.command_line import parse_arguments
from salt_jax.cli.config_files import CONFIGS
from salt_jax.cli.configuration import configure
from salt_jax.data.denoisers import Denoising, Objectives
from salt_jax.data.vocabularies import ByteVocabulary
from salt_jax.distill import gates, schedules
from salt_jax.distill.alignment import Alignment
from salt_jax.errors import InputError
from salt_jax.huggingface.model_config import config_from_json
from salt_jax.models.decoder import DecoderConfig
from salt_jax.training import flops
from salt_jax.training.learning_rates import (
    WarmupConstant,
    WarmupCosine,
    WarmupInverseSqrt,
    WarmupStableDecay,
)
from salt_jax.training.optimizers import Adafactor, AdamW, Muon
from salt_jax.training.partitioning import MeshConfig

VOCABULARY = 256_256  # SentencePiece's 256,000 and the 256 reserved of data/pile.gin
PAPER_TOKENS = 208_000 * 2048 * 1280
SIZES = {"slm_0_5b": 0.5e9, "slm_1_5b": 1.5e9, "llm_2_8b": 2.8e9, "llm_8_6b": 8.6e9}
TEACHERS = {"llm_2_8b": "slm_1_5b", "llm_8_6b": "llm_2_8b"}
METHODS = ("baseline", "rkd", "salt", "salt_ds")
CHIPS = {"v4_256": 128, "v4_512": 256, "v5p_256": 128, "v5e_256": 256, "v6e_256": 256}
GPUS = {"h100x8": 8, "h200": 1}
RUNS = [f"{model}_{method}" for model in TEACHERS for method in METHODS]
SLMS = ["slm_0_5b", "slm_1_5b"]

PYTHIA_IDS = 50_277
PYTHIA_TOKENS = 143_000 * 1024 * 2048
# Parameters as published, and what config.json has of each size.
PYTHIA = {
    "70m": (70_426_624, 512, 6, 8),
    "160m": (162_322_944, 768, 12, 12),
    "410m": (405_334_016, 1024, 24, 16),
    "1b": (1_011_781_632, 2048, 16, 8),
    "1_4b": (1_414_647_808, 2048, 24, 16),
    "2_8b": (2_775_208_960, 2560, 32, 32),
}
PYTHIA_RUNS = [
    "pythia_2_8b_baseline",
    "pythia_1_4b_to_2_8b_salt",
    "pythia_1_4b_to_2_8b_salt_ds",
]


def names(folder: str) -> set[str]:
    return {path.stem for path in (CONFIGS / folder).glob("*.gin")}


def text(name: str) -> str:
    return pathlib.Path(CONFIGS / name).read_text()


def settings(verb: str, *flags: str) -> dict[str, Any]:
    """What `salt VERB` would be called with, the groups of settings dissolved."""
    seen = gin.get_bindings(configure(parse_arguments([verb, *flags])))
    if "devices" in seen:
        seen |= vars(seen.pop("devices"))
    if "config" in seen:
        config = seen.pop("config")
        for group in (config, config.data, config.method, config.devices):
            seen |= {name: value for name, value in vars(group).items() if name not in seen}
        seen |= {"data_seed": config.data.seed, "initial": config.initial and config.initial.path}
        seen |= {"evaluate_every": config.evaluation.every, "cache_weights": config.data.weights}
        teacher = config.method.teacher
        seen |= {f"teacher_{name}": v for name, v in (vars(teacher) if teacher else {}).items()}
        seen["teacher"] = teacher and teacher.path
    optional = ("objectives", "teacher_model")
    return {name: x for name, x in seen.items() if x is not None or name not in optional}


def model(name: str, vocab_size: int = VOCABULARY) -> DecoderConfig:
    configure(parse_arguments([*PRETRAIN, f"--gin_file=models/{name}.gin"]))
    with gin.unlock_config():
        gin.bind_parameter("decoder.DecoderConfig.vocab_size", vocab_size)
    return gin.get_configurable(DecoderConfig)()


PRETRAIN = [
    *("train", "--gin_file=runs/pretrain.gin", "--gin_file=methods/baseline.gin"),
    *("--gin.LEARNING_RATE=1e-3", "--cache=CACHE", "--steps=10", "--batch_size=2048"),
]


@pytest.mark.parametrize("name", SIZES)
def test_a_model_is_as_large_as_its_name(name: str) -> None:
    assert model(name).num_parameters == pytest.approx(SIZES[name], rel=0.02)
    assert "vocab_size" not in text(f"models/{name}.gin")


def test_what_a_model_lacks_is_named_as_gin_files_name_it() -> None:
    with pytest.raises(
        InputError, match=r"^decoder\.DecoderConfig\.embed_dim is not set: add a gin file"
    ):
        settings(*PRETRAIN)
    flag = "--gin.decoder.DecoderConfig.embed_dim='wide'"
    with pytest.raises(InputError, match=r"^decoder\.DecoderConfig\.embed_dim is 'wide'"):
        settings(*PRETRAIN, "--gin_file=models/llm_2_8b.gin", flag)


@pytest.mark.parametrize("name", SIZES)
def test_a_models_dimensions_suit_accelerators(name: str) -> None:
    config = model(name)
    assert (config.dtype, config.param_dtype, config.remat) == ("bfloat16", "float32", "full")
    assert config.head_width == 128
    assert config.max_length >= 1280
    for size in (config.embed_dim, config.mlp_dim, config.padded_vocab_size):
        assert size % 128 == 0
    assert config.embed_dim % 256 == 0  # FSDP over 256 devices
    for size in (config.num_heads, config.kv_heads, config.mlp_dim, config.padded_vocab_size):
        assert size % 8 == 0  # tensor parallelism over 8


@pytest.mark.parametrize("name", SIZES)
def test_a_models_header_has_its_figures(name: str) -> None:
    config, header = model(name), text(f"models/{name}.gin")
    assert f"{config.num_parameters / 1e9:.3f}B parameters" in header
    assert f"{flops.forward_flops_per_token(config, 1280) / 1e9:.2f}G; trained" in header
    assert f"{flops.train_flops_per_token(config, 1280) / 1e9:.2f}G.\n" in header


OPTIMIZERS = {"adamw": AdamW, "adafactor": Adafactor, "muon": Muon}
MINI = [
    *("train", "--gin_file=runs/mini_llm.gin", "--gin_file=methods/baseline.gin"),
    *("--cache=CACHE", "--steps=10"),
]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_is_one_more_file(name: str) -> None:
    """It takes the run's rate and decay; the rate's schedule is one more line."""
    kind, rate = OPTIMIZERS[name], WarmupCosine(2e-3, 50, 3e-4)
    optimizer = settings(*MINI, f"--gin_file=optimizers/{name}.gin")["optimizer"]
    assert optimizer == kind(rate, weight_decay=0.1, clip_norm=1.0)
    line = f"--gin.optimizers.{kind.__name__}.learning_rate=@learning_rates.WarmupStableDecay()"
    changed = settings(*MINI, f"--gin_file=optimizers/{name}.gin", line)["optimizer"]
    assert changed == dataclasses.replace(
        optimizer, learning_rate=WarmupStableDecay(2e-3, 50, 3e-4)
    )


def test_a_run_has_adamw_where_no_other_is_asked_for() -> None:
    assert settings(*MINI)["optimizer"] == AdamW(WarmupCosine(2e-3, 50, 3e-4), 0.1)
    rates = ("WarmupInverseSqrt", "WarmupConstant")
    for name, kind in zip(rates, (WarmupInverseSqrt, WarmupConstant), strict=True):
        line = f"--gin.optimizers.AdamW.learning_rate=@learning_rates.{name}()"
        assert settings(*MINI, line)["optimizer"].learning_rate == kind(2e-3, 50)


def test_all_files_are_tested() -> None:
    assert names("optimizers") == {*OPTIMIZERS}
    assert names("hardware") == {*CHIPS, *GPUS, "cpu", "fsdp", "sparse_core"}
    pythia = {*PYTHIA_RUNS, "pythia_common"}
    assert names("paper") == {*RUNS, *SLMS, *pythia, "common", "score", "select"}
    pythia = {f"pythia_{size}" for size in PYTHIA}
    assert {name for name in names("models") if name[-1] in "bm"} == {*SIZES, *pythia}


@pytest.mark.parametrize("name", ["tiny", "rows", "stage1", "stage2"])
def test_files_for_t5x_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are for its own train.py; tests/t5x/t5x_model_test.py has it read them."""
    monkeypatch.setitem(sys.modules, "t5x", None)
    assert names("t5x") == {"tiny", "rows", "stage1", "stage2"}
    with pytest.raises(InputError, match=r"t5x/\w+\.gin, line \d+") as caught:
        settings(*PRETRAIN, f"--gin_file=t5x/{name}.gin")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("run", [*RUNS, *SLMS])
def test_a_run_of_the_paper_is_whole(run: str) -> None:
    """The launch command in its header has all that is needed."""
    seen = settings(*launch_command(run))
    assert seen["steps"] * seen["batch_size"] * 1280 == PAPER_TOKENS
    assert seen["batch_size"] == 2048
    name = next(name for name in SIZES if run.startswith(name))
    method = run.removeprefix(name).strip("_") or "baseline"
    assert seen["arm"] == method
    assert seen["model"] == settings(*PRETRAIN, f"--gin_file=models/{name}.gin")["model"]
    # The same optimizer for all arms of a size: nothing but the method tells them apart.
    slm = "" if name.startswith("slm") else "_baseline"
    assert seen["optimizer"] == settings(*launch_command(f"{name}{slm}"))["optimizer"]
    assert seen["loss"].z_loss == 1e-4
    if method == "baseline":
        assert isinstance(seen["schedule"], schedules.NoDistillation)
        assert tuple(seen["checkpoints"].keep_steps) == (26_000,)
    else:
        assert seen["teacher"] == "SLM_RUN"
        assert seen["loss"].teacher_temperature == 0.25
        assert seen["schedule"].omega == pytest.approx(2 / 3)
        kind = schedules.Constant if method == "rkd" else schedules.Step
        assert isinstance(seen["schedule"], kind)
        assert seen["schedule"].distill_steps(208_000) == (208_000 if method == "rkd" else 36_000)
        assert f"paper/{teachers_run(name)}.gin" in text(f"paper/{run}.gin").replace("\n# ", " ")
    assert seen.get("selection") == ("SELECTION" if method == "salt_ds" else None)


@pytest.mark.parametrize("run", [*RUNS, *SLMS])
def test_a_runs_header_has_its_cost(run: str) -> None:
    """FLOPs of the student's tokens, and the teacher's forward pass in stage 1; the plan's time."""
    name = next(name for name in SIZES if run.startswith(name))
    total = flops.train_flops_per_token(model(name), 1280) * PAPER_TOKENS
    seen = settings(*launch_command(run))
    if seen["teacher"]:
        taught = seen["schedule"].distill_steps(208_000) / 208_000 * PAPER_TOKENS
        total += flops.forward_flops_per_token(model(TEACHERS[name]), 1280) * taught
    mantissa, exponent = f"{total:.2e}".split("e+")
    assert f"{mantissa}e{exponent} FLOP" in text(f"paper/{run}.gin")
    require_planned_time(run, total)


def require_planned_time(run: str, total: float) -> None:
    """The header's days and chip-hours agree, and are those of an MFU as plans estimate it."""
    hardware = str(re.search(r"--gin_file=hardware/(\w+).gin", text(f"paper/{run}.gin"))[1])
    kind = {"v5e_256": "TPU v5e", "v5p_256": "TPU v5p"}[hardware]
    header = text(f"paper/{run}.gin").replace("\n# ", " ")
    days = re.search(rf"([\d.]+) days of {CHIPS[hardware]} .*?([\d.]+)K chip-hours", header)
    assert days
    hours = 1000 * float(days[2])
    assert float(days[1]) * 24 * CHIPS[hardware] == pytest.approx(hours, rel=0.06)
    mfu = total / (hours * 3600 * (flops.device_peak_flops(kind) or 0))
    assert 0.44 < mfu < 0.49


@pytest.mark.parametrize("run", [run for run in RUNS if not run.endswith("baseline")])
def test_a_run_with_a_teacher_asks_for_it(run: str) -> None:
    with pytest.raises(ValueError, match=r"teacher must be set"):
        settings("train", f"--gin_file=paper/{run}.gin", "--cache=CACHE", "--selection=SELECTION")


@pytest.mark.parametrize("run", [*RUNS, *SLMS])
def test_a_run_of_the_paper_can_be_planned(run: str) -> None:
    """Without cache and teacher, by the same files."""
    files = [word for word in launch_command(run) if word.startswith("--gin_file=")]
    assert settings("plan", files[0])["mesh"] == MeshConfig()
    seen = settings("plan", *files)
    assert (seen["sequence_length"], seen["vocab_size"]) == (1280, VOCABULARY)
    trained = settings(*launch_command(run))
    for name in ("model", "schedule", "optimizer", "loss", "steps", "batch_size", "mesh"):
        assert seen[name] == trained[name]
    assert seen.get("teacher_dtype") == trained.get("teacher_dtype")
    if trained["teacher"]:
        slm = TEACHERS[run[: len("llm_2_8b")]]
        shape = {**vars(seen["teacher_model"]), "vocab_size": VOCABULARY}
        assert shape == vars(model(slm))


@pytest.mark.parametrize("size", PYTHIA)
def test_a_pythia_is_the_published_one(size: str) -> None:
    """The shape that `salt convert` makes of the checkpoint's config.json, to the parameter."""
    parameters, width, layers, heads = PYTHIA[size]
    config, header = model(f"pythia_{size}", PYTHIA_IDS), text(f"models/pythia_{size}.gin")
    assert config.num_parameters == parameters
    published = {
        "model_type": "gpt_neox",
        "hidden_act": "gelu",
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "vocab_size": 50304,
    }
    _, converted = config_from_json(published, PYTHIA_IDS, "config.json")
    how = {"dtype": "bfloat16", "param_dtype": "float32", "remat": "full"}
    assert dataclasses.replace(converted, **how) == config
    assert f"{parameters:,} parameters" in header
    assert f"{flops.forward_flops_per_token(config, 2048) / 1e9:.2f}G; trained" in header
    assert f"{flops.train_flops_per_token(config, 2048) / 1e9:.2f}G.\n" in header


@pytest.mark.parametrize("run", PYTHIA_RUNS)
def test_a_run_with_a_pythia_is_whole(run: str) -> None:
    seen = settings(*launch_command(run))
    assert seen["steps"] * seen["batch_size"] * 2048 == PYTHIA_TOKENS
    assert seen["model"] == settings(*PRETRAIN, "--gin_file=models/pythia_2_8b.gin")["model"]
    assert "objectives" not in seen
    assert seen["optimizer"] == settings(*launch_command("pythia_2_8b_baseline"))["optimizer"]
    student = flops.train_flops_per_token(model("pythia_2_8b", PYTHIA_IDS), 2048)
    teacher = flops.forward_flops_per_token(model("pythia_1_4b", PYTHIA_IDS), 2048)
    total = student * PYTHIA_TOKENS
    if seen["arm"] != "baseline":
        n_kd = seen["schedule"].distill_steps(143_000)
        assert n_kd / 143_000 == pytest.approx(36_000 / 208_000, rel=1e-3)
        assert (seen["teacher"], seen["teacher_step"]) == ("PYTHIA", 143_000)
        total += teacher * n_kd * 1024 * 2048
    assert seen.get("selection") == ("SELECTION" if seen["arm"] == "salt_ds" else None)
    header = text(f"paper/{run}.gin").replace("\n# ", " ")
    mantissa, exponent = f"{total:.2e}".split("e+")
    assert f"{mantissa}e{exponent} FLOP" in header
    require_planned_time(run, total)


@pytest.mark.parametrize("run", PYTHIA_RUNS)
def test_a_run_with_a_pythia_can_be_planned(run: str) -> None:
    files = [word for word in launch_command(run) if word.startswith("--gin_file=")]
    seen = settings("plan", *files)
    assert (seen["sequence_length"], seen["vocab_size"]) == (2048, PYTHIA_IDS)
    if seen["arm"] != "baseline":
        shape = {**vars(seen["teacher_model"]), "vocab_size": PYTHIA_IDS}
        assert shape == vars(model("pythia_1_4b", PYTHIA_IDS))


def test_the_commands_before_a_run_with_a_pythia() -> None:
    """Those of the header, as they would be typed: the rows are those that stage 1 reads."""
    run = "pythia_1_4b_to_2_8b_salt_ds"
    commands = commands_of(run)
    assert [command[0] for command in commands] == [
        *("convert", "convert", "score", "select", "train")
    ]
    early, late, score, select, _ = (settings(*command) for command in commands)
    assert (early["step"], late["step"], score["scorer_step"]) == (18_000, 143_000, 18_000)
    assert select["rule"].m == 24_750 * 1024


def test_objectives() -> None:
    model_file = "--gin_file=models/slm_smoke.gin"
    assert "objectives" not in settings(*PRETRAIN, model_file)
    ul2 = [*PRETRAIN, model_file, "--gin_file=objectives/ul2.gin"]
    assert settings(*ul2)["objectives"] == Objectives()
    assert settings(*ul2, "--gin.SPAN=0")["objectives"] == Objectives(span=0)
    assert "objectives" not in settings(*ul2, "--gin_file=objectives/causal.gin")
    assert settings(*launch_command("slm_1_5b"))["objectives"] == Objectives()
    # The paper's vocabulary and rows.
    Denoising(Objectives(), ByteVocabulary(reserved=256), 1280, 0)
    assert ".reserved = 256" in text("data/pile.gin")


def test_fine_tuning_takes_the_initial_models_shape() -> None:
    files = ("--gin_file=runs/finetune.gin", "--gin_file=methods/finetune.gin", "--steps=10")
    seen = settings("train", *files, "--cache=CACHE", "--initial=RUN")
    assert (seen["model"], seen["initial"], seen["arm"]) == (None, "RUN", "finetune")
    assert isinstance(seen["schedule"], schedules.NoDistillation)
    with pytest.raises(InputError, match=r"initial must be set .*--initial=VALUE"):
        settings("train", *files, "--cache=CACHE")
    teacher = ("--gin_file=methods/salt.gin", "--gin.N_KD=5", "--teacher=SLM")
    seen = settings("train", *files, "--cache=CACHE", "--initial=RUN", *teacher)
    assert (seen["arm"], seen["schedule"].n_kd) == ("salt", 5)
    own = ("--gin_file=models/llm_mini.gin", "--model=@decoder.DecoderConfig()")
    seen = settings("train", *files, "--cache=CACHE", "--initial=RUN", *own)
    assert seen["model"].embed_dim == 160


def test_methods_beside_salt() -> None:
    files = [*MINI, "--teacher=SLM"]

    def of(name: str, *more: str) -> dict[str, Any]:
        return settings(*files, *more[:1], f"--gin_file=methods/{name}.gin", *more[1:])

    gated = of("gate", "--gin_file=methods/salt.gin", "--gin.N_KD=5")
    assert (gated["arm"], gated["loss"].gate) == ("salt", gates.TeacherAhead())
    line = "--gin.GATE=@gates.Confidence()"
    assert of("gate", "--gin_file=methods/rkd.gin", line)["loss"].gate == gates.Confidence(1.0)
    let = of("let", "--gin.STOP=5")
    assert isinstance(let["schedule"], schedules.NoDistillation)
    assert (let["arm"], let["alignment"]) == ("let", Alignment(5, layer=3, weight=0.1))
    both = of("salt_let", "--gin.N_KD=5")
    assert (both["schedule"].n_kd, both["alignment"].stop, both["arm"]) == (5, 5, "salt_let")
    adaptive = of("salt_adaptive", "--gin.MOST=5", "--gin.MARGIN=0.1")
    assert adaptive["schedule"] == schedules.Adaptive(2 / 3, most=5, margin=0.1)
    assert of("salt_top_k", "--gin.N_KD=5", "--gin.TOP_K=7")["loss"].teacher_top_k == 7
    assert of("self_distillation", "--gin.N_KD=5")["schedule"].n_kd == 5
    stacking = settings(*MINI, "--gin_file=methods/stacking.gin", "--initial=SLM")
    assert (stacking["arm"], stacking["initial"]) == ("stacking", "SLM")


def test_caches_are_named_by_repeated_flags() -> None:
    train = [*PRETRAIN[:-3], "--steps=1", "--batch_size=1", "--gin_file=models/slm_smoke.gin"]
    assert settings(*train, "--cache=A")["cache"] == "A"
    mixed = settings(*train, "--cache=A", "--cache=B", "--weights=3", "--weights=0.5")
    assert (mixed["cache"], mixed["cache_weights"]) == (("A", "B"), (3, 0.5))


def test_scores_and_selection_of_the_paper() -> None:
    inputs = ("--cache=CACHE", "--gin_file=hardware/v5e_256.gin")
    seen = settings("score", "--gin_file=paper/score.gin", "--scorer=SLM_RUN", *inputs)
    assert (seen["scorer_step"], seen["k"]) == (26_000, 10)
    assert seen["mesh"] == MeshConfig(slice=-1, fsdp=256)
    seen = settings("select", "--gin_file=paper/select.gin", "--scores=SCORES", "--cache=CACHE")
    assert seen["rule"].m == 36_000 * 2048


@pytest.mark.parametrize("hardware", sorted(names("hardware") - {"sparse_core"}))
def test_hardware_fits_under_every_verb(hardware: str) -> None:
    """The mesh has the devices that the name says, in training, scoring and evaluation alike."""
    file, devices = f"--gin_file=hardware/{hardware}.gin", {**CHIPS, **GPUS, "cpu": 1}
    seen = settings(*PRETRAIN, "--gin_file=models/slm_smoke.gin", file)
    mesh = seen["mesh"]
    assert mesh.fsdp == devices.get(hardware, -1)
    assert mesh.slice == (-1 if hardware in CHIPS else 1)
    assert (mesh.data, mesh.tensor) == (1, 1)
    assert 2048 % (devices.get(hardware, 1) * seen.get("microbatches", 1)) == 0
    if hardware != "fsdp":
        chunk_tokens = {"cpu": 128, "v5e_256": 512}.get(hardware, 1024)
        assert seen["loss"].chunk_tokens == chunk_tokens
    assert settings("score", file, "--scorer=RUN", "--cache=CACHE")["mesh"] == mesh
    assert settings("evaluate", file, "--model=RUN", "--cache=CACHE")["mesh"] == mesh


def test_sparse_cores_follow_a_slice() -> None:
    files = (f"--gin_file=hardware/{name}.gin" for name in ("v6e_256", "sparse_core"))
    seen = settings(*PRETRAIN, "--gin_file=models/slm_smoke.gin", *files)
    assert seen["mesh"].fsdp == 256
    assert {value for _, value in seen["compiler_options"]} == {True}


@pytest.mark.parametrize("hardware", CHIPS)
def test_hardware_names_its_topology(hardware: str) -> None:
    header = text(f"hardware/{hardware}.gin")
    topology = re.search(r"--topology=(\w+):([\dx]+)", header)
    assert topology
    assert topology[1] == hardware.partition("_")[0]
    chips = 1
    for side in topology[2].split("x"):
        chips *= int(side)
    assert chips == CHIPS[hardware]
    assert f"{chips} chips" in header


def teachers_run(name: str) -> str:
    slm = TEACHERS[name]
    return slm if slm.startswith("slm") else f"{slm}_baseline"


def launch_command(run: str) -> list[str]:
    """`salt train …` of a run's header, as it would be typed."""
    command = commands_of(run)[-1]
    assert command[0] == "train"
    return command


def commands_of(run: str) -> list[list[str]]:
    """The commands of a run's header, each without its output folder."""
    lines = re.findall(r"^#   +(.*?)\\?$", text(f"paper/{run}.gin"), re.M)
    commands = " ".join(lines).split("salt ")[1:]
    return [[w for w in words.split() if not w.startswith("--output_dir")] for words in commands]
