"""The interface of a vocabulary: text to token ids and back.

Special token ids are known only here (Pythia's end of document is 0). `reserved` ids are appended
after the tokenizer's own: the first three are the mode tokens [R], [S] and [X] of `denoisers.py`,
the others its sentinels, in ascending order. The implementations are in `vocabularies.py`.
"""

import abc
import functools
import hashlib
import json
import os
import types
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from salt_jax.errors import InputError
from salt_jax.storage.buckets import path_of
from salt_jax.storage.durable_files import whole_file, write_text
from salt_jax.storage.json_files import Shape

SETTINGS_FILE = "vocabulary.json"

# A limit because arrays of the vocabulary's size are held in memory; no tokenizer comes near it.
MOST_IDS = 1 << 24

# UL2's: short spans, a prefix, extreme spans.
MODES = ("R", "S", "X")


class Vocabulary(abc.ABC):
    """Text to ids and back.

    Attributes:
      base_size: The tokenizer's ids, special ones included.
      eos_id: Ends a document.
      pad_id: Fills a row; padding is marked by segment ids, not by this id.
      start_id: What a model reads before a segment's first token.
      reserved: How many ids are appended at the end.
      drop_unknown: Whether `encode` drops text it has no id for, instead of refusing it.
      notes: Warnings to show the user.
    """

    drop_unknown: bool = False
    notes: tuple[str, ...] = ()
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
        """The id of each of MODES that `reserved` has room for."""
        return dict(zip(MODES, self.reserved_ids, strict=False))

    @property
    def sentinel_ids(self) -> range:
        """The ids that replace corrupted spans, in the order of the spans."""
        return self.reserved_ids[len(MODES) :]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the tokenizer's bytes and settings; if equal, so are all ids."""
        identity = json.dumps(self._identity(), sort_keys=True).encode()
        return hashlib.sha256(identity + self.model_bytes()).hexdigest()

    def extends(self, other: "Vocabulary") -> bool:
        """Whether it encodes every text as `other` does, and has at least as many reserved ids."""
        if self.reserved < other.reserved or self._meaning() != other._meaning():
            return False
        return self.model_bytes() == other.model_bytes() or self._behaviour == other._behaviour

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes of each id, int32[size]; 0 for special and reserved ids.

        Summed over `encode(text)` they are the bytes of the text as the tokenizer normalizes it,
        without unknown tokens.
        """
        return np.fromiter(map(len, self.pieces), np.int32, self.size)

    @functools.cached_property
    def pieces(self) -> list[bytes]:
        """The text of each id in UTF-8, part of a character where ids are bytes; empty for special
        and reserved ids."""
        pieces = [*self._pieces(), *[b""] * self.reserved]
        for special in (self.eos_id, self.pad_id, self.start_id):
            pieces[special] = b""
        return pieces

    @functools.cached_property
    def special_tokens(self) -> Mapping[int, str]:
        """The names of special tokens by id."""
        return {}

    def token(self, token_id: int) -> str | None:
        """An id's name in the tokenizer's file, None if it has none."""
        return None

    @abc.abstractmethod
    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """The text's ids, without an end of document; InputError if a part of it has no id.

        With `parse_special` (prompts), a special token's name encodes to that token; without it
        (corpora), to ordinary text.
        """

    def encode_many(self, texts: list[str], parse_special: bool = False) -> list[list[int]]:
        """`encode` of each text; subclasses may batch it."""
        return [self.encode(text, parse_special) for text in texts]

    def lost_characters(self, text: str) -> int:
        """How many characters of the text `encode` leaves out."""
        return 0

    def decode(self, ids: Iterable[int]) -> str:
        """The ids' text; special and reserved ids are skipped, invalid UTF-8 becomes U+FFFD."""
        silent = {self.eos_id, self.pad_id, self.start_id}
        return self._decode([i for i in map(int, ids) if i not in silent and i < self.base_size])

    def describe(self) -> dict[str, Any]:
        """The entry for a manifest."""
        return {**self._identity(), "size": self.size, "fingerprint": self.fingerprint}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the vocabulary into a folder that `load_vocabulary` reads."""
        path = path_of(os.fspath(folder))
        path.mkdir(parents=True, exist_ok=True)
        if self._model_file:
            with whole_file(path / self._model_file) as file:
                file.write(self.model_bytes())
        described = {**self.describe(), "settings": self._settings()}
        if self.drop_unknown:
            described["drop_unknown"] = True
        write_text(path / SETTINGS_FILE, json.dumps(described, indent=2) + "\n")

    # The name of the model file, and the types of the constructor's keyword arguments.
    _model_file = ""
    _settings_shape: Mapping[str, Shape] = types.MappingProxyType({"reserved": int})

    def model_bytes(self) -> bytes:
        """The tokenizer file's content; empty if there is none."""
        return b""

    def _settings(self) -> dict[str, Any]:
        return {"reserved": self.reserved}

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    @abc.abstractmethod
    def _pieces(self) -> list[bytes]: ...

    @functools.cached_property
    def _behaviour(self) -> Any:
        """What the tokenizer does to a text, as a value that can be compared."""
        return self.model_bytes()

    def _meaning(self) -> dict[str, Any]:
        """The identity without settings that affect neither a text's ids nor a model's input."""
        return {**self._identity(), "reserved": 0, "pad_id": 0}

    def _identity(self) -> dict[str, Any]:
        ids = {"eos_id": self.eos_id, "pad_id": self.pad_id, "start_id": self.start_id}
        return {"class": type(self).__name__, **ids, "reserved": self.reserved}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Vocabulary):
            return NotImplemented
        return self.reserved == other.reserved and self.extends(other)

    def __hash__(self) -> int:
        return hash(tuple(self._meaning().values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(size={self.size}, fingerprint={self.fingerprint[:12]})"


def checked_reserved(reserved: int) -> int:
    """`reserved`, or an InputError if it is negative or far too large."""
    if not 0 <= reserved <= MOST_IDS:
        raise InputError(
            f"reserved is {reserved}, expected 0 to {MOST_IDS:,} ids: change the vocabulary's "
            "setting."
        )
    return reserved
