"""Kernels of a program's text: what starts one, what it moves, what waits for the host."""

import pytest

from dsjax.plan import kernels

# As the GPU compiler prints it, shortened: a loop of unknown length around one over layers, which
# reads a layer of a stack, writes a row of a cache and calls a kernel; then one of two branches.
TEXT = """\
HloModule jit_decode, is_scheduled=true

%sum (x: f32[], y: f32[]) -> f32[] {
  ROOT %add = f32[] add(%x, %y)
}

%reads_a_layer (stack: bf16[15,64,32], i: s32[]) -> bf16[32] {
  %stack = bf16[15,64,32]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,64,32]{2,1,0} dynamic-slice(%stack, %i, %zero, %zero), \
dynamic_slice_sizes={1,64,32}
  %matrix = bf16[64,32]{1,0} bitcast(%slice)
  ROOT %reduce = bf16[32]{0} reduce(%matrix, %zero), dimensions={0}, to_apply=%sum
}

%writes_a_row (cache: bf16[256,32], row: bf16[1,32], i: s32[]) -> bf16[256,32] {
  %cache = bf16[256,32]{1,0} parameter(0)
  %row = bf16[1,32]{1,0} parameter(1)
  %i.1 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %update = bf16[256,32]{1,0} dynamic-update-slice(%cache, %row, %i.1, %zero.1)
}

%condition (t: (s32[], bf16[256,32])) -> pred[] {
  %t = (s32[], bf16[256,32]{1,0}) parameter(0)
  ROOT %fewer = pred[] fusion(%t), kind=kLoop, calls=%sum_of_two
}

%sum_of_two (a: f32[4]) -> pred[] {
  %a = f32[4]{0} parameter(0)
  ROOT %less = pred[] compare(%a, %a), direction=LT
}

%layer_condition (t: s32[]) -> pred[] {
  %t.1 = s32[] parameter(0)
  ROOT %fewer.1 = pred[] compare(%t.1, %t.1), direction=LT
}

%layer (t: (s32[], bf16[256,32])) -> (s32[], bf16[256,32]) {
  %t.2 = (s32[], bf16[15,64,32]{2,1,0}, bf16[256,32]{1,0}) parameter(0)
  %index = s32[] get-tuple-element(%t.2), index=0
  %weights = bf16[15,64,32]{2,1,0} get-tuple-element(%t.2), index=1
  %entries = bf16[256,32]{1,0} get-tuple-element(%t.2), index=2
  %row.1 = bf16[32]{0} fusion(%weights, %index), kind=kInput, calls=%reads_a_layer, \
metadata={op_name="jit(decode)/while/body/norm/dot_general"}
  %row.2 = bf16[1,32]{1,0} bitcast(%row.1)
  %entries.1 = bf16[256,32]{1,0} fusion(%entries, %row.2, /*index=2*/%index), kind=kLoop, \
calls=%writes_a_row
  %out = bf16[1,32]{1,0} custom-call(%row.2), custom_call_target="mosaic_gpu_v2"
  ROOT %next = (s32[], bf16[256,32]{1,0}) tuple(%index, %entries.1)
}

%short (p: f32[4]) -> f32[4] {
  %p.1 = f32[4]{0} parameter(0)
  ROOT %copy.1 = f32[4]{0} copy(%p.1)
}

%long (p: f32[4]) -> f32[4] {
  %p.2 = f32[4]{0} parameter(0)
  %sort = f32[4]{0} sort(%p.2), dimensions={0}, to_apply=%sum
  %sort.1 = f32[4]{0} sort(%sort), dimensions={0}, to_apply=%sum
  ROOT %w = f32[4]{0} while(%sort.1), condition=%condition, body=%short
}

%token (t: (s32[], bf16[256,32])) -> (s32[], bf16[256,32]) {
  %t.3 = (s32[], bf16[256,32]{1,0}) parameter(0)
  %layers = (s32[], bf16[256,32]{1,0}) while(%t.3), condition=%layer_condition, body=%layer, \
backend_config={"known_trip_count":{"n":"15"},"known_init_step":{"init":"0","step":"1"}}
  ROOT %drawn = f32[4]{0} conditional(%t.3, %t.3, %t.3), branch_computations={%long, %short}
}

ENTRY %main (p: (s32[], bf16[256,32])) -> (s32[], bf16[256,32]) {
  %p = (s32[], bf16[256,32]{1,0}) parameter(0)
  ROOT %tokens = (s32[], bf16[256,32]{1,0}) while(%p), condition=%condition, body=%token
}
"""
ROW = 32 * 2  # bytes


@pytest.fixture
def token():
    (tokens,) = kernels.read(TEXT).loops
    assert tokens.trips is None
    return tokens.body


def test_loop_of_known_length_runs_its_body_alone(token):
    (layers,) = token.loops
    assert layers.trips == 15
    assert [each.operation for each in layers.body.kernels] == ["fusion", "fusion", "mosaic_gpu_v2"]
    # 15 layers of 3, the outer loop's condition, and the shorter branch's copy.
    assert token.starts == 15 * 3 + 1 + 1


def test_kernel_counts_the_layer_that_it_reads_and_the_row_that_it_writes(token):
    reads, writes, call = token.loops[0].body.kernels
    assert reads.bytes == 64 * ROW + ROW + 4  # and the layer's number
    assert writes.bytes == ROW + ROW + 4
    assert call.bytes == 2 * ROW
    assert reads.scope.endswith("norm/dot_general")
    condition = 4 + 256 * ROW + 1  # the loop's state and the decision
    assert token.bytes == 15 * sum(k.bytes for k in (reads, writes, call)) + condition + 2 * 4 * 4


def test_host_is_waited_for_where_it_decides(token):
    assert token.waits == 1  # the conditional, whose shorter branch has no loop
    assert [part.waits for part in token.conditionals[0]] == [1, 0]


def test_branch_that_starts_more_kernels_is_not_counted(token):
    longer, shorter = token.conditionals[0]
    assert longer.starts > shorter.starts
    assert kernels.shortest(token.conditionals[0]) is shorter


def test_operand_that_is_read_whole_and_in_part_counts_once():
    text = TEXT.replace(
        "  ROOT %reduce = bf16[32]{0} reduce(%matrix, %zero)",
        "  %all = bf16[32]{0} reduce(%stack, %zero), to_apply=%sum\n"
        "  ROOT %reduce = bf16[32]{0} reduce(%matrix, %all)",
    )
    reads = kernels.read(text).loops[0].body.loops[0].body.kernels[0]
    assert reads.bytes == 15 * 64 * ROW + ROW + 4


def test_call_of_a_kernel_reads_the_portion_that_it_is_said_to():
    text = TEXT.replace("custom-call(%row.2)", "custom-call(%row.2, %weights)")
    for portions, layers in ((None, 15), ({15: 1}, 1)):
        call = kernels.read(text, portions).loops[0].body.loops[0].body.kernels[2]
        assert call.bytes == 2 * ROW + layers * 64 * ROW


def test_what_a_call_changes_in_place_is_left_out():
    in_place = (
        "%out = (bf16[1,32]{1,0}, bf16[256,32]{1,0}) custom-call(%row.2, %entries), "
        'custom_call_target="t", output_to_operand_aliasing={{1}: (1, {})}'
    )
    line = next(line for line in TEXT.splitlines() if "custom-call" in line)
    call = kernels.read(TEXT.replace(line, f"  {in_place}")).loops[0].body.loops[0].body.kernels[2]
    assert call.bytes == 2 * ROW
