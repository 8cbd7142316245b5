"""`salt convert`: what comes in computes the same, what goes out is what came in, bad files are
named."""

import json
import pathlib
import re
import shutil
import subprocess
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from salt_jax.data.vocabularies import ByteVocabulary
from salt_jax.huggingface.model_config import config_to_json
from salt_jax.huggingface.safetensors_files import (
    DTYPES,
    SafetensorsFolder,
    TensorInfo,
    write_shards,
)
from salt_jax.huggingface.tensors import tensor_shapes
from salt_jax.main import main
from salt_jax.models.decoder import DecoderConfig
from salt_jax.training.checkpoints import complete_steps, find_model, read_progress

PARITY = 1e-4
NEOX = DecoderConfig(
    embed_dim=16,
    num_layers=2,
    num_heads=2,
    mlp_dim=24,
    vocab_size=300,
    vocab_multiple=64,
    max_length=32,
    norm="layernorm",
    norm_epsilon=1e-5,
    use_bias=True,
    gated_mlp=False,
    mlp_activation="gelu",
    parallel_residual=True,
    rope_fraction=0.25,
    tied_embeddings=False,
    scale_embeddings=False,
)


def convert(*flags: str) -> int:
    return main(["convert", *flags])


def write_model(
    folder: pathlib.Path,
    random_models: Any,
    config: DecoderConfig = NEOX,
    dtype: str = "float32",
    **changes: Any,
) -> None:
    """A model in Hugging Face's files, without transformers; changes are of its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = config.padded_vocab_size
    family, settings = config_to_json(config, rows, dtype, {"eos_token_id": 0})
    (folder / "config.json").write_text(json.dumps({**settings, **changes}))
    tensors = [TensorInfo(n, dtype, s) for n, s in tensor_shapes(config, family.rules(config))]
    rng = np.random.default_rng(0)
    arrays = (rng.standard_normal(t.shape).astype(DTYPES[dtype]) for t in tensors)
    write_shards(folder, tensors, arrays, 1 << 30)
    random_models.save_tokenizer(folder)


def values(folder: pathlib.Path) -> dict[str, np.ndarray]:
    files = SafetensorsFolder(folder)
    return {name: files.read(name) for name in files.tensors}


def assert_same_tensors(folder: pathlib.Path, other: pathlib.Path) -> None:
    ours, theirs = values(folder), values(other)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert value.dtype == ours[name].dtype
        np.testing.assert_array_equal(ours[name].view(np.uint8), value.view(np.uint8), name)


@pytest.mark.parametrize(
    "name",
    [
        *("neox", "neox_sequential", "neox_tied", "llama", "llama_grouped_tied", "llama_head_dim"),
        *("gemma", "gemma_head_dim", "gemma2", "gpt2", "phi3"),
    ],
)
def test_both_ways_give_transformers_logits(
    name: str, random_models: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = random_models.make(tmp_path / "theirs", name)
    run, back = tmp_path / "run", tmp_path / "back"
    assert not convert(f"--huggingface={tmp_path / 'theirs'}", f"--output_dir={run}")
    said = "the model takes its original context, 64 tokens, alone" in capsys.readouterr().out
    assert said == (name == "phi3")
    imported = json.loads((run / "summary.json").read_text())["model"]
    assert imported == find_model(run, None, "model").identity
    expected = random_models.their_logits(model)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(random_models.our_logits(run), expected, atol=PARITY, rtol=0)
    assert not convert(f"--model={run}", f"--output_dir={back}", "--max_shard_bytes=20000")
    assert (back / "model.safetensors.index.json").exists()
    theirs = random_models.their_logits(back)
    np.testing.assert_allclose(theirs, expected, atol=PARITY / 10, rtol=0)
    if not name.startswith("gemma"):  # whose scales of norms are rounded when 1 is added
        assert_same_tensors(back, tmp_path / "theirs")


def test_a_run_that_trained_goes_out(
    random_models: Any,
    tmp_path: pathlib.Path,
    tiny_run: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert not convert(f"--model={tiny_run}", "--drop_padding=False", f"--output_dir={out}")
    assert {file.name for file in out.iterdir()} >= {"model.safetensors", "config.json"}
    expected = random_models.our_logits(tiny_run)
    theirs = random_models.their_logits(out)
    np.testing.assert_allclose(theirs, expected, atol=PARITY, rtol=0)
    # The same softmax as in our own evaluation.
    shorter = tmp_path / "shorter"
    assert not convert(f"--model={tiny_run}", f"--output_dir={shorter}")
    size = find_model(tiny_run, None, "model").config.vocab_size
    theirs = random_models.their_logits(shorter)
    assert theirs.shape[-1] == size == ByteVocabulary().size
    written = np.concatenate([value.ravel() for value in values(shorter).values()])
    summary = json.loads((shorter / "summary.json").read_text())
    assert summary["num_parameters"] == written.size
    assert f"{size} ids in {size} rows" in capsys.readouterr().out
    np.testing.assert_allclose(theirs, expected[..., :size], atol=PARITY, rtol=0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_stay_as_they_are(
    dtype: str, random_models: Any, tmp_path: pathlib.Path
) -> None:
    source, run, back = tmp_path / "theirs", tmp_path / "run", tmp_path / "back"
    model = random_models.make(source, "neox", dtype)
    assert not convert(f"--huggingface={source}", f"--output_dir={run}", "--compute_dtype=float32")
    saved = find_model(run, None, "model")
    assert (saved.config.param_dtype, saved.config.dtype) == (dtype, "float32")
    expected = random_models.their_logits(model)
    np.testing.assert_allclose(random_models.our_logits(run), expected, atol=PARITY, rtol=0)
    assert not convert(f"--model={run}", f"--output_dir={back}")
    assert_same_tensors(back, source)
    assert json.loads((back / "config.json").read_text())["torch_dtype"] == dtype
    wide = tmp_path / "wide"
    assert not convert(f"--model={run}", f"--output_dir={wide}", "--dtype=float32")
    for name, value in values(wide).items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, values(source)[name].astype(np.float32))


def test_a_gemma_of_sixteen_bits_keeps_its_norms_digits(
    random_models: Any, tmp_path: pathlib.Path
) -> None:
    source, run, back = tmp_path / "theirs", tmp_path / "run", tmp_path / "back"
    random_models.make(source, "gemma", "bfloat16")
    assert not convert(f"--huggingface={source}", f"--output_dir={run}")
    assert find_model(run, None, "model").config.param_dtype == "float32"
    assert not convert(f"--model={run}", f"--output_dir={back}", "--dtype=bfloat16")
    assert_same_tensors(back, source)


def test_steps_come_into_one_folder_one_after_the_other(
    random_models: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    for step, scale in ((18_000, 1.0), (143_000, 2.0)):
        source = tmp_path / str(step)
        write_model(source, random_models)
        tensors = values(source)
        tensors["embed_out.weight"] *= np.float32(scale)
        # The same tokenizer in other bytes, as another version of transformers may write it.
        tokenizer = json.loads((source / "tokenizer.json").read_text())
        (source / "tokenizer.json").write_text(json.dumps(tokenizer, indent=int(scale)))
        infos = [TensorInfo(n, "float32", v.shape) for n, v in tensors.items()]
        write_shards(source, infos, iter(tensors.values()), 1 << 30)
        assert not convert(f"--huggingface={source}", f"--step={step}", f"--output_dir={run}")
    assert complete_steps(run) == [18_000, 143_000]
    early, late = find_model(run, 18_000, "scorer"), find_model(run, None, "teacher")
    assert early.digest != late.digest
    assert late.counters == {}
    ratio = random_models.our_logits(run, 143_000) / random_models.our_logits(run, 18_000)
    np.testing.assert_allclose(ratio, 2.0, rtol=1e-4)
    # Given again, a command does nothing; of another model, no step comes in.
    capsys.readouterr()
    again = [f"--huggingface={tmp_path / '18000'}", "--step=18000", f"--output_dir={run}"]
    assert not convert(*again)
    assert "nothing was converted" in capsys.readouterr().out
    again[0] = f"--huggingface={tmp_path / '143000'}"
    assert convert(*again) == 2
    assert "has a step 18000, of other weights" in capsys.readouterr().err
    again[0] = f"--huggingface={(tmp_path / '18000').rename(tmp_path / 'moved')}"
    assert not convert(*again)
    assert "nothing was converted" in capsys.readouterr().out
    assert convert(*again[::2], "--step=1", "--dtype=bfloat16") == 2
    error = capsys.readouterr().err
    assert "give all steps the same two" in error
    write_model(tmp_path / "other", random_models, rotary_pct=0.5, rope_parameters=None)
    assert convert(f"--huggingface={tmp_path / 'other'}", "--step=1", f"--output_dir={run}") == 2
    assert "of another model, with rope_fraction 0.25 (here 0.5)" in capsys.readouterr().err
    (tmp_path / "moved/tokenizer_config.json").write_text('{"eos_token": "<|padding|>"}')
    again = [f"--huggingface={tmp_path / 'moved'}", "--step=1", f"--output_dir={run}"]
    assert convert(*again) == 2
    assert "another tokenizer" in capsys.readouterr().err
    assert complete_steps(run) == [18_000, 143_000]


def test_what_a_killed_conversion_left_is_no_checkpoint(
    random_models: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, run = tmp_path / "theirs", tmp_path / "run"
    write_model(source, random_models)
    read = SafetensorsFolder.read

    def fails(self: SafetensorsFolder, name: str, rows: slice = slice(None)) -> np.ndarray:
        if name == "embed_out.weight":
            raise OSError(5, "the disk is gone", name)
        return read(self, name, rows)

    with monkeypatch.context() as patch:
        patch.setattr(SafetensorsFolder, "read", fails)
        with pytest.raises(OSError, match="the disk is gone"):
            convert(f"--huggingface={source}", f"--output_dir={run}")
    assert complete_steps(run) == []
    assert not convert(f"--huggingface={source}", f"--output_dir={run}")
    assert read_progress(run, 0)["converted_from"] == str(source)
    # The other way: no config.json, so that transformers takes the folder for no model.
    out = tmp_path / "out"
    assert not convert(f"--model={run}", f"--output_dir={out}")
    shutil.rmtree(run / "checkpoints/0/params/head")
    assert convert(f"--model={run}", f"--output_dir={out}") == 2, "found before anything is written"
    assert (out / "config.json").exists()
    (run / "checkpoints/0/digests.json").unlink()
    assert convert(f"--model={run}", f"--output_dir={out}") == 2
    assert not (out / "config.json").exists()
    assert not list(out.glob("model*"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "mamba"}, "model_type to 'mamba', expected one of gpt_neox, llama, gemma"),
        ({"model_type": ["llama"]}, "expected one of gpt_neox"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "sets rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "sets rope_parameters"),
        ({"rope_parameters": {"rope_theta": 1e4, "beta": 3}}, "sets beta of the rotary"),
        ({"sliding_window": 128}, "sets sliding_window to 128"),
        ({"attention_bias": False}, "sets attention_bias to False"),
        ({"final_logit_softcapping": 30.0}, "sets final_logit_softcapping to 30.0"),
        ({"hidden_act": "quick_gelu"}, "sets hidden_act to 'quick_gelu'"),
        ({"hidden_size": "wide"}, "sets hidden_size to 'wide', expected a number"),
        ({"hidden_size": 10**30}, "expected a number below"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings to 1, expected true or false"),
        ({"hidden_size": 32}, "has the shape [320, 16], expected [320, 32]"),
        ({"num_hidden_layers": 3}, "has no tensor gpt_neox.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, "has a tensor gpt_neox.layers.1."),
        ({"num_hidden_layers": 0}, "DecoderConfig.num_layers is 0"),
        ({"vocab_size": 299}, "vocab_size to 299 and the tokenizer has 300 ids"),
    ],
)
def test_a_model_that_is_not_ours_is_refused(
    changes: dict[str, Any],
    expected: str,
    random_models: Any,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_model(tmp_path / "theirs", random_models, **changes)
    flags = [f"--huggingface={tmp_path / 'theirs'}", f"--output_dir={tmp_path / 'run'}"]
    assert convert(*flags) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_what_is_off_or_without_effect_is_taken(random_models: Any, tmp_path: pathlib.Path) -> None:
    """Old buffers in the files, too."""
    source = tmp_path / "theirs"
    write_model(source, random_models, sliding_window=None, quantization_config={}, use_cache=False)
    tensors = values(source)
    expected = dict(tensors)
    tensors["gpt_neox.layers.0.attention.masked_bias"] = np.zeros((1,), np.float32)
    tensors["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = np.ones((2,), np.float32)
    infos = [TensorInfo(n, "float32", v.shape) for n, v in tensors.items()]
    write_shards(source, infos, iter(tensors.values()), 1 << 30)
    run, back = tmp_path / "run", tmp_path / "back"
    assert not convert(f"--huggingface={source}", f"--output_dir={run}")
    assert not convert(f"--model={run}", f"--output_dir={back}")
    for name, value in values(back).items():
        np.testing.assert_array_equal(value, expected.pop(name))
    assert not expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "neither is set"),
        (["--huggingface=x", "--model=y"], "both are set"),
        (["--huggingface=x", "--dtype=int8"], "dtype is 'int8'"),
        (["--huggingface=x"], "huggingface is 'x', where there is no config.json"),
        (["--huggingface=hf:x"], "write hf:OWNER/NAME"),
        (["--huggingface=hf:x/y@a", "--revision=b"], "name one of them"),
        (["--model=y", "--revision=b"], "are for --huggingface"),
        (["--huggingface=x", "--step=-1"], "step is -1"),
        (["--huggingface=x", "--drop_padding=True"], "drop_padding is for --model"),
        (["--model=y"], "model is y, which does not exist"),
        (["--model=y", "--eos_token=</s>"], "are for --huggingface"),
        (["--model=y", "--max_shard_bytes=0"], "max_shard_bytes is 0"),
    ],
)
def test_flags_that_do_not_fit(
    flags: list[str],
    expected: str,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert convert(*flags, f"--output_dir={tmp_path / 'out'}") == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_folder_of_anothers_is_written_over(
    random_models: Any,
    tiny_run: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path / "theirs"
    write_model(source, random_models)
    before = (source / "model.safetensors").read_bytes()
    for flag in (f"--huggingface={source}", f"--model={tiny_run}"):
        assert convert(flag, f"--output_dir={source}") == 2
    assert convert(f"--huggingface={source}", f"--output_dir={tiny_run}") == 2
    assert convert(f"--model={tiny_run}", f"--output_dir={tiny_run}") == 2
    weights = tmp_path / "weights"
    weights.mkdir()
    shutil.copy(source / "model.safetensors", weights)
    assert convert(f"--model={tiny_run}", f"--output_dir={weights}") == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 5
    assert all("choose another --output_dir" in error for error in errors)
    assert (source / "model.safetensors").read_bytes() == before
    assert [file.name for file in weights.iterdir()] == ["model.safetensors"]


def with_value(folder: pathlib.Path, tensor: str, value: float) -> None:
    """Puts a value into a tensor of a model's."""
    tensors = values(folder)
    tensors[tensor].reshape(-1)[-1] = value
    infos = [TensorInfo(n, str(v.dtype), v.shape) for n, v in tensors.items()]
    write_shards(folder, infos, iter(tensors.values()), 1 << 30)


