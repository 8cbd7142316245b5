"""Tokenizers in models' folders: which token ends a document, and the same ids on the way back."""

import json
import pathlib
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from salt_jax.data.vocabularies import (
    ByteVocabulary,
    HuggingFaceVocabulary,
    SentencePieceVocabulary,
    load_vocabulary,
)
from salt_jax.errors import InputError
from salt_jax.huggingface.model_tokenizers import (
    model_vocabulary,
    require_rows,
    write_tokenizer,
)
from salt_jax.huggingface.tokenizer_files import copy_tokenizer
from salt_jax.preparation.trained_vocabulary import TrainedVocabulary

TEXT = pathlib.Path(json.__file__).read_text()
SPECIAL = ["<|endoftext|>", "<|padding|>", "<s>"]


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.mark.parametrize(
    ("file", "settings", "eos_id"),
    [
        ("tokenizer_config.json", {"eos_token": "<|padding|>"}, 1),
        ("tokenizer_config.json", {"eos_token": {"content": "<|padding|>", "lstrip": False}}, 1),
        ("special_tokens_map.json", {"eos_token": "<s>"}, 2),
        ("generation_config.json", {"eos_token_id": 1}, 1),
        ("config.json", {"eos_token_id": [2]}, 2),
        ("config.json", {"eos_token_id": 0}, 0),
    ],
)
def test_a_file_says_what_ends_a_document(
    file: str, settings: dict[str, Any], eos_id: int, folder: pathlib.Path
) -> None:
    (folder / file).write_text(json.dumps(settings))
    vocabulary = model_vocabulary(folder)
    assert vocabulary.eos_id == vocabulary.pad_id == vocabulary.start_id == eos_id
    assert model_vocabulary(folder, "<s>").eos_id == 2


