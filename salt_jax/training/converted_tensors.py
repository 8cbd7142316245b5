"""Import and export of a model's tensors, one at a time, by the rules of its family.

Values that are not finite, or overflow the target dtype, are refused.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from salt_jax.huggingface.gguf_files import TensorFiles
from salt_jax.huggingface.safetensors_files import DTYPES
from salt_jax.huggingface.tensors import (
    Path,
    Rule,
    leaf_shapes,
    require_representable,
    tensor_shapes,
)
from salt_jax.models.decoder_config import DecoderConfig
from salt_jax.training.checkpoints import SavedModel
from salt_jax.training.converted_checkpoints import StreamedParameter, open_parameters


def inspected_digest(files: TensorFiles, config: DecoderConfig, rules: list[Rule]) -> str:
    """Reads and checks a model's files, and returns their digest.

    Raises:
      InputError: A tensor has values that are not finite, or that the dtype can't hold.
    """
    names = {name for name, _ in tensor_shapes(config, rules)}
    dtype, where = DTYPES[config.param_dtype], str(files.path)

    def look(name: str, values: np.ndarray[Any, Any]) -> None:
        if name in names:
            require_representable(values, dtype, name, where)

    return files.inspect(look)


@dataclasses.dataclass(frozen=True)
class _Parameter:
    """A parameter read from a model's files, each layer's part from that layer's tensor."""

    files: TensorFiles
    rule: Rule
    leaf: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def read(self, rows: slice = slice(None)) -> np.ndarray[Any, Any]:
        start, stop, _ = rows.indices(self.shape[0])
        if not self.rule.in_layers:
            rows_shape = (stop - start, *self.shape[1:])
            tensor = self.files.read(self.rule.tensor, rows)
            return self.rule.to_leaf(tensor, self.leaf, rows_shape, self.dtype)
        layers = [
            self.rule.to_leaf(
                self.files.read(self.rule.tensor.format(layer=layer)),
                self.leaf,
                self.shape[1:],
                self.dtype,
            )
            for layer in range(start, stop)
        ]
        return layers[0][None] if len(layers) == 1 else np.stack(layers)


def parameters_of(
    files: TensorFiles, config: DecoderConfig, rules: list[Rule]
) -> dict[Path, StreamedParameter]:
    """Every parameter by its path in the tree, read from the files on demand."""
    parameters: dict[Path, StreamedParameter] = {}
    shapes, dtype = leaf_shapes(config), DTYPES[config.param_dtype]
    for rule in rules:
        for leaf in rule.leaves:
            path = ("layers", *leaf) if rule.in_layers else leaf
            parameters[path] = _Parameter(files, rule, leaf, shapes[path], dtype)
    return parameters


def tensors_of(
    saved: SavedModel, rules: list[Rule], dtype: np.dtype[Any], rows: int
) -> Iterator[np.ndarray[Any, Any]]:
    """Yields the tensors in the order of `tensor_shapes`; embedding and head have `rows` rows.

    Raises:
      InputError: A tensor has values that are not finite, or that the dtype can't hold.
    """
    config, where = saved.config, f"{saved.path} (step {saved.step})"
    # Each parameter is popped when it is used, which frees the chunks that it has read.
    parameters = open_parameters(saved.run_path, saved.step, leaf_shapes(config))
    for rule in rules:
        if not rule.in_layers:
            parameter = parameters.pop(rule.leaves[0])
            is_table = rule.tensor in tables_of(rules)
            values = parameter.read(slice(rows) if is_table else slice(None))
            require_representable(values, dtype, rule.tensor, where)
            yield rule.to_tensor([values], dtype)
            continue
        stacked = [parameters.pop(("layers", *leaf)) for leaf in rule.leaves if config.scan_layers]
        for layer in range(config.num_layers):
            leaves = [leaf.read(slice(layer, layer + 1))[0] for leaf in stacked] or [
                parameters.pop((f"layers_{layer}", *leaf)).read() for leaf in rule.leaves
            ]
            for values in leaves:
                require_representable(values, dtype, rule.tensor.format(layer=layer), where)
            yield rule.to_tensor(leaves, dtype)


def tables_of(rules: list[Rule]) -> list[str]:
    """The names of the tensors with a row for each id: the embedding, then the head."""
    return [rule.tensor for rule in rules if rule.leaves[0] in (("embedding",), ("head",))]
