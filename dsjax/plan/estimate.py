"""What a step takes on one device, by arithmetic: memory, memory traffic and network.

Arguments are exact: the declared shapes, split. The rest adds up what must exist at the step's
peak, in the backward pass of the heaviest layer or in the loss, whichever is larger. `docs/plan.md`
has these figures beside the compiler's.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh

from dsjax.config import ModelConfig
from dsjax.config.janus import Janus
from dsjax.config.roots import Planned
from dsjax.janus.training import declared_sighted, trained_parts
from dsjax.model import flops
from dsjax.model.block import attention_class
from dsjax.model.parameters import Declaration, declarations
from dsjax.parallel import schedules
from dsjax.parallel.expert_parallel import SLACK
from dsjax.parallel.lockstep import lock_step
from dsjax.parallel.sharding import AXIS_TABLE, parts, split_over, stored_spec
from dsjax.plan.janus import seen_by
from dsjax.plan.programs import Program, shard_bytes
from dsjax.train.optimizer import Trains
from dsjax.train.step import declared_model

BESIDE = "arrays beside the program"

_FLOAT32 = 4
_LANES = 128  # of a TPU's tile
_COMPUTE = {"bfloat16": 2, "float32": 4}


class Estimate(NamedTuple):
    """Bytes are per device, FLOPs of all devices together; all are per step."""

    parts: dict[str, int]  # bytes that exist at the step's peak
    memory_traffic: float  # bytes read and written
    network: float  # bytes sent
    program_flops: float  # recomputation included
    model_flops: float  # what the model needs (`dsjax.model.flops`)

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


class _Weights(NamedTuple):
    """Weights per device, in values: kept (split), and gathered for use."""

    kept: float
    worked: float  # as kept, or a pipeline's copies: the layers of its stages and the ends
    trained: float  # of these, those that have gradients
    gathered: float  # all layers that it works on
    largest_layer: float  # gathered
    head: float  # gathered


def estimate(config: Planned, mesh: AbstractMesh, program: Program, step: str) -> Estimate:
    """Estimates a program of `dsjax.plan.steps`."""
    kinds = {"train": _train, "score": _score, "decode": _decode}
    found = kinds[step](config, mesh, program, _weights(config, mesh))
    if program.beside:
        found.parts[BESIDE] = program.beside
    return found


def _weights(config: Planned, mesh: AbstractMesh) -> _Weights:
    declared, trains = _declared(config)
    layers: dict[str, float] = {}
    kept = worked = trained = gathered = head = 0.0
    for parameter in declared:
        stored, split, whole = _split(parameter, mesh)
        stack = parameter.path.partition(".")[0]
        in_body = parameter.axes[0] == "layers" and stack != "eyes"
        share = _stage_layers(config, mesh) / parameter.shape[0] if in_body else 1.0
        kept, worked = kept + stored, worked + share * split
        trained += share * split * bool(trains(tuple(parameter.path.split("."))))
        if in_body:
            layers[stack] = layers.get(stack, 0.0) + whole / parameter.shape[0]
            gathered += share * whole
        elif stack in ("head", "embed"):
            head = max(head, whole)
    return _Weights(kept, worked, trained, gathered, max(layers.values()), head)


def _declared(config: Planned) -> tuple[list[Declaration], Trains]:
    """Returns the parameters of a model, and which of them have gradients, in a model that sees
    only what `janus.trains` names.
    """
    if isinstance(config, Janus):
        declared = declared_sighted(config, seen_by(config))
        return declarations(declared), trained_parts(config.janus.trains)
    return declarations(declared_model(config.shape, config.precision)), lambda path: True


def _stage_layers(config: Planned, mesh: AbstractMesh) -> int:
    """Counts the layers that a device works on: all, or those of its stages in a pipeline."""
    name, ranks = config.mesh.schedule, mesh.shape["pipe"]
    per_rank = schedules.stages_per_rank(name)
    layers = config.shape.n_moe_layers or config.shape.n_layers
    if ranks == 1:
        return layers
    copies = 2 if name == "dualpipe" else 1
    return -(-layers // (ranks * per_rank)) * per_rank * copies


def _split(parameter: Declaration, mesh: AbstractMesh) -> tuple[float, float, float]:
    """Counts a device's shard as stored, as laid out for use, and as gathered for use: split over
    tensor and expert only.
    """
    spec = stored_spec(parameter.axes, parameter.shape, mesh, parameter.path)
    names = [name for entry in spec for name in split_over(entry)]
    split = gathered = float(parameter.count)
    for axis in parameter.axes:
        split /= parts(axis, mesh)
        if "fsdp" not in AXIS_TABLE[axis]:
            gathered /= parts(axis, mesh)
    return parameter.count / math.prod(mesh.shape[name] for name in names), split, gathered


def _train(config: Planned, mesh: AbstractMesh, program: Program, weights: _Weights) -> Estimate:
    model, item = config.shape, _COMPUTE[config.precision.compute]
    tokens = program.tokens_per_pass // (parts("batch", mesh) * parts("length", mesh))
    passes = program.tokens // program.tokens_per_pass
    accumulates = passes > program.updates
    pipelined = mesh.shape["pipe"] > 1
    n_mtp = model.n_mtp if program.mtp else 0
    layers = (_stage_layers(config, mesh) if pipelined else model.n_layers) + n_mtp
    again = {"none": 0, "selective": 0.5, "full": 1}[config.train.remat]
    memory = {
        "arguments": program.argument_bytes,
        "gradients": int(weights.trained * _FLOAT32) * (2 if accumulates and not pipelined else 1),
        "kept between the layers": int(tokens * layers * _kept_values(config, mesh) * item),
    }
    if pipelined:
        memory["parameters of the stages"] = int(weights.worked * _FLOAT32)
        memory["inputs of the stages"] = int(
            _waiting(config, mesh, passes) * tokens * model.dim * item
        )
    attention = tokens * _attention_values(model, mesh) * item
    routed = tokens * _routed_values(model, mesh) * item
    backward = int(max(attention, routed) + 2 * weights.largest_layer * item)
    chunk = min(config.train.loss_chunk, tokens)
    vocabulary = model.vocab_size / parts("vocab", mesh)
    loss = int(weights.head * (item + _FLOAT32) + 3 * chunk * vocabulary * _FLOAT32)
    memory["a layer's backward pass" if backward > loss else "the loss"] = max(backward, loss)
    optimizer = program.updates * (2.0 * program.argument_bytes + weights.kept * _FLOAT32)
    uses = 3 + again
    through = tokens * passes * layers * (_attention_values(model, mesh) + 12 * model.dim) * item
    traffic = optimizer + passes * uses * 2 * weights.gathered * item + uses * through
    per_pass = uses * (weights.gathered - weights.worked) * item
    per_pass += weights.gathered * _FLOAT32  # gradients, reduced to shards
    moe_layers = layers - (0 if pipelined else model.n_dense_layers)
    dispatch = moe_layers * _dispatch_bytes(model, mesh, tokens, item)
    sent = per_pass + dispatch * 2 * (1 + again)
    per_token = flops.train_flops_per_token(model, config.sequence_length, mtp=program.mtp)
    needed = per_token * program.tokens
    network = passes * sent if parts("batch", mesh) > 1 else 0.0
    return Estimate(memory, traffic, network, needed * (1 + again / 3), needed)


def _waiting(config: Planned, mesh: AbstractMesh, microbatches: int) -> int:
    """Counts the activations that a device stores between the stages and at the ends."""
    ranks, name = mesh.shape["pipe"], config.mesh.schedule
    stages = ranks * schedules.stages_per_rank(name)
    table = lock_step(schedules.build(name, stages, microbatches))
    slots = table.activation_slots + table.gradient_slots
    return table.stages.shape[1] * slots + 2 * -(-microbatches // ranks)


def _score(config: Planned, mesh: AbstractMesh, program: Program, weights: _Weights) -> Estimate:
    model, item = config.shape, _COMPUTE[config.precision.compute]
    tokens = program.tokens_per_pass // (parts("batch", mesh) * parts("length", mesh))
    passes = program.tokens // program.tokens_per_pass
    # Half of what the backward pass holds: no gradients.
    widest = max(_attention_values(model, mesh), _routed_values(model, mesh)) / 2
    memory = {
        "arguments": program.argument_bytes,
        "a layer's gathered weights": int(2 * weights.largest_layer * item),
        "a layer's activations": int(tokens * widest * item),
    }
    through = tokens * passes * model.n_layers * item
    through *= _attention_values(model, mesh) + 12 * model.dim
    traffic = program.argument_bytes + passes * 2 * weights.gathered * item + through
    sent = (weights.gathered - weights.worked) * item
    sent += model.n_moe_layers * _dispatch_bytes(model, mesh, tokens, item)
    needed = flops.forward_flops_per_token(model, config.sequence_length) * program.tokens
    return Estimate(memory, traffic, passes * sent, needed, needed)


def _decode(config: Planned, mesh: AbstractMesh, program: Program, weights: _Weights) -> Estimate:
    model, item = config.shape, _COMPUTE[config.precision.compute]
    tokens = max(program.tokens // parts("batch", mesh), 1)
    work = tokens * (_routed_values(model, mesh) + 4 * model.vocab_size) * item
    memory = {
        "arguments": program.argument_bytes,
        "a layer's gathered weights": int(2 * weights.largest_layer * item),
        "activations and logits": int(work),
    }
    narrow, in_tiles = _narrow_entries(program)
    if narrow:
        memory["cache entries in whole tiles"] = in_tiles
    gathered = (weights.gathered - weights.kept) * item
    # A new token attends to the whole cache.
    length = config.sequence_length
    needed = flops.forward_flops_per_token(model, length, causal=False) * program.tokens
    moe_layers = model.n_moe_layers + model.n_mtp
    network = gathered + moe_layers * _dispatch_bytes(model, mesh, tokens, item)
    # Such entries are copied there and back.
    traffic = program.argument_bytes + 2.0 * (gathered + narrow + in_tiles)
    return Estimate(memory, traffic, network, needed, needed)


def _narrow_entries(program: Program) -> tuple[int, int]:
    """Counts bytes of the cache entries whose channels do not fill a TPU's tiles: as arguments,
    which lie with positions as their last dimension, and in the step, which reads and writes them
    by position.
    """
    narrow = in_tiles = 0
    for entry in jax.tree.leaves(program.arguments[1].cache):
        if fill := -entry.shape[-1] % _LANES:
            size = shard_bytes(entry)
            narrow += size
            in_tiles += size + size * fill // entry.shape[-1]
    return narrow, in_tiles


def _kept_values(config: Planned, mesh: AbstractMesh) -> float:
    """Counts values per token and layer kept for the backward pass, on average over layers."""
    model, tensor = config.shape, parts("heads", mesh)
    # Of chosen keys: an index of four bytes, and whether it is valid.
    kept = model.dim + 5 * model.index_topk / _COMPUTE[config.precision.compute]
    if config.train.remat == "full":
        return kept
    kept += model.n_heads * model.value_head_dim / tensor
    kept += attention_class(model).latent_values(model)
    shared = model.n_shared_experts * model.moe_inter_dim
    routed = _rows_per_token(model, mesh) * model.moe_inter_dim
    moe_share = model.n_moe_layers / model.n_layers
    kept += 2 / tensor * (moe_share * (shared + routed) + (1 - moe_share) * model.inter_dim)
    if config.train.remat == "none":
        kept += _attention_values(model, mesh) / 2 + 4 * model.dim
    return kept


def _attention_values(model: ModelConfig, mesh: AbstractMesh) -> float:
    """Counts values per token of queries, keys, values, output and their gradients."""
    heads = model.n_heads * (2 * model.qk_head_dim + 2 * model.value_head_dim)
    return 2 * heads / parts("heads", mesh) + 4 * model.dim


def _rows_per_token(model: ModelConfig, mesh: AbstractMesh) -> float:
    """Counts the rows of the experts' buffers per token of the device."""
    slack = SLACK if parts("experts", mesh) > 1 else 1.0
    return slack * model.n_activated_experts if model.n_routed_experts else 0.0


def _routed_values(model: ModelConfig, mesh: AbstractMesh) -> float:
    """Counts values per token in the experts' buffers and their gradients."""
    tensor = parts("ffn", mesh)
    dense = 4 * model.inter_dim / tensor + 6 * model.dim
    rows = _rows_per_token(model, mesh)
    # At the peak, tokens on their way out and back fill some eighteen arrays as wide as the model,
    # float32 sums counted twice.
    return max(rows * (18 * model.dim + 6 * model.moe_inter_dim / tensor), dense)


def _dispatch_bytes(model: ModelConfig, mesh: AbstractMesh, tokens: int, item: int) -> float:
    """Counts bytes per device, pass and layer: tokens sent to experts elsewhere, sums returned."""
    ranks = parts("experts", mesh)
    if ranks == 1 or not model.n_routed_experts:
        return 0.0
    # As if each of a token's experts were on a different rank; those on its own rank cost nothing.
    copies = min(model.n_activated_experts, ranks) * (1 - 1 / ranks)
    return 2.0 * tokens * copies * model.dim * item
