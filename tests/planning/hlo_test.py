"""The reader of HLO text: on a program written by hand, and on compiled ones with known counts."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from salt_jax.planning import hlo

# Two loops, one in the other: 4 times 25. XLA noted the first's trip count; the second's follows
# from its condition. Layouts have tiles and memory spaces, as on a TPU.
NESTED = """HloModule jit_step, is_scheduled=true, num_partitions=8, layout={}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p: f32[16,128]) -> f32[16,128] {
  %p = f32[16,128]{1,0:T(8,128)} parameter(0)
  ROOT %double = f32[16,128]{1,0:T(8,128)} add(%p, %p)
}

%inner_body (carry: (s32[], f32[16,128])) -> (s32[], f32[16,128]) {
  %carry = (s32[]{:T(128)}, f32[16,128]{1,0:T(8,128)S(1)}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %x = f32[16,128]{1,0:T(8,128)S(1)} get-tuple-element(%carry), index=1
  %fusion.1 = f32[16,128]{1,0:T(8,128)} fusion(%x), kind=kLoop, calls=%fused, \
metadata={op_name="jit(step)/a (b/mul" stack_frame_id=1}
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[], f32[16,128]) tuple(%next, %fusion.1)
}

%inner_condition (carry: (s32[], f32[16,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(25)
  %carry = (s32[]{:T(128)}, f32[16,128]{1,0:T(8,128)S(1)}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%outer_body (carry: (s32[], f32[16,128])) -> (s32[], f32[16,128]) {
  %carry = (s32[], f32[16,128]) parameter(0)
  %zero = s32[] constant(0)
  %from = s32[]{:T(128)S(6)} copy(%zero)
  %x = f32[16,128] get-tuple-element(%carry), index=1
  %begin = (s32[], f32[16,128]) tuple(%from, %x)
  %inner = (s32[], f32[16,128]) while(%begin), condition=%inner_condition, body=%inner_body
  %y = f32[16,128] get-tuple-element(%inner), index=1
  %i = s32[] get-tuple-element(%inner), index=0
  %start = (f32[16,128], f32[128,128]) all-gather-start(%y), channel_id=1, \
replica_groups=[1,8]<=[8], dimensions={0}
  %done = f32[128,128] all-gather-done(%start)
  ROOT %out = (s32[], f32[16,128]) tuple(%i, %y)
}

%outer_condition (carry: (s32[], f32[16,128])) -> pred[] {
  %carry = (s32[], f32[16,128]) parameter(0)
  ROOT %true = pred[] constant(true)
}

%branch_a (p: f32[16,128]) -> f32[16,128] {
  ROOT %p = f32[16,128] parameter(0)
}

%branch_b (p: f32[16,128]) -> f32[16,128] {
  %p = f32[16,128] parameter(0)
  ROOT %negated = f32[16,128] negate(%p)
}

ENTRY %main (arg: f32[16,128], /*index=1*/which: s32[]) -> f32[16,128] {
  %arg = f32[16,128]{1,0:T(8,128)} parameter(0)
  %which = s32[] parameter(1)
  %zero = s32[] constant(0)
  %init = (s32[], f32[16,128]) tuple(%zero, %arg)
  %outer = (s32[], /*index=1*/f32[16,128]) while(%init), condition=%outer_condition, \
body=%outer_body, backend_config={"known_trip_count":{"n":"4"},"text":"a ) \\" parenthesis"}
  %x = f32[16,128] get-tuple-element(%outer), index=1
  ROOT %chosen = f32[16,128] conditional(%which, %x, %x), branch_computations={%branch_a, %branch_b}
}
"""


@pytest.fixture(scope="module")
def nested() -> hlo.Module:
    return hlo.parse(NESTED)


def test_reads_computations_and_instructions(nested: hlo.Module) -> None:
    assert nested.entry == "main"
    assert nested.num_partitions == 8
    assert len(nested.computations) == 9
    body = nested.computations["inner_body"]
    fusion = body.by_name["fusion.1"]
    assert fusion.opcode == "fusion"
    assert fusion.operands == ("x",)
    assert fusion.called == {"calls": ("fused",)}
    assert fusion.shapes == (hlo.Shape("f32", (16, 128)),)
    assert fusion.op_name == "jit(step)/a (b/mul"
    assert fusion.bytes == 16 * 128 * 4
    assert body.root.name == "out"
    assert [o.name for o in body.operands(body.root)] == ["next", "fusion.1"]
    carry = body.by_name["carry"]
    assert carry.shapes == (hlo.Shape("s32", ()), hlo.Shape("f32", (16, 128), memory_space=1))
    assert nested.computations["main"].root.called == {
        "branch_computations": ("branch_a", "branch_b")
    }


def test_loops_multiply(nested: hlo.Module) -> None:
    counts = {
        (e.computation.name, e.instruction.name): (e.times, e.depth) for e in hlo.executions(nested)
    }
    assert counts["main", "outer"] == (1, 0)
    assert counts["outer_body", "inner"] == (4, 1)
    assert counts["inner_body", "fusion.1"] == (100, 2)
    assert counts["fused", "double"] == (100, 2)
    assert counts["inner_condition", "lt"] == (104, 2)
    assert counts["branch_b", "negated"] == (1, 0)
    assert not any(computation == "add" for computation, _ in counts)


def test_select(nested: hlo.Module) -> None:
    (gather,) = hlo.select(nested, opcode="all-gather", in_loop=True)
    assert gather.times == 4
    assert gather.caller == "outer_body"
    assert hlo.select(nested, opcode="all-gather", in_loop=False) == []
    assert [e.times for e in hlo.select(nested, dims=(128, 128))] == [4, 4]  # start and done
    (inside,) = hlo.select(nested, opcode="add", dims=(16, 128))
    assert inside.in_fusion
    assert inside.caller == "inner_body"
    assert hlo.select(nested, opcode="add", dims=(16, 128), in_fusion=False) == []


def test_trip_counts(nested: hlo.Module) -> None:
    loops = {e.instruction.name: e for e in hlo.select(nested, opcode="while")}
    for name, count in (("outer", 4), ("inner", 25)):
        loop = loops[name]
        assert hlo.trip_count(nested, loop.computation, loop.instruction) == count
    with pytest.raises(hlo.UnreadableError, match="How often the loop inner"):
        list(hlo.executions(hlo.parse(NESTED.replace("direction=LT", "direction=NE"))))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("bf16", 24), ("pred", 12), ("s4", 6), ("f8e4m3fn", 12), ("token", 0), ("f64", 96)],
)
def test_bytes_by_dtype(dtype: str, expected: float) -> None:
    assert hlo.Shape(dtype, (3, 4)).bytes == expected


def test_no_module() -> None:
    for text in ("nothing of the kind", NESTED[: NESTED.index("ENTRY")], NESTED[:-4]):
        with pytest.raises(hlo.UnreadableError, match="ENTRY"):
            hlo.parse(text)


def test_attributes_over_several_lines(nested: hlo.Module) -> None:
    """As Splash's kernels have them, one line of which begins with the end of a computation."""
    kernel = """  %kernel = (f32[16,128], f32[8]) custom-call(%x), custom_call_target="kernel", \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 640, (\\"is\\": false}"
}}, metadata={op_name="jit(step)/splash"}, backend_config={"body":"a
}
b"}
"""
    module = hlo.parse(NESTED.replace("  %next = ", f"{kernel}  %next = "))
    body = module.computations["inner_body"]
    assert [i.name for i in body.instructions][-4:] == ["one", "kernel", "next", "out"]
    assert body.by_name["kernel"].op_name == "jit(step)/splash"
    assert body.by_name["kernel"].operands == ("x",)
    assert body.by_name["kernel"].bytes == 16 * 128 * 4 + 8 * 4
    assert [e.times for e in hlo.select(module, opcode="custom-call")] == [100]
    others = {name for name in nested.computations if name != "inner_body"}
    assert all(module.computations[name] == nested.computations[name] for name in others)


@pytest.mark.parametrize(
    ("line", "broken"),
    [
        ("  %one = s32[] constant(1)", "  one is a constant"),
        ("  %one = s32[] constant(1)", "  %one = s32[]"),
        ("  %one = s32[] constant(1)", "  %one = words constant(1)"),
        ("  %one = s32[] constant(1)", "}}, metadata={}"),
        ("%branch_a (p: f32[16,128]) -> f32[16,128] {", "branch_a of p:"),
    ],
)
def test_lines_that_are_not_understood(line: str, broken: str) -> None:
    number = NESTED[: NESTED.index(line)].count("\n") + 1
    with pytest.raises(
        hlo.UnreadableError, match=rf"Line {number} .* not understood: .?{broken[:6]}"
    ):
        hlo.parse(NESTED.replace(line, broken, 1))


def test_loops_that_start_elsewhere_and_take_larger_steps() -> None:
    """The counter, its start, its step and its limit through copies, fusions and outer loops."""
    fused = "%plus (p: s32[]) -> s32[] {\n  %p = s32[] parameter(0)\n  %two = s32[] constant(2)\n"
    fused += "  ROOT %sum = s32[] add(%two, %p)\n}\n\n"
    text = NESTED.replace("%inner_body (", fused + "%inner_body (", 1)
    text = text.replace("%next = s32[] add(%i, %one)", "%next = s32[] fusion(%i), calls=%plus")
    text = text.replace("%zero = s32[] constant(0)\n  %from", "%zero = s32[] constant(4)\n  %from")
    module = hlo.parse(text)
    (inner,) = (e for e in hlo.select(module, opcode="while") if e.instruction.name == "inner")
    assert hlo.trip_count(module, inner.computation, inner.instruction) == 11  # 4, 6, … 24


def test_unknown_element_types() -> None:
    with pytest.raises(hlo.UnreadableError, match="unknown element type 'strange'"):
        _ = hlo.Shape("strange", (3,)).bytes


def test_compiled_scan_in_scan() -> None:
    """7 · 3 products, wherever XLA puts them."""

    def inner(x, _):
        return jnp.tanh(x @ x), None

    def outer(x, _):
        x, _ = lax.scan(inner, x, None, length=3)
        return x + 1.0, None

    def program(x):
        return lax.scan(outer, x, None, length=7)[0]

    compiled = jax.jit(program).lower(jnp.zeros((64, 64))).compile()
    module = hlo.parse(compiled.as_text())
    products = [*hlo.select(module, opcode="dot"), *hlo.select(module, opcode="custom-call")]
    assert sum(e.times for e in products) == 21
    assert {e.depth for e in products} == {2}
