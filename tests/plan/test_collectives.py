"""Collectives of a program's text: kinds, groups in every spelling, loops, pieces that repeat."""

import pytest

from dsjax.plan import collectives
from dsjax.plan.collectives import Collective

# As the TPU compiler prints it, shortened: a loop of 58 trips whose gather is cut into a start, a
# piece that overlaps with a product, and an end; a conditional; and the rest in the entry.
TEXT = """\
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%start (p: bf16[256,4096]) -> bf16[4096,4096] {
  %all-gather.1 = bf16[4096,4096]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=7, \
replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_0','axis_1'}, dimensions={0}, \
frontend_attributes={chain_id="16"}
  ROOT %custom-call = bf16[4096,4096] custom-call(%all-gather.1)
}

%overlap (p: bf16[256,4096]) -> bf16[4096,4096] {
  ROOT %all-gather.2 = bf16[4096,4096]{1,0} all-gather(%p), channel_id=7, \
replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_0','axis_1'}, dimensions={0}, \
frontend_attributes={chain_id="16"}
}

%condition (t: (s32[], bf16[8])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(58)
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.3), direction=LT
}

%body (t: (s32[], bf16[8])) -> (s32[], bf16[8]) {
  %fusion.1 = bf16[4096,4096]{1,0} fusion(%p), kind=kCustom, calls=%start
  %fusion.2 = bf16[4096,4096]{1,0} fusion(%p), kind=kCustom, calls=%overlap
  %all-reduce.1 = f32[1024]{0:T(1024)} all-reduce(%q), channel_id=8, \
replica_groups=[4,4]<=[16], to_apply=%add
}

%never (p: f32[8]) -> f32[8] {
  ROOT %all-to-all.9 = f32[8]{0} all-to-all(%p), channel_id=20, replica_groups={{0,1}}
}

%all-reduce-scatter.1 (p: f32[400]) -> f32[100] {
  %all-reduce.2 = f32[400]{0} all-reduce(%p), channel_id=12, replica_groups={{0,1,2,3}}, \
to_apply=%add
  ROOT %dynamic-slice.1 = f32[100]{0} dynamic-slice(%all-reduce.2, %i), dynamic_slice_sizes={100}
}

%elsewhere.1 (p: f32[8]) -> f32[8] {
  ROOT %all-to-all.2 = f32[8]{0} all-to-all(%p), channel_id=1, replica_groups={{0,1}}
}

%elsewhere.2 (p: f32[8]) -> f32[8] {
  ROOT %all-to-all.3 = f32[8]{0} all-to-all(%p), channel_id=1, replica_groups={{0,1}}
}

%seldom (p: f32[8]) -> f32[8] {
  ROOT %copy.1 = f32[8]{0} copy(%p)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %while.1 = (s32[], bf16[8]) while(%tuple), condition=%condition, body=%body
  %c = f32[8]{0} conditional(%i, %p, %p), branch_computations={%seldom, %never}
  %fusion.3 = f32[100]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  %custom-call.1 = f32[8]{0} custom-call(%p), called_computations={%elsewhere.1}
  %custom-call.2 = f32[8]{0} custom-call(%p), called_computations={%elsewhere.2}
  %reduce-scatter.1 = f32[100]{0} reduce-scatter(%p), channel_id=9, replica_groups={{0,1,2,3}}
  %collective-permute-start.1 = (bf16[64]{0}, bf16[64]{0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%p), channel_id=10, source_target_pairs={{0,1},{1,0}}
  %room = bf16[32,4]{1,0} parameter(1)
  %rows = bf16[16,4]{1,0} parameter(2)
  %ragged_all_to_all.1 = bf16[32,4]{1,0} ragged-all-to-all(%rows, %room, %a, %b, %c, %d), \
channel_id=1, replica_groups={{0,1},{2,3}}, metadata={op_name="there" stack_frame_id=3}
  %ragged_all_to_all.2 = bf16[32,4]{1,0} ragged-all-to-all(%rows, %room, %a, %b, %c, %d), \
channel_id=1, replica_groups={{0,1},{2,3}}, metadata={op_name="back" stack_frame_id=4}
  %all-to-all.1 = (bf16[16]{0}, bf16[16]{0}) all-to-all(%p, %p), channel_id=11, \
replica_groups={{0,1},{2,3}}
}
"""


def test_collectives_are_added_up_by_kind():
    assert collectives.parse(TEXT) == [
        Collective("all-gather", 58, 58 * 4096 * 4096 * 2 * 15 // 16),
        Collective("all-reduce", 58, 58 * 1024 * 4 * 2 * 3 // 4),
        Collective("reduce-scatter", 2, 2 * 100 * 4 * 3),
        Collective("ragged-all-to-all", 2, 2 * 16 * 4 * 2 // 2),
        Collective("all-to-all", 3, 2 * 16 * 2 // 2 + 2 * 8 * 4 // 2),
        Collective("collective-permute", 1, 64 * 2),
    ]


def test_loop_takes_the_trip_count_that_the_compiler_names():
    named = TEXT.replace(
        "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}'
    ).replace("direction=LT", "direction=NE")
    assert collectives.parse(named)[0].calls == 3


def test_loop_of_unknown_length_counts_once():
    unknown = TEXT.replace("direction=LT", "direction=NE")
    assert collectives.parse(unknown)[0].calls == 1


@pytest.mark.parametrize("text", ["", "HloModule empty\n\nENTRY %main () -> f32[] {\n}\n"])
def test_program_without_collectives_has_none(text):
    assert collectives.parse(text) == []
