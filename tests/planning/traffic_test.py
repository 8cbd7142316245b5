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
