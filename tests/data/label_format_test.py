"""Soft labels survive their record: ids to the bit, log q to what its encoding promises."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salt_jax.data.label_format import ENCODINGS, LabelFormat, Labels
from salt_jax.errors import InputError


def random_labels(rng: np.random.Generator, rows: int, form: LabelFormat) -> Labels:
    shape = (rows, form.sequence_length, form.k)
    log_q = -np.sort(rng.exponential(4.0, shape), axis=-1)
    return Labels(
        rng.integers(form.vocab_size, size=shape, dtype=np.int32),
        log_q.astype(np.float16),
        -rng.exponential(4.0, shape[:2]).astype(np.float16),
        rng.exponential(4.0, shape[:2]).astype(np.float16),
    )


@settings(max_examples=60, deadline=None)
@given(
    vocab_size=st.sampled_from([2, 3, 255, 256, 257, 4096, 4097, 50_277, 65_536, 65_537, 256_256]),
    k=st.integers(1, 9),
    length=st.integers(1, 7),
    rows=st.integers(0, 4),
    encoding=st.sampled_from(ENCODINGS),
)
def test_round_trip(vocab_size: int, k: int, length: int, rows: int, encoding: str) -> None:
    form = LabelFormat(length, vocab_size, min(k, vocab_size), encoding)
    labels = random_labels(np.random.default_rng(rows), rows, form)
    records = form.encode(labels)
    assert records.shape == (rows, form.record_bytes)
    assert records.dtype == np.uint8
    assert not form.damaged(records).any()
    found = form.decode(records)
    np.testing.assert_array_equal(found.ids, labels.ids)
    np.testing.assert_array_equal(found.rest, labels.rest)
    np.testing.assert_array_equal(found.teacher_loss, labels.teacher_loss)
    if encoding == "float16":
        np.testing.assert_array_equal(found.log_q, labels.log_q)
    else:
        # Half a step of the square-root law, and float16's rounding.
        log_q = labels.log_q.astype(np.float64)
        step = 2 * np.sqrt(-log_q * 32) / 255 + 32 / 255**2
        clipped = np.maximum(log_q, -32)
        assert np.all(np.abs(found.log_q - clipped) <= step / 2 + 2e-3 * np.abs(log_q))


@settings(max_examples=30, deadline=None)
@given(row=st.integers(0, 3), at=st.integers(0, 2**16), bit=st.integers(0, 7))
def test_one_bit_that_changed_is_seen_in_its_row(row: int, at: int, bit: int) -> None:
    form = LabelFormat(5, 300, 3)
    records = form.encode(random_labels(np.random.default_rng(0), 4, form))
    records[row, at % form.record_bytes] ^= 1 << bit
    assert np.flatnonzero(form.damaged(records)).tolist() == [row]


@pytest.mark.parametrize(("vocab_size", "bits"), [(2, 1), (4096, 12), (4097, 13), (256_256, 18)])
def test_ids_take_the_vocabularys_bits(vocab_size: int, bits: int) -> None:
    form = LabelFormat(sequence_length=1280, vocab_size=vocab_size, k=2, encoding="uint8")
    assert form.id_bits == bits
    assert form.record_bytes == 1280 * 2 * bits // 8 + 1280 * 2 + 1280 * 4 + 4


def test_bytes_per_token_of_the_papers_vocabulary() -> None:
    assert LabelFormat(1280, 256_256, 64, "float16").bytes_per_token == 64 * 18 / 8 + 128 + 4
    assert LabelFormat(1280, 256_256, 64, "uint8").bytes_per_token == 64 * 18 / 8 + 64 + 4


def test_codes_of_certainty_and_of_the_unlikely() -> None:
    form = LabelFormat(1, 16, 3, "uint8")
    log_q = np.array([[[0.0, -32.0, -60000.0]]], np.float16)
    labels = Labels(np.zeros((1, 1, 3), np.int32), log_q, *(np.zeros((1, 1), np.float16),) * 2)
    np.testing.assert_array_equal(form.decode(form.encode(labels)).log_q[0, 0], [0, -32, -32])


@pytest.mark.parametrize(
    ("k", "encoding", "message"),
    [
        (0, "uint8", "soft_labels is 0, expected 1 to 16"),
        (17, "uint8", "1 to 16"),
        (4, "int4", "int4"),
    ],
)
def test_bad_settings(k: int, encoding: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        LabelFormat(8, 16, k, encoding)
