"""The tasks of prompts and responses: TFDS's own schemas, and the same tokens as from files."""

import json
from typing import Any

import numpy as np
import pytest
import seqio
import tensorflow_datasets as tfds

import gin
from salt_jax.cli.command_line import parse_arguments
from salt_jax.cli.config_files import CONFIGS
from salt_jax.cli.configuration import configure
from salt_jax.commands.prepare import prepare
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.vocabularies import ByteVocabulary
from salt_jax.errors import InputError
from salt_jax.preparation.packing import Packing
from salt_jax.preparation.registered_task import RegisteredTask
from salt_jax.preparation.runners import JobRunner
from salt_jax.preparation.templates import Template
from salt_jax.preparation.text_files import TextFiles
from salt_jax.storage.run_folder import RunFolder
from salt_jax.tasks import finetune

ROWS: dict[str, list[dict[str, Any]]] = {
    "gsm8k": [{"question": f"{n} + 1?", "answer": f"é {n + 1}\n#### {n + 1}"} for n in range(100)],
    "xsum": [{"document": f"article {n}", "summary": f"summary {n}"} for n in range(4)],
    "cnn_dailymail": [{"article": f"a {n}", "highlights": f"h {n} .\nh"} for n in range(4)],
}
ANLI_ROWS = [
    {"context": f"{n}.", "hypothesis": "so?", "label": label} for n, label in enumerate("enc")
]
ANLI = ("anli/r1", "anli/r2", "anli/r3")
ROWS |= dict.fromkeys(ANLI, ANLI_ROWS)
TEMPLATES = {
    "gsm8k": finetune.GSM8K,
    "xsum": finetune.XSUM,
    "cnn_dailymail": finetune.CNN_DAILYMAIL,
    **dict.fromkeys(ANLI, finetune.ANLI),
}


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Builds TFDS's own dataset of a name from given rows."""
    monkeypatch.delenv("SALT_VOCABULARY", raising=False)
    seqio.set_tfds_data_dir_override(str(tmp_path / "tfds"))
    for name in seqio.TaskRegistry.names():
        if name.startswith("finetune_"):
            source = seqio.TaskRegistry.get(name).source
            source.tfds_dataset._data_dir_override = None  # remembered from another test

    def build(name: str, splits: dict[str, list[dict[str, Any]]]) -> None:
        builder = tfds.builder(name, data_dir=str(tmp_path / "tfds"))
        extra = dict.fromkeys(builder.info.features, "")
        rows = {
            split: [(index, {**extra, **row}) for index, row in enumerate(given)]
            for split, given in splits.items()
        }
        builder._split_generators = lambda _: {split: iter(own) for split, own in rows.items()}
        builder.download_and_prepare()

    yield build
    seqio.set_tfds_data_dir_override(None)


def _task(name: str) -> str:
    return f"finetune_{name.replace('/', '_')}"


def _examples(task: str, split: str) -> list[dict[str, Any]]:
    dataset = seqio.get_mixture_or_task(task).get_dataset(None, split, shuffle=False)
    return list(dataset.as_numpy_iterator())


@pytest.mark.parametrize("name", ROWS)
def test_a_task_gives_what_its_template_says(build, name):
    build(name, {"train": ROWS[name]})
    vocabulary = ByteVocabulary()
    found = [
        (vocabulary.decode(e["inputs"]), vocabulary.decode(e["targets"]))
        for split in ("train", "validation" if name == "gsm8k" else "")
        if split
        for e in _examples(_task(name), split)
    ]
    assert sorted(found) == sorted(tuple(TEMPLATES[name].fill(row)) for row in ROWS[name])


def test_the_end_of_document_is_behind_the_response_alone(build):
    build("xsum", {"train": ROWS["xsum"]})
    for example in _examples("finetune_xsum", "train"):
        assert example["targets"][-1] == 1
        assert not np.any(example["inputs"] == 1)
        assert np.all(example["targets"][:-1] != 1)