def test_start_and_padding_have_tokens_of_their_own(folder: pathlib.Path) -> None:
    named = {"eos_token": "<|endoftext|>", "bos_token": "<s>", "pad_token": "<|padding|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    vocabulary = model_vocabulary(folder)
    assert (vocabulary.eos_id, vocabulary.pad_id, vocabulary.start_id) == (0, 1, 2)
    named |= {"bos_token": "<absent>", "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    vocabulary = model_vocabulary(folder)
    assert (vocabulary.eos_id, vocabulary.pad_id, vocabulary.start_id) == (0, 0, 0)


def test_added_tokens_beyond_the_embedding_are_named(folder: pathlib.Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    rows = tokenizer.get_vocab_size()
    tokenizer.add_tokens(["<a>", "<b>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    vocabulary = model_vocabulary(folder, "<s>")
    advice = rf"2 added tokens \('<a>', '<b>'\) beyond the {rows} rows .*embeddings\({rows + 2}\)"
    with pytest.raises(InputError, match=advice):
        require_rows(vocabulary, rows, folder)
    with pytest.raises(InputError, match=r"an added token \('<b>'\) beyond"):
        require_rows(vocabulary, rows + 1, folder)
    require_rows(vocabulary, rows + 2, folder)
    require_rows(vocabulary, rows - 1, folder)  # another model's: its settings say so
    require_rows(ByteVocabulary(), 3, folder)


@pytest.mark.parametrize("added", [["<b>", "<a>"], ["<a>", None, "<b>"]])
def test_added_tokens_that_tokenizers_would_renumber_are_refused(
    added: list[str | None], folder: pathlib.Path
) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    ids = {"<a>": 300, "<b>": 301 + (None in added)}
    content["added_tokens"] += [
        {"id": ids[name], "content": name, "special": True, **flags} for name in filter(None, added)
    ]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"added token '<b>' the id 30[12], .* reads it as 30[01]"):
        model_vocabulary(folder, "<s>")
    # A tokenizer to train with may have any ids: it is told.
    assert "gives added tokens other ids" in HuggingFaceVocabulary(path).notes[0]
    content["added_tokens"].sort(key=lambda token: token["id"])
    content["model"]["vocab"] |= ids
    path.write_text(json.dumps(content))
    assert model_vocabulary(folder, "<s>").encode("<a><b>", parse_special=True) == [*ids.values()]


@pytest.mark.parametrize("settings", [{}, {"eos_token_id": [0, 1]}, {"eos_token_id": 999}])
def test_a_tokenizer_without_an_end_of_document_is_refused(
    settings: dict[str, Any], folder: pathlib.Path
) -> None:
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"says which token ends a document.*--eos_token"):
        model_vocabulary(folder)
    with pytest.raises(InputError, match=r"has no token '<s' \(nearest: <s>\).*--eos_token"):
        model_vocabulary(folder, "<s")
    assert model_vocabulary(folder, "<s>").eos_id == 2


def test_a_folder_with_a_sentencepiece_model_alone(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        model_vocabulary(tmp_path)
    trained = TrainedVocabulary(size=400).train([TEXT])
    assert write_tokenizer(trained, tmp_path) == ["tokenizer.model", "tokenizer_config.json"]
    assert model_vocabulary(tmp_path) == trained
    with pytest.raises(InputError, match="leave --eos_token unset"):
        model_vocabulary(tmp_path, "</s>")


@pytest.mark.parametrize("model_type", ["llama", "gemma"])
def test_transformers_reads_a_sentencepiece_vocabulary_as_we_do(
    model_type: str, tmp_path: pathlib.Path
) -> None:
    """Gemma's own tokenizer would add special tokens beyond the vocabulary."""
    transformers = pytest.importorskip("transformers")
    trained = TrainedVocabulary(size=400).train([TEXT])
    write_tokenizer(trained, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == trained.size
    assert theirs.eos_token_id == trained.eos_id
    assert (theirs.bos_token_id, theirs.pad_token_id) == (trained.start_id, trained.pad_id)
    for text in (TEXT[:500], " leading", "a  b", "π ☃\n\n\tend"):
        assert theirs.encode(text, add_special_tokens=False) == trained.encode(text)


def test_a_damaged_tokenizer_is_refused(folder: pathlib.Path) -> None:
    whole = (folder / "tokenizer.json").read_text()
    for text in (whole[:-9], '{"model": 3}', "[]", ""):
        (folder / "tokenizer.json").write_text(text)
        with pytest.raises(InputError, match="is not a Hugging Face tokenizer"):
            model_vocabulary(folder, "<s>")
    (folder / "tokenizer.json").write_text(whole)
    (folder / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(InputError, match="holds a list, expected an object: name the folder"):
        model_vocabulary(folder)


def test_what_is_written_is_the_same_vocabulary(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    vocabulary = HuggingFaceVocabulary(
        folder / "tokenizer.json", pad_token="<|padding|>", start_token="<s>"
    )
    out = tmp_path / "out"
    out.mkdir()
    assert write_tokenizer(vocabulary, out) == ["tokenizer.json", "tokenizer_config.json"]
    assert model_vocabulary(out) == vocabulary
    assert write_tokenizer(ByteVocabulary(), out) == []


def test_a_tokenizers_files_are_copied_as_they_are(folder: pathlib.Path) -> None:
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<s>"}')
    (folder / "model.safetensors").write_bytes(b"no tokenizer's")
    out = folder / "out"
    out.mkdir()
    assert copy_tokenizer(folder, out) == ["tokenizer.json", "special_tokens_map.json"]
    assert {file.name for file in out.iterdir()} == {"tokenizer.json", "special_tokens_map.json"}
    assert model_vocabulary(out) == model_vocabulary(folder)


def test_transformers_gives_the_same_ids(folder: pathlib.Path) -> None:
    transformers = pytest.importorskip("transformers")
    vocabulary = model_vocabulary(folder, "<|endoftext|>")
    out = folder / "out"
    out.mkdir()
    write_tokenizer(vocabulary, out)
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    for text in (TEXT[:500], " two  spaces\n\tand é"):
        assert theirs.encode(text, add_special_tokens=False) == vocabulary.encode(text)
        assert theirs.decode(vocabulary.encode(text)) == text
    assert theirs.eos_token_id == vocabulary.eos_id


def test_a_saved_vocabulary_is_the_folders(folder: pathlib.Path) -> None:
    vocabulary = model_vocabulary(folder, "<s>")
    vocabulary.save(folder / "vocabulary")
    assert load_vocabulary(folder / "vocabulary") == vocabulary
    assert isinstance(vocabulary, HuggingFaceVocabulary)
    assert not isinstance(vocabulary, SentencePieceVocabulary)
