"""What the host starts of a program, from its sequence of thunks."""

import pytest

from dsjax.plan import launches

# As XLA dumps it, shortened: a loop over steps around one over layers.
HOST_RUNS_LOOPS = """\
000: kCommandBuffer [source       | next=003 (1)]\x20
    001: kCustomKernel [source | sink] loop_broadcast_fusion grid: [1, 1, 1] threads: [16, 1, 1]
    002: kCopy         [source | sink] kCopy
003: kWhile         [prev=000 (1) | next=012 (1)]  \x20
condition:
    004: kCustomKernel [source | sink] loop_compare_fusion grid: [1, 1, 1] threads: [1, 1, 1]
  body:
    000: kCommandBuffer [source       | next=006 (1)]\x20
        005: kCustomKernel [source | sink] few_row_products grid: [84, 1, 1] threads: [128, 1, 1]
    006: kWhile         [prev=000 (1) | next=010 (1)]      \x20
condition:
        007: kCustomKernel [source | sink] loop_compare_fusion_1 grid: [1, 1, 1]
      body:
        000: kCommandBuffer [source | sink]\x20
            008: kCustomKernel [source       | next=009 (1)] latent_attention grid: [1, 1, 4]
        009: kCopy         [prev=008 (1) | sink        ] kCopy
    010: kCustomKernel [prev=006 (1) | next=000 (1)] best_of_row grid: [1, 1, 1]
    000: kCommandBuffer [prev=010 (1) | sink        ]\x20
        011: kCustomKernel [source | sink] loop_select_fusion grid: [1, 1, 1]
012: kCopy          [prev=003 (1) | sink        ] kCopy
"""


def indented(text):
    return "".join(
        line if line.strip() == "condition:" else f"    {line}"
        for line in text.splitlines(keepends=True)
    )


def test_loops_outside_of_command_buffers_are_run_by_the_host():
    program = launches.read(HOST_RUNS_LOOPS)
    assert program[:2] == (1, ("kCopy",))
    (step,) = program.loops
    assert step[:2] == (2, ("best_of_row",))
    (layer,) = step.loops
    assert layer == (1, ("kCopy",), ())
    assert program.starts(16, 5) == 2 + 16 * (3 + 5 * 2)


def test_what_is_in_a_command_buffer_is_one_start():
    whole = "000: kCommandBuffer [source | sink] \n" + indented(HOST_RUNS_LOOPS)
    found = launches.read(whole)
    assert found == (1, (), ()) and found.starts(16, 5) == 1


def test_other_thunks_that_hold_thunks_are_not_counted_silently():
    text = HOST_RUNS_LOOPS.replace("006: kWhile ", "006: kConditional ")
    with pytest.raises(AssertionError, match="kConditional holds thunks"):
        launches.read(text)
