"""A folder of everything that a `salt` command may be pointed at, in working order or not.

The tables beside this file are commands as they are typed in that folder.
"""

import contextlib
import io
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from salt_jax.commands.convert import convert
from salt_jax.commands.select import select
from salt_jax.commands.train import train
from salt_jax.data.label_format import LabelFormat, Labels
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.row_scores import RowScores
from salt_jax.data.soft_labels import SoftLabelsWriter
from salt_jax.distill import losses, schedules
from salt_jax.distill.selection import RandomRows
from salt_jax.huggingface.model_config import config_from_json
from salt_jax.huggingface.safetensors_files import TensorInfo, write_shards
from salt_jax.huggingface.tensors import tensor_shapes
from salt_jax.models.decoder import DecoderConfig
from salt_jax.storage.run_folder import RunFolder
from salt_jax.training.checkpoints import CheckpointConfig
from salt_jax.training.learning_rates import WarmupCosine
from salt_jax.training.optimizers import AdamW
from tests.run_settings import train_config

ROWS = 48

_TRAIN = (
    b"from __gin__ import dynamic_registration\nfrom salt_jax.commands import train\n"
    b"from salt_jax.training import config\n"
)
_TEXTS: dict[str, bytes] = {
    "documents.jsonl": b"".join(
        json.dumps({"text": f"document {i} of salt", "meta": {"n": i}}).encode() + b"\n"
        for i in range(40)
    ),
    "blank.jsonl": b"\n\n",
    "empty.jsonl": b"",
    "empty.txt": b"",
    "broken.jsonl": b'{"text": "whole"}\n{"text": \n',
    "numbers.jsonl": b'{"text": 1}\n',
    "list.jsonl": b'["a"]\n',
    "rows.jsonl": b'{"question": "1 + 1?", "answer": "2 #### 2"}\n' * 40,
    "latin.txt": "sel marin, fum\u00e9".encode("latin-1"),
    "half.jsonl": b'{"prompt": "\\ud800"}\n',  # of a surrogate pair
    "prompts.csv": b"prompt\nsalt\n",
    "prompts.jsonl": b'{"prompt": "salt"}\n',
    "chat.jsonl": b'{"messages": [{"role": "user", "content": "salt"}]}\n',
    # Of a compressed file the first bytes alone.
    "cut.jsonl.zst": b"\x28\xb5\x2f\xfd\x04",
    "cut.jsonl.gz": b"\x1f\x8b\x08",
    "cut.parquet": b"PAR1",
    "cut.gguf": b"GGUF\x03",
    "packed.jsonl": b"\x1f\x8b\x08",
    "part-00000": b'{"text": "salt"}\n',
    "pretty.json": b'{\n  "text": "salt"\n}\n',
    "rows.tar.gz": b"",
    "utf16.txt": "salt".encode("utf-16"),
    "binary.gin": bytes(range(128, 256)),
    "itself.gin": b"include 'itself.gin'\n",
    "open.gin": _TRAIN + b"config.TrainConfig.steps = [3\n",
    "required.gin": _TRAIN + b"WIDTH = %gin.REQUIRED\nconfig.TrainConfig.seed = %WIDTH\n",
    "short.gin": _TRAIN + b"train.steps = 3\n",
    "unknown.gin": _TRAIN + b"config.Data.batchsize = 8\n",
    "utf16.gin": "\ufeffWARMUP_STEPS = 3\n".encode("utf-16-le"),
    "nul.gin": b"WARMUP_STEPS = 3\n\0",
    "dedent.gin": _TRAIN + b"config.TrainConfig:\n    steps = 3\n  seed = 3\n",
    "empty_block.gin": _TRAIN + b"config.Data:\nconfig.TrainConfig.steps = 3\n",
    "block.gin": _TRAIN + b"config.Data:\n  # as T5X's\n\n  seed = 3\n  batchsize = 8\n",
    "other_block.gin": _TRAIN + b"confing.Data:\n  seed = 3\n",
    "static.gin": b"trian.train:\n  steps = 3\n",
    "includes.gin": _TRAIN + b"include 'open.gin'\n",
    "includes_none.gin": _TRAIN + b"\ninclude 'methods/slat.gin'\n",
    "round.gin": b"include 'about.gin'\n",
    "about.gin": b"include 'round.gin'\n",
    "deep.gin": b"X = " + b"(" * 5000 + b"1" + b")" * 5000,
    "study.gin": (
        b"from __gin__ import dynamic_registration\nfrom salt_jax.commands import study\n"
        b"study.study.arms = {'baseline': ('--steps=3',)}\n"
    ),
    "a file": b"text\n",
}


