"""Reading compiled HLO: kinds, bytes, axes, and how often loops run them; and the roofline's arithmetic."""

import pytest
from jax.sharding import AbstractMesh

from research.errors import UserError
from research.report.collectives import _groups, axes_of, by_axes, collectives, summary
from research.report.roofline import CHIPS, predict

MESH = AbstractMesh((2, 4), ("data", "tensor"))

HLO = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %s = f32[] add(%a, %b)
}

%b.7 (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %g = f32[8,64]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={1}
  %c = f32[8,16]{1,0} collective-permute(%x), channel_id=2, source_target_pairs={{0,4},{4,0}}
  ROOT %t = (s32[], f32[8,16]) tuple(%i, %c)
}

%c.7 (p: (s32[], f32[8,16])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main.9 (x: f32[8,16]) -> f32[8,16] {
  %x = f32[8,16]{1,0} parameter(0)
  %w = (s32[], f32[8,16]{1,0}) while(%init), condition=%c.7, body=%b.7, backend_config={"known_trip_count":{"n":"12"}}
  %r = (f32[32]{0}, bf16[4,4]{1,0}) all-reduce(%a, %b), channel_id=3, replica_groups={{0,4},{1,5},{2,6},{3,7}}
  %q = f32[2,8]{1,0} reduce-scatter(%r2), channel_id=4, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}, to_apply=%add
  ROOT %e = f32[] all-reduce(%z), channel_id=5, replica_groups={}, to_apply=%add
}
"""


def test_kinds_axes_bytes_and_times():
    found = {c.kind + "/" + "+".join(c.axes): c for c in collectives(HLO, MESH)}
    assert set(found) == {
        "all-gather/tensor",
        "collective-permute/data",
        "all-reduce/data",
        "reduce-scatter/data",
        "all-reduce/data+tensor",
    }
    gather, reduce = found["all-gather/tensor"], found["all-reduce/data"]
    assert (gather.times, gather.group, gather.bytes) == (12, 4, 8 * 64 * 4)
    assert (reduce.times, reduce.group, reduce.bytes) == (1, 2, 32 * 4 + 16 * 2)
    assert found["collective-permute/data"].times == 12 and found["all-reduce/data+tensor"].group == 8


def test_what_is_sent_follows_the_ring():
    found = {c.kind + "/" + "+".join(c.axes): c for c in collectives(HLO, MESH)}
    assert found["all-gather/tensor"].sent == 8 * 64 * 4 * 3 / 4
    assert found["all-reduce/data"].sent == (32 * 4 + 16 * 2) * 2 * 1 / 2
    assert found["reduce-scatter/data"].sent == 2 * 8 * 4
    along = by_axes(collectives(HLO, MESH))
    assert along["tensor",] == 12 * 8 * 64 * 4 * 3 / 4
    assert along["data",] == 12 * 8 * 16 * 4 + 160 + 64


def test_summary_is_what_files_hold():
    assert summary(collectives(HLO, MESH))["all-gather over tensor: f32[8,64]"] == 12


def test_axes_of_groups_that_span_both():
    assert axes_of([[0, 5]], MESH) == ("data", "tensor") and axes_of([[0, 1, 2, 3]], MESH) == ("tensor",)
    assert axes_of([], MESH) == ("data", "tensor") and axes_of([[0, 1]], None) == ("all",)


def test_prediction_takes_the_longest_part():
    p = predict("h100", flops=989e12 * 0.5, memory_bytes=3350e9 * 0.1, sent={False: 450e9 * 0.2, True: 50e9 * 0.1})
    assert (p.compute_s, p.memory_s, p.links_s) == pytest.approx((0.5, 0.1, 0.3))
    assert p.hidden_s == pytest.approx(0.5) and p.exposed_s == pytest.approx(0.8) and p.bound == "compute"
    assert p.mfu(p.hidden_s) == pytest.approx(1.0) and p.mfu(1.0) == pytest.approx(0.5)
    with pytest.raises(UserError, match="unknown chip 'tpu_v9'; valid: tpu_v5e"):
        predict("tpu_v9", flops=1, memory_bytes=1, sent={})
    assert all(c.source for c in CHIPS.values())


@pytest.mark.parametrize(
    "text, groups",
    [
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ],
)
def test_groups_by_the_axes_of_a_mesh(text, groups):
    assert (
        _groups(
            f"%g = f32[8] all-gather(%x), channel_id=1, replica_groups={text}, dimensions={{0}}, "
            "use_global_device_ids=true"
        )
        == groups
    )


def test_groups_of_an_unknown_implementation_are_not_taken_for_all():
    with pytest.raises(ValueError, match="unknown implementation"):
        _groups("%g = f32[8] all-gather(%x), replica_groups=torus(3), dimensions={0}")
