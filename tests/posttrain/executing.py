"""What tests of execution call in a pool's process."""

import os
import sys
import time
from pathlib import Path

from dsjax.posttrain import confined, execution
from dsjax.posttrain.execution import Limits
from dsjax.posttrain.verify import descendants

QUICK = Limits(seconds=1)


def printed(answer, given):
    return execution.printed(answer, given, QUICK)


def returned(answer, entry, arguments):
    return repr(execution.returned(answer, entry, arguments, QUICK))


def passes(answer, tests, names):
    return execution.passes(answer, tests, names, QUICK)


def writes(answer, given):
    """Returns what a program prints, and how often its input was written to."""
    count, write = 0, os.write

    def counted(*arguments):
        nonlocal count
        count += 1
        return write(*arguments)

    os.write = counted
    try:
        return execution.printed(answer, given, QUICK), count
    finally:
        os.write = write


def exists(path):
    return Path(path).exists()


def left_behind():
    """Runs a program without its fence that leaves children in sessions of their own."""
    fence, file = confined.__file__, Path(f"unfenced-{os.getpid()}.py").absolute()
    code = Path(fence).read_text().replace("    confine(folder, int(seconds))\n", "")
    assert code != Path(fence).read_text()
    file.write_text(code)
    confined.__file__ = str(file)
    try:
        sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
        program = (
            "import subprocess, sys\n"
            f"for _ in range(3): subprocess.Popen({sleeper!r}, start_new_session=True)\n"
            "print('started')\n"
        )
        assert execution.printed(program, "", Limits(seconds=5)) == "started\n"
    finally:
        confined.__file__ = fence
        file.unlink()
    time.sleep(0.1)
    return descendants(os.getpid())
