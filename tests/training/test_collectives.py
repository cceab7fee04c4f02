"""Bytes between devices, from the text of programs: by hand, and of a program whose transfers are known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bitnet_jax.training.collectives import Traffic, collectives

TEXT = """HloModule jit_f, entry_computation_layout={()->f32[]}, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(f32[] %a, f32[] %b)
}

%body (x: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = s8[64,32]{1,0} all-gather(%p), channel_id=1, replica_groups=[2,2]<=[4], dimensions={0}, use_global_device_ids=true
  ROOT %r = f32[8]{0} all-reduce(%q), replica_groups={{0,1,2,3}}, to_apply=%add
}

%cond (x: (s32[], f32[8])) -> pred[] {
  ROOT %c = pred[] constant(true)
}

%unused (x: f32[8]) -> f32[8] {
  ROOT %z = f32[8]{0} all-reduce(%x), replica_groups={}, to_apply=%add
}

ENTRY %main (p: f32[8]) -> f32[] {
  %w = (s32[], f32[8]{0}) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %m = (f32[16]{0}, bf16[4]{0}) all-reduce(%a, %b), replica_groups={}, to_apply=%add
  %s = (f32[4]{0}, f32[16]{0}) all-gather-start(%a), replica_groups=[1,4]<=[4], dimensions={0}
  %e = f32[16]{0} all-gather-done(%s)
  %x = f32[2]{0} reduce-scatter(%a), replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %y = f32[6]{0} collective-permute(%a), source_target_pairs={{0,1},{1,0}}
}
"""


def test_transfers_by_hand() -> None:
    assert collectives(TEXT) == {
        ("all-gather", "s8"): Traffic(3, 3 * 64 * 32 / 2),
        ("all-reduce", "f32"): Traffic(4, 3 * 2 * 32 * 3 / 4 + 2 * 64 * 3 / 4),
        ("all-reduce", "bf16"): Traffic(1, 2 * 8 * 3 / 4),
        ("all-gather", "f32"): Traffic(1, 64 * 3 / 4),
        ("reduce-scatter", "f32"): Traffic(1, 8 * 3),
        ("collective-permute", "f32"): Traffic(1, 24),
    }


@pytest.mark.parametrize("rounds", [2, 5])
def test_a_loop_counts_as_often_as_it_goes_round(rounds: int) -> None:
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    cut, whole = NamedSharding(mesh, P(None, "x")), NamedSharding(mesh, P())

    def program(stack: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (x @ jax.lax.with_sharding_constraint(w, whole), None), x, stack)[0]

    spec = jax.ShapeDtypeStruct((rounds, 8, 8), jnp.float32, sharding=cut), jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=whole)
    found = collectives(jax.jit(program, out_shardings=whole).lower(*spec).compile().as_text())
    assert found == {("all-gather", "f32"): Traffic(rounds, rounds * 8 * 8 * 4 / 2)}


TPU = """\
HloModule jit_step, num_partitions=8

%condition (state: (s32[])) -> pred[] {
  %constant.4 = s32[]{:T(128)} constant(4)
  %counter = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %lt = pred[]{:T(512)} compare(%counter, %constant.4), direction=LT
}

%async_collective_fusion.1 (p: u8[64,64]) -> u8[64,256] {
  %all-gather.2 = u8[64,256]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={1}
}

%fused_computation.1 (p: u8[64,64]) -> u8[64,256] {
  %all-gather.1 = u8[64,256]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={1}
}

%all-reduce-scatter.1 (g: f32[64,64]) -> f32[16,64] {
  %all-reduce.1 = (f32[64,64]{1,0}, f32[8]{0}, /*index=2*/f32[8]{0}) all-reduce(%g), replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}
}

%body (state: (s32[])) -> (s32[]) {
  %begin = u8[64,256]{1,0} fusion(%p), kind=kCustom, calls=%fused_computation.1
  %beside = u8[64,256]{1,0} fusion(%begin), kind=kCustom, calls=%async_collective_fusion.1
  %scattered = f32[16,64]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
}

ENTRY %main (p: u8[64,64]) -> u8[64,256] {
  %while = (s32[]{:T(128)}) while(%start), condition=%condition, body=%body
  %sum = f32[16]{0} all-reduce(%x), channel_id=2, replica_groups=mesh['data'=2,'fsdp'=4] {'data','fsdp':(1)2}
}
"""


def test_what_libtpu_writes_is_counted_as_it_runs():
    found = collectives(TPU)
    assert found["all-gather", "u8"] == (4, 4 * 0.75 * 64 * 256)  # once a round, though it is written in two fusions
    assert found["reduce-scatter", "f32"] == (12, 4 * 0.75 * 4 * (64 * 64 + 8 + 8))
    assert found["all-reduce", "f32"] == (1, 2 * 0.75 * 4 * 16)
