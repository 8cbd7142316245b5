"""The largest arrays of a compiled program, where to look first if memory is short.

The program's text doesn't say which of them are live at the same time.
"""

from typing import NamedTuple

from salt_jax.planning import hlo

# Opcodes that allocate no array.
_NAMES = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "opt-barrier", "dynamic-update-slice", "custom-call-done"),
}


class Buffer(NamedTuple):
    """An array in a device's main memory.

    Attributes:
      dtype: XLA's name for it.
      dims: Sizes on one device.
      bytes: Its size, without the layout's padding.
      op_name: The JAX function that it comes from; empty if XLA doesn't say.
    """

    dtype: str
    dims: tuple[int, ...]
    bytes: float
    op_name: str


def largest(module: hlo.Module, count: int) -> list[Buffer]:
    """The `count` largest arrays, one of each shape and dtype, the largest first."""
    found: dict[tuple[str, tuple[int, ...]], Buffer] = {}
    for execution in hlo.executions(module):
        instruction = execution.instruction
        if execution.in_fusion or instruction.opcode in _NAMES:
            continue
        if instruction.opcode.endswith(("-done", "-update")):
            continue
        for shape in instruction.shapes:
            known = found.get((shape.dtype, shape.dims))
            if shape.memory_space == 0 and (known is None or not known.op_name):
                buffer = Buffer(shape.dtype, shape.dims, shape.bytes, instruction.op_name)
                found[shape.dtype, shape.dims] = buffer
    return sorted(found.values(), key=lambda buffer: -buffer.bytes)[:count]
