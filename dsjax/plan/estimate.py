"""What a step takes on one device, by arithmetic: memory, memory traffic and network.

Arguments are exact: the declared shapes, split. The rest adds up what must exist at the step's
peak, in the backward pass of the heaviest layer or in the loss, whichever is larger. `docs/plan.md`
has these figures beside the compiler's.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh

from dsjax.config import Config, ModelConfig
from dsjax.config.janus import Janus
from dsjax.config.roots import Planned
from dsjax.janus.training import declared_sighted, trained_parts
from dsjax.model import flops
from dsjax.model.block import attention_class
from dsjax.model.parameters import Declaration, declarations
from dsjax.parallel import schedules
from dsjax.parallel.expert_parallel import SLACK
from dsjax.parallel.lockstep import lock_step
from dsjax.parallel.sharding import AXIS_TABLE, LookUp, parts, split_over, stored_spec
from dsjax.plan.janus import seen_by
from dsjax.plan.programs import Program, shard_bytes
from dsjax.posttrain.initial import all_but_mtp
from dsjax.train.optimizer import Trains
from dsjax.train.pretraining import trained_by
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
    trained: float  # of `worked`
    stage: float  # of `trained`, the layers of one stage of a pipeline
    gathered: float  # all layers that it works on
    received: float  # of `gathered`, from other devices
    turned: float  # the projections from latents to heads
    experts: float  # gathered, the routed experts of one layer
    others: float  # gathered, all else of the layer
    vocabulary: float  # gathered, the larger of embedding and head


def estimate(config: Planned, mesh: AbstractMesh, program: Program, step: str) -> Estimate:
    """Estimates a program of `dsjax.plan.steps`."""
    kinds = {"train": _train, "score": _score, "decode": _decode}
    found = kinds[step](config, mesh, program)
    if program.beside:
        found.parts[BESIDE] = program.beside
    return found


def _weights(config: Planned, mesh: AbstractMesh, program: Program) -> _Weights:
    layers: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    kept = worked = trained = stage = gathered = received = turned = vocabulary = 0.0
    n_layers, n_stages = _stage_layers(config, mesh), _stages(config, mesh)
    declared, trains = _declared(config, program)
    for parameter in declared:
        stored, split, whole = _split(parameter, mesh, program.look_up)
        path = tuple(parameter.path.split("."))
        in_body = parameter.axes[0] == "layers" and path[0] != "eyes"
        share = n_layers / parameter.shape[0] if in_body else 1.0
        kept, worked = kept + stored, worked + share * split
        turned += split if "latent_heads" in parameter.axes else 0.0
        if trains(path):
            trained += share * split
            stage += share * split / n_stages if in_body else 0.0
        if in_body:
            gathered, received = gathered + share * whole, received + share * (whole - split)
            experts, others = layers[path[0]]
            one = whole / parameter.shape[0]
            in_experts = "experts" in parameter.axes
            layers[path[0]] = (experts + one, others) if in_experts else (experts, others + one)
        elif path[0] in ("head", "embed"):
            vocabulary = max(vocabulary, whole)
    largest = max(layers.values(), key=sum)
    return _Weights(kept, worked, trained, stage, gathered, received, turned, *largest, vocabulary)


def _declared(config: Planned, program: Program) -> tuple[list[Declaration], Trains]:
    """Returns the parameters of a model, and which of them have gradients, in a model that sees
    only what `janus.trains` names.
    """
    if isinstance(config, Janus):
        declared = declared_sighted(config, seen_by(config))
        return declarations(declared), trained_parts(config.janus.trains)
    declared = declarations(declared_model(config.shape, config.precision))
    if isinstance(config, Config):
        return declared, trained_by(config)
    return declared, (lambda path: True) if program.mtp else all_but_mtp


def _stage_layers(config: Planned, mesh: AbstractMesh) -> int:
    """Counts the layers that a device works on: all, or those of its stages in a pipeline."""
    ranks, layers = mesh.shape["pipe"], config.shape.n_moe_layers or config.shape.n_layers
    if ranks == 1:
        return layers
    per_rank = schedules.stages_per_rank(config.mesh.schedule)
    return -(-layers // (ranks * per_rank)) * _stages(config, mesh)


def _stages(config: Planned, mesh: AbstractMesh) -> int:
    """Counts the stages that a device holds."""
    if mesh.shape["pipe"] == 1:
        return 1
    name = config.mesh.schedule
    return schedules.stages_per_rank(name) * (2 if name == "dualpipe" else 1)


def _split(
    parameter: Declaration, mesh: AbstractMesh, look_up: LookUp
) -> tuple[float, float, float]:
    """Counts a device's shard as the train state has it, as the layers find it, and as gathered for
    use: split over tensor and expert only.
    """

    def shard(look_up: LookUp) -> float:
        spec = look_up(parameter.axes, parameter.shape, mesh, parameter.path)
        names = [name for entry in spec for name in split_over(entry)]
        return parameter.count / math.prod(mesh.shape[name] for name in names)

    gathered = float(parameter.count)
    for axis in parameter.axes:
        names = AXIS_TABLE[axis]
        at_use = [name for name in names if name == "tensor" or "fsdp" not in names]
        gathered /= math.prod(mesh.shape[name] for name in at_use)
    return shard(stored_spec), shard(look_up), gathered


def _train(config: Planned, mesh: AbstractMesh, program: Program) -> Estimate:
    model, item = config.shape, _COMPUTE[config.precision.compute]
    weights = _weights(config, mesh, program)
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
    }
    if pipelined or item < _FLOAT32:
        # Cast before the loop over the layers, which reads nothing else of them.
        memory["weights in the compute type"] = int(weights.worked * item)
    if pipelined:
        waiting = _waiting(config, mesh, passes)
        memory["inputs of the stages"] = int(waiting * tokens * model.dim * item)
        memory |= _heaviest_in_pipeline(config, mesh, tokens, n_mtp, weights)
    else:
        memory["kept between the layers"] = int(tokens * layers * _kept_values(config, mesh) * item)
        if n_mtp and not _warms_up(config):
            memory["rows of the MTP module's experts"] = _mtp_rows(config, mesh, tokens, weights)
        if _warms_up(config):
            layer = {"a layer's forward pass": _layer_forward(config, mesh, tokens)}
        else:
            layer = {"a layer's backward pass": _layer_backward(config, mesh, tokens, weights)}
        memory |= _heaviest(layer, {"the loss": _loss(config, mesh, tokens, weights)})
    optimizer = program.updates * (2.0 * program.argument_bytes + weights.kept * _FLOAT32)
    uses = 3 + again
    through = tokens * passes * layers * (_attention_values(model, mesh) + 12 * model.dim) * item
    traffic = optimizer + passes * uses * 2 * weights.gathered * item + uses * through
    per_pass = uses * weights.received * item
    per_pass += weights.gathered * _FLOAT32  # gradients, reduced to shards
    moe_layers = layers - (0 if pipelined else model.n_dense_layers)
    dispatch = moe_layers * _dispatch_bytes(model, mesh, tokens, item)
    sent = per_pass + dispatch * 2 * (1 + again)
    per_token = flops.train_flops_per_token(model, config.sequence_length, mtp=program.mtp)
    needed = per_token * program.tokens
    network = passes * sent if parts("batch", mesh) > 1 else 0.0
    return Estimate(memory, traffic, network, needed * (1 + again / 3), needed)


def _layer_backward(config: Planned, mesh: AbstractMesh, tokens: int, weights: _Weights) -> int:
    """Counts what one layer takes in its backward pass at the most: while its keys are put
    together, while gradients of its experts' rows return, with attention's arrays beside them, or
    in attention.
    """
    model, item = config.shape, _COMPUTE[config.precision.compute]
    keys, queries = _attention_bytes(config, mesh, tokens)
    rows = tokens * _routed_values(model, mesh) * item + weights.experts * (2 * item + _FLOAT32)
    attention = 2 * (keys + queries) + tokens * 4 * model.dim * item
    attention += weights.others * (item + _FLOAT32)
    return int(max(2 * keys, keys + queries + rows, attention))


def _layer_forward(config: Planned, mesh: AbstractMesh, tokens: int) -> int:
    """Counts what one layer's activations take at the most, where no backward pass follows."""
    model, item = config.shape, _COMPUTE[config.precision.compute]
    keys, queries = _attention_bytes(config, mesh, tokens)
    # While the rows return: their sum in float32 (two), what arrives of it, and what is sent.
    rows = _rows_per_token(model, mesh) * 4 * model.dim or _routed_values(model, mesh) / 2
    return int(max(2 * keys, keys + queries, tokens * rows * item))


