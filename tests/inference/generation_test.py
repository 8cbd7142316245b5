"""Generation: where continuations end, and that batches and meshes change nothing."""

import string
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import linen as nn
from tokenizers import decoders, models, pre_tokenizers

from salt_jax.data.vocabularies import ByteVocabulary, HuggingFaceVocabulary
from salt_jax.errors import InputError
from salt_jax.inference.generation import Generator, Sampling, continuation
from salt_jax.models import decoder
from salt_jax.models.decoder import DecoderConfig
from salt_jax.training.partitioning import MeshConfig, param_shardings

VOCABULARY = ByteVocabulary()
CONFIG = DecoderConfig(
    embed_dim=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=24,
    vocab_size=VOCABULARY.size,
    max_length=128,
)
TEXTS = ("hello", "", "what a long prompt, longer than the others", "a b c", "salt", "pepper")
PROMPTS = [VOCABULARY.encode(text) for text in TEXTS]
ONE = MeshConfig(fsdp=1).make(jax.devices()[:1])

# What follows what in the text of the model below: two bytes of é, then letters to the end.
SCRIPT = [*VOCABULARY.encode("é" + string.ascii_letters), VOCABULARY.eos_id]


@pytest.fixture(scope="module")
def params() -> Any:
    """Parameters of CONFIG with nothing at its special initial value."""

    @jax.jit
    def make() -> Any:
        fresh = nn.unbox(decoder.init_params(CONFIG, jax.random.key(0)))
        leaves, tree = jax.tree.flatten(fresh)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        noisy = [x + jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
        return jax.tree.unflatten(tree, noisy)

    return make()


@pytest.fixture(scope="module")
def recited() -> tuple[Generator, Any]:
    """A model that goes on with SCRIPT after any token of it."""
    size = VOCABULARY.size
    config = DecoderConfig(
        embed_dim=size + 1,
        num_layers=1,
        num_heads=1,
        head_dim=2,
        mlp_dim=2,
        vocab_size=size,
        max_length=128,
        tied_embeddings=False,
        scale_embeddings=False,
    )
    params = nn.unbox(decoder.init_params(config, jax.random.key(0)))
    # The blocks add nothing, each token is a direction of its own, and the head knows what follows.
    params["layers"] = jax.tree.map(jnp.zeros_like, params["layers"])
    padded = config.padded_vocab_size
    params["embedding"] = jnp.eye(padded, size + 1)
    successors = np.zeros((padded, size + 1), np.float32)
    successors[SCRIPT[1:], SCRIPT[:-1]] = 1
    params["head"] = jnp.asarray(successors)
    return Generator(config, VOCABULARY, ONE, batch_size=4), params


def recite(
    recited: tuple[Generator, Any], prompt: str, tokens: int, *stops: str
) -> tuple[str, str]:
    """The text of the continuation's ids, and why it ended."""
    generator, params = recited
    prompts = [VOCABULARY.encode(prompt)]
    (completion,) = generator.stream(params, prompts, tokens, stop_texts=stops)
    assert generator(params, prompts, tokens, stop_texts=stops) == [completion.ids]
    assert len(completion.log_probabilities) == len(completion.ids)
    text = VOCABULARY.decode(completion.ids)
    ends = [text.index(stop) for stop in stops if stop in text]
    assert completion.text == text[: min(ends, default=len(text))]
    return text, completion.ended_by


def test_ends_at_the_end_of_document(recited: tuple[Generator, Any]) -> None:
    assert recite(recited, "a", 100) == (string.ascii_letters[1:], "end of document")
    assert recite(recited, "a", 52) == (string.ascii_letters[1:], "end of document")
    assert recite(recited, "Z", 9) == ("", "end of document")


@pytest.mark.parametrize("tokens", [1, 2, 32, 33, 34, 51])
def test_ends_at_max_new_tokens(recited: tuple[Generator, Any], tokens: int) -> None:
    text = string.ascii_letters[1 : tokens + 1]
    assert recite(recited, "a", tokens) == (text, "length")


@pytest.mark.parametrize(
    ("stops", "last"),
    [
        (("b",), "b"),
        (("cde",), "e"),
        (("xyz", "fgh"), "h"),
        (("fgh", "g"), "g"),
        (("HI",), "I"),  # the last token of one chunk, the first of the next
        (("nothing like it", "YZ"), "Z"),
    ],
)
def test_ends_with_the_token_that_completes_a_stop_text(
    recited: tuple[Generator, Any], stops: tuple[str, ...], last: str
) -> None:
    expected = string.ascii_letters[1 : string.ascii_letters.index(last) + 1]
    assert recite(recited, "a", 60, *stops) == (expected, "stop text")


def test_a_stop_text_may_need_several_tokens_for_a_character(
    recited: tuple[Generator, Any],
) -> None:
    generator, params = recited
    first_byte = [VOCABULARY.encode("é")[0]]
    (ids,) = generator(params, [first_byte], 20, stop_texts=["c"], prepend_start=False)
    assert VOCABULARY.decode(first_byte + ids) == "éabc"
    # Of the prompt's own text none counts.
    assert recite(recited, "abc", 60, "bc", "g") == ("defg", "stop text")


def test_rows_end_each_in_its_way(recited: tuple[Generator, Any]) -> None:
    generator, params = recited
    prompts = [VOCABULARY.encode(text) for text in ("a", "X", "longer, but it ends in q", "Q")]
    completions = list(generator.stream(params, prompts, 40, stop_texts=["UV"]))
    found = {c.index: (VOCABULARY.decode(c.ids), c.text, c.ended_by) for c in completions}
    letters = string.ascii_letters
    assert found == {
        0: (letters[1:41], letters[1:41], "length"),
        1: ("YZ", "YZ", "end of document"),
        2: (letters[17:48], letters[17:46], "stop text"),
        3: ("RSTUV", "RST", "stop text"),
    }
    assert completions[-1].index == 0  # those that ended before are given before
    assert generator(params, [], 5) == []


def test_tokens_are_those_of_the_whole_forward(params: Any) -> None:
    """Greedy tokens and their log-probabilities, by one forward pass over what came out."""
    completions = list(Generator(CONFIG, VOCABULARY, ONE, batch_size=4).stream(params, PROMPTS, 40))
    rows_BxL = np.zeros((len(PROMPTS), 96), np.int32)
    segment_ids_BxL = np.zeros_like(rows_BxL)
    for completion in completions:
        row = [VOCABULARY.start_id, *PROMPTS[completion.index], *completion.ids]
        rows_BxL[completion.index, : len(row)] = row
        segment_ids_BxL[completion.index, : len(row)] = 1

    @jax.jit
    def log_probabilities(params: Any, batch: Any) -> jax.Array:
        hidden_BxLxD = decoder.hidden_states(CONFIG, params, batch)
        logits_BxLxV = decoder.logits(hidden_BxLxD, decoder.head_kernel(params, CONFIG), CONFIG)
        return jax.nn.log_softmax(logits_BxLxV[..., : VOCABULARY.size])

    positions_BxL = np.tile(np.arange(96)[None], (len(PROMPTS), 1))
    batch = {"inputs": rows_BxL, "segment_ids": segment_ids_BxL, "positions": positions_BxL}
    log_p_BxLxV = np.asarray(log_probabilities(params, batch))
    assert sorted(completion.index for completion in completions) == list(range(len(PROMPTS)))
    for completion in completions:
        first = len(PROMPTS[completion.index])  # the start stands before
        log_p_LxV = log_p_BxLxV[completion.index, first:][: len(completion.ids)]
        assert completion.ids == log_p_LxV.argmax(axis=1).tolist()
        np.testing.assert_allclose(completion.log_probabilities, log_p_LxV.max(axis=1), atol=1e-4)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, top_k=40, top_p=0.95, seed=7)])
