"""A compiled program in; the bytes that a device reads from and writes to its main memory, out.

Every instruction outside fusions reads its operands and writes its result once: what XLA's cost
analysis counts, but with the trip counts of loops, and without what lies in a TPU's on-chip memory
(S(1) in its layout). A slice reads what it takes and an update writes what it puts, in place, not
the whole array; that matters in loops, which carry whole stacks of parameters.
"""

from salt_jax.planning import hlo

# They move nothing: names for what is there, control, and the ends of what a start has counted.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "after-all", "partition-id", "replica-id", "iota", "opt-barrier", "async-start"),
}
_SLICES = {"dynamic-slice", "slice", "gather", "slice-start"}
_UPDATES = {"dynamic-update-slice", "scatter"}


def memory_bytes(module: hlo.Module) -> float:
    """Bytes of main memory read and written by one run of the program on one device."""
    return sum(
        execution.times * _moved(module, execution)
        for execution in hlo.executions(module)
        if not execution.in_fusion
        and execution.instruction.opcode not in _FREE
        and not execution.instruction.opcode.endswith(("-done", "-update"))
    )


def _moved(module: hlo.Module, execution: hlo.Execution) -> float:
    instruction, computation = execution.instruction, execution.computation
    operands = computation.operands(instruction)
    if instruction.opcode == "fusion":
        return _moved_by_fusion(module, instruction, operands)
    if instruction.opcode in _SLICES:
        sliced = instruction.shapes[-2:-1] if instruction.opcode == "slice-start" else None
        return 2 * _in_memory(sliced or instruction.shapes)
    if instruction.opcode in _UPDATES:
        return 2 * _in_memory(operands[_update_operand(instruction)].shapes)
    if instruction.opcode == "copy-start":
        return sum(_in_memory((shape,)) for shape in instruction.shapes[:2])
    read = sum(_in_memory(operand.shapes) for operand in operands)
    if instruction.opcode.endswith("-start"):  # its result names the operands too
        return 2 * read
    return read + _in_memory(instruction.shapes)


def _moved_by_fusion(
    module: hlo.Module, fusion: hlo.Instruction, operands: list[hlo.Instruction]
) -> float:
    body = module.computations[fusion.called["calls"][0]]
    parameters = {int(i.arguments): i for i in body.instructions if i.opcode == "parameter"}
    total = 0.0
    for index, operand in enumerate(operands):
        whole = _in_memory(operand.shapes)
        if whole and index in parameters:
            total += min(whole, _read_of(body, parameters[index], whole))
    roots = body.operands(body.root) if body.root.opcode == "tuple" else [body.root]
    outputs = fusion.shapes
    if len(roots) != len(outputs):
        return total + _in_memory(outputs)
    return total + sum(
        min(_in_memory((shape,)), _written_by(body, root))
        for root, shape in zip(roots, outputs, strict=True)
    )


def _read_of(body: hlo.Computation, parameter: hlo.Instruction, whole: float) -> float:
    """Bytes that a fusion reads of one of its parameters, of `whole` bytes."""
    total = 0.0
    for user in body.instructions:
        if parameter.name not in user.operands or user.opcode == "tuple":
            continue
        if user.opcode in ("bitcast", "reshape"):
            total += _read_of(body, user, whole)
        elif user.opcode in _SLICES and user.operands[0] == parameter.name:
            total += user.bytes
        elif not (user.opcode in _UPDATES and user.operands[0] == parameter.name):
            total += whole
    return total


def _written_by(body: hlo.Computation, root: hlo.Instruction) -> float:
    """Bytes that one result of a fusion takes to write."""
    while root.opcode == "bitcast" and body.operands(root):
        root = body.operands(root)[0]
    if root.opcode == "parameter":  # handed on, as a TPU does with transfers under way
        return 0.0
    if root.opcode in _UPDATES:
        return body.operands(root)[_update_operand(root)].bytes
    return root.bytes


def _update_operand(instruction: hlo.Instruction) -> int:
    return 1 if instruction.opcode == "dynamic-update-slice" else len(instruction.operands) - 1


def _in_memory(shapes: tuple[hlo.Shape, ...]) -> float:
    return sum(shape.bytes for shape in shapes if shape.memory_space == 0)
