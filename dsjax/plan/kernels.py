"""The kernels that a GPU starts to run a compiled program, and the bytes that they move, read from
the compiler's text (HLO after optimisation).

Every instruction that computes is a kernel of its own: fusions, copies, sorts and calls of kernels;
all others only name what is there already. A loop of known length runs without the host. A loop of
unknown length and a conditional wait for the host to read what decides.

Bytes are those of operands and results. Of what a kernel reads or overwrites only a part of, such
as a layer of a stack, the part counts. The text does not say so of the calls of kernels that are
not the compiler's own: see `read`; what they change in place does not count.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<result>.*?) (?P<operation>[a-z][\w\-]*)\("
    r"(?P<operands>[^)]*)\)(?P<rest>.*)$"
)
_ARRAY = re.compile(r"\b(pred|bf16|f8\w+|c\d+|[suf]\d+)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_IN_PLACE = re.compile(r"\{\d*\}: \((\d+), \{\}")  # the operand that a result lies in
_SCOPE = re.compile(r'op_name="([^"]*)"')

_NAMES_ONLY = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "optimization-barrier",
}  # fmt: skip
_READS_ITS_RESULT = {"dynamic-slice", "slice", "gather"}
_OVERWRITES = {"dynamic-update-slice": 1, "scatter": 2}  # the operand that is written


class Kernel(NamedTuple):
    """One start of a kernel."""

    name: str
    operation: str  # of the text; of a call, the kernel's name
    scope: str  # where it comes from in the model, as JAX names it
    bytes: int  # read and written


class Part(NamedTuple):
    """What runs one after the other: kernels, and among them loops and conditionals."""

    kernels: tuple[Kernel, ...]
    loops: tuple[Loop, ...]
    conditionals: tuple[tuple[Part, ...], ...]  # the branches of each

    @property
    def starts(self) -> int:
        """Counts the kernels of one run, as `runs` does."""
        return sum(1 for _ in self.runs())

    @property
    def bytes(self) -> int:
        """Adds up the bytes of one run."""
        return sum(kernel.bytes for kernel in self.runs())

    @property
    def waits(self) -> int:
        """Counts how often one run waits for the host."""
        waits = sum(
            loop.body.waits + 1 if loop.trips is None else loop.trips * loop.body.waits
            for loop in self.loops
        )
        return waits + sum(1 + shortest(branches).waits for branches in self.conditionals)

    def runs(self) -> Iterator[Kernel]:
        """Yields the kernels of one run: of a loop of unknown length one trip, of a conditional the
        branch that starts the fewest.
        """
        yield from self.kernels
        for loop in self.loops:
            for _ in range(loop.trips or 1):
                yield from loop.body.runs()
        for branches in self.conditionals:
            yield from shortest(branches).runs()


class Loop(NamedTuple):
    trips: int | None  # None: unknown
    body: Part  # and the condition, where that decides


def shortest(branches: tuple[Part, ...]) -> Part:
    """Returns the branch that starts the fewest kernels."""
    return min(branches, key=lambda part: part.starts)


class _Instruction(NamedTuple):
    name: str
    result: str
    operation: str
    operands: list[str]
    rest: str
    is_root: bool

    def called(self, attribute: str) -> str:
        match = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        assert match, f"{self.name} has no {attribute}"
        return match[1]

    def branches(self) -> list[str]:
        listed = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
        if listed:
            return _NAME.findall(listed[1])
        return [self.called("true_computation"), self.called("false_computation")]


_Computations = dict[str, dict[str, _Instruction]]


def read(text: str, portions: Mapping[int, int] | None = None) -> Part:
    """Reads a compiled program's text.

    Args:
      portions: of arrays with so many matrices, how many a call of a kernel reads: those of one
        layer. All, by default.
    """
    computations, entry = _parse(text)
    return _part(computations, [entry], portions or {})


def _parse(text: str) -> tuple[_Computations, str]:
    computations: _Computations = {}
    entry, current = "", None
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            current = computations.setdefault(start[2], {})
            entry = start[2] if start[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            # A parameter's only operand is its number.
            operands = _NAME.findall(found["operands"]) or [found["operands"]]
            current[found["name"]] = _Instruction(
                found["name"], found["result"], found["operation"], operands, found["rest"],
                bool(found["root"]),
            )  # fmt: skip
    return computations, entry


def _part(computations: _Computations, names: list[str], portions: Mapping[int, int]) -> Part:
    """Returns what the named computations run, one after the other."""
    kernels: list[Kernel] = []
    loops: list[Loop] = []
    conditionals: list[tuple[Part, ...]] = []

    def part_of(*names: str) -> Part:
        return _part(computations, list(names), portions)

    for name in names:
        for each in computations[name].values():
            if each.operation == "while":
                trips = _TRIPS.search(each.rest)
                # The condition of a loop of known length is not run.
                decides = [] if trips else [each.called("condition")]
                body = part_of(*decides, each.called("body"))
                loops.append(Loop(int(trips[1]) if trips else None, body))
            elif each.operation == "conditional":
                conditionals.append(tuple(map(part_of, each.branches())))
            elif each.operation == "call":
                part = part_of(each.called("to_apply"))
                kernels.extend(part.kernels)
                loops.extend(part.loops)
                conditionals.extend(part.conditionals)
            elif each.operation not in _NAMES_ONLY and not each.operation.endswith("-done"):
                kernels.append(_kernel(computations, computations[name], each, portions))
    return Part(tuple(kernels), tuple(loops), tuple(conditionals))


def _kernel(
    computations: _Computations,
    own: dict[str, _Instruction],
    each: _Instruction,
    portions: Mapping[int, int],
) -> Kernel:
    target, scope = _TARGET.search(each.rest), _SCOPE.search(each.rest)
    moved = _written(computations, own, each)
    changed = set(map(int, _IN_PLACE.findall(each.rest))) if target else ()
    for number, operand in enumerate(each.operands):
        if operand in own:
            whole = _bytes(own[operand].result)
            if number in changed:
                moved -= whole
            elif target:
                moved += _portion(own[operand].result, whole, portions)
            else:
                moved += _read_of_operand(computations, each, number, whole)
    return Kernel(
        each.name, target[1] if target else each.operation, scope[1] if scope else "", moved
    )


def _portion(result: str, whole: int, portions: Mapping[int, int]) -> int:
    """Returns how many bytes of an operand a call reads."""
    shape = _ARRAY.search(result)
    count = int(shape[2].partition(",")[0]) if shape and shape[2] else 1
    return whole * portions.get(count, count) // count


def _read_of_operand(
    computations: _Computations, each: _Instruction, number: int, whole: int
) -> int:
    """Returns how many bytes of an operand an instruction reads."""
    if each.operation in _READS_ITS_RESULT and number == 0:
        return _bytes(each.result)
    if each.operation in _OVERWRITES and number == 0:
        return 0
    if each.operation not in ("fusion", "call"):
        return whole
    inner = computations[each.called("calls" if each.operation == "fusion" else "to_apply")]
    (parameter,) = (
        inside.name
        for inside in inner.values()
        if inside.operation == "parameter" and inside.operands == [str(number)]
    )
    return min(whole, _read_inside(computations, inner, parameter, whole))


def _read_inside(
    computations: _Computations, inner: dict[str, _Instruction], name: str, whole: int
) -> int:
    total = 0
    for user in inner.values():
        for number, operand in enumerate(user.operands):
            if operand != name:
                continue
            if user.operation == "bitcast":
                total += _read_inside(computations, inner, user.name, whole)
            elif user.operation != "tuple":
                total += _read_of_operand(computations, user, number, whole)
    return total


def _written(computations: _Computations, own: dict[str, _Instruction], each: _Instruction) -> int:
    """Returns how many bytes an instruction writes."""
    if each.operation in _OVERWRITES:
        return _bytes(own[each.operands[_OVERWRITES[each.operation]]].result)
    if each.operation in ("tuple", "bitcast"):
        return sum(
            _written(computations, own, own[operand]) for operand in each.operands if operand in own
        )
    if each.operation in ("fusion", "call"):
        inner = computations[each.called("calls" if each.operation == "fusion" else "to_apply")]
        (root,) = (inside for inside in inner.values() if inside.is_root)
        return _written(computations, inner, root)
    return _bytes(each.result)


def _bytes(result: str) -> int:
    return sum(
        math.prod(int(size) for size in shape.split(",") if size) * _item_bytes(dtype)
        for dtype, shape in _ARRAY.findall(result)
    )


def _item_bytes(dtype: str) -> int:
    digits = re.search(r"\d+", dtype)
    return max(int(digits[0]) // 8, 1) if digits else 1
