"""Redundant experts in use: loads are counted while requests run, and experts move to even them.

Each program counts the tokens of each expert on the devices and returns the sums with its tokens.
After some steps EPLB (`dsjax.parallel.eplb`) computes a placement from them, and layers that gain
by it move, between two steps and within the devices' own memory. Loads alone decide, never a clock.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from dsjax.model import redundant_experts
from dsjax.model.transformer import Transformer
from dsjax.parallel import eplb
from dsjax.parallel.eplb import Placement

_logger = logging.getLogger(__name__)
_WORTH = 0.95  # of the heaviest load before: a layer that gains less does not move


class Balance(NamedTuple):
    """The heaviest device's load relative to the mean, averaged over layers; 1 is even.

    The loads are those of the steps up to the latest look at them, an expert's shared evenly by its
    replicas.
    """

    plain: float = 1.0  # with the experts in order, without replicas
    before: float = 1.0  # as the experts were
    after: float = 1.0  # as they are now
    placements: int = 0  # how often any have moved


class Balancer:
    """Owns where a model's experts are.

    Attributes:
      balance: what the latest placement has changed.
    """

    def __init__(self, model: Transformer, mesh: Mesh, *, n_redundant: int, every: int) -> None:
        """Lays the model's experts out by slot, in place, as if all had equal loads.

        Args:
          mesh: of the model.
          n_redundant: slots per layer beyond one for each expert.
          every: steps of the engine from one placement to the next.

        Raises:
          ValueError: `every` is below 1, or see `redundant_experts.check`.
        """
        config, self._n_ranks = model.config, mesh.shape["expert"]
        redundant_experts.check(config, n_redundant, self._n_ranks)
        if every < 1:
            raise ValueError(f"eplb_every={every} must be at least 1 step")
        self._model, self._n_redundant, self._every = model, n_redundant, every
        self._load_LE = np.zeros((config.n_moe_layers, config.n_routed_experts), np.int64)
        self._steps = 0
        self._placement = self._balanced(np.ones_like(self._load_LE))
        redundant_experts.place(model, self._placement, n_redundant=n_redundant)
        # Moves nothing, but compiles what moves experts later, between the steps of requests.
        redundant_experts.place(model, self._placement, self._placement, n_redundant=n_redundant)
        self.balance = Balance()

    def add(self, load_LE: np.ndarray) -> None:
        """Adds the loads of a step, and moves experts when it is time."""
        self._load_LE += load_LE
        self._steps += 1
        if self._steps >= self._every and self._load_LE.any():
            self._rebalance()
            self._load_LE[:], self._steps = 0, 0

    def _rebalance(self) -> None:
        found = self._balanced(self._load_LE)
        heaviest_L, would_be_L = (
            _heaviest(eplb.device_loads(self._load_LE, placement, self._n_ranks))
            for placement in (self._placement, found)
        )
        plain = self._load_LE.reshape(len(self._load_LE), self._n_ranks, -1).sum(axis=2)
        moves_L = would_be_L < _WORTH * heaviest_L
        placements = self.balance.placements
        if moves_L.any():
            old, self._placement = self._placement, _merged(moves_L, found, self._placement)
            redundant_experts.place(
                self._model, self._placement, old, n_redundant=self._n_redundant
            )
            placements += 1
        after_L = np.where(moves_L, would_be_L, heaviest_L)
        before, after = float(heaviest_L.mean()), float(after_L.mean())
        self.balance = Balance(float(_heaviest(plain).mean()), before, after, placements)
        _logger.info(
            "experts moved in %d of %d layers: the heaviest device has %.2f times the mean load, "
            "before %.2f, without replicas %.2f",
            moves_L.sum(), len(moves_L), after, before, self.balance.plain,
        )  # fmt: skip

    def _balanced(self, load_LE: np.ndarray) -> Placement:
        n_slots = load_LE.shape[1] + self._n_redundant
        return eplb.balance(load_LE, n_slots, self._n_ranks)


def _heaviest(load_LN: np.ndarray) -> np.ndarray:
    """Returns the heaviest device's load relative to the mean for each layer; 1 for no load."""
    mean_L = load_LN.mean(axis=1)
    return np.where(mean_L > 0, load_LN.max(axis=1) / np.maximum(mean_L, 1e-9), 1.0)


def _merged(moves_L: np.ndarray, new: Placement, old: Placement) -> Placement:
    """Returns the placement that is new in some layers."""
    most = max(new.slots_LEX.shape[2], old.slots_LEX.shape[2])

    def widened(slots_LEX: np.ndarray) -> np.ndarray:
        more = most - slots_LEX.shape[2]
        return np.pad(slots_LEX, ((0, 0), (0, 0), (0, more)), constant_values=-1)

    return Placement(
        np.where(moves_L[:, None], new.expert_LP, old.expert_LP),
        np.where(moves_L[:, None, None], widened(new.slots_LEX), widened(old.slots_LEX)),
        np.where(moves_L[:, None], new.count_LE, old.count_LE),
        new.hierarchical,
    )
