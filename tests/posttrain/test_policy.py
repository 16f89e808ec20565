"""The training objective against the policy loss of whole logits, and packing against none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.model.cache import empty_cache
from dsjax.posttrain.minibatches import Layout, Sample, pack
from dsjax.posttrain.objective import policy_loss
from dsjax.posttrain.policy import log_probabilities, options_of, policy_objective
from dsjax.posttrain.rollout import Answer
from dsjax.train.objective import read_batch, read_experts, replayed
from dsjax.train.step import split
from tests.closeness import F32, assert_close
from tests.model.tiny import tiny_model
from tests.posttrain.shapes import V3, config_of

LENGTHS = [(2, 5), (4, 3), (1, 8), (3, 3)]  # of prompts and answers
LAYOUT = Layout(24, 2, 2, 0, V3.n_routed_experts)


def samples():
    rng = np.random.default_rng(0)
    found = []
    for index, (before, after) in enumerate(LENGTHS):
        prompt, tokens = (tuple(rng.integers(1, 96, n).tolist()) for n in (before, after))
        logprobs = rng.normal(-3, 1, after).astype(np.float32)
        experts = np.stack(
            [rng.permuted(np.tile(np.arange(8), (before + after - 1, 2, 1)), axis=-1)[..., :2]]
        )[0].astype(np.int32)
        found.append(Sample(prompt, Answer(tokens, logprobs, experts, True), (-1.0) ** index))
    return found


def whole_logprobs(sample, temperature):
    """Log-probabilities of an answer's tokens, each sample alone, in a row of its own."""
    ids = jnp.asarray([[*sample.prompt, *sample.answer.tokens]], jnp.int32)
    experts = jnp.moveaxis(jnp.asarray(sample.answer.experts)[None], 2, 0)
    model = tiny_model(V3)
    hidden = model.hidden(ids[:, :-1], mtp=False, experts_LBTK=experts).main_BTD
    logs = jax.nn.log_softmax(model.logits(hidden) / temperature, axis=-1)[0]
    own = jnp.take_along_axis(logs, ids[0, 1:, None], axis=-1)[:, 0]
    return own[len(sample.prompt) - 1 :]


def packed(minibatches=1):
    given = samples()
    parts = [given[i::minibatches] for i in range(minibatches)]
    return pack(parts, LAYOUT, "sequence", 8)


def loss_of(config, batch, params):
    """The objective's sums of one micro-batch, and the gradient."""
    objective = policy_objective(config)
    structure, _, router = split(tiny_model(V3))
    inputs, targets = read_batch(objective, tiny_model(V3), batch)
    experts = read_experts(batch)
    (inputs, targets, experts) = jax.tree.map(lambda x: x[0], (inputs, targets, experts))

    def run(params):
        model = nnx.merge(structure, params, router)
        hidden = model.forward(inputs, experts_LBTK=replayed(experts))
        sums = objective.sums(model, hidden, targets, {})
        return sums["loss"], sums

    return jax.jit(jax.grad(run, has_aux=True))(params)


@pytest.fixture(scope="module")
def params():
    return split(tiny_model(V3))[1]


def test_log_probabilities_are_those_of_each_answer_alone():
    temperature = 0.7
    config = config_of(V3, temperature=temperature)
    batch = jax.tree.map(jnp.asarray, packed())
    _, params, router = split(tiny_model(V3))
    found = jax.jit(log_probabilities(config, tiny_model(V3)))((params, router), batch)
    assert found.shape == batch["tokens"].shape
    found, place = np.asarray(found)[np.asarray(batch["weights"]) != 0], {}
    at = np.asarray(batch["tokens"])[np.asarray(batch["weights"]) != 0].tolist()
    for sample in samples():
        want, tokens = whole_logprobs(sample, temperature), list(sample.answer.tokens)
        starts = [i for i in range(len(at)) if at[i : i + len(tokens)] == tokens]
        assert len(starts) == 1 and starts[0] not in place
        place[starts[0]] = sample
        assert_close(found[starts[0] : starts[0] + len(tokens)], want, F32, "log-probabilities")


