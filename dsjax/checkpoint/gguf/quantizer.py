"""The types that only llama.cpp quantizes, by its program `llama-quantize`, if it is installed.

The file is first written with these tensors in 16 or 32 bits and all others as they will be; the
program then copies what is finished and quantizes the rest. It is told the type of every tensor.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter, deque
from collections.abc import Mapping
from pathlib import Path

from gguf import GGMLQuantizationType

from dsjax.checkpoint.gguf.container import read_header
from dsjax.checkpoint.gguf.types import OWN
from dsjax.display import Transfer
from dsjax.files import listed

PROGRAM = "llama-quantize"


def find(types: Mapping[str, GGMLQuantizationType]) -> str | None:
    """Returns the program's path if it is needed for these types of tensors, else None.

    Raises:
      ValueError: it is needed, and not installed.
    """
    wanted = sorted({kind.name for kind in types.values()} - set(OWN))
    if not wanted:
        return None
    path = shutil.which(PROGRAM)
    if path is None:
        raise ValueError(
            f"--type: {', '.join(wanted)} are made by llama.cpp's {PROGRAM}, which is not on the "
            "PATH. Install llama.cpp (brew install llama.cpp, or build it with cmake and add its "
            f"bin folder to the PATH), or choose from {', '.join(OWN)}"
        )
    return path


def run(
    program: str,
    file: Path,
    types: Mapping[str, GGMLQuantizationType],
    progress: Transfer,
) -> Path:
    """Quantizes a file; returns the new one, beside it.

    Raises:
      ValueError: the program fails, or makes something else; shows what it said last.
    """
    made, rules = file.with_suffix(".quantized.gguf"), file.with_suffix(".types")
    lines = (f"^{re.escape(name)}$={kind.name.lower()}" for name, kind in types.items())
    rules.write_text("\n".join(lines) + "\n")
    own = Counter(kind.name for kind in types.values() if kind.name not in OWN)
    ((main, _),) = own.most_common(1)
    command = [program, "--tensor-type-file", str(rules), str(file), str(made), main]
    said: deque[str] = deque(maxlen=8)
    progress.begin(f"quantizing with {PROGRAM}", file.stat().st_size)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                said.append(line.strip())
                size = re.search(r"size = +([\d.]+) MiB", line)
                progress.advance(round(float(size[1]) * 2**20) if size else 0)
        except BaseException:
            process.kill()
            raise
    progress.stop()
    if process.returncode:
        raise ValueError(
            f"{program} failed with exit code {process.returncode}: {' | '.join(said)}"
        )
    check(made, types, program)
    return made


def check(made: Path, types: Mapping[str, GGMLQuantizationType], program: str) -> None:
    """Checks that the program has made what it was told; older ones know no types by tensor.

    Raises:
      ValueError: a tensor is missing or of another type.
    """
    found = {name: tensor.type for name, tensor in read_header(made).tensors.items()}
    other = [
        f"{name} is {found[name].name if name in found else 'missing'}, not {kind.name}"
        for name, kind in types.items()
        if found.get(name) != kind
    ]
    if other:
        raise ValueError(
            f"{program} has not made the types that it was told: {listed(other)}; install a newer "
            "llama.cpp"
        )
