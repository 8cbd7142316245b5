"""A byte order mark in front of plain text and of rows is no text."""

from salt_jax.preparation.text_files import TextFiles


def test_a_byte_order_mark_is_left_out(case):
    folder = case("bom")
    texts = [d.text for d in TextFiles(train=f"{folder}/bomtxt/*.txt").documents("train")]
    assert len(texts) == 12
    assert all(text.startswith("document number") for text in texts)
    (text,) = TextFiles(train=f"{folder}/bom.txt").documents("train")
    assert text.text == "stone river\nsalt\n"