QKV = "gpt_neox.layers.1.attention.query_key_value.weight"


def test_values_beyond_float16_are_refused(
    random_models: Any, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source, run, out = tmp_path / "theirs", tmp_path / "run", tmp_path / "out"
    write_model(source, random_models)
    with_value(source, QKV, 1e6)
    expected = (
        f"salt: The tensor {QKV} of {{}} has values that float16 can't hold, 1e+06 for one: choose "
        "--dtype=bfloat16 or --dtype=float32.\n"
    )
    narrow = "--dtype=float16"
    assert convert(f"--huggingface={source}", f"--output_dir={run}", narrow) == 2
    assert capfd.readouterr().err == expected.format(source)
    assert not run.exists()
    assert not convert(f"--huggingface={source}", f"--output_dir={run}")
    assert convert(f"--model={run}", f"--output_dir={out}", narrow, "--max_shard_bytes=9999") == 2
    assert capfd.readouterr().err == expected.format(f"{run} (step 0)")
    assert not out.exists()
    # The largest value that there is rounds to one of float16's.
    with_value(source, QKV, 65519.0)
    assert not convert(f"--huggingface={source}", f"--output_dir={tmp_path / 'narrow'}", narrow)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tensor", "value"),
    [
        (QKV, np.nan),
        ("gpt_neox.layers.0.input_layernorm.bias", np.inf),
        ("gpt_neox.embed_in.weight", -np.inf),
    ],
)
def test_a_value_that_is_not_finite_is_named(
    dtype: str,
    tensor: str,
    value: float,
    random_models: Any,
    tmp_path: pathlib.Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    source, run = tmp_path / "theirs", tmp_path / "run"
    write_model(source, random_models, dtype=dtype)
    assert not convert(f"--huggingface={source}", f"--output_dir={run}")
    before = sorted(run.rglob("*"))
    with_value(source, tensor, value)
    capfd.readouterr()
    assert convert(f"--huggingface={source}", f"--output_dir={run}", "--step=1") == 2
    assert sorted(run.rglob("*")) == before, "nothing is left behind"
    assert convert(f"--huggingface={source}", f"--output_dir={tmp_path / 'new'}") == 2
    assert not (tmp_path / "new").exists()
    assert set(capfd.readouterr().err.splitlines()) == {
        f"salt: The tensor {tensor} of {source} has values that are not finite ({abs(value)}), and "
        "so the model computes none: take another step of it, or download it again."
    }


@pytest.mark.parametrize("tensor", [QKV, "gpt_neox.embed_in.weight"])
def test_a_run_with_a_value_that_is_not_finite_does_not_go_out(
    tensor: str,
    random_models: Any,
    tmp_path: pathlib.Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, run, out = tmp_path / "theirs", tmp_path / "run", tmp_path / "out"
    write_model(source, random_models)
    assert not convert(f"--huggingface={source}", f"--output_dir={run}")
    assert not convert(f"--model={run}", f"--output_dir={out}")
    with_value(source, tensor, np.nan)
    with monkeypatch.context() as patch:
        patch.setattr(
            "salt_jax.training.converted_tensors.require_representable", lambda *arguments: None
        )
        assert not convert(f"--huggingface={source}", "--step=1", f"--output_dir={run}")
    capfd.readouterr()
    for folder in (out, tmp_path / "new"):  # one that an older step went to, and none
        assert convert(f"--model={run}", f"--output_dir={folder}") == 2
        assert f"{tensor} of {run} (step 1) has values that are not" in capfd.readouterr().err
        assert not folder.exists()


def test_fields_that_nothing_reads_pass_with_a_notice(
    random_models: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "theirs"
    fields = {"is_llama_config": True, "transformers.js_config": {"dtype": "q4"}, "_x": None}
    fields |= {"\x1b[31mred": 1}
    write_model(source, random_models, **fields, unk_token_id=3)
    assert not convert(f"--huggingface={source}", f"--output_dir={tmp_path / 'run'}")
    notice = (
        f"{source / 'config.json'} sets \\x1b[31mred, is_llama_config, transformers.js_config, "
        "which no forward pass of gpt_neox reads: ignored."
    )
    assert capsys.readouterr().out.splitlines().count(notice) == 1


@pytest.mark.parametrize(
    "named",
    [
        {"hidden_act": "relu", "hidden_activation": "gelu_pytorch_tanh"},
        {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "relu"},
        {"hidden_act": "gelu", "use_bidirectional_attention": False},
    ],
)
def test_a_gemma_computes_what_transformers_does_of_its_files(
    named: dict[str, Any], random_models: Any, tmp_path: pathlib.Path
) -> None:
    source, run = tmp_path / "theirs", tmp_path / "run"
    random_models.make(source, "gemma")
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**settings, **named}))
    assert not convert(f"--huggingface={source}", f"--output_dir={run}")
    expected = random_models.their_logits(source)
    np.testing.assert_allclose(random_models.our_logits(run), expected, atol=PARITY, rtol=0)


