"""The Pile as a TFDS dataset, `the_pile`: text, and the subset as a ClassLabel.

manual_dir holds the release's files: train/00…29.jsonl.zst, val.jsonl.zst and test.jsonl.zst. Each
becomes a TFRecord file that SeqIO's TfdsDataSource reads, in the release's order, with the splits
train, validation and test. There is a builder config `all`, and one for each of the 22 subsets.

    tfds build --config=all --manual_dir=PILE --data_dir=DATA

reads one file after another. With Apache Beam, files are read in parallel:

    tfds build … --beam_pipeline_options="runner=DirectRunner,direct_running_mode=multi_processing,\
direct_num_workers=16"

The train files are assumed to hold the release's upsampled text, and so does this dataset.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds

from salt_jax.preparation.pile import PILE_SUBSETS, pile_files, pile_slug
from salt_jax.preparation.text_files import TextFiles

_HOMEPAGE = "https://pile.eleuther.ai/"
_CITATION = """\
@article{pile,
  title={The {P}ile: An 800GB Dataset of Diverse Text for Language Modeling},
  author={Gao, Leo and Biderman, Stella and Black, Sid and Golding, Laurence and Hoppe, Travis and
    Foster, Charles and Phang, Jason and He, Horace and Thite, Anish and Nabeshima, Noa and
    Presser, Shawn and Leahy, Connor},
  journal={arXiv preprint arXiv:2101.00027},
  year={2020}
}
"""


class ThePile(tfds.core.ShardBasedBuilder):
    """The Pile: text and subset of each document, in the release's order."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: Mapping[str, str] = {"1.0.0": "The release's files as they are."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "manual_dir must hold the Pile's release: train/00.jsonl.zst and so on, val.jsonl.zst and "
        "test.jsonl.zst."
    )
    BUILDER_CONFIGS: Sequence[tfds.core.BuilderConfig] = [
        tfds.core.BuilderConfig(name="all", description="All 22 subsets."),
        *(
            tfds.core.BuilderConfig(name=pile_slug(subset), description=f"{subset} alone.")
            for subset in PILE_SUBSETS
        ),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "text": tfds.features.Text(),
            "subset": tfds.features.ClassLabel(names=list(PILE_SUBSETS)),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="825 GiB of text from 22 sources; the train files hold some of it twice or "
            "three times, as the Pile's authors weighted it.",
            features=tfds.features.FeaturesDict(features),
            homepage=_HOMEPAGE,
            citation=_CITATION,
        )

    def _download_and_prepare(
        self,
        dl_manager: tfds.download.DownloadManager,
        download_config: tfds.download.DownloadConfig | None = None,
    ) -> None:
        """Extracts the runner from Beam's options: TFDS uses Beam for a ShardBasedBuilder only if
        the runner is given separately."""
        config = download_config or tfds.download.DownloadConfig()
        if config.beam_options is not None and config.beam_runner is None:
            from apache_beam.options.pipeline_options import StandardOptions
            from apache_beam.runners.runner import create_runner

            name = config.beam_options.view_as(StandardOptions).runner or "DirectRunner"
            config = dataclasses.replace(config, beam_runner=create_runner(name))
        super()._download_and_prepare(dl_manager, config)

    def _shard_iterators_per_split(
        self, dl_manager: tfds.download.DownloadManager
    ) -> Mapping[str, Sequence[Any]]:
        files = pile_files(str(dl_manager.manual_dir))
        files.refuse_equal_shards()
        subsets = {pile_slug(subset): subset for subset in PILE_SUBSETS}
        only = subsets.get(self.builder_config.name)
        return {
            split: [functools.partial(_examples, files, path, only) for path in files.files(split)]
            for split in files.splits
        }


def _examples(
    files: TextFiles, path: pathlib.Path, only: str | None
) -> Iterator[tuple[str, Mapping[str, str]]]:
    """One file's documents with their keys; only those of the subset `only`, if given."""
    for number, document in enumerate(files.read([path])):
        if only is None or document.subset == only:
            yield f"{path.name}-{number}", {"text": document.text, "subset": document.subset}
