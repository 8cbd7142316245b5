"""Every task of salt_suite on rows of its data set's schema; no data set is downloaded."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from salt_jax.errors import InputError
from salt_jax.evaluation import harness, harness_tasks
from salt_jax.evaluation.few_shot import SUITE, FewShot
from salt_jax.evaluation.harness import HarnessModel
from salt_jax.evaluation.tasks import programs, reading, summaries

ARTICLE = "Salt is a mineral. It is won from the sea and from mines."
QUESTION = "What is salt?"
GLUE = {"idx": 0, "label": 1}
ARC = {"id": "a1", "question": QUESTION, "answerKey": "B"}
ARC["choices"] = {"text": ["a plant", "a mineral"], "label": ["A", "B"]}
RACE = {"question": QUESTION, "answer": "B", "options": ["a plant", "a mineral", "a fish", "air"]}
ANSWERS = {"text": ["a mineral"], "answer_start": [8]}
SQUAD = {"title": "Salt", "context": ARTICLE, "question": QUESTION, "answers": ANSWERS}
SUMMARY = "Salt comes from the sea and from mines."

# As the Hub has them; labels are class labels there, whole numbers here.
ROWS: dict[str, dict[str, Any]] = {
    "triviaqa": {
        "question": QUESTION,
        "question_id": "q1",
        "question_source": "local",
        "answer": {
            "aliases": ["mineral", "a mineral"],
            "normalized_aliases": ["mineral"],
            "matched_wiki_entity_name": "",
            "normalized_matched_wiki_entity_name": "",
            "normalized_value": "mineral",
            "type": "WikipediaEntity",
            "value": "mineral",
        },
    },
    "nq_open": {"question": "what is salt", "answer": ["a mineral", "mineral"]},
    "salt_webqs": {"url": "local", "question": QUESTION, "answers": ["Mineral", "Rock"]},
    "tydiqa_goldp_en": {**SQUAD, "id": "english-1-0"},
    "salt_race_middle": {**RACE, "example_id": "middle1.txt", "article": ARTICLE},
    "salt_race_high": {**RACE, "example_id": "high1.txt", "article": ARTICLE},
    "salt_squadv2": {**SQUAD, "id": "s1"},
    "arc_easy": ARC,
    "arc_challenge": ARC,
    "hellaswag": {
        "ind": 4,
        "activity_label": "Cooking",
        "ctx_a": "A pot stands there.",
        "ctx_b": "the cook",
        "ctx": "A pot stands there. the cook",
        "endings": ["adds salt.", "[step] sleeps.", "flies.", "is a pot."],
        "source_id": "local",
        "split": "val",
        "split_type": "indomain",
        "label": "0",
    },
    "winogrande": {
        "sentence": "The soup lacked salt, so the _ added some.",
        "option1": "cook",
        "option2": "spoon",
        "answer": "1",
    },
    "piqa": {"goal": "Melt ice", "sol1": "Use salt.", "sol2": "Use ice.", "label": 0},
    "social_iqa": {
        "context": "Kim salted the soup.",
        "question": "Why?",
        "answerA": "for taste",
        "answerB": "for colour",
        "answerC": "for fun",
        "label": "1",
    },
    "lambada_openai": {"text": "The cook tasted the soup and reached for the salt"},
    "boolq": {**GLUE, "question": "is salt a mineral", "passage": ARTICLE},
    "cb": {**GLUE, "premise": ARTICLE, "hypothesis": "Salt is a plant"},
    "copa": {
        **GLUE,
        "premise": "The soup was bland.",
        "choice1": "It had salt.",
        "choice2": "It lacked salt.",
        "question": "cause",
    },
    "multirc": {
        "paragraph": ARTICLE,
        "question": QUESTION,
        "answer": "a mineral",
        "idx": {"paragraph": 0, "question": 0, "answer": 0},
        "label": 1,
    },
    "salt_record": {
        "passage": "Kim sells salt.\n@highlight\nSalt is sold by Kim\n@highlight\nLee buys it",
        "query": "@placeholder sells salt.",
        "entities": ["Kim", "Lee"],
        "entity_spans": {"text": ["Kim", "Lee"], "start": [0, 60], "end": [3, 63]},
        "answers": ["Kim", "The Kim"],
        "idx": {"passage": 0, "query": 0},
    },
    "sglue_rte": {**GLUE, "premise": ARTICLE, "hypothesis": "Salt is a plant."},
    "wic": {
        **GLUE,
        "word": "salt",
        "sentence1": "Pass the salt.",
        "sentence2": "An old salt told tales.",
        "start1": 9,
        "start2": 7,
        "end1": 13,
        "end2": 11,
    },
    "wsc": {
        **GLUE,
        "text": "The cook salted the soup because it was bland.",
        "span1_index": 4,
        "span2_index": 6,
        "span1_text": "the soup",
        "span2_text": "it",
    },
    "salt_xlsum": {"id": "1", "url": "u", "title": "Salt", "summary": SUMMARY, "text": ARTICLE},
    "salt_xsum": {"document": ARTICLE, "summary": SUMMARY, "id": "1"},
    "salt_wikilingua": {
        "gem_id": "w-1",
        "gem_parent_id": "w-1",
        "source_language": "en",
        "target_language": "en",
        "source": ARTICLE,
        "target": SUMMARY,
        "references": [SUMMARY],
    },
    "salt_mbpp": {
        "task_id": 2,
        "text": "Write a function to add.",
        "code": "def add(a, b):\n  return a + b",
        "test_list": [f"assert add({n}, 1) == {n + 1}" for n in range(3)],
        "test_setup_code": "",
        "challenge_test_list": [],
    },
}
ALL = ("train", "validation", "test")
# The splits that a data set has, where it hasn't those three.
SPLITS = {
    "nq_open": ("train", "validation"),
    "salt_webqs": ("train", "test"),
    "tydiqa_goldp_en": ("train", "validation"),
    "salt_squadv2": ("train", "validation"),
    "social_iqa": ("train", "validation"),
    "lambada_openai": ("test",),
    "salt_mbpp": (*ALL, "prompt"),
}


def local(folder: pathlib.Path, *names: str, **settings: Any) -> FewShot:
    """Tasks that read two rows each from files, of every split that their data sets have."""
    for name in names:
        rows = [{**ROWS[name], "row": row} for row in range(2)]  # lm-eval shows no row to itself
        if name == "salt_mbpp":
            rows = [{**ROWS[name], "task_id": task_id} for task_id in (1, 2, 3, 4)]
        for split in SPLITS.get(name, ALL):
            file = folder / name / f"{split}.jsonl"
            file.parent.mkdir(exist_ok=True, parents=True)
            file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return FewShot(**{"tasks": names, "task_data": str(folder), "save_samples": True} | settings)


def ask(model: HarnessModel, settings: FewShot) -> tuple[Any, Any]:
    return harness.evaluate(model, harness_tasks.load(settings), settings)


def test_the_rows_are_of_every_task_of_the_suite() -> None:
    rows = harness_tasks.data_sets(FewShot(), [SUITE])
    found = {task: (path, part) for task, path, part, _ in rows}
    assert found.keys() == ROWS.keys()
    assert all(path for path, _ in found.values())
    for part in ("middle", "high"):
        assert found[f"salt_race_{part}"] == ("ehovy/race", part)


class _Scripted(HarnessModel):
    """Gives every request the same answer, and keeps what was asked."""

    def __init__(self, text: str = "a mineral") -> None:
        self.asked: list[Any] = []
        self._text = text
        self._rank, self._world_size = 0, 1

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        self.asked += [request.args for request in requests]
        return [(-float(len(request.args[1])), True) for request in requests]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        self.asked += [request.args for request in requests]
        return [self._text] * len(requests)


@pytest.mark.parametrize("shots", [None, 1])
def test_every_task_of_the_suite_runs(tmp_path: pathlib.Path, shots: int | None) -> None:
    model = _Scripted()
    results, samples = ask(model, local(tmp_path, *ROWS, tasks=[SUITE], shots=shots))
    assert results.keys() == ROWS.keys() == samples.keys()
    for name in ROWS.keys() - {"salt_mbpp"}:
        assert results[name]["metrics"], name
        assert results[name]["documents"] == (1 if "race" in name else 2), name
    values = {
        (name, metric): found["value"]
        for name, result in results.items()
        for metric, found in result["metrics"].items()
    }
    # "a mineral" is what was generated, and the shortest choice the likeliest one.
    for name in ("triviaqa", "nq_open", "salt_webqs"):
        assert values[name, "exact_match,remove_whitespace"] == 1
    assert values["tydiqa_goldp_en", "f1"] == values["salt_squadv2", "f1"] == 1
    assert values["salt_race_middle", "acc"] == values["arc_easy", "acc"] == 0
    assert values["hellaswag", "acc"] == 0
    assert values["boolq", "acc"] == 0  # " no" is shorter than " yes", and the label is yes
    for name in ("salt_xsum", "salt_xlsum", "salt_wikilingua"):
        assert values[name, "rouge1"] == 0  # the summary has neither word
    assert values["salt_record", "em"] == 1  # Kim, the first of two as likely
    # What nobody allowed is generated and not scored.
    assert not results["salt_mbpp"]["metrics"]
    assert [sample["answer"] for sample in samples["salt_mbpp"]] == ["a mineral"] * 4
    prompts = [context for context, *_ in model.asked if "Your code should pass" in context]
    assert [prompt.count("[DONE]") for prompt in prompts] == [shots or 3] * 4
    # RACE-M as lm-eval's RACE-H: the questions before the last one are answered in the prompt.
    race = f"Question: {QUESTION}\nAnswer: a mineral\n{QUESTION}"
    assert any(context.endswith(race) for context, *_ in model.asked)


def test_code_is_executed_where_it_is_allowed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    settings = local(tmp_path, "salt_mbpp", allow_code_execution=True)
    results = []
    for code in ("def add(a, b):\n  return a + b", "def add(a, b):\n  return a * b"):
        model = _Scripted(code)
        found, _ = ask(model, settings)
        assert found.keys() == {"salt_mbpp"}
        assert model.asked[0][0].count("[DONE]") == 3  # of the rows 2, 3 and 4
        results.append(found["salt_mbpp"]["metrics"]["pass_at_1"]["value"])
    assert results == [1, 0]


def test_programs_see_neither_this_process_nor_its_folder() -> None:
    tests = "import os, sys\nassert not os.listdir('.') and 'PYTHONPATH' not in os.environ"
    assert programs.pass_at_1([tests], [""]) == 1
    assert programs.pass_at_1(["", ""], ["x = 1", "raise SystemExit(3)"]) == 0.5


def test_squad_counts_unanswerable_as_no_answer() -> None:
    none, some = {"answers": {"text": []}}, {"answers": ANSWERS}
    assert reading.squad_results(none, ["unanswerable"]) == {"exact": 1, "f1": 1}
    assert reading.squad_results(none, ["a mineral"]) == {"exact": 0, "f1": 0}
    assert reading.squad_results(some, ["unanswerable"]) == {"exact": 0, "f1": 0}
    assert reading.squad_results(some, ["The Mineral."]) == {"exact": 1, "f1": 1}
    half = reading.squad_results(some, ["mineral water"])
    assert half == {"exact": 0, "f1": pytest.approx(2 / 3)}


def test_rouge_of_a_summary() -> None:
    same = summaries.rouge({"summary": SUMMARY}, [SUMMARY])
    assert same == {"rouge1": 1, "rouge2": 1, "rougeL": 1}
    turned = summaries.rouge({"target": "salt from the sea"}, ["sea the from salt"])
    assert turned["rouge1"] == 1
    assert turned["rouge2"] == 0
    assert turned["rougeL"] == pytest.approx(0.25)


def test_names_and_data_sets_that_are_not_there() -> None:
    with pytest.raises(InputError, match=r"no task arc_eazy \(nearest: arc_easy\)"):
        harness_tasks.load(FewShot(["arc_eazy"]))
    with pytest.raises(InputError) as caught:
        harness_tasks.load(FewShot(["arc_challenge"]))
    message = str(caught.value)
    assert "load_dataset('allenai/ai2_arc', 'ARC-Challenge')" in message
    assert "HF_DATASETS_CACHE" in message
    assert "--task_data=FOLDER and put its splits there, as arc_challenge/SPLIT.jsonl" in message
    assert "\n" not in message
    with pytest.raises(InputError) as caught:
        harness_tasks.load(FewShot(["salt_xsum"]))
    revision = "revision='refs/convert/parquet'"
    assert f"load_dataset('EdinburghNLP/xsum', {revision})" in str(caught.value)
    for setting in ("task_folder", "task_data"):
        with pytest.raises(InputError, match=f"{setting} is nowhere"):
            harness_tasks.load(FewShot(["piqa"], **{setting: "nowhere"}))


def test_files_that_do_not_fit(tmp_path: pathlib.Path) -> None:
    data = tmp_path / "data"
    settings = local(data, "piqa")
    (data / "piqa/validation.jsonl").unlink()
    with pytest.raises(InputError, match=r"task piqa .*validation.*its splits in --task_data"):
        harness_tasks.load(settings)
    (data / "piqa/train.jsonl").rename(data / "piqa/train.csv")
    with pytest.raises(InputError, match=r"piqa of --task_data holds test\.jsonl, train\.csv: exp"):
        harness_tasks.load(settings)
    (data / "piqa").rename(data / "pika")
    with pytest.raises(InputError, match="has no folder for any of the tasks piqa: name its fold"):
        harness_tasks.load(settings)
    (data / "pika/train.csv").unlink()
    (data / "pika").rename(data / SUITE)
    with pytest.raises(InputError, match="salt_suite of --task_data has the name of a group"):
        harness_tasks.load(dataclasses.replace(settings, tasks=[SUITE]))


def test_files_of_tasks_that_are_not_asked_for_are_passed_over(tmp_path: pathlib.Path) -> None:
    settings = local(tmp_path, "piqa", "boolq")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "about.md").write_text("Where the rows come from.")
    (tmp_path / "boolq" / "about.md").write_text("As well.")
    (piqa,) = harness_tasks.load(dataclasses.replace(settings, tasks=["piqa"]))
    assert piqa.DATASET_PATH == "json"
    with pytest.raises(InputError, match=r"boolq of --task_data holds about\.md, test\.jsonl"):
        harness_tasks.load(settings)


def test_a_task_that_is_named_twice(tmp_path: pathlib.Path) -> None:
    settings = local(tmp_path, *ROWS, tasks=[SUITE, "piqa"])
    with pytest.raises(InputError, match=r"'piqa': found in both .* leave one of them out of --t"):
        harness_tasks.load(settings)


def test_more_examples_than_there_are(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match=r"piqa needs 3 examples .* has 2: lower --shots"):
        harness_tasks.load(local(tmp_path, "piqa", shots=3))


Make = Callable[..., HarnessModel]


def test_a_real_model_answers_every_kind_of_task(harness: Make, tmp_path: pathlib.Path) -> None:
    settings = local(tmp_path / "data", "piqa", "lambada_openai", "nq_open")
    results, samples = ask(harness(max_new_tokens=4), settings)
    assert 0 <= results["piqa"]["metrics"]["acc"]["value"] <= 1
    assert results["lambada_openai"]["metrics"]["perplexity"]["value"] > 1
    assert len(samples["nq_open"]) == 2


def test_a_task_that_is_not_scored_takes_no_other_group_s_average(tmp_path: pathlib.Path) -> None:
    def group(name: str, *members: str) -> None:
        averages = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
        settings = {"group": name, "task": members, "aggregate_metric_list": averages}
        (folder / f"{name}.yaml").write_text(json.dumps(settings))

    folder = tmp_path / "tasks"
    folder.mkdir()
    group("mine", "piqa", "boolq")
    group("whole", "mine", "salt_mbpp")
    settings = local(
        tmp_path, "piqa", "boolq", "salt_mbpp", tasks=["whole"], task_folder=str(folder)
    )
    results, _ = ask(_Scripted(), settings)
    assert results.keys() == {"mine", "piqa", "boolq", "salt_mbpp"}
    assert results["mine"]["metrics"]["acc"]["value"] == 0
    results, _ = ask(_Scripted(), dataclasses.replace(settings, allow_code_execution=True))
    assert results.keys() == {"whole", "mine", "piqa", "boolq", "salt_mbpp"}
