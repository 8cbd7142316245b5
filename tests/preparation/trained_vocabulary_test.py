"""Training a vocabulary: deterministic, sampled, and honest when it can't."""

import json
import pathlib

import pytest

from salt_jax.errors import InputError
from salt_jax.preparation.trained_vocabulary import TrainedVocabulary, sample_texts

TEXTS = [path.read_text() for path in sorted(pathlib.Path(json.__file__).parent.glob("*.py"))]


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_the_same_texts_give_the_same_model_in_any_order(model_type):
    config = TrainedVocabulary(size=500, model_type=model_type, reserved=7)
    vocabulary = config.train(TEXTS)
    assert vocabulary == config.train(reversed(TEXTS))
    assert vocabulary != config.train(TEXTS[1:])
    assert (vocabulary.size, vocabulary.base_size) == (507, 500)
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.start_id) == (0, 1, 3)


def test_code_keeps_its_shape_in_few_tokens():
    vocabulary = TrainedVocabulary(size=600).train(TEXTS)
    assert len(vocabulary.encode("\n")) == len(vocabulary.encode("\t")) == 1
    assert len(vocabulary.encode("\n\n")) == 1
    assert len(vocabulary.encode(" " * 8)) <= 2
    pieces = {vocabulary.decode([i]) for text in TEXTS for i in vocabulary.encode(text)}
    assert {piece for piece in pieces if "\n" in piece} == {"\n", "\n\n"}
    assert len(vocabulary.encode(TEXTS[0])) < 0.6 * len(TEXTS[0].encode())


def test_the_sample_is_bounded_and_independent_of_order():
    texts = [f"{number:04}" for number in range(1000)]
    sample = sample_texts(texts, 400)
    assert len(sample) == 100
    assert sample == sample_texts(reversed(texts), 400)
    assert max(map(int, sample)) > 500 > min(map(int, sample))
    assert sorted(sample_texts(texts, 10**6)) == texts


def test_no_text_and_too_little_text():
    with pytest.raises(InputError, match="train split is empty"):
        TrainedVocabulary().train([])
    with pytest.raises(InputError, match=r"too little for a vocabulary of 4,096 ids"):
        TrainedVocabulary().train(["a few words are not enough"])


@pytest.mark.parametrize(
    "settings", [{"model_type": "wordpiece"}, {"size": 100}, {"sample_bytes": 0}]
)
def test_bad_settings(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        TrainedVocabulary(**settings)
