"""AdamW against NumPy in float64, and what is rounded, clipped and decayed."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from dsjax.config import OptimConfig
from dsjax.train.optimizer import adamw, average_of, decay_mask

AXES = {
    "w_up": ("layers", "embed", "ffn"),
    "norm": ("layers", "embed"),
    "bias": ("heads",),
    "head": ("embed", "vocab"),
    "experts": ("layers", "expert", "embed", "ffn"),
}
SHAPES = {"w_up": (2, 4, 6), "norm": (2, 4), "bias": (4,), "head": (4, 8), "experts": (2, 3, 4, 6)}
DECAYED = {"w_up", "head", "experts"}


def tree(seed: int, scale: float = 1.0) -> nnx.State:
    rng = np.random.default_rng(seed)
    return nnx.State(
        {
            name: nnx.Param(
                jnp.asarray(scale * rng.normal(size=shape), jnp.float32), axes=AXES[name]
            )
            for name, shape in SHAPES.items()
        }
    )


def arrays(state) -> dict[str, np.ndarray]:
    return {name: np.asarray(state[name].get_value(), np.float64) for name in SHAPES}


def numpy_adamw(params, grads_by_step, config: OptimConfig, rate: float, rounded: bool):
    """Loshchilov and Hutter's AdamW with clipping, in float64; moments go through bfloat16 when
    `rounded`.
    """
    mu = {name: np.zeros_like(p) for name, p in params.items()}
    nu = {name: np.zeros_like(p) for name, p in params.items()}
    norms = []
    for t, grads in enumerate(grads_by_step, 1):
        norms.append(np.sqrt(sum((g**2).sum() for g in grads.values())))
        clip = min(1.0, config.clip_norm / norms[-1]) if config.clip_norm else 1.0
        for name, p in params.items():
            g = grads[name] * clip
            m = config.beta1 * mu[name] + (1 - config.beta1) * g
            v = config.beta2 * nu[name] + (1 - config.beta2) * g**2
            step = (m / (1 - config.beta1**t)) / (
                np.sqrt(v / (1 - config.beta2**t)) + config.epsilon
            )
            decay = config.weight_decay * p if name in DECAYED else 0.0
            params[name] = p - rate * (step + decay)
            mu[name], nu[name] = (
                x.astype(ml_dtypes.bfloat16).astype(np.float64) if rounded else x for x in (m, v)
            )
    return params, norms


@pytest.mark.parametrize(
    ("moment_dtype", "clip_norm"), [("float32", 1.0), ("float32", 0.0), ("bfloat16", 1.0)]
)
def test_adamw_equals_numpy(moment_dtype, clip_norm):
    config = OptimConfig(moment_dtype=moment_dtype, clip_norm=clip_norm, weight_decay=0.1)
    optimizer = adamw(config)
    params, grads = tree(0), [tree(seed, scale=0.2 * seed) for seed in range(1, 6)]
    want, norms = numpy_adamw(
        arrays(params), map(arrays, grads), config, 0.01, moment_dtype == "bfloat16"
    )

    state, got_norms = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for grad in grads:
        params, state, norm = update(grad, state, params, jnp.float32(0.01))
        got_norms.append(float(norm))

    np.testing.assert_allclose(got_norms, norms, rtol=1e-6)
    assert max(norms) > 1 and min(norms) > 0
    # bfloat16: a moment on a rounding edge may go the other way in float32, one part in 256 of one
    # step of rate 0.01.
    atol = 1e-6 if moment_dtype == "float32" else 5e-5
    for name, value in arrays(params).items():
        np.testing.assert_allclose(value, want[name], rtol=0, atol=atol, err_msg=name)


def test_adamw_keeps_both_moments_in_bfloat16():
    optimizer = adamw(OptimConfig(moment_dtype="bfloat16"))
    update = jax.jit(optimizer.update)
    params, state, _ = update(tree(1), optimizer.init(tree(0)), tree(0), jnp.float32(0.1))
    adam = state["adam"]
    assert {leaf.dtype for leaf in jax.tree.leaves((adam.mu, adam.nu))} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16"])
def test_nothing_changes_where_the_gradient_is_not_finite_or_the_caller_says_so(moment_dtype):
    optimizer = adamw(OptimConfig(moment_dtype=moment_dtype, ema=0.9))
    update = jax.jit(optimizer.update)
    params, state, _ = update(tree(1), optimizer.init(tree(0)), tree(0), jnp.float32(0.1))
    broken = jax.tree.map(lambda x: x.at[..., 0].set(jnp.nan), tree(2))
    for grads, fine in ((broken, True), (tree(2), False)):
        *after, norm = update(grads, state, params, jnp.float32(0.1), fine)
        assert bool(jnp.isfinite(norm)) != fine
        for got, want in zip(*map(jax.tree.leaves, (after, [params, state])), strict=True):
            np.testing.assert_array_equal(got, want)
    *after, _ = update(tree(2), state, params, jnp.float32(0.1), True)
    assert all(
        bool((got != want).any())
        for got, want in zip(*map(jax.tree.leaves, (after, [params, state])), strict=True)
    )


def test_average_is_the_sum_of_all_weights_times_powers_of_its_ratio():
    """Those of the beginning included, in float32, of what trains alone; and it changes nothing of
    the weights.
    """
    ratio, steps = 0.9, 7

    def trains(path):
        if path[0] == "experts":  # one of them, as ESFT
            return jnp.array([1.0, 0.0, 0.0]).reshape(1, 3, 1, 1)
        return path[0] != "norm"

    plain, averaging = (adamw(OptimConfig(ema=ema), trains) for ema in (0.0, ratio))
    params = others = tree(0)
    state, other_state = averaging.init(params), plain.init(params)
    assert average_of(other_state) is None
    update, other_update = jax.jit(averaging.update), jax.jit(plain.update)
    seen = [arrays(params)]
    for seed in range(1, steps + 1):
        grads, _ = plain.split(tree(seed))
        params, state, _ = update(grads, state, params, jnp.float32(0.1))
        others, other_state, _ = other_update(grads, other_state, others, jnp.float32(0.1))
        seen.append(arrays(params))
    for one, other in zip(*map(jax.tree.leaves, (params, others)), strict=True):
        np.testing.assert_array_equal(one, other)
    average = average_of(state)
    assert average is not None and set(average) == set(SHAPES) - {"norm"}
    for name, variable in average.items():
        weights = [ratio**steps, *((1 - ratio) * ratio ** (steps - n) for n in range(1, steps + 1))]
        want = sum(weight * each[name] for weight, each in zip(weights, seen, strict=True))
        assert variable.get_value().dtype == jnp.float32
        np.testing.assert_allclose(variable.get_value(), want, rtol=0, atol=1e-6, err_msg=name)
        assert np.abs(want - seen[-1][name]).max() > 0.01
    frozen = average["experts"].get_value()[:, 1:]
    np.testing.assert_array_equal(frozen, tree(0)["experts"].get_value()[:, 1:])


def test_update_copies_nothing():
    """Neither a gradient, to be clipped, nor a moment, to be read beside its new value."""
    optimizer = adamw(OptimConfig())
    params = nnx.State({"w": nnx.Param(jnp.ones((512, 512)), axes=("embed", "ffn"))})
    rate = jnp.float32(0.1)

    def step(state, grads):
        params, moments, _ = optimizer.update(grads, state[1], state[0], rate)
        return params, moments

    options = {"xla_backend_optimization_level": 3}
    jitted = jax.jit(step, donate_argnums=0, compiler_options=options)
    program = jitted.lower((params, optimizer.init(params)), params).compile()
    memory = program.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < params["w"][...].nbytes


def test_decay_mask_takes_matrices_and_leaves_norms_and_biases():
    mask = decay_mask(tree(0))
    assert {name for name in SHAPES if mask[name]} == DECAYED


def test_decay_mask_refuses_parameter_without_axes():
    with pytest.raises(
        ValueError, match=r"parameter \['stray'\] has no metadata 'axes'.*declare it"
    ):
        decay_mask(nnx.State({"stray": nnx.Param(jnp.zeros(3))}))


def _step(config, trains, grads, params):
    optimizer = adamw(config, trains)
    trained, frozen = optimizer.split(params)
    grads = nnx.State({name: grads[name] for name in trained})
    state = optimizer.init(params)
    return trained, frozen, *jax.jit(optimizer.update)(grads, state, params, jnp.float32(0.01))


def test_frozen_parameters_keep_their_bits_and_have_no_moments():
    config, params, grads = OptimConfig(weight_decay=0.1), tree(0), tree(1, scale=5.0)
    chosen = {sorted(DECAYED)[0], sorted(set(SHAPES) - DECAYED)[0]}
    trained, frozen, after, state, norm = _step(config, lambda p: p[0] in chosen, grads, params)
    assert (set(trained), set(frozen)) == (chosen, set(SHAPES) - chosen)
    for name in frozen:
        np.testing.assert_array_equal(after[name][...], params[name][...])
    assert set(state["adam"].mu) == set(state["adam"].nu) == chosen
    # As if the others did not exist: clipping, too, sees the norm of these alone.
    alone = nnx.State({name: params[name] for name in chosen})
    *_, want, _, want_norm = _step(config, lambda p: True, grads, alone)
    assert float(norm) == float(want_norm) > config.clip_norm
    for name in chosen:
        np.testing.assert_array_equal(after[name][...], want[name][...])


def test_part_of_a_parameter_trains():
    config, params, grads = OptimConfig(weight_decay=0.1), tree(0), tree(1, scale=5.0)
    name = sorted(DECAYED)[0]
    rows = np.arange(SHAPES[name][0]) % 2
    mask = jnp.asarray(rows.reshape(-1, *(1,) * (len(SHAPES[name]) - 1)), jnp.float32)
    _, frozen, after, _, norm = _step(config, lambda p: p[0] == name and mask, grads, params)
    assert set(frozen) == set(SHAPES) - {name}
    moved = np.asarray(after[name][...] != params[name][...])
    np.testing.assert_array_equal(moved.reshape(len(rows), -1).any(axis=1), rows == 1)
    np.testing.assert_allclose(norm, np.linalg.norm(np.asarray(grads[name][...])[rows == 1]), 1e-6)


def test_something_must_train():
    with pytest.raises(ValueError, match="no parameter is chosen to train"):
        adamw(OptimConfig(), lambda path: False).init(tree(0))
