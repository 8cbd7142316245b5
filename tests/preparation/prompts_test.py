"""Prompts and responses in a packed cache: weights on responses alone, long examples as asked."""

import json
import pathlib

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salt_jax.commands.prepare import prepare
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.row_text import row_as_text
from salt_jax.data.vocabularies import ByteVocabulary, load_vocabulary
from salt_jax.errors import InputError
from salt_jax.main import main
from salt_jax.preparation import cache_building
from salt_jax.preparation.corpora import text_corpus
from salt_jax.preparation.packing import Packing, cut_document, pack
from salt_jax.preparation.reading_log import ReadingLog
from salt_jax.preparation.templates import Template
from salt_jax.preparation.text_files import TextFiles
from salt_jax.storage.run_folder import RunFolder
from tests.preparation.conftest import files_of
from tests.run_settings import prepare_settings

GSM8K = Template("Q: {question}\nA:", " {answer}")
DATA = pathlib.Path(__file__).parents[2].joinpath("../shared/data/gsm8k").resolve()
VOCABULARY = ByteVocabulary()
EXAMPLES = [
    {"question": f"{n} + {n}?" + "?" * (n % 7), "answer": f"it is {2 * n}" + "!" * (n % 5)}
    for n in range(40)
]


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _prepare(folder, files, **changes) -> PackedCache:
    chosen = {
        "vocabulary": VOCABULARY,
        "sequence_length": 64,
        "packing": "whole_documents",
        "long_documents": "drop",
        "workers": 1,
    }
    settings = prepare_settings(task=files, **{**chosen, **changes})
    prepare(RunFolder(folder, "prepare"), **settings)
    return PackedCache.open(folder)


def _segments(split):
    """(prompt, response) as text, from the weights: without weight and with."""
    for row in split:
        for segment in range(1, int(row["segment_ids"].max()) + 1):
            inside_L = row["segment_ids"] == segment
            targets, weights = row["targets"][inside_L], row["loss_weights"][inside_L] > 0
            assert np.all(np.diff(weights.astype(int)) >= 0), "a response follows its prompt"
            assert targets[-1] == VOCABULARY.eos_id
            assert weights[-1], "the end of document is trained on"
            yield VOCABULARY.decode(targets[~weights]), VOCABULARY.decode(targets[weights])


