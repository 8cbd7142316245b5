"""The path from text to a report with everything in a bucket, and nothing else shared."""

import pathlib
import shutil

import pytest

from salt_jax.main import main
from tests.bucket_emulator import BucketEmulator
from tests.preparation.conftest import make_corpus  # noqa: F401 (a fixture)

pytest.importorskip("s3fs")
B = "s3://bucket/work"
TINY = [
    *("--gin_file=runs/smoke_slm.gin", "--gin_file=methods/baseline.gin", "--steps=4"),
    *("--gin.KEEP_STEPS=()", "--batch_size=8", "--gin.decoder.DecoderConfig.num_layers=1"),
    *("--gin.decoder.DecoderConfig.embed_dim=16", "--gin.decoder.DecoderConfig.num_heads=1"),
]


def test_from_text_to_a_report(
    make_corpus,  # noqa: F811
    bucket: BucketEmulator,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    corpus = make_corpus(files=3, documents=300)
    for path in corpus.rglob("*.jsonl"):
        bucket.store(f"bucket/text/{path.relative_to(corpus)}", path.read_bytes())

    def salt(verb: str, *flags: str) -> None:
        monkeypatch.setenv("SALT_LOCAL_COPIES", str(tmp_path / f"machine of {verb}"))
        typed = [verb, *flags, f"--output_dir={B}/{verb}"]
        assert main(typed) == 0, capsys.readouterr().err
        assert main(typed) == 0, capsys.readouterr().err  # and again, on what is there
        shutil.rmtree(tmp_path / f"machine of {verb}")

    made = ["--gin_file=data/text.gin", "--sequence_length=32", "--gin.VOCABULARY_SIZE=300"]
    salt("prepare", *made, "--workers=2", "--gin.TEXT='s3://bucket/text/**/*.jsonl'")
    straight, text = tmp_path / "straight", f"--gin.TEXT='{corpus}/**/*.jsonl'"
    assert main(["prepare", *made, text, f"--output_dir={straight}"]) == 0
    assert bucket.objects["bucket/work/prepare/COMPLETED"] == (straight / "COMPLETED").read_bytes()
    salt("train", *TINY, f"--cache={B}/prepare")
    salt("score", f"--scorer={B}/train", f"--cache={B}/prepare")
    salt(
        *("select", "--gin_file=methods/top_fraction.gin", "--gin.FRACTION=0.5"),
        *(f"--cache={B}/prepare", f"--scores={B}/score"),
    )
    salt("report", f"{B}/train", f"{B}/score", f"{B}/select")
    assert b"<html" in bucket.objects["bucket/work/report/index.html"]
    for verb in ("prepare", "score", "select"):
        assert f"bucket/work/{verb}/COMPLETED" in bucket.objects
    assert "bucket/work/train/checkpoints/4/digests.json" in bucket.objects
    salt("evaluate", f"--model={B}/train", f"--cache={B}/prepare")
    assert b"log_perplexity" in bucket.objects["bucket/work/evaluate/summary.json"]
