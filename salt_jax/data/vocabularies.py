"""The vocabularies: bytes, SentencePiece and Hugging Face's tokenizer.json, without TensorFlow.

A vocabulary is saved as a folder (vocabulary.json and the tokenizer's file) and identified by its
fingerprint: a digest of the tokenizer's bytes and of every setting that changes an id. Vocabularies
with different fingerprints still compare equal if they give every text the same ids, since versions
of transformers write the same tokenizer in different bytes.
"""

import codecs
import functools
import os
import re
import types
from collections.abc import Mapping
from typing import Any

import sentencepiece

from salt_jax.data.abstract_vocabulary import (
    MOST_IDS,
    SETTINGS_FILE,
    Vocabulary,
    checked_reserved,
)
from salt_jax.data.tokenizer_json import (
    behaviour,
    byte_of,
    load_tokenizer,
    loss_marker,
    lost_characters,
    piece_bytes,
    pieces_of,
    renumbered_tokens,
)
from salt_jax.errors import InputError
from salt_jax.storage.json_files import read_json_object, require_shape
from salt_jax.storage.local_copies import local_file, local_run

VOCABULARY_FOLDER = "vocabulary"  # of a cache and of a run

_SHOWN = 40  # characters of a text to show in an error


class ByteVocabulary(Vocabulary):
    """UTF-8 bytes, numbered as in SeqIO: padding 0, end of document 1, start 2, byte b at 3 + b."""

    _FIRST_BYTE = 3

    def __init__(self, reserved: int = 0):
        self.base_size = self._FIRST_BYTE + 256
        self.pad_id, self.eos_id, self.start_id = 0, 1, 2
        self.reserved = checked_reserved(reserved)

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        return [byte + self._FIRST_BYTE for byte in text.encode()]

    def _decode(self, ids: list[int]) -> str:
        return bytes(i - self._FIRST_BYTE for i in ids).decode(errors="replace")

    def _pieces(self) -> list[bytes]:
        return [b""] * self._FIRST_BYTE + [bytes([byte]) for byte in range(256)]


class SentencePieceVocabulary(Vocabulary):
    """A SentencePiece model with an end of document (</s>).

    Without a padding token of its own, the end of document fills rows; without <s>, models start
    from the padding id, as T5 does.
    """

    _model_file = "sentencepiece.model"

    def __init__(self, path: str | os.PathLike[str], reserved: int = 0):
        """Loads a SentencePiece .model file, and appends `reserved` ids."""
        self._bytes = _read_model(path, "SentencePiece .model")
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(self._bytes)
        except RuntimeError as error:
            raise InputError(
                f"{os.fspath(path)} is not a SentencePiece model ({error}): name a .model file."
            ) from error
        if self._processor.eos_id() < 0:
            raise InputError(
                f"The SentencePiece model {os.fspath(path)} defines no end of document "
                "(eos_id is -1): train it with an eos_id."
            )
        self.base_size, self.eos_id = self._processor.GetPieceSize(), self._processor.eos_id()
        pad_id, bos_id = self._processor.pad_id(), self._processor.bos_id()
        self.pad_id = pad_id if pad_id >= 0 else self.eos_id
        self.start_id = bos_id if bos_id >= 0 else self.pad_id
        self.reserved = checked_reserved(reserved)

    @property
    def unknown_id(self) -> int:
        """The id of text that no piece covers."""
        return int(self._processor.unk_id())

    def token(self, token_id: int) -> str:
        """An id's piece."""
        return str(self._processor.IdToPiece(token_id))

    @functools.cached_property
    def special_tokens(self) -> Mapping[int, str]:
        processor = self._processor
        ids = range(self.base_size)
        return {i: self.token(i) for i in ids if processor.IsControl(i) or processor.IsUnknown(i)}

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        if not parse_special or not self.special_tokens:
            return self._processor.EncodeAsIds(text)
        ids = {name: token_id for token_id, name in self.special_tokens.items()}
        # Longer names first: one may begin another.
        names = "|".join(map(re.escape, sorted(ids, key=len, reverse=True)))
        found: list[int] = []
        for part in filter(None, re.split(f"({names})", text)):
            found += [ids[part]] if part in ids else self._processor.EncodeAsIds(part)
        return found

    def encode_many(self, texts: list[str], parse_special: bool = False) -> list[list[int]]:
        if parse_special:
            return super().encode_many(texts, parse_special)
        return self._processor.Encode(texts)

    def _decode(self, ids: list[int]) -> str:
        return self._processor.DecodeIds(ids)

    def _pieces(self) -> list[bytes]:
        names = map(self.token, range(self.base_size))
        pieces = [
            byte_of(name) if self._processor.IsByte(i) else piece_bytes(name)
            for i, name in enumerate(names)
        ]
        for special in self.special_tokens:
            pieces[special] = b""
        return pieces

    def model_bytes(self) -> bytes:
        return self._bytes