@settings(deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=12),
    length=st.integers(2, 20),
    packing=st.sampled_from(["whole_documents", "cut", "concatenate_and_split"]),
    seed=st.integers(0, 3),
)
def test_exactly_the_responses_have_weight(sizes, length, packing, seed):
    """Every token is another number, so that each is found again in the rows."""
    starts = 100 * np.arange(1, len(sizes) + 1)
    documents = [np.arange(s, s + p + r) for s, (p, r) in zip(starts, sizes, strict=True)]
    prompts = np.array([p for p, _ in sizes])
    if packing == "cut":
        cut = [cut_document(d, p, length) for d, p in zip(documents, prompts, strict=True)]
        for (tokens, prompt), (p, r) in zip(cut, sizes, strict=True):
            assert len(tokens) == min(p + r, length)
            # A prompt loses its beginning, a response its end, and that only when all else is gone.
            assert prompt == max(min(p, length - r), 0)
        documents = [tokens for tokens, _ in cut]
        prompts = np.array([prompt for _, prompt in cut])
    kind = "whole_documents" if packing == "cut" else packing
    rows = pack(
        documents,
        np.zeros(len(documents), int),
        prompts,
        Packing(sequence_length=length, packing=kind, seed=seed),
        pad_id=0,
        split="train",
    )
    responses = {t for d, p in zip(documents, prompts, strict=True) for t in d[p:].tolist()}
    begins = {int(document[0]) for document in documents}
    seen = []
    for row in rows:
        for at, (target, weight) in enumerate(
            zip(row["targets"].tolist(), row["loss_weights"], strict=True)
        ):
            if row["segment_ids"][at]:
                seen.append(target)
                if packing == "concatenate_and_split":
                    has_context = at > 0
                else:
                    has_context = row["positions"][at] > 0 or target in begins
                assert weight == (target in responses and has_context)
            else:
                assert weight == 0
    assert sorted(seen) == sorted(np.concatenate(documents).tolist())


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_cache_of_examples(tmp_path, kind):
    path = tmp_path / f"train.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(EXAMPLES), path)
    else:
        _write(path, EXAMPLES)
    files = TextFiles(train=str(path), validation_fraction=0.2, template=GSM8K)
    cache = _prepare(tmp_path / "cache", files)
    found = {name: sorted(_segments(cache.split(name))) for name in cache.split_names}
    expected = [(f"Q: {e['question']}\nA:", f" {e['answer']}") for e in EXAMPLES]
    assert sorted([*found["train"], *found["validation"]]) == sorted(expected)
    for name, pairs in found.items():  # each where its whole text's hash puts it
        assert pairs == sorted((d.prompt, d.text) for d in files.documents(name))
        assert all(files.split_of(prompt + text, "train") == name for prompt, text in pairs)
    info = [cache.split(name).info for name in cache.split_names]
    assert sum(i["bytes"] for i in info) == sum(len(response) for _, response in expected)
    assert sum(i["tokens"] for i in info) == sum(len(response) + 1 for _, response in expected)
    assert max(row["segment_ids"].max() for row in cache.split("train")) > 1, "rows are packed"
    shown = row_as_text(cache.split("train")[0], VOCABULARY)
    assert "⟦Q: " in shown
    assert "\nA:⟧ it is" in shown


def test_a_prompt_and_its_response_are_tokenized_apart(tmp_path):
    """The prompt's ids are those that a model is given when it is asked to respond."""

    class Pairs(ByteVocabulary):
        """Takes two bytes of "aa" for one id, so that a border between texts shows."""

        def encode(self, text, parse_special=False):
            return super().encode(text.replace("aa", "\x01"))

    files = TextFiles(
        train=_write(tmp_path / "t.jsonl", [{"p": "a", "r": "a"}]),
        template=Template("x{p}", "{r}x"),
    )
    unit_tokens = [*Pairs().encode("xa"), *Pairs().encode("ax"), Pairs().eos_id]
    (document,) = text_corpus(files).units[0].documents(Pairs(), ReadingLog())
    assert document.tokens.tolist() == unit_tokens
    assert document.prompt_tokens == 2


def test_long_examples_are_dropped_or_cut_and_counted(tmp_path, capsys):
    rows = [*EXAMPLES, {"question": "long" * 30, "answer": "it is not dropped"}]
    rows += [{"question": "why", "answer": "because " * 20}]
    path = _write(tmp_path / "train.jsonl", rows)
    files = TextFiles(train=path, template=GSM8K)
    dropped = _prepare(tmp_path / "dropped", files)
    assert len(list(_segments(dropped.split("train")))) == len(EXAMPLES)
    assert dropped.split("train").info["documents"] == len(EXAMPLES)
    counted = {"handling": "drop", "by_split": {"train": 2}}
    assert dropped.manifest["long_documents"] == counted
    assert "Dropped 2 documents of train longer than 64 tokens" in capsys.readouterr().out
    summary = json.loads((tmp_path / "dropped/summary.json").read_text())
    assert summary["long_documents"] == {"train": 2}

    cut = _prepare(tmp_path / "cut", files, long_documents="cut")
    assert cut.manifest["long_documents"] == {"handling": "cut", "by_split": {"train": 2}}
    text = "┃".join(row_as_text(row, VOCABULARY) for row in cut.split("train"))
    prompt = ("Q: " + "long" * 30 + "\nA:")[-(64 - len(" it is not dropped") - 1) :]
    assert f"⟦{prompt}⟧ it is not dropped⟨end⟩" in text
    assert (" " + "because " * 20)[:64] in text
    assert "Cut 2 documents of train" in capsys.readouterr().out


