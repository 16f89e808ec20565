"""Every test runs on eight fake CPU devices, with the strictest numerics that jax offers."""

import gc
import os
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

# jax reads these when it starts, so they come before its import.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
# Programs here run once or twice on small inputs, so quick compilation beats quick code.
FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
]
if version("jaxlib").startswith("0.10."):
    # The older way to compile fused loops takes half the time; later versions have it no more.
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
if FLAGS[0].partition("=")[0] not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()

# Many tests, and the commands that some start, compile the same program: once a session is enough.
# pytest-xdist's workers inherit the folder from the process that starts them.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _COMPILED = tempfile.TemporaryDirectory(prefix="dsjax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

# Thousands of traced programs stay alive, and walking over them all is a twentieth of the time.
gc.set_threshold(50_000, 20, 100)

# Linux lets a process map 65,530 regions of memory (vm.max_map_count) and aborts it beyond; each
# compiled program takes several.
REGIONS, MOST_REGIONS = Path("/proc/self/maps"), 20_000


@pytest.fixture(scope="module", autouse=True)
def few_compiled_programs() -> Iterator[None]:
    """After a module, forgets what is compiled if that has come to many regions of memory."""
    yield
    if REGIONS.exists() and REGIONS.read_bytes().count(b"\n") > MOST_REGIONS:
        jax.clear_caches()
