"""The harness's model against one request at a time from whole float32 logits."""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lm_eval.api.instance import Instance

from salt_jax.data.vocabularies import ByteVocabulary
from salt_jax.errors import InputError
from salt_jax.evaluation.answers import Decoding, RequestLog
from salt_jax.evaluation.few_shot import FewShot
from salt_jax.evaluation.harness import HarnessModel, decoding_of
from salt_jax.inference.sampling import Sampling
from salt_jax.models import decoder
from salt_jax.training.partitioning import MeshConfig
from tests.evaluation.conftest import CONFIG

START = ByteVocabulary().start_id
LONG = "A sentence that is longer than all that the model can read at once, " * 3
PAIRS = [
    (" ", "salt"),
    ("The sea", " is salt"),
    ("The sea ", "is salt"),  # the space goes to the continuation
    ("", "no context"),
    ("é", "☃"),
    (LONG, " and its end"),
    ("a", "b"),
]


def requests(kind: str, arguments: Sequence[tuple[Any, ...]], repeats: int = 1) -> list[Instance]:
    return [
        Instance(kind, {}, argument, index, metadata=("a_task", index, repeats))
        for index, argument in enumerate(arguments)
    ]


@jax.jit
def whole_forward(params: Any, inputs_1xL: Any) -> Any:
    positions_1xL = jnp.arange(CONFIG.max_length)[None]
    ones_1xL = jnp.ones_like(inputs_1xL)
    return decoder.Decoder(CONFIG).apply({"params": params}, inputs_1xL, ones_1xL, positions_1xL)


def log_p(params: Any, ids: Sequence[int]) -> np.ndarray:
    """float64 [L, V]: of the token after each of the ids."""
    # Padded, and by one program: no id sees those after it.
    inputs_1xL = jnp.asarray([[*ids, *[0] * (CONFIG.max_length - len(ids))]])
    hidden = np.asarray(whole_forward(params, inputs_1xL)[0, : len(ids)], np.float64)
    head_VxD = np.asarray(decoder.head_kernel(params, CONFIG), np.float64)
    z_LxV = (hidden @ head_VxD.T)[:, : CONFIG.vocab_size]
    z_LxV -= z_LxV.max(-1, keepdims=True)
    return z_LxV - np.log(np.exp(z_LxV).sum(-1, keepdims=True))


def scored(params: Any, ids: list[int], count: int) -> tuple[float, bool]:
    ids = ids[-(CONFIG.max_length + 1) :]
    log_p_NxV, true = log_p(params, ids[:-1])[-count:], np.array(ids[-count:])
    total = log_p_NxV[np.arange(count), true].sum()
    return float(total), bool((log_p_NxV.argmax(-1) == true).all())


@pytest.mark.parametrize("prepend_start", [True, False])
def test_log_likelihoods_are_those_of_one_request_at_a_time(
    harness: Callable[..., HarnessModel], params: Any, prepend_start: bool
) -> None:
    model = harness(prepend_start=prepend_start, mesh=MeshConfig(fsdp=-1, tensor=2))
    encode = ByteVocabulary().encode
    greedy = [START] if prepend_start else []
    greedy += encode("x")
    while len(greedy) < 6:  # what the model itself would say
        greedy.append(int(log_p(params, greedy)[-1].argmax()))
    said = ByteVocabulary().decode(greedy[-4:])
    pairs = [*PAIRS, ("x", said)] if encode(said) == greedy[-4:] else PAIRS
    answers = model.loglikelihood(requests("loglikelihood", pairs))
    for (context, continuation), (total, is_greedy) in zip(pairs, answers, strict=True):
        start = [START] if prepend_start or not context.strip() else []
        count = len(encode(continuation)) + (len(context) - len(context.rstrip()))
        expected, right = scored(params, start + encode(context + continuation), count)
        assert total == pytest.approx(expected, abs=1e-3)
        assert is_greedy == right


def test_greedy_means_the_most_likely_token_at_every_place(
    harness: Callable[..., HarnessModel], params: Any
) -> None:
    ids = [START, *ByteVocabulary().encode("x")]
    for _ in range(4):
        ids.append(int(log_p(params, ids)[-1].argmax()))
    wrong = [*ids[:3], (ids[3] + 1) % 256, *ids[4:]]
    model = harness()
    (total, right), (_, last_right), (_, none) = model._scored(
        [(ids[:2], ids[2:]), (wrong[:-1], wrong[-1:]), (wrong[:2], wrong[2:])]
    )
    assert right
    assert not none
    assert total == pytest.approx(scored(params, ids, 4)[0], abs=1e-3)
    assert last_right == scored(params, wrong, 1)[1]


def test_a_text_longer_than_the_model_reads_is_scored_in_windows(
    harness: Callable[..., HarnessModel], params: Any
) -> None:
    ids = ByteVocabulary().encode(LONG)
    size = CONFIG.max_length
    assert 2 * size < len(ids) < 3 * size
    whole = [START, *ids]
    expected = sum(scored(params, whole[at : at + size + 1], size)[0] for at in (0, size))
    last = len(ids) - 2 * size
    expected += scored(params, whole, last)[0]
    short, empty = "a short text", ""
    answers = harness().loglikelihood_rolling(
        requests("loglikelihood_rolling", [(LONG,), (short,), (empty,)])
    )
    assert answers[0] == pytest.approx(expected, abs=2e-3)
    encoded = ByteVocabulary().encode(short)
    assert answers[1] == pytest.approx(scored(params, [START, *encoded], len(encoded))[0], abs=1e-3)
    assert answers[2] == 0


