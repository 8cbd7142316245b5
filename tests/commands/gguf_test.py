"""GGUF files by `salt convert`: what transformers reads in them, and what is refused."""

import pathlib
import re
from typing import Any

import numpy as np
import pytest

from salt_jax.data.vocabularies import load_vocabulary
from salt_jax.errors import InputError
from salt_jax.huggingface.gguf_files import GGUFFile
from salt_jax.main import main
from tests.gguf_writer import byte_tokenizer, write_gguf

pytest.importorskip("gguf")
TEXT = "def f(x):\n\n    return 12345 * x  # it's café 日本\n<|endoftext|> \n\n"


@pytest.fixture(scope="module")
def tokenizer(random_models: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tokenizer")
    random_models.save_tokenizer(folder)
    return byte_tokenizer(folder / "tokenizer.json")


def convert(file: pathlib.Path, run: pathlib.Path, *flags: str) -> int:
    return main(["convert", f"--huggingface={file}", *flags, f"--output_dir={run}"])


@pytest.mark.parametrize(
    ("kind", "tied"),
    [
        *(("F32", False), ("F32", True), ("F16", False), ("BF16", True), ("Q8_0", True)),
        *(("Q4_0", False), ("Q4_1", False), ("Q5_0", True), ("Q5_1", False), ("Q2_K", True)),
        *(("Q3_K", False), ("Q4_K", True), ("Q5_K", False), ("Q6_K", False)),
    ],
)
def test_logits_and_ids_are_those_of_transformers(
    kind: str,
    tied: bool,
    random_models: Any,
    tokenizer: dict[str, Any],
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    transformers = pytest.importorskip("transformers")
    file, run = tmp_path / "tiny.gguf", tmp_path / "run"
    write_gguf(file, kind, tokenizer, tied)
    assert convert(file, run) == 0
    is_quantized = kind.startswith("Q")
    assert (f"is quantized ({kind})" in capsys.readouterr().out) == is_quantized
    load = {"pretrained_model_name_or_path": str(tmp_path), "gguf_file": file.name}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(**load, dtype="float32").eval()
    theirs.is_quantized = False  # its weights are float32
    expected = random_models.their_logits(theirs)
    assert expected.std() > 0.1, "the logits tell models apart"
    np.testing.assert_allclose(random_models.our_logits(run), expected, atol=1e-4, rtol=0)
    ids = transformers.AutoTokenizer.from_pretrained(**load).encode(TEXT)
    assert load_vocabulary(run).encode(TEXT, parse_special=True) == ids
    if kind == "F16":  # goes out, with the file's epsilon, in what transformers loads
        assert main(["convert", f"--model={run}", f"--output_dir={tmp_path / 'out'}"]) == 0
        config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
        assert (config.rms_norm_eps, config.eos_token_id) == (1e-5, [0])
        again = random_models.their_logits(tmp_path / "out")
        np.testing.assert_allclose(again, expected, atol=1e-4, rtol=0)
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").encode(TEXT) == ids


@pytest.mark.parametrize(
    ("kind", "changes", "given", "expected"),
    [
        ("I8", {}, {}, r"has tensors of I8, expected F32, F16.*: choose another quantization"),
        ("F32", {}, {"architecture": "qwen2"}, r"has the architecture 'qwen2', expected 'llama'"),
        ("F32", {"tokenizer.ggml.model": None}, {}, r"has no tokenizer, expected 'gpt2' \(bytes\)"),
        ("F32", {"tokenizer.ggml.model": "t5"}, {}, r"has a tokenizer of the kind 't5', expected"),
        ("F32", {"tokenizer.ggml.pre": "jais"}, {}, r"splits text by the rule 'jais', expected"),
        ("F32", {"tokenizer.ggml.eos_token_id": None}, {}, r"tiny.gguf says which .*--eos_token"),
        (
            "F32",
            {"llama.rope.scaling.type": "yarn"},
            {},
            r"tiny.gguf/config.json sets rope_scaling",
        ),
        ("F32", {"llama.rope.dimension_count": 32}, {}, r"tiny.gguf/config.json sets rotary_dim"),
        ("F32", {"llama.expert_count": 8}, {}, r"tiny.gguf/config.json sets expert_count to 8"),
        ("F32", {"llama.block_count": 3}, {}, r"tiny.gguf has no tensor model.layers.2"),
        ("F32", {"llama.block_count": None}, {}, r"sets num_hidden_layers to None"),
        ("F32", {}, {"more": ("rope_freqs",)}, r"has a tensor rope_freqs.weight of shape"),
    ],
)
def test_files_that_are_refused(
    kind: str,
    changes: dict[str, Any],
    given: dict[str, Any],
    expected: str,
    tokenizer: dict[str, Any],
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_gguf(tmp_path / "tiny.gguf", kind, {**tokenizer, **changes}, **given)
    assert_refused(tmp_path, capsys, expected)


@pytest.mark.parametrize("flags", [(), ("--revision=main",), ("--eos_token=nope",)])
def test_what_else_can_be_wrong(
    flags: tuple[str, ...],
    tokenizer: dict[str, Any],
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = {
        (): r"tiny.gguf cannot be read \(No such file or directory\): correct --huggingface",
        ("--revision=main",): r"revision is 'main' and .*tiny.gguf', on this machine",
        ("--eos_token=nope",): r"tiny.gguf/tokenizer.json has no token 'nope' .* --eos_token",
    }[flags]
    if flags:
        write_gguf(tmp_path / "tiny.gguf", "F32", tokenizer)
    assert_refused(tmp_path, capsys, expected, *flags)


def test_damaged_files(tokenizer: dict[str, Any], tmp_path: pathlib.Path) -> None:
    """Cut anywhere, or with bytes changed in what describes the tensors: a file or a sentence."""
    file = tmp_path / "whole.gguf"
    write_gguf(file, "Q8_0", tokenizer)
    whole, rng = file.read_bytes(), np.random.default_rng(0)
    header = whole.index(b"token_embd.weight") + 3000
    damaged = [whole[:size] for size in (*range(0, header, 997), len(whole) - 1)]
    for _ in range(40):
        changed = bytearray(whole)
        for place in rng.integers(0, header, 3):
            changed[place] ^= int(rng.integers(1, 256))
        damaged.append(bytes(changed))
    for number, content in enumerate(damaged):
        path = tmp_path / "damaged.gguf"
        path.write_bytes(content)
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            opened = GGUFFile(path)
            opened.describe(folder)
        except InputError as error:
            assert "damaged.gguf" in str(error)  # noqa: PT017 (some files are read)
        else:
            assert len(content) == len(whole), "a file that ends early is refused"


def assert_refused(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str], expected: str, *flags: str
) -> None:
    assert convert(folder / "tiny.gguf", folder / "run", *flags) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(expected, said), said
    assert not (folder / "run").exists()
