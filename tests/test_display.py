"""What runs and conversions show on a terminal and in a file."""

import io
import re
import time

import pytest
from rich.console import Console

from dsjax import display
from dsjax.display import Display, Transfer, duration, size


def test_transfer_draws_a_bar_with_rate_and_time_left():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Transfer(console) as transfer:
        transfer.begin("importing", 4_000_000, 1_000_000)
        transfer.advance(500_000)
        time.sleep(0.01)
        transfer.advance(500_000)
        transfer._bar.refresh()
        drawn = console.file.getvalue()
    assert "importing" in drawn and "2.0/4.0 MB" in drawn and re.search(r"\d MB/s", drawn)
    assert re.search(r"0:00:\d\d", drawn)


def test_transfer_writes_a_line_now_and_then_where_there_is_no_terminal(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=40)
    with Transfer(console) as transfer:
        transfer.begin("importing", 10_000_000_000, 1_000_000_000)
        for _ in range(4):
            now[0] += 20
            transfer.advance(1_000_000_000)
        transfer.say("[done]")
    assert console.file.getvalue().splitlines() == [
        "importing: 3 GB of 10 GB, 50 MB/s, 140 s left",
        "importing: 5 GB of 10 GB, 50 MB/s, 100 s left",
        "[done]",
    ]


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 KB"),
        (99_949, "99.9 KB"),
        (999_499, "999 KB"),
        (999_500, "1 MB"),
        (688_586_727_753, "689 GB"),
        (1_310_000_000_000, "1.31 TB"),
        (2.5e18, "2500000 TB"),
    ],
)
def test_size_has_three_digits(n_bytes, text):
    assert size(n_bytes) == text


def test_display_logs_one_plain_line_without_a_terminal():
    output = io.StringIO()
    with Display(Console(file=output, width=200)) as display:
        display.start_steps(0, 8)
        display.log(4, "loss 2.5", "loss 2.5000  mtp 2.7500", 2.0)
    assert output.getvalue() == "step 4/8  loss 2.5000  mtp 2.7500  eta 0:08\n"


def test_display_shows_a_bar_on_a_terminal():
    output = io.StringIO()
    with Display(Console(file=output, width=120, force_terminal=True)) as display:
        display.start_steps(2, 8)
        display.start_steps(0, 8)
        display.step(4)
        display.log(4, "loss 2.500  4,096 tokens/s", "in full", 2.0)
    drawn = output.getvalue()
    assert "4/8" in drawn and "loss 2.500  4,096 tokens/s" in drawn and "in full" not in drawn


def test_display_counts_in_quarters_without_a_terminal():
    output = io.StringIO()
    with Display(Console(file=output)) as display:
        show = display.counting("tokenizing")
        for done in range(0, 101, 5):
            show(done, 100)
    assert output.getvalue().split() == [
        word for n in (0, 25, 50, 75, 100) for word in ("tokenizing:", f"{n}%")
    ]


def test_display_counts_with_a_bar_that_goes_when_it_is_full():
    output = io.StringIO()
    with Display(Console(file=output, width=80, force_terminal=True)) as display:
        show = display.counting("tokenizing")
        show(50, 100)
        show(100, 100)
        display.start_steps(2, 8)
    drawn = output.getvalue()
    assert "tokenizing" in drawn and drawn.rindex("2/8") > drawn.rindex("tokenizing")


@pytest.mark.parametrize(("seconds", "text"), [(3725.0, "1:02:05"), (59.6, "1:00"), (5, "0:05")])
def test_duration_reads_as_a_clock(seconds, text):
    assert duration(seconds) == text


def test_work_of_unknown_length_is_a_line_or_on_a_terminal_a_spinner_that_goes():
    output = io.StringIO()
    with Display(Console(file=output)) as display, display.working("compiling"):
        assert output.getvalue() == "compiling\n"
    output = io.StringIO()
    with Display(Console(file=output, width=80, force_terminal=True)) as display:
        with display.working("compiling"):
            time.sleep(0.25)
        display.start_steps(2, 8)
        with display.working("compiling again"):  # the steps keep their bar
            pass
        display.step(5)
    drawn = output.getvalue()
    assert drawn.count("compiling") > 2 and "0:00:00" in drawn and "5/8" in drawn
