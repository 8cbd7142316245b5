"""The largest arrays: each shape once, nothing that is only a name, nothing inside a fusion."""

import jax
import jax.numpy as jnp

from salt_jax.planning import buffers, hlo

TEXT = """HloModule m

%fused (p: f32[64,64]) -> f32[64,64] {
  %p = f32[64,64] parameter(0)
  %wide = f32[64,64,64] broadcast(%p), dimensions={0,1}
  ROOT %narrow = f32[64,64] slice(%wide)
}

ENTRY %main (p: f32[999,999]) -> f32[64,64] {
  %p = f32[999,999] parameter(0)
  %a = f32[64,64]{1,0:T(8,128)} slice(%p)
  %b = f32[64,64] negate(%a), metadata={op_name="jit(step)/neg"}
  %c = bf16[64,64] convert(%b)
  %d = f32[128,128]{1,0:T(8,128)S(1)} pad(%b)
  ROOT %f = f32[64,64] fusion(%b), kind=kLoop, calls=%fused
}
"""


def test_one_of_each_shape_in_main_memory() -> None:
    found = buffers.largest(hlo.parse(TEXT), 5)
    assert [(b.dtype, b.dims, b.bytes, b.op_name) for b in found] == [
        ("f32", (64, 64), 64 * 64 * 4, "jit(step)/neg"),
        ("bf16", (64, 64), 64 * 64 * 2, ""),
    ]
    assert len(buffers.largest(hlo.parse(TEXT), 1)) == 1


def test_names_the_function() -> None:
    def program(x: jax.Array) -> jax.Array:
        with jax.named_scope("attention"):
            scores = x @ x.T
        return jax.nn.softmax(scores) @ x

    text = jax.jit(program).lower(jnp.zeros((512, 16))).compile().as_text()
    (first,) = buffers.largest(hlo.parse(text), 1)
    assert first.dims == (512, 512)
