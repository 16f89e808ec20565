"""Our model with a reference checkpoint in it, and the same outputs of it that the golden files
hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsjax.config import ModelConfig
from dsjax.model import rope
from dsjax.model.block import Block
from dsjax.model.transformer import Transformer
from dsjax.precision.policy import Policy
from tests.golden import checkpoint
from tests.golden.cases import Case

# A test runs its program once: compiling it well takes longer than running it badly.
QUICK = {"xla_backend_optimization_level": 0}
OUTPUTS = ("logits", "norm", "dense", "attention", "moe", "router")


def place(config: ModelConfig, tree: dict[str, Any]) -> Transformer:
    """A float32 model with the parameters of a nested dict; every leaf of both must meet."""
    left = {path: value for path, value in _flatten(tree)}

    def fill(keys: tuple[Any, ...], variable: nnx.Variable) -> nnx.Variable:
        value = left.pop(tuple(str(getattr(key, "name", getattr(key, "key", key))) for key in keys))
        assert value.shape == variable.get_value().shape, (keys, value.shape)
        return variable.copy(jnp.asarray(value))

    model = jax.tree_util.tree_map_with_path(
        fill,
        Transformer(config, Policy(jnp.float32)),
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )
    assert not left, f"the model has no {sorted(left)}"
    return model


def _flatten(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], np.ndarray]]:
    if not isinstance(tree, dict):
        return [(path, tree)]
    return [leaf for name, child in tree.items() for leaf in _flatten(child, (*path, name))]


def last_layer(stack: Block) -> Block:
    return jax.tree.map(lambda leaf: leaf[-1], stack)


def module_outputs(
    model: Transformer, x_TD: jax.Array, wanted: Collection[str]
) -> dict[str, jax.Array]:
    """What single modules make of one sequence of hidden states."""
    config, x_BTD = model.config, x_TD[None]
    block = last_layer(model.moe_layers if config.n_moe_layers else model.dense_layers)
    outputs = {}
    if "norm" in wanted:
        outputs["norm"] = block.ffn_norm(x_BTD * checkpoint.SMALL)[0]
    if "dense" in wanted:
        first = jax.tree.map(lambda leaf: leaf[0], model.dense_layers)
        outputs["dense"] = first.ffn(x_BTD)[0]
    if "attention" in wanted:
        angles = rope.angles(jnp.arange(len(x_TD), dtype=jnp.int32)[None], config)
        outputs["attention"] = block.attn(x_BTD, angles)[0]
    if "moe" in wanted and config.n_moe_layers:
        outputs["moe"] = block.ffn(x_BTD, jnp.ones(x_BTD.shape[:2], jnp.int32), None)[0][0]
    if "router" in wanted and config.n_moe_layers:
        routing = block.ffn.gate(x_TD)
        outputs["router_experts"], outputs["router_weights"] = (
            routing.experts_MK,
            routing.weights_MK,
        )
    return outputs


def run(
    case: Case,
    length: int,
    wanted: Collection[str] = OUTPUTS,
    change: Mapping[str, Any] = MappingProxyType({}),
    edit: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, np.ndarray]:
    """The outputs that `transformers_reference.run` gives; `change` and `edit` alter config and
    parameters first."""
    model = altered(case, change, edit)

    def forward(model, tokens_T, x_TD):
        outputs = module_outputs(model, x_TD, wanted)
        return {"logits": model(tokens_T[None])[0], **outputs} if "logits" in wanted else outputs

    options = None if "logits" in wanted else QUICK
    forward = jax.jit(forward, compiler_options=options)
    inputs = jnp.asarray(checkpoint.inputs(case, length))
    outputs = forward(model, jnp.asarray(checkpoint.tokens(case, length)), inputs)
    return {name: np.asarray(value) for name, value in outputs.items()}


def altered(
    case: Case, change: Mapping[str, Any], edit: Callable[[dict[str, Any]], None] | None
) -> Transformer:
    config, tree = checkpoint.parameters(case)
    if edit:
        edit(tree)
    return place(dataclasses.replace(config, **change), tree)


class Hidden(NamedTuple):
    logits_TV: np.ndarray
    mtp_logits: list[np.ndarray]
    counts_LE: np.ndarray | None


def run_hidden(
    case: Case,
    length: int,
    segments_T: np.ndarray | None,
    change: Mapping[str, Any] = MappingProxyType({}),
    edit: Callable[[dict[str, Any]], None] | None = None,
) -> Hidden:
    """Logits of the main model and the MTP modules on one row of documents, and each expert's
    tokens."""

    def forward(model, tokens_BT, segments_BT):
        hidden = model.hidden(tokens_BT, segments_BT)
        mtp = [] if hidden.mtp_DBTD is None else [model.logits(h)[0] for h in hidden.mtp_DBTD]
        counts = hidden.routing and hidden.routing.counts_E
        return Hidden(model.logits(hidden.main_BTD)[0], mtp, counts)

    model, tokens_BT = altered(case, change, edit), checkpoint.tokens(case, length)[None]
    segments_BT = None if segments_T is None else segments_T[None]
    outputs = jax.jit(forward, compiler_options=QUICK)(model, tokens_BT, segments_BT)
    return jax.tree.map(np.asarray, outputs)
