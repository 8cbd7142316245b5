"""Tokenizers of GGUF files: the ids of transformers' reading, or of the tokenizer they hold."""

import io
import json
import pathlib
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from salt_jax.data.vocabularies import HuggingFaceVocabulary
from salt_jax.huggingface.chat_templates import load_chat_template
from salt_jax.huggingface.gguf_files import GGUFFile
from salt_jax.huggingface.model_tokenizers import model_vocabulary
from tests.gguf_writer import byte_tokenizer, write_gguf
from tests.huggingface.tokenizer_classes_test import LLAMA_3, SOURCE, TEXTS

pytest.importorskip("gguf")
MORE = ["Lists:\n\n1. one\n\n\n  23 ways", "x 4567", "<|endoftext|>a <s> b</s>", "a     b\n   c"]


def described(folder: pathlib.Path, metadata: dict[str, Any]) -> HuggingFaceVocabulary:
    """The vocabulary of a file with this metadata, which is written into the folder."""
    write_gguf(folder / "tiny.gguf", "F16", metadata)
    (folder / "described").mkdir()
    GGUFFile(folder / "tiny.gguf").describe(folder / "described")
    vocabulary = model_vocabulary(folder / "described")
    assert isinstance(vocabulary, HuggingFaceVocabulary)
    return vocabulary


def theirs(folder: pathlib.Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(str(folder), gguf_file="tiny.gguf")


@pytest.mark.parametrize("rule", ["gpt-2", "smollm", "llama-bpe"])
def test_bytes(rule: str, tmp_path: pathlib.Path) -> None:
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule != "llama-bpe")
    first = {
        "gpt-2": [],
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "llama-bpe": [pre_tokenizers.Split(tokenizers.Regex(LLAMA_3), "isolated")],
    }[rule]
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([SOURCE, *MORE * 5], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    metadata = byte_tokenizer(tmp_path / "tokenizer.json")
    metadata["tokenizer.ggml.tokens"].append("xyzzy")  # which no merges make
    metadata["tokenizer.ggml.token_type"].append(1)
    vocabulary = described(tmp_path, {**metadata, "tokenizer.ggml.pre": rule})
    assert vocabulary.eos_id == 0
    assert (vocabulary.encode("xyzzy") == [vocabulary.size - 1]) == (rule == "llama-bpe")
    for text in TEXTS + MORE:
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        assert vocabulary.encode(text, parse_special=True) == expected, repr(text)
        if "<|" not in text:
            assert vocabulary.decode(expected) == text
        if rule != "smollm":  # whose digits transformers leaves with the space before them
            assert theirs(tmp_path).encode(text, add_special_tokens=False) == expected, repr(text)


@pytest.mark.parametrize("prefix", [None, True])
def test_pieces_of_sentencepiece(prefix: bool | None, tmp_path: pathlib.Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter((SOURCE + "\n".join(MORE * 5)).splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<tool>"],
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(processor.GetPieceSize())
    kinds = [(2, "IsUnknown"), (3, "IsControl"), (6, "IsByte")]
    types = [next((kind for kind, of in kinds if getattr(processor, of)(i)), 1) for i in ids]
    pieces = [processor.IdToPiece(i) for i in ids]
    types[pieces.index("<tool>")] = 4
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [processor.GetScore(i) for i in ids],
        "tokenizer.ggml.token_type": types,
        **{
            f"tokenizer.ggml.{name}_token_id": i for i, name in enumerate(("unknown", "bos", "eos"))
        },
        "tokenizer.ggml.add_space_prefix": prefix,
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}",
    }
    vocabulary = described(tmp_path, metadata)
    assert (vocabulary.eos_id, vocabulary.start_id) == (2, 1)
    for text in [*TEXTS, *MORE, "a<tool> b"]:
        expected = theirs(tmp_path).encode(text, add_special_tokens=False)
        assert vocabulary.encode(text, parse_special=True) == expected, repr(text)
    template = load_chat_template(tmp_path / "described")
    assert template is not None
    assert template([{"role": "user", "content": "hi"}]) == "<s>hi"
    settings = json.loads((tmp_path / "described/tokenizer_config.json").read_text())
    assert settings["add_bos_token"] is True, "llama.cpp's default"
