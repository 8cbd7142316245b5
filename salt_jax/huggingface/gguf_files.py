"""Reads a GGUF file, llama.cpp's format, as the files of a Hugging Face model.

The gguf library dequantizes the tensors, one at a time; here they get the names and the order of
rows that they have in `transformers`. config.json and the tokenizer's files are made of metadata.
"""

import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from salt_jax.errors import InputError, needed_libraries
from salt_jax.huggingface.families import llama
from salt_jax.huggingface.gguf_tokenizers import token_ids, tokenizer_of
from salt_jax.huggingface.model_folders import CONFIG_FILE
from salt_jax.huggingface.safetensors_files import DTYPES, Array, SafetensorsFolder, TensorInfo
from salt_jax.huggingface.tokenizer_files import SETTINGS_FILE, TOKENIZER_FILE

SUFFIX = ".gguf"

_ARCHITECTURE = "llama"  # also of Mistral, SmolLM and others
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_QUANTIZED = (
    *("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
)
# The fields of config.json by the metadata's keys. Other keys are kept under their own names, so
# that one that names another computation is refused as it is in a config.json.
_FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "kv_channels",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "rope.dimension_count": "rotary_dim",
}
_LAYER = re.compile(r"blk\.(\d+)\.")


class GGUFFile:
    """The tensors of a GGUF file by their names in `transformers`, read lazily.

    Attributes:
      path: The file.
      tensors: All tensors by name; quantized ones are read as float32.
      quantized: The names of the quantized types in the file.
    """

    def __init__(self, path: pathlib.Path):
        """Reads the metadata; InputError if the file is damaged, not a Llama, or of other types."""
        with needed_libraries("A GGUF file", "gguf"):
            import gguf
        self.path = path
        try:
            reader = gguf.GGUFReader(path)
            self._metadata = {name: field.contents() for name, field in reader.fields.items()}
            if reader.byte_order != "I":
                raise ValueError("its byte order is another machine's")
        except OSError as error:
            raise InputError(
                f"{path} cannot be read ({error.strerror}): correct --huggingface."
            ) from error
        except (ValueError, LookupError, TypeError, OverflowError) as error:
            raise InputError(
                f"{path} is not a complete GGUF file, or is newer than the gguf library ({error}): "
                "download it again, or update the library."
            ) from error
        if (found := self._metadata.get("general.architecture")) != _ARCHITECTURE:
            raise InputError(
                f"{path} has the architecture {found!r}, expected {_ARCHITECTURE!r}: import the "
                "model that it was made of, a folder with config.json and safetensors."
            )
        types = {tensor.tensor_type.name for tensor in reader.tensors}
        for other in sorted(types - {*_FLOATS, *_QUANTIZED}):
            raise InputError(
                f"{path} has tensors of {other}, expected {', '.join((*_FLOATS, *_QUANTIZED))}: "
                "choose another quantization of the model."
            )
        self.quantized = sorted(types & {*_QUANTIZED})
        self._dequantize = gguf.dequantize
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
        modules = {names.get_name(module.format(layer=0)): module for module in llama.TENSORS}
        self._tensors = {_name(tensor.name, modules): tensor for tensor in reader.tensors}
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(
                name,
                _FLOATS.get(tensor.tensor_type.name, "float32"),
                tuple(map(int, reversed(tensor.shape))),
            )
            for name, tensor in self._tensors.items()
        }
        self._config = self._config_json()

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the file's bytes."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def inspect(self, look: Callable[[str, Array], None]) -> str:
        """Calls `look` with each tensor's name and its values, and returns the digest."""
        for name in self.tensors:
            look(name, self.read(name))
        return self.digest

    def read(self, name: str, rows: slice = slice(None)) -> Array:
        """A tensor's values, or a slice (without a step) of its first axis."""
        tensor, dtype = self._tensors[name], DTYPES[self.tensors[name].dtype]
        values = np.asarray(tensor.data[rows])
        if tensor.tensor_type.name in _QUANTIZED:
            values = self._dequantize(values, tensor.tensor_type)
        values = values.view(dtype)  # the library gives bfloat16 as bytes
        for module, field in (("q_proj", "attention"), ("k_proj", "key_value")):
            if f".{module}." in name:
                # llama.cpp rotates neighbours, transformers the two halves of a head.
                pairs = values.reshape(self._config[f"num_{field}_heads"], -1, 2, values.shape[1])
                values = pairs.swapaxes(1, 2).reshape(values.shape)
        return values

    def describe(self, folder: pathlib.Path) -> None:
        """Writes config.json and the tokenizer's files; InputError if the file has no tokenizer
        that salt_jax reads."""
        tokenizer, settings = tokenizer_of(self._metadata, str(self.path))
        for name, content in (
            (CONFIG_FILE, json.dumps(self._config).encode()),
            (TOKENIZER_FILE, tokenizer),
            (SETTINGS_FILE, json.dumps(settings, indent=2).encode()),
        ):
            (folder / name).write_bytes(content)

    def _config_json(self) -> dict[str, Any]:
        """The model's config.json."""
        config = {"model_type": _ARCHITECTURE, **token_ids(self._metadata)}
        for key, value in self._metadata.items():
            prefix, _, field = key.partition(".")
            if prefix == _ARCHITECTURE:
                # The shortest number that is the same in float32: 1e-05, not 9.999999747e-06.
                value = float(str(np.float32(value))) if isinstance(value, float) else value
                config[_FIELDS.get(field, field.replace(".", "_"))] = value
        config.setdefault("num_key_value_heads", config.get("num_attention_heads"))
        if embedding := self.tensors.get("model.embed_tokens.weight"):
            config["vocab_size"] = embedding.shape[0]
        return config | {"tie_word_embeddings": llama.FAMILY.head not in self.tensors}


TensorFiles = SafetensorsFolder | GGUFFile


def _name(name: str, modules: Mapping[str | None, str]) -> str:
    """A tensor's name in transformers, or its own if no module of layer 0 has one like it."""
    stem, _, kind = name.rpartition(".")
    layer = _LAYER.match(name)
    module = modules.get(_LAYER.sub("blk.0.", stem), "")
    return f"{module.format(layer=layer[1] if layer else '')}.{kind}" if module else name