def _attention_bytes(config: Planned, mesh: AbstractMesh, tokens: int) -> tuple[int, int]:
    """Counts the bytes of keys and values, which a device has of whole sequences, and of queries
    and output, of its own tokens. While keys and values are put together out of a product with the
    latents and a rotated key, all of these exist: twice as much.
    """
    model, item = config.shape, _COMPUTE[config.precision.compute]
    heads = tokens * model.n_heads / parts("heads", mesh) * item
    if model.attention == "mla" and model.index_topk and not _warms_up(config):
        latent = model.kv_lora_rank  # few keys of each query, as latents
        width = _in_tiles(latent + model.qk_rope_head_dim) + _in_tiles(latent)
        return 0, int(heads * width)
    own = int(heads * (_in_tiles(model.qk_head_dim) + _in_tiles(model.value_head_dim)))
    return own * parts("length", mesh), own


def _loss(config: Planned, mesh: AbstractMesh, tokens: int, weights: _Weights) -> int:
    chunk = min(config.train.loss_chunk, tokens)
    vocabulary = config.shape.vocab_size / parts("vocab", mesh)
    head = weights.vocabulary * (_COMPUTE[config.precision.compute] + _FLOAT32)
    return int(head + 3 * chunk * vocabulary * _FLOAT32)


