"""What is named in place of a downloaded model, and the advice that fits it."""

import pathlib

import pytest

from salt_jax.errors import InputError
from salt_jax.huggingface.model_folders import repository_id, require_config
from salt_jax.huggingface.safetensors_files import SafetensorsFolder


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([], "where there is no config.json: name the folder of a downloaded model"),
        (["README.md"], "where there is no config.json: name the folder of a downloaded model"),
        (
            ["tiny.Q4_1.gguf"],
            r"with tiny.Q4_1.gguf, a GGUF file .*: name that file, --huggingface=FILE",
        ),
        (["adapter_config.json", "adapter_model.safetensors"], r"LoRA.*merge_and_unload\(\)"),
        (["adapter_config.json", "adapter_model.bin"], r"LoRA.*merge_and_unload\(\)"),
        (["adapter_config.json", "config.json", "model.safetensors"], "with adapter_config.json"),
        (["consolidated.00.pth", "params.json"], "with consolidated.00.pth, a pickle"),
        (["pytorch_model.bin"], r"a pickle.*save_pretrained\(NEW_FOLDER\)"),
        (["checkpoints/0/digests.json"], "a run of `salt`: .*--model="),
        (["snapshots/0f/config.json"], "--huggingface=.*/snapshots/0f.$"),
        (["gemma/config.json"], "--huggingface=.*/gemma.$"),
    ],
)
def test_folders_that_are_no_model(files: list[str], expected: str, tmp_path: pathlib.Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=expected):
        require_config(str(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([], "holds neither model.safetensors nor model.safetensors.index.json: name the folder"),
        (["tiny.gguf"], "has tiny.gguf, a GGUF file of llama.cpp's"),
        (["pytorch_model-00001-of-00002.bin"], "a pickle, which may run any code"),
        (["tf_model.h5"], "weights for TensorFlow or Flax"),
        (["flax_model.msgpack"], "weights for TensorFlow or Flax"),
        (["adapter_model.safetensors"], "adapters"),
        (["model-00001-of-00002.safetensors"], "holds model-00001-of-.*its index too"),
    ],
)
def test_folders_without_safetensors(
    files: list[str], expected: str, tmp_path: pathlib.Path
) -> None:
    for name in ["config.json", *files]:
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=expected):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.safetensors", "is '.*', a file: name the folder that it is in"),
        ("pytorch_model.bin", "is '.*', pytorch_model.bin, a pickle"),
    ],
)
def test_files(name: str, expected: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=expected):
        require_config(str(tmp_path / name), tmp_path / name)


def test_a_file_that_git_lfs_left_out(tmp_path: pathlib.Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0f\nsize 538090408\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    with pytest.raises(InputError, match=r"Git LFS pointer.*git lfs pull"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "HuggingFaceTB/SmolLM2-135M",
        "https://huggingface.co/HuggingFaceTB/SmolLM2-135M",
        "https://huggingface.co/HuggingFaceTB/SmolLM2-135M/tree/main",
        "huggingface.co/HuggingFaceTB/SmolLM2-135M/",
        "hf://HuggingFaceTB/SmolLM2-135M",
    ],
)
def test_a_repositorys_name(name: str) -> None:
    assert repository_id(name) == "HuggingFaceTB/SmolLM2-135M"


@pytest.mark.parametrize("name", ["models", "/models/a", "./a/b", "../a", "gs://bucket/a", "a/b/c"])
def test_paths_are_no_repositories(name: str) -> None:
    assert repository_id(name) is None