class HuggingFaceVocabulary(Vocabulary):
    """A Hugging Face tokenizer.json; settings say which token ends a document."""

    _model_file = "tokenizer.json"
    _settings_shape = types.MappingProxyType(
        {"reserved": int, "eos_token": str, "pad_token": (None, str), "start_token": (None, str)}
    )

    def __init__(
        self,
        path: str | os.PathLike[str],
        reserved: int = 0,
        eos_token: str = "<|endoftext|>",
        pad_token: str | None = None,
        start_token: str | None = None,
        drop_unknown: bool = False,
        model: bytes | None = None,
    ):
        """Loads a tokenizer.

        Args:
          path: A tokenizer.json.
          reserved: Ids to append.
          eos_token: The token that ends a document, by default that of Pythia and GPT-2.
          pad_token: The token that fills rows; None means the end of document.
          start_token: What models read before a first token; None means the end of document.
          drop_unknown: Drop characters that a tokenizer without an unknown token has no piece for,
            instead of refusing the text.
          model: The content to use instead of the file's.
        """
        model = _read_model(path, "tokenizer.json") if model is None else model
        self._bytes = model.removeprefix(codecs.BOM_UTF8)  # which the library doesn't read
        self._tokenizer = load_tokenizer(self._bytes, path)
        if dropout := getattr(self._tokenizer.model, "dropout", None):
            self._tokenizer.model.dropout = None
            self.notes += (
                f"{os.fspath(path)} asks for BPE dropout {dropout:.3g}, which makes ids differ "
                "between runs: it is switched off.",
            )
        if moved := renumbered_tokens(self._bytes, self._tokenizer):
            token, (written, read) = next(iter(moved.items()))
            self.notes += (
                f"{os.fspath(path)} gives added tokens other ids than they get, as tokenizers "
                f"numbers them ({len(moved):,}; {token!r} {written}, and it gets {read}).",
            )
        self._loss_marker = loss_marker(self._tokenizer)
        self.drop_unknown = drop_unknown
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokens = {"eos_token": eos_token, "pad_token": pad_token, "start_token": start_token}
        # The largest id counts, not the number of ids, since some tokenizers have gaps.
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.base_size = 1 + max(ids, default=-1)
        if not 0 < self.base_size <= MOST_IDS:
            raise InputError(
                f"{os.fspath(path)} has {self.base_size:,} ids, expected 1 to {MOST_IDS:,}: name "
                "another tokenizer.json."
            )
        self.eos_id = self._id_of("eos_token", eos_token, path)
        self.pad_id = self._id_of("pad_token", pad_token or eos_token, path)
        self.start_id = self._id_of("start_token", start_token or eos_token, path)
        self.reserved = checked_reserved(reserved)

    @functools.cached_property
    def special_tokens(self) -> Mapping[int, str]:
        added = self._tokenizer.get_added_tokens_decoder()
        return {token_id: token.content for token_id, token in added.items() if token.special}

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        return self.encode_many([text], parse_special)[0]

    def token(self, token_id: int) -> str | None:
        """The token with an id, if any."""
        return self._tokenizer.id_to_token(token_id)

    def added_tokens_from(self, first: int) -> list[str]:
        """The added tokens with this id or a larger one."""
        added = self._tokenizer.get_added_tokens_decoder()
        return [token.content for token_id, token in sorted(added.items()) if token_id >= first]

    def encode_many(self, texts: list[str], parse_special: bool = False) -> list[list[int]]:
        for text in texts:
            self._refuse_loss(text, parse_special)
        self._tokenizer.encode_special_tokens = not parse_special
        try:
            encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        except Exception as error:  # tokenizers raises nothing narrower
            raise InputError(
                f"The tokenizer cannot encode a text ({error}): give its tokenizer.json an unknown "
                "token, or choose another tokenizer."
            ) from error
        return [encoding.ids for encoding in encodings]

    def lost_characters(self, text: str) -> int:
        return len(lost_characters(self._loss_marker, text)) if self._loss_marker else 0

    def _refuse_loss(self, text: str, parse_special: bool) -> None:
        if self._loss_marker is None or self.drop_unknown:
            return
        self._loss_marker.encode_special_tokens = not parse_special
        if lost := lost_characters(self._loss_marker, text):
            some = ", ".join(map(repr, sorted(set(lost))[:8]))
            raise InputError(
                f"The tokenizer has neither a piece nor an unknown token for {some} "
                f"({len(lost):,} in the text {text[:_SHOWN]!r}), which would be lost: set "
                "drop_unknown to True to leave such characters out, or choose another tokenizer."
            )

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _pieces(self) -> list[bytes]:
        return pieces_of(self._tokenizer, self._bytes, self.base_size)

    def model_bytes(self) -> bytes:
        return self._bytes

    @functools.cached_property
    def _behaviour(self) -> str:
        return behaviour(self._tokenizer)

    def _settings(self) -> dict[str, Any]:
        return {"reserved": self.reserved, **self._tokens}

    def _id_of(self, setting: str, token: str, path: str | os.PathLike[str]) -> int:
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            added = [entry.content for entry in self._tokenizer.get_added_tokens_decoder().values()]
            raise InputError(
                f"{os.fspath(path)} has no token {token!r}: set HuggingFaceVocabulary.{setting} "
                f"to one it has, perhaps one of {', '.join(map(repr, added[:8])) or 'its pieces'}."
            )
        return token_id


