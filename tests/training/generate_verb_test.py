"""`salt generate`: prompts from flags and files, what it writes, and what it refuses."""

import gzip
import json
import lzma
import pathlib
import shutil

import jax
import pytest

from salt_jax.errors import visible
from salt_jax.inference.generation import Generator, Sampling
from salt_jax.main import main
from salt_jax.training.checkpoints import find_model
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
        shown = "\n".join(map(visible, text.split("\n")))
        assert f"[{index}] {record['prompt']}\n→ {shown}\n" in printed
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
    row = {"messages": None, "prompt": None, "text": "models é"}
    objects.write_text(f'{{"prompt": "salt ", "text": "no"}}\n\n{json.dumps(row)}\n')
    found = []
    for file in (lines, objects):
        out = tmp_path / file.stem
        flags = [f"--model={slm}", f"--prompts={file}", "--max_new_tokens=3"]
        flags += ["--compilation_cache=", f"--output_dir={out}"]
        assert main(["generate", *flags]) == 0
        found.append(generations(out))
    assert [record["prompt"] for record in found[0]] == ["salt ", "models é"]
    assert found[0] == found[1]


def test_prompts_with_a_byte_order_mark_and_compressed(
    slm: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    content = {
        "a.txt": "\ufeffsalt\n".encode(),
        "b.jsonl": b'\xef\xbb\xbf{"prompt": "salt"}\n',
        "c.txt.gz": gzip.compress(b"salt\n"),
        "d.ndjson.xz": lzma.compress(b'{"text": "salt"}'),
        "e.json": b'[{"prompt": "salt"}]',
    }
    for name, text in content.items():
        (tmp_path / name).write_bytes(text)
        out = tmp_path / f"out_{name[0]}"
        flags = [f"--model={slm}", f"--prompts={tmp_path / name}", "--max_new_tokens=1"]
        assert main(["generate", *flags, "--compilation_cache=", f"--output_dir={out}"]) == 0
        assert [record["prompt"] for record in generations(out)] == ["salt"], name


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
