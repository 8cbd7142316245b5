"""Vocabularies: any text comes back, special ids never come from text, files are checked."""

import hashlib
import json
import pathlib
import re
import tempfile

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from salt_jax.data.vocabularies import (
    ByteVocabulary,
    HuggingFaceVocabulary,
    SentencePieceVocabulary,
    load_vocabulary,
)
from salt_jax.errors import InputError
from salt_jax.preparation.trained_vocabulary import TrainedVocabulary

SOURCE = pathlib.Path(json.__file__).parent / "decoder.py"
# SentencePiece writes spaces as U+2581, so that sign alone comes back as a space.
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"))
CODE = st.text(st.sampled_from(" \n\t\rdef(x):é<|endoftext|></s>"))


def _hugging_face_file(folder: pathlib.Path) -> pathlib.Path:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([SOURCE.read_text()], trainer)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def _vocabularies():
    with tempfile.TemporaryDirectory() as folder:
        hugging_face = HuggingFaceVocabulary(
            _hugging_face_file(pathlib.Path(folder)), reserved=4, pad_token="<|padding|>"
        )
    text = [SOURCE.read_text()]
    return {
        "bytes": ByteVocabulary(reserved=5),
        "bpe": TrainedVocabulary(size=600, reserved=3).train(text),
        "unigram": TrainedVocabulary(size=400, model_type="unigram").train(text),
        "hugging_face": hugging_face,
    }


VOCABULARIES = _vocabularies()


@pytest.fixture(params=VOCABULARIES)
def vocabulary(request):
    return VOCABULARIES[request.param]


@pytest.mark.parametrize("name", VOCABULARIES)
@settings(max_examples=150, deadline=None)
@given(text=ANY_TEXT | CODE)
def test_text_comes_back_and_gives_no_special_id(name, text):
    vocabulary = VOCABULARIES[name]
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == text
    assert not {vocabulary.eos_id, vocabulary.pad_id, vocabulary.start_id} & set(ids)
    assert all(0 <= i < vocabulary.base_size for i in ids)
    assert vocabulary.encode_many([text, "a"]) == [ids, vocabulary.encode("a")]


@pytest.mark.parametrize("name", VOCABULARIES)
@settings(max_examples=150, deadline=None)
@given(text=ANY_TEXT | CODE)
def test_the_bytes_of_the_ids_are_those_of_the_text(name, text):
    lengths_V = VOCABULARIES[name].byte_lengths
    assert lengths_V[VOCABULARIES[name].encode(text)].sum() == len(text.encode())


def test_special_and_reserved_ids_have_no_bytes(vocabulary):
    lengths_V = vocabulary.byte_lengths
    assert (lengths_V.shape, lengths_V.dtype) == ((vocabulary.size,), np.int32)
    special = [vocabulary.eos_id, vocabulary.pad_id, vocabulary.start_id, *vocabulary.reserved_ids]
    assert not lengths_V[special].any()
    assert vocabulary.byte_lengths is lengths_V


