"""The bytes that a compiled program reads from and writes to a device's main memory.

Every instruction outside fusions reads its operands and writes its result once. This is what XLA's
cost analysis counts, but with the trip counts of loops, and without arrays in a TPU's on-chip
memory (S(1) in the layout). Only the needed part of an operand is read: a slice of it, or what a
fusion's result depends on. An update in place writes the new part, not the whole array; that
matters in loops, which carry whole stacks of parameters.
"""

import collections
import dataclasses
from collections.abc import Sequence

from salt_jax.planning import hlo

# Opcodes that move nothing: views, control flow, and the done of a counted start.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "after-all", "partition-id", "replica-id", "opt-barrier", *hlo.ASYNC_CALLS),
}
_FREE_CALLS = ("AllocateBuffer", "AssumeGather", "AsyncCollective", "ConcatBitcast")
_SLICES = {"dynamic-slice", "slice", "gather", "slice-start"}
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # the operand that they put
# In a fusion, each element of their result depends on one of an operand's, or on none.
_ELEMENTWISE = {
    *("abs", "add", "and", "atan2", "cbrt", "ceil", "clamp", "compare", "convert", "cosine"),
    *("count-leading-zeros", "divide", "erf", "exponential", "exponential-minus-one", "floor"),
    *("is-finite", "log", "log-plus-one", "logistic", "maximum", "minimum", "multiply", "negate"),
    *("not", "or", "popcnt", "power", "real", "reduce-precision", "remainder", "round-nearest-afz"),
    *("round-nearest-even", "rsqrt", "select", "shift-left", "shift-right-arithmetic"),
    *("shift-right-logical", "sign", "sine", "sqrt", "stochastic-convert", "subtract", "tan"),
    *("tanh", "xor", "bitcast", "bitcast-convert", "broadcast", "concatenate", "copy", "pad"),
    *("reshape", "reverse", "transpose", "get-tuple-element", "optimization-barrier"),
}


def memory_bytes(module: hlo.Module) -> float:
    """Bytes of main memory read and written by one run of the program on one device."""
    return sum(
        execution.times * moved(module, execution.computation, execution.instruction)
        for execution in hlo.executions(module)
        if not execution.in_fusion
    )


def moved(module: hlo.Module, computation: hlo.Computation, instruction: hlo.Instruction) -> float:
    """Bytes that an instruction outside fusions reads and writes each time."""
    opcode, operands = instruction.opcode, computation.operands(instruction)
    if opcode in _FREE or opcode.endswith(("-done", "-update")) or _is_free_call(instruction):
        return 0.0
    if opcode == "fusion":
        return _moved_by_fusion(module, instruction, operands)
    results = _results(instruction, operands)
    if opcode in _UPDATES:
        put = operands[_UPDATES[opcode]]
        return _in_memory(put.shapes) + _put(instruction, put, results[0])
    if opcode in _SLICES:
        read = sum(shape.bytes for shape in results) if _in_memory(operands[0].shapes) else 0.0
    else:
        read = sum(_in_memory(operand.shapes) for operand in operands)
    return read + _in_memory(results)


def _results(
    instruction: hlo.Instruction, operands: Sequence[hlo.Instruction]
) -> tuple[hlo.Shape, ...]:
    """The arrays that an instruction writes; the tuple of a start often has its operands, too."""
    shapes, count = instruction.shapes, len(operands)
    if instruction.opcode == "copy-start":
        return shapes[:1]
    if instruction.opcode.endswith("-start") and len(shapes) >= 2 * count:
        return shapes[count : 2 * count]
    return shapes


def _moved_by_fusion(
    module: hlo.Module, fusion: hlo.Instruction, operands: Sequence[hlo.Instruction]
) -> float:
    """Bytes that a fusion reads of its operands and writes of its results."""
    inside: dict[str, hlo.Instruction] = {}
    outputs = _inline(module, module.fused(fusion), None, "", inside)
    needed: dict[str, float] = collections.defaultdict(float)  # the share of each one's elements
    if len(outputs) != len(fusion.shapes):
        outputs *= len(fusion.shapes)
    total = 0.0
    for name, shape in zip(outputs, fusion.shapes, strict=True):
        output = _origin(inside, name)
        base = _origin(inside, output.operands[0]) if output.opcode in _UPDATES else None
        if output.opcode == "parameter" or _is_under_way(inside, output, shape):
            continue  # passed through
        if base is not None and base.opcode == "parameter":
            put = inside[output.operands[_UPDATES[output.opcode]]]
            total += _put(output, put, shape)
            needed.update(dict.fromkeys(output.operands[1:], 1.0))
        else:
            total += _in_memory((shape,))
            needed[output.name] = 1.0
    for instruction in reversed(inside.values()):
        if instruction.opcode == "parameter":
            operand = operands[int(instruction.arguments)]
            total += min(1.0, needed[instruction.name]) * _in_memory(operand.shapes)
        elif needed[instruction.name]:
            for place, name in enumerate(instruction.operands):
                share = min(1.0, needed[instruction.name])
                needed[name] += _share(instruction, place, inside[name], share)
    return total


