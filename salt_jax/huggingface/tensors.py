"""Where Hugging Face's models keep what our parameters are: names of tensors, and layouts.

In: a model's config and architecture. Out: a rule for each tensor of a layer, or of the model, by
which it is made from our parameters and they from it. Arrays in, arrays out; nothing is read here.

Our kernels are [inputs…, outputs…], theirs [outputs, inputs]. GPT-NeoX keeps query, key and value
in one tensor, [H, 3, K, D] flattened to two axes. Gemma keeps the scale of a norm less 1.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from salt_jax.errors import InputError
from salt_jax.models.decoder import abstract_params
from salt_jax.models.decoder_config import DecoderConfig

Path = tuple[str, ...]
Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a tensor and our parameters make one another.

    Attributes:
        tensor: its name; "{layer}" stands for a layer's number.
        leaves: the parameters in it, each by its path in the tree, or in its layer if there is one.
        inputs: how many leading axes of each parameter are summed over; 0 for all but kernels.
        less_one: whether the tensor is the parameter less 1.
    """

    tensor: str
    leaves: tuple[Path, ...]
    inputs: int = 0
    less_one: bool = False

    @property
    def in_layers(self) -> bool:
        """Whether each layer has one."""
        return "{layer}" in self.tensor

    def tensor_shape(self, leaf_shape: Sequence[int]) -> tuple[int, ...]:
        """The tensor's shape, from that of any of its parameters (of one layer)."""
        if not self.in_layers:
            return tuple(leaf_shape)
        if not self.inputs:
            return (len(self.leaves) * math.prod(leaf_shape),)
        inputs, outputs = leaf_shape[: self.inputs], leaf_shape[self.inputs :]
        return len(self.leaves) * math.prod(outputs), math.prod(inputs)

    def to_tensor(self, leaves: Sequence[Array], dtype: np.dtype[Any]) -> Array:
        """The tensor in `dtype`, from its parameters (of one layer)."""
        shape = self.tensor_shape(leaves[0].shape)
        parts = []
        for leaf in leaves:
            if self.inputs:
                order = (*range(self.inputs, leaf.ndim), *range(self.inputs))
                leaf = leaf.transpose(order)
            parts.append(leaf)
        whole = parts[0] if len(parts) == 1 else np.stack(parts, axis=1)
        if self.less_one:
            whole = whole.astype(np.float32) - 1
        return whole.reshape(shape).astype(dtype, copy=False)

    def to_leaf(
        self, tensor: Array, leaf: Path, leaf_shape: Sequence[int], dtype: np.dtype[Any]
    ) -> Array:
        """One of the tensor's parameters (of one layer) in `dtype`."""
        if len(self.leaves) > 1:
            heads = leaf_shape[self.inputs]
            by_head = tensor.reshape(heads, len(self.leaves), -1, *tensor.shape[1:])
            tensor = by_head[:, self.leaves.index(leaf)]
        if self.inputs:
            tensor = tensor.reshape(-1, math.prod(leaf_shape[: self.inputs])).T
        if self.less_one:
            tensor = tensor.astype(np.float32) + 1
        return tensor.astype(dtype, copy=False).reshape(leaf_shape)


def gpt_neox_rules(config: DecoderConfig) -> list[Rule]:
    """The tensors of GPT-NeoX and Pythia."""
    layer = "gpt_neox.layers.{layer}."
    rules = [Rule("gpt_neox.embed_in.weight", (("embedding",),))]
    for tensor, norm in (
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "mlp_norm"),
    ):
        rules += [Rule(f"{layer}{tensor}.weight", ((norm, "scale"),))]
        rules += [Rule(f"{layer}{tensor}.bias", ((norm, "bias"),))]
    fused = ("query", "key", "value")
    projections: list[tuple[str, str, tuple[str, ...], int]] = [
        ("attention.query_key_value", "attention", fused, 1),
        ("attention.dense", "attention", ("out",), 2),
        ("mlp.dense_h_to_4h", "mlp", ("up",), 1),
        ("mlp.dense_4h_to_h", "mlp", ("down",), 1),
    ]
    for tensor, part, names, inputs in projections:
        kernels = tuple((part, name, "kernel") for name in names)
        biases = tuple((part, name, "bias") for name in names)
        rules += [Rule(f"{layer}{tensor}.weight", kernels, inputs)]
        rules += [Rule(f"{layer}{tensor}.bias", biases)]
    rules += [Rule("gpt_neox.final_layer_norm.weight", (("final_norm", "scale"),))]
    rules += [Rule("gpt_neox.final_layer_norm.bias", (("final_norm", "bias"),))]
    if not config.tied_embeddings:
        rules += [Rule("embed_out.weight", (("head",),))]
    return rules


