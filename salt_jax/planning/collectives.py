"""The bytes that each device sends to others in one step of a compiled program.

They are counted as in ring algorithms, which send the least (n devices in a group, S bytes of
operands on each):

    all-gather           S · (n - 1)          each device passes on all parts but one
    reduce-scatter       S · (n - 1) / n
    all-reduce           2 · S · (n - 1) / n  a reduce-scatter, then an all-gather
    all-to-all           S · (n - 1) / n
    collective-permute   S

A transfer that overlaps other work appears as a start and a done, or on TPUs as parts that are
fused into that work; it counts once.
"""

import dataclasses
import math
import re

from salt_jax.planning import hlo

KINDS = (
    *("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """A transfer between devices.

    Attributes:
      kind: One of KINDS.
      sent_bytes: Bytes that one device sends each time.
      times: Executions per step.
      overlaps: Whether it overlaps other work.
    """

    kind: str
    sent_bytes: float
    times: int
    overlaps: bool


def collectives(module: hlo.Module) -> list[Collective]:
    """The transfers of one run of the program.

    Raises:
      UnreadableError: The program can't be parsed.
    """
    found, seen = [], set()
    for execution in hlo.executions(module):
        instruction = execution.instruction
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
        if chain:
            channel = re.search(r"channel_id=(\d+)", instruction.attributes)
            key = (execution.caller, chain[1], channel and channel[1])
            if key in seen:
                continue
            seen.add(key)
        size = group_size(instruction.attributes, module.num_partitions)
        operand_bytes = sum(o.bytes for o in execution.computation.operands(instruction))
        if kind == "all-reduce" and _is_scattered(execution):
            kind = "reduce-scatter"
        is_async = instruction.opcode.endswith("-start") or execution.in_async
        overlaps = bool(chain) or (is_async and '"is_sync":true' not in instruction.attributes)
        sent = operand_bytes * _sent(kind, size)
        found.append(Collective(kind, sent, execution.times, overlaps))
    return found


def bytes_by_kind(transfers: list[Collective]) -> dict[str, float]:
    """Bytes that a device sends in a step, by kind of transfer."""
    total: dict[str, float] = {}
    for transfer in transfers:
        total[transfer.kind] = total.get(transfer.kind, 0.0) + transfer.sent_bytes * transfer.times
    return total


def group_size(attributes: str, num_partitions: int) -> int:
    """The number of devices in a group, in any of HLO's notations."""
    match = re.search(r"replica_groups=(.*)", attributes)
    if match is None or match[1].startswith("{}"):
        return num_partitions
    groups = match[1]
    if mesh := re.match(r"mesh\[([^\]]*)\](?:, *device_ids=\S+)? *\{([^}]*)\}", groups):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        # A part of an axis is written 'axis':(before)size.
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else sizes[name] for name, part in parts)
    if rows := re.match(r"\[([\d,]+)\]<=", groups):
        return int(rows[1].rpartition(",")[2])
    if first := re.match(r"\{\{([\d,]*)\}", groups):
        return first[1].count(",") + 1
    raise hlo.UnreadableError(f"The groups {groups:.100} of a transfer are not understood.")


def _sent(kind: str, size: int) -> float:
    """Bytes sent per byte of operands."""
    match kind:
        case "all-gather":
            return size - 1.0
        case "all-reduce":
            return 2.0 * (size - 1) / size
        case "reduce-scatter" | "all-to-all" | "ragged-all-to-all":
            return (size - 1) / size
    return 1.0


def _is_scattered(execution: hlo.Execution) -> bool:
    """Whether an all-reduce is a reduce-scatter, which on a TPU is one fused with a slice."""
    return execution.in_fusion and "all-reduce-scatter" in execution.computation.name
