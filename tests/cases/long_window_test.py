"""Whole files that were compressed with long windows are read."""

import pytest

from salt_jax.preparation.text_files import TextFiles


@pytest.mark.parametrize("name", ["long27", "long28"])
def test_long_windows(case, name):
    files = TextFiles(train=f"{case('long_window')}/{name}.jsonl.zst")
    assert len(list(files.documents("train"))) == 120
