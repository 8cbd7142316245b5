"""Vocabularies: text to token ids and back, without TensorFlow.

In: text, or a tokenizer's file. Out: ids. A vocabulary is kept as a folder (vocabulary.json and the
tokenizer's file) and known by its fingerprint: a digest of the tokenizer's bytes and of every
setting that changes an id. Two of different fingerprints are equal all the same where they give
every text the same ids: versions of transformers write one tokenizer in different bytes.

The ids of special tokens are the vocabulary's own business (Pythia's end of document is 0): nothing
else may assume them. `reserved` ids are appended after the tokenizer's own: the first three are the
mode tokens [R], [S] and [X] of `denoisers.py`, the others its sentinels, in ascending order.
"""

import abc
import contextlib
import functools
import hashlib
import json
import os
import pathlib
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import sentencepiece

from salt_jax.data.durable_files import whole_file, write_text
from salt_jax.data.json_files import Shape, read_json_object, require_shape
from salt_jax.data.local_copies import local_file, local_folder
from salt_jax.data.token_bytes import sentencepiece_lengths, tokenizer_json_lengths
from salt_jax.data.tokenizer_json import (
    behaviour,
    clear_dropout,
    load_tokenizer,
    loss_marker,
    lost_characters,
)
from salt_jax.errors import InputError

VOCABULARY_FOLDER = "vocabulary"  # of a cache and of a run
SETTINGS_FILE = "vocabulary.json"

# Arrays of a vocabulary's size are held in memory; no tokenizer comes near it.
_MOST_IDS = 1 << 24

_SHOWN = 40  # characters of a text, in an error

# UL2's: short spans, a prefix, extreme spans.
MODES = ("R", "S", "X")


