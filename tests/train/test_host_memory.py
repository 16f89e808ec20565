import os
import subprocess
import sys

import pytest

# Page faults of filling the third of three blocks, each freed before the next.
FAULTS = """
import resource, sys
import numpy as np
from dsjax.train import host_memory
if sys.argv[1] == "kept":
    host_memory.keep_freed()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = np.ones(64 << 20, np.uint8)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    del block
print(faults)
"""


def faults(memory, platforms):
    environment = os.environ | {"JAX_PLATFORMS": platforms}
    return int(subprocess.check_output([sys.executable, "-c", FAULTS, memory], env=environment))


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_a_cpus_freed_pages_serve_the_next_step():
    assert faults("kept", "cpu") < 10 < faults("given back", "cpu")
    assert faults("kept", "cuda,cpu") > 10
