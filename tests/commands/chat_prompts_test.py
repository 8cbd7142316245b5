"""An instruct model: special tokens in prompts, chats, several end ids, from files to answers."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest
import tokenizers

from salt_jax.data.packed_cache import PackedCache
from salt_jax.huggingface.model_config import config_to_json
from salt_jax.huggingface.safetensors_files import TensorInfo, write_shards
from salt_jax.huggingface.tensors import tensor_shapes
from salt_jax.main import main
from salt_jax.models.decoder import DecoderConfig
from salt_jax.training.checkpoints import find_model

ROWS = 384
CONFIG = DecoderConfig(
    embed_dim=16,
    num_layers=1,
    num_heads=2,
    mlp_dim=24,
    vocab_size=ROWS,
    max_length=128,
    tied_embeddings=False,
    scale_embeddings=False,
    mlp_activation="silu",
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + "
    "'<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MESSAGES = [{"role": "user", "content": "Is salt white?"}]


@pytest.fixture
def instruct(random_models: Any, tmp_path: pathlib.Path) -> pathlib.Path:
    """A model's folder as Hugging Face has it, of random weights."""
    folder = tmp_path / "instruct"
    folder.mkdir()
    random_models.save_tokenizer(folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    family, config = config_to_json(CONFIG, ROWS, "float32", {"eos_token_id": 0})
    (folder / "config.json").write_text(json.dumps(config))
    shapes = tensor_shapes(CONFIG, family.rules(CONFIG))
    tensors = [TensorInfo(name, "float32", shape) for name, shape in shapes]
    rng = np.random.default_rng(0)
    arrays = (rng.standard_normal(tensor.shape).astype(np.float32) for tensor in tensors)
    write_shards(folder, tensors, arrays, 1 << 30)
    return folder


def _convert(source: pathlib.Path, run: pathlib.Path) -> pathlib.Path:
    assert main(["convert", f"--huggingface={source}", f"--output_dir={run}"]) == 0
    return run


def _generate(run: pathlib.Path, out: pathlib.Path, *flags: str) -> list[dict[str, Any]]:
    flags = ("--max_new_tokens=12", "--compilation_cache=", *flags)
    assert main(["generate", f"--model={run}", f"--output_dir={out}", *flags]) == 0
    return [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]


def test_a_chat_is_the_prompt_that_its_template_writes(
    instruct: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    run = _convert(instruct, tmp_path / "run")
    rendered = "<|im_start|>user\nIs salt white?<|im_end|>\n<|im_start|>assistant\n"
    rows = [{"messages": MESSAGES}, {"prompt": MESSAGES}, {"prompt": rendered}]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\ufeff" + "".join(f"{json.dumps(row)}\n" for row in rows))
    given = (f"--prompts={prompts}", "--prepend_start=False")
    records = _generate(run, tmp_path / "out", *given)
    assert [record["prompt"] for record in records] == [rendered] * 3
    assert records[0] == records[1] == records[2]
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(instruct)
    ids = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    vocabulary = find_model(run, None, "model").load_vocabulary()
    assert vocabulary.encode(rendered, parse_special=True) == ids
    # The start comes before texts alone; special tokens may be left text.
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["prompt_tokens"] == 3 * len(ids)
    _generate(run, tmp_path / "start", f"--prompts={prompts}")
    summary = json.loads((tmp_path / "start/summary.json").read_text())
    assert summary["prompt_tokens"] == 3 * len(ids) + 1
    _generate(run, tmp_path / "plain", *given, "--parse_special=False")
    summary = json.loads((tmp_path / "plain/summary.json").read_text())
    assert summary["prompt_tokens"] == 2 * len(ids) + len(vocabulary.encode(rendered))
    # A prompt that begins with the start gets no second one.
    _generate(run, tmp_path / "begun", "--prompt=<|endoftext|>a", "--prompt=a")
    assert json.loads((tmp_path / "begun/summary.json").read_text())["prompt_tokens"] == 4


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_each_of_several_end_ids_ends_an_answer(
    file: str, instruct: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (free,) = _generate(_convert(instruct, tmp_path / "run"), tmp_path / "out", "--prompt=salt")
    assert free["ended_by"] == "length"
    ids = free["ids"]
    end = next(i for i in ids if i != ids[0])
    path = instruct / file
    settings = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**settings, "eos_token_id": [0, end]}))
    run = _convert(instruct, tmp_path / "ending")
    (record,) = _generate(run, tmp_path / "answers", "--prompt=salt")
    assert record["ids"] == ids[: ids.index(end)]
    assert record["ended_by"] == "end of document"