_CLASSES: dict[str, type[Vocabulary]] = {
    kind.__name__: kind for kind in (ByteVocabulary, SentencePieceVocabulary, HuggingFaceVocabulary)
}

_SAVED = {"class": str, "fingerprint": str, "settings": {}}
_COPY = "copy the folder again"

# Every file that `save` may write.
VOCABULARY_FILES = {SETTINGS_FILE, *(kind._model_file for kind in _CLASSES.values())} - {""}


def load_vocabulary(folder: str | os.PathLike[str]) -> Vocabulary:
    """The vocabulary saved in a folder: a vocabulary's, a run's or a cache's. InputError if there
    is none, or its fingerprint is not the one saved with it."""
    path = local_run(folder)
    if (path / VOCABULARY_FOLDER).is_dir():
        path = path / VOCABULARY_FOLDER
    if not (path / SETTINGS_FILE).exists():
        taken = "; a Hugging Face model is imported first, by `salt convert`"
        raise InputError(
            f"{path} holds no {SETTINGS_FILE}: expected the folder of a vocabulary, or of a run or "
            f"a cache that keeps one{taken if (path / 'config.json').exists() else ''}."
        )
    saved = read_json_object(path / SETTINGS_FILE, _COPY)
    require_shape(path / SETTINGS_FILE, saved, _SAVED, _COPY)
    kind = _CLASSES.get(saved["class"])
    if kind is None:
        raise InputError(
            f"{path} holds a {saved['class']}, expected one of {', '.join(_CLASSES)}: "
            "it was made by another version of salt_jax."
        )
    settings = {**saved["settings"]}
    if unknown := sorted(settings.keys() - kind._settings_shape.keys()):
        raise InputError(f"{path / SETTINGS_FILE}: {kind.__name__} has no {unknown[0]}: {_COPY}.")
    require_shape(path / SETTINGS_FILE, settings, kind._settings_shape, _COPY)
    model = {"path": path / kind._model_file} if kind._model_file else {}
    vocabulary = kind(**model, **settings)
    vocabulary.drop_unknown = saved.get("drop_unknown") is True
    if vocabulary.fingerprint != saved["fingerprint"]:
        raise InputError(
            f"The vocabulary in {path} has the fingerprint {vocabulary.fingerprint[:12]}…, "
            f"it was saved with {saved['fingerprint'][:12]}…: its files were changed, "
            "copy the folder again."
        )
    return vocabulary


def _read_model(path: str | os.PathLike[str], what: str) -> bytes:
    try:
        return local_file(path).read_bytes()
    except OSError as error:
        raise InputError(
            f"The tokenizer's file {os.fspath(path)} cannot be read ({error.strerror}): "
            f"set the vocabulary's path to a {what}."
        ) from error
