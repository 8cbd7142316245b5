"""Compiled HLO text in; its computations, instructions and how often each one runs, out.

    module = hlo.parse(compiled.as_text())
    hlo.select(module, opcode="all-gather", in_loop=True)

XLA's own cost analysis counts a loop's body once, whatever its trip count; this counts it as often
as it runs. `lax.scan` and `lax.fori_loop` become `while` instructions, whose trip count XLA notes
(`known_trip_count`) or which follows from the condition: a counter that starts at 0, steps by 1 and
is compared with a constant.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_BITS: Mapping[str, int] = {
    **{"pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16},
    **{"s32": 32, "u32": 32, "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64},
    **{"c64": 64, "c128": 128, "token": 0, "opaque": 0},
}
_SHAPE = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_CALLED = re.compile(
    r"(calls|to_apply|body|condition|true_computation|false_computation|branch_computations|"
    r"called_computations)=(\{[^}]*\}|%[\w.\-]+)"
)


class Shape(NamedTuple):
    """An array of an instruction's result.

    Attributes:
      dtype: XLA's name for it, "bf16".
      dims: Sizes on one device.
      memory_space: 0 is the device's main memory; a TPU's VMEM is 1, its SMEM 4.
    """

    dtype: str
    dims: tuple[int, ...]
    memory_space: int = 0

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Their size, without what a layout pads."""
        bits = _BITS.get(self.dtype)
        if bits is None:  # f8e4m3fn and its kin name their width first
            bits = int(match[1]) if (match := re.match(r"[a-z]+(\d+)", self.dtype)) else 8
        return self.elements * bits / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: Unique in its computation.
      opcode: "fusion", "all-gather".
      shapes: The result's arrays; several for a tuple, flattened.
      operands: Names of instructions of the same computation.
      called: Names of the computations it calls, by role: calls, to_apply, body, condition, ….
      arguments: The text between the parentheses, such as a constant's value.
      attributes: The text after them.
      is_root: Whether its result is the computation's.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    called: Mapping[str, tuple[str, ...]]
    arguments: str
    attributes: str
    is_root: bool

    @property
    def op_name(self) -> str:
        """The JAX function it came from, as XLA's metadata has it; empty where there is none."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @property
    def bytes(self) -> float:
        """The size of its result."""
        return sum(shape.bytes for shape in self.shapes)


@dataclasses.dataclass(frozen=True)
class Computation:
    """A list of instructions, in the order they run where the module is scheduled."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> Mapping[str, Instruction]:
        """Its instructions by name."""
        return {instruction.name: instruction for instruction in self.instructions}

    @property
    def root(self) -> Instruction:
        """The instruction whose result is the computation's."""
        return next((i for i in self.instructions if i.is_root), self.instructions[-1])

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """The instructions that an instruction of this computation reads."""
        return [self.by_name[name] for name in instruction.operands if name in self.by_name]


@dataclasses.dataclass(frozen=True)
class Module:
    """A program for one device of `num_partitions`.

    Attributes:
      entry: The name of the computation it starts with.
      computations: All of them by name.
      num_partitions: Devices that run it together.
    """

    entry: str
    computations: Mapping[str, Computation]
    num_partitions: int


class Execution(NamedTuple):
    """An instruction and how often one run of the program runs it.

    Attributes:
      instruction: The instruction.
      computation: Where it stands.
      times: Runs of it in one run of the program.
      depth: Loops around it.
      caller: The computation, of those that are no fusion's, that it runs in.
      in_fusion: Whether it is part of a fusion, and so writes no buffer of its own.
      in_async: Whether an asynchronous start called the computation it stands in.
    """

    instruction: Instruction
    computation: Computation
    times: int
    depth: int
    caller: str
    in_fusion: bool
    in_async: bool


def parse(text: str) -> Module:
    """Reads what `jax.stages.Compiled.as_text()` gives.

    Raises:
      ValueError: The text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry = name = ""
    instructions: list[Instruction] | None = None
    for line in text.splitlines():
        if instructions is None:
            if header := _HEADER.match(line):
                name, instructions = header[2], []
                entry = name if header[1] else entry
        elif line.startswith("}"):
            computations[name] = Computation(name, tuple(instructions))
            instructions = None
        elif match := _NAME.match(line):
            instructions.append(_instruction(line, match))
    if not entry:
        raise ValueError("The text is no compiled HLO module: it has no ENTRY computation.")
    partitions = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
    return Module(entry, computations, int(partitions[1]) if partitions else 1)


def executions(module: Module) -> Iterator[Execution]:
    """Every instruction that a run of the program runs, with how often.

    Both branches of a conditional count, and the scalar functions of reductions, sorts and scatters
    don't. The body of a loop whose trip count nothing tells counts once.
    """
    yield from _walk(module, _Place(module.entry, 1, 0, module.entry, False, False))


def select(
    module: Module,
    *,
    opcode: str | None = None,
    dims: tuple[int, ...] | None = None,
    in_loop: bool | None = None,
    in_fusion: bool | None = None,
) -> list[Execution]:
    """The executions that fit all that is given.

    Args:
      module: The program.
      opcode: "all-gather" is also its asynchronous start, which a "-done" follows.
      dims: The sizes of one of its result's arrays.
      in_loop: Whether a loop is around it.
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


