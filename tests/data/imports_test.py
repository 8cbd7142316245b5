"""What reads the packed cache must not bring TensorFlow, nor the vocabularies JAX."""

import subprocess
import sys

READERS = ["features", "manifests", "packed_cache", "row_records", "row_scores", "row_text"]


def _loaded_by(*modules: str) -> set[str]:
    code = "import sys\n" + "".join(f"import {module}\n" for module in modules)
    code += "print(*{name.partition('.')[0] for name in sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_data_imports_neither_tensorflow_nor_jax():
    loaded = _loaded_by(*(f"salt_jax.data.{name}" for name in [*READERS, "vocabularies"]))
    assert not loaded & {"tensorflow", "seqio", "tensorflow_datasets", "jax", "gin"}


def test_the_pipeline_imports_no_tensorflow():
    assert not _loaded_by("salt_jax.data.input_pipeline") & {"tensorflow", "seqio", "gin"}