def test_added_tokens_have_the_bytes_of_their_text(tmp_path):
    """Pythia's runs of spaces are added tokens, which no byte-level alphabet writes."""
    path = _hugging_face_file(tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.add_tokens([tokenizers.AddedToken(" " * 7, normalized=False), "é é"])
    tokenizer.save(str(path))
    vocabulary = HuggingFaceVocabulary(path)
    text = "x" + " " * 7 + "y é é"
    ids = vocabulary.encode(text)
    assert {vocabulary.base_size - 2, vocabulary.base_size - 1} <= set(ids)
    assert vocabulary.byte_lengths[ids].sum() == len(text.encode())


def test_a_tokenizer_json_of_sentencepiece_s_kind(tmp_path):
    """Llama's: ▁ for a space, <0x0A> for a byte; it puts a space before every text."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "é", "▁a"]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[("▁", "a")],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = HuggingFaceVocabulary(tmp_path / "tokenizer.json", eos_token="</s>")
    text = "a é\n a ☃"
    assert vocabulary.byte_lengths[vocabulary.encode(text)].sum() == 1 + len(text.encode())


def test_the_name_of_a_special_token_is_plain_text(vocabulary):
    text = "a <|endoftext|> b </s> <s> <pad> <|padding|> <unk>"
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == text
    assert not {vocabulary.eos_id, vocabulary.pad_id, vocabulary.start_id} & set(ids)


@pytest.mark.parametrize("name", VOCABULARIES)
@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.text("a <|/s>é\n") | st.sampled_from(["<|endoftext|>", "</s>", "<s>"])))
def test_a_prompt_may_name_special_tokens(name, parts):
    vocabulary = VOCABULARIES[name]
    text = "".join(parts)
    ids = vocabulary.encode(text, parse_special=True)
    assert vocabulary.encode_many([text, "a"], parse_special=True) == [ids, vocabulary.encode("a")]
    names = vocabulary.special_tokens
    assert [i for i in ids if i in names] == [
        {token: i for i, token in names.items()}[token]
        for token in re.findall("|".join(map(re.escape, names.values())) or "(?!)", text)
    ]
    # Text before and after is text: all of it comes back.
    shown = "".join(names.get(i, "\0") for i in ids if i in names)
    assert len(vocabulary.decode(ids)) + len(shown) == len(text)
    assert vocabulary.encode(text) == vocabulary.encode(text, parse_special=False)
    assert not set(names) & set(vocabulary.encode(text))


def test_special_tokens_have_names():
    assert set(VOCABULARIES["bpe"].special_tokens.values()) == {"<pad>", "</s>", "<unk>", "<s>"}
    hugging_face = VOCABULARIES["hugging_face"].special_tokens
    assert set(hugging_face.values()) == {"<|endoftext|>", "<|padding|>"}
    assert not VOCABULARIES["bytes"].special_tokens


def test_special_and_reserved_ids_give_no_text(vocabulary):
    special = [vocabulary.eos_id, vocabulary.pad_id, vocabulary.start_id, *vocabulary.reserved_ids]
    assert vocabulary.decode([*special, *vocabulary.encode("x y"), *special]) == "x y"


def test_the_first_reserved_ids_are_modes_and_the_others_sentinels() -> None:
    vocabulary = ByteVocabulary(reserved=5)
    assert vocabulary.mode_ids == {"R": 259, "S": 260, "X": 261}
    assert list(vocabulary.sentinel_ids) == [262, 263]
    assert ByteVocabulary(reserved=1).mode_ids == {"R": 259}
    assert not ByteVocabulary(reserved=2).sentinel_ids


def test_reserved_ids_are_the_last(vocabulary):
    assert vocabulary.size == vocabulary.base_size + vocabulary.reserved
    assert list(vocabulary.reserved_ids) == list(range(vocabulary.base_size, vocabulary.size))


def test_saved_and_loaded_is_the_same(vocabulary, tmp_path):
    vocabulary.save(tmp_path)
    loaded = load_vocabulary(tmp_path)
    assert loaded == vocabulary
    assert loaded.describe() == vocabulary.describe()
    assert loaded.encode("def f(x):\n\treturn 1") == vocabulary.encode("def f(x):\n\treturn 1")


def test_fingerprints_differ():
    kinds = [*VOCABULARIES.values(), ByteVocabulary(), ByteVocabulary(reserved=6)]
    assert len({vocabulary.fingerprint for vocabulary in kinds}) == len(kinds)


def test_fingerprints_stay_what_older_versions_wrote(vocabulary):
    """Or caches and runs that are there could not be read."""
    named = ("eos_id", "pad_id", "start_id", "reserved")
    identity = {name: getattr(vocabulary, name) for name in named}
    identity["class"] = type(vocabulary).__name__
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    digest.update(vocabulary.model_bytes())
    assert vocabulary.fingerprint == digest.hexdigest()


def test_bytes_are_numbered_as_seqio_numbers_them():
    vocabulary = ByteVocabulary()
    assert (vocabulary.size, vocabulary.eos_id, vocabulary.encode("a")) == (259, 1, [100])


def test_broken_utf8_shows_as_a_replacement():
    vocabulary = ByteVocabulary()
    assert vocabulary.decode(vocabulary.encode("é")[:1]) == "�"


def test_end_of_document_may_be_id_zero(tmp_path):
    vocabulary = HuggingFaceVocabulary(_hugging_face_file(tmp_path))
    assert (vocabulary.eos_id, vocabulary.pad_id, vocabulary.start_id) == (0, 0, 0)


def test_a_token_it_does_not_have(tmp_path):
    path = _hugging_face_file(tmp_path)
    with pytest.raises(InputError, match=r"no token '<eos>'.*eos_token.*'<\|endoftext\|>'"):
        HuggingFaceVocabulary(path, eos_token="<eos>")


@pytest.mark.parametrize("kind", [SentencePieceVocabulary, HuggingFaceVocabulary])
def test_a_file_that_is_not_there_or_no_tokenizer(kind, tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        kind(tmp_path / "none")
    (tmp_path / "text").write_text("no tokenizer")
    with pytest.raises(InputError, match="is no"):
        kind(tmp_path / "text")


def test_a_changed_file_is_refused(tmp_path):
    VOCABULARIES["bpe"].save(tmp_path)
    path = tmp_path / "vocabulary.json"
    path.write_text(path.read_text().replace('"reserved": 3', '"reserved": 2'))
    with pytest.raises(InputError, match="fingerprint"):
        load_vocabulary(tmp_path)


def test_a_folder_without_a_vocabulary(tmp_path):
    with pytest.raises(InputError, match=r"holds no vocabulary\.json"):
        load_vocabulary(tmp_path)


def test_negative_reserve():
    with pytest.raises(InputError, match="reserved is -1"):
        ByteVocabulary(reserved=-1)


def test_a_vocabulary_extends_one_with_fewer_reserved_ids() -> None:
    assert ByteVocabulary(reserved=5).extends(ByteVocabulary(reserved=3))
    assert ByteVocabulary(reserved=3).extends(ByteVocabulary(reserved=3))
    assert not ByteVocabulary(reserved=3).extends(ByteVocabulary(reserved=5))
    other = ByteVocabulary(reserved=3)
    other.eos_id = 0
    assert not ByteVocabulary(reserved=5).extends(other)
