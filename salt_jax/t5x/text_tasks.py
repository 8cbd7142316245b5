"""SeqIO tasks over text files or a TFDS dataset.

An example is a tokenized document: `targets` (int32 ids, ending with the end of document) and
`subset` (int64, index of the subset's name). Before and after, with ByteVocabulary:

    {"targets": "ab", "subset": 3}
    {"targets": [100, 101, 1], "subset": 3}

A task of prompts and responses has `inputs`, without an end of document, instead of the subset.
With the templates "{question}" and "{answer}":

    {"question": "a", "answer": "b"}
    {"inputs": [100], "targets": [101, 1]}
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from salt_jax.data.packed_cache import SPLITS
from salt_jax.data.vocabularies import Vocabulary
from salt_jax.errors import InputError
from salt_jax.preparation.reading_log import ReadingLog
from salt_jax.preparation.templates import NoResponse, Template
from salt_jax.preparation.text_files import TextFiles
from salt_jax.t5x.quiet_tensorflow import seqio, tf
from salt_jax.t5x.seqio_adapters import SeqIOVocabulary, SubsetVocabulary


class TextFilesSource(seqio.FunctionDataSource):
    """Documents of text files, or of those that a function returns when first read, as a SeqIO data
    source.

    Attributes:
      failure: The error that ended the last read, of which TensorFlow reports only the text.
      log: Records the files read.
    """

    def __init__(self, files: TextFiles | Callable[[], TextFiles]):
        self._given = files
        self.failure: InputError | None = None
        self.log = ReadingLog()
        splits = files.splits if isinstance(files, TextFiles) else SPLITS
        super().__init__(dataset_fn=self._dataset, splits=splits)

    @property
    def files(self) -> TextFiles:
        """The files."""
        if not isinstance(self._given, TextFiles):
            self._given = self._given()
        return self._given

    def _dataset(self, split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        # Shuffling is left to the task's buffer: files have a fixed order, see TextFiles.
        del shuffle_files, seed
        index = {name: number for number, name in enumerate(self.files.subset_names())}

        def examples() -> Iterator[Mapping[str, Any]]:
            try:
                for document in self.files.documents(split, self.log):
                    yield {"targets": document.text, "subset": index[document.subset]}
            except InputError as error:
                self.failure = error
                raise

        signature = {
            "targets": tf.TensorSpec((), tf.string),
            "subset": tf.TensorSpec((), tf.int64),
        }
        return tf.data.Dataset.from_generator(examples, output_signature=signature)


def register_text_task(
    name: str,
    files: TextFiles | Callable[[], TextFiles],
    vocabulary: Vocabulary | Callable[[], Vocabulary],
) -> seqio.Task:
    """Registers a task over text files; files and vocabulary may be functions that return them when
    the task is first used."""
    source = TextFilesSource(files)
    return seqio.TaskRegistry.add(
        name,
        source=source,
        output_features=_features(vocabulary, lambda: source.files.subset_names()),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    )


def register_dataset_task(
    name: str,
    dataset: str,
    subsets: Sequence[str],
    vocabulary: Vocabulary | Callable[[], Vocabulary],
) -> seqio.Task:
    """Registers a task over a TFDS dataset of {"text", "subset"}, found in TFDS_DATA_DIR.

    `dataset` has its configuration and version, "the_pile/all:1.0.0"; `subsets` are names by index;
    the vocabulary may be a function that returns it.
    """
    rekey = functools.partial(
        seqio.preprocessors.rekey, key_map={"targets": "text", "subset": "subset"}
    )
    return seqio.TaskRegistry.add(
        name,
        source=seqio.TfdsDataSource(dataset),
        output_features=_features(vocabulary, subsets),
        preprocessors=[rekey, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    )


def register_response_task(
    name: str,
    dataset: str,
    template: Template,
    vocabulary: Vocabulary | Callable[[], Vocabulary],
    splits: Mapping[str, str] | None = None,
) -> seqio.Task:
    """Registers a task of prompts and responses from a TFDS dataset, found in TFDS_DATA_DIR; rows
    without a response are skipped.

    Args:
      name: The task's name.
      dataset: The dataset's name with configuration and version, "anli/r1:0.1.0".
      template: Turns its rows into prompts and responses.
      vocabulary: The vocabulary, or a function that returns it.
      splits: TFDS's name of each split, {"validation": "train[:2%]"}; by default the same names.
    """
    adapted = SeqIOVocabulary(vocabulary, template.parse_special)
    return seqio.TaskRegistry.add(
        name,
        source=seqio.TfdsDataSource(dataset, splits=splits),
        output_features={
            "inputs": seqio.Feature(adapted, add_eos=False),
            "targets": seqio.Feature(adapted, add_eos=True),
        },
        preprocessors=[
            functools.partial(_prompts_and_responses, template=template),
            seqio.preprocessors.tokenize,
            seqio.preprocessors.append_eos,
        ],
    )


def _prompts_and_responses(dataset: tf.data.Dataset, template: Template) -> tf.data.Dataset:
    """{"inputs", "targets"} as text, from rows with the template's fields."""

    def fill(*values: Any) -> tuple[bytes, bytes]:
        texts = [value.decode() if isinstance(value, bytes) else value.item() for value in values]
        try:
            prompt, response = template.fill(dict(zip(template.fields, texts, strict=True)))
        except NoResponse:
            return b"", b""
        return prompt.encode(), response.encode()

    def pair(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        values = [example[field] for field in template.fields]
        texts = tf.numpy_function(fill, values, [tf.string, tf.string], stateful=False)
        prompt, response = (tf.ensure_shape(text, ()) for text in texts)
        return {"inputs": prompt, "targets": response}

    filled = dataset.map(pair, num_parallel_calls=tf.data.AUTOTUNE)
    return filled.filter(lambda example: tf.strings.length(example["targets"]) > 0)


def _features(
    vocabulary: Vocabulary | Callable[[], Vocabulary],
    subsets: Sequence[str] | Callable[[], Sequence[str]],
) -> dict[str, seqio.Feature]:
    names = SubsetVocabulary(subsets)
    return {
        "targets": seqio.Feature(SeqIOVocabulary(vocabulary), add_eos=True),
        "subset": seqio.Feature(names, add_eos=False, dtype=tf.int64, rank=0),
    }
