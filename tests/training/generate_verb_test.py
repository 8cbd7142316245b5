"""`salt generate`: prompts from flags and files, what it writes, and what it refuses."""

import json
import pathlib
import shutil

import jax
import pytest

from salt_jax.main import main
from salt_jax.training.checkpoints import find_model
from salt_jax.training.generation import Generator, Sampling
from salt_jax.training.partitioning import MeshConfig


def generations(folder: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]


def test_completions_are_those_of_the_model(
    slm: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [f"--model={slm}", "--step=4", "--temperature=0.9", "--top_k=30", "--top_p=0.9"]
    flags += ["--seed=3", "--max_new_tokens=12", "--stop=e", "--stop=é", "--batch_size=8"]
    prompts = ["--prompt=salt ", "--prompt=", "--prompt=two\nlines"]
    out = tmp_path / "out"
    cache = "--compilation_cache="
    assert main(["generate", *flags, *prompts, cache, f"--output_dir={out}"]) == 0
    records = generations(out)
    assert [record["prompt"] for record in records] == ["salt ", "", "two\nlines"]

    saved = find_model(slm, 4, "model")
    vocabulary, mesh = saved.load_vocabulary(), MeshConfig(fsdp=1).make(jax.devices()[:1])
    expected = Generator(saved.config, vocabulary, mesh)(
        saved.load_params(mesh),
        [vocabulary.encode(record["prompt"]) for record in records],
        12,
        sampling=Sampling(0.9, 30, 0.9, 3),
        stop_texts=("e", "é"),
    )
    assert [record["ids"] for record in records] == expected
    texts = [vocabulary.decode(ids).partition("e")[0] for ids in expected]
    assert [record["completion"] for record in records] == texts
    assert all(len(r["log_probabilities"]) == len(r["ids"]) for r in records)
    printed = capsys.readouterr().out
    for index, (record, text) in enumerate(zip(records, texts, strict=True)):
        assert f"[{index}] {record['prompt']}\n→ {text}\n" in printed
    summary = json.loads((out / "summary.json").read_text())
    assert summary["model"] == saved.identity
    assert summary["prompts"] == 3
    assert summary["prompt_tokens"] == sum(1 + len(r["prompt"]) for r in records)  # the starts
    assert summary["new_tokens"] == sum(len(ids) for ids in expected)
    assert sum(summary["ended_by"].values()) == 3
    assert summary["prefill_tokens_per_second"] > 0


def test_prompts_from_files(slm: pathlib.Path, tmp_path: pathlib.Path) -> None:
    lines, objects = tmp_path / "a.txt", tmp_path / "b.jsonl"
    lines.write_bytes("salt \r\n\nmodels é\n".encode())
    objects.write_text('{"prompt": "salt ", "text": "no"}\n\n{"text": "models é"}\n')
    found = []
    for file in (lines, objects):
        out = tmp_path / file.stem
        flags = [f"--model={slm}", f"--prompts={file}", "--max_new_tokens=3"]
        flags += ["--compilation_cache=", f"--output_dir={out}"]
        assert main(["generate", *flags]) == 0
        found.append(generations(out))
    assert [record["prompt"] for record in found[0]] == ["salt ", "models é"]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "set one of them, --prompt=TEXT or --prompts=FILE"),
        (["--prompt=a", "--prompts=b.txt"], "set one of them"),
        (["--prompts=missing.txt"], "missing.txt, which cannot be read (No such file"),
        (["--prompts=prompts.csv"], "prompts.csv: name a .txt file, or a .jsonl one"),
        (["--prompts={here}/empty.txt"], "is empty: put a prompt on each line"),
        (["--prompts={here}/latin.txt"], "is not UTF-8"),
        (["--prompts={here}/broken.jsonl"], "broken.jsonl, line 2 is not JSON"),
        (["--prompts={here}/other.jsonl"], 'line 1 has no text in "prompt" or "text"'),
        (["--prompts={here}/half.jsonl"], 'line 1 has no text in "prompt" or "text"'),
        (["--prompt=a", "--temperature=-1"], "temperature is -1"),
        (["--prompt=a", "--top_p=2"], "top_p is 2"),
        (["--prompt=a", "--max_new_tokens=64"], "Prompt 0 has 2 tokens and max_new_tokens is 64"),
        (["--prompt=a", "--stop="], "stop text is empty"),
        (["--prompt=a", "--batch_size=0"], "batch_size is 0"),
        (["--prompt=a", "--step=5"], "asks for step 5"),
        (["--prompt=a", "--max_tokens=5"], "nearest: max_new_tokens"),
    ],
)
def test_refuses_in_one_sentence(
    flags: list[str],
    words: str,
    slm: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "other.jsonl").write_text('{"prompt": 3}\n')
    (tmp_path / "half.jsonl").write_text('{"prompt": "\\ud800"}\n')
    flags = [flag.format(here=tmp_path) for flag in flags]
    out = tmp_path / "out"
    assert main(["generate", f"--model={slm}", *flags, f"--output_dir={out}"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line
    assert not out.exists()


def test_a_run_without_its_vocabulary_is_refused(
    slm: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(slm, model)
    shutil.rmtree(model / "vocabulary")
    out = tmp_path / "out"
    assert main(["generate", f"--model={model}", "--prompt=a", f"--output_dir={out}"]) == 2
    assert "has no vocabulary/" in capsys.readouterr().err
    assert not out.exists()
