"""The folder of a run, without the run."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp

from dsjax import settings
from dsjax.checkpoint import store
from dsjax.config import Config, DataConfig
from dsjax.files import write_json
from tests.golden import checkpoint
from tests.golden.cases import Case


def write_run(folder: Path, case: Case, *steps: int, average: float | None = None) -> None:
    """Writes checkpoints of the case's model; an earlier step differs in its embedding.

    Args:
      average: what the average of the embedding's weights, as a run with `optim.ema` keeps it, is
        more than they; None: the run keeps none.
    """
    model, tree = checkpoint.parameters(case)
    checkpoints = store.Store(folder / "checkpoints", keep=len(steps))
    for step in steps:
        state = _state(tree)
        state["params"]["embed"]["weight"] += max(steps) - step
        if average is not None:
            embedding = state["params"]["embed"]["weight"] + average
            state["optimizer"]["ema"] = {"embed": {"weight": embedding}}
        checkpoints.save(step, state, {"step": step})
    checkpoints.close()
    config = Config(name="run", model=model, data=DataConfig(sequence_length=64))
    write_json(folder / "config.json", settings.to_dict(config))


def _state(tree: dict) -> dict:
    """A run's state: the router's biases apart, and an optimizer that is not for the model."""
    params = jax.tree.map(jnp.asarray, tree)
    router: dict = {}
    for stack in (("moe_layers",), ("mtp", "layer")):
        gate = params
        for key in (*stack, "ffn", "gate"):
            gate = gate.get(key, {})
        if "bias" in gate:
            node = router
            for key in (*stack, "ffn", "gate"):
                node = node.setdefault(key, {})
            node["bias"] = gate.pop("bias")
    return {"params": params, "router": router, "optimizer": {"count": jnp.int32(3)}}
