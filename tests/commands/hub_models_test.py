"""Models of the Hub by name, taken in by `salt convert` and by the verbs that read a model."""

import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from salt_jax.commands import _hub_models
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.vocabularies import load_vocabulary
from salt_jax.huggingface import hub
from salt_jax.main import main
from salt_jax.runtime import processes
from salt_jax.training.checkpoints import find_model
from tests.commands.convert_test import write_model
from tests.hub_server import COMMIT, Hub, serving

TRAIN = "train --gin_file=runs/smoke_llm.gin --steps=2"


@pytest.fixture
def served(
    random_models: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Hub]:
    write_model(tmp_path / "repository", random_models)
    monkeypatch.setenv("SALT_MODELS", str(tmp_path / "models"))
    with serving({"owner/tiny": tmp_path / "repository"}, tmp_path, monkeypatch) as hub:
        yield hub


def test_convert_downloads_a_revision(
    served: Hub, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = ["--huggingface=owner/tiny", "--revision=step3", f"--output_dir={tmp_path / 'run'}"]
    assert main(["convert", *named]) == 0
    assert (tmp_path / "run/checkpoints/0").is_dir()
    assert (
        main(["convert", "--huggingface=hf:owner/tiny@v9", f"--output_dir={tmp_path / 'no'}"]) == 2
    )
    assert "owner/tiny has no revision v9" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    assert any(path.endswith("/revision/step3") for _, path, _ in served.asked)


@pytest.mark.parametrize(
    "command",
    [
        *(
            "score --scorer",
            "transplant --model",
            "evaluate --model",
            "generate --prompt=a --model",
        ),
        *("evaluate --model=RUN --compare", "evaluate --model=RUN --compare=RUN --slm"),
        f"{TRAIN} --gin_file=methods/salt.gin --gin.N_KD=1 --teacher",
        f"{TRAIN} --gin_file=methods/baseline.gin --initial",
    ],
)
def test_every_verb_asks_the_hub(
    command: str,
    served: Hub,
    cache: PackedCache,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    verb, *flags = f"{command}=hf:owner/other@step3".split()
    rows = [f"--cache={cache.path}"] if verb != "generate" else []
    assert main([verb, *flags, *rows, f"--output_dir={tmp_path / 'out'}"]) == 2
    assert "no model owner/other: correct the name" in capsys.readouterr().err
    assert any(path.endswith("owner/other/revision/step3") for _, path, _ in served.asked)


@pytest.mark.slow
def test_a_verb_takes_a_model_in_once(
    served: Hub, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name = f"hf:owner/tiny@{COMMIT}"
    (tmp_path / "text.md").write_text("".join(f"{n} grains of salt.\n" for n in range(900)))
    text = [f"--gin.TEXT='{tmp_path}/*.md'", "--gin.PIECE_BYTES=200", "--gin.SEQUENCE_LENGTH=32"]
    prepare = ["prepare", "--gin_file=data/model_text.gin", f"--gin.MODEL='{name}'", *text]
    assert main([*prepare, f"--output_dir={tmp_path / 'rows'}"]) == 0
    generate = ["generate", "--prompt=a", "--max_new_tokens=2", "--compilation_cache="]
    assert main([*generate, f"--model={name}", f"--output_dir={tmp_path / 'texts'}"]) == 0
    assert capfd.readouterr().out.count("$ salt convert") == 1
    run = tmp_path / f"models/owner--tiny@{COMMIT[:12]}"
    cache = PackedCache.open(tmp_path / "rows")
    assert cache.vocabulary == load_vocabulary(run)
    find_model(run, None, "teacher", cache)  # which refuses another vocabulary
    assert (tmp_path / f"models/owner--tiny@{COMMIT[:12]}/summary.json").is_file()


def test_a_model_is_converted_by_one_process_and_without_devices(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the command is that reads it."""
    monkeypatch.setenv("SALT_MODELS", str(tmp_path))
    for name, value in (("COUNT", "2"), ("INDEX", "1")):
        monkeypatch.setenv(f"SALT_PROCESS_{name}", value)
    monkeypatch.setenv("SALT_COORDINATOR_ADDRESS", "host:1")
    monkeypatch.setattr(hub, "download", lambda *named: tmp_path / COMMIT)
    environments: list[dict[str, str]] = []
    monkeypatch.setattr(
        _hub_models, "run_verb", lambda verb, flags, run, changed: environments.append(changed)
    )
    _hub_models.local_model("hf:owner/tiny")
    assert environments[0]["JAX_PLATFORMS"] == "cpu"
    run = tmp_path / f"owner--tiny@{COMMIT[:12]}"
    run.mkdir()
    (run / "summary.json").write_text("{}")
    run.with_name(f"{run.name}.lock").unlink()
    assert _hub_models.local_model("hf:owner/tiny") == str(run)
    assert os.listdir(tmp_path) == [run.name]
    assert len(environments) == 1, "converted once"
    for name, value in environments[0].items():
        monkeypatch.setenv(name, value)
    assert not processes.are_several({})


def test_without_the_library_a_sentence_says_so(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["convert", "--huggingface=owner/tiny", f"--output_dir={tmp_path / 'run'}"]) == 2
    assert "pip install 'salt_jax[hub]'" in capsys.readouterr().err