def test_texts_are_greedy_and_end_before_a_stop(
    harness: Callable[..., HarnessModel], params: Any
) -> None:
    vocabulary = ByteVocabulary()

    def expected(context: str, count: int) -> str:
        ids = [START, *vocabulary.encode(context)[-(CONFIG.max_length - count - 1) :]]
        new: list[int] = []
        while len(new) < count:
            new.append(int(log_p(params, [*ids, *new])[-1].argmax()))
            if new[-1] == vocabulary.eos_id:
                break
        return vocabulary.decode(new)

    contexts = ["The sea", "Once", LONG]
    arguments = [(context, {"until": [], "max_gen_toks": 12}) for context in contexts]
    model = harness()
    texts = model.generate_until(requests("generate_until", arguments))
    assert texts == [expected(context, 12) for context in contexts]
    stop = texts[0][5:6]
    (cut,) = model.generate_until(
        requests("generate_until", [("The sea", {"until": stop, "max_gen_toks": 12})])
    )
    assert cut == texts[0].partition(stop)[0]
    assert stop


def test_repeats_by_lot_differ_and_come_again(harness: Callable[..., HarnessModel]) -> None:
    settings = {"do_sample": True, "temperature": 1.0, "until": [], "max_gen_toks": 8}
    asked = requests("generate_until", [("The sea", settings)] * 3)
    texts = harness(log="one").generate_until(asked)
    assert len({*texts}) == 3
    assert harness(log="other").generate_until(asked) == texts


def test_what_a_task_asks_of_decoding() -> None:
    def decoding(asked: dict[str, Any], **settings: Any) -> Decoding:
        return decoding_of("t", asked, FewShot(seed=3, **settings), 512)

    settings = {"until": "\n", "do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 5}
    sampling = Sampling(0.7, top_k=5, top_p=0.9, seed=3)
    assert decoding(settings) == Decoding(256, ("\n",), sampling)
    assert decoding({"temperature": 0.7}).sampling == Sampling(0.7, seed=3)
    assert decoding({"do_sample": False, "temperature": 0.7}).sampling == Sampling()
    assert decoding({"do_sample": True}).sampling == Sampling(1.0, seed=3)
    assert decoding({"until": ["", "a"], "max_new_tokens": 9}) == Decoding(9, ("a",))
    assert decoding({}, max_new_tokens=7).max_new_tokens == 7
    assert decoding({}, max_new_tokens=300).max_new_tokens == 256
    with pytest.raises(InputError, match=r"task t sets generation_kwargs\.num_beams to 4"):
        decoding({"num_beams": 4})


def test_an_answer_longer_than_the_model(harness: Callable[..., HarnessModel]) -> None:
    asked = requests("generate_until", [("x", {"until": ["\n"]})])
    with pytest.raises(InputError, match=r"generates up to 256 tokens.*have 96.*max_new_tokens"):
        harness().generate_until(asked)
    assert len(harness(max_new_tokens=5).generate_until(asked)) == 1
    with pytest.raises(InputError, match="continuation has 204 tokens and the model takes 96"):
        harness().loglikelihood(requests("loglikelihood", [("x", LONG)]))


def test_a_broken_model_is_no_right_answer(
    harness: Callable[..., HarnessModel], params: Any
) -> None:
    broken = {**params, "embedding": params["embedding"] * np.nan}
    with pytest.raises(InputError, match=r"request \d is not finite"):
        harness(params=broken).loglikelihood(requests("loglikelihood", PAIRS))


def test_a_killed_evaluation_goes_on_and_computes_nothing_twice(
    harness: Callable[..., HarnessModel],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pairs = [("The sea" + "!" * count, " is salt") for count in range(11)]
    drawn = {"until": [], "max_gen_toks": 3, "do_sample": True, "temperature": 1.0}
    texts = [(f"Once {count}", {"until": [], "max_gen_toks": 3}) for count in range(5)]
    texts += [(f"Once {count}", drawn) for count in (0, 1, 2, 0, 1, 0)]

    def answers(model: HarnessModel) -> Any:
        scores = model.loglikelihood(requests("loglikelihood", pairs))
        return scores, model.generate_until(requests("generate_until", texts))

    expected = answers(harness(log="straight"))
    add, computed = RequestLog.add, []

    def counted(self: RequestLog, found: dict[str, Any]) -> None:
        add(self, found)
        computed.extend(found)
        if len(computed) in (4, 18):  # in the middle of scoring, and of drawing
            raise KeyboardInterrupt

    monkeypatch.setattr(RequestLog, "add", counted)
    log = tmp_path / "killed"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            answers(harness(log="killed"))
        with log.open("ab") as file:
            file.write(b'{"key": "cut sho')
    assert answers(harness(log="killed")) == expected
    assert len(computed) == len({*computed}) == 22
    lines = log.read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == computed


def test_another_model_s_answers_are_not_taken(tmp_path: pathlib.Path) -> None:
    keys = []
    for digest in ("a", "b"):
        with RequestLog(tmp_path / "log", {"model": digest}) as log:
            keys.append(log.key(["score", [1, 2], 1]))
            assert keys[-1] not in log
            log.add({keys[-1]: digest})
    with RequestLog(tmp_path / "log", {"model": "a"}) as log:
        assert (log[keys[0]], log[keys[1]]) == ("a", "b")


def test_a_damaged_line_is_computed_again_and_the_others_stay(tmp_path: pathlib.Path) -> None:
    with RequestLog(tmp_path / "log", None) as log:
        log.add({"a": 1, "b": 2, "c": 3})
    lines = (tmp_path / "log").read_bytes().splitlines(keepends=True)
    (tmp_path / "log").write_bytes(lines[0] + b"\x00\xff\n" + lines[2])
    with RequestLog(tmp_path / "log", None) as log:
        assert [key in log for key in "abc"] == [True, False, True]
