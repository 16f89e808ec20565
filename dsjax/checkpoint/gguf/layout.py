"""The tensors of a GGUF file, and the published tensors that they hold.

`entries(model, family, arch)` expands the published names of a model (`checkpoint/names.py`) to the
tensors of its GGUF file, in layer order. Export and import use the same entries. They differ from
published tensors in four ways:

1. The experts of a layer are stacked in one tensor [experts, out, in].
2. `paired`: for the architectures `llama` and `deepseek`, llama.cpp rotates neighbouring channels
   of a head, where their checkpoints are published for a rotation of the two halves. The rows of
   queries and keys are reordered per head.
3. MLA's `kv_b_proj` [heads * (nope + v), rank] is split in two: `attn_k_b` [heads, rank, nope],
   transposed per head, and `attn_v_b` [heads, v, rank].
4. Llama-3's scaling of the rotation is a tensor, `rope_freqs`: the divisor of each frequency.

A multi-token prediction module is the block after the last, with `nextn` tensors. Its copies of
embedding and head are left out: llama.cpp takes the main ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np

from dsjax.checkpoint import names
from dsjax.checkpoint.names import Tensor
from dsjax.config import ModelConfig
from dsjax.model.rope import inverse_frequencies

Order = Literal["plain", "paired", "keys", "values"]
# Reads rows [start, stop) of a tensor.
ReadRows = Callable[[str, int, int], np.ndarray]

ROPE_FREQS = "rope_freqs.weight"
# What `--type` may name: a group of tensors.
GROUPS = ("experts", "shared", "dense", "attention", "mtp", "embedding", "head")

# Outside of the layers: first name in our tree, name in the file, group.
_TOP = {
    "embed": ("token_embd.weight", "embedding"),
    "norm": ("output_norm.weight", ""),
    "head": ("output.weight", "head"),
}
# Of a layer: published name, name in the file, group.
_LAYER: dict[str, tuple[str, str]] = {
    "input_layernorm.weight": ("attn_norm.weight", ""),
    "self_attn.q_a_proj.weight": ("attn_q_a.weight", "attention"),
    "self_attn.q_a_layernorm.weight": ("attn_q_a_norm.weight", ""),
    "self_attn.q_b_proj.weight": ("attn_q_b.weight", "attention"),
    "self_attn.kv_a_proj_with_mqa.weight": ("attn_kv_a_mqa.weight", "attention"),
    "self_attn.kv_a_layernorm.weight": ("attn_kv_a_norm.weight", ""),
    "self_attn.kv_b_proj.weight": ("attn_k_b.weight", "attention"),
    **{
        f"self_attn.{letter}_proj.{kind}": (f"attn_{letter}.{kind}", "attention")
        for letter in "qkv"
        for kind in ("weight", "bias")
    },
    "self_attn.q_norm.weight": ("attn_q_norm.weight", ""),
    "self_attn.k_norm.weight": ("attn_k_norm.weight", ""),
    "self_attn.o_proj.weight": ("attn_output.weight", "attention"),
    "post_attention_layernorm.weight": ("ffn_norm.weight", ""),
    "mlp.gate.weight": ("ffn_gate_inp.weight", ""),
    "mlp.gate.e_score_correction_bias": ("exp_probs_b.bias", ""),
    **{
        f"mlp.{place}{part}_proj.weight": (f"ffn_{part}{ending}.weight", group)
        for place, ending, group in (
            ("", "", "dense"),
            ("experts.*.", "_exps", "experts"),
            ("shared_experts.", "_shexp", "shared"),
        )
        for part in ("gate", "up", "down")
    },
    "enorm.weight": ("nextn.enorm.weight", ""),
    "hnorm.weight": ("nextn.hnorm.weight", ""),
    "eh_proj.weight": ("nextn.eh_proj.weight", "mtp"),
    "shared_head.norm.weight": ("nextn.shared_head_norm.weight", ""),
}


class Entry(NamedTuple):
    """A tensor of a GGUF file.

    Attributes:
      shape: as NumPy has it, [out, in] for a matrix.
      group: one of GROUPS, or "" for what is always float32: norms, biases, the router.
      sources: the published tensors, one per expert; none for `rope_freqs`.
      unit: published rows that can be converted alone: one, or those of a head.
      rows: rows in the file that a unit becomes.
    """

    name: str
    shape: tuple[int, ...]
    group: str
    sources: tuple[Tensor, ...]
    order: Order = "plain"
    unit: int = 1
    rows: int = 1

    @property
    def n_units(self) -> int:
        """Units of each source; a vector has one."""
        shape = self.sources[0].shape
        return shape[0] // self.unit if len(shape) == 2 else 1

    def convert(self, rows: np.ndarray, model: ModelConfig) -> np.ndarray:
        """Converts published rows of whole units to rows of the file, [rows, in]."""
        width = self.shape[-1]
        if self.order == "plain":
            return rows.reshape(-1, width)
        if self.order == "paired":
            halves = rows.reshape(-1, 2, self.unit // 2, width)
            return halves.swapaxes(1, 2).reshape(-1, width)
        heads = rows.reshape(-1, self.unit, rows.shape[-1])
        if self.order == "keys":
            return heads[:, : model.qk_nope_head_dim].swapaxes(1, 2).reshape(-1, width)
        return heads[:, model.qk_nope_head_dim :].reshape(-1, width)


def entries(model: ModelConfig, family: str, arch: str) -> Iterator[Entry]:
    """Yields the tensors of the GGUF file of a model, in layer order."""
    if model.rope_scaling == "llama3":
        yield Entry(ROPE_FREQS, (model.rope_dim // 2,), "", ())
    experts: dict[str, list[Tensor]] = {}
    for tensor in names.tensors(model, family):
        if tensor.is_copy:
            continue
        name, group = file_name(tensor, model, family)
        if group == "experts":
            experts.setdefault(name, []).append(tensor)
            if len(experts[name]) == model.n_routed_experts:
                sources = tuple(experts.pop(name))
                yield Entry(name, (len(sources), *tensor.shape), group, sources)
            continue
        yield from _entries(name, group, tensor, model, arch)


def _entries(
    name: str, group: str, tensor: Tensor, model: ModelConfig, arch: str
) -> Iterator[Entry]:
    sources = (tensor,)
    if name.endswith("attn_k_b.weight"):
        heads, nope, width = model.n_heads, model.qk_nope_head_dim, model.v_head_dim
        rank, unit = model.kv_lora_rank, nope + width
        yield Entry(name, (heads, rank, nope), group, sources, "keys", unit, rank)
        values = name.replace("attn_k_b", "attn_v_b")
        yield Entry(values, (heads, width, rank), group, sources, "values", unit, width)
    elif arch in ("llama", "deepseek") and name.endswith(("attn_q.weight", "attn_k.weight")):
        unit = model.qk_head_dim
        yield Entry(name, tensor.shape, group, sources, "paired", unit, unit)
    else:
        yield Entry(name, tensor.shape, group if len(tensor.shape) > 1 else "", sources)


def file_name(tensor: Tensor, model: ModelConfig, family: str) -> tuple[str, str]:
    """Returns the name and group of a published tensor in a GGUF file."""
    stack = tensor.path[0]
    if stack in _TOP:
        return _TOP[stack]
    layer = tensor.slot[0]
    layer += {"dense_layers": 0, "moe_layers": model.n_dense_layers, "mtp": model.n_layers}[stack]
    rest = tensor.name.removeprefix(names.layer_prefix(family, layer))
    if len(tensor.slot) == 2:
        rest = rest.replace(f"experts.{tensor.slot[1]}.", "experts.*.")
    name, group = _LAYER[rest]
    return f"blk.{layer}.{name}", group


def published_rows(
    tensor: Tensor, model: ModelConfig, family: str, arch: str, read: ReadRows, rows: slice
) -> np.ndarray:
    """Reads rows of a published tensor from a GGUF file, the reverse of `Entry.convert`.

    Args:
      read: returns rows [start, stop) of a tensor of the file, counted over all dimensions but the
        last; a vector is one row.
      rows: of the first dimension, with a start and a stop.
    """
    name, group = file_name(tensor, model, family)
    first, *others = _entries(name, group, tensor, model, arch)
    start, stop = rows.start, rows.stop
    if len(tensor.shape) == 1:
        return read(name, 0, 1)[0, start:stop]
    if group == "experts":
        before = tensor.slot[1] * tensor.shape[0]
        return read(name, before + start, before + stop)
    if first.order == "plain":
        return read(name, start, stop)
    begin, end = start // first.unit, -(-stop // first.unit)
    if first.order == "paired":
        pairs = read(name, begin * first.rows, end * first.rows)
        whole = pairs.reshape(end - begin, first.unit // 2, 2, -1).swapaxes(1, 2)
    else:
        (values,) = others
        keys = read(name, begin * first.rows, end * first.rows)
        keys = keys.reshape(end - begin, first.rows, -1).swapaxes(1, 2)
        width = read(values.name, begin * values.rows, end * values.rows)
        whole = np.concatenate([keys, width.reshape(end - begin, values.rows, -1)], axis=1)
    flat = whole.reshape((end - begin) * first.unit, -1)
    return flat[start - begin * first.unit : stop - begin * first.unit]


def rope_divisors(model: ModelConfig) -> np.ndarray:
    """Returns Llama-3's divisor of each frequency of the rotation, float32 [rope dim / 2]."""
    plain = inverse_frequencies(dataclasses.replace(model, rope_scaling="none"))
    return (plain / inverse_frequencies(model)).astype(np.float32)
