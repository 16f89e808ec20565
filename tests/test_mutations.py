"""Each known mistake, made on purpose: the equivalence checks must fail on every one.

A row breaks one thing, by patching a function, by altering the config (`change`) or by altering the
weights as a wrong conversion or a wrong reading would (`edit`), and names the check that has to
notice. `rule` is the mistake's family:

1 rotary layout; 2 attention scale and frequencies; 3 the bias only selects; 4 the bias is float32;
5 expert groups; 6 router in float32; 7 order, scale and epsilon; 8 bias update and loads; 9 balance
losses; 10 multi-token prediction; 11 sparse attention; 14 no token dropped. Rule 18, losses lost on
the way out of a scan, is at the end of this file.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.kernels import sparse_attention
from dsjax.model import balance, inputs, layers, mla, moe, rope, router, transformer
from dsjax.model.indexer import Indexer
from dsjax.parallel import context, expert_parallel, routing_plan
from dsjax.train import loss
from tests.golden import checkpoint, compare, ours
from tests.golden.cases import ORACLE_CASES
from tests.oracles import losses
from tests.oracles import transformer as oracle


class Check(NamedTuple):
    """A comparison of `tests.golden.compare` with its arguments."""

    run: Callable[..., None]
    arguments: tuple[Any, ...] = ()


V3_ATTENTION = Check(compare.against_golden, ("v3", "attention"))
NEGATIVE_ATTENTION = Check(compare.against_golden, ("v3_negative_bias", "attention"))
LLAMA_ATTENTION = Check(compare.against_golden, ("llama", "attention"))
LINEAR_ATTENTION = Check(compare.against_golden, ("llama_linear", "attention"))
QWEN2_ATTENTION = Check(compare.against_golden, ("qwen2", "attention"))
QWEN3_ATTENTION = Check(compare.against_golden, ("qwen3", "attention"))
V3_ROUTER = Check(compare.against_golden, ("v3", "router"))
NEGATIVE_ROUTER = Check(compare.against_golden, ("v3_negative_bias", "router"))
V2_ROUTER = Check(compare.against_golden, ("v2", "router"))
V2_LITE_ROUTER = Check(compare.against_golden, ("v2_lite", "router"))
V32_ATTENTION = Check(compare.against_golden, ("v32", "attention"))
V32_ISOLATED = Check(compare.against_oracle, ("v32_mtp", True))
V3_MOE = Check(compare.against_golden, ("v3", "moe"))
V3_NORM = Check(compare.against_golden, ("v3", "norm"))
V3_DENSE = Check(compare.against_golden, ("v3", "dense"))
LLAMA_LOGITS = Check(compare.against_golden, ("llama", "logits"))
MTP = Check(compare.against_oracle, ("v3_mtp",))
MTP_ISOLATED = Check(compare.against_oracle, ("v3_mtp", True))
MOE_ISOLATED = Check(compare.against_oracle, ("deepseek_moe", True))
SEQUENCE_LOSS = Check(compare.against_balance_oracle, ("sequence", True))
EXPERT_LOSS = Check(compare.against_balance_oracle, ("expert", True))
BIAS_UPDATE = Check(compare.against_bias_oracle)
TINY_SCORES = Check(compare.against_tiny_scores)
LOSS_ISOLATED = Check(compare.against_loss_oracle, (True,))
CROWDED = Check(compare.against_crowded_oracle)


class Mutation(NamedTuple):
    rule: int
    mistake: str
    check: Check
    owner: Any = None  # module or class whose `attribute` becomes `wrong`
    attribute: str = ""
    wrong: Any = None
    change: dict[str, Any] | None = None
    edit: Callable[[dict[str, Any]], None] | None = None


def _temperature(config) -> float:
    return 0.1 * config.mscale_all_dim * math.log(config.rope_factor) + 1


def _scale_with_power(power: int):
    return lambda config: config.qk_head_dim**-0.5 * _temperature(config) ** power


def _no_scale(config) -> float:
    return 1.0


def _plain_frequencies(plain, config):
    return plain


def _divided_frequencies(plain, config):
    return plain / config.rope_factor


def _rope_channels_first(tree) -> None:
    """Reads each query head as [rope, nope]."""
    wq_b = tree["moe_layers"]["attn"]["wq_b"]
    tree["moe_layers"]["attn"]["wq_b"] = np.roll(
        wq_b.reshape(*wq_b.shape[:2], 4, -1), 32, -1
    ).reshape(wq_b.shape)


def _edit_gate_bias(function):
    def edit(tree) -> None:
        gate = tree["moe_layers"]["ffn"]["gate"]
        gate["bias"] = function(gate["bias"])

    return edit


def _bfloat16(array):
    return array.astype(jnp.bfloat16).astype(np.float32)


def _route_by_biased_weights(logits_ME, bias_E, config, experts_MK=None):
    right = RIGHT_ROUTE(logits_ME, bias_E, config, experts_MK)
    return right._replace(
        weights_MK=router.weigh(right.scores_ME + bias_E[None], right.experts_MK, config)
    )


def _mask_with_zero(choice_ME, n_groups, n_kept, group_score):
    masked = RIGHT_MASK(choice_ME, n_groups, n_kept, group_score)
    return jnp.where(jnp.isneginf(masked), 0.0, masked)


def _bfloat16_matmul(x, w):
    return jnp.matmul(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)).astype(jnp.float32)


def _bfloat16_scores(logits_ME, score_func):
    return RIGHT_SCORES(logits_ME.astype(jnp.bfloat16), score_func).astype(jnp.float32)


def _scale_before_normalising(scores_ME, experts_MK, config):
    weights_MK = jnp.take_along_axis(scores_ME, experts_MK, axis=-1) * config.route_scale
    return weights_MK / weights_MK.sum(axis=-1, keepdims=True)


def _large_epsilon(scores_ME, experts_MK, config):
    weights_MK = jnp.take_along_axis(scores_ME, experts_MK, axis=-1)
    return weights_MK / (weights_MK.sum(axis=-1, keepdims=True) + 1e-6) * config.route_scale


def _normalise_over_all(scores_ME, experts_MK, config):
    shares_ME = scores_ME / scores_ME.sum(axis=-1, keepdims=True)
    return jnp.take_along_axis(shares_ME, experts_MK, axis=-1) * config.route_scale


def _no_index_bias(tree) -> None:
    tree["moe_layers"]["attn"]["indexer"]["k_norm"]["bias"][:] = 0


def _zero_is_masked(scores, visible, count):
    return RIGHT_KEYS(scores, visible & (scores > 0), count)


def _future_is_chosen(scores, visible, count):
    return _among(jnp.ones_like(visible), scores, visible, count)


def _other_documents_count(scores, visible, count):
    earlier = jnp.tril(jnp.ones(visible.shape[1:], bool))[None]
    return _among(earlier | visible, scores, visible, count)


def _among(candidates, scores, visible, count):
    """Chooses among more keys than a query sees and leaves out what it does not see."""
    selection = RIGHT_KEYS(scores, candidates, count)
    seen = jnp.take_along_axis(visible, selection.indices_BTJ, axis=-1)
    return selection._replace(valid_BTJ=selection.valid_BTJ & seen)


def _plain_channels_first(indexer, x_BTIY, angles):
    plain = x_BTIY.shape[-1] - indexer.config.qk_rope_head_dim
    return jnp.roll(RIGHT_ROTATE(indexer, jnp.roll(x_BTIY, -plain, -1), angles), plain, -1)


def _positive_weights(indexer, x_BTD):
    return jnp.abs(RIGHT_WEIGHTS(indexer, x_BTD))


def _scores_without_relu(index):
    products = jnp.einsum("BTIY,BSY->BTIS", index.q_BTIY, index.k_BSY)
    return jnp.einsum("BTI,BTIS->BTS", index.w_BTI, products)


def _edit_shared(factor: float):
    def edit(tree) -> None:
        tree["moe_layers"]["ffn"]["shared"]["w_down"] *= np.float32(factor)

    return edit


def _swap(stack: str, path: tuple[str, ...], first: str, second: str):
    def edit(tree) -> None:
        node = functools.reduce(dict.__getitem__, path, tree[stack])
        node[first], node[second] = node[second], node[first]

    return edit


def _flat_kv_norm(tree) -> None:
    tree["moe_layers"]["attn"]["kv_norm"]["weight"][:] = 1


def _hidden_state_first(tree) -> None:
    tree["mtp"]["eh_proj"] = np.roll(tree["mtp"]["eh_proj"], 64, axis=1)


def _main_norm_for_modules(tree) -> None:
    tree["mtp"]["norm"]["weight"][:] = tree["norm"]["weight"]


def _no_key_bias(tree) -> None:
    tree["dense_layers"]["attn"]["bk"][:] = 0


def _flat_head_norm(name: str):
    def edit(tree) -> None:
        tree["dense_layers"]["attn"][name]["weight"][:] = 1

    return edit


def _all_one_document(tokens, segment_ids, *, isolate, n_mtp):
    return RIGHT_READ(tokens, segment_ids, isolate=False, n_mtp=n_mtp)


def _positions_of_the_row(segments_BT):
    index = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)[None]
    # Rotation is relative, so a mere offset would not show: positions count backwards in the second
    # document on.
    return jnp.where(segments_BT > 1, segments_BT.shape[1] - index, index)


def _count_padding(tokens, segment_ids, *, isolate, n_mtp):
    read = RIGHT_READ(tokens, segment_ids, isolate=isolate, n_mtp=n_mtp)
    return read._replace(documents=jnp.maximum(read.documents, 1))


def _choose_with_bias(experts_MK, n_experts):
    return RIGHT_CHOSEN(compare.routing_to_balance("sequence")[0].experts_MK, n_experts)


def _choose_without_groups(experts_MK, n_experts):
    scores_ME = compare.routing_to_balance("expert")[0].scores_ME
    return RIGHT_CHOSEN(jax.lax.top_k(scores_ME, experts_MK.shape[1])[1], n_experts)


def _one_document_a_row(f_BTX, share_BTX, documents_BT, isolated):
    return RIGHT_PRODUCT(f_BTX, share_BTX, documents_BT, False)


def _padding_is_a_document(f_BTX, share_BTX, documents_BT, isolated):
    return RIGHT_PRODUCT(f_BTX, share_BTX, documents_BT + 1, isolated)


def _documents_weigh_the_same(f_BTX, share_BTX, documents_BT, isolated):
    f_BTX, share_BTX, documents_BT = map(np.asarray, (f_BTX, share_BTX, documents_BT))
    losses_of_documents = []
    for f_TX, share_TX, documents_T in zip(f_BTX, share_BTX, documents_BT, strict=True):
        for document in set(documents_T[documents_T > 0].tolist()):
            inside = documents_T == document
            losses_of_documents.append((f_TX[inside].mean(0) * share_TX[inside].mean(0)).sum())
    return jnp.float32(np.mean(losses_of_documents))


def _update_rounded(bias_LE, counts_LE, speed):
    return RIGHT_UPDATE(bias_LE, counts_LE, speed).astype(jnp.bfloat16).astype(jnp.float32)


def _update_backwards(bias_LE, counts_LE, speed):
    return RIGHT_UPDATE(bias_LE, counts_LE, -speed)


def _update_in_proportion(bias_LE, counts_LE, speed):
    counts_LE = counts_LE.astype(jnp.float32)
    return bias_LE + speed * (counts_LE.mean(axis=-1, keepdims=True) - counts_LE)


def _norm_plus_one(x, weight, eps):
    return RIGHT_NORM(x, weight + 1, eps)


def _no_shift(x, places):
    return x


def _shift_twice(x, places):
    return RIGHT_SHIFT(x, 2 * places)


def _targets_across_documents(segment_ids_BX, ahead, isolate):
    return RIGHT_MASK_OF_TARGETS(segment_ids_BX, ahead, isolate and ahead == 1)


def _targets_of_the_main_model(segment_ids_BX, ahead, isolate):
    return RIGHT_MASK_OF_TARGETS(segment_ids_BX, 1, isolate)


def _drop_beyond_capacity(y_AD, plan):
    """Keeps the first 2 A / E rows of each expert."""
    starts_E = jnp.cumsum(plan.sizes_E) - plan.sizes_E
    expert_KM = jnp.searchsorted(jnp.cumsum(plan.sizes_E), plan.rows_KM, side="right")
    kept = plan.rows_KM - starts_E[expert_KM] < 2 * plan.order_A.size // plan.sizes_E.size
    return RIGHT_COMBINE(y_AD, plan._replace(rows_KM=jnp.where(kept, plan.rows_KM, len(y_AD))))


RIGHT_ROUTE, RIGHT_MASK, RIGHT_SCORES = router.route, router._mask_groups, router.scores
RIGHT_READ, RIGHT_CHOSEN = transformer.read_tokens, balance._chosen
RIGHT_PRODUCT, RIGHT_COMBINE, RIGHT_NORM = (
    balance._frequency_times_share,
    routing_plan.combine,
    layers.rms_norm,
)
RIGHT_ATTENTION, RIGHT_UPDATE = context.sharded_attention, balance.update_bias
RIGHT_KEYS = sparse_attention.select
RIGHT_ROTATE, RIGHT_WEIGHTS = Indexer._rotate, Indexer.weights
RIGHT_SHIFT, RIGHT_MASK_OF_TARGETS = inputs.shift_left, loss.target_mask


def _attend_to_one_later(q_BTNH, k_BTPH, v_BTPW, *segments, **settings):
    k_BTPH, v_BTPW = (jnp.roll(x, -1, 1) for x in (k_BTPH, v_BTPW))
    return RIGHT_ATTENTION(q_BTNH, k_BTPH, v_BTPW, *segments, **settings)


def _tile_key_heads(q_BTNH, k_BTPH, v_BTPW, *segments, **settings):
    repeat = (1, 1, q_BTNH.shape[2] // k_BTPH.shape[2], 1)
    k_BTPH, v_BTPW = (jnp.tile(x, repeat) for x in (k_BTPH, v_BTPW))
    return RIGHT_ATTENTION(q_BTNH, k_BTPH, v_BTPW, *segments, **settings)


MUTATIONS = [
    Mutation(1, "MLA rotates halves", V3_ATTENTION, rope, "rotate_pairs", rope.rotate_halves),
    Mutation(1, "GQA rotates pairs", LLAMA_ATTENTION, rope, "rotate_halves", rope.rotate_pairs),
    Mutation(1, "rope channels first in a head", V3_ATTENTION, edit=_rope_channels_first),
    Mutation(2, "no mscale", V3_ATTENTION, rope, "attention_scale", _scale_with_power(0)),
    Mutation(2, "mscale not squared", V3_ATTENTION, rope, "attention_scale", _scale_with_power(1)),
    Mutation(2, "cos, sin scaled too", V3_ATTENTION, rope, "_rotation_scale", _temperature),
    Mutation(2, "cos, sin not scaled", NEGATIVE_ATTENTION, rope, "_rotation_scale", _no_scale),
    Mutation(2, "no YaRN frequencies", V3_ATTENTION, rope, "_yarn", _plain_frequencies),
    Mutation(2, "all frequencies divided", V3_ATTENTION, rope, "_yarn", _divided_frequencies),
    Mutation(2, "beta_fast ignored", V3_ATTENTION, change={"beta_fast": 2.0}),
    Mutation(2, "no Llama-3 scaling", LLAMA_ATTENTION, rope, "_llama3", _plain_frequencies),
    Mutation(2, "no linear scaling", LINEAR_ATTENTION, change={"rope_factor": 1.0}),
    Mutation(2, "another theta", QWEN2_ATTENTION, change={"rope_theta": 10000.0}),
    Mutation(3, "bias weighs", V3_ROUTER, router, "route", _route_by_biased_weights),
    Mutation(3, "bias does not select", V3_ROUTER, edit=_edit_gate_bias(np.zeros_like)),
    Mutation(3, "bias of the wrong sign", V3_ROUTER, edit=_edit_gate_bias(np.negative)),
    Mutation(4, "bias in bfloat16", V3_ROUTER, edit=_edit_gate_bias(_bfloat16)),
    Mutation(4, "bias kept in bfloat16", BIAS_UPDATE, balance, "update_bias", _update_rounded),
    Mutation(5, "masked groups at 0", NEGATIVE_ROUTER, router, "_mask_groups", _mask_with_zero),
    Mutation(5, "V3 groups by their best", V3_ROUTER, change={"group_score": "max"}),
    Mutation(5, "V2 groups by their two best", V2_ROUTER, change={"group_score": "top2"}),
    Mutation(5, "groups not limited", V3_ROUTER, change={"n_limited_groups": 8}),
    Mutation(5, "one group too many", V2_ROUTER, change={"n_limited_groups": 4}),
    Mutation(6, "router product in bfloat16", V2_LITE_ROUTER, router, "float32_matmul",
             _bfloat16_matmul),
    Mutation(6, "router scores in bfloat16", V3_ROUTER, router, "scores", _bfloat16_scores),
    Mutation(7, "V3 weights not normalised", V3_ROUTER, change={"norm_topk": False}),
    Mutation(7, "V2 weights normalised", V2_ROUTER, change={"norm_topk": True}),
    Mutation(7, "normalised over all experts", V3_ROUTER, router, "weigh", _normalise_over_all),
    Mutation(7, "scaled before normalising", V3_ROUTER, router, "weigh", _scale_before_normalising),
    Mutation(7, "no scale", V2_ROUTER, change={"route_scale": 1.0}),
    Mutation(7, "large epsilon in the normaliser", TINY_SCORES, router, "weigh", _large_epsilon),
    Mutation(7, "V3 by softmax", V3_ROUTER, change={"score_func": "softmax"}),
    Mutation(7, "V2 by sigmoid", V2_ROUTER, change={"score_func": "sigmoid"}),
    Mutation(7, "shared expert scaled", V3_MOE, edit=_edit_shared(2.5)),
    Mutation(7, "no shared expert", V3_MOE, edit=_edit_shared(0.0)),
    Mutation(7, "expert gate and up swapped", V3_MOE,
             edit=_swap("moe_layers", ("ffn", "experts"), "w_gate", "w_up")),
    Mutation(7, "gate and up swapped", V3_DENSE,
             edit=_swap("dense_layers", ("ffn",), "w_gate", "w_up")),
    Mutation(7, "norm epsilon", V3_NORM, change={"norm_eps": 1e-5}),
    Mutation(7, "norm adds 1 to its weight", V3_NORM, layers, "rms_norm", _norm_plus_one),
    Mutation(7, "latent norm without weight", V3_ATTENTION, edit=_flat_kv_norm),
    Mutation(7, "latent norm's epsilon", NEGATIVE_ATTENTION, mla, "LATENT_NORM_EPS", 1e-3),
    Mutation(7, "norms of a layer swapped", LLAMA_LOGITS,
             edit=_swap("dense_layers", (), "attn_norm", "ffn_norm")),
    Mutation(7, "no key bias", QWEN2_ATTENTION, edit=_no_key_bias),
    Mutation(7, "query norm without weight", QWEN3_ATTENTION, edit=_flat_head_norm("q_norm")),
    Mutation(7, "key norm without weight", QWEN3_ATTENTION, edit=_flat_head_norm("k_norm")),
    Mutation(2, "YaRN's factor cancelled by attn_factor", QWEN3_ATTENTION,
             change={"mscale": 0.0}),
    Mutation(7, "key heads tiled, not repeated", LLAMA_ATTENTION, context, "sharded_attention",
             _tile_key_heads),
    Mutation(7, "one later token visible", V3_ATTENTION, context, "sharded_attention",
             _attend_to_one_later),
    Mutation(8, "wrong sign", BIAS_UPDATE, balance, "update_bias", _update_backwards),
    Mutation(8, "step by the difference", BIAS_UPDATE, balance, "update_bias",
             _update_in_proportion),
    Mutation(8, "padding counted in the load", MOE_ISOLATED, transformer, "read_tokens",
             _count_padding),
    Mutation(9, "sequence loss of biased choice", SEQUENCE_LOSS, balance, "_chosen",
             _choose_with_bias),
    Mutation(9, "expert loss of free choice", EXPERT_LOSS, balance, "_chosen",
             _choose_without_groups),
    Mutation(9, "packed documents as one", SEQUENCE_LOSS, balance, "_frequency_times_share",
             _one_document_a_row),
    Mutation(9, "padding as a document", SEQUENCE_LOSS, balance, "_frequency_times_share",
             _padding_is_a_document),
    Mutation(9, "documents weigh the same", EXPERT_LOSS, balance, "_frequency_times_share",
             _documents_weigh_the_same),
    Mutation(10, "hidden state first", MTP, edit=_hidden_state_first),
    Mutation(10, "before the final norm", MTP, change={"mtp_after_final_norm": False}),
    Mutation(10, "enorm and hnorm swapped", MTP, edit=_swap("mtp", (), "enorm", "hnorm")),
    Mutation(10, "the main model's norm", MTP, edit=_main_norm_for_modules),
    Mutation(10, "no shift", MTP, inputs, "shift_left", _no_shift),
    Mutation(10, "shift by two", MTP, inputs, "shift_left", _shift_twice),
    Mutation(10, "documents not isolated", MTP_ISOLATED, transformer, "read_tokens",
             _all_one_document),
    Mutation(10, "positions of the wrong order", MTP_ISOLATED, rope, "positions_in_segments",
             _positions_of_the_row),
    Mutation(10, "targets across documents", LOSS_ISOLATED, loss, "target_mask",
             _targets_across_documents),
    Mutation(10, "as many targets as the main model", LOSS_ISOLATED, loss, "target_mask",
             _targets_of_the_main_model),
    Mutation(11, "indexer turns pairs", V32_ATTENTION, rope, "rotate_halves", rope.rotate_pairs),
    Mutation(11, "indexer turns the last channels", V32_ATTENTION, Indexer, "_rotate",
             _plain_channels_first),
    Mutation(11, "no bias in the indexer's norm", V32_ATTENTION, edit=_no_index_bias),
    Mutation(11, "no relu", V32_ATTENTION, sparse_attention, "index_scores", _scores_without_relu),
    Mutation(11, "head weights without sign", V32_ATTENTION, Indexer, "weights", _positive_weights),
    Mutation(11, "score of 0 masked", V32_ATTENTION, sparse_attention, "select", _zero_is_masked),
    Mutation(11, "future keys chosen", V32_ATTENTION, sparse_attention, "select",
             _future_is_chosen),
    Mutation(11, "a key too few", V32_ATTENTION, change={"index_topk": 95}),
    Mutation(11, "keys of other documents count", V32_ISOLATED, sparse_attention, "select",
             _other_documents_count),
    Mutation(14, "capacity factor of two", CROWDED, expert_parallel, "combine",
             _drop_beyond_capacity),
]  # fmt: skip


@pytest.mark.heavy
@pytest.mark.parametrize(
    "mutation", MUTATIONS, ids=lambda mutation: f"{mutation.rule} {mutation.mistake}"
)
def test_equivalence_fails_when(mutation: Mutation, monkeypatch: pytest.MonkeyPatch):
    if mutation.attribute:
        monkeypatch.setattr(mutation.owner, mutation.attribute, mutation.wrong)
    alteration = {
        name: getattr(mutation, name) for name in ("change", "edit") if getattr(mutation, name)
    }
    with pytest.raises(AssertionError, match=r"exceeds|differ in their bits"):
        mutation.check.run(*mutation.check.arguments, **alteration)


BALANCE = balance.BalanceWeights(
    sequence=1.0, expert=0.0, device=0.0, communication=0.0, n_devices=8, isolated=False
)
LENGTH = 48


def balance_gradient() -> tuple[float, float]:
    """Change of the summed balance loss along a random direction of all routers: ours, and the
    oracle's.

    Ours runs as in training: stacks scanned, layers rematerialised, reverse mode.
    """
    case = ORACLE_CASES["deepseek_moe"]
    config, tree = checkpoint.parameters(case)
    model, tokens_T = ours.place(config, tree), checkpoint.tokens(case, LENGTH)
    gate = tree["moe_layers"]["ffn"]["gate"]["weight"]
    direction = checkpoint.normal_like(0, "direction", gate.shape)

    def total(model):
        return model.hidden(
            tokens_T[None], balance=BALANCE, remat="full"
        ).routing.balance_loss.sum()

    gradients = jax.jit(jax.grad(total), compiler_options=ours.QUICK)(model)
    gradient = gradients.moe_layers.ffn.gate.weight.get_value()
    sides = []
    for step in (1e-6, -1e-6):
        params = compare.float64(tree)
        params["moe_layers"]["ffn"]["gate"]["weight"] = gate.astype(np.float64) + step * direction
        layers_choices = oracle.forward(tokens_T, params, config).choices
        sides.append(
            sum(losses.sequence_balance(np.stack([c.scores for c in l]), 5) for l in layers_choices)
        )
    return float((np.asarray(gradient, np.float64) * direction).sum()), (sides[0] - sides[1]) / 2e-6


def test_balance_loss_reaches_every_router():
    got, want = balance_gradient()
    np.testing.assert_allclose(got, want, rtol=1e-3)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "wrong",
    [
        lambda *arguments: jnp.float32(0),
        lambda *a, right=moe.balance_loss: jax.lax.stop_gradient(right(*a)),
    ],
    ids=["18 loss lost on the way", "18 gradient lost on the way"],
)
def test_balance_gradient_differs_when(wrong, monkeypatch):
    monkeypatch.setattr(moe, "balance_loss", wrong)
    got, want = balance_gradient()
    assert abs(got - want) > 1e-2 * abs(want)
