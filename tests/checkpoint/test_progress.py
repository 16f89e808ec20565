"""What a conversion shows on a terminal and in a file."""

import io
import re
import time

import pytest
from rich.console import Console

from dsjax.checkpoint import progress
from dsjax.checkpoint.progress import Transfer, size


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
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
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
