"""docs/pythia_as_slm.md from end to end: a public SLM in, a student taught by it out."""

import json
import pathlib
import re
import shlex
from typing import Any

import numpy as np
import pytest
import zstandard

from salt_jax.cli.command_line import parse_arguments
from salt_jax.cli.configuration import configure
from salt_jax.data.packed_cache import PackedCache
from salt_jax.main import main
from salt_jax.training.checkpoints import find_model, read_progress

ROOT = pathlib.Path(__file__).parent.parent.parent
VERBS = ["convert", "convert", "prepare", "score", "select", "train"]
LENGTH = 32
# What makes the guide's runs small, on one device and in float32; the ids differ in padding.
STUDENT = [
    *("--gin_file=runs/pretrain.gin", "--gin_file=models/pythia.gin"),
    "--gin_file=methods/salt_ds.gin",
    *("--gin.decoder.DecoderConfig.embed_dim=16", "--gin.decoder.DecoderConfig.num_layers=2"),
    *("--gin.decoder.DecoderConfig.num_heads=2", "--gin.decoder.DecoderConfig.mlp_dim=32"),
    *("--gin.decoder.DecoderConfig.max_length=64", "--gin.decoder.DecoderConfig.dtype='float32'"),
    *("--gin.LEARNING_RATE=1e-2", "--gin.WARMUP_STEPS=1", "--gin.N_KD=3"),
    *("--steps=5", "--batch_size=8", "--compilation_cache="),
]


def write_pile(folder: pathlib.Path) -> None:
    """A few documents of real text in the Pile's layout."""
    source = pathlib.Path(json.__file__).parent
    texts = [
        part
        for name in ("decoder.py", "encoder.py", "scanner.py")
        for part in re.split(r"\n(?=def |class )", (source / name).read_text())
    ]
    files = {"train/00": texts[4:], "val": texts[:2], "test": texts[2:4]}
    for name, documents in files.items():
        lines = [
            json.dumps({"text": text, "meta": {"pile_set_name": "Github"}}) for text in documents
        ]
        path = folder / f"{name}.jsonl.zst"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(zstandard.compress("\n".join(lines).encode()))


@pytest.mark.slow
def test_a_pythia_teaches_a_student_that_transformers_loads(
    random_models: Any, tmp_path: pathlib.Path
) -> None:
    def salt(verb: str, *flags: str, to: str) -> pathlib.Path:
        assert main([verb, *flags, f"--output_dir={tmp_path / to}"]) == 0
        return tmp_path / to

    early = random_models.make(tmp_path / "step18000", "neox")
    late = random_models.make(tmp_path / "step143000", "neox", scale=0.3)
    for step in ("18000", "143000"):
        flags = (f"--huggingface={tmp_path / f'step{step}'}", f"--step={step}")
        pythia = salt("convert", *flags, to="pythia")
    for model, step in ((early, 18_000), (late, 143_000)):
        ours, theirs = random_models.our_logits(pythia, step), random_models.their_logits(model)
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)

    write_pile(tmp_path / "pile")
    cache = salt(
        "prepare",
        "--gin_file=data/pythia_pile.gin",
        f"--gin.PILE='{tmp_path / 'pile'}'",
        f"--gin.VOCABULARY='{pythia / 'vocabulary'}'",
        *(
            "--gin.pile.pile_files.train_shards=1",
            "--gin.SHARDS=1",
            f"--gin.SEQUENCE_LENGTH={LENGTH}",
        ),
        "--workers=1",
        to="cache",
    )
    packed = PackedCache.open(cache)
    saved = find_model(pythia, 18_000, "scorer", packed)  # which refuses another vocabulary
    assert packed.vocabulary.fingerprint == saved.load_vocabulary().fingerprint
    assert packed.vocabulary.eos_id == 0

    scorer = (f"--scorer={pythia}", "--scorer_step=18000", f"--cache={cache}", "--batch_size=8")
    scores = salt("score", *scorer, "--compilation_cache=", to="scores")
    selection = salt(
        "select",
        *("--gin_file=methods/top_rows.gin", "--gin.ROWS=24"),
        *(f"--scores={scores}", f"--cache={cache}"),
        to="selection",
    )
    taught = (f"--teacher={pythia}", "--teacher.step=143000", f"--selection={selection}")
    student = salt("train", *STUDENT, *taught, f"--cache={cache}", to="student")
    teacher = find_model(pythia, 143_000, "teacher")
    progress = read_progress(student, 5)
    assert progress["teacher"]["digest"] == teacher.digest
    assert progress["counters"]["teacher_flops"] > 0
    # 300 ids, in 320 rows of the teacher's and in the student's own 384.
    config = find_model(student, None, "model").config
    assert (config.vocab_size, config.padded_vocab_size) == (random_models.ids, 384)
    assert teacher.config.padded_vocab_size == random_models.rows == 320

    out = salt("convert", f"--model={student}", to="out")
    # Without padding rows, whose ids it has never learned not to say.
    theirs, ours = random_models.their_logits(out), random_models.our_logits(student)
    assert theirs.shape[-1] == random_models.ids
    np.testing.assert_allclose(theirs, ours[..., : random_models.ids], atol=1e-4, rtol=0)
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    text = "def dumps(obj, *, skipkeys=False):"
    assert tokenizer.encode(text, add_special_tokens=False) == packed.vocabulary.encode(text)
    assert tokenizer.eos_token_id == 0


