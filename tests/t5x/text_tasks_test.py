"""SeqIO tasks over text: what any SeqIO user gets."""

import json
import pathlib

import numpy as np
import pytest
import seqio
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from salt_jax.data.vocabularies import (
    ByteVocabulary,
    HuggingFaceVocabulary,
    SentencePieceVocabulary,
)
from salt_jax.errors import InputError
from salt_jax.preparation.text_files import TextFiles
from salt_jax.preparation.trained_vocabulary import TrainedVocabulary
from salt_jax.t5x.seqio_adapters import SeqIOVocabulary, vocabulary_of
from salt_jax.t5x.text_tasks import register_text_task

TEXTS = ["ab", "zwei\n\tZeilen", "né 🙂"]
VOCABULARY = ByteVocabulary(reserved=3)
SOURCE = pathlib.Path(json.__file__).read_text()


@pytest.fixture
def path(tmp_path):
    rows = [
        {"text": text, "subset": name} for text, name in zip(TEXTS, ["y", "x", "y"], strict=True)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "a.jsonl"


@pytest.fixture
def registered():
    before = set(seqio.TaskRegistry.names())
    yield
    for name in set(seqio.TaskRegistry.names()) - before:
        seqio.TaskRegistry.remove(name)


def test_examples_are_tokens_with_their_end_and_a_subset(path, registered):
    task = register_text_task("mine", TextFiles(train=str(path)), VOCABULARY)
    examples = list(task.get_dataset(None, "train", shuffle=False).as_numpy_iterator())
    assert [example["targets"].tolist() for example in examples] == [
        [*VOCABULARY.encode(text), VOCABULARY.eos_id] for text in TEXTS
    ]
    names = task.output_features["subset"].vocabulary.names
    assert [names[example["subset"]] for example in examples] == ["y", "x", "y"]
    assert names == ("x", "y")


def test_registered_tasks_read_nothing_until_used(path, registered):
    def not_yet():
        raise AssertionError("registering a task must not read its files")

    register_text_task("lazy", not_yet, not_yet)
    assert "lazy" in seqio.TaskRegistry.names()


def test_the_registry_and_seqios_own_converter(path, registered):
    register_text_task("mine", TextFiles(train=str(path)), VOCABULARY)
    dataset = seqio.get_dataset(
        "mine",
        task_feature_lengths={"targets": 6},
        feature_converter=seqio.DecoderFeatureConverter(pack=False),
        dataset_split="train",
        shuffle=False,
    )
    first = next(dataset.as_numpy_iterator())
    assert first["decoder_target_tokens"].tolist() == [100, 101, 1, 0, 0, 0]
    assert first["decoder_input_tokens"].tolist() == [0, 100, 101, 1, 0, 0]
    assert first["decoder_loss_weights"].tolist() == [1, 1, 1, 0, 0, 0]


def hugging_face_vocabulary(folder):
    """As Pythia's: end of document 0, and padding and start beside it."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|padding|>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([SOURCE], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"pad_token": "<|padding|>", "start_token": "<s>"}
    return HuggingFaceVocabulary(folder / "tokenizer.json", reserved=4, **special)


def test_a_vocabulary_is_the_same_through_tensorflow(tmp_path):
    trained = TrainedVocabulary(size=400).train([SOURCE])
    theirs = hugging_face_vocabulary(tmp_path)
    assert (theirs.eos_id, theirs.pad_id, theirs.start_id) == (0, 1, 2)
    for vocabulary in (VOCABULARY, trained, theirs):
        adapter = SeqIOVocabulary(vocabulary)
        assert (adapter.vocab_size, adapter.extra_ids) == (vocabulary.size, vocabulary.reserved)
        special = (vocabulary.eos_id, vocabulary.pad_id, vocabulary.start_id)
        assert (adapter.eos_id, adapter.pad_id, adapter.bos_id) == special
        assert adapter == SeqIOVocabulary(lambda wrapped=vocabulary: wrapped)
        assert not adapter.decode([*special, *vocabulary.reserved_ids])
        for text in TEXTS:
            ids = vocabulary.encode(text)
            assert list(adapter.encode(text)) == adapter.encode_tf(text).numpy().tolist() == ids
            assert adapter.decode(ids) == adapter.decode_tf(np.array(ids)).numpy().decode() == text
        assert vocabulary_of(adapter, "mine") is vocabulary


def test_seqios_own_vocabularies_have_counterparts(tmp_path):
    TrainedVocabulary(size=400).train([SOURCE]).save(tmp_path)
    model = str(tmp_path / "sentencepiece.model")
    pairs = [
        (seqio.ByteVocabulary(extra_ids=3), ByteVocabulary(reserved=3)),
        (seqio.SentencePieceVocabulary(model, 5), SentencePieceVocabulary(model, reserved=5)),
    ]
    for theirs, expected in pairs:
        ours = vocabulary_of(theirs, "task")
        assert ours == expected
        assert (ours.size, ours.eos_id) == (theirs.vocab_size, theirs.eos_id)
        assert ours.encode("a b\n") == list(theirs.encode("a b\n"))
    with pytest.raises(InputError, match="PassThroughVocabulary"):
        vocabulary_of(seqio.PassThroughVocabulary(10), "task")
