"""What FP8 and bfloat16 moments save of a training step's memory, by the compiler's own account.

For each model, two kinds of programs are compiled, and nothing is run:

* the forward pass with selective rematerialisation, its results being what it keeps for the
  backward pass. `memory_analysis()` gives their size. Weights, which the backward pass reads where
  they are, are left out.
* the making of the optimizer's state, with moments in either type.

Command: python docs/fp8_memory.py     (V3's forward passes take two minutes on 2 CPU cores)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax import settings
from dsjax.config import Config, PrecisionConfig
from dsjax.model.transformer import Transformer
from dsjax.parallel.mesh import make_mesh
from dsjax.train.optimizer import adamw
from dsjax.train.step import TrainState, abstract_state, declared_model, split

MODELS = {
    "small without MTP, 16 x 2048 tokens": (
        "configs/small.py",
        ["model.n_mtp=0", "train.batch_size=16"],
    ),
    "a dense and a MoE layer of V3 with 8 of its experts, 4096 tokens": (
        "configs/v3_671b.py",
        [
            "model.n_layers=2",
            "model.n_dense_layers=1",
            "model.n_routed_experts=8",
            "model.n_expert_groups=1",
            "model.n_limited_groups=1",
            "model.n_mtp=0",
            "model.vocab_size=4096",
            "train.batch_size=1",
            "train.micro_batch_size=0",
            "train.batch_size_start=0",
        ],
    ),
}
PRECISIONS = {
    "bfloat16": PrecisionConfig(),
    "FP8, power-of-two scales": PrecisionConfig(fp8="on", fp8_scale="pow2"),
}
GIB = 1024**3


def _declared(config: Config) -> Transformer:
    return declared_model(config.model, config.precision)


def _state(config: Config) -> TrainState:
    mesh = make_mesh({"data": 1}, n_devices=1)
    return abstract_state(_declared(config), adamw(config.optim), mesh)


def forward_bytes(config: Config) -> int:
    """What a forward pass keeps for its backward pass besides weights."""
    state, structure = _state(config), split(_declared(config))[0]
    shape = (config.train.batch_size, config.data.sequence_length)

    def kept(params: nnx.State, router: nnx.State, tokens_BT: jax.Array) -> list[jax.Array]:
        def run(params: nnx.State):
            hidden = nnx.merge(structure, params, router).hidden(tokens_BT, remat="selective")
            return hidden.main_BTD, hidden.mtp_DBTD

        return jax.tree.leaves(jax.vjp(run, params)[1])

    operands = state.params, state.router, jax.ShapeDtypeStruct(shape, jnp.int32)
    traced = jax.make_jaxpr(kept)(*operands).jaxpr
    own = [
        number
        for number, variable in enumerate(traced.outvars)
        if variable not in traced.invars and variable not in traced.outvars[:number]
    ]
    return result_bytes(lambda *operands: [kept(*operands)[number] for number in own], *operands)


def optimizer_bytes(config: Config) -> int:
    return result_bytes(adamw(config.optim).init, _state(config).params)


def result_bytes(function: Callable[..., Any], *operands: Any) -> int:
    """The size of a compiled program's results. It never runs, so its code need not be fast."""
    program = jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})
    analysis = program.lower(*operands).compile().memory_analysis()
    assert analysis is not None  # every backend here has one
    return analysis.output_size_in_bytes


def main() -> None:
    print(f"jax {jax.__version__}\n")
    print("| model | | kept of the forward pass | float32 moments | bfloat16 moments |")
    print("|---|---|---|---|---|")
    for name, (path, changes) in MODELS.items():
        config = settings.override(settings.load_config(path), changes)
        moments = [
            optimizer_bytes(
                dataclasses.replace(
                    config, optim=dataclasses.replace(config.optim, moment_dtype=dtype)
                )
            )
            for dtype in ("float32", "bfloat16")
        ]
        for label, precision in PRECISIONS.items():
            kept = forward_bytes(dataclasses.replace(config, precision=precision))
            sizes = " | ".join(f"{size / GIB:.3f} GiB" for size in (kept, *moments))
            print(f"| {name} | {label} | {sizes} |", flush=True)


if __name__ == "__main__":
    main()
