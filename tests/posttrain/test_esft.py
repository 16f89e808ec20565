"""The experts that a task uses: scores against a loop over tokens, the paper's choice, the mask."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config import OptimConfig
from dsjax.config.finetuning import EsftConfig
from dsjax.model.inputs import read_tokens
from dsjax.model.mla import MLA
from dsjax.model.moe import MoE
from dsjax.posttrain import esft
from dsjax.train.optimizer import adamw
from dsjax.train.step import split
from tests.model.tiny import TINY, tiny_model, tokens

MODEL = dataclasses.replace(TINY, n_mtp=0)


@pytest.fixture(scope="module")
def found():
    """The usage of a batch, and what each MoE layer's routers said of each token."""
    batch = {"tokens": tokens(2, 12), "segment_ids": jnp.ones((2, 12), jnp.int32)}
    batch["segment_ids"] = batch["segment_ids"].at[1, 7:].set(0)
    model = tiny_model(MODEL)
    return jax.jit(esft.usage)(model, batch), jax.jit(_routings)(model, batch)


def _routings(model, batch):
    """What each MoE layer's router says when the model itself runs, layer by layer."""
    seen, inner = [], MoE.__call__

    def spy(self, x_BTD, *arguments, **options):
        seen.append(self.gate(x_BTD.reshape(-1, x_BTD.shape[-1])))
        return inner(self, x_BTD, *arguments, **options)

    inputs = read_tokens(batch["tokens"], batch["segment_ids"], isolate=True, n_mtp=0)
    context = model.context(inputs)
    x_BTD, _ = model.enter(inputs, context)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MoE, "__call__", spy)
        for layer in range(MODEL.n_moe_layers):
            block = jax.tree.map(lambda stack, layer=layer: stack[layer], model.moe_layers)
            x_BTD, _ = block(x_BTD, context, None)
    return seen


def test_scores_are_those_of_a_loop_over_tokens(found):
    usage, seen = found
    counted = [i for i in range(24) if not 19 <= i < 24]
    assert float(usage.tokens) == len(counted)
    gate = np.zeros((MODEL.n_moe_layers, MODEL.n_routed_experts))
    token = np.zeros_like(gate)
    for layer, routing in enumerate(seen):
        for i in counted:
            for expert, weight in zip(routing.experts_MK[i], routing.weights_MK[i], strict=True):
                gate[layer, int(expert)] += float(weight) / 2.5 / len(counted)
                token[layer, int(expert)] += 1 / (2 * len(counted))
    np.testing.assert_allclose(esft.scores(usage, "gate", MODEL), gate, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(esft.scores(usage, "token", MODEL), token, rtol=1e-6)
    # weights of the chosen experts are normalised, so both kinds of scores sum to 1
    np.testing.assert_allclose(gate.sum(axis=1), 1, rtol=1e-5)


def test_each_layer_attends_once():
    shape = (1, 9)  # which no other test has traced
    batch = {name: jnp.ones(shape, jnp.int32) for name in ("tokens", "segment_ids")}
    model, calls, inner = tiny_model(MODEL), [], MLA.__call__

    def spy(self, *arguments):
        calls.append(self)
        return inner(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MLA, "__call__", spy)
        jax.eval_shape(esft.usage, model, batch)
    assert len(calls) == MODEL.n_dense_layers + 1  # the scan over MoE layers is traced once


def test_batches_add_up(found):
    usage, _ = found
    total = esft.sample_usage(lambda batch: usage, [{}, {}])
    np.testing.assert_allclose(esft.scores(total, "gate", MODEL), esft.scores(usage, "gate", MODEL))


@pytest.mark.parametrize(
    ("threshold", "want"),
    [
        (0.1, [[2], [0]]),
        (0.5, [[2], [0, 1]]),
        (0.6, [[2, 0], [0, 1, 2]]),
        (0.75, [[2, 0], [0, 1, 2]]),
        (1.0, [[2, 0, 3], [0, 1, 2, 3]]),
    ],
)
def test_the_fewest_experts_that_reach_the_threshold_are_chosen(threshold, want):
    """Best first; one that was never used is not chosen, ties go to the lower number."""
    scores = np.array([[0.25, 0.0, 0.5, 0.2], [0.25, 0.25, 0.25, 0.25]])
    assert esft.choose(scores, threshold) == want


def test_only_the_chosen_experts_move():
    model = tiny_model(MODEL)
    _, params, _ = split(model)
    chosen = [[3, 1], [0]]
    optimizer = adamw(OptimConfig(weight_decay=0.5), esft.trains(chosen, MODEL.n_routed_experts))
    trained, _ = optimizer.split(params)
    assert set(trained) == {"moe_layers"} and set(trained["moe_layers"]["ffn"]) == {"experts"}
    grads = jax.tree.map(jnp.ones_like, trained)
    after, _, _ = optimizer.update(grads, optimizer.init(params), params, jnp.float32(0.1))
    for name in ("w_gate", "w_up", "w_down"):
        was, now = (p["moe_layers"]["ffn"]["experts"][name][...] for p in (params, after))
        moved = np.asarray((was != now).any(axis=(2, 3)))
        want = np.zeros((2, MODEL.n_routed_experts), bool)
        want[0, [3, 1]] = want[1, 0] = True
        np.testing.assert_array_equal(moved, want, name)
    for got, want in zip(*(jax.tree.leaves(optimizer.split(p)[1]) for p in (after, params)),
                         strict=True):  # fmt: skip
        np.testing.assert_array_equal(got, want)


def test_choice_is_written_in_the_authors_form_and_read_again(tmp_path):
    chosen, scores = [[3, 1], [0]], np.array([[0.1, 0.2, 0.0, 0.7], [1.0, 0.0, 0.0, 0.0]])
    with pytest.raises(ValueError, match=r"esft\.json"):
        esft.read(tmp_path)
    config = EsftConfig(score="gate", threshold=0.8)
    content = esft.write(tmp_path, chosen, scores, config, MODEL)
    kept = json.loads((tmp_path / "esft.json").read_text())
    assert kept == content and esft.read(tmp_path) == chosen
    # the first layer is dense
    assert kept["experts"] == {"1": [3, 1], "2": [0]}
    assert kept["shared_experts"] is kept["non_expert_modules"] is False
    assert kept["scores"] == {"1": [0.7, 0.2], "2": [1.0]}
    assert kept["trained_params"] == 3 * 3 * MODEL.dim * MODEL.moe_inter_dim
    table = esft.report(content, MODEL)
    assert "3 of 16 experts train" in str(table.title) and table.row_count == 2


def test_layers_are_read_in_the_order_of_their_numbers(tmp_path):
    experts = {str(layer): [layer] for layer in (10, 9, 2)}
    (tmp_path / "esft.json").write_text(json.dumps({"experts": experts}))
    assert esft.read(tmp_path) == [[2], [9], [10]]
