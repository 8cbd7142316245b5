"""Memory traffic: what XLA counts where there is no loop, and trip counts times a body's."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from salt_jax.planning import hlo, traffic


def compiled(program, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(program).lower(*arguments).compile()


def test_agrees_with_xla_without_loops() -> None:
    program = compiled(
        lambda a, b: jax.nn.softmax(jnp.tanh(a @ b), axis=-1) @ b, (256, 512), (512, 512)
    )
    expected = program.cost_analysis()["bytes accessed"]
    assert traffic.memory_bytes(hlo.parse(program.as_text())) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("length", [1, 10, 100])
def test_a_scan_reads_its_own_slice_each_time(length: int) -> None:
    def body(x, weights):
        return jnp.tanh(x @ weights), None

    def program(x, stack):
        return lax.scan(body, x, stack)[0]

    text = compiled(program, (256, 512), (length, 512, 512)).as_text()
    moved = traffic.memory_bytes(hlo.parse(text))
    weights, activations = 512 * 512 * 4, 256 * 512 * 4
    assert length * (weights + 2 * activations) <= moved
    # The slice may be copied before it is used, and activations go through the tanh once more; the
    # whole stack is never moved in every step.
    assert moved <= length * (3 * weights + 6 * activations) + 4 * activations


def test_what_lies_on_the_chip_is_free() -> None:
    def text(space: str) -> str:
        return (
            "HloModule m\n\nENTRY %main (p: f32[8,128]) -> f32[8,128] {\n"
            "  %p = f32[8,128]{1,0:T(8,128)} parameter(0)\n"
            f"  %x = f32[8,128]{{1,0:T(8,128){space}}} negate(%p)\n"
            "  ROOT %y = f32[8,128]{1,0:T(8,128)} exponential(%x)\n}\n"
        )

    size = 8 * 128 * 4
    assert traffic.memory_bytes(hlo.parse(text(""))) == 4 * size
    assert traffic.memory_bytes(hlo.parse(text("S(1)"))) == 2 * size


def test_updates_in_place() -> None:
    text = (
        "HloModule m\n\n"
        "ENTRY %main (p: f32[1000,128], u: f32[1,128], i: s32[]) -> f32[1000,128] {\n"
        "  %p = f32[1000,128] parameter(0)\n  %u = f32[1,128] parameter(1)\n"
        "  %i = s32[] parameter(2)\n"
        "  ROOT %r = f32[1000,128] dynamic-update-slice(%p, %u, %i, %i)\n}\n"
    )
    assert traffic.memory_bytes(hlo.parse(text)) == 2 * 128 * 4


def test_a_fusion_moves_what_its_slices_and_updates_do() -> None:
    text = (
        "HloModule m\n\n%fused (a: f32[1000,128], b: f32[1000,128], i: s32[]) -> f32[1000,128] {\n"
        "  %a = f32[1000,128] parameter(0)\n  %b = f32[1000,128] parameter(1)\n"
        "  %i = s32[] parameter(2)\n"
        "  %s = f32[1,128] dynamic-slice(%a, %i, %i), dynamic_slice_sizes={1,128}\n"
        "  ROOT %r = f32[1000,128] dynamic-update-slice(%b, %s, %i, %i)\n}\n\n"
        "ENTRY %main (a: f32[1000,128], b: f32[1000,128], i: s32[]) -> f32[1000,128] {\n"
        "  %a = f32[1000,128] parameter(0)\n  %b = f32[1000,128] parameter(1)\n"
        "  %i = s32[] parameter(2)\n"
        "  ROOT %f = f32[1000,128] fusion(%a, %b, %i), kind=kLoop, calls=%fused\n}\n"
    )
    assert traffic.memory_bytes(hlo.parse(text)) == pytest.approx(2 * 128 * 4, abs=32)


def moved_by(*fused: str, others: str = "", result: str = "f32[1000,128]", **spaces: str) -> float:
    """Of a fusion of a f32[1000,128] %a, a f32[1000,128] %b and an index %i."""
    a, b = (f"f32[1000,128]{{1,0{spaces.get(name, '')}}}" for name in "ab")
    lines = "\n  ".join(fused)
    parameters = (
        f"  %a = {a} parameter(0)\n  %b = {b} parameter(1)\n  %i = s32[]{{:S(4)}} parameter(2)\n"
    )
    return traffic.memory_bytes(
        hlo.parse(
            f"HloModule m\n\n{others}\n%fused (a: f32[], b: f32[], i: s32[]) -> f32[] {{\n"
            f"{parameters}  {lines}\n}}\n\nENTRY %main (a: f32[], b: f32[], i: s32[]) -> f32[] {{\n"
            f"{parameters}  ROOT %f = {result} fusion(%a, %b, %i), kind=kLoop, calls=%fused\n}}\n"
        )
    )


ROW, ALL = 128 * 4, 1000 * 128 * 4
SLICED = (
    "%sliced (p: f32[], q: s32[]) -> f32[] {\n  %p = f32[1000,128] parameter(0)\n"
    "  %q = s32[] parameter(1)\n"
    "  ROOT %s = f32[1,128] dynamic-slice(%p, %q, %q), dynamic_slice_sizes={1,128}\n}\n"
)
PUT = (
    "%put (p: f32[], q: f32[], r: s32[]) -> f32[] {\n  %p = f32[1000,128] parameter(0)\n"
    "  %q = f32[1,128] parameter(1)\n  %r = s32[] parameter(2)\n"
    "  ROOT %u = f32[1000,128] dynamic-update-slice(%p, %q, %r, %r)\n}\n"
)


def test_a_nested_fusion_reads_what_it_slices() -> None:
    """As in the loop over the head's gradient, whose slices a convolution reads."""
    row = "%row = f32[1,128] fusion(%a, %i), kind=kLoop, calls=%sliced"
    product = "ROOT %c = f32[1,1] convolution(%row, %row), dim_labels=bf_oi->bf"
    assert moved_by(row, product, others=SLICED, result="f32[1,1]") == ROW + 4
    whole = "ROOT %c = f32[1,1] convolution(%row, %b), dim_labels=bf_oi->bf"
    assert moved_by(row, whole, others=SLICED, result="f32[1,1]") == ROW + ALL + 4
    assert moved_by(row, whole, others=SLICED, result="f32[1,1]", b=":S(1)") == ROW + 4