def trip_count(module: Module, loop: Instruction) -> int | None:
    """How often a `while` runs its body; None where neither XLA nor the condition tells."""
    noted = re.search(r'"?known_trip_count"?:\{"n":"(\d+)"\}', loop.attributes)
    if noted:
        return int(noted[1])
    condition = module.computations[loop.called["condition"][0]]
    constants = {
        int(i.arguments)
        for i in condition.instructions
        if i.opcode == "constant" and re.fullmatch(r"\d+", i.arguments)
    }
    directions = set(re.findall(r"direction=(\w+)", _text_of(module, condition)))
    return constants.pop() if len(constants) == 1 and directions == {"LT"} else None


class _Place(NamedTuple):
    """A computation and how it came to run; the fields are Execution's."""

    name: str
    times: int
    depth: int
    caller: str
    in_fusion: bool
    in_async: bool


def _walk(module: Module, place: _Place) -> Iterator[Execution]:
    computation = module.computations[place.name]
    for instruction in computation.instructions:
        yield Execution(instruction, computation, *place[1:])
        for called in _called(module, instruction, place):
            yield from _walk(module, called)


def _called(module: Module, instruction: Instruction, place: _Place) -> Iterator[_Place]:
    """The computations that an instruction runs."""
    opcode = instruction.opcode
    if opcode == "while":
        trips = trip_count(module, instruction)
        times = place.times * (1 if trips is None else trips)
        for role, more in (("body", 0), ("condition", place.times)):
            name = instruction.called[role][0]
            yield place._replace(
                name=name, times=times + more, depth=place.depth + 1, caller=name, in_async=False
            )
        return
    if opcode.endswith(("-done", "-update")):  # their -start has called it
        return
    in_fusion = place.in_fusion or opcode == "fusion"
    for role, names in instruction.called.items():
        if role == "to_apply" and opcode != "call":
            continue
        for name in names:
            yield place._replace(
                name=name,
                caller=place.caller if in_fusion else name,
                in_fusion=in_fusion,
                in_async=opcode == "async-start",
            )


def _instruction(line: str, match: re.Match[str]) -> Instruction:
    rest = line[match.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode = _OPCODE.match(rest, end)
    if opcode is None:
        raise ValueError(f"The line {line[:200]!r} of the HLO text has no opcode.")
    close = _closing(rest, opcode.end() - 1)
    arguments, attributes = rest[opcode.end() : close], rest[close + 1 :]
    called = {
        role: tuple(re.findall(r"%([\w.\-]+)", names))
        for role, names in _CALLED.findall(attributes)
    }
    return Instruction(
        name=match[2],
        opcode=opcode[1],
        shapes=tuple(_shape(*found) for found in _SHAPE.findall(rest[:end])),
        operands=tuple(re.findall(r"%([\w.\-]+)", arguments)),
        called=called,
        arguments=arguments,
        attributes=attributes,
        is_root=bool(match[1]),
    )


def _shape(dtype: str, dims: str, layout: str) -> Shape:
    space = re.search(r"S\((\d+)\)", layout)
    sizes = tuple(int(size) for size in re.findall(r"\d+", dims))
    return Shape(dtype, sizes, int(space[1]) if space else 0)


def _closing(text: str, start: int) -> int:
    """The place of the parenthesis that closes the one at `start`; quoted text counts as text."""
    depth, quoted = 0, False
    for i in range(start, len(text)):
        character = text[i]
        if character == '"' and text[i - 1] != "\\":
            quoted = not quoted
        elif not quoted:
            depth += (character == "(") - (character == ")")
            if depth == 0:
                return i
    raise ValueError(f"The HLO text {text[:200]!r} has a parenthesis that nothing closes.")


def _text_of(module: Module, computation: Computation) -> str:
    """The attributes of a computation and of the fusions in it."""
    texts = [i.attributes for i in computation.instructions]
    for instruction in computation.instructions:
        for name in instruction.called.get("calls", ()):
            texts += [i.attributes for i in module.computations[name].instructions]
    return "\n".join(texts)
