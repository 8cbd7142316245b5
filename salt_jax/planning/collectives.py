"""The bytes that each device sends to others in one step of a compiled program.

They are counted as in ring algorithms, which send the least (n devices in a group, S bytes of
operands on each):

    all-gather           S · (n - 1)          each device passes on all parts but one
    reduce-scatter       S · (n - 1) / n
    all-reduce           2 · S · (n - 1) / n  a reduce-scatter, then an all-gather
    all-to-all           S · (n - 1) / n
    collective-permute   S

A transfer within groups that reach over several slices or nodes, n of them with m devices each in a
group, is done in two parts: among the devices of a slice, and, of 1/m of what is reduced, over the
network between slices.

A transfer that overlaps other work appears as a start and a done, or on TPUs as parts that are
fused into that work; it counts once.
"""

import dataclasses
import math
import re

import numpy as np

from salt_jax.planning import hlo

KINDS = (
    *("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)

_RENDEZVOUS = r'_xla_host_transfer_rendezvous="([a-z-]+)'


@dataclasses.dataclass(frozen=True)
class Collective:
    """A transfer between devices.

    Attributes:
      kind: One of KINDS.
      sent_bytes: Bytes that one device sends each time.
      times: Executions per step.
      overlaps: Whether it overlaps other work.
      network_bytes: Of the sent bytes, those that go to another slice or node.
    """

    kind: str
    sent_bytes: float
    times: int
    overlaps: bool
    network_bytes: float = 0.0


def collectives(module: hlo.Module, slices: int = 1, devices: int = 0) -> list[Collective]:
    """The transfers of one run of the program on devices in `slices` equal, consecutive slices.

    `devices` are by default the program's. A TPU's program is that of one slice, which sends to the
    others through its hosts.

    Raises:
      UnreadableError: The program can't be parsed.
    """
    found, seen = [], set()
    of_slice = (devices or module.num_partitions) // slices
    for execution in hlo.executions(module):
        instruction = execution.instruction
        kind = instruction.opcode.removesuffix("-start")
        if kind == "send" and (name := re.search(_RENDEZVOUS, instruction.attributes)):
            sent = instruction.shapes[0].bytes * _sent(name[1], slices)
            found.append(Collective(name[1], sent, execution.times, False, sent))
        if kind not in KINDS:
            continue
        chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
        if chain:
            channel = re.search(r"channel_id=(\d+)", instruction.attributes)
            key = (execution.caller, chain[1], channel and channel[1])
            if key in seen:
                continue
            seen.add(key)
        members = groups(instruction.attributes, module.num_partitions)
        operand_bytes = sum(o.bytes for o in execution.computation.operands(instruction))
        if kind == "all-reduce" and _is_scattered(execution):
            kind = "reduce-scatter"
        is_async = instruction.opcode.endswith("-start") or execution.in_async
        overlaps = bool(chain) or (is_async and '"is_sync":true' not in instruction.attributes)
        size = members.shape[1]
        among = max(len({*row}) for row in (members // of_slice).tolist())
        shared = size // among if kind in ("all-reduce", "reduce-scatter") else 1
        network = operand_bytes * _sent(kind, among) / shared if among > 1 else 0.0
        sent = operand_bytes * _sent(kind, size)
        found.append(Collective(kind, sent, execution.times, overlaps, network))
    return found


def bytes_by_kind(transfers: list[Collective]) -> dict[str, float]:
    """Bytes that a device sends in a step, by kind of transfer."""
    total: dict[str, float] = {}
    for transfer in transfers:
        total[transfer.kind] = total.get(transfer.kind, 0.0) + transfer.sent_bytes * transfer.times
    return total


def groups(attributes: str, num_partitions: int) -> np.ndarray:
    """The devices of each group, [groups, devices], in any of HLO's notations."""
    match = re.search(r"(?:replica_groups|source_target_pairs)=(.*)", attributes)
    if match is None or match[1].startswith("{}"):
        return np.arange(num_partitions)[None]
    text = match[1]
    if mesh := re.match(r"mesh\[([^\]]*)\](?:, *device_ids=\((\S+)\))? *\{([^}]*)\}", text):
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        # A part of an axis is written 'axis':(before)size.
        parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", mesh[3])
        sizes: list[int] = []
        inside: list[int] = []
        for name, size in axes.items():
            split = [(int(x), int(y)) for axis, x, y in parts if axis == name and y]
            before, part = split[0] if split else (1, size)
            if any(axis == name for axis, *_ in parts):
                inside.append(len(sizes) + 1)
            sizes += [before, part, size // (before * part)]
        devices = _iota(mesh[2] or f"[{math.prod(sizes)}]").reshape(sizes)
        devices = np.moveaxis(devices, inside, range(-len(inside), 0))
        return devices.reshape(-1, math.prod(devices.shape[-len(inside) :]))
    if rows := re.match(r"\[(\d+),(\d+)\]<=(\S+)", text):
        return _iota(rows[3]).reshape(int(rows[1]), int(rows[2]))
    if listed := re.match(r"\{(\{[\d,]*\}(?:,\{[\d,]*\})*)\}", text):
        return np.array([row.split(",") for row in re.findall(r"\{([\d,]+)\}", listed[1])], int)
    raise hlo.UnreadableError(f"The groups {text:.100} of a transfer are not understood.")


def _iota(text: str) -> np.ndarray:
    """Devices in the order of [2,4]T(1,0): numbered in an array, which is then transposed."""
    sizes, _, order = text.rstrip(",").partition("T")
    devices = np.arange(math.prod(map(int, re.findall(r"\d+", sizes))))
    devices = devices.reshape([int(size) for size in re.findall(r"\d+", sizes)])
    axes = [int(axis) for axis in re.findall(r"\d+", order)]
    return devices.transpose(axes or None).ravel()


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