def _share(
    instruction: hlo.Instruction, place: int, operand: hlo.Instruction, share: float
) -> float:
    """The share of an operand's elements needed for a share of an instruction's elements."""
    opcode = instruction.opcode
    if opcode == "reduce" or (opcode in _UPDATES and place == 0):
        return share
    if opcode in _ELEMENTWISE or (opcode in _SLICES and place == 0):
        elements = sum(shape.elements for shape in operand.shapes)
        return min(1.0, share * instruction.shapes[0].elements / max(1, elements))
    return 1.0


def _inline(
    module: hlo.Module,
    body: hlo.Computation,
    inputs: Sequence[str] | None,
    prefix: str,
    inside: dict[str, hlo.Instruction],
) -> list[str]:
    """Adds a fusion's instructions to `inside`, including nested fusions; returns output names.

    Args:
      module: The program.
      body: The fusion's computation.
      inputs: The names of its parameters in `inside`; None adds the parameters themselves.
      prefix: Prefix of the instructions' names.
      inside: Instructions by name, whose operands are other names in it.
    """
    names: dict[str, list[str]] = {}  # of each instruction's result, element by element
    for instruction in body.instructions:
        operands = [names[operand][0] for operand in instruction.operands if operand in names]
        if instruction.opcode == "parameter" and inputs is not None:
            found = [inputs[int(instruction.arguments)]]
        elif instruction.opcode == "fusion":
            within = f"{prefix}{instruction.name}/"
            found = _inline(module, module.fused(instruction), operands, within, inside)
        elif instruction.opcode == "tuple":
            found = operands
        elif instruction.index is not None and len(names[instruction.operands[0]]) > 1:
            found = [names[instruction.operands[0]][instruction.index]]
        else:
            found = [prefix + instruction.name]
            inside[found[0]] = dataclasses.replace(
                instruction, name=found[0], operands=tuple(operands)
            )
        names[instruction.name] = found
    return names[body.root.name]


def _origin(inside: dict[str, hlo.Instruction], name: str) -> hlo.Instruction:
    """The instruction at the start of a chain of bitcasts."""
    while inside[name].opcode == "bitcast":
        name = inside[name].operands[0]
    return inside[name]


def _is_under_way(
    inside: dict[str, hlo.Instruction], output: hlo.Instruction, shape: hlo.Shape
) -> bool:
    """Whether an output belongs to a transfer that began in another fusion, where it counts.

    A TPU splits a transfer over the fusions that it overlaps, from one with an AsyncCollectiveStart
    to one with an AsyncCollectiveDone; all of them pass on its operands and its result.
    """
    if output.opcode != "custom-call":
        return "chain_id=" in output.attributes
    if "AsyncCollectiveStart" not in output.attributes:
        return "AsyncCollectiveDone" in output.attributes
    results = [(s.dtype, s.dims) for name in output.operands for s in inside[name].shapes]
    return (shape.dtype, shape.dims) not in results


def _put(update: hlo.Instruction, put: hlo.Instruction, result: hlo.Shape) -> float:
    """Bytes that an update in place writes, and reads if it adds to the old values."""
    if result.memory_space:
        return 0.0
    return (2 if update.opcode == "scatter" else 1) * sum(shape.bytes for shape in put.shapes)


def _is_free_call(instruction: hlo.Instruction) -> bool:
    return instruction.opcode == "custom-call" and any(
        f'custom_call_target="{target}' in instruction.attributes for target in _FREE_CALLS
    )


def _in_memory(shapes: Sequence[hlo.Shape]) -> float:
    return sum(shape.bytes for shape in shapes if shape.memory_space == 0)