def test_the_tokenizers_files_go_out_as_they_came(
    random_models: Any, tmp_path: pathlib.Path
) -> None:
    source, run, out = tmp_path / "theirs", tmp_path / "run", tmp_path / "out"
    write_model(source, random_models)
    texts = {
        "special_tokens_map.json": '{"pad_token": "<|padding|>"}',
        "added_tokens.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "additional_chat_templates/tools.jinja": "{{ tools }}",
        "generation_config.json": '{"eos_token_id": [0, 5], "temperature": 0.5}',
    }
    (source / "additional_chat_templates").mkdir()
    for name, text in texts.items():
        (source / name).write_text(text)
    assert not convert(f"--huggingface={source}", f"--output_dir={run}")
    assert not convert(f"--model={run}", f"--output_dir={out}")
    expected = {"eos_token_id": [0, 5], "temperature": 0.5, "bos_token_id": 0}
    assert json.loads((out / "generation_config.json").read_text()) == expected
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == [0, 5]
    del texts["generation_config.json"]
    for name, text in texts.items():
        assert (out / name).read_text() == text
    listed = json.loads((out / "summary.json").read_text())["files"]
    assert {*texts, "generation_config.json", "config.json", "model.safetensors"} <= {*listed}
    # Where the end of a document was chosen, generation stops there too; and a model without a
    # template that goes to the same place has none.
    (source / "chat_template.jinja").unlink()
    other = tmp_path / "other"
    end = "--eos_token=<|padding|>"
    assert not convert(f"--huggingface={source}", f"--output_dir={other}", end)
    assert not convert(f"--model={other}", f"--output_dir={tmp_path / 'another'}")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "another" / name).read_text())["eos_token_id"] == 1
    (run / "tokenizer/chat_template.jinja").unlink()
    assert not convert(f"--model={run}", f"--output_dir={out}")
    assert not (out / "chat_template.jinja").exists()


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("F64", "is of float64, .*make it float32 with transformers"), ("I8", "not quantized")],
)
def test_dtypes_that_are_not_taken(
    dtype: str,
    expected: str,
    random_models: Any,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path / "theirs"
    write_model(source, random_models)
    numbers = {"F64": np.float64, "I8": np.int8}[dtype]
    arrays = {name: value.astype(numbers) for name, value in values(source).items()}
    safetensors.numpy.save_file(arrays, source / "model.safetensors")
    assert convert(f"--huggingface={source}", f"--output_dir={tmp_path / 'run'}") == 2
    assert re.search(expected, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_named(
    small_disk: pathlib.Path,
    random_models: Any,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    theirs = tmp_path_factory.mktemp("model")
    write_model(theirs, random_models)
    run = small_disk / "run"
    command = [f"--huggingface={theirs}", f"--output_dir={run}"]
    assert convert(*command) == 2
    assert "MB free, and the parameters need" in capsys.readouterr().err
    assert not run.exists()
    # The disk has less than it says: the check beforehand is passed.
    usage = type("Usage", (), {"free": 10**12})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    subprocess.run(["mount", "-o", "remount,size=80k", str(small_disk)], check=True)
    assert convert(*command) == 2
    error = capsys.readouterr().err
    assert "/params" in error
    assert "o space left" in error
    assert complete_steps(run) == []


def test_a_tied_model_with_a_head_of_its_own_is_refused(
    random_models: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "theirs"
    random_models.make(source, "llama")
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": True}))
    assert convert(f"--huggingface={source}", f"--output_dir={tmp_path / 'run'}") == 2
    assert "lm_head.weight is another tensor than model.embed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    # The other way round: a tied model whose config.json doesn't say so.
    untied = tmp_path / "untied"
    random_models.make(untied, "llama_grouped_tied")
    theirs = json.loads((untied / "config.json").read_text())
    (untied / "config.json").write_text(json.dumps({**theirs, "tie_word_embeddings": False}))
    assert convert(f"--huggingface={untied}", f"--output_dir={tmp_path / 'run'}") == 2
    assert "no tensor lm_head.weight, and its config.json doesn't" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    # The same table under both names is what older versions of transformers saved.
    files = values(source)
    files["lm_head.weight"] = files["model.embed_tokens.weight"]
    tensors = [TensorInfo(name, "float32", array.shape) for name, array in files.items()]
    write_shards(source, tensors, iter(files.values()), 1 << 30)
    assert not convert(f"--huggingface={source}", f"--output_dir={tmp_path / 'run'}")
    # A kill between a checkpoint's name and its digests: the next conversion makes them.
    digests = tmp_path / "run" / "checkpoints" / "0" / "digests.json"
    digests.unlink()
    assert not convert(f"--huggingface={source}", f"--output_dir={tmp_path / 'run'}")
    assert digests.exists()
