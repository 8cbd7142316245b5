"""Converts tensors of Hugging Face models to parameters of the decoder, and back.

Our kernels are [inputs…, outputs…], theirs [outputs, inputs] (but for GPT-2's). Fused tensors, such
as GPT-NeoX's query, key and value, are [H, 3, K, D] flattened to two axes; Phi 3's are one below
the other. Arrays in, arrays out: no files.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from salt_jax.errors import InputError
from salt_jax.models.decoder import abstract_params
from salt_jax.models.decoder_config import DecoderConfig

Path = tuple[str, ...]
Array = np.ndarray[Any, Any]

# Buffers that old versions of transformers saved: causal masks and rotary frequencies.
_BUFFERS = re.compile(
    r"\.(att(entio)?n\.(bias|masked_bias|rotary_emb\.inv_freq)|self_attn\.rotary_emb\.inv_freq)$"
)
_COMPARED = 1 << 16  # values checked at a time, which fit a CPU's cache


@dataclasses.dataclass(frozen=True)
class Rule:
    """The correspondence between a tensor and the parameters in it.

    Attributes:
        tensor: its name; "{layer}" stands for a layer's number.
        leaves: the paths of the parameters in it, in the tree or in their layer.
        inputs: how many leading axes of each parameter are contracted; 0 for all but kernels.
        offset: subtracted from the parameter.
        rows: of each parameter, if the tensor has them one below the other, not head by head.
        transposed: whether the tensor is [inputs, outputs].
    """

    tensor: str
    leaves: tuple[Path, ...]
    inputs: int = 0
    offset: float = 0.0
    rows: tuple[int, ...] = ()
    transposed: bool = False

    @property
    def in_layers(self) -> bool:
        """Whether each layer has such a tensor."""
        return "{layer}" in self.tensor

    def tensor_shape(self, leaf_shape: Sequence[int]) -> tuple[int, ...]:
        """The tensor's shape, given that of any of its parameters (of one layer)."""
        if not self.in_layers:
            return tuple(leaf_shape)
        inputs, outputs = leaf_shape[: self.inputs], leaf_shape[self.inputs :]
        rows = sum(self.rows) or len(self.leaves) * math.prod(outputs)
        shape = (rows, math.prod(inputs)) if inputs else (rows,)
        return shape[::-1] if self.transposed else shape

    def to_tensor(self, leaves: Sequence[Array], dtype: np.dtype[Any]) -> Array:
        """The tensor in `dtype`, from its parameters (of one layer)."""
        shape = self.tensor_shape(leaves[0].shape)[:: -1 if self.transposed else 1]
        if self.inputs:
            order = (*range(self.inputs, leaves[0].ndim), *range(self.inputs))
            leaves = [leaf.transpose(order) for leaf in leaves]
        if self.rows:
            leaves = [np.concatenate([leaf.reshape(-1, *shape[1:]) for leaf in leaves])]
        whole = leaves[0] if len(leaves) == 1 else np.stack(leaves, axis=1)
        if self.offset:
            whole = whole.astype(np.float32) - np.float32(self.offset)
        whole = whole.reshape(shape).astype(dtype, copy=False)
        return np.ascontiguousarray(whole.T) if self.transposed else whole

    def to_leaf(
        self, tensor: Array, leaf: Path, leaf_shape: Sequence[int], dtype: np.dtype[Any]
    ) -> Array:
        """One of the tensor's parameters (of one layer) in `dtype`."""
        which = self.leaves.index(leaf)
        tensor = tensor.T if self.transposed else tensor
        if self.rows:
            tensor = tensor[sum(self.rows[:which]) :][: self.rows[which]]
        elif len(self.leaves) > 1:
            heads = leaf_shape[self.inputs]
            by_head = tensor.reshape(heads, len(self.leaves), -1, *tensor.shape[1:])
            tensor = by_head[:, which]
        if self.inputs:
            tensor = tensor.reshape(-1, math.prod(leaf_shape[: self.inputs])).T
        if self.offset:
            tensor = tensor.astype(np.float32) + np.float32(self.offset)
        return tensor.astype(dtype, copy=False).reshape(leaf_shape)


def rules_of(
    config: DecoderConfig,
    tensors: Mapping[str, str],
    norm_offset: float = 0.0,
    transposed: bool = False,
) -> list[Rule]:
    """A rule for each tensor: MODULE.weight and, if the model has biases, MODULE.bias; see Family
    for the other arguments."""
    shapes = leaf_shapes(dataclasses.replace(config, scan_layers=True))
    rules = []
    for module, paths in tensors.items():
        stack = ("layers",) if "{layer}" in module else ()
        parts = [tuple(path.split("/")) for path in paths.replace("+", " ").split()]
        for kind in ((), ("kernel",), ("scale",), ("bias",)):
            leaves = tuple(part + kind for part in parts)
            if stack + leaves[0] in shapes:
                # The output projection contracts heads and head width.
                inputs = (2 if parts == [("attention", "out")] else 1) if "kernel" in kind else 0
                offset = norm_offset if "scale" in kind else 0.0
                tensor = f"{module}.{'bias' if 'bias' in kind else 'weight'}"
                rows: tuple[int, ...] = ()
                if "+" in paths:
                    each = [shapes[stack + leaf][len(stack) + inputs :] for leaf in leaves]
                    rows = tuple(math.prod(outputs) for outputs in each)
                turned = transposed and inputs > 0
                rules.append(Rule(tensor, leaves, inputs, offset, rows, turned))
    return rules