def llama_rules(config: DecoderConfig, less_one: bool = False) -> list[Rule]:
    """The tensors of Llama, and of Gemma, which keeps the scales of norms less 1."""
    layer = "model.layers.{layer}."
    rules = [Rule("model.embed_tokens.weight", (("embedding",),))]
    for tensor, norm in (
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "mlp_norm"),
    ):
        rules += [Rule(f"{layer}{tensor}.weight", ((norm, "scale"),), less_one=less_one)]
    for tensor, leaf, inputs in (
        ("self_attn.q_proj", ("attention", "query", "kernel"), 1),
        ("self_attn.k_proj", ("attention", "key", "kernel"), 1),
        ("self_attn.v_proj", ("attention", "value", "kernel"), 1),
        ("self_attn.o_proj", ("attention", "out", "kernel"), 2),
        ("mlp.gate_proj", ("mlp", "gate", "kernel"), 1),
        ("mlp.up_proj", ("mlp", "up", "kernel"), 1),
        ("mlp.down_proj", ("mlp", "down", "kernel"), 1),
    ):
        rules += [Rule(f"{layer}{tensor}.weight", (leaf,), inputs)]
    rules += [Rule("model.norm.weight", (("final_norm", "scale"),), less_one=less_one)]
    if not config.tied_embeddings:
        rules += [Rule("lm_head.weight", (("head",),))]
    return rules


# Tensors that hold no parameter: causal masks and rotary frequencies, which old versions of
# transformers saved, and the second name of a tied embedding.
_BUFFERS = re.compile(
    r"\.(attention\.(bias|masked_bias|rotary_emb\.inv_freq)|self_attn\.rotary_emb\.inv_freq)$"
)
HEADS = frozenset(("embed_out.weight", "lm_head.weight"))

_COMPARED = 1 << 16  # values that are looked at at once, which a processor's cache holds


def refuse_other_tensors(
    config: DecoderConfig, rules: Sequence[Rule], shapes: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Checks that a model's files hold its tensors and no others.

    Args:
        config: the model.
        rules: its tensors.
        shapes: the shape of every tensor there is, by name.
        where: the folder, for the error.

    Raises:
        InputError: A tensor is missing, has another shape, or is one too many.
    """
    expected = set()
    for name, shape in tensor_shapes(config, rules):
        expected.add(name)
        if name not in shapes and name in HEADS:
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
    for name in shapes.keys() - expected:
        is_tied_head = config.tied_embeddings and name in HEADS
        if not is_tied_head and not _BUFFERS.search(name):
            raise InputError(
                f"{where} has a tensor {name} of shape {list(shapes[name])}, which the model of "
                "its config.json doesn't: salt_jax would leave it out; take another model."
            )


def tensor_shapes(
    config: DecoderConfig, rules: Sequence[Rule]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor's name and shape; a rule's tensors of all layers follow one another."""
    shapes = leaf_shapes(dataclasses.replace(config, scan_layers=True))
    for rule in rules:
        if not rule.in_layers:
            yield rule.tensor, rule.tensor_shape(shapes[rule.leaves[0]])
            continue
        of_layers = shapes["layers", *rule.leaves[0]]
        for layer in range(config.num_layers):
            yield rule.tensor.format(layer=layer), rule.tensor_shape(of_layers[1:])


def leaf_shapes(config: DecoderConfig) -> dict[Path, tuple[int, ...]]:
    """The shape of every parameter by its path; those of scanned layers begin with the layers."""
    leaves = jax.tree_util.tree_leaves_with_path(nn.unbox(abstract_params(config)))
    return {tuple(key.key for key in path): leaf.shape for path, leaf in leaves}


def require_finite(values: Array, dtype: np.dtype[Any], tensor: str, where: str) -> None:
    """Refuses a tensor, or a part of it, with values that are no numbers in `dtype`.

    Args:
        values: the values; of float32, bfloat16 or float16.
        dtype: what they are to be cast to.
        tensor: its name, for the error.
        where: the model it is of, for the error.

    Raises:
        InputError: A value is NaN or infinite, or will be.
    """
    largest = _largest_magnitude(values)
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


def _largest_magnitude(values: Array) -> Any:
    """The largest value but for its sign, in the dtype of `values`; NaN where there is one."""
    # Floats without their sign are ordered as whole numbers with the same bits are, NaN above the
    # infinities. Compared as such, numbers of 16 bits take a tenth of the time.
    bits = np.dtype(f"u{values.dtype.itemsize}")
    flat = values.reshape(-1).view(bits)
    mask = bits.type(np.iinfo(bits).max >> 1)
    parts = (flat[i : i + _COMPARED] & mask for i in range(0, flat.size, _COMPARED))
    largest = max((int(part.max()) for part in parts), default=0)
    return bits.type(largest).view(values.dtype)
