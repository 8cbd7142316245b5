"""Text that every machine has: the Python standard library's sources and documentation.

The environment variable SALT_TEXT, a file pattern, names other text instead. A file's subset is its
suffix.
"""

import glob
import os
import sysconfig

from salt_jax.preparation.text_files import TextFiles
from salt_jax.storage.buckets import state_of

TEXT_VARIABLE = "SALT_TEXT"

# Installed packages, and test inputs, which are full of tables and deliberately malformed files.
_EXCLUDED = ("*/site-packages/*", "*/dist-packages/*", "*/test/*", "*/tests/*")


def own_text(
    *,
    max_bytes: int = 0,
    validation_fraction: float = 0.05,
    test_fraction: float = 0.05,
    piece_bytes: int | None = None,
    skip_broken_lines: bool = False,
) -> TextFiles:
    """This machine's own text, or the files that SALT_TEXT names; settings as of TextFiles.

    By default piece_bytes is 1/200 of the text, 200 to 20,000 bytes, so that parts of a few long
    files can be held out.
    """
    library = sysconfig.get_path("stdlib")
    given = os.environ.get(TEXT_VARIABLE)
    # A minimal installation has sources and no text files.
    patterns = [f"{glob.escape(library)}/**/*.{suffix}" for suffix in ("py", "txt", "rst")]
    files = TextFiles(
        train=given or [p for p in patterns if next(glob.iglob(p, recursive=True), None)],
        exclude=() if given else _EXCLUDED,
        max_bytes=max_bytes,
        validation_fraction=validation_fraction,
        test_fraction=test_fraction,
        piece_bytes=piece_bytes or 0,
        skip_broken_lines=skip_broken_lines,
    ).listed()
    if piece_bytes is not None:
        return files
    text_bytes = sum(state_of(file)[0] for file in files.files("train"))
    piece_bytes = min(max(min(text_bytes, max_bytes or text_bytes) // 200, 200), 20_000)
    return files.listed(piece_bytes=piece_bytes)
