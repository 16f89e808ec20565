"""Expert-specialized fine-tuning: the experts that a task uses are trained, and nothing else.

Paper: ESFT (arXiv:2407.01906), equations 4 to 7. Over a sample of the task, each expert of a layer
gets a score, by the average gate value (its weight in a token's mixture, 0 where it is not chosen)
or by the share of the selections that fall on it. The fewest experts, best first, whose scores sum
to the threshold are trained. Shared experts, attention, routers, embeddings and MTP modules keep
their bits.

A gate value is taken before the model's `route_scale`, so that one threshold suits every model.
Where gates are not normalised, their scores sum to less than 1 (V2-Lite: about .38), and a
threshold above that chooses every expert that was used at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from dsjax import tables
from dsjax.config import ModelConfig
from dsjax.config.finetuning import EsftConfig
from dsjax.files import read_json, write_json
from dsjax.model.inputs import read_tokens
from dsjax.model.transformer import Transformer
from dsjax.train.optimizer import Trains

FILE_NAME = "esft.json"
_SHOWN_EXPERTS = 16  # of a layer, in the table


class Usage(NamedTuple):
    """Sums over the tokens of a sample; every field adds up over batches."""

    gates_LE: jax.Array  # float32, of gate values
    selections_LE: jax.Array  # float32
    tokens: jax.Array  # float32 scalar


def usage(model: Transformer, batch: Mapping[str, jax.Array]) -> Usage:
    """Counts how the routers of all MoE layers use their experts.

    Args:
      batch: `tokens` and `segment_ids`, int32 [B, T]; padding is not counted.
    """
    config = model.config
    inputs = read_tokens(batch["tokens"], batch["segment_ids"], isolate=True, n_mtp=0)
    context = model.context(inputs)
    counted_M = (inputs.documents > 0).reshape(-1).astype(jnp.float32)

    def layer(x_BTD: jax.Array, block: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        attended = block.attn(block.attn_norm(x_BTD), context.angles, context.segment_ids_BT)
        x_BTD = x_BTD + attended
        normed_BTD = block.ffn_norm(x_BTD)
        routing = block.ffn.gate(normed_BTD.reshape(-1, normed_BTD.shape[-1]))
        chosen_MKE = jax.nn.one_hot(routing.experts_MK, config.n_routed_experts)
        chosen_MKE = chosen_MKE * counted_M[:, None, None]
        gates_MK = routing.weights_MK / config.route_scale
        sums = (jnp.einsum("MK,MKE->E", gates_MK, chosen_MKE), chosen_MKE.sum(axis=(0, 1)))
        return x_BTD + block.ffn(normed_BTD, context.documents_BT, None)[0], sums

    x_BTD, _ = model.enter(inputs, context)
    _, (gates_LE, selections_LE) = jax.lax.scan(layer, x_BTD, model.moe_layers)
    return Usage(gates_LE, selections_LE, counted_M.sum())


def scores(total: Usage, score: Literal["gate", "token"], config: ModelConfig) -> np.ndarray:
    """Returns each expert's score, float64 [L, E]: by gate (equation 4) or by selections (5)."""
    if score == "gate":
        return np.asarray(total.gates_LE, np.float64) / float(total.tokens)
    assignments = float(total.tokens) * config.n_activated_experts
    return np.asarray(total.selections_LE, np.float64) / assignments


def choose(scores_LE: np.ndarray, threshold: float) -> list[list[int]]:
    """Returns the experts of each layer that train, best first: the fewest whose scores sum to the
    threshold (equations 6 and 7). One that was never used is not chosen.
    """
    chosen = []
    for scores_E in scores_LE:
        order = np.argsort(-scores_E, kind="stable")
        reached = np.cumsum(scores_E[order])
        count = int(np.searchsorted(reached, threshold * (1 - 1e-12))) + 1
        chosen.append([int(e) for e in order[:count] if scores_E[e] > 0])
    return chosen


def trains(chosen: Sequence[Sequence[int]], n_experts: int) -> Trains:
    """Returns what the optimizer takes: a mask [L, E, 1, 1] for the routed experts' weights, and
    nothing else.
    """
    mask_LE = np.zeros((len(chosen), n_experts), np.float32)
    for layer, experts in enumerate(chosen):
        mask_LE[layer, list(experts)] = 1

    def of(path: tuple[Any, ...]) -> bool | jax.Array:
        if path[:3] != ("moe_layers", "ffn", "experts"):
            return False
        return jnp.asarray(mask_LE)[:, :, None, None]

    return of


def write(
    folder: Path, chosen: list[list[int]], scores_LE: np.ndarray, esft: EsftConfig,
    model: ModelConfig,
) -> dict[str, Any]:  # fmt: skip
    """Writes esft.json, whose first three keys are those of the authors' expert configs, with
    layers numbered as in the checkpoint; returns its content.
    """
    first = model.n_dense_layers
    expert_params = 3 * model.dim * model.moe_inter_dim
    content = {
        "experts": {str(first + layer): experts for layer, experts in enumerate(chosen)},
        "shared_experts": False,
        "non_expert_modules": False,
        "score": esft.score,
        "threshold": esft.threshold,
        "scores": {
            str(first + layer): [round(float(scores_LE[layer, e]), 6) for e in experts]
            for layer, experts in enumerate(chosen)
        },
        "trained_params": expert_params * sum(map(len, chosen)),
    }
    write_json(folder / FILE_NAME, content)
    return content


def read(folder: Path) -> list[list[int]]:
    """Returns the choice that a run has made, in the order of layers.

    Raises:
      ValueError: the file is missing or damaged.
    """
    experts = read_json(folder / FILE_NAME)["experts"]
    return [experts[key] for key in sorted(experts, key=int)]


def report(content: Mapping[str, Any], model: ModelConfig) -> Table:
    """Returns a table of the experts that train, layer by layer."""
    rows = []
    for layer, experts in content["experts"].items():
        listed = ", ".join(map(str, experts[:_SHOWN_EXPERTS]))
        more = len(experts) - _SHOWN_EXPERTS
        listed += f" and {more} more" if more > 0 else ""
        rows.append((layer, len(experts), f"{sum(content['scores'][layer]):.3f}", listed))
    total = sum(map(len, content["experts"].values()))
    title = (
        f"ESFT by {content['score']} score: {total} of "
        f"{model.n_moe_layers * model.n_routed_experts} experts train, "
        f"{content['trained_params']:,} parameters"
    )
    return tables.table(title, (">layer", ">experts", ">score", "which"), rows, wraps="which")


def sample_usage(
    count: Callable[[dict[str, np.ndarray]], Usage],
    batches: Iterable[dict[str, np.ndarray]],
) -> Usage:
    """Adds up the usage of batches on the host."""
    total = None
    for batch in batches:
        found = jax.tree.map(lambda x: np.asarray(x, np.float64), count(batch))
        total = found if total is None else jax.tree.map(np.add, total, found)
    assert total is not None, "a sample has at least one row"
    return total