def test_the_labels_words(build):
    assert [finetune.ANLI.fill(row).response for row in ROWS["anli/r2"]] == [
        " True",
        " Neither",
        " False",
    ]
    build("anli/r2", {"train": ROWS["anli/r2"]})  # which numbers its labels
    texts = {
        e["inputs_pretokenized"][:1]: e["targets_pretokenized"]
        for e in _examples("finetune_anli_r2", "train")
    }
    assert texts == {b"0": b" True", b"1": b" Neither", b"2": b" False"}


def test_the_three_rounds_of_anli_are_mixed(build):
    for number, name in enumerate(ANLI):
        build(name, {"train": [{**row, "context": f"round {number}"} for row in ANLI_ROWS]})
    mixed = seqio.get_mixture_or_task("finetune_anli").get_dataset(None, "train", shuffle=False)
    texts = [ByteVocabulary().decode(e["inputs"]) for e in mixed.take(30).as_numpy_iterator()]
    assert {text[:7] for text in texts} == {"round 0", "round 1", "round 2"}


def test_gsm8k_holds_train_rows_out(build):
    build("gsm8k", {"train": ROWS["gsm8k"], "test": ROWS["gsm8k"][:3]})
    sizes = [len(_examples("finetune_gsm8k", s)) for s in ("train", "validation", "test")]
    assert sizes == [98, 2, 3]


def test_rows_without_a_response_are_left_out(build):
    build("xsum", {"train": [*ROWS["xsum"], {"document": "a", "summary": " "}]})
    assert len(_examples("finetune_xsum", "train")) == len(ROWS["xsum"])


def test_a_task_and_its_rows_as_a_file_give_the_same_cache(build, tmp_path):
    """Bucket, order, tokens and weights; only what names the subset differs."""
    build("xsum", {"train": ROWS["xsum"], "test": ROWS["xsum"][2:]})
    for split in ("train", "test"):
        lines = map(json.dumps, _xsum_in_order(split))
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    common: dict[str, Any] = {
        "rows": Packing(64, "whole_documents", long_documents="drop"),
        "jobs": JobRunner(workers=1),
    }
    files = TextFiles(
        train=str(tmp_path / "train.jsonl"),
        test=str(tmp_path / "test.jsonl"),
        template=finetune.XSUM,
        default_subset="finetune_xsum",
    )
    prepare(
        RunFolder(tmp_path / "files", "prepare"),
        task=files,
        vocabulary=ByteVocabulary(),
        **common,
    )
    task = RegisteredTask("finetune_xsum", "salt_jax.tasks.finetune")
    prepare(RunFolder(tmp_path / "task", "prepare"), task=task, **common)
    caches = [PackedCache.open(tmp_path / name) for name in ("files", "task")]
    assert caches[0].manifest["splits"] == caches[1].manifest["splits"]
    assert caches[0].split("train").info["shared_documents"] == 2
    with pytest.raises(InputError, match="can separate a response from its prompt"):
        prepare(
            RunFolder(tmp_path / "split", "prepare"),
            task=task,
            **{**common, "rows": Packing(64, "whole_documents")},
        )


def _xsum_in_order(split: str) -> list[dict[str, Any]]:
    """XSum's rows in the order in which TFDS keeps them."""
    rows = {finetune.XSUM.fill(row).prompt: row for row in ROWS["xsum"]}
    examples = _examples("finetune_xsum", split)
    return [rows[example["inputs_pretokenized"].decode()] for example in examples]


# chat.gin is of the model's own template, for no data set.
NAMES = sorted(p.stem for p in (CONFIGS / "templates").glob("*.gin") if p.stem != "chat")


@pytest.mark.parametrize("name", NAMES)
def test_gin_has_the_same_templates(name):
    flags = ["evaluate", "--gin_file=data/responses.gin", f"--gin_file=templates/{name}.gin"]
    configure(parse_arguments([*flags, "--gin.EXAMPLES='test.jsonl'", "--model=RUN"]))
    assert gin.get_configurable(Template)() == getattr(finetune, name.upper())
