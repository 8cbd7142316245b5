"""`salt evaluate --tasks`: a trained run, local tasks, real GSM8K rows, by the command line."""

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from salt_jax.commands.train import train
from salt_jax.data.packed_cache import PackedCache
from salt_jax.distill import losses, schedules
from salt_jax.evaluation.answers import RequestLog
from salt_jax.main import main
from salt_jax.models.decoder import DecoderConfig
from salt_jax.storage.run_folder import RunFolder
from salt_jax.training.checkpoints import CheckpointConfig
from salt_jax.training.learning_rates import WarmupCosine
from salt_jax.training.optimizers import AdamW
from salt_jax.training.partitioning import MeshConfig
from tests.run_settings import train_config

GSM8K = pathlib.Path(__file__).parents[2].joinpath("../shared/data/gsm8k").resolve()


@pytest.fixture(scope="module")
def model(cache: PackedCache, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("runs") / "slm"
    train(
        RunFolder(folder, "train"),
        config=train_config(
            model=DecoderConfig(
                embed_dim=16, num_layers=1, num_heads=2, mlp_dim=32, max_length=2048
            ),
            cache=str(cache.path),
            steps=2,
            batch_size=8,
            optimizer=AdamW(WarmupCosine(5e-3, warmup_steps=1)),
            schedule=schedules.NoDistillation(),
            loss=losses.LossConfig(),
            arm="test",
            mesh=MeshConfig(),
            checkpoints=CheckpointConfig(),
            evaluate_every=2,
            log_every=1,
            compilation_cache="",
        ),
    )
    return folder


GENERATES = {"output_type": "generate_until", "doc_to_target": "x", "doc_to_choice": None}


def write_task(folder: pathlib.Path, name: str = "local_salt", **changes: Any) -> None:
    rows = [{"q": f"Salt {n}", "choices": [" yes", " no", " it is"]} for n in range(5)]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    settings = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 1,
        "metric_list": [{"metric": "exact_match" if "output_type" in changes else "acc"}],
        **changes,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(settings))


def run(model: pathlib.Path, output: pathlib.Path, *flags: str) -> int:
    common = ("--compilation_cache=", "--batch_size=8")
    return main(["evaluate", f"--model={model}", *common, *flags, f"--output_dir={output}"])


