"""Every number that `salt plan` prints of a small model for v5e:2x2, worked out once more.

The program's text is read here by other means than the package's: split by a regular expression,
loops known beforehand (2 layers, 4 chunks of the loss), and of each fusion's operands what the uses
of it take, followed forward.
"""

import collections
import json
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from salt_jax.main import main
from salt_jax.planning import stage_plan
from salt_jax.planning.compile import CompiledStage, Job, compile_stage
from salt_jax.planning.topologies import GIB

pytestmark = pytest.mark.usefixtures("libtpu")

STUDENT = "embed_dim=64 num_layers=2 num_heads=2 mlp_dim=128 head_dim=64 remat='full'"
TEACHER = "embed_dim=32 num_layers=1 num_heads=2 mlp_dim=64 head_dim=64"
ROWS, LENGTH, VOCABULARY, CHIPS = 8, 128, 512, 4
LAYERS, CHUNKS = 2, 4  # of 64 tokens, of a chip's 256
BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1, "s8": 1, "u8": 1}


def gin_of(sizes: str) -> str:
    lines = [f"decoder.DecoderConfig.{each}" for each in (*sizes.split(), "dtype='bfloat16'")]
    head = "from __gin__ import dynamic_registration\nfrom salt_jax.models import decoder\n"
    return head + "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[int, str]]:
    """The plan of summary.json, and the text of the program of each stage."""
    pytest.importorskip("libtpu")
    folder = tmp_path_factory.mktemp("plan")
    (folder / "teacher.gin").write_text(gin_of(TEACHER))
    (folder / "run.gin").write_text(
        gin_of(STUDENT)
        + "include 'runs/pretrain.gin'\ninclude 'hardware/fsdp.gin'\nLEARNING_RATE = 1e-3\n"
    )
    texts: dict[int, str] = {}

    def keep(job: Job, topology: Any, stage: int) -> CompiledStage:
        compiled = compile_stage(job, topology, stage)
        texts[stage] = compiled.hlo
        return compiled

    flags = [
        *(f"--gin_file={folder / 'run.gin'}", "--gin_file=methods/salt.gin", "--gin.N_KD=25"),
        *(f"--teacher_model={folder / 'teacher.gin'}", "--steps=100", f"--batch_size={ROWS}"),
        *(f"--vocab_size={VOCABULARY}", f"--sequence_length={LENGTH}", "--topology=v5e:2x2"),
        *("--gin.losses.LossConfig.chunk_tokens=64", "--try_changes=false"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_plan, "compile_stage", keep)
        assert main(["plan", *flags, f"--output_dir={folder / 'plan'}"]) == 0
    (plan,) = json.loads((folder / "plan" / "summary.json").read_text())["plans"]
    return plan, texts


class Line(NamedTuple):
    """An instruction: %name = result opcode(operands) rest."""

    is_root: bool
    name: str
    result: str
    opcode: str
    operands: list[str]
    rest: str


def blocks_of(text: str) -> dict[str, list[Line]]:
    """The instructions of each computation; the program's is called "ENTRY"."""
    blocks = {}
    for entry, name, body in re.findall(
        r"^(ENTRY )?%([\w.\-]+) \([^\n]*\{\n(.*?)\n\}$", text, re.MULTILINE | re.DOTALL
    ):
        lines = []
        for part in re.split(r"\n(?=  (?:ROOT )?%[\w.\-]+ = )", body):
            match = re.match(
                r"  (ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w\-]+)\(([^)]*)\)(.*)", part, re.DOTALL
            )
            assert match, part[:200]
            root, own, result, opcode, arguments, rest = match.groups()
            names = re.findall(r"%([\w.\-]+)", arguments) or [arguments]
            lines.append(Line(bool(root), own, result, opcode, names, rest))
        blocks["ENTRY" if entry else name] = lines
    return blocks


def numbers_of(result: str) -> Iterator[tuple[int, int, bool]]:
    """Elements and bytes of the arrays of a result, and whether they lie in main memory."""
    for dtype, dims, layout in re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", result):
        elements = math.prod(int(size) for size in dims.split(",") if size)
        yield elements, elements * BYTES[dtype], "S(" not in layout


def size(result: str) -> int:
    """Bytes of a result in main memory."""
    return sum(count for _, count, in_memory in numbers_of(result) if in_memory)


def called(line: Line, role: str = "calls") -> str:
    match = re.search(rf"{role}=%([\w.\-]+)", line.rest)
    return match[1] if match else ""


def runs_of(blocks: dict[str, list[Line]]) -> dict[str, int]:
    """How often each computation runs that is no fusion's."""
    runs, left = {"ENTRY": 1}, ["ENTRY"]
    while left:
        block = left.pop()
        for line in blocks[block]:
            if line.opcode == "while":
                condition = blocks[called(line, "condition")]
                (limit,) = [int(c.operands[0]) for c in condition if c.opcode == "constant"]
                assert limit in (LAYERS, CHUNKS)
                runs[called(line, "body")] = runs[block] * limit
                runs[called(line, "condition")] = runs[block] * (limit + 1)
                left.append(called(line, "body"))
            elif line.opcode in ("async-start", "call"):
                name = called(line, "calls" if line.opcode == "async-start" else "to_apply")
                runs[name] = runs[block]
                left.append(name)
    return runs


def within(blocks: dict[str, list[Line]], block: str) -> Iterator[tuple[str, Line]]:
    """The lines of a computation and of the fusions in it, each with where it stands."""
    for line in blocks[block]:
        yield block, line
        if line.opcode == "fusion":
            yield from within(blocks, called(line))


def sent_by(text: str) -> tuple[dict[str, float], float]:
    """Bytes that a chip sends in a step, by kind; and of them those that it waits for."""
    per_byte = {
        **{"all-gather": CHIPS - 1, "all-reduce": 2 * (CHIPS - 1) / CHIPS},
        **dict.fromkeys(("reduce-scatter", "all-to-all"), (CHIPS - 1) / CHIPS),
        "collective-permute": 1,
    }
    blocks = blocks_of(text)
    sent, waited, seen = dict.fromkeys(per_byte, 0.0), 0.0, set()
    for block, runs in runs_of(blocks).items():
        for place, line in within(blocks, block):
            kind = line.opcode.removesuffix("-start")
            chain = re.search(r'channel_id=(\d+).*chain_id="(\d+)"', line.rest)
            if kind not in per_byte or (chain and (block, chain.groups()) in seen):
                continue
            seen.add((block, chain.groups() if chain else (place, line.name)))
            results = {other.name: other.result for other in blocks[place]}
            operands = [results[name] for name in line.operands]  # one may be there twice
            count = sum(n for result in operands for _, n, _ in numbers_of(result))
            if place.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            sent[kind] += runs * count * per_byte[kind]
            if not (chain or line.opcode.endswith("-start") or "async" in place):
                waited += runs * count * per_byte[kind]
    return {kind: count for kind, count in sent.items() if count}, waited


COPIES = {"bitcast", "convert", "copy", "reshape", "transpose", "negate", "multiply", "add"}
COPIES |= {"subtract", "select", "divide", "maximum", "exponential", "and", "power", "compare"}
SLICES = {"slice", "dynamic-slice", "gather"}
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}


