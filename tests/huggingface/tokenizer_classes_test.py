"""The ids of transformers' AutoTokenizer, for each kind of tokenizer and what its settings say."""

import io
import json
import pathlib
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from salt_jax.data.vocabularies import HuggingFaceVocabulary, SentencePieceVocabulary
from salt_jax.huggingface.model_tokenizers import model_vocabulary

SOURCE = pathlib.Path(json.__file__).with_name("decoder.py").read_text() + " é ☃ 水 日本語 " * 5
TEXTS = [
    *("Hello world", " leading", "  two leading", "trailing ", "a  b   c", "\n\n\tx\n", "\r\n\r\n"),
    *(
        "def f(x):\n    return x",
        "12345 1,000.50",
        "日本語 水 Ｆｕｌｌ",
        "☃😀👩‍👩‍👧",
        "",
        " ",
        "   ",
    ),
    *("é e\u0301 ﬁ Å", "a\u00a0b\u3000c\u200bd", "I'm don't WE'LL", "x" * 40, "▁x ▁", "<x> </"),
    *("<s>a</s> b", "a<unk>b", "<|endoftext|> x", "x<|endoftext|>"),
]
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _agree(folder: pathlib.Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), model_vocabulary(folder)
    for text in TEXTS:
        expected = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, parse_special=True) == expected, repr(text)
    assert ours.encode_many(TEXTS, True) == [ours.encode(text, True) for text in TEXTS]
    assert ours.eos_id == theirs.eos_token_id


def _settings(folder: pathlib.Path, model_type: str | None = None, **settings: Any) -> None:
    given = {name: value for name, value in settings.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(given))
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))


def _save_bytes(folder: pathlib.Path, first: Any, normalizer: Any = None) -> None:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = first, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [SOURCE],
        trainers.BpeTrainer(
            vocab_size=500, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet
        ),
    )
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("prefix", [None, True, False])
@pytest.mark.parametrize("in_file", [True, False])
@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        *((None, None), (None, "llama"), (None, "gpt_neox"), ("GPTNeoXTokenizerFast", "gpt_neox")),
        *(("PreTrainedTokenizerFast", "gpt_neox"), ("GPT2Tokenizer", "llama")),
        ("LlamaTokenizer", "llama"),
    ],
)
def test_bytes(
    name: str | None, model_type: str | None, in_file: bool, prefix: bool | None, tmp_path: Any
) -> None:
    _save_bytes(tmp_path, pre_tokenizers.ByteLevel(add_prefix_space=in_file), normalizers.NFC())
    end = {"eos_token": "<|endoftext|>", "add_prefix_space": prefix}
    _settings(tmp_path, model_type, tokenizer_class=name, **end)
    _agree(tmp_path)


@pytest.mark.parametrize("name", [None, "PreTrainedTokenizerFast", "LlamaTokenizer"])
def test_bytes_of_a_pattern_s_pieces(name: str | None, tmp_path: pathlib.Path) -> None:
    """Llama 3's."""
    pieces = pre_tokenizers.Split(tokenizers.Regex(LLAMA_3), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    _save_bytes(tmp_path, pre_tokenizers.Sequence([pieces, level]))
    _settings(tmp_path, "llama", tokenizer_class=name, eos_token="<|endoftext|>")
    _agree(tmp_path)


def _sentencepiece(**settings: Any) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(SOURCE.splitlines()),
        model_writer=model,
        vocab_size=500,
        byte_fallback=True,
        minloglevel=2,
        **settings,
    )
    return model.getvalue()


AS_IT_IS = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
NAMED = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}


@pytest.fixture(scope="module")
def llama_2() -> tokenizers.Tokenizer:
    """As the files of Llama 2 have it: a normalizer puts a space before every text."""
    model = sentencepiece.SentencePieceProcessor(
        model_proto=_sentencepiece(model_type="bpe", **AS_IT_IS)
    )
    vocab = {model.IdToPiece(i): i for i in range(model.GetPieceSize())}
    pairs = [
        (piece[:at], piece[at:])
        for piece in vocab
        for at in range(1, len(piece))
        if piece[:at] in vocab and piece[at:] in vocab
    ]
    bpe = models.BPE(vocab, pairs, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(bpe)
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(spaces)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@pytest.mark.parametrize("prefix", [None, True, False])
@pytest.mark.parametrize("legacy", [None, True, False])
@pytest.mark.parametrize(
    "name", [None, "LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"]
)
def test_llama_2(
    name: str | None, legacy: bool | None, prefix: bool | None, llama_2: Any, tmp_path: pathlib.Path
) -> None:
    llama_2.save(str(tmp_path / "tokenizer.json"))
    more = {"legacy": legacy, "add_prefix_space": prefix}
    _settings(tmp_path, "llama", tokenizer_class=name, **NAMED, **more)
    _agree(tmp_path)


@pytest.mark.parametrize("name", [None, "GemmaTokenizer", "GemmaTokenizerFast"])
def test_gemma(name: str | None, llama_2: Any, tmp_path: pathlib.Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_str(llama_2.to_str())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    _settings(tmp_path, "gemma", tokenizer_class=name, **NAMED)
    _agree(tmp_path)


@pytest.mark.parametrize("prefix", [None, False])
@pytest.mark.parametrize("legacy", [None, True, False])
@pytest.mark.parametrize("name", ["LlamaTokenizer", "GemmaTokenizer"])
@pytest.mark.parametrize(
    "trained",
    [
        {"model_type": "bpe", **AS_IT_IS, "user_defined_symbols": ["ab", "\n"]},
        {"model_type": "bpe"},
        {"model_type": "unigram"},
        {"model_type": "bpe", **AS_IT_IS, "add_dummy_prefix": False},
    ],
    ids=["llama", "normalized", "unigram", "no prefix"],
)
def test_a_sentencepiece_model_alone(
    trained: Any, name: str, legacy: bool | None, prefix: bool | None, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(_sentencepiece(**trained))
    more = {"legacy": legacy, "add_prefix_space": prefix}
    model_type = "llama" if name == "LlamaTokenizer" else "gemma"
    _settings(tmp_path, model_type, tokenizer_class=name, **NAMED, **more)
    _agree(tmp_path)


def test_a_sentencepiece_model_that_no_class_is_named_for(tmp_path: pathlib.Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(_sentencepiece(model_type="bpe"))
    assert isinstance(model_vocabulary(tmp_path), SentencePieceVocabulary)


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("scheme", ["always", "first", "never"])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_metaspace(kind: str, scheme: str, split: bool, tmp_path: pathlib.Path) -> None:
    special = ["<unk>", "</s>"]
    trainer: Any
    if kind == "bpe":
        tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special)
    else:
        tokenizer = tokenizers.Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    tokenizer.train_from_iterator([SOURCE], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {"eos_token": "</s>", "unk_token": "<unk>"}
    _settings(tmp_path, tokenizer_class="PreTrainedTokenizerFast", **settings)
    _agree(tmp_path)


def test_a_file_that_its_class_reads_as_it_stands_keeps_its_bytes(tmp_path: pathlib.Path) -> None:
    _save_bytes(tmp_path, pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFC())
    settings = {"tokenizer_class": "GPTNeoXTokenizer", "eos_token": "<|endoftext|>"}
    _settings(tmp_path, "gpt_neox", **settings)
    ours = model_vocabulary(tmp_path)
    assert ours.fingerprint == HuggingFaceVocabulary(tmp_path / "tokenizer.json").fingerprint
