"""Expert-parallel load balancing (EPLB): which experts to replicate, and where replicas go.

DeepSeek-V3 (arXiv:2412.19437), section 3.4, and its repository EPLB. For serving: a heavily loaded
expert gets several replicas, and replicas are placed so that devices have equal load.

1. Pack groups of experts onto nodes, the same number on each. Node-limited routing sends a token to
   few groups, so a group that stays on one node keeps traffic between nodes low.
2. Replicate within a node: one replica at a time, for the expert with the highest load per replica.
3. Pack replicas onto the node's devices, the same number on each.

This is the hierarchical mode. Where groups do not divide over nodes the global mode is used, as if
there were one group and one node. Ties go to the lower index, and loads are added in float32.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Placement(NamedTuple):
    """The replicas of each layer's experts; slot s is on device s // (slots / devices).

    L layers, E experts, P slots of one replica each, X the most replicas of an expert. All int64.
    """

    expert_LP: np.ndarray  # the expert whose replica a slot holds ("phy2log")
    slots_LEX: np.ndarray  # an expert's slots in creation order, then -1 ("log2phy")
    count_LE: np.ndarray  # replicas per expert
    hierarchical: bool  # False: global


def balance(
    load_LE: np.ndarray, n_slots: int, n_devices: int, *, n_groups: int = 1, n_nodes: int = 1
) -> Placement:
    """Places experts and their replicas so that devices have equal load.

    Args:
      load_LE: load of each layer's experts, such as their tokens; any unit, not negative.
      n_slots: replicas of all experts together, at least E.
      n_groups: groups of the router, of consecutive experts.
      n_nodes: nodes of equally many devices; with one, an expert may go anywhere.

    Raises:
      ValueError: lists every size that does not divide and every load that is invalid.
    """
    load_LE = np.asarray(load_LE, np.float32)
    hierarchical = n_nodes > 0 and n_groups % n_nodes == 0
    _check(load_LE, n_slots, n_devices, n_groups, n_nodes, hierarchical)
    if not hierarchical:
        n_groups = n_nodes = 1
    n_layers, n_experts = load_LE.shape
    per_node = n_experts // n_nodes

    group_load = load_LE.reshape(n_layers, n_groups, -1).sum(-1)
    groups = _pack(group_load, n_nodes)  # [L, groups], node after node
    first = groups[..., None] * (n_experts // n_groups)
    expert = (first + np.arange(n_experts // n_groups)).reshape(-1, per_node)  # [L * nodes, E/node]

    node_load = np.take_along_axis(load_LE, expert.reshape(n_layers, -1), 1).reshape(expert.shape)
    local, ordinal, count = _replicate(node_load, n_slots // n_nodes)
    replica_load = np.take_along_axis(node_load / count.astype(np.float32), local, 1)
    order = _pack(replica_load, n_devices // n_nodes)
    local, ordinal = (np.take_along_axis(table, order, 1) for table in (local, ordinal))
    expert_LP = np.take_along_axis(expert, local, 1).reshape(n_layers, n_slots)
    count_LE = np.empty((n_layers, n_experts), np.int64)
    rows = np.arange(n_layers)[:, None]
    count_LE[rows, expert.reshape(n_layers, -1)] = count.reshape(n_layers, -1)
    slots_LEX = np.full((n_layers, n_experts, count_LE.max()), -1)
    slots_LEX[rows, expert_LP, ordinal.reshape(n_layers, -1)] = np.arange(n_slots)
    return Placement(expert_LP, slots_LEX, count_LE, hierarchical)


def read_load(path: str | Path) -> np.ndarray:
    """Reads what a training run measured, its folder's `expert_load.npz`, for `balance`.

    Returns:
      float64 [layers, experts], each expert's share of its layer's tokens: the MoE layers of the
      main model in order, then the MTP modules.

    Raises:
      ValueError: the file holds something else.
      OSError: it cannot be read.
    """
    try:
        with np.load(path) as stored:
            load_LE = stored["load_LE"]
            if load_LE.ndim == 2:
                return load_LE
    except (KeyError, ValueError, zipfile.BadZipFile):
        pass
    raise ValueError(f"{path} holds no expert loads; give the expert_load.npz of a run's folder")


def device_loads(load_LE: np.ndarray, placement: Placement, n_devices: int) -> np.ndarray:
    """Returns each device's load [L, devices], with an expert's load split over its replicas."""
    share_LE = np.asarray(load_LE, np.float64) / placement.count_LE
    share_LP = np.take_along_axis(share_LE, placement.expert_LP, 1)
    return share_LP.reshape(len(share_LP), n_devices, -1).sum(-1)


def _pack(weight_XN: np.ndarray, n_packs: int) -> np.ndarray:
    """Packs items into packs of equal size: the heaviest first, into the lightest pack with room.

    No pack is then heavier than another by more than the heaviest item.

    Returns:
      [X, N] int64, the items grouped by pack, in insertion order.
    """
    n_rows, n_items = weight_XN.shape
    room = n_items // n_packs
    if room == 1:  # nothing to balance
        return np.tile(np.arange(n_items), (n_rows, 1))
    by_weight = np.argsort(-weight_XN, axis=1, kind="stable")
    rows = np.arange(n_rows)
    pack_weight = np.zeros((n_rows, n_packs), np.float32)
    filled = np.zeros((n_rows, n_packs), np.int64)
    packed = np.empty((n_rows, n_packs, room), np.int64)
    for item in by_weight.T:
        pack = np.where(filled < room, pack_weight, np.inf).argmin(1)
        packed[rows, pack, filled[rows, pack]] = item
        pack_weight[rows, pack] += weight_XN[rows, item]
        filled[rows, pack] += 1
    return packed.reshape(n_rows, n_items)


def _replicate(weight_XN: np.ndarray, n_slots: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gives each item a slot, and each further slot to the item with the highest weight per slot,
    which minimises that maximum.

    Returns:
      item of each slot [X, slots]; the slot's number among its item's, from 0, [X, slots]; slots
      per item [X, N]. All int64.
    """
    n_rows, n_items = weight_XN.shape
    rows = np.arange(n_rows)
    item = np.tile(np.arange(n_slots), (n_rows, 1))
    ordinal = np.zeros_like(item)
    count = np.ones(weight_XN.shape, np.int64)
    for slot in range(n_items, n_slots):
        heaviest = (weight_XN / count.astype(np.float32)).argmax(1)
        item[:, slot] = heaviest
        ordinal[:, slot] = count[rows, heaviest]
        count[rows, heaviest] += 1
    return item, ordinal, count


