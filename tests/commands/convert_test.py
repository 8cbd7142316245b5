"""`salt convert`: what comes in computes the same, what goes out is what came in, bad files are
named."""

import json
import pathlib
import shutil
import subprocess
from typing import Any

import numpy as np
import pytest

from salt_jax.data.safetensors_files import DTYPES, SafetensorsFolder, TensorInfo, write_shards
from salt_jax.data.vocabularies import ByteVocabulary
from salt_jax.main import main
from salt_jax.models.decoder import DecoderConfig
from salt_jax.models.huggingface import config_to_json
from salt_jax.models.huggingface_tensors import tensor_shapes
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
    architecture, settings = config_to_json(config, rows, dtype, {"eos_token_id": 0})
    (folder / "config.json").write_text(json.dumps({**settings, **changes}))
    tensors = [
        TensorInfo(n, dtype, s) for n, s in tensor_shapes(config, architecture.rules(config))
    ]
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
        *("gemma", "gemma_head_dim"),
    ],
)
def test_both_ways_give_transformers_logits(
    name: str, random_models: Any, tmp_path: pathlib.Path
) -> None:
    model = random_models.make(tmp_path / "theirs", name)
    run, back = tmp_path / "run", tmp_path / "back"
    assert not convert(f"--huggingface={tmp_path / 'theirs'}", f"--output_dir={run}")
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
    random_models: Any, tmp_path: pathlib.Path, tiny_run: pathlib.Path
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
    with pytest.raises(Exception, match=r"NOT_FOUND|not found|DATA_LOSS"):
        convert(f"--model={run}", f"--output_dir={out}")
    assert not (out / "config.json").exists()
    assert not list(out.glob("model*"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "qwen3"}, "model_type to 'qwen3', expected one of gpt_neox, llama, gemma"),
        ({"model_type": ["llama"]}, "expected one of gpt_neox"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "sets rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "sets rope_parameters"),
        ({"rope_parameters": {"rope_theta": 1e4, "beta": 3}}, "sets beta of the rotary"),
        ({"sliding_window": 128}, "sets sliding_window to 128"),
        ({"attention_bias": False}, "sets attention_bias to False"),
        ({"final_logit_softcapping": 30.0}, "sets final_logit_softcapping to 30.0"),
        ({"hidden_act": "quick_gelu"}, "sets hidden_act to 'quick_gelu'"),
        ({"hidden_size": "wide"}, "sets hidden_size to 'wide', expected a number"),
        ({"hidden_size": 10**30}, "expected a number below"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings to 1, expected a truth value"),
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
        (["--huggingface=x"], "huggingface is 'x', where no config.json is"),
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


def test_values_beyond_float16_are_refused(
    random_models: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, run = tmp_path / "theirs", tmp_path / "run"
    write_model(source, random_models)
    tensors = values(source)
    tensors["gpt_neox.layers.1.mlp.dense_h_to_4h.bias"][0] = 1e6
    infos = [TensorInfo(n, "float32", v.shape) for n, v in tensors.items()]
    write_shards(source, infos, iter(tensors.values()), 1 << 30)
    flags = [f"--huggingface={source}", f"--output_dir={run}"]
    assert convert(*flags, "--dtype=float16") == 2
    assert "mlp.dense_h_to_4h.bias has values that float16 can't hold" in capsys.readouterr().err
    assert complete_steps(run) == []


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
