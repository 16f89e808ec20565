"""What a model costs: parameters, floating-point operations per token, cache bytes per token.

Conventions: a multiplication and an addition are two operations; a training step is three forward
passes (recomputation does not count); embedding lookup, norms and softmax are free. Causal
attention counts half of the square of queries and keys, full attention all of it; published figures
use both. For DeepSeek-V3 at 4,096 tokens this gives 250.4 G causal and 281.2 G full without MTP,
and 260.6 G causal with it: the three figures that published throughput tables imply.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import NamedTuple, Protocol

from dsjax.config import ModelConfig
from dsjax.model.block import attention_class


class Declared(Protocol):
    """A parameter of `dsjax.model.parameters.declarations`."""

    @property
    def path(self) -> str: ...
    @property
    def count(self) -> int: ...


class Counts(NamedTuple):
    """Parameters of a model. MTP modules are counted apart, as in published counts."""

    total: int  # main model
    activated: int  # used per token by the main model; embedding and head included
    mtp: int


def count_parameters(declared: Iterable[Declared], model: ModelConfig) -> Counts:
    """Counts declared parameters; each token activates its share of the routed experts."""
    total = mtp = 0
    activated = Fraction(0)
    for parameter in declared:
        if parameter.path.startswith("mtp."):
            mtp += parameter.count
            continue
        total += parameter.count
        share = Fraction(1)
        if ".experts." in parameter.path:
            share = Fraction(model.n_activated_experts, model.n_routed_experts)
        activated += share * parameter.count
    return Counts(total, int(activated), mtp)


def train_flops_per_token(
    model: ModelConfig, length: int, *, causal: bool = True, mtp: bool = True
) -> int:
    """Returns the operations of a training step per token of a sequence of `length`."""
    return 3 * forward_flops_per_token(model, length, causal=causal, mtp=mtp)


def forward_flops_per_token(
    model: ModelConfig, length: int, *, causal: bool = True, mtp: bool = False
) -> int:
    """Returns the operations of a forward pass per token of a sequence of `length`."""
    weights = matmul_parameters(model)
    layers = model.n_layers
    if mtp:
        weights += model.n_mtp * mtp_matmul_parameters(model)
        layers += model.n_mtp
    return 2 * weights + layers * attention_class(model).context_flops(model, length, causal)


def matmul_parameters(model: ModelConfig) -> int:
    """Returns the number of weights that multiply a token in the main model: activated experts, no
    lookup.
    """
    layers = model.n_layers * attention_class(model).matmul_parameters(model)
    layers += model.n_dense_layers * _feed_forward(model.dim, model.inter_dim)
    layers += model.n_moe_layers * _experts(model)
    return layers + model.dim * model.vocab_size


def mtp_matmul_parameters(model: ModelConfig) -> int:
    """Returns the same for one MTP module: the projection, its layer, and the shared head again."""
    dense = _feed_forward(model.dim, model.inter_dim)
    layer = attention_class(model).matmul_parameters(model)
    layer += _experts(model) if model.n_moe_layers else dense
    return 2 * model.dim**2 + layer + model.dim * model.vocab_size


def cache_bytes_per_token(model: ModelConfig, bytes_per_value: int = 2) -> int:
    """Returns the bytes that decoding caches per token over all layers; 2 per value is bfloat16."""
    entries = attention_class(model).cached(model).values()
    values = sum(
        (model.n_layers if entry.layers is None else entry.layers)
        * Fraction(entry.heads * entry.width, entry.every)
        for entry in entries
    )
    return math.ceil(values * bytes_per_value)


def _experts(model: ModelConfig) -> int:
    used = model.n_activated_experts + model.n_shared_experts
    router = model.dim * model.n_routed_experts
    return used * _feed_forward(model.dim, model.moe_inter_dim) + router


def _feed_forward(dim: int, hidden: int) -> int:
    return 3 * dim * hidden