def rules_for_files(rules: list[Rule], names: Collection[str]) -> list[Rule]:
    """The rules for files that have these tensors: those of the class without a head, which the
    published GPT-2 is of, lack the first part of each name."""
    prefix = rules[0].tensor.partition(".")[0] + "."
    if rules[0].tensor.removeprefix(prefix) not in names:
        return rules
    return [dataclasses.replace(rule, tensor=rule.tensor.removeprefix(prefix)) for rule in rules]


def refuse_other_tensors(
    config: DecoderConfig,
    rules: Sequence[Rule],
    shapes: Mapping[str, tuple[int, ...]],
    head: str,
    where: str,
) -> None:
    """Refuses files in which a tensor is missing, has a wrong shape, or is unexpected.

    Args:
        config: the model.
        rules: its rules.
        shapes: the shape of every tensor in the files, by name.
        head: the head's tensor, of which a tied model may have a copy.
        where: the folder, for the error.
    """
    expected = dict(tensor_shapes(config, rules))
    for name, shape in expected.items():
        if name not in shapes and name == head:
            raise InputError(
                f"{where} has no tensor {name}, and its config.json doesn't say that the head is "
                "the embedding: set tie_word_embeddings to true there if it is, or download the "
                "folder again if a file is missing."
            )
        if name not in shapes:
            raise InputError(
                f"{where} has no tensor {name}, expected one of shape {list(shape)}: its "
                "config.json is another model's, or a file is missing; download the folder again."
            )
        if shapes[name] != shape:
            raise InputError(
                f"The tensor {name} of {where} has the shape {list(shapes[name])}, expected "
                f"{list(shape)} by its config.json: download the folder again."
            )
    for name in shapes.keys() - expected.keys():
        is_tied_head = config.tied_embeddings and name == head
        if not is_tied_head and not _BUFFERS.search(name):
            raise InputError(
                f"{where} has a tensor {name} of shape {list(shapes[name])}, which the model of "
                "its config.json doesn't have: salt_jax would leave it out; choose another model."
            )


def tensor_shapes(
    config: DecoderConfig, rules: Sequence[Rule]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor's name and shape, rule by rule."""
    shapes = leaf_shapes(dataclasses.replace(config, scan_layers=True))
    for rule in rules:
        if not rule.in_layers:
            yield rule.tensor, rule.tensor_shape(shapes[rule.leaves[0]])
            continue
        of_layers = shapes["layers", *rule.leaves[0]]
        for layer in range(config.num_layers):
            yield rule.tensor.format(layer=layer), rule.tensor_shape(of_layers[1:])


@functools.lru_cache
def leaf_shapes(config: DecoderConfig) -> Mapping[Path, tuple[int, ...]]:
    """The shape of every parameter by its path; scanned layers have a leading layer axis."""
    leaves = jax.tree_util.tree_leaves_with_path(nn.unbox(abstract_params(config)))
    return {tuple(key.key for key in path): leaf.shape for path, leaf in leaves}


def require_representable(values: Array, dtype: np.dtype[Any], tensor: str, where: str) -> None:
    """Refuses values (float32, bfloat16 or float16) that are NaN or infinite, or would be in
    `dtype`."""
    # Absolute values of floats order like their bits as integers, NaN above infinity; comparing
    # integers takes a tenth of the time for 16-bit types.
    bits = np.dtype(f"u{values.dtype.itemsize}")
    flat = values.reshape(-1).view(bits)
    mask = bits.type(np.iinfo(bits).max >> 1)
    parts = (flat[i : i + _COMPARED] & mask for i in range(0, flat.size, _COMPARED))
    largest: Any = bits.type(max((int(part.max()) for part in parts), default=0))
    largest = largest.view(values.dtype)
    if not np.isfinite(largest):
        raise InputError(
            f"The tensor {tensor} of {where} has values that are not finite ({largest}), and so "
            "the model computes none: take another step of it, or download it again."
        )
    with np.errstate(over="ignore"):
        cast = largest.astype(dtype)
    if not np.isfinite(cast):
        wider = "--dtype=bfloat16 or --dtype=float32" if dtype == np.float16 else "--dtype=float32"
        raise InputError(
            f"The tensor {tensor} of {where} has values that {dtype} can't hold, "
            f"{float(largest):.6g} for one: choose {wider}."
        )
