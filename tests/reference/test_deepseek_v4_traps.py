"""What is easily read wrongly in DeepSeek-V4: each such reading, in place of ours, gives other
logits than transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.kernels import compressed_attention as kernel
from dsjax.kernels import sparse_attention
from dsjax.model import (
    compressed_attention,
    compressor,
    hyper_connections,
    layers,
    mixed_layers,
    moe,
    rope,
    router,
)
from dsjax.model.transformer import Transformer
from tests.closeness import LOGITS, assert_close, relative_l2
from tests.reference.test_deepseek_v4 import KINDS, QUICK, their_logits, written

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
FIELDS = {
    "vocab_size": 60,
    "hidden_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 16,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 16,
    "o_groups": 2,
    "o_lora_rank": 12,
    "num_experts_per_tok": 2,
    "n_routed_experts": 6,
    "layer_types": list(KINDS),
    "compress_rates": {KINDS[1]: 3, KINDS[2]: 7},
    "num_hash_layers": 1,
    "sliding_window": 5,
    "index_n_heads": 16,
    "index_head_dim": 16,
    "index_topk": 3,
    "hc_mult": 3,
    "hc_sinkhorn_iters": 2,
    "swiglu_limit": 0.7,
    "max_position_embeddings": 128,
    "rope_scaling": {"type": "yarn", "factor": 16, "original_max_position_embeddings": 32,
                     "beta_fast": 32, "beta_slow": 1},
}  # fmt: skip
LENGTH = 44
Change = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    theirs, own = written(FIELDS, 7, tmp_path_factory.mktemp("v4"))
    tokens = np.random.default_rng(7).integers(0, FIELDS["vocab_size"], (1, LENGTH))
    return own, tokens, their_logits(theirs, tokens)


def run(model, tokens, **config) -> np.ndarray:
    if config:
        model = changed(model, dataclasses.replace(model.config, **config))
    forward = jax.jit(lambda model, tokens: model(tokens), compiler_options=QUICK)
    return np.asarray(forward(model, jnp.asarray(tokens, jnp.int32)))


def changed(model, config):
    """The same weights in a model of another config."""
    declared = Transformer(config, model.policy)
    return jax.tree.unflatten(jax.tree.structure(declared), jax.tree.leaves(model))


def test_as_it_is_all_is_equal(pair):
    own, tokens, want = pair
    assert_close(run(own, tokens), want, LOGITS)


CONFIGS: dict[str, dict[str, Any]] = {
    "one more token in the window": {"window_size": 6},
    "one more chosen entry": {"index_topk": 4},
    "one iteration less": {"hc_sinkhorn_iters": 1},
    "another eps in every sum": {"hc_eps": 1e-3},
    "no limit of experts": {"swiglu_limit": 0.0},
    "one rope for all layers": {"rope_theta": 160000.0},
    "cos and sin scaled as YaRN would": {"mscale": 1.0},
    "no YaRN": {"rope_scaling": "none"},
    "sigmoid scores": {"score_func": "sigmoid"},
    "weights that are not normalised": {"norm_topk": False},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_another_config_is_another_model(name, pair):
    own, tokens, want = pair
    assert relative_l2(run(own, tokens, **CONFIGS[name]), want) > 10 * LOGITS.bound


def _output_not_turned_back(patch):
    right, calls = rope.rotate_last, []

    def all_but_outputs(x, count, cos, sin):
        # With that many heads, queries are turned first, and then the output.
        if x.shape[2] == FIELDS["num_attention_heads"]:
            calls.append(x)
            if len(calls) % 2 == 0:
                return x
        return right(x, count, cos, sin)

    patch.setattr(rope, "rotate_last", all_but_outputs)


def _rotated_in_halves(patch):
    patch.setattr(rope, "rotate_pairs", rope.rotate_halves)


def _first_channels_rotated(patch):
    def first(x, count, cos, sin):
        turned, plain = jnp.split(x, [count], axis=-1)
        return jnp.concatenate([rope.rotate_pairs(turned, cos, sin), plain], axis=-1)

    patch.setattr(rope, "rotate_last", first)


def _no_sink(patch):
    right = kernel._softmax
    patch.setattr(kernel, "_softmax", lambda scores, sink: right(scores, sink - 1e9))


def _entries_seen_early(patch):
    right = kernel.visible
    patch.setattr(
        kernel,
        "visible",
        lambda places, entries: right(places._replace(own_BT=places.own_BT + 1), entries),
    )


def _choice_ignored(patch):
    patch.setattr(sparse_attention, "chosen", lambda scores, seen, count: seen)


def _halves_exchanged(patch):
    right = compressor.Compressor._read

    def exchanged(self, tokens, begins):
        values, gates = right(self, tokens, begins)
        if not self.overlaps:
            return values, gates
        return jnp.roll(values, self.width, axis=-1), jnp.roll(gates, self.width, axis=-1)

    patch.setattr(compressor.Compressor, "_read", exchanged)


def _entry_before_the_first(patch):
    patch.setattr(compressor, "_MASKED", 0.0)


def _no_place_in_the_run(patch):
    right = compressor.Compressor._read

    def without(self, tokens, begins):
        values, gates = right(self, tokens, begins)
        return values, gates - self.ape[...].T[None, None]

    patch.setattr(compressor.Compressor, "_read", without)


def _entry_at_its_end(patch):
    right = compressed_attention.place_row

    def later(segments, like, config):
        row = right(segments, like, config)
        angles = {
            kind: compressed_attention.angles_of(kind, runs.positions_BZ + 2, config)
            for kind, runs in row.runs.items()
        }
        moved = {kind: runs._replace(angles=angles[kind]) for kind, runs in row.runs.items()}
        return row._replace(runs=moved)

    patch.setattr(mixed_layers, "place_row", later)


def _mixed_the_other_way(patch):
    right = hyper_connections.expand

    def transposed(streams, out, mix):
        return right(streams, out, mix._replace(across_BTXX=mix.across_BTXX.swapaxes(-1, -2)))

    patch.setattr(mixed_layers, "expand", transposed)


def _output_weighted_once(patch):
    right = hyper_connections.expand
    patch.setattr(
        mixed_layers,
        "expand",
        lambda streams, out, mix: right(streams, out, mix._replace(out_BTX=mix.out_BTX / 2)),
    )


def _streams_not_normalised(patch):
    def plain(streams, fn, config):
        del config
        return streams.reshape(*streams.shape[:2], -1) @ fn

    patch.setattr(hyper_connections, "_mapped", plain)


def _table_ignored(patch):
    patch.setattr(mixed_layers.HyperBlock, "experts_of", lambda self, tokens: None)


def _bias_in_the_weights(patch):
    right = router.route
    patch.setattr(
        router,
        "route",
        lambda logits, bias, config, experts=None: right(
            logits if bias is None else logits + bias[None], bias, config, experts
        ),
    )


def _limit_of_gates_on_both_sides(patch):
    def both(gate, up, limit):
        return jnp.clip(gate, -limit, limit), jnp.clip(up, -limit, limit)

    for module in (layers, moe):
        patch.setattr(module, "limited", both)


def _shared_expert_without_limit(patch):
    patch.setattr(layers, "limited", lambda gate, up, limit: (gate, up))


def _queries_not_normalised(patch):
    def plain(self, latent, angles):
        q = latent @ self.wq_b[...]
        heads = q.reshape(*q.shape[:2], self.config.n_heads, -1)
        return rope.rotate_last(heads, self.config.qk_rope_head_dim, *angles)

    patch.setattr(compressed_attention.CompressedAttention, "_queries", plain)


CHANGES: tuple[Change, ...] = (
    _output_not_turned_back,
    _rotated_in_halves,
    _first_channels_rotated,
    _no_sink,
    _entries_seen_early,
    _choice_ignored,
    _halves_exchanged,
    _entry_before_the_first,
    _no_place_in_the_run,
    _entry_at_its_end,
    _mixed_the_other_way,
    _output_weighted_once,
    _streams_not_normalised,
    _table_ignored,
    _bias_in_the_weights,
    _limit_of_gates_on_both_sides,
    _shared_expert_without_limit,
    _queries_not_normalised,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__[1:])
def test_another_reading_is_another_model(change, pair, monkeypatch):
    own, tokens, want = pair
    change(monkeypatch)
    assert relative_l2(run(own, tokens), want) > 10 * LOGITS.bound
