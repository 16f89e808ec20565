"""Experts laid out by slot compute what they do in order."""

import dataclasses

import jax
import numpy as np
import pytest

from dsjax.model import redundant_experts
from dsjax.model.parameters import shardings
from dsjax.parallel import eplb
from dsjax.parallel.mesh import make_mesh
from tests.closeness import F32, assert_close
from tests.model.compressed import COMPRESSED
from tests.model.tiny import TINY, tiny_model, tokens

LOAD = np.array([[1, 1, 1, 1, 1, 1, 9, 30], [50, 1, 1, 1, 1, 1, 1, 1]])


def spread(sizes):
    mesh = make_mesh(sizes, n_devices=int(np.prod(list(sizes.values()))))
    return jax.device_put(tiny_model(), shardings(tiny_model(), mesh)), mesh


@pytest.mark.parametrize(
    "sizes",
    [{"expert": 4}, pytest.param({"expert": 2, "tensor": 2}, marks=pytest.mark.heavy)],
    ids=str,
)
def test_a_model_computes_the_same_wherever_its_experts_are(sizes):
    given = tokens(4, 16)
    wanted = tiny_model()(given)
    model, mesh = spread(sizes)
    ranks = sizes["expert"]
    first = eplb.balance(np.ones_like(LOAD), 12, ranks)
    redundant_experts.place(model, first, n_redundant=4)
    forward = jax.jit(lambda model, given: model(given))
    with jax.set_mesh(mesh):
        assert_close(forward(model, given), wanted, F32, "as if all had equal loads")
        second = eplb.balance(LOAD, 12, ranks)
        assert (first.expert_LP != second.expert_LP).any()
        redundant_experts.place(model, second, first, n_redundant=4)
        assert_close(forward(model, given), wanted, F32, "with more replicas of some")
    assert forward._cache_size() == 1
    assert model.redundant and not tiny_model().redundant
    held = np.asarray(model.moe_layers.ffn.experts.w_up[...])
    own = np.asarray(tiny_model().moe_layers.ffn.experts.w_up[...])
    for layer in range(2):
        np.testing.assert_array_equal(held[layer], own[layer][second.expert_LP[layer]])


@pytest.mark.parametrize(
    ("changed", "n_redundant", "n_ranks", "message"),
    [({}, 3, 4, "8 experts and 3 redundant.* 4 devices.*--redundant-experts 4"),
     ({}, -8, 4, "--redundant-experts 0"),
     ({}, 4, 1, "there is 1; give --mesh expert=N"),
     ({"n_dense_layers": 3}, 4, 4, "this one is dense")],
)  # fmt: skip
def test_what_cannot_have_replicas_is_told(changed, n_redundant, n_ranks, message):
    config = dataclasses.replace(TINY, **changed)
    with pytest.raises(ValueError, match=message):
        redundant_experts.check(config, n_redundant, n_ranks)
    redundant_experts.check(TINY, 4, 4)
    redundant_experts.check(TINY, 0, 2)


def test_layers_of_several_kinds_cannot_have_replicas():
    with pytest.raises(ValueError, match=r"attention=compressed are one for each kind of layer"):
        redundant_experts.check(COMPRESSED, 4, 4)
