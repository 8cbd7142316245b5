"""The SeqIO task that settings ask for, and the vocabulary of its targets.

In: TextFiles with a vocabulary or the wish to train one, or the name of a registered task. Out:
both, ready to be read.
"""

from salt_jax.data.vocabularies import Vocabulary
from salt_jax.errors import InputError
from salt_jax.preparation.quiet_tensorflow import seqio
from salt_jax.preparation.registered_task import RegisteredTask
from salt_jax.preparation.seqio_adapters import vocabulary_of
from salt_jax.preparation.text_files import TextFiles
from salt_jax.preparation.text_tasks import text_task
from salt_jax.preparation.tokenized_documents import find_task
from salt_jax.preparation.trained_vocabulary import TrainedVocabulary


def choose_task(
    task: TextFiles | RegisteredTask, vocabulary: Vocabulary | TrainedVocabulary | None
) -> tuple[seqio.Task, Vocabulary]:
    """The task and the vocabulary, which is trained on the train split if that was asked for.

    Args:
      task: Text files, or the name of a registered task, which brings its own vocabulary.
      vocabulary: The vocabulary of text files. For a registered task None, or equal to its own.

    Raises:
      InputError: A vocabulary that isn't the registered task's, or one that cannot be trained.
    """
    if isinstance(task, RegisteredTask):
        registered = find_task(task)
        own = vocabulary_of(registered.output_features["targets"].vocabulary, task.name)
        if vocabulary is not None and vocabulary != own:
            raise InputError(
                f"The vocabulary given is {vocabulary}, SeqIO's task {task.name!r} has {own}: "
                "leave prepare.prepare.vocabulary unset, or change the task's."
            )
        return registered, own
    if isinstance(vocabulary, TrainedVocabulary):
        print(f"Training a {vocabulary.model_type} vocabulary of {vocabulary.size:,} …")
        vocabulary = vocabulary.train(document.text for document in task.documents("train"))
    assert vocabulary is not None, "text files need a vocabulary"
    return text_task("text_files", task, vocabulary), vocabulary