def _check(
    load_LE: np.ndarray,
    n_slots: int,
    n_devices: int,
    n_groups: int,
    n_nodes: int,
    hierarchical: bool,
) -> None:
    if load_LE.ndim != 2 or not load_LE.size:
        raise ValueError(
            f"expert loads have the shape {load_LE.shape}; give [layers, experts], at least one of "
            "each"
        )
    sizes = {"n_slots": n_slots, "n_devices": n_devices, "n_groups": n_groups, "n_nodes": n_nodes}
    problems = [f"{name}={size} must be at least 1" for name, size in sizes.items() if size < 1]
    if problems:
        raise ValueError("; ".join(problems))
    n_experts = load_LE.shape[1]
    if not (np.isfinite(load_LE).all() and (load_LE >= 0).all()):
        problems.append("expert loads must be finite and not negative")
    if n_slots < n_experts:
        problems.append(
            f"n_slots={n_slots} is fewer than the {n_experts} experts; each needs at least one"
        )
    if n_slots % n_devices:
        problems.append(
            f"n_slots={n_slots} does not divide over n_devices={n_devices}; use "
            f"{-(-max(n_slots, n_experts) // n_devices) * n_devices}"
        )
    if hierarchical and n_experts % n_groups:
        problems.append(
            f"{n_experts} experts do not divide into n_groups={n_groups}; give the router's groups"
        )
    if hierarchical and n_devices % n_nodes:
        problems.append(
            f"n_devices={n_devices} does not divide over n_nodes={n_nodes}; give nodes of equal "
            "size"
        )
    if problems:
        raise ValueError("; ".join(problems))
