"""The comparisons that equivalence tests make and mutation tests must see fail.

Each check runs a part of our model, by wish with an altered config (`change`) or altered parameters
(`edit`), and compares it with the golden file or the oracle: 1e-4 on logits, 1e-5 on modules, the
very same experts.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.config import Config, DataConfig, ModelConfig, TrainConfig
from dsjax.model import balance, router
from dsjax.train import loss
from tests.closeness import EXACT, F32, LOGITS, assert_close
from tests.golden import checkpoint, ours
from tests.golden.cases import CASES, LENGTH, ORACLE_CASES, STORED, Case
from tests.oracles import experts, losses, transformer
from tests.train.objectives import sums_of

FOLDER = pathlib.Path(__file__).parent
# Against the oracles: three documents and padding, none a round number long.
ROW = 200
SEGMENTS = np.repeat(np.array([1, 2, 3, 0], np.int32), [33, 87, 67, 13])


def assert_equivalent(got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray]) -> None:
    """Compares every output of `got`."""
    for name in got:
        if name == "router_weights":
            continue
        if name == "router_experts":
            _assert_same_routing(got, want)
            continue
        assert_close(got[name], want[name], LOGITS if name == "logits" else F32, name)


def _assert_same_routing(got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray]) -> None:
    """Sorts each token's choice by expert, its order being nobody's promise."""
    sides = []
    for side in (got, want):
        chosen, weights = (
            np.asarray(side["router_experts"], np.int32),
            np.asarray(side["router_weights"]),
        )
        order = np.argsort(chosen, axis=1)
        sides.append(
            (np.take_along_axis(chosen, order, axis=1), np.take_along_axis(weights, order, axis=1))
        )
    (got_experts, got_weights), (want_experts, want_weights) = sides
    assert_close(got_experts, want_experts, EXACT, "router experts")
    assert_close(got_weights, want_weights, F32, "router weights")


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz") as stored:
        return {key: stored[key] for key in stored if key != "versions"}


def against_golden(name: str, *wanted: str, **alteration) -> None:
    """Our outputs at the stored positions against those of transformers; all of them if none is
    named."""
    want = golden(name)
    got = ours.run(CASES[name], LENGTH, wanted or ours.OUTPUTS, **alteration)
    assert wanted or got.keys() == want.keys()
    stored = {key: got[key] if key.startswith("router") else got[key][STORED] for key in got}
    assert_equivalent(stored, want)


def float64(tree):
    return jax.tree.map(lambda leaf: leaf.astype(np.float64), tree)


@functools.cache
def oracle(name: str, isolated: bool, after_norm: bool = True) -> transformer.Forward:
    config, tree = checkpoint.parameters(ORACLE_CASES[name])
    config = checkpoint.replaced(config, mtp_after_final_norm=after_norm)
    tokens_T = checkpoint.tokens(ORACLE_CASES[name], ROW)
    return transformer.forward(tokens_T, float64(tree), config, SEGMENTS if isolated else None)


def against_oracle(
    name: str, isolated: bool = False, after_norm: bool = True, **alteration
) -> None:
    """Logits of the main model and of every MTP module, and the experts' loads, on one packed
    row."""
    case, want = ORACLE_CASES[name], oracle(name, isolated, after_norm)
    got = ours.run_hidden(case, ROW, SEGMENTS if isolated else None, **alteration)
    segments = SEGMENTS if isolated else np.ones(ROW, np.int32)
    real = segments > 0
    assert_close(got.logits_TV[real], want.logits_TV[real], LOGITS, "logits")
    assert (
        len(got.mtp_logits)
        == len(want.mtp_logits)
        == case.config.get("num_nextn_predict_layers", 0)
    )
    for depth, (got_TV, want_TV) in enumerate(
        zip(got.mtp_logits, want.mtp_logits, strict=True), start=1
    ):
        # A position counts while the token it reads is of its own document.
        valid = (segments[: ROW - depth] == segments[depth:]) & real[depth:]
        assert_close(got_TV[: ROW - depth][valid], want_TV[valid], LOGITS, f"depth {depth}")
    main_layers = case.config["num_hidden_layers"] - case.config["first_k_dense_replace"]
    for counts_E, choices in zip(got.counts_LE, want.choices[:main_layers], strict=False):
        counted = [choice.experts for choice, keep in zip(choices, real, strict=True) if keep]
        want_E = np.bincount(np.concatenate(counted), minlength=len(counts_E)).astype(
            counts_E.dtype
        )
        assert_close(counts_E, want_E, EXACT, "experts' loads")


def against_loss_oracle(isolated: bool) -> None:
    """Next-token and multi-token cross-entropy of a packed row, as training sums them."""
    case, depths = ORACLE_CASES["v3_mtp"], 2
    config, tree = checkpoint.parameters(case)
    experiment = Config(
        name="losses",
        model=config,
        data=DataConfig(sequence_length=ROW, isolate_documents=isolated),
        train=TrainConfig(loss_chunk=64, remat="none"),
    )
    tokens = checkpoint.tokens(case, ROW + 1)
    segments = np.append(SEGMENTS, SEGMENTS[-1])
    batch = {"tokens": jnp.asarray(tokens)[None], "segment_ids": jnp.asarray(segments)[None]}
    objective = loss.pretraining(experiment)

    sums = jax.jit(
        lambda model, batch: sums_of(objective, model, batch)[0], compiler_options=ours.QUICK
    )
    got = sums(ours.place(config, tree), batch)
    inputs, inner = tokens[:ROW], SEGMENTS if isolated else None
    forward = transformer.forward(inputs, float64(tree), config, inner)
    sums, counts = [], []
    for ahead, logits in enumerate([forward.logits_TV, *forward.mtp_logits], start=1):
        rows = ROW + 1 - ahead
        here, there = segments[:rows], segments[ahead : ahead + rows]
        valid = (here > 0) & (there > 0) & ((here == there) | (not isolated))
        sums.append(losses.token_losses(logits[:rows], tokens[ahead : ahead + rows])[valid].sum())
        counts.append(valid.sum())
    assert_close(got["main_targets"], np.float32(counts[0]), EXACT, "targets")
    assert_close(got["mtp_targets"], np.float32(sum(counts[1:])), EXACT, "targets of MTP")
    assert len(counts) == 1 + depths
    assert_close(got["main"], sums[0], F32, "loss")
    assert_close(got["mtp"], sum(sums[1:]), F32, "loss of MTP")


BALANCED = ModelConfig(
    vocab_size=8, dim=8, n_layers=1, n_heads=1, inter_dim=8, kv_lora_rank=4, qk_nope_head_dim=4,
    qk_rope_head_dim=4, v_head_dim=4, moe_inter_dim=4, n_routed_experts=12, n_activated_experts=3,
    n_expert_groups=4, n_limited_groups=2, score_func="softmax", group_score="max",
)  # fmt: skip
DOCUMENTS = np.stack([np.repeat([1, 2, 0], [17, 40, 7]), np.repeat([1, 2, 3], [9, 1, 54])]).astype(
    np.int32
)
BALANCE_LOSSES = {
    "sequence": lambda scores, chosen: losses.sequence_balance(np.stack(scores), 3),
    "expert": lambda scores, chosen: losses.expert_balance(np.stack(scores), chosen),
    "device": lambda scores, chosen: losses.device_balance(np.stack(scores), chosen, 4),
    "communication": lambda scores, chosen: losses.communication_balance(
        np.stack(scores), chosen, 4, 2
    ),
}


def routing_to_balance(name: str) -> tuple[router.Routing, ModelConfig]:
    """A routing of two rows: V3's with biases for its loss, V2's for the others."""
    config, bias_E = BALANCED, None
    if name == "sequence":
        config = checkpoint.replaced(BALANCED, score_func="sigmoid")
        bias_E = jnp.linspace(-2, 2, 12, dtype=jnp.float32)
    logits = checkpoint.normal_like(0, "balance", (DOCUMENTS.size, 12), 1.5)
    return router.route(jnp.asarray(logits), bias_E, config), config


def against_balance_oracle(name: str, isolated: bool) -> None:
    """One balance loss of two rows: the mean over documents, or over rows, weighted by tokens."""
    routing, config = routing_to_balance(name)
    documents_BT = DOCUMENTS if isolated else (DOCUMENTS > 0).astype(np.int32)
    weights = balance.BalanceWeights(
        **{**dict.fromkeys(BALANCE_LOSSES, 0.0), name: 0.25}, n_devices=4, isolated=isolated
    )
    got = balance.balance_loss(routing, jnp.asarray(documents_BT), weights, config)
    scores = np.asarray(routing.scores_ME, np.float64).reshape(*DOCUMENTS.shape, -1)
    chosen = np.asarray(routing.experts_MK).reshape(*DOCUMENTS.shape, -1)
    rows = [
        losses.over_documents(BALANCE_LOSSES[name], segments, row_scores, row_chosen.tolist())
        for segments, row_scores, row_chosen in zip(documents_BT, scores, chosen, strict=True)
    ]
    want = 0.25 * np.average(rows, weights=(DOCUMENTS > 0).sum(axis=1))
    assert_close(got, want, F32, name)


def against_bias_oracle() -> None:
    """A hundred steps of the bias update, at the size that released biases have."""
    bias_LE = checkpoint.uniform(0, "bias", (3, 16), -2, 7)
    counts_LE = np.floor(checkpoint.uniform(0, "counts", (3, 16), 0, 9)).astype(np.int32)
    got, want = jnp.asarray(bias_LE), bias_LE.astype(np.float64)
    for _ in range(100):
        got = balance.update_bias(got, jnp.asarray(counts_LE), 0.001)
        want = np.stack(
            [losses.bias_update(b, c, 0.001) for b, c in zip(want, counts_LE, strict=True)]
        )
    assert_close(got, want, F32, "bias")


def against_crowded_oracle() -> None:
    """A bias that sends all tokens to the same six experts: nothing may be dropped."""
    case: Case = CASES["v3"]
    config, tree = checkpoint.parameters(case)
    config = checkpoint.replaced(config, n_limited_groups=8)
    tree["moe_layers"]["ffn"]["gate"]["bias"][:, ::6] = 9.0
    block = ours.last_layer(ours.place(config, tree).moe_layers)
    x_TD = checkpoint.inputs(case, LENGTH)
    valid_BT = np.ones((1, LENGTH), np.int32)
    y_BTD, statistics, _ = jax.jit(lambda ffn, x, valid: ffn(x, valid, None))(
        block.ffn, x_TD[None], valid_BT
    )
    params = transformer.at(float64(tree["moe_layers"]["ffn"]), -1)
    want, _ = experts.moe(x_TD.astype(np.float64), params, config)
    assert_close(y_BTD[0], want, F32, "moe")
    assert int(statistics.dropped_tokens) == 0
    assert sorted(np.asarray(statistics.counts_E).tolist())[-6:] == [LENGTH] * 6


def against_tiny_scores() -> None:
    """Scores near 1e-8 still give weights that sum to the scale."""
    config = checkpoint.replaced(BALANCED, score_func="sigmoid", norm_topk=True, route_scale=2.5)
    logits = checkpoint.normal_like(2, "tiny", (16, 12)) - np.float32(18)
    got = router.route(jnp.asarray(logits), None, config)
    want = [experts.route(row.astype(np.float64), None, config) for row in logits]
    assert_equivalent(
        {"router_experts": got.experts_MK, "router_weights": got.weights_MK},
        {
            "router_experts": np.array([choice.experts for choice in want]),
            "router_weights": np.array([choice.weights for choice in want]),
        },
    )
