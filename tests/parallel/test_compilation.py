"""One compilation for each shape, and a cache that the user's own choice overrules."""

import io
import re

import jax
import numpy as np
import pytest
from rich.console import Console

from dsjax.display import Display
from dsjax.kernels.target import Target
from dsjax.parallel import compilation
from dsjax.parallel.mesh import make_mesh


def test_compiled_compiles_once_for_each_batch_shape_and_says_so():
    traces, output = [], io.StringIO()

    def step(state, batch):
        traces.append(batch["tokens"].shape)
        return state + batch["tokens"].sum()

    mesh = make_mesh({"data": -1})
    display = Display(Console(file=output, width=120))
    program = compilation.Compiled(jax.jit(step), mesh, what="the step", display=display)
    state = jax.numpy.int32(0)
    for rows in (2, 2, 4, 2, 4):
        state = program(state, {"tokens": np.ones((rows, 3), np.int32)})
    assert state == 3 * 14
    assert traces == [(2, 3), (4, 3)] and program.seconds > 0
    said = output.getvalue().splitlines()
    assert len(said) == 4 and said[0] == "compiling the step"
    assert re.fullmatch(r"compiled the step in 0 s; it takes \d+ bytes per device", said[1])


@pytest.mark.parametrize("target", [Target("cpu"), Target("gpu")], ids=str)
def test_compiler_knows_the_options_of_a_target(target):
    # Options of GPUs are parsed on any machine; TPUs' by libtpu alone (tests/plan).
    options = compilation.compiler_options(target, n_devices=2)
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2


@pytest.fixture
def cache_setting():
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_persistent_cache_is_on_unless_the_user_chose(tmp_path, monkeypatch, cache_setting):
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compilation.use_persistent_cache("")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "dsjax" / "compiled")
    assert jax.config.values["jax_persistent_cache_min_compile_time_secs"] < 0.5
    compilation.use_persistent_cache(str(tmp_path / "elsewhere"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "dsjax" / "compiled")