class Vocabulary(abc.ABC):
    """Text to ids and back.

    Attributes:
      base_size: Ids of the tokenizer, special ones included.
      eos_id: Ends a document.
      pad_id: Fills a row; means nothing by itself (segment ids say what is padding).
      start_id: What a model reads before a segment's first token.
      reserved: Ids appended at the end.
      drop_unknown: Whether `encode` leaves out what it has no id for, instead of refusing it.
      notes: What whoever takes the vocabulary up should be told, sentences.
    """

    drop_unknown: bool = False
    notes: Sequence[str] = ()
    base_size: int
    eos_id: int
    pad_id: int
    start_id: int
    reserved: int

    @property
    def size(self) -> int:
        """All ids, special and reserved ones included."""
        return self.base_size + self.reserved

    @property
    def reserved_ids(self) -> range:
        """The ids kept for denoising sentinels and mode tokens."""
        return range(self.base_size, self.size)

    @property
    def mode_ids(self) -> Mapping[str, int]:
        """The id of each of MODES; those are missing that `reserved` has no room for."""
        return dict(zip(MODES, self.reserved_ids, strict=False))

    @property
    def sentinel_ids(self) -> range:
        """What stands for a corrupted span, the first span's first."""
        return self.reserved_ids[len(MODES) :]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the tokenizer's bytes and the settings: equal fingerprint, equal ids."""
        return self._digest(self._identity())

    def extends(self, other: "Vocabulary") -> bool:
        """Whether it gives every text the other one's ids, perhaps with more reserved ones."""
        if self.reserved < other.reserved or self._meaning() != other._meaning():
            return False
        return self.model_bytes() == other.model_bytes() or self._behaviour == other._behaviour

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for, int32[size]; special and reserved ids have none.

        Summed over `encode(text)` they are the text's bytes wherever the tokenizer keeps all of a
        text. One that normalizes counts the normalized text, with the space that a SentencePiece
        model may put before it; an unknown token counts nothing.
        """
        lengths_V = np.zeros(self.size, np.int32)
        lengths_V[: self.base_size] = self._byte_lengths()
        lengths_V[[self.eos_id, self.pad_id, self.start_id]] = 0
        return lengths_V

    @functools.cached_property
    def special_tokens(self) -> Mapping[int, str]:
        """The names of special tokens by id; none of a vocabulary whose tokens have no names."""
        return {}

    @abc.abstractmethod
    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """The text's ids, without an end of document.

        Args:
          text: The text.
          parse_special: Whether the name of a special token in the text stands for that token, as
            in a prompt; in a corpus it is text like any other.

        Raises:
          InputError: The tokenizer has no id for a part of the text, and would lose it.
        """

    def encode_many(self, texts: list[str], parse_special: bool = False) -> list[list[int]]:
        """`encode` of each text; subclasses are faster than one by one where they can."""
        return [self.encode(text, parse_special) for text in texts]

    def lost_characters(self, text: str) -> int:
        """How many characters of the text `encode` leaves out."""
        return 0

    def decode(self, ids: Iterable[int]) -> str:
        """The ids' text; special and reserved ids give none, broken UTF-8 gives U+FFFD."""
        silent = {self.eos_id, self.pad_id, self.start_id}
        return self._decode([i for i in map(int, ids) if i not in silent and i < self.base_size])

    def describe(self) -> dict[str, Any]:
        """What a manifest records of it."""
        return {**self._identity(), "size": self.size, "fingerprint": self.fingerprint}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the vocabulary into a folder that `load_vocabulary` reads."""
        path = pathlib.Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        if self._model_file:
            with whole_file(path / self._model_file) as file:
                file.write(self.model_bytes())
        described = {**self.describe(), "settings": self._settings()}
        if self.drop_unknown:
            described["drop_unknown"] = True
        write_text(path / SETTINGS_FILE, json.dumps(described, indent=2) + "\n")

    # What a subclass says of itself: the name its model file gets, the file's bytes, the keyword
    # arguments that make it again and their types, how ids that are none of the special ones become
    # text, and how many bytes of it.
    _model_file = ""
    _settings_shape: Mapping[str, Shape] = types.MappingProxyType({"reserved": int})

    def model_bytes(self) -> bytes:
        """The tokenizer's file; nothing where there is none."""
        return b""

    def _settings(self) -> dict[str, Any]:
        return {"reserved": self.reserved}

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    def _digest(self, identity: dict[str, Any]) -> str:
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
        digest.update(self.model_bytes())
        return digest.hexdigest()

    @abc.abstractmethod
    def _byte_lengths(self) -> np.ndarray: ...

    @functools.cached_property
    def _behaviour(self) -> Any:
        """What the tokenizer does with a text, in a form that can be compared."""
        return self.model_bytes()

    def _meaning(self) -> dict[str, Any]:
        """The identity but for what no text's ids and no model's input depend on."""
        return {**self._identity(), "reserved": 0, "pad_id": 0}

    def _identity(self) -> dict[str, Any]:
        return {
            "class": type(self).__name__,
            "eos_id": self.eos_id,
            "pad_id": self.pad_id,
            "start_id": self.start_id,
            "reserved": self.reserved,
        }

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Vocabulary):
            return NotImplemented
        return self.reserved == other.reserved and self.extends(other)

    def __hash__(self) -> int:
        return hash(tuple(self._meaning().values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(size={self.size}, fingerprint={self.fingerprint[:12]})"


class ByteVocabulary(Vocabulary):
    """UTF-8 bytes: padding 0, end of document 1, start 2, byte b at 3 + b (as SeqIO numbers
    them)."""

    _FIRST_BYTE = 3

    def __init__(self, reserved: int = 0):
        self.base_size = self._FIRST_BYTE + 256
        self.pad_id, self.eos_id, self.start_id = 0, 1, 2
        self.reserved = _checked_reserved(reserved)

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        return [byte + self._FIRST_BYTE for byte in text.encode()]

    def _decode(self, ids: list[int]) -> str:
        return bytes(i - self._FIRST_BYTE for i in ids).decode(errors="replace")

    def _byte_lengths(self) -> np.ndarray:
        return np.ones(self.base_size, np.int32)  # the three below the bytes are special


class SentencePieceVocabulary(Vocabulary):
    """A SentencePiece model.

    The model must define an end of document (</s>). Where it defines no padding, the end of
    document fills rows; where it defines no <s>, models start from the padding id, as T5's do.
    """

    _model_file = "sentencepiece.model"

    def __init__(self, path: str | os.PathLike[str], reserved: int = 0):
        """Loads a model.

        Args:
          path: A SentencePiece .model file.
          reserved: Ids to append.

        Raises:
          InputError: No such file, no SentencePiece model, or a model without an end of document.
        """
        self._bytes = _read_model(path, "SentencePiece .model")
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(self._bytes)
        except RuntimeError as error:
            raise InputError(
                f"{os.fspath(path)} is no SentencePiece model ({error}): name a .model file."
            ) from error
        if self._processor.eos_id() < 0:
            raise InputError(
                f"The SentencePiece model {os.fspath(path)} defines no end of document "
                "(eos_id is -1): train it with an eos_id."
            )
        self.base_size = self._processor.GetPieceSize()
        self.eos_id = self._processor.eos_id()
        pad_id, bos_id = self._processor.pad_id(), self._processor.bos_id()
        self.pad_id = pad_id if pad_id >= 0 else self.eos_id
        self.start_id = bos_id if bos_id >= 0 else self.pad_id
        self.reserved = _checked_reserved(reserved)

    @property
    def unknown_id(self) -> int:
        """What stands for what no piece covers."""
        return int(self._processor.unk_id())

    def token(self, token_id: int) -> str:
        """An id's piece."""
        return str(self._processor.IdToPiece(token_id))

    @functools.cached_property
    def special_tokens(self) -> Mapping[int, str]:
        processor = self._processor
        control = [i for i in range(self.base_size) if processor.IsControl(i)]
        return {i: self.token(i) for i in control}

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

    def _byte_lengths(self) -> np.ndarray:
        return sentencepiece_lengths(self._processor)

    def model_bytes(self) -> bytes:
        return self._bytes


class HuggingFaceVocabulary(Vocabulary):
    """A Hugging Face tokenizer.json.

    The file doesn't say which token ends a document, so settings do; "<|endoftext|>" is Pythia's
    and GPT-2's. Added tokens such as "<|endoftext|>" inside a text are tokenized as plain text.
    """

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
    ):
        """Loads a tokenizer.

        Args:
          path: A tokenizer.json.
          reserved: Ids to append.
          eos_token: The token that ends a document.
          pad_token: The token that fills rows; None takes the end of document.
          start_token: What models read before a first token; None takes the end of document.
          drop_unknown: Leave out characters that a tokenizer without an unknown token has no piece
            for, instead of refusing the text.

        Raises:
          InputError: No such file, no tokenizer, or a token that it doesn't have.
        """
        self._bytes = _read_model(path, "tokenizer.json")
        self._tokenizer = load_tokenizer(self._bytes, path)
        if dropout := clear_dropout(self._tokenizer):
            self.notes = (
                f"{os.fspath(path)} asks for BPE dropout {dropout:.3g}, by which no two runs would "
                "have the same ids: it is switched off.",
            )
        self._loss_marker = loss_marker(self._tokenizer)
        self.drop_unknown = drop_unknown
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokens = {"eos_token": eos_token, "pad_token": pad_token, "start_token": start_token}
        # Some tokenizers leave gaps between their ids, so the largest id counts, not their number.
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.base_size = 1 + max(ids, default=-1)
        if not 0 < self.base_size <= _MOST_IDS:
            raise InputError(
                f"{os.fspath(path)} has {self.base_size:,} ids, expected 1 to {_MOST_IDS:,}: name "
                "another tokenizer.json."
            )
        self.eos_id = self._id_of("eos_token", eos_token, path)
        self.pad_id = self._id_of("pad_token", pad_token or eos_token, path)
        self.start_id = self._id_of("start_token", start_token or eos_token, path)
        self.reserved = _checked_reserved(reserved)

    @functools.cached_property
    def special_tokens(self) -> Mapping[int, str]:
        added = self._tokenizer.get_added_tokens_decoder()
        return {token_id: token.content for token_id, token in added.items() if token.special}

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        self._refuse_loss(text, parse_special)
        self._tokenizer.encode_special_tokens = not parse_special
        with _refusing_unknown():
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def token(self, token_id: int) -> str | None:
        """The token that has an id, if one does."""
        return self._tokenizer.id_to_token(token_id)

    def added_tokens_from(self, first: int) -> list[str]:
        """The tokens that were added to the tokenizer and have this id or a larger one."""
        added = self._tokenizer.get_added_tokens_decoder()
        return [token.content for token_id, token in sorted(added.items()) if token_id >= first]

    def encode_many(self, texts: list[str], parse_special: bool = False) -> list[list[int]]:
        for text in texts:
            self._refuse_loss(text, parse_special)
        self._tokenizer.encode_special_tokens = not parse_special
        with _refusing_unknown():
            encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
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
                "drop_unknown to True to leave such characters out, or take another tokenizer."
            )

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _byte_lengths(self) -> np.ndarray:
        return tokenizer_json_lengths(self._tokenizer, self._bytes, self.base_size)

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
    """The vocabulary saved in a folder.

    Args:
      folder: The vocabulary's own, or that of a run or a cache that keeps one.

    Raises:
      InputError: No vocabulary there, or one whose fingerprint is not the one saved with it.
    """
    path = local_folder(folder)
    if (path / VOCABULARY_FOLDER).is_dir():
        path = path / VOCABULARY_FOLDER
    if not (path / SETTINGS_FILE).exists():
        taken = "; a model of Hugging Face's is taken in first, by `salt convert`"
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


def hugging_face_tokens(path: str | os.PathLike[str]) -> dict[str, int]:
    """Every token of a tokenizer.json with its id, special ones included.

    Raises:
      InputError: No such file, or no tokenizer.
    """
    tokenizer = load_tokenizer(_read_model(path, "tokenizer.json"), path)
    return tokenizer.get_vocab(with_added_tokens=True)


@contextlib.contextmanager
def _refusing_unknown() -> Iterator[None]:
    """What tokenizers raises for a text that has what no piece stands for."""
    try:
        yield
    except Exception as error:  # tokenizers raises nothing narrower
        raise InputError(
            f"The tokenizer cannot encode a text ({error}): give its tokenizer.json an unknown "
            "token, or take another tokenizer."
        ) from error


def _checked_reserved(reserved: int) -> int:
    if not 0 <= reserved <= _MOST_IDS:
        raise InputError(
            f"reserved is {reserved}, expected 0 to {_MOST_IDS:,} ids: change the vocabulary's "
            "setting."
        )
    return reserved
