"""A parser of compiled programs: from HLO text to computations and instructions.

Text that it does not know raises `UnreadableError`, so that no figure is based on half a program.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

_SHAPE = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_END = re.compile(r'^\}(, execution_thread="\w+")?$')
_NAME = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_REFERENCE = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"(calls|to_apply|body|condition|true_computation|false_computation|branch_computations|"
    r"called_computations)=(\{[^}]*\}|%[\w.\-]+)"
)


class UnreadableError(ValueError):
    """The text of a program can't be parsed."""


class Shape(NamedTuple):
    """An array of an instruction's result.

    Attributes:
      dtype: XLA's name for it, such as "bf16".
      dims: Sizes on one device.
      memory_space: 0 is the device's main memory; on a TPU VMEM is 1 and SMEM 4.
    """

    dtype: str
    dims: tuple[int, ...]
    memory_space: int = 0

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """The size, without the padding of a layout."""
        if self.dtype in ("token", "opaque"):
            return 0.0
        bits = re.match(r"[a-z]+(\d+)", "pred8" if self.dtype == "pred" else self.dtype)
        if bits is None:
            raise UnreadableError(f"An array has the unknown element type {self.dtype!r}.")
        return self.elements * int(bits[1]) / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a computation.

    Attributes:
      name: Its name, unique in its computation.
      opcode: "fusion" or "all-gather", for example.
      shapes: The result's arrays; a tuple is flattened.
      operands: Names of instructions of the same computation.
      called: Names of the computations that it calls, by role: calls, to_apply, body, condition, ….
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
        """The JAX function it came from, by XLA's metadata; empty where there is none."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @property
    def index(self) -> int | None:
        """Which element of a tuple a get-tuple-element takes."""
        match = re.match(r", index=(\d+)", self.attributes)
        return int(match[1]) if match else None

    @property
    def bytes(self) -> float:
        """The size of its result."""
        return sum(shape.bytes for shape in self.shapes)


@dataclasses.dataclass(frozen=True)
class Computation:
    """A list of instructions, each after those whose results it uses."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> Mapping[str, Instruction]:
        """Its instructions by name."""
        return {instruction.name: instruction for instruction in self.instructions}

    @functools.cached_property
    def root(self) -> Instruction:
        """The instruction whose result is the computation's."""
        return next((i for i in self.instructions if i.is_root), self.instructions[-1])

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """The operands of an instruction of this computation."""
        return [self.by_name[name] for name in instruction.operands if name in self.by_name]


@dataclasses.dataclass(frozen=True)
class Module:
    """A program for one of `num_partitions` devices.

    Attributes:
      entry: The name of the computation it starts with.
      computations: All computations by name.
      num_partitions: Devices that run it together.
    """

    entry: str
    computations: Mapping[str, Computation]
    num_partitions: int

    def fused(self, fusion: Instruction) -> Computation:
        """The computation of a fusion."""
        return self.computations[fusion.called["calls"][0]]

    @functools.cached_property
    def loop_of(self) -> Mapping[str, tuple[Computation, Instruction]]:
        """The `while` of each loop's body and condition, and the computation that contains it."""
        return {
            name: (computation, instruction)
            for computation in self.computations.values()
            for instruction in computation.instructions
            if instruction.opcode == "while"
            for role in ("body", "condition")
            for name in instruction.called[role]
        }


def parse(text: str) -> Module:
    """Parses the text of `jax.stages.Compiled.as_text()`.

    Raises:
      UnreadableError: A line can't be parsed, or there is no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry = name = ""
    instructions: list[Instruction] | None = None
    lines = enumerate(text.splitlines(), 1)
    for number, line in lines:
        if header := _HEADER.match(line) if instructions is None else None:
            name, instructions = header[2], []
            entry = name if header[1] else entry
        elif instructions is None:
            if line and computations:  # they come after the module's own lines and tables
                raise UnreadableError(
                    f"Line {number} of the program is not understood: {line!r:.200}."
                )
        elif _END.match(line):
            computations[name] = Computation(name, tuple(instructions))
            instructions = None
        elif match := _NAME.match(line):
            while _is_open(line) and (more := next(lines, None)):
                line = f"{line}\n{more[1]}"
            instructions.append(_instruction(line, match, number))
        else:
            raise UnreadableError(f"Line {number} of the program is not understood: {line!r:.200}.")
    if not entry or instructions is not None:
        raise UnreadableError("The program is incomplete: its ENTRY computation is missing.")
    partitions = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
    return Module(entry, computations, int(partitions[1]) if partitions else 1)


def _is_open(text: str) -> bool:
    """Whether an instruction continues on the next line: a bracket or a quote is not closed."""
    bare = _QUOTED.sub("", text)
    return '"' in bare or sum(map(bare.count, "({[")) > sum(map(bare.count, ")}]"))


def _instruction(line: str, match: re.Match[str], number: int) -> Instruction:
    rest = line[match.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    opcode = _OPCODE.match(rest, max(end, 0))
    close = _closing(rest, opcode.end() - 1) if opcode else -1
    shapes = tuple(_shape(*found) for found in _SHAPE.findall(rest[:end]))
    if opcode is None or close < 0 or not (shapes or rest.startswith("()")):
        raise UnreadableError(f"Line {number} of the program is not understood: {line:.200}.")
    arguments, attributes = rest[opcode.end() : close], rest[close + 1 :]
    return Instruction(
        name=match[2],
        opcode=opcode[1],
        shapes=shapes,
        operands=tuple(_REFERENCE.findall(arguments)),
        called={
            role: tuple(_REFERENCE.findall(names)) for role, names in _CALLED.findall(attributes)
        },
        arguments=arguments,
        attributes=attributes,
        is_root=bool(match[1]),
    )


def _shape(dtype: str, dims: str, layout: str) -> Shape:
    space = re.search(r"S\((\d+)\)", layout)
    sizes = tuple(int(size) for size in re.findall(r"\d+", dims))
    return Shape(dtype, sizes, int(space[1]) if space else 0)


def _closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at `start`, ignoring quotes; -1 if none."""
    depth = 0
    for token in re.compile(r'[()]|"(?:[^"\\]|\\.)*"', re.DOTALL).finditer(text, start):
        depth += {"(": 1, ")": -1}.get(token[0], 0)
        if depth == 0:
            return token.start()
    return -1
