"""What reads the packed cache must not bring TensorFlow, nor the vocabularies JAX."""

import subprocess
import sys

from salt_jax.data.packed_cache import PackedCache

READERS = [
    *("data.features", "data.packed_cache", "data.row_records", "data.row_scores"),
    *("data.row_text", "data.shard_columns", "data.text_lines", "data.vocabularies"),
    *("storage.manifests", "storage.restartable_shards"),
]


def _loaded_by(*modules: str) -> set[str]:
    code = "import sys\n" + "".join(f"import {module}\n" for module in modules)
    code += "print(*{name.partition('.')[0] for name in sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_data_imports_neither_tensorflow_nor_jax():
    loaded = _loaded_by(*(f"salt_jax.{name}" for name in READERS))
    assert not loaded & {"tensorflow", "seqio", "tensorflow_datasets", "jax", "gin"}


READING = """
import sys
from salt_jax.data.input_pipeline import InputPipeline, in_order
from salt_jax.data.row_order import RowOrder
from salt_jax.data.packed_cache import PackedCache

cache = PackedCache.open(sys.argv[1])
rows = cache.split("train")
pipeline = InputPipeline({"cache": rows}, 4, cache.start_id, RowOrder(None, len(rows), seed=0))
assert [batch["targets"].shape for batch in pipeline.batches(0, 3)] == [(4, 16)] * 3
assert len(list(in_order(cache.split("test"), 4, cache.start_id))) == 2
assert cache.vocabulary.decode(rows[0]["targets"])
print(*{name.partition(".")[0] for name in sys.modules})
"""


def test_reading_batches_brings_no_tensorflow(cache: PackedCache):
    command = [sys.executable, "-c", READING, str(cache.path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    loaded = set(result.stdout.split())
    assert "grain" in loaded
    assert not loaded & {"tensorflow", "seqio", "tensorflow_datasets"}


def test_what_describes_a_corpus_imports_no_tensorflow():
    names = ["cache_building", "own_text", "pile", "registered_task", "runners", "text_files"]
    loaded = _loaded_by(*(f"salt_jax.preparation.{name}" for name in names))
    assert not loaded & {"tensorflow", "seqio", "pyarrow", "zstandard"}


def test_the_pipeline_imports_no_tensorflow():
    assert not _loaded_by("salt_jax.data.input_pipeline") & {"tensorflow", "seqio", "gin"}
