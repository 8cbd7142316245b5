"""Bytes between devices: of programs with known transfers, and of every way HLO writes them."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from salt_jax.planning import hlo
from salt_jax.planning.collectives import bytes_by_kind, collectives, groups
from salt_jax.planning.traffic import memory_bytes

DEVICES = 8
ROWS = 16
STEPS = 5
BYTES = ROWS * 128 * 4  # of a device's part


def sent(transfer: Any, groups: int = 1) -> dict[str, float]:
    """Bytes by kind of a program that does a transfer of [ROWS, 128] on each device in a scan."""
    devices = jax.devices()[:DEVICES]
    mesh = jax.make_mesh(
        (groups, DEVICES // groups),
        ("outer", "x"),
        devices=devices,
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
    )

    def body(carry: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jnp.sin(carry) + jnp.sum(transfer(jnp.cos(carry))), None

    def program(x: jax.Array) -> jax.Array:
        return lax.scan(body, x, None, length=STEPS)[0]

    spec = PartitionSpec(("outer", "x"))
    mapped = jax.shard_map(program, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    shape = jax.ShapeDtypeStruct(
        (ROWS * DEVICES, 128),
        jnp.float32,
        sharding=NamedSharding(Mesh(mesh.devices, mesh.axis_names), spec),
    )
    text = jax.jit(mapped).lower(shape).compile().as_text()
    assert text is not None
    return bytes_by_kind(collectives(hlo.parse(text)))


@pytest.mark.parametrize("groups", [1, 2])
def test_compiled_transfers(groups: int) -> None:
    n = DEVICES // groups
    ring = [(i, (i + 1) % n) for i in range(n)]
    cases = {
        "all-reduce": (lambda x: lax.psum(x, "x"), 2 * BYTES * (n - 1) / n),
        "all-gather": (lambda x: lax.all_gather(x, "x"), BYTES * (n - 1)),
        "reduce-scatter": (
            lambda x: lax.psum_scatter(x, "x", tiled=True),
            BYTES * (n - 1) / n,
        ),
        "all-to-all": (
            lambda x: lax.all_to_all(x, "x", 0, 0, tiled=True),
            BYTES * (n - 1) / n,
        ),
        "collective-permute": (lambda x: lax.ppermute(x, "x", ring), BYTES),
    }
    for kind, (transfer, expected) in cases.items():
        assert sent(transfer, groups) == {kind: STEPS * expected}, kind


@pytest.mark.parametrize(
    ("attributes", "size", "first"),
    [
        ("replica_groups={{0,1,2},{3,4,5}}", 3, [0, 1]),
        ("replica_groups=[2,8]<=[16]", 8, [0, 1]),
        ("replica_groups=[16,4]<=[8,8]T(1,0), x=1", 4, [0, 8]),
        ("replica_groups=mesh['axis_0'=1,'axis_1'=16] {'axis_1'}", 16, [0, 1]),
        ("replica_groups=mesh['a'=4,'b'=2,'c'=8] {'a','c'}", 32, [0, 1]),
        ("replica_groups=mesh['a'=4,'b'=2,'c'=8] {'b'}", 2, [0, 8]),
        ("replica_groups=mesh['a'=16] {'a':(2)4}", 4, [0, 2]),
        ("replica_groups=mesh['a'=16] {'a':(1)4}", 4, [0, 4]),
        ("replica_groups=mesh['a'=4,'b'=16], device_ids=([16,4]T(1,0)) {'b'}, x={0}", 16, [0, 4]),
        ("source_target_pairs={{0,8},{1,9}}", 2, [0, 8]),
        ("replica_groups={}", 64, [0, 1]),
        ("channel_id=1", 64, [0, 1]),
    ],
)
def test_groups(attributes: str, size: int, first: list[int]) -> None:
    found = groups(attributes, 64)
    assert found.shape[1] == size
    assert found[0, :2].tolist() == first
    assert len(set(found.ravel().tolist())) == found.size


def test_unknown_groups_are_no_guess() -> None:
    with pytest.raises(hlo.UnreadableError, match=r"something new .* not understood"):
        groups("replica_groups=something new", 64)


def module_of(*lines: str, others: str = "") -> hlo.Module:
    body = "\n".join(f"  {line}" for line in lines)
    return hlo.parse(
        f"HloModule m, num_partitions=4\n\n{others}\nENTRY %main (p: f32[8,128]) -> f32[8,128] {{\n"
        f"  %p = f32[8,128] parameter(0)\n{body}\n  ROOT %r = f32[8,128] copy(%p)\n}}\n"
    )


def test_start_and_done_count_once() -> None:
    (gather,) = collectives(
        module_of(
            "%s = (f32[8,128], f32[32,128]) all-gather-start(%p), replica_groups={{0,1,2,3}}",
            "%d = f32[32,128] all-gather-done(%s)",
        )
    )
    assert gather.sent_bytes == 8 * 128 * 4 * 3
    assert gather.overlaps


def test_generic_async_counts_once() -> None:
    wrapped = (
        "%wrapped (q: f32[8,128]) -> f32[2,128] {\n  %q = f32[8,128] parameter(0)\n"
        "  ROOT %rs = f32[2,128] reduce-scatter(%q), replica_groups=[1,4]<=[4], to_apply=%add\n}\n"
    )
    (scatter,) = collectives(
        module_of(
            "%s = ((f32[8,128]), f32[2,128], s32[]) async-start(%p), calls=%wrapped",
            "%u = ((f32[8,128]), f32[2,128], s32[]) async-update(%s), calls=%wrapped",
            "%d = f32[2,128] async-done(%u), calls=%wrapped",
            others=wrapped,
        )
    )
    assert scatter.kind == "reduce-scatter"
    assert scatter.sent_bytes == 8 * 128 * 4 * 3 / 4
    assert scatter.overlaps


def test_a_transfer_on_a_sparse_core_overlaps() -> None:
    called = (
        "%inner (q: f32[8,128]) -> f32[2,128] {\n  %q = f32[8,128] parameter(0)\n"
        "  ROOT %rs = f32[2,128] reduce-scatter(%q), replica_groups=[1,4]<=[4], to_apply=%add\n}\n"
        "%called (q: f32[8,128], t: token[]) -> f32[2,128] {\n  %t = token[] parameter(1)\n"
        "  %q = f32[8,128] parameter(0)\n"
        "  ROOT %c = f32[2,128] call(%q), to_apply=%inner\n"
        '}, execution_thread="sparsecore"\n'
    )
    module = module_of(
        "%s = ((f32[8,128], token[]), f32[2,128]) call-start(%p, %t), to_apply=%called",
        "%d = f32[2,128] call-done(%s)",
        others=called,
    )
    (scatter,) = collectives(module)
    assert (scatter.kind, scatter.overlaps) == ("reduce-scatter", True)
    assert scatter.sent_bytes == 8 * 128 * 4 * 3 / 4
    copied = 2 * 8 * 128 * 4
    assert memory_bytes(module) - copied == (8 + 2) * 128 * 4


def test_tuples_add_up_and_a_plain_one_waits() -> None:
    (reduce,) = collectives(
        module_of("%a = (f32[8,128], f32[8,128]) all-reduce(%p, %p), replica_groups={{0,1},{2,3}}")
    )
    assert reduce.sent_bytes == 2 * (8 * 128 * 4) * 2 / 2
    assert not reduce.overlaps


@pytest.mark.parametrize(
    ("attributes", "network_bytes"),
    [
        ("all-reduce(%p), replica_groups=[2,2]<=[4]", 0),
        ("all-reduce(%p), replica_groups=[2,2]<=[2,2]T(1,0)", 4096),
        ("all-reduce(%p), replica_groups=[1,4]<=[4]", 2048),
        ("all-to-all(%p), replica_groups=[1,4]<=[4]", 2048),
        ("collective-permute(%p), source_target_pairs={{0,1},{1,0},{2,3},{3,2}}", 0),
        ("collective-permute(%p), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}", 4096),
    ],
)
def test_what_goes_between_two_slices(attributes: str, network_bytes: float) -> None:
    """Of 4,096 bytes on each of four devices, two a slice."""
    (transfer,) = collectives(module_of(f"%a = f32[8,128] {attributes}"), 2)
    assert transfer.network_bytes == network_bytes
    assert transfer.sent_bytes >= network_bytes


def fused_on_tpu(name: str, chain: str, channel: int) -> str:
    return (
        f"%{name} (q: f32[8,128]) -> f32[32,128] {{\n  %q = f32[8,128] parameter(0)\n"
        f"  ROOT %ag = f32[32,128] all-gather(%q), channel_id={channel}, "
        "replica_groups=mesh['axis_0'=4,'axis_1'=1] {'axis_0'}, "
        f'frontend_attributes={{chain_id="{chain}"}}\n}}\n'
    )


def test_a_transfer_sliced_into_fusions_counts_once() -> None:
    others = "\n".join(
        [fused_on_tpu("f1", "0", 7), fused_on_tpu("f2", "0", 7), fused_on_tpu("f3", "1", 8)]
    )
    transfers = collectives(
        module_of(
            *(f"%x{i} = f32[32,128] fusion(%p), kind=kOutput, calls=%f{i}" for i in (1, 2, 3)),
            others=others,
        )
    )
    assert [t.sent_bytes for t in transfers] == [8 * 128 * 4 * 3] * 2
    assert all(t.overlaps for t in transfers)


def test_an_all_reduce_that_keeps_a_part_is_a_reduce_scatter() -> None:
    others = (
        "%all-reduce-scatter.1 (q: f32[8,128]) -> f32[2,128] {\n  %q = f32[8,128] parameter(0)\n"
        "  %ar = f32[8,128] all-reduce(%q), replica_groups=[1,4]<=[4], to_apply=%add\n"
        "  ROOT %ds = f32[2,128] dynamic-slice(%ar), dynamic_slice_sizes={2,128}\n}\n"
    )
    (transfer,) = collectives(
        module_of(
            "%f = f32[2,128] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1", others=others
        )
    )
    assert transfer.kind == "reduce-scatter"
    assert transfer.sent_bytes == 8 * 128 * 4 * 3 / 4


def test_a_gpus_synchronous_start_waits() -> None:
    """Variadic, as a GPU's are; operands and results are in one tuple."""
    start = (
        "%s = ((f32[8,128], f32[8,128]), (f32[32,128], f32[32,128])) all-gather-start(%p, %p), "
        'replica_groups={{0,1,2,3}}, backend_config={"collective_backend_config":{"is_sync":true}}'
    )
    done = "%d = (f32[32,128], f32[32,128]) all-gather-done(%s)"
    (gather,) = collectives(module_of(start, done))
    assert not gather.overlaps
    assert gather.sent_bytes == 2 * 8 * 128 * 4 * 3
    (overlapped,) = collectives(module_of(start.replace("true", "false"), done))
    assert overlapped.overlaps
    copied = 2 * 8 * 128 * 4
    assert memory_bytes(module_of(start, done)) - copied == 2 * (1 + 4) * 8 * 128 * 4
