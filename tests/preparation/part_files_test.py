"""Part files: every bucket's documents come back, in their order, and without the others'."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salt_jax.preparation import part_files
from salt_jax.preparation.part_files import PartWriter, TokenizedDocument, read_bucket, token_dtype

# Digests that end in zero bytes are digests like any other.
DIGESTS = st.one_of(
    st.binary(min_size=16, max_size=16), st.sampled_from([b"\0" * 16, b"a" + b"\0" * 15])
)
DOCUMENTS = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 40), DIGESTS), max_size=30)


@settings(deadline=None)
@given(documents=DOCUMENTS, wide=st.booleans(), block_bytes=st.sampled_from([1, 200, 10**6]))
def test_documents_come_back_by_bucket_in_their_order(
    tmp_path_factory, documents, wide, block_bytes
):
    file = tmp_path_factory.mktemp("part") / "a.part"
    dtype = token_dtype(70_000 if wide else 65_536)
    tokens = np.random.default_rng(0).integers(0, 70_000 if wide else 65_536, 40)
    with pytest.MonkeyPatch.context() as patch, open(file, "wb") as written:
        patch.setattr(part_files, "_LEAST_BLOCK_BYTES", block_bytes)
        patch.setattr(part_files, "_SLICE_BYTES", 0)
        part = PartWriter(written, 7, dtype)
        for number, (bucket, length, digest) in enumerate(documents):
            document = TokenizedDocument(tokens[:length], "train", "", digest, 10 * number)
            part.add(bucket, document, subset=number)
        part.finish()
    for bucket in range(7):
        slices = list(read_bucket(file, bucket, 7, dtype))
        own = [(n, d) for n, d in enumerate(documents) if d[0] == bucket]
        records = [record for records_D, _ in slices for record in records_D]
        assert [int(record["subset"]) for record in records] == [n for n, _ in own]
        assert [int(record["text_bytes"]) for record in records] == [10 * n for n, _ in own]
        digests = np.array([digest for _, (_, _, digest) in own], "S16")
        assert all(r["digest"] == d for r, d in zip(records, digests, strict=True))
        found = [token for _, tokens_T in slices for token in tokens_T.tolist()]
        assert found == [token for _, (_, size, _) in own for token in tokens[:size]]
        without = list(read_bucket(file, bucket, 7, dtype, tokens=False))
        sizes = [len(records_D) for records_D, _ in slices]
        assert [(len(records_D), len(none)) for records_D, none in without] == [
            (size, 0) for size in sizes
        ]


def test_an_empty_file_has_empty_buckets(tmp_path):
    with open(tmp_path / "a.part", "wb") as file:
        PartWriter(file, 3, token_dtype(300)).finish()
    for bucket in range(3):
        assert list(read_bucket(tmp_path / "a.part", bucket, 3, token_dtype(300))) == []
