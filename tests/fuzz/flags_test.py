"""Command lines of anything: settings, or one sentence; never a traceback."""

import importlib
import os
import pathlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from salt_jax.cli.command_line import SAFE_GIN, parse_arguments, verbs
from salt_jax.cli.configuration import configure
from salt_jax.cli.setting_groups import settings_of
from salt_jax.errors import InputError
from salt_jax.main import main

fuzzed = settings(
    max_examples=int(os.environ.get("SALT_FUZZ_EXAMPLES", "40")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

BASE = ["--gin_file=runs/pretrain.gin", "--gin_file=methods/salt.gin", "--gin_file=models/base.gin"]
# What means something to gin, and what is next to it.
WORDS = st.sampled_from(
    [
        *("train", "train.train", "config.TrainConfig.steps", "decoder", "decoder.DecoderConfig"),
        *("decoder.DecoderConfig.num_layers", "LEARNING_RATE", "N_KD", "gin.REQUIRED"),
        *("@", "%", "()", "(", ")", "[", "]", "{", "}", ":", "=", ",", "'", '"', '"""', "\\"),
        *("/", ".", "\n", "\n  ", "\t", "\0", "\ud800", "#", "1e999", "-", "9" * 5000, "b'a'"),
        *("include", "import", "from", "include 'runs/pretrain.gin'", "gin.macro", "__class__"),
        *("None", "True", "lambda", "é", "١", " "),
    ]
)
VALUES = (WORDS | st.text(st.characters(exclude_categories=()), max_size=6)).map(str)
TEXTS = st.lists(VALUES, max_size=6).map("".join)


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SAFE_GIN, "")


def configured(typed: list[str]) -> None:
    try:
        configure(parse_arguments(typed))
    except InputError as error:
        assert str(error)  # noqa: PT017 (it may as well be well)


@fuzzed
@given(name=TEXTS, value=TEXTS, safe=st.booleans())
def test_overrides(name: str, value: str, safe: bool) -> None:
    flags = ["--safe_gin"] * safe
    configured(["train", *BASE, *flags, f"--gin.{name}={value}"])


@fuzzed
@given(
    name=st.sampled_from(["config.TrainConfig.steps", "config.Data.cache", "config.Devices.mesh"])
    | st.sampled_from(["decoder.DecoderConfig.num_layers", "LEARNING_RATE"])
    | st.just("config.TrainConfig.model"),
    value=TEXTS,
)
def test_values_of_overrides(name: str, value: str) -> None:
    configured(["train", *BASE, f"--gin.{name}={value}"])


SETTINGS = [
    (verb, name)
    for verb in verbs()
    for setting in settings_of(getattr(importlib.import_module(f"salt_jax.commands.{verb}"), verb))
    for name in [setting.path, setting.name]
    if setting.path
]


@fuzzed
@given(setting=st.sampled_from(SETTINGS), values=st.lists(TEXTS, min_size=1, max_size=2))
def test_settings(setting: tuple[str, str], values: list[str]) -> None:
    verb, name = setting
    configured([verb, *(f"--{name}={value}" for value in values)])


@fuzzed
@given(typed=st.lists(TEXTS | TEXTS.map("--{}".format), max_size=4))
def test_anything_typed(typed: list[str], tmp_path: pathlib.Path) -> None:
    # Without a cache `train` has nothing to run on.
    assert main(["train", *BASE, f"--output_dir={tmp_path / 'out'}", *typed]) in (0, 2)
    assert not (tmp_path / "out").exists()


@fuzzed
@given(text=TEXTS | st.text(), data=st.binary(max_size=30), safe=st.booleans())
def test_gin_files(text: str, data: bytes, safe: bool, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "mine.gin"
    file.write_bytes(text.encode(errors="surrogatepass") + data)
    configured(["train", *BASE, *["--safe_gin"] * safe, f"--gin_file={file}"])


FIELDS = ("num_layers", "embed_dim", "num_heads", "mlp_dim", "max_length", "nothing")
LINES = st.sampled_from(
    [
        *("from salt_jax.models import decoder", "from salt_jax.models import nothing"),
        *("from salt_jax.data import templates", "import salt_jax", "import os"),
        *("decoder.DecoderConfig:", "include 'models/base.gin'", "include 'mine.gin'"),
        *(f"decoder.DecoderConfig.{name} = 2" for name in FIELDS),
    ]
)


@fuzzed
@given(lines=st.lists(LINES | TEXTS, max_size=9))
def test_model_files(lines: list[str], tmp_path: pathlib.Path) -> None:
    file = tmp_path / "mine.gin"
    file.write_bytes("\n".join(lines).encode(errors="surrogatepass"))
    configured(["train", *BASE, f"--model={file}"])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "imports no module that has DecoderConfig"),
        (
            "from salt_jax.preparation import templates\n",
            "imports no module that has DecoderConfig",
        ),
        ("from salt_jax.models import nothing\n", "there is no module salt_jax.models.nothing"),
        ("from salt_jax.data import templates\n", r"nearest: salt_jax\.preparation\.templates"),
    ],
)
def test_a_model_file_without_its_import(line: str, said: str, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "mine.gin"
    fields = "".join(f"decoder.DecoderConfig.{name} = 2\n" for name in FIELDS[:5])
    file.write_text(line + fields)
    with pytest.raises(InputError, match=said):
        configure(parse_arguments(["train", *BASE, f"--model={file}"]))