def taken(blocks: dict[str, list[Line]], block: str, name: str) -> float:
    """The elements that the uses of an instruction in a fusion take of it, at most all of them."""
    own = next(line for line in blocks[block] if line.name == name)
    ((whole, _, _),) = numbers_of(own.result)
    total = 0.0
    for line in blocks[block]:
        for place, operand in enumerate(line.operands):
            if operand == name and line.opcode != "parameter":
                total += _taken_by(blocks, block, line, place, whole)
    if own.is_root:
        total += whole
    return min(total, whole)


def _taken_by(
    blocks: dict[str, list[Line]], block: str, line: Line, place: int, whole: float
) -> float:
    if line.opcode == "tuple":  # handed on, if it is an operand; counted by taken() if it is not
        source = next(other for other in blocks[block] if other.name == line.operands[place])
        return 0 if source.opcode == "parameter" or "chain_id" in source.rest else whole
    if line.opcode in COPIES:
        return taken(blocks, block, line.name)
    if line.opcode in SLICES and place == 0:
        return next(numbers_of(line.result))[0]
    if line.opcode in UPDATES and place == 0:
        return 0 if line.is_root else whole
    if line.opcode == "fusion":
        inner = called(line)
        parameter = next(
            other
            for other in blocks[inner]
            if other.opcode == "parameter" and other.operands == [str(place)]
        )
        return taken(blocks, inner, parameter.name)
    if line.opcode == "custom-call" and "AsyncCollectiveDone" in line.rest:
        return 0
    return whole


FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call"}
FREE |= {"after-all", "partition-id", "replica-id", "async-start", "opt-barrier"}
FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "AsyncCollective", "AssumeGather")


