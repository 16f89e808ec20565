"""What a compiled program sends between devices, read from its text.

The text is the compiler's (HLO after optimisation): computations, each a list of instructions, some
of which run other computations, a loop's body as often as its condition says. Four details:

* The compiler splits a collective into a chain of steps that overlap with other work, each of which
  is printed as the whole; a chain counts once.
* A ragged exchange counts as if the smaller of its two arrays were full.
* A TPU's reduce-scatter is a computation of its own whose all-reduce and slice count as one.
* Of a conditional's branches the one that sends least counts, as under an even load of the experts.
"""

from __future__ import annotations

import functools
import math
import re
from collections import defaultdict
from typing import NamedTuple

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "ragged-all-to-all", "all-to-all",
    "collective-permute",
)  # fmt: skip

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|called_computations)=\{?%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)")
_CHAIN = re.compile(r'chain_id="(\d+)"')
_ARRAY = re.compile(r"\b(pred|bf16|f8\w+|[suf]\d+)\[([\d,]*)\]")
_COUNTER = re.compile(r"constant\((\d+)\)")


class Collective(NamedTuple):
    """All collectives of one kind in one run of the program."""

    kind: str
    calls: int
    bytes: int  # sent per device


def parse(text: str) -> list[Collective]:
    """Adds up a program's collectives by kind, without those that never run."""
    computations, entry = _computations(text)
    runs = _runs(computations, entry)
    counts: dict[str, int] = defaultdict(int)
    sent: dict[str, int] = defaultdict(int)
    chains: set[str] = set()
    for name, lines in computations.items():
        for line in lines:
            match = _COLLECTIVE.search(line)
            if not match or not runs[name]:
                continue
            result, kind = match[1], match[2]
            chain = _CHAIN.search(line)
            if chain:
                if chain[1] in chains:
                    continue
                chains.add(chain[1])
            size, group = _result_bytes(result, started="-start(" in line), _group_size(line)
            if name.startswith("all-reduce-scatter"):
                kind, size = "reduce-scatter", size // group
            if kind == "ragged-all-to-all":
                size = min(size, _operand_bytes(line, lines))
            counts[kind] += runs[name]
            sent[kind] += runs[name] * _bytes_sent(kind, size, group)
    return [Collective(kind, counts[kind], sent[kind]) for kind in KINDS if counts[kind]]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            current = computations.setdefault(start[1], [])
            if line.startswith("ENTRY"):
                entry = start[1]
        elif current is not None:
            current.append(line)
    return computations, entry


def _runs(computations: dict[str, list[str]], entry: str) -> dict[str, int]:
    """Counts how often each computation runs."""
    runs: dict[str, int] = defaultdict(int)

    @functools.cache
    def sends(name: str) -> int:
        """Counts the collectives in a computation and in what it calls."""
        lines = computations.get(name, ())
        inside = sum(sends(called) for line in lines for called in _CALLED.findall(line))
        return inside + sum(bool(_COLLECTIVE.search(line)) for line in lines)

    def visit(name: str, times: int) -> None:
        runs[name] += times
        for line in computations.get(name, ()):
            condition = re.search(r"\bcondition=%?([\w.\-]+)", line)
            inner = times * (_trips(line, computations.get(condition[1], [])) if condition else 1)
            for called in _CALLED.findall(line):
                visit(called, inner)
            branches = [
                branch.strip().lstrip("%")
                for listed, single in _BRANCHES.findall(line)
                for branch in (listed.split(",") if listed else [single])
            ]
            if branches:  # the even load's is the one that sends least
                visit(min(branches, key=sends), times)

    visit(entry, 1)
    return runs


def _trips(line: str, condition: list[str]) -> int:
    """Returns a loop's trips: the number that its condition compares with, 1 if it has none."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
    if known:
        return int(known[1])
    constants = [int(match[1]) for match in map(_COUNTER.search, condition) if match]
    less = any("direction=LT" in line for line in condition)
    return constants[0] if less and len(constants) == 1 else 1


def _result_bytes(result: str, *, started: bool) -> int:
    sizes = [
        math.prod(int(size) for size in shape.split(",") if size) * _item_bytes(dtype)
        for dtype, shape in _ARRAY.findall(result)
    ]
    if started and result.startswith("("):
        # The tuple of an asynchronous start: operands, then results, then counters.
        arrays = [size for size in sizes if size > 8]
        sizes = arrays[len(arrays) // 2 :]
    return sum(sizes)


def _operand_bytes(line: str, computation: list[str]) -> int:
    """Returns the first operand's size, from the line that defines it."""
    name = re.search(r"\((%[\w.\-]+)", line[line.index(" = ") :].partition("all-to-all")[2])
    if name is None:
        return 2**62
    for other in computation:
        if f"{name[1]} = " in other:
            return _result_bytes(other.partition(" = ")[2].partition("(")[0], started=False)
    return 2**62


def _bytes_sent(kind: str, size: int, group: int) -> int:
    """Returns what one device sends in one collective with a result of `size` bytes, by rings."""
    if kind == "collective-permute":
        return size
    if kind == "reduce-scatter":
        return size * (group - 1)
    return size * (group - 1) * (2 if kind == "all-reduce" else 1) // group


def _item_bytes(dtype: str) -> int:
    if dtype == "pred":
        return 1
    digits = re.search(r"\d+", dtype)
    return max(int(digits[0]) // 8, 1) if digits else 1


def _group_size(line: str) -> int:
    """Returns the number of devices that take part in one collective together."""
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)
    if named:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", named[2]))
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    if iota:
        return int(iota[1])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return len(listed[1].split(",")) if listed else 1
