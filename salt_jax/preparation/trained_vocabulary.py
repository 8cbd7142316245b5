"""Trains a SentencePiece vocabulary on the corpus itself.

The vocabulary round-trips any text: no normalisation, unknown characters as bytes, line feeds and
tabs as tokens of their own, runs of spaces learned like any other piece, so that code keeps its
indentation. The one exception is U+2581, SentencePiece's sign for a space, which becomes a space.

The same texts and settings give the same model: texts are sampled by a hash, whatever their order.
"""

import dataclasses
import hashlib
import heapq
import io
import tempfile
from collections.abc import Iterable, Iterator

import sentencepiece

from salt_jax.data.vocabularies import SentencePieceVocabulary
from salt_jax.errors import InputError, require_counts

_KEPT_WHOLE = ("\n", "\n\n", "\t")
# SentencePiece skips longer training sentences, so documents are cut at line ends.
_SENTENCE_BYTES = 4000


@dataclasses.dataclass(frozen=True)
class TrainedVocabulary:
    """How to train a vocabulary.

    Attributes:
      size: The number of ids, including the four special ones (padding 0, end of document 1,
        unknown 2, start 3) and the 256 bytes, excluding `reserved` ones.
      model_type: "bpe", or "unigram" (more natural pieces; some 20 times slower to train).
      reserved: Ids to append for denoising sentinels and mode tokens.
      sample_bytes: Train on a sample of about this much text.
      character_coverage: The share of the sample's characters that get pieces; the rest are bytes.
    """

    size: int = 4096
    model_type: str = "bpe"
    reserved: int = 0
    sample_bytes: int = 10_000_000
    character_coverage: float = 0.9995

    def __post_init__(self) -> None:
        if self.model_type not in ("bpe", "unigram"):
            raise InputError(
                f"TrainedVocabulary.model_type is {self.model_type!r}, expected 'bpe' or 'unigram'."
            )
        if self.size < 300:
            raise InputError(
                f"TrainedVocabulary.size is {self.size}, expected 300 or more: "
                "4 special ids and 256 bytes are always part of it."
            )
        require_counts(sample_bytes=self.sample_bytes)

    def train(self, texts: Iterable[str]) -> SentencePieceVocabulary:
        """Trains on a sample of the texts; InputError if there is too little text for the size."""
        sample = sample_texts(texts, self.sample_bytes)
        if not sample:
            raise InputError(
                "There is no text to train a vocabulary on, the train split is empty: set "
                "TextFiles.train (--gin.TEXT) to files that hold text."
            )
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.Train(
                sentence_iterator=_sentences(sample),
                model_writer=model,
                vocab_size=self.size,
                model_type=self.model_type,
                character_coverage=self.character_coverage,
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                user_defined_symbols=list(_KEPT_WHOLE),
                pad_id=0,
                eos_id=1,
                unk_id=2,
                bos_id=3,
                max_sentence_length=2 * _SENTENCE_BYTES,
                num_threads=4,  # fixed because it changes the result: unigram sums by thread
                minloglevel=2,
            )
        except RuntimeError as error:
            raise InputError(
                f"The text, {sum(map(len, sample)):,} characters sampled from its train split, is "
                f"too little for a vocabulary of {self.size:,} ids: lower TrainedVocabulary.size "
                "(--gin.VOCABULARY_SIZE in the files of gin/data), or give more text."
            ) from error
        with tempfile.NamedTemporaryFile(suffix=".model") as file:
            file.write(model.getvalue())
            file.flush()
            return SentencePieceVocabulary(file.name, reserved=self.reserved)


def sample_texts(texts: Iterable[str], sample_bytes: int) -> list[str]:
    """About `sample_bytes` of the texts, those with the lowest hashes, whatever their order. Only
    the sample is held in memory."""
    kept: list[tuple[int, str]] = []
    kept_bytes = 0
    for text in texts:
        encoded = text.encode()
        key = int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest())
        heapq.heappush(kept, (-key, text))
        kept_bytes += len(encoded)
        while len(kept) > 1 and kept_bytes - len(kept[0][1].encode()) >= sample_bytes:
            kept_bytes -= len(heapq.heappop(kept)[1].encode())
    return [text for _, text in sorted(kept, reverse=True)]


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """The texts in pieces of at most about _SENTENCE_BYTES, cut at line ends if possible."""
    for text in texts:
        piece: list[str] = []
        size = 0
        for line in text.splitlines(keepends=True):
            for start in range(0, len(line), _SENTENCE_BYTES // 4):
                part = line[start : start + _SENTENCE_BYTES // 4]
                part_bytes = len(part.encode())
                if size + part_bytes > _SENTENCE_BYTES:
                    yield "".join(piece)
                    piece, size = [], 0
                piece.append(part)
                size += part_bytes
        if piece:
            yield "".join(piece)