def _mtp_rows(config: Planned, mesh: AbstractMesh, tokens: int, weights: _Weights) -> int:
    """Counts what the MTP module's experts leave behind: their rows and gradients of rows, and sums
    of their weights' gradients. The compiler has the layers' backward pass, for which nothing of
    this is needed, come before the products that add the rest.
    """
    model, item = config.shape, _COMPUTE[config.precision.compute]
    values = 2 * model.dim + 3 * model.moe_inter_dim / parts("ffn", mesh)
    rows = tokens * _rows_per_token(model, mesh) * values * item
    return int(rows + weights.experts * _FLOAT32)


def _heaviest_in_pipeline(
    config: Planned, mesh: AbstractMesh, tokens: int, n_mtp: int, weights: _Weights
) -> dict[str, int]:
    """Counts what exists in a tick besides what all ticks keep: the backward pass of a stage, whose
    layers' gradients are all there before they are added to the sums, or that of the end, whichever
    is more.
    """
    item = _COMPUTE[config.precision.compute]
    layers = _stage_layers(config, mesh) // _stages(config, mesh)
    layer = _layer_backward(config, mesh, tokens, weights)
    kept = tokens * _kept_values(config, mesh) * item
    stage = {
        "gradients of a stage": int(weights.stage * _FLOAT32),
        "kept between the layers": int(layers * kept),
        "a layer's backward pass": layer,
    }
    end = {"the loss": _loss(config, mesh, tokens, weights)}
    if n_mtp:
        # The embedding is looked up by hand there: its gradient is whole, before and in its sum.
        embedding = int(2 * weights.vocabulary * _FLOAT32)
        module = {"kept of the MTP modules": int(n_mtp * kept), "a layer's backward pass": layer}
        end = _heaviest(end, {"gradient of the embedding": embedding}, module)
    return _heaviest(stage, end)


def _heaviest(*moments: dict[str, int]) -> dict[str, int]:
    return max(moments, key=lambda parts: sum(parts.values()))


def _warms_up(config: Planned) -> bool:
    """Tells whether indexers alone are trained: nothing else has a backward pass."""
    return config.train.indexer == "warmup"


