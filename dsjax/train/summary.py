"""The end of a run: its results, next to what compressors reach on the same held-out text."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console

from dsjax import tables
from dsjax.display import duration

LARGEST_TEXT = 32 << 20  # bytes, for which xz takes a minute


def compressed_bits_per_byte(texts: Iterable[str]) -> dict[str, float]:
    """Returns the bits per byte of gzip -9 on each text alone, and of xz -9 on all concatenated.

    The result is empty for no text, and for more than LARGEST_TEXT.
    """
    raw: list[bytes] = []
    size = 0
    for text in texts:
        raw.append(text.encode("utf-8"))
        size += len(raw[-1])
        if size > LARGEST_TEXT:
            return {}
    if not size:
        return {}
    alone = sum(len(gzip.compress(data, 9)) for data in raw)
    together = len(lzma.compress(b"".join(raw), preset=9))
    return {"gzip_bits_per_byte": 8 * alone / size, "xz_bits_per_byte": 8 * together / size}


def print_summary(console: Console, summary: Mapping[str, Any]) -> None:
    """Prints a summary.json as a table, and its sample."""
    title = f"{summary['name']}: {summary['steps']} steps"
    console.print(tables.figures(title, _rows(summary)))
    sample = summary.get("sample")
    if sample:
        console.print("A sample, after [...] written by the model", highlight=False)
        console.print(
            f"{sample['prompt']}[...]{sample['completion']}", markup=False, highlight=False
        )


def _rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    against = [
        f"{name} {summary[f'{name}_bits_per_byte']:.3f}"
        for name in ("gzip", "xz")
        if f"{name}_bits_per_byte" in summary
    ]
    compared = f"  ({', '.join(against)}, on the same text)" if against else ""
    violation = [f"{summary[f'max_violation_{when}']:.2f}" for when in ("first", "last")]
    compiling = f"{summary['compile_seconds']:.0f} s of it compiling"
    heldout = []
    if summary["eval_loss"] is not None:  # None without held-out data
        heldout = [
            ("held-out loss", f"{summary['eval_loss']:.4f} nats per token"),
            ("held-out bits per byte", f"{summary['bits_per_byte']:.3f}{compared}"),
        ]
    mtp = f", MTP {summary['mtp_loss']:.4f}" if summary["mtp_loss"] else ""
    rows = [
        *heldout,
        ("training loss", f"{summary['loss']:.4f}{mtp}"),
        ("max violation", " -> ".join(violation)),
        ("tokens", f"{summary['tokens']:,}"),
        ("wall time", f"{duration(summary['wall_seconds'])}, {compiling}"),
    ]
    if summary["tokens_per_second"] is not None:  # None after the checkpoint of an older version
        rows += [
            ("median step", f"{summary['median_step_seconds']:.3f} s"),
            ("tokens per second", f"{summary['tokens_per_second']:,.0f}"),
            ("MFU", f"{100 * summary['mfu']:.1f} % of {summary['peak']}"),
        ]
    return rows