def test_a_nested_fusion_updates_in_place() -> None:
    row = "%row = f32[1,128] fusion(%b, %i), kind=kLoop, calls=%sliced"
    put = "ROOT %put.1 = f32[1000,128] fusion(%a, %row, %i), kind=kLoop, calls=%put"
    assert moved_by(row, put, others=SLICED + PUT) == 2 * ROW
    # What is no operand is made whole.
    zeros = "%z = f32[1000,128] broadcast(%i), dimensions={}"
    put = "ROOT %put.1 = f32[1000,128] fusion(%z, %row, %i), kind=kLoop, calls=%put"
    assert moved_by(row, zeros, put, others=SLICED + PUT) == ROW + ALL


def test_only_what_a_slice_needs_is_computed() -> None:
    sum_ = "%s = f32[1000,128] add(%a, %b)"
    taken = "ROOT %t = f32[10,128] slice(%s), slice={[0:10], [0:128]}"
    assert moved_by(sum_, taken, result="f32[10,128]") == 3 * 10 * ROW
    # The same array for two uses is read once.
    square = "%s = f32[1000,128] multiply(%a, %a)"
    assert moved_by(square, "ROOT %r = f32[1000,128] negate(%s)") == 2 * ALL


def test_what_is_handed_on_is_not_moved() -> None:
    both = "(f32[1000,128], f32[1000,128])"
    negated = "%n = f32[1000,128] negate(%a)"
    assert moved_by(negated, f"ROOT %t = {both} tuple(%n, %b)", result=both) == 2 * ALL


def test_a_transfer_in_the_fusions_beside_it_counts_where_it_starts() -> None:
    gather = (
        "%g = f32[4000,128] all-gather(%a), replica_groups={{0,1,2,3}}, dimensions={0}, "
        'frontend_attributes={chain_id="0"}'
    )
    begun = "(f32[1000,128], f32[4000,128], u32[])"
    start = f'ROOT %c = {begun} custom-call(%g), custom_call_target="AsyncCollectiveStart"'
    assert moved_by(gather, start, result=begun) == ALL + 4 * ALL
    negated = "%n = f32[1000,128] negate(%b)"
    beside = "(f32[1000,128], f32[1000,128], f32[4000,128])"
    between = f"ROOT %t = {beside} tuple(%n, %a, %g)"
    assert moved_by(negated, gather, between, result=beside) == 2 * ALL
    end = 'ROOT %c = f32[4000,128] custom-call(%a, %g), custom_call_target="AsyncCollectiveDone"'
    assert moved_by(gather, end, result="f32[4000,128]") == 0


def test_between_main_memory_and_the_chip() -> None:
    """A slice to VMEM is read, an update from it is written."""

    def moved(line: str) -> float:
        text = (
            "HloModule m\n\nENTRY %main (p: f32[], i: s32[]) -> f32[] {\n"
            "  %p = f32[1000,128]{1,0} parameter(0)\n  %i = s32[] parameter(1)\n"
            "  %v = f32[1,128]{1,0:S(1)} parameter(2)\n"
            f"  {line}\n}}\n"
        )
        return traffic.memory_bytes(hlo.parse(text))

    assert moved("ROOT %s = f32[1,128]{1,0:S(1)} dynamic-slice(%p, %i, %i)") == ROW
    assert moved("ROOT %s = f32[1,128]{1,0} dynamic-slice(%p, %i, %i)") == 2 * ROW
    assert moved("ROOT %u = f32[1000,128]{1,0} dynamic-update-slice(%p, %v, %i, %i)") == ROW
    start = "((f32[1000,128]{1,0}), f32[2,128]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%p)"
    assert moved(f"ROOT %s = {start}, slice={{[0:2], [0:128]}}") == 2 * ROW
    start = "(f32[1000,128]{1,0:S(1)}, f32[1000,128]{1,0}, u32[]{:S(2)}) copy-start(%p)"
    assert moved(f"ROOT %c = {start}") == ALL
    gather = "(f32[1000,128]{1,0}, f32[4000,128]{1,0}) all-gather-start(%p)"
    assert moved(f"ROOT %g = {gather}, replica_groups={{{{0,1,2,3}}}}") == 5 * ALL
    views = 'f32[1000,128]{1,0} custom-call(%p, %p), custom_call_target="ConcatBitcast"'
    assert moved(f"ROOT %c = {views}") == 0