def test_a_split_of_long_examples_alone(tmp_path):
    rows = [{"question": "q" * 99, "answer": str(n)} for n in range(5)]
    files = TextFiles(train=_write(tmp_path / "train.jsonl", rows), template=GSM8K)
    with pytest.raises(
        InputError, match=r"All 5 documents of the train split .* longer than a row"
    ):
        _prepare(tmp_path / "cache", files)
    assert not (tmp_path / "cache/manifest.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"long_documents": "split"}, "can separate a response from its prompt"),
        ({"packing": "concatenate_and_split"}, "set packing to 'whole_documents'"),
        (
            {"packing": "concatenate_and_split", "long_documents": "split"},
            "can separate a response from its prompt",
        ),
        ({"long_documents": "keep"}, "long_documents is 'keep', expected one of split, drop, cut"),
    ],
)
def test_settings_that_would_separate_examples_are_refused(tmp_path, changes, message):
    files = TextFiles(train=_write(tmp_path / "train.jsonl", EXAMPLES), template=GSM8K)
    with pytest.raises(InputError, match=message):
        _prepare(tmp_path / "cache", files, **changes)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            '{"question": "a"}',
            "line 41: this row has no `answer`, it has `question`: correct the file",
        ),
        ('{"question": "a", "answer": " "}', "line 41: this row's response is empty"),
        ("{", "line 41: this is not JSON"),
    ],
)
def test_bad_rows_are_named_or_counted(tmp_path, row, message):
    path = tmp_path / "train.jsonl"
    _write(path, EXAMPLES)
    with open(path, "a") as file:
        file.write(row + "\n")
    files = TextFiles(train=str(path), template=GSM8K)
    with pytest.raises(InputError, match=message):
        _prepare(tmp_path / "cache", files)
    cache = _prepare(tmp_path / "cache", files, skip_broken_lines=True)
    assert cache.manifest["sources"][0]["broken_lines"] == 1
    assert len(list(_segments(cache.split("train")))) == len(EXAMPLES)


def test_files_without_fields_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("text")
    files = TextFiles(train=f"{tmp_path}/*.txt", template=GSM8K)
    with pytest.raises(InputError, match=r"notes\.txt is plain text, and the templates need"):
        _prepare(tmp_path / "cache", files)
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"question": "a", "reply": "b"}]), path)
    with pytest.raises(InputError, match="no column `answer`, it has question, reply"):
        _prepare(tmp_path / "cache", TextFiles(train=str(path), template=GSM8K))


def test_examples_are_duplicates_when_question_and_answer_are_equal(tmp_path):
    rows = [{"question": q, "answer": a} for q, a in ("q1", "q2", "r1", "q1")]
    files = TextFiles(train=_write(tmp_path / "train.jsonl", rows), template=GSM8K)
    cache = _prepare(tmp_path / "cache", files, drop_duplicates=True)
    expected = [(f"Q: {q}\nA:", f" {a}") for q, a in ("q1", "q2", "r1")]
    assert sorted(_segments(cache.split("train"))) == expected


def test_any_number_of_workers_gives_the_same_bytes(tmp_path):
    for number in range(3):
        own = [{**e, "question": f"{number}: {e['question']}"} for e in EXAMPLES]
        _write(tmp_path / f"{number}.jsonl", own)
    files = TextFiles(train=f"{tmp_path}/*.jsonl", validation_fraction=0.1, template=GSM8K)
    for workers in (1, 3):
        _prepare(tmp_path / str(workers), files, workers=workers, shards=2)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "3")


