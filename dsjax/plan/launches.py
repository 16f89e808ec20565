"""What the host starts while a GPU runs a compiled program, read from XLA's sequence of thunks.

A thunk is a kernel, a copy or a loop. XLA puts those that follow one another into command buffers
(CUDA graphs), and one of these is started once, whatever it holds. Loops are in one only where
flags say so (`xla_gpu_enable_command_buffer`); else the host runs them, and starts what is in their
bodies in every turn.

`dsjax.plan.hopper` gets the text. It does not say how often loops turn.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_THUNK = re.compile(r"^(?P<indent> *)\d+: (?P<kind>k\w+) +\[[^\]]*\] *(?P<name>\w*)")
_DEPTH = 4  # of indentation


class Launches(NamedTuple):
    """What the host starts, one after the other, in one run of a program or turn of a loop."""

    buffers: int  # command buffers
    alone: tuple[str, ...]  # kernels and copies that are in none
    loops: tuple[Launches, ...]  # turns of loops that are in none

    def starts(self, *trips: int) -> int:
        """Counts the starts of one run.

        Args:
          trips: how often the loops turn, then those in them, and so on.
        """
        of_loops = sum(trips[0] * loop.starts(*trips[1:]) for loop in self.loops)
        return self.buffers + len(self.alone) + of_loops


def read(text: str) -> Launches:
    """Reads a sequence of thunks as XLA dumps it. What a loop of unknown length decides by does not
    count.
    """
    thunks = [found for line in _without_conditions(text) if (found := _THUNK.match(line))]
    return _launches(thunks, 0)


def _without_conditions(text: str) -> list[str]:
    """Drops what decides whether a loop goes on."""
    kept: list[str] = []
    decides = False
    for line in text.splitlines():
        if line.strip() in ("condition:", "body:"):
            decides = line.strip() == "condition:"
        elif not decides:
            kept.append(line)
    return kept


def _launches(thunks: list[re.Match[str]], indent: int) -> Launches:
    buffers, alone, loops = 0, list[str](), list[Launches]()
    for number, thunk in enumerate(thunks):
        if len(thunk["indent"]) != indent:
            continue
        inside = _inside(thunks[number + 1 :], indent)
        if thunk["kind"] == "kCommandBuffer":
            buffers += 1
        elif thunk["kind"] == "kWhile":
            loops.append(_launches(inside, indent + _DEPTH))
        else:
            assert not inside, f"{thunk['kind']} holds thunks"
            alone.append(thunk["name"])
    return Launches(buffers, tuple(alone), tuple(loops))


def _inside(following: list[re.Match[str]], indent: int) -> list[re.Match[str]]:
    """Returns the thunks up to the next one that is not inside of the one before."""
    ends = (n for n, thunk in enumerate(following) if len(thunk["indent"]) <= indent)
    return following[: next(ends, len(following))]
