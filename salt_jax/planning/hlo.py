"""The instructions that a compiled program executes, with their execution counts.

    module = hlo.parse(compiled.as_text())
    hlo.select(module, opcode="all-gather", in_loop=True)

XLA's own cost analysis counts the body of a loop once; here it counts by the loop's trip count.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from salt_jax.planning.hlo_text import (
    Computation,
    Instruction,
    Module,
    Shape,
    UnreadableError,
    parse,
)

__all__ = [
    "ASYNC_CALLS",
    "Computation",
    "Execution",
    "Instruction",
    "Module",
    "Shape",
    "UnreadableError",
    "executions",
    "parse",
    "select",
    "trip_count",
]

_Place = tuple[int, int, str, bool, bool]  # the fields of Execution from `times` on
ASYNC_CALLS = {"async-start", "call-start"}  # the latter of a TPU's SparseCores
_COPIES = {"copy", "bitcast", "reshape", "convert", "copy-start", "copy-done"}


class Execution(NamedTuple):
    """An instruction and how often one run of the program executes it.

    Attributes:
      instruction: The instruction.
      computation: The computation that contains it.
      times: How often it is executed.
      depth: The number of loops around it.
      caller: The innermost computation around it that is not a fusion's.
      in_fusion: Whether it is part of a fusion, and so writes no buffer of its own.
      in_async: Whether its computation is called by an asynchronous start.
    """

    instruction: Instruction
    computation: Computation
    times: int
    depth: int
    caller: str
    in_fusion: bool
    in_async: bool


def executions(module: Module) -> Iterator[Execution]:
    """Every instruction that a run of the program executes, and how often.

    Both branches of a conditional count; the scalar functions of reductions, sorts and scatters
    don't.

    Raises:
      UnreadableError: The trip count of a loop is unknown.
    """
    yield from _walk(module, module.entry, (1, 0, module.entry, False, False))


def select(
    module: Module,
    *,
    opcode: str | None = None,
    dims: tuple[int, ...] | None = None,
    in_loop: bool | None = None,
    in_fusion: bool | None = None,
) -> list[Execution]:
    """The executions that match all given conditions.

    Args:
      module: The program.
      opcode: "all-gather" also matches its asynchronous start, but not its done.
      dims: The sizes of one of the result's arrays.
      in_loop: Whether it is in a loop.
      in_fusion: Whether it is part of a fusion.
    """
    return [
        execution
        for execution in executions(module)
        if opcode in (None, execution.instruction.opcode.removesuffix("-start"))
        and (dims is None or any(s.dims == dims for s in execution.instruction.shapes))
        and in_loop in (None, execution.depth > 0)
        and in_fusion in (None, execution.in_fusion)
    ]


def _walk(module: Module, name: str, place: _Place) -> Iterator[Execution]:
    computation = module.computations[name]
    for instruction in computation.instructions:
        yield Execution(instruction, computation, *place)
        for called, inner in _called(module, computation, instruction, place):
            yield from _walk(module, called, inner)


def _called(
    module: Module, computation: Computation, instruction: Instruction, place: _Place
) -> Iterator[tuple[str, _Place]]:
    """The computations that an instruction calls, and how."""
    opcode = instruction.opcode
    times, depth, caller, in_fusion, in_async = place
    if opcode == "while":
        (body,), (condition,) = instruction.called["body"], instruction.called["condition"]
        trips = times * trip_count(module, computation, instruction)
        yield body, (trips, depth + 1, body, in_fusion, in_async)
        yield condition, (trips + times, depth + 1, condition, in_fusion, in_async)
        return
    if opcode.endswith(("-done", "-update")):  # the -start has called it
        return
    in_fusion = in_fusion or opcode == "fusion"
    in_async = in_async or opcode in ASYNC_CALLS
    for role, names in instruction.called.items():
        if role != "to_apply" or opcode in ("call", "call-start"):
            for name in names:
                inside = caller if in_fusion else name
                yield name, (times, depth, inside, in_fusion, in_async)


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int:
    """How often a `while` of a computation runs its body.

    XLA notes it (`known_trip_count`), or it follows from a counter with constant start, increment
    and limit, as in `lax.scan` and `lax.fori_loop`.

    Raises:
      UnreadableError: Neither is the case.
    """
    if noted := re.search(r'"?known_trip_count"?:\{"n":"(\d+)"\}', loop.attributes):
        return int(noted[1])
    body, condition = (module.computations[loop.called[role][0]] for role in ("body", "condition"))
    compare, sides = _behind_fusion(module, condition, condition.root)
    if compare.opcode == "compare" and "direction=LT" in compare.attributes and len(sides) == 2:
        counter, limit = sides[0].index, _constant(module, condition, sides[1])
        if counter is not None and limit is not None:
            start = _constant(module, computation, _carried(computation, loop, counter))
            step = _step(module, body, counter)
            if start is not None and step:
                return max(0, math.ceil((limit - start) / step))
    raise UnreadableError(f"How often the loop {loop.name} of the program runs is not known.")


def _step(module: Module, body: Computation, index: int) -> int | None:
    """What a loop's body adds to an element of the carried tuple; None if not a constant."""
    add, terms = _behind_fusion(module, body, body.operands(body.root)[index])
    if add.opcode != "add":
        return None
    constants = [_constant(module, body, term) for term in terms]
    return next((value for value in constants if value is not None), None)


def _constant(
    module: Module, computation: Computation, instruction: Instruction | None
) -> int | None:
    """An instruction's integer value, through copies and values that loops carry unchanged."""
    if instruction is None:
        return None
    operands = computation.operands(instruction)
    if instruction.opcode == "constant":
        return int(instruction.arguments) if instruction.arguments.isdecimal() else None
    if instruction.opcode in _COPIES:
        return _constant(module, computation, operands[0])
    index = instruction.index
    if index is not None and operands[0].opcode == "tuple":
        return _constant(module, computation, computation.operands(operands[0])[index])
    if index is not None and operands[0].opcode == "parameter":
        return _invariant(module, computation.name, index)
    return None


def _invariant(module: Module, name: str, index: int) -> int | None:
    """An integer that a loop, given its body's or condition's name, carries unchanged, or None."""
    if name not in module.loop_of:
        return None
    outside, loop = module.loop_of[name]
    body = module.computations[loop.called["body"][0]]
    kept = body.operands(body.root)[index]
    if kept.opcode == "constant":
        return _constant(module, body, kept)
    if kept.index != index or body.operands(kept)[0].opcode != "parameter":
        return None
    return _constant(module, outside, _carried(outside, loop, index))


def _behind_fusion(
    module: Module, computation: Computation, instruction: Instruction
) -> tuple[Instruction, list[Instruction]]:
    """An instruction and its operands; for a fusion, its root and the fusion's operands."""
    operands = computation.operands(instruction)
    if instruction.opcode != "fusion":
        return instruction, operands
    body = module.fused(instruction)
    inner = body.operands(body.root)
    return body.root, [operands[int(o.arguments)] if o.opcode == "parameter" else o for o in inner]


def _carried(computation: Computation, loop: Instruction, index: int) -> Instruction | None:
    """An element of the tuple that a loop starts with."""
    (initial,) = computation.operands(loop)
    return computation.operands(initial)[index] if initial.opcode == "tuple" else None
