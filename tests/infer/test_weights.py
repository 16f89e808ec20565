"""Which element type a checkpoint is loaded in."""

import types
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from dsjax.infer import weights
from dsjax.infer.weights import choose_dtype, free_memory
from dsjax.model.parameters import declarations
from tests.model.tiny import TINY, tiny_model

BYTES = 4 * sum(parameter.count for parameter in declarations(tiny_model()))


def checkpoint(dtype=ml_dtypes.bfloat16):
    return types.SimpleNamespace(model=TINY, dtype=np.dtype(dtype), path=Path("runs/x"))


@pytest.fixture
def free(monkeypatch):
    return lambda size: monkeypatch.setattr(weights, "free_memory", lambda: size)


def test_a_cpu_runs_bfloat16_weights_in_float32_and_says_what_that_takes(free, capsys):
    free(BYTES)
    assert choose_dtype(checkpoint(), None) == "float32"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("weights become float32, which is fast on a CPU: 0.0 GB as float32, ")
    assert line.endswith("; --dtype bfloat16 keeps them")


def test_weights_that_float32_has_no_memory_for_stay(free, capsys):
    free(BYTES - 1)
    assert choose_dtype(checkpoint(), None) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "weights stay bfloat16, which is slower on a CPU: they would take 0.0 GB"
    )


def test_what_is_asked_for_is_obeyed_with_a_warning_where_it_is_slow(free, capsys):
    free(BYTES)
    assert choose_dtype(checkpoint(), "bfloat16") == "bfloat16"
    assert capsys.readouterr().err.startswith("bfloat16 is slower on a CPU than --dtype float32")
    assert choose_dtype(checkpoint(), "float32") == "float32"
    assert choose_dtype(checkpoint(np.float32), None) is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("dtype", "type_"), [("fp8", "Q8_0"), ("int8", "Q8_0"), ("int4", "Q4_0")])
def test_small_weights_on_a_cpu_save_memory_and_point_to_gguf(free, capsys, dtype, type_):
    free(BYTES)
    assert choose_dtype(checkpoint(), dtype) == dtype
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{dtype} weights take 0.0 GB, where float32 takes 0.0, but a CPU")
    assert line.endswith(f"llama.cpp: tools/convert.py export runs/x out.gguf --type {type_}")


def test_other_machines_keep_the_checkpoints(free, monkeypatch, capsys):
    free(BYTES)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert choose_dtype(checkpoint(), None) is None
    assert choose_dtype(checkpoint(), "bfloat16") == "bfloat16"
    assert choose_dtype(checkpoint(), "int4") == "int4"
    assert capsys.readouterr().err == ""


def test_free_memory_is_no_more_than_the_container_has(tmp_path, monkeypatch):
    assert 1 << 20 < (there := free_memory()) < 1 << 50
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(weights, "CONTAINER", tmp_path)
    assert free_memory() > 1 << 20
    limit.write_text("max\n")
    assert free_memory() > 1 << 20
    limit.write_text("5000\n")
    assert free_memory() == 5000 < there
    (tmp_path / "memory.current").write_text("4000\n")
    assert free_memory() == 1000
