"""Command lines of anything: settings, or one sentence; never a traceback."""

import importlib
import os
import pathlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from salt_jax.command_line import SAFE_GIN, parameters_of, parse_arguments, verbs
from salt_jax.configuration import configure
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
        *("train", "train.train", "train.train.steps", "decoder", "decoder.DecoderConfig"),
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
    name=st.sampled_from(["train.train.steps", "train.train.cache", "train.train.mesh"])
    | st.sampled_from(["decoder.DecoderConfig.num_layers", "LEARNING_RATE", "train.train.model"]),
    value=TEXTS,
)
def test_values_of_overrides(name: str, value: str) -> None:
    configured(["train", *BASE, f"--gin.{name}={value}"])


SETTINGS = [
    (verb, name)
    for verb in verbs()
    for name in parameters_of(getattr(importlib.import_module(f"salt_jax.commands.{verb}"), verb))
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