def _waiting(config: Planned, mesh: AbstractMesh, microbatches: int) -> int:
    """Counts the activations that a device stores between the stages and at the ends."""
    ranks, name = mesh.shape["pipe"], config.mesh.schedule
    stages = ranks * schedules.stages_per_rank(name)
    table = lock_step(schedules.build(name, stages, microbatches))
    slots = table.activation_slots + table.gradient_slots
    return table.stages.shape[1] * slots + 2 * -(-microbatches // ranks)


def _score(config: Planned, mesh: AbstractMesh, program: Program) -> Estimate:
    model, item = config.shape, _COMPUTE[config.precision.compute]
    weights = _weights(config, mesh, program)
    tokens = program.tokens_per_pass // (parts("batch", mesh) * parts("length", mesh))
    passes = program.tokens // program.tokens_per_pass
    memory = {
        "arguments": program.argument_bytes,
        "a layer's gathered weights": int((weights.experts + weights.others) * item),
        "a layer's activations": _layer_forward(config, mesh, tokens),
    }
    through = tokens * passes * model.n_layers * item
    through *= _attention_values(model, mesh) + 12 * model.dim
    traffic = program.argument_bytes + passes * 2 * weights.gathered * item + through
    sent = weights.received * item
    sent += model.n_moe_layers * _dispatch_bytes(model, mesh, tokens, item)
    needed = flops.forward_flops_per_token(model, config.sequence_length) * program.tokens
    return Estimate(memory, traffic, passes * sent, needed, needed)


def _decode(config: Planned, mesh: AbstractMesh, program: Program) -> Estimate:
    model, item = config.shape, _COMPUTE[config.precision.compute]
    weights = _weights(config, mesh, program)
    tokens = max(program.tokens // parts("batch", mesh), 1)
    work = tokens * (_routed_values(model, mesh) + 4 * model.vocab_size) * item
    memory = {
        "arguments": program.argument_bytes,
        "activations and logits": int(work),
    }
    if weights.received:
        memory["a layer's gathered weights"] = int((weights.experts + weights.others) * item)
    if weights.turned:
        memory["projections from latents in another order"] = int(weights.turned * item)
    narrow, in_tiles = _narrow_entries(program)
    if narrow:
        memory["cache entries in whole tiles"] = in_tiles
    gathered = weights.received * item
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
        width = entry.shape[-1]
        if width % _LANES:
            size = shard_bytes(entry)
            narrow += size
            in_tiles += size * _in_tiles(width) // width
    return narrow, in_tiles


def _kept_values(config: Planned, mesh: AbstractMesh) -> float:
    """Counts values per token and layer kept for the backward pass, on average over layers."""
    model, tensor = config.shape, parts("heads", mesh)
    # Of chosen keys: an index of four bytes, and whether it is valid.
    chosen = 0 if _warms_up(config) else 5 * model.index_topk
    kept = model.dim + chosen / _COMPUTE[config.precision.compute]
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
    """Counts values per token in the experts' buffers, when most of them are in use."""
    tensor = parts("ffn", mesh)
    dense = 4 * model.inter_dim / tensor + 6 * model.dim
    # While gradients of the rows return: their sum in float32 (two), what arrives of it, what is
    # sent, and the rows, as they are and in whole tiles; gate, up and their gradients.
    values = 6 * model.dim + 5 * model.moe_inter_dim / tensor
    return max(_rows_per_token(model, mesh) * values, dense)


def _in_tiles(width: int) -> int:
    return width + -width % _LANES


def _dispatch_bytes(model: ModelConfig, mesh: AbstractMesh, tokens: int, item: int) -> float:
    """Counts bytes per device, pass and layer: tokens sent to experts elsewhere, sums returned."""
    ranks = parts("experts", mesh)
    if ranks == 1 or not model.n_routed_experts:
        return 0.0
    # As if each of a token's experts were on a different rank; those on its own rank cost nothing.
    copies = min(model.n_activated_experts, ranks) * (1 - 1 / ranks)
    return 2.0 * tokens * copies * model.dim * item
