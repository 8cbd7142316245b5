"""The Pile: the layout of its release, the names of its 22 subsets and their weights.

The released train files are assumed to be upsampled already.
"""

import glob
import re
from collections.abc import Mapping

from salt_jax.preparation.text_files import TextFiles

# Table 1 of the Pile's paper (arXiv 2101.00027): a subset's share of the training text in percent,
# with upsampling, and the mean size of its documents in KiB.
_TABLE: Mapping[str, tuple[float, float]] = {
    "ArXiv": (8.96, 46.61),
    "BookCorpus2": (0.75, 369.87),
    "Books3": (12.07, 538.36),
    "DM Mathematics": (1.24, 8.00),
    "Enron Emails": (0.14, 1.78),
    "EuroParl": (0.73, 68.87),
    "FreeLaw": (6.12, 15.06),
    "Github": (7.59, 5.25),
    "Gutenberg (PG-19)": (2.17, 398.73),
    "HackerNews": (0.62, 4.92),
    "NIH ExPorter": (0.30, 2.11),
    "OpenSubtitles": (1.55, 30.48),
    "OpenWebText2": (10.01, 3.85),
    "PhilPapers": (0.38, 73.37),
    "Pile-CC": (18.11, 4.33),
    "PubMed Abstracts": (3.07, 1.30),
    "PubMed Central": (14.40, 30.55),
    "StackExchange": (5.13, 2.16),
    "USPTO Backgrounds": (3.65, 4.08),
    "Ubuntu IRC": (0.88, 545.48),
    "Wikipedia (en)": (1.53, 1.11),
    "YoutubeSubtitles": (0.60, 22.55),
}
PILE_SUBSETS = tuple(_TABLE)

# The same shares as document rates, for a mixture that draws documents.
PILE_DOCUMENT_RATES: Mapping[str, float] = {
    subset: percent / 100 / size for subset, (percent, size) in _TABLE.items()
}


def pile_files(
    folder: str,
    *,
    train_shards: int = 0,
    max_documents: int = 0,
    max_bytes: int = 0,
    skip_broken_lines: bool = False,
) -> TextFiles:
    """The files of the Pile's release; other settings as of TextFiles.

    Args:
      folder: Holds train/*.jsonl.zst, val.jsonl.zst and test.jsonl.zst.
      train_shards: How many train files there must be, 30 in the release; 0 for any number.
    """
    folder = glob.escape(folder)
    return TextFiles(
        train=f"{folder}/train/*.jsonl.zst",
        validation=f"{folder}/val.jsonl.zst",
        test=f"{folder}/test.jsonl.zst",
        subsets=PILE_SUBSETS,
        max_documents=max_documents,
        max_bytes=max_bytes,
        skip_broken_lines=skip_broken_lines,
        train_shards=train_shards,
    )


def pile_slug(subset: str) -> str:
    """A subset's name in snake case: "Gutenberg (PG-19)" is gutenberg_pg_19."""
    return re.sub(r"[^a-z0-9]+", "_", subset.lower()).strip("_")
