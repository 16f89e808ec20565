"""The baselines of the summary, and its table."""

import gzip
import io
import lzma

import pytest
from rich.console import Console

from dsjax.train import summary

SUMMARY = {
    "name": "tiny",
    "steps": 300,
    "tokens": 1_228_800,
    "loss": 2.1,
    "mtp_loss": 2.6,
    "eval_loss": 2.2345,
    "bits_per_byte": 1.7654,
    "gzip_bits_per_byte": 2.1,
    "xz_bits_per_byte": 1.6,
    "max_violation_first": 2.0,
    "max_violation_last": 0.4,
    "wall_seconds": 400.0,
    "compile_seconds": 20.0,
    "median_step_seconds": 1.25,
    "tokens_per_second": 3276.8,
    "mfu": 0.31,
    "peak": "a measured matrix product",
    "sample": {"prompt": "def f(", "completion": "x): [red]"},
}


def test_compressors_are_applied_as_named():
    texts = ["the same text over and over " * 20, "\u00e9" * 300]
    raw = [text.encode() for text in texts]
    size = sum(map(len, raw))
    got = summary.compressed_bits_per_byte(texts)
    assert got["gzip_bits_per_byte"] == pytest.approx(
        8 * sum(len(gzip.compress(r, 9)) for r in raw) / size
    )
    assert got["xz_bits_per_byte"] == pytest.approx(
        8 * len(lzma.compress(b"".join(raw), preset=9)) / size
    )


def test_compressors_skip_what_is_too_large(monkeypatch):
    monkeypatch.setattr(summary, "LARGEST_TEXT", 10)
    assert summary.compressed_bits_per_byte(["12345678901"]) == {}
    assert summary.compressed_bits_per_byte([]) == {}


def test_table_shows_the_result_beside_the_compressors():
    output = io.StringIO()
    summary.print_summary(Console(file=output, width=120), SUMMARY)
    for part in (
        "1.765  (gzip 2.100, xz 1.600, on the same text)",
        "2.2345 nats per token",
        "2.00 -> 0.40",
        "3,277",
        "31.0 %",
        "def f([...]x): [red]",
    ):
        assert part in output.getvalue()


def test_table_of_a_run_that_had_nothing_left_to_do_has_no_rates():
    output = io.StringIO()
    idle = SUMMARY | {
        "tokens_per_second": None,
        "mfu": None,
        "median_step_seconds": None,
        "sample": None,
    }
    summary.print_summary(Console(file=output, width=120), idle)
    assert "tokens per second" not in output.getvalue() and "Sample" not in output.getvalue()


def test_table_leaves_out_what_was_not_measured():
    output = io.StringIO()
    bare = SUMMARY | {"eval_loss": None, "bits_per_byte": None, "mtp_loss": None}
    summary.print_summary(Console(file=output, width=120), bare)
    assert "held-out" not in output.getvalue() and "MTP" not in output.getvalue()
    assert "2.1000" in output.getvalue()