def test_prompts_and_responses_hold_special_tokens_and_show_them(
    instruct: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _convert(instruct, tmp_path / "run")
    data = tmp_path / "data.jsonl"
    rows = [{"q": f"{n} <|im_end|>", "a": f"{n}"} for n in range(40)]
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    flags = [
        *("prepare", "--gin_file=data/finetune.gin", f"--gin.TRAIN='{data}'", "--workers=1"),
        *(f"--gin.MODEL='{run}'", "--gin.PROMPT='<|im_start|>{q}'"),
        *("--gin.RESPONSE='{a}<|im_end|>'", "--gin.SEQUENCE_LENGTH=64", "--show=1"),
    ]
    vocabulary = find_model(run, None, "model").load_vocabulary()
    start, end = (vocabulary.encode(name, True)[0] for name in ("<|im_start|>", "<|im_end|>"))
    for parsed in (True, False):
        out = tmp_path / f"cache_{parsed}"
        capsys.readouterr()
        assert main([*flags, f"--parse_special={parsed}", f"--output_dir={out}"]) == 0
        assert ("⟨|im_start|⟩" in capsys.readouterr().out) == parsed
        rows_of = PackedCache.open(out).split("train")
        targets = np.concatenate([rows_of[i]["targets"] for i in range(len(rows_of))])
        documents = rows_of.info["documents"]
        assert (targets == start).sum() == (documents if parsed else 0)
        assert (targets == end).sum() == (2 * documents if parsed else 0)


def test_conversations_are_prompts_and_responses(
    instruct: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = json.loads((instruct / "tokenizer_config.json").read_text())
    settings["eos_token"] = "<|im_end|>"
    (instruct / "tokenizer_config.json").write_text(json.dumps(settings))
    run = _convert(instruct, tmp_path / "run")
    data = tmp_path / "data.jsonl"
    chats = [[*MESSAGES, {"role": "assistant", "content": f"Yes {n}."}] for n in range(40)]
    data.write_text("".join(f"{json.dumps({'messages': chat})}\n" for chat in chats))
    flags = [
        *("prepare", "--gin_file=data/finetune.gin", "--gin_file=templates/chat.gin"),
        *(f"--gin.TRAIN='{data}'", f"--gin.MODEL='{run}'", "--workers=2", "--show=1"),
        *("--gin.SEQUENCE_LENGTH=64", f"--output_dir={tmp_path / 'cache'}"),
    ]
    assert main(flags) == 0
    shown = capsys.readouterr().out
    prompt = "⟨|im_start|⟩user\nIs salt white?⟨end⟩\n⟨|im_start|⟩assistant\n"
    assert f"⟦{prompt}⟧Yes " in shown
    assert ".⟨end⟩\n" in shown
    assert ".⟨end⟩⟨end⟩" not in shown
    data.write_text(json.dumps({"messages": MESSAGES}) + "\n")
    assert main([*flags[:-1], f"--output_dir={tmp_path / 'other'}"]) == 2
    said = capsys.readouterr().err
    assert f"{data}, line 1: the last of these messages is not an assistant's" in said


def test_a_chat_that_the_template_does_not_take_is_named(
    instruct: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _convert(instruct, tmp_path / "run")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(f'{{"prompt": "a"}}\n{{"messages": {json.dumps(["a"])}}}\n')
    out = tmp_path / "out"
    flags = [f"--model={run}", f"--prompts={prompts}", f"--output_dir={out}"]
    assert main(["generate", *flags]) == 2
    assert f"{prompts}, line 2: messages must be a list of objects" in capsys.readouterr().err
    prompts.write_text('{"messages": [{"role": "user"}]}\n')
    assert main(["generate", *flags]) == 2
    assert "line 1: the model's chat template rejects them (" in capsys.readouterr().err
    assert not out.exists()
