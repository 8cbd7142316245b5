"""Rows of JSON and compressed files under other names are read as what they are."""

import pytest

from salt_jax.preparation.text_files import TextFiles


@pytest.mark.parametrize(
    "pattern", ["c4/*.json", "xz/*.jsonl.xz", "c4.ndjson", "a.jsonl.bz2", "a.jsonl.zstd"]
)
def test_rows_under_other_names(case, pattern):
    documents = list(TextFiles(train=f"{case('suffixes')}/{pattern}").documents("train"))
    assert len(documents) > 10
    assert documents[0].text.startswith("harbor stone window river table")
    assert documents[0].subset == "Wiki"
