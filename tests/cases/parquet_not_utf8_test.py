"""A byte that is no UTF-8 in a Parquet file becomes U+FFFD, as in any other."""

from salt_jax.preparation.text_files import TextFiles


def test_a_byte_that_is_no_utf_8(case):
    files = TextFiles(train=f"{case('parquet_not_utf8')}/*.parquet")
    *others, last = [document.text for document in files.documents("train")]
    assert others
    assert not any("\ufffd" in text for text in others)
    assert "\ufffd" in last