@pytest.mark.slow
def test_a_student_goes_on_from_a_converted_model(
    random_models: Any, tmp_path: pathlib.Path
) -> None:
    """--initial takes 16-bit parameters into a float32 student of the same shape."""
    random_models.make(tmp_path / "theirs", "neox", "float16")
    kept = {"chat_template.jinja": "{{ messages }}", "generation_config.json": '{"top_k": 5}'}
    for name, text in kept.items():
        (tmp_path / "theirs" / name).write_text(text)
    pythia, cache = tmp_path / "pythia", tmp_path / "cache"
    flags = [f"--huggingface={tmp_path / 'theirs'}", f"--output_dir={pythia}"]
    assert main(["convert", *flags]) == 0
    write_pile(tmp_path / "pile")
    prepare = [
        "prepare",
        "--gin_file=data/pythia_pile.gin",
        f"--gin.PILE='{tmp_path / 'pile'}'",
        f"--gin.VOCABULARY='{pythia / 'vocabulary'}'",
        *(
            "--gin.pile.pile_files.train_shards=1",
            "--gin.SHARDS=1",
            f"--gin.SEQUENCE_LENGTH={LENGTH}",
        ),
        *("--workers=1", f"--output_dir={cache}"),
    ]
    assert main(prepare) == 0
    shape = [
        *("--gin.decoder.DecoderConfig.embed_dim=32", "--gin.decoder.DecoderConfig.num_heads=4"),
        *("--gin.decoder.DecoderConfig.mlp_dim=48", "--gin.decoder.DecoderConfig.num_kv_heads=4"),
        "--gin.decoder.DecoderConfig.vocab_multiple=64",
    ]
    baseline = [flag for flag in STUDENT if not re.search("salt_ds|N_KD|embed|heads|mlp", flag)]
    run = tmp_path / "run"
    train = ["train", *baseline, *shape, "--gin_file=methods/baseline.gin", f"--cache={cache}"]
    train += [f"--initial={pythia}", f"--output_dir={run}"]
    assert main([*train, "--gin.LEARNING_RATE=1e-9"]) == 0
    saved = find_model(run, None, "model")
    assert saved.config.param_dtype == "float32"
    expected = random_models.their_logits(tmp_path / "theirs")
    np.testing.assert_allclose(random_models.our_logits(run), expected, atol=1e-4, rtol=0)
    # Without a model's file the shape is the initial model's, but not its 16 bits.
    tuned = ["train", "--gin_file=runs/finetune.gin", "--gin_file=methods/finetune.gin"]
    tuned += [f"--cache={cache}", f"--initial={pythia}", "--steps=4", "--batch_size=8"]
    tuned += ["--compilation_cache=", f"--output_dir={tmp_path / 'tuned'}"]
    assert main(tuned) == 0
    assert find_model(tmp_path / "tuned", None, "model").config.param_dtype == "float32"
    # Whoever loads it prompts it as before.
    out = tmp_path / "out"
    assert main(["convert", f"--model={tmp_path / 'tuned'}", f"--output_dir={out}"]) == 0
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"top_k": 5, "eos_token_id": 0, "bos_token_id": 0}
    import transformers

    assert transformers.AutoTokenizer.from_pretrained(out).chat_template == "{{ messages }}"
    assert transformers.GenerationConfig.from_pretrained(out).top_k == 5
    half = "--gin.decoder.DecoderConfig.param_dtype='float16'"
    assert main([*train[:-1], half, f"--output_dir={tmp_path / 'half'}"]) == 2


@pytest.mark.parametrize(
    ("file", "start", "end", "verbs"),
    [
        ("docs/pythia_as_slm.md", "## 2.", "## Starting", [*VERBS, "evaluate", "convert"]),
        (
            "README.md",
            "## With a public SLM",
            "\n## On the Pile",
            [*VERBS[2:4], "train", "convert"],
        ),
        ("README.md", "## On the Pile", "\n## ", [*VERBS, "convert"]),
    ],
)
def test_the_commands_in_the_docs_are_understood(
    file: str, start: str, end: str, verbs: list[str]
) -> None:
    """Every file, flag and setting in them exists, and none that must be set is missing."""
    text = (ROOT / file).read_text().split(start)[1].split(end)[0]
    commands = re.findall(r"^    salt (.*)$", text.replace("\\\n", " "), re.M)
    assert [command.split()[0] for command in commands] == verbs
    for command in commands:
        configure(parse_arguments(shlex.split(command, comments=True)))