@pytest.fixture(scope="session")
def material(
    cache: PackedCache,
    make_cache: Callable[..., PackedCache],
    write_scores: Callable[..., RowScores],
    tmp_path_factory: pytest.TempPathFactory,
) -> pathlib.Path:
    """The folder that the command lines are typed in; `salt` makes none of it anew."""
    folder = tmp_path_factory.mktemp("material")
    for name, text in _TEXTS.items():
        (folder / name).write_bytes(text)
    (folder / "nothing").mkdir()
    caches = {"cache": cache, "half_cache": cache, "long_cache": make_cache(rows=8, length=600)}
    for name, packed in {**caches, "other_cache": make_cache(reserved=3)}.items():
        shutil.copytree(packed.path, folder / name)
        RunFolder(folder / name, "prepare").begin()
    (folder / "half_cache" / "COMPLETED").unlink()
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        _train("slm", "cache")
        RunFolder(pathlib.Path("scores"), "score").begin()
        write_scores(pathlib.Path("scores"), np.arange(ROWS), cache_digest=cache.digest, ks=(5, 10))
        write_scores(pathlib.Path("nan_scores"), np.full(ROWS, np.nan), cache_digest=cache.digest)
        select(RunFolder(pathlib.Path("selection"), "select"), cache="cache", rule=RandomRows(m=9))
        _write_soft_labels(pathlib.Path("labels"), cache)
        _write_huggingface(pathlib.Path("huggingface"))
        convert(RunFolder(pathlib.Path("converted"), "convert"), huggingface="huggingface")
    return folder


def _train(name: str, cache: str) -> None:
    train(
        RunFolder(pathlib.Path(name), "train"),
        config=train_config(
            model=DecoderConfig(
                embed_dim=16, num_layers=2, num_heads=2, mlp_dim=32, max_length=512
            ),
            cache=cache,
            steps=2,
            batch_size=8,
            optimizer=AdamW(WarmupCosine(5e-3, warmup_steps=1)),
            schedule=schedules.NoDistillation(),
            loss=losses.LossConfig(),
            arm="slm",
            checkpoints=CheckpointConfig(save_every=1, keep_last=2),
            evaluate_every=2,
            compilation_cache="",
        ),
    )


def _write_soft_labels(folder: pathlib.Path, cache: PackedCache) -> None:
    k, length = 3, cache.sequence_length
    writer = SoftLabelsWriter(
        folder,
        cache_digest=cache.digest,
        split="train",
        rows=ROWS,
        row_ids=None,
        selection_digest=None,
        teacher={"path": "slm", "step": 2, "digest": "t" * 64},
        temperature=0.25,
        form=LabelFormat(length, cache.vocabulary_size, k),
        shard_rows=ROWS,
    )
    writer.begin()
    for shard in writer.unfinished():
        log_q = np.full((ROWS, length, k), -1.5, np.float16)
        ids = np.broadcast_to(np.arange(k, dtype=np.int32), log_q.shape)
        writer.write(shard, [Labels(ids, log_q, log_q[..., 0], -log_q[..., 0])])
    writer.complete({"flops": 1.0, "tokens": 1})


def _write_huggingface(folder: pathlib.Path) -> None:
    """A downloaded model: Llama's family, zeros for weights."""
    folder.mkdir()
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    settings: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    family, config = config_from_json(settings, settings["vocab_size"], "config.json")
    shapes = list(tensor_shapes(config, family.rules(config)))
    tensors = [TensorInfo(name, "float32", shape) for name, shape in shapes]
    write_shards(folder, tensors, (np.zeros(shape, np.float32) for _, shape in shapes), 10**9)
