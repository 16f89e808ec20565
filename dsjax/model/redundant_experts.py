"""Redundant experts, for serving: the routed experts of a model laid out by slot.

DeepSeek-V3 (arXiv:2412.19437), section 3.4: heavily loaded experts have replicas on several devices
(`dsjax.parallel.eplb` says which and where). Routers choose experts as before, and each choice goes
to one of the expert's replicas, so a model computes the same up to the order of sums.

The experts of the MTP modules stay as they are.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dsjax.config import ModelConfig
from dsjax.model.moe import ReplicaSlots
from dsjax.model.transformer import Transformer
from dsjax.parallel.eplb import Placement
from dsjax.parallel.expert_slots import rearranged


def check(config: ModelConfig, n_redundant: int, n_ranks: int) -> None:
    """Checks that a model's experts can have replicas.

    Args:
      n_redundant: slots of a layer beyond one for each expert.
      n_ranks: devices along the mesh axis `expert`.

    Raises:
      ValueError: there are no experts, one device, or slots that do not divide over the devices.
    """
    if not config.n_moe_layers:
        raise ValueError(
            f"{n_redundant} redundant experts are for models with routed experts, and this one is "
            "dense (model.n_routed_experts=0 or no layer has them); leave --redundant-experts out"
        )
    if config.attention == "compressed":
        raise ValueError(
            f"{n_redundant} redundant experts are for models whose experts are one stack, and "
            "those of model.attention=compressed are one for each kind of layer; leave "
            "--redundant-experts out"
        )
    if n_ranks < 2:
        raise ValueError(
            f"{n_redundant} redundant experts balance the devices along the mesh axis expert, and "
            f"there is {n_ranks}; give --mesh expert=N with N above 1, or leave "
            "--redundant-experts out"
        )
    n_experts = config.n_routed_experts
    if n_redundant < 0 or (n_experts + n_redundant) % n_ranks:
        least = max(n_redundant, 0)
        fitting = least + -(n_experts + least) % n_ranks
        raise ValueError(
            f"{n_experts} experts and {n_redundant} redundant ones do not divide over the "
            f"{n_ranks} devices along the mesh axis expert, each of which has equally many; give "
            f"--redundant-experts {fitting}, or another that divides"
        )


def place(
    model: Transformer, new: Placement, old: Placement | None = None, *, n_redundant: int
) -> None:
    """Moves the experts of a model's MoE layers to their slots, on the devices and layer by layer.

    The first placement makes new arrays, one kind of weight after the other. Later ones, whose
    shapes and layouts are the same, use these again: nothing that runs with the model is compiled
    anew.

    Args:
      new: of all MoE layers, with E + n_redundant slots each.
      old: where the experts are; None: E experts in order.
    """
    source_LP = new.expert_LP
    if old is not None:
        # A slot that keeps its expert keeps its weights.
        own_LP = np.broadcast_to(np.arange(source_LP.shape[1]), source_LP.shape)
        first_LP = np.take_along_axis(old.slots_LEX[:, :, 0], new.expert_LP, 1)
        source_LP = np.where(old.expert_LP == new.expert_LP, own_LP, first_LP)
    slots_LEX = np.full((*new.count_LE.shape, n_redundant + 1), -1, np.int32)
    slots_LEX[:, :, : new.slots_LEX.shape[2]] = new.slots_LEX
    body = model.moe_layers.routed_experts
    assert body is not None
    weights = (body.w_gate, body.w_up, body.w_down)
    for variable in weights:
        variable.set_value(
            jax.tree.map(lambda leaf: rearranged(leaf, source_LP), variable.get_value())
        )
    mesh = jax.tree.leaves(body.w_gate.get_value())[0].sharding.mesh
    body.slots = ReplicaSlots(
        jax.device_put(slots_LEX, NamedSharding(mesh, PartitionSpec())),
        axes=("layers", "replicas", "replicas"),
    )