def moved_by(text: str) -> float:
    """Bytes of main memory that a chip reads and writes in a step."""
    blocks, total = blocks_of(text), 0.0
    for block, runs in runs_of(blocks).items():
        for line in blocks[block]:
            if line.opcode in FREE or line.opcode.endswith(("-done", "-update")):
                continue
            if line.opcode == "custom-call" and any(f'="{f}' in line.rest for f in FREE_CALLS):
                continue
            operands = [next(o for o in blocks[block] if o.name == n) for n in line.operands if n]
            total += runs * _moved_by(blocks, line, operands)
    return total


def _moved_by(blocks: dict[str, list[Line]], line: Line, operands: list[Line]) -> float:
    in_memory = [size(operand.result) for operand in operands]
    if line.opcode == "fusion":
        inner = blocks[called(line)]
        read = 0.0
        for place, operand in enumerate(operands):
            if in_memory[place]:
                ((elements, count, _),) = numbers_of(operand.result)
                reads = _taken_by(blocks, "", line, place, elements)
                read += reads * count / elements
        return read + _written_by(blocks, inner, line.result)
    arrays = list(numbers_of(line.result))
    if line.opcode in ("copy-start", "collective-permute-start", "all-gather-start"):
        return sum(count for _, count, is_main in arrays[:2] if is_main)
    if line.opcode in (*SLICES, "slice-start"):
        _, count, is_main = arrays[1 if line.opcode == "slice-start" else 0]
        return (count if in_memory[0] else 0) + (count if is_main else 0)
    if line.opcode in UPDATES:
        put = operands[UPDATES[line.opcode]]
        ((_, count, _),) = numbers_of(put.result)
        return size(put.result) + (count if arrays[0][2] else 0)
    return sum(in_memory) + size(line.result)


