"""The two-way table of tensor names: Hugging Face's tensors on one side, the leaves of our
parameter tree on the other.

`tensors(model, family)` expands the rules of a family (families/) for a config: it yields every
tensor of a published checkpoint of that shape once. Import and export read the same rows, so the
renaming is invertible by construction.

The two sides differ in three ways:
1. Hugging Face stores projections [out, in] and computes `x @ w.T`; ours are [in, out]. `transpose`
   marks these rows.
2. Hugging Face stores one tensor per layer and expert; ours are stacked, so a row is one slot of a
   leaf [L, ...] or [L, E, ...].
3. A multi-token prediction module is published as one more layer after the last (V3:
   `model.layers.61`), with copies of the embedding and the head beside its own tensors. Our module
   shares the main ones: a copy is compared on import and written again on export.

No channel is permuted. MLA's rope channels are published as adjacent pairs, and `model/mla.py`
rotates adjacent pairs; the llama-like families are published for a half-split rotation, and
`model/gqa.py` rotates halves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from dsjax.checkpoint import families
from dsjax.checkpoint.families.family import Rule
from dsjax.config import ModelConfig


class Tensor(NamedTuple):
    """One tensor of a Hugging Face checkpoint, and its place in our parameter tree."""

    name: str
    path: tuple[str, ...]  # of the leaf
    slot: tuple[int, ...]  # index of the tensor in the leaf: (), (layer,) or (layer, expert)
    shape: tuple[int, ...]  # as published
    transpose: bool  # published [out, in], ours [in, out]
    is_copy: bool = False  # a copy of a tensor that another row describes
    keep_float32: bool = False  # always float32: the router's bias, an indexer's norm
    trains: bool = True  # False: the router's bias, which no gradient reaches
    quantized: bool = False  # FP8 checkpoints store it in FP8, with a `_scale_inv`
    integer: bool = False  # int64 as published: a table of experts by token

    @property
    def target_shape(self) -> tuple[int, ...]:
        """Shape of this tensor's part of the leaf."""
        return self.shape[::-1] if self.transpose else self.shape


def tensors(model: ModelConfig, family: str) -> Iterator[Tensor]:
    """Yields every tensor of a checkpoint of this family and shape.

    Raises:
      ValueError: the family has no names for a model of this shape.
    """
    declared = families.find(family)
    if not declared.names(model):
        others = families.naming(model)
        raise ValueError(
            f"family {family} has no names for model.attention={model.attention}, "
            f"qkv_bias={model.qkv_bias}, n_routed_experts={model.n_routed_experts}, "
            f"router_bias={model.router_bias}, n_mtp={model.n_mtp}, "
            f"index_topk={model.index_topk}; "
            + (f"choose {' or '.join(others)}" if others else "nor has any other, so it stays here")
        )
    prefix, vocabulary = declared.prefix, (model.vocab_size, model.dim)
    embedding, final = ("embed", "weight"), ("norm", "weight")
    yield Tensor(prefix + declared.top.embedding, embedding, (), vocabulary, False)
    for layer, place in enumerate(declared.places(model)):
        yield from _expand(
            place.rules, layer_prefix(family, layer), place.stack, place.number, model
        )
    yield from _expand(declared.outside_layers(model), prefix, (), None, model)
    yield Tensor(prefix + declared.top.norm, final, (), (model.dim,), False)
    if not model.tie_embed:
        yield Tensor(head_name(family), ("head", "weight"), (), vocabulary, True)
    for depth in range(model.n_mtp):
        layer = layer_prefix(family, model.n_layers + depth)
        yield from _mtp(declared.layer(model, moe=model.n_moe_layers > 0), layer, depth, model)


def layer_prefix(family: str, layer: int) -> str:
    """Returns the prefix of the names of a layer's tensors."""
    declared = families.find(family)
    return f"{declared.prefix}{declared.top.layers}{layer}."


def head_name(family: str) -> str:
    """Returns the name of the output head."""
    declared = families.find(family)
    return declared.prefix + declared.top.head


def _mtp(rules: list[Rule], prefix: str, depth: int, model: ModelConfig) -> Iterator[Tensor]:
    """Yields the tensors of one multi-token prediction module."""
    dim, index, vocabulary = model.dim, (depth,), (model.vocab_size, model.dim)
    embedding = ("embed", "weight")
    yield Tensor(prefix + "embed_tokens.weight", embedding, (), vocabulary, False, is_copy=True)
    for name, leaf in (("enorm.weight", "enorm"), ("hnorm.weight", "hnorm")):
        yield Tensor(prefix + name, ("mtp", leaf, "weight"), index, (dim,), False)
    # Input columns: the embedding first, then the hidden state (the paper's bracket lists them the
    # other way round).
    yield Tensor(prefix + "eh_proj.weight", ("mtp", "eh_proj"), index, (dim, 2 * dim), True)
    yield from _expand(rules, prefix, ("mtp", "layer"), depth, model)
    yield Tensor(
        prefix + "shared_head.norm.weight", ("mtp", "norm", "weight"), index, (dim,), False
    )
    head = embedding if model.tie_embed else ("head", "weight")
    name = prefix + "shared_head.head.weight"
    yield Tensor(name, head, (), vocabulary, not model.tie_embed, is_copy=True)


def _expand(
    rules: list[Rule], prefix: str, stack: tuple[str, ...], index: int | None, model: ModelConfig
) -> Iterator[Tensor]:
    for rule in rules:
        for expert in range(model.n_routed_experts) if rule.expert else (None,):
            yield Tensor(
                prefix + rule.name.format(expert=expert),
                stack + rule.path,
                tuple(number for number in (index, expert) if number is not None),
                rule.shape,
                rule.transpose,
                keep_float32=rule.keep_float32,
                trains=rule.trains,
                quantized=rule.quantized,
                integer=rule.integer,
            )