def test_a_preparation_that_was_stopped_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    files = TextFiles(train=_write(tmp_path / "train.jsonl", EXAMPLES), template=GSM8K)

    def stopped(job):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache_building, "merge_bucket", stopped)
    with pytest.raises(KeyboardInterrupt):
        _prepare(tmp_path / "again", files)
    monkeypatch.undo()
    monkeypatch.setattr(cache_building, "map_unit", stopped)  # which is done already
    _prepare(tmp_path / "again", files)
    monkeypatch.undo()
    _prepare(tmp_path / "straight", files)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "straight")


@pytest.mark.parametrize(
    ("packing", "digest"),
    [
        (
            "concatenate_and_split",
            "242b2259a25dd46ba8319f99b5d931ec8e583865b4fb0145ab43080ad6149ddd",
        ),
        ("whole_documents", "59aeda12d278ebd6ff4bb72983b230cb57476d86075f73f7be25ac2cb9150cca"),
    ],
)
def test_plain_documents_are_packed_as_before_there_were_prompts(tmp_path, packing, digest):
    """The digests are those of version 71424e3: caches made then keep their scores."""
    rows = [{"text": f"{n}: " + "word " * (n % 11), "subset": "ab"[n % 2]} for n in range(60)]
    files = TextFiles(train=_write(tmp_path / "0.jsonl", rows), validation_fraction=0.2)
    cache = _prepare(
        tmp_path / "cache",
        files,
        sequence_length=32,
        packing=packing,
        long_documents="split",
        shards=2,
    )
    assert cache.digest == digest


def test_from_the_command_line_with_a_runs_vocabulary(tmp_path, capsys):
    """`--gin.MODEL` takes a run, a cache, or the vocabulary's own folder."""
    path = _write(tmp_path / "train.jsonl", EXAMPLES)
    VOCABULARY.save(tmp_path / "run/vocabulary")
    assert load_vocabulary(tmp_path / "run") == load_vocabulary(tmp_path / "run/vocabulary")
    command = ["prepare", "--gin_file=data/finetune.gin", f"--gin.TRAIN='{path}'", "--workers=1"]
    command += ["--gin.SEQUENCE_LENGTH=64", "--gin.VALIDATION_FRACTION=0.2"]
    command += ["--gin.PROMPT='Q: {question}\\nA:'", "--gin.RESPONSE=' {answer}'"]
    model = f"--gin.MODEL='{tmp_path}/run'"
    assert main([*command, model, f"--output_dir={tmp_path}/cache"]) == 0
    files = TextFiles(train=path, validation_fraction=0.2, template=GSM8K)
    assert (
        PackedCache.open(tmp_path / "cache").digest == _prepare(tmp_path / "by_hand", files).digest
    )
    capsys.readouterr()
    assert main([*command, f"--gin.MODEL='{tmp_path}'", f"--output_dir={tmp_path}/no"]) == 2
    assert "expected the folder of a vocabulary, or of a run" in capsys.readouterr().err
    broken = [*command, model, "--gin.PROMPT='Q: {question'", f"--output_dir={tmp_path}/no"]
    assert main(broken) == 2
    assert "write a field as {name}" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


@pytest.mark.skipif(not DATA.exists(), reason="GSM8K's rows are not beside this checkout")
def test_gsm8k(tmp_path):
    files = TextFiles(
        train=str(DATA / "test.jsonl"),
        template=Template("Question: {question}\nAnswer:", " {answer}"),
    )
    cache = _prepare(tmp_path / "cache", files, sequence_length=1024, long_documents="drop")
    lines = [json.loads(line) for line in (DATA / "test.jsonl").read_text().splitlines()]
    expected = {f"Question: {e['question']}\nAnswer:": f" {e['answer']}" for e in lines}
    found = dict(_segments(cache.split("train")))
    long = cache.manifest["long_documents"]["by_split"]["train"]
    assert len(found) == len(expected) - long
    assert found.items() <= expected.items()
    assert 0 < long < 0.05 * len(expected)


def test_packing_says_what_it_refuses():
    with pytest.raises(InputError, match="which cuts documents wherever a row ends"):
        Packing(long_documents="cut")
