"""tokenizer.json files: equal by what they do, the same ids in every run, nothing lost unsaid."""

import codecs
import copy
import json
import pathlib
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from salt_jax.data.vocabularies import HuggingFaceVocabulary, load_vocabulary
from salt_jax.errors import InputError


def _byte_level() -> dict[str, Any]:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*letters, "ab", "Ġa", "abc"])}
    merges = [("a", "b"), ("Ġ", "a"), ("ab", "c")]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.add_tokens(["<extra>"])
    found: dict[str, Any] = json.loads(tokenizer.to_str())
    return found


def _vocabulary(folder: pathlib.Path, content: Any, **settings: Any) -> HuggingFaceVocabulary:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content))
    return HuggingFaceVocabulary(path, **settings)


def _as_an_older_version(content: dict[str, Any]) -> None:
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    for name in ("byte_fallback", "ignore_merges", "unk_token", "fuse_unk"):
        del content["model"][name]
    content["model"]["continuing_subword_prefix"] = ""
    content["model"]["vocab"] = dict(reversed(content["model"]["vocab"].items()))


def _as_a_later_version(content: dict[str, Any]) -> None:
    template = processors.TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    content["post_processor"] = json.loads(template.__getstate__())
    content["truncation"] = {
        **{"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    }
    content["normalizer"] = {"type": "Sequence", "normalizers": [content["normalizer"]]}
    content["pre_tokenizer"]["trim_offsets"] = False
    content["decoder"] = None


@pytest.mark.parametrize("rewrite", [_as_an_older_version, _as_a_later_version])
def test_one_tokenizer_in_other_bytes_is_the_same(rewrite: Any, tmp_path: pathlib.Path) -> None:
    content = _byte_level()
    ours = _vocabulary(tmp_path, content)
    rewrite(content)
    theirs = _vocabulary(tmp_path, content, reserved=2)
    assert theirs.fingerprint != ours.fingerprint
    assert theirs.extends(ours)
    assert not ours.extends(theirs)
    assert theirs != ours
    theirs = _vocabulary(tmp_path, content)
    assert theirs == ours
    assert hash(theirs) == hash(ours)


def _other_merges(content: dict[str, Any]) -> None:
    content["model"]["merges"].reverse()


def _other_ids(content: dict[str, Any]) -> None:
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def _other_normalizer(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "NFKC"}


def _other_pre_tokenizer(content: dict[str, Any]) -> None:
    content["pre_tokenizer"]["add_prefix_space"] = True


def _other_post_processor(content: dict[str, Any]) -> None:
    end = content["added_tokens"][0]
    template = processors.TemplateProcessing(
        single=f"{end['content']} $A",
        pair="$A $B:1",
        special_tokens=[(end["content"], end["id"])],
    )
    content["post_processor"] = json.loads(template.__getstate__())


def _other_added_token(content: dict[str, Any]) -> None:
    content["added_tokens"][1]["rstrip"] = True


@pytest.mark.parametrize(
    "change",
    [
        *(_other_merges, _other_ids, _other_normalizer, _other_pre_tokenizer),
        *(_other_post_processor, _other_added_token),
    ],
)
def test_a_tokenizer_that_does_something_else_is_another(
    change: Any, tmp_path: pathlib.Path
) -> None:
    content = _byte_level()
    ours = _vocabulary(tmp_path, content)
    changed = copy.deepcopy(content)
    change(changed)
    assert _vocabulary(tmp_path, changed) != ours


def test_bpe_dropout_is_switched_off(tmp_path: pathlib.Path) -> None:
    content = _byte_level()
    ours = _vocabulary(tmp_path, content)
    assert not ours.notes
    content["model"]["dropout"] = 0.9
    theirs = _vocabulary(tmp_path, content)
    (note,) = theirs.notes
    assert "BPE dropout 0.9, which makes ids differ between runs" in note
    for _ in range(20):
        assert theirs.encode("abc abc abc") == ours.encode("abc abc abc")
    assert theirs == ours
    theirs.save(tmp_path / "saved")
    assert load_vocabulary(tmp_path / "saved").fingerprint == theirs.fingerprint


def _without_unknown(**more: Any) -> dict[str, Any]:
    tokenizer = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], **more))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    found: dict[str, Any] = json.loads(tokenizer.to_str())
    return found


@pytest.mark.parametrize("many", [False, True])
def test_characters_that_a_bpe_would_lose_are_refused_unless_allowed(
    many: bool, tmp_path: pathlib.Path
) -> None:
    content = _without_unknown()
    vocabulary = _vocabulary(tmp_path, content)
    assert vocabulary.encode("abab") == [2, 2]
    lost = r"'é', '☃' \(3 in the text 'a☃b☃é'\).*set drop_unknown to True"
    with pytest.raises(InputError, match=lost):
        _ = vocabulary.encode_many(["ab", "a☃b☃é"]) if many else vocabulary.encode("a☃b☃é")
    vocabulary = _vocabulary(tmp_path, content, drop_unknown=True)
    vocabulary.save(tmp_path / "saved")
    for allowed in (vocabulary, load_vocabulary(tmp_path / "saved")):
        assert allowed.encode("a☃☃") == [0]
        assert allowed.lost_characters("a☃b☃é") == 3
        assert allowed.lost_characters("ab") == 0
        assert allowed == _vocabulary(tmp_path, content)


def test_a_tokenizer_of_bytes_that_lacks_some_would_lose_them(tmp_path: pathlib.Path) -> None:
    content = _byte_level()
    _vocabulary(tmp_path, content).encode("é ☃ \0")
    del content["model"]["vocab"]["Ã"]
    vocabulary = _vocabulary(tmp_path, content)
    vocabulary.encode("☃ \0")
    with pytest.raises(InputError, match="piece nor an unknown token for 'é' "):
        vocabulary.encode("é ☃")
    # One that falls back on bytes, too.
    pieces = {f"<0x{byte:02X}>": 10 + byte for byte in range(256)}
    content = _without_unknown(byte_fallback=True)
    content["model"]["vocab"] |= pieces
    content["added_tokens"][0]["id"] = 266
    assert _vocabulary(tmp_path, content).encode("aé") == [0, 10 + 0xC3, 10 + 0xA9]
    del content["model"]["vocab"]["<0xC3>"]
    with pytest.raises(InputError, match="piece nor an unknown token for 'é'"):
        _vocabulary(tmp_path, content).encode("aé")


@pytest.mark.parametrize(
    "model",
    [
        models.WordLevel({"a": 0}, unk_token="<unk>"),
        models.WordPiece({"a": 0}, unk_token="[UNK]"),
        models.Unigram([("a", -1.0)]),
        models.BPE({"a": 0}, [], unk_token="<unk>"),
    ],
    ids=lambda model: type(model).__name__,
)
def test_an_unknown_token_that_is_missing_is_said_in_a_sentence(
    model: Any, tmp_path: pathlib.Path
) -> None:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    vocabulary = _vocabulary(tmp_path, json.loads(tokenizer.to_str()))
    assert vocabulary.encode("a") == [0]
    for encode in (vocabulary.encode, lambda text: vocabulary.encode_many([text])):
        with pytest.raises(InputError, match=r"cannot encode a text \(.*give its tokenizer\.json"):
            encode("b")


def test_a_byte_order_mark_is_no_part_of_a_tokenizer(tmp_path: pathlib.Path) -> None:
    plain = _vocabulary(tmp_path, _byte_level())
    path = tmp_path / "tokenizer.json"
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    marked = HuggingFaceVocabulary(path)
    assert marked.fingerprint == plain.fingerprint
    assert marked.model_bytes() == plain.model_bytes()