def test_batches_and_meshes_change_nothing(params: Any, sampling: Sampling) -> None:
    whole = Generator(CONFIG, VOCABULARY, ONE, batch_size=8)(params, PROMPTS, 36, sampling=sampling)
    single = Generator(CONFIG, VOCABULARY, ONE, batch_size=1)
    assert single(params, PROMPTS, 36, sampling=sampling) == whole
    mesh = MeshConfig(data=2, fsdp=2, tensor=2).make()
    on_mesh = jax.device_put(params, param_shardings(decoder.abstract_params(CONFIG), mesh))
    sharded = Generator(CONFIG, VOCABULARY, mesh, batch_size=3)
    assert sharded(on_mesh, PROMPTS, 36, sampling=sampling) == whole
    # The third and fourth prompts are others here; those that stay keep what they had.
    changed = [*PROMPTS[:2], VOCABULARY.encode("x" * 30), VOCABULARY.encode("y"), *PROMPTS[4:]]
    others = single(params, changed, 36, sampling=sampling)
    same = [a == b for a, b in zip(others, whole, strict=True)]
    assert same == [True, True, False, False, True, True]


def test_draws_depend_on_seed_row_and_place(params: Any) -> None:
    generator = Generator(CONFIG, VOCABULARY, ONE, batch_size=4)
    drawn = [
        generator(params, [PROMPTS[0]] * 3, 20, sampling=Sampling(5.0, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1]
    assert len({tuple(ids) for ids in drawn[0] + drawn[2]}) == 6
    assert all(len(set(ids)) > 5 for ids in drawn[0])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([[5]], 0), "max_new_tokens is 0"),
        (([[5], [5] * 120], 8), "Prompt 1 has 121 tokens and max_new_tokens is 8.* the 128 that"),
        (([[259]], 8), "Prompt 0 has the id 259 and the vocabulary has 259 ids"),
        (([[-1]], 8), "has the id -1"),
        (([[5]], 8, ("x", "")), "stop text is empty"),
        (([[5], []], 8, (), False), "Prompt 1 is empty"),
    ],
)
def test_bad_prompts_are_refused(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Generator(CONFIG, VOCABULARY, ONE).check(*arguments)


def test_bad_models_are_refused(params: Any) -> None:
    with pytest.raises(InputError, match="batch_size is 0"):
        Generator(CONFIG, VOCABULARY, ONE, batch_size=0)
    with pytest.raises(InputError, match="vocabulary has 400 ids and the model"):
        Generator(CONFIG, ByteVocabulary(reserved=141), ONE)
    broken = {**params, "embedding": params["embedding"] * jnp.nan}
    # What is most likely among NaN is the id 0, which some vocabularies end a document with.
    ends = ByteVocabulary()
    ends.eos_id = 0
    for vocabulary in (VOCABULARY, ends):
        with pytest.raises(InputError, match="prompt 0 are not finite"):
            Generator(CONFIG, vocabulary, ONE)(broken, PROMPTS[:1], 4)


def test_a_continuation_keeps_the_space_before_its_first_word() -> None:
    tokenizer = tokenizers.Tokenizer(
        models.WordLevel({"▁salt": 0, "▁melts": 1, "<|endoftext|>": 2, "▁": 3}, unk_token="▁")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(f"{folder}/tokenizer.json")
        vocabulary = HuggingFaceVocabulary(f"{folder}/tokenizer.json")
    assert vocabulary.decode([1]) == "melts"
    assert continuation(vocabulary, vocabulary.encode("salt"), [1, 0]) == " melts salt"
    assert continuation(vocabulary, [2], [1]) == "melts"
    half = VOCABULARY.encode("aé")
    assert continuation(VOCABULARY, half[:2], half[2:]) == VOCABULARY.decode(half[2:])