def test_sums_are_those_of_the_policy_loss(params):
    config = config_of(V3, beta=0.1, minibatches=1)
    given = samples()
    batch = packed()
    ref = np.where(batch["weights"] != 0, batch["samp"] - 0.3, np.nan).astype(np.float32)
    batch |= {"old": batch["samp"] + np.float32(0.1), "ref": ref}
    batch = {name: jnp.asarray(array[0]) for name, array in batch.items()}
    gradient, sums = loss_of(config, batch, params)
    total = 0.0
    for sample in given:
        samp = jnp.asarray(sample.answer.logprobs)
        found = policy_loss(
            whole_logprobs(sample, 1.0),
            samp + 0.1,
            jnp.full_like(samp, sample.advantages),
            jnp.full_like(samp, 1 / (len(given) * len(samp))),
            options_of(config),
            ref=samp - 0.3,
            samp=samp,
        )
        total += float(found.loss)
    assert_close(sums["loss"], total, F32, "loss")
    assert float(sums["tokens"]) == sum(after for _, after in LENGTHS)
    assert_close(sums["gap"], 0.1 * float(sums["tokens"]), F32._replace(bound=1e-5), "gap")
    assert jnp.isfinite(gradient["embed"]["weight"][...]).all()


def own_choices(given):
    """The samples with the experts that the model chooses for each, alone."""
    model, longest = tiny_model(V3), max(sample.length for sample in given)
    rows = np.zeros((len(given), longest), np.int32)
    for row, sample in zip(rows, given, strict=True):
        row[: sample.length] = [*sample.prompt, *sample.answer.tokens]
    cache = empty_cache(V3, *rows.shape, jnp.float32)
    starts_B = jnp.zeros(len(rows), jnp.int32)
    extend = jax.jit(lambda model, rows, cache: model.extend(rows, starts_B, cache, routing=True))
    experts_BTLK = np.moveaxis(np.asarray(extend(model, rows, cache).experts_LBTK), 0, 2)
    return [
        sample._replace(answer=sample.answer._replace(experts=experts[: sample.length - 1].copy()))
        for sample, experts in zip(given, experts_BTLK, strict=True)
    ]


@pytest.mark.slow
def test_routers_that_would_choose_others_are_counted(params):
    """Of the tokens that the engine ran, which the last one of an answer is not."""
    config, given = config_of(V3, beta=0.0), own_choices(samples())

    def sums_of(given, config=config):
        batch = pack([given], LAYOUT, "sequence", 8)
        return loss_of(config, {name: jnp.asarray(x[0]) for name, x in batch.items()}, params)[1]

    sums = sums_of(given)
    tokens = sum(before + after - 1 for before, after in LENGTHS)
    assert float(sums["routers"]) == tokens * V3.n_moe_layers
    assert float(sums["routers_differ"]) == 0
    last = given[1].answer.experts[-1, -1]  # what comes after depends on no other choice
    last[:] = (last + 1) % V3.n_routed_experts
    assert float(sums_of(given)["routers_differ"]) == 1
    assert "routers" not in sums_of(given, config_of(V3, beta=0.0, replay=False))


def test_modules_that_rest_have_no_gradient(params):
    batch = {name: jnp.asarray(array[0]) for name, array in packed().items()}
    gradient, _ = loss_of(config_of(V3, beta=0.0), batch, params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient["mtp"]))
    assert gradient["head"]["weight"][...].any()


def test_replayed_experts_decide_and_routers_learn(params):
    batch = {name: jnp.asarray(array[0]) for name, array in packed().items()}
    config = config_of(V3, beta=0.0)
    first, _ = loss_of(config, batch, params)
    gate = first["moe_layers"]["ffn"]["gate"]["weight"][...]
    assert gate.any()
    other = batch | {"experts": (batch["experts"] + 1) % 8}
    second, _ = loss_of(config, other, params)
    assert not jnp.allclose(gate, second["moe_layers"]["ffn"]["gate"]["weight"][...])
    # Experts that no token was sent to have no gradient.
    used = set(np.unique(np.asarray(batch["experts"][..., 0, :])))
    weights = first["moe_layers"]["ffn"]["experts"]
    some = jax.tree.leaves(weights)[0][0]
    assert {e for e in range(8) if some[e].any()} <= used
