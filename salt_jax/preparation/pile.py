"""The Pile's layout and the names of its 22 subsets.

In: the folder that holds train/00…29.jsonl.zst, val.jsonl.zst and test.jsonl.zst. Out: its
TextFiles. Another name than these 22 is refused. The released train files are understood to hold
the upsampled text already.
"""

from salt_jax.preparation.text_files import TextFiles

PILE_SUBSETS = (
    "ArXiv",
    "BookCorpus2",
    "Books3",
    "DM Mathematics",
    "Enron Emails",
    "EuroParl",
    "FreeLaw",
    "Github",
    "Gutenberg (PG-19)",
    "HackerNews",
    "NIH ExPorter",
    "OpenSubtitles",
    "OpenWebText2",
    "PhilPapers",
    "Pile-CC",
    "PubMed Abstracts",
    "PubMed Central",
    "StackExchange",
    "USPTO Backgrounds",
    "Ubuntu IRC",
    "Wikipedia (en)",
    "YoutubeSubtitles",
)


def pile_files(
    folder: str,
    *,
    max_documents: int = 0,
    max_bytes: int = 0,
    skip_broken_lines: bool = False,
) -> TextFiles:
    """The files of the Pile's release.

    Args:
      folder: Holds train/*.jsonl.zst, val.jsonl.zst and test.jsonl.zst.
      max_documents: See TextFiles.
      max_bytes: See TextFiles.
      skip_broken_lines: See TextFiles.
    """
    return TextFiles(
        train=f"{folder}/train/*.jsonl.zst",
        validation=f"{folder}/val.jsonl.zst",
        test=f"{folder}/test.jsonl.zst",
        subsets=PILE_SUBSETS,
        max_documents=max_documents,
        max_bytes=max_bytes,
        skip_broken_lines=skip_broken_lines,
    )