def _written_by(blocks: dict[str, list[Line]], inner: list[Line], result: str) -> float:
    """Bytes that a fusion writes to the arrays of a result."""
    by_name = {line.name: line for line in inner}
    root = next(line for line in inner if line.is_root)
    roots = [by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
    arrays = list(numbers_of(result))
    if "AsyncCollectiveStart" in root.rest:
        gathered = [count for _, count, _ in numbers_of(by_name[root.operands[0]].result)]
        return sum(count for _, count, is_main in arrays if is_main and count in gathered)
    if "AsyncCollectiveDone" in root.rest:
        return 0
    total = 0.0
    for line, (_, count, in_memory) in zip(roots, arrays, strict=True):
        while line.opcode == "bitcast":
            line = by_name[line.operands[0]]
        if line.opcode in UPDATES:
            ((_, count, _),) = numbers_of(by_name[line.operands[UPDATES[line.opcode]]].result)
            count *= 2 if line.opcode == "scatter" else 1  # which also reads what it adds to
        if in_memory and line.opcode != "parameter" and "chain_id" not in line.rest:
            total += count
    return total


def arguments_by(text: str) -> tuple[collections.Counter[str], collections.Counter[str]]:
    """Bytes of the arguments by what they are: without, and with, what tiles pad."""
    bare: collections.Counter[str] = collections.Counter()
    padded: collections.Counter[str] = collections.Counter()
    for line in blocks_of(text)["ENTRY"]:
        if line.opcode == "parameter":
            path = re.findall(r'op_name="([\w.]+)', line.rest)[0]
            kind = path.removeprefix("state.")
            kind = "state" if kind in ("step", "skipped_updates") else kind
            bare[kind] += sum(count for _, count, _ in numbers_of(line.result))
            padded[kind] += tiled(line.result)
    return bare, padded


def tiled(result: str) -> int:
    """Bytes of an array whose dimensions are rounded up to its layout's first tile."""
    dtype, dims, order, tile = re.findall(r"(\w+)\[([\d,]*)\]\{([\d,]*):T\(([\d,]+)\)", result)[0]
    sizes = [int(n) for n in dims.split(",") if n] or [1]
    tiles = [int(n) for n in tile.split(",")]
    minor = [int(n) for n in order.split(",") if n] or [0]
    for axis, unit in zip(minor, reversed(tiles), strict=False):
        sizes[axis] = -(-sizes[axis] // unit) * unit
    return math.prod(sizes) * BYTES[dtype]


@pytest.mark.parametrize("stage", [1, 2])
def test_what_is_sent(planned: Any, stage: int) -> None:
    plan, texts = planned
    sent, waited = sent_by(texts[stage])
    figures = plan["stages"][stage - 1]
    assert figures["collective_bytes_per_step"] == pytest.approx(sent)
    link = 0.7 * 200e9
    assert figures["roofline_seconds"]["waited"] == pytest.approx(waited / link)
    overlapped = sum(sent.values()) - waited
    assert figures["roofline_seconds"]["overlapped"] == pytest.approx(overlapped / link)


@pytest.mark.parametrize("stage", [1, 2])
def test_what_is_moved(planned: Any, stage: int) -> None:
    plan, texts = planned
    moved = moved_by(texts[stage])
    figures = plan["stages"][stage - 1]
    assert figures["memory_bytes_per_step"] == pytest.approx(moved)
    assert figures["roofline_seconds"]["memory"] == pytest.approx(moved / (0.8 * 819e9))


@pytest.mark.parametrize("stage", [1, 2])
def test_memory(planned: Any, stage: int) -> None:
    """All but the peak, which is the compiler's own."""
    plan, texts = planned
    figures, bare, padded = plan["stages"][stage - 1], *arguments_by(texts[stage])
    parts, analysis = figures["breakdown_gib"], figures["memory_analysis_gib"]
    assert set(bare) == {"state", "params", "opt_state", "batch", "weights", "teacher_params"} or (
        stage == 2 and set(bare) == {"state", "params", "opt_state", "batch"}
    )
    for name, kind in (
        *(("student", "params"), ("optimizer", "opt_state"), ("batch", "batch")),
        ("teacher", "teacher_params"),
    ):
        assert parts[name] * GIB == bare[kind]
    arguments = sum(padded.values())
    assert analysis["arguments"] * GIB == arguments
    assert parts["padding"] * GIB == pytest.approx(
        arguments - sum(bare[k] for k in ("params", "opt_state", "batch", "teacher_params"))
    )
    assert analysis["aliased"] * GIB == padded["state"] + padded["params"] + padded["opt_state"]
    assert analysis["bound"] * GIB == pytest.approx(
        arguments + (analysis["temporaries"] + analysis["outputs"] - analysis["aliased"]) * GIB
    )
    # The head in bfloat16 and its gradient, a chunk's logits and theirs; the teacher's of both.
    loss = VOCABULARY * (64 * (2 + 4) + 64 * (4 + 2))
    loss += VOCABULARY * (32 * 2 + 64 * 4) if stage == 1 else 0
    assert parts["loss"] * GIB == loss
    assert sum(parts.values()) == pytest.approx(figures["peak_hbm_gib"])
    assert arguments + loss < figures["peak_hbm_gib"] * GIB < analysis["bound"] * GIB


def test_flops_and_time(planned: Any) -> None:
    """Of matrix products, by their sizes."""
    plan, _ = planned

    def products(width: int, layers: int, hidden: int) -> int:
        block = 4 * width * 2 * 64 + 3 * width * hidden
        return 2 * (layers * block + VOCABULARY * width) + 4 * layers * 2 * 64 * LENGTH

    student, teacher = products(64, LAYERS, 128), products(32, 1, 64)
    # Computed again: q·k, mixing, up, gate and the projections but not down.
    again = 2 * LAYERS * (2 * 2 * 64 * LENGTH + 2 * 64 * 128 + 4 * 64 * 2 * 64)
    tokens = ROWS * LENGTH
    for figures, extra in zip(plan["stages"], (teacher, 0), strict=True):
        assert figures["flops_per_step"] == tokens * (3 * student + extra)
        assert figures["hardware_flops_per_step"] == tokens * (3 * student + again + extra)
        roofline = figures["roofline_seconds"]
        compute = tokens * (3 * student + again + extra) / CHIPS / (0.6 * 197e12)
        assert roofline["compute"] == pytest.approx(compute)
        longest = max(roofline[name] for name in ("compute", "memory", "overlapped"))
        seconds = longest + roofline["waited"]
        assert figures["step_seconds_estimate"] == pytest.approx(seconds)
        assert figures["tokens_per_second_estimate"] == pytest.approx(tokens / seconds)
        mfu = tokens * (3 * student + extra) / (seconds * CHIPS * 197e12)
        assert figures["mfu_estimate"] == pytest.approx(mfu)
    first, second = (figures["step_seconds_estimate"] for figures in plan["stages"])
    run, total = plan["run"], 25 * first + 75 * second
    assert run["flops"] == tokens * (100 * 3 * student + 25 * teacher)
    assert run["baseline_flops"] == tokens * 100 * 3 * student
    assert run["days"] == pytest.approx(total / 86_400)
    assert run["baseline_days"] == pytest.approx(100 * second / 86_400)
    assert run["chip_hours"] == pytest.approx(total * CHIPS / 3600)
    assert run["teacher_overhead"] == pytest.approx(total / (100 * second) - 1)