def test_rows_and_tasks_in_one_summary(
    model: pathlib.Path,
    cache: PackedCache,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_task(tmp_path)
    flags = (f"--cache={cache.path}", "--tasks=local_salt", f"--task_folder={tmp_path}")
    flags = (*flags, "--save_samples=True", "--limit=4")
    assert run(model, tmp_path / "out", *flags) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["bits_per_byte"] > 0
    found = summary["few_shot"]["local_salt"]
    assert (found["shots"], found["documents"]) == (0, 4)
    samples = (tmp_path / "out" / "samples_local_salt.jsonl").read_text().splitlines()
    right = [json.loads(sample)["acc"] for sample in samples]
    assert len(right) == 4
    assert found["metrics"]["acc"]["value"] == sum(right) / 4
    assert "local_salt" in capsys.readouterr().out
    # Again: all answers are there.
    monkeypatch.setattr(RequestLog, "add", _nothing)
    assert run(model, tmp_path / "out", *flags) == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["few_shot"] == {
        "local_salt": found
    }


def test_a_task_of_lm_eval_s_on_files_of_one_s_own(
    model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    file = tmp_path / "[data]*/piqa/validation.jsonl"
    file.parent.mkdir(parents=True)
    rows = [{"goal": f"Melt ice {n}", "sol1": "salt", "sol2": "ice", "label": 0} for n in range(3)]
    for split in ("train", "validation"):
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        file.with_stem(split).write_text(lines)
    flags = ("--tasks=piqa", f"--task_data={tmp_path / '[data]*'}", "--shots=1")
    assert run(model, tmp_path / "out", *flags) == 0
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["few_shot"]
    assert (found["piqa"]["shots"], found["piqa"]["documents"]) == (1, 3)
    assert found.keys() == {"piqa"}


def test_an_examination_of_one_s_own(
    model: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_examination.py").write_text(
        "class Layers:\n"
        "    def prepare(self, examinee):\n"
        "        return lambda folder: {'layers': examinee.saved.config.num_layers}\n"
    )
    (tmp_path / "mine.gin").write_text(
        "from __gin__ import dynamic_registration\n"
        "import my_examination\n"
        "from salt_jax.commands import evaluate\n"
        "evaluate.evaluate.responses = @my_examination.Layers()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert run(model, tmp_path / "out", f"--gin_file={tmp_path / 'mine.gin'}") == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["layers"] == 1


def _nothing(self: RequestLog, answers: dict[str, object]) -> None:
    assert not answers, f"{answers} were computed again"


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K's rows are not beside this checkout")
def test_real_gsm8k_rows_through_lm_eval_s_own_task(
    model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    settings = {
        "include": str(_lm_eval_folder() / "gsm8k" / "gsm8k.yaml"),
        "task": "local_gsm8k",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {name: str(GSM8K / f"{name}.jsonl") for name in ("train", "test")}
        },
    }
    (tmp_path / "local_gsm8k.yaml").write_text(json.dumps(settings))
    flags = ("--tasks=local_gsm8k", f"--task_folder={tmp_path}", "--limit=2", "--shots=1")
    assert run(model, tmp_path / "out", *flags, "--max_new_tokens=8", "--save_samples=True") == 0
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["few_shot"]["local_gsm8k"]
    assert (found["shots"], found["documents"]) == (1, 2)
    assert found["metrics"].keys() == {"exact_match,strict-match", "exact_match,flexible-extract"}
    samples = (tmp_path / "out" / "samples_local_gsm8k.jsonl").read_text().splitlines()
    prompt = json.loads(samples[0])["arguments"][0][0]
    assert prompt.count("Question:") == 2
    assert "Janet" in prompt


def _lm_eval_folder() -> pathlib.Path:
    import lm_eval.tasks

    return pathlib.Path(lm_eval.tasks.__file__).parent


def test_the_suite_is_listed_whole_and_nothing_is_written(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "--list_tasks=True"]) == 0
    listed = capsys.readouterr().out
    for word in ("salt_suite", "triviaqa", "salt_wikilingua", "salt_mbpp"):
        assert word in listed
    assert "…" not in listed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), "nothing to evaluate on: add --cache=FOLDER, --tasks=NAME"),
        (("--tasks=arc_eazy",), "(nearest: arc_easy)"),
        (("--tasks=arc_eazy", "--list_tasks=True"), "(nearest: arc_easy)"),
        (("--tasks=arc_easy", "--seed=-1"), "seed is -1"),
        (("--tasks=arc_easy",), "load_dataset('allenai/ai2_arc', 'ARC-Easy')"),
        (("--tasks=arc_easy", "--limit=0"), "limit is 0 and must be at least 1"),
        (("--tasks=arc_easy", "--shots=-1"), "shots is -1 and must be at least 0"),
        (("--tasks=arc_easy", "--max_new_tokens=0"), "max_new_tokens is 0 and must be at least 1"),
        (("--tasks=arc_easy", "--batch_size=0"), "batch_size is 0 and must be at least 1"),
        (("--tasks=arc_easy", "--task_folder=nowhere"), "task_folder is nowhere"),
        (("--tasks=arc_easy", "--task_data=nowhere"), "task_data is nowhere"),
        (
            ("--tasks=local_long", "--task_folder={here}"),
            "The task local_long generates up to 4096 tokens, and prompt and answer together may "
            "have 2048, the model's max_length: set --max_new_tokens to less",
        ),
    ],
)
def test_bad_input_is_a_sentence_and_writes_nothing(
    model: pathlib.Path,
    flags: Sequence[str],
    expected: str,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_task(tmp_path, "local_long", generation_kwargs={"max_gen_toks": 4096}, **GENERATES)
    flags = [flag.format(here=tmp_path) for flag in flags]
    assert run(model, tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err
    assert expected in error.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_without_a_model(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--cache=x", f"--output_dir={tmp_path / 'out'}"]) == 2
    assert "model is not set: add --model=VALUE" in capsys.readouterr().err


def test_without_lm_eval(
    model: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("harness", "harness_tasks"):
        monkeypatch.delitem(sys.modules, f"salt_jax.evaluation.{module}", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert run(model, tmp_path / "out", "--tasks=arc_easy") == 2
    assert "pip install 'salt_jax[eval]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
