"""AdamW as DeepSeek uses it: global-norm clipping, float32 or bfloat16 moments, weight decay.

Paper: DeepSeek-V3 (arXiv:2412.19437), sections 3.3.3 (moments in bfloat16) and 4.2. The parts are
optax's, put together such that a CPU passes over the state once. Added are the rounding of both
moments when they are stored, the choice of what decays and of what trains, a learning rate that is
an argument of each update, so that a schedule never causes another compilation, and the average of
the weights that DeepSeek-V3 (section 3.2.3) and JanusFlow (arXiv:2411.07975, section 4.1) keep.

Departure: the paper does not say what decays; here every matrix does, and no norm or bias.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dsjax.config import OptimConfig
from dsjax.model.layers import LAYER_AXES

EMA = "ema"  # names the averages in the optimizer's state: optimizer.ema.head.weight, ...

# Says whether a parameter trains, given its path, such as ("moe_layers", "ffn", "experts", "w_up"):
# True, False, or, where a part of it trains, a float32 array of 0 and 1 that broadcasts over it.
# ESFT's mask of chosen experts is such an array, [L, E, 1, 1].
Trains = Callable[[tuple[Any, ...]], bool | jax.Array]


class Optimizer(NamedTuple):
    """An update rule and the parameters that it applies to.

    Attributes:
      split: all parameters -> those that train, those that are frozen.
      init: all parameters -> the optimizer state, which holds nothing for frozen ones.
      update: (gradients of those that train, state, all parameters, learning rate, and whether to
        update at all, True unless given) -> all parameters, state, norm of the gradients.
    """

    split: Callable[[nnx.State], tuple[nnx.State, nnx.State]]
    init: Callable[[nnx.State], optax.OptState]
    update: Callable[..., tuple[nnx.State, optax.OptState, jax.Array]]


def adamw(config: OptimConfig, trains: Trains = lambda path: True) -> Optimizer:
    """Builds the optimizer of a run.

    `update` takes float32 gradients and a float32 scalar learning rate, and returns the global norm
    before clipping. If that norm is not finite, nothing is updated: one NaN in a gradient would
    reach every parameter through the moments, for good. What does not train is left out of the
    norm, does not decay and keeps its bits. A parameter of which a part trains has moments for all
    of it. With `optim.ema` the state holds, as EMA, the average of what trains, which begins with
    the weights of the run's beginning.
    """
    clip = clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    chain = optax.named_chain(  # named, so that a checkpoint says optimizer.adam.mu.head.weight
        ("clip", clip),
        (
            "adam",
            scale_by_adam(
                config.beta1,
                config.beta2,
                epsilon=config.epsilon,
                moment_dtype=jnp.dtype(config.moment_dtype),
            ),
        ),
        ("decay", optax.add_decayed_weights(config.weight_decay, mask=decay_mask)),
    )

    def split(params: nnx.State) -> tuple[nnx.State, nnx.State]:
        trained, frozen = nnx.split_state(params, lambda path, _: trains(path) is not False, ...)
        if not jax.tree.leaves(trained):
            raise ValueError("no parameter is chosen to train; choose at least one")
        return trained, frozen

    def masked(tree: nnx.State) -> nnx.State:
        def mask(path: tuple[Any, ...], variable: Any) -> Any:
            kept = trains(path)
            return variable if kept is True else jax.tree.map(lambda x: x * kept, variable)

        return nnx.map_state(mask, tree)

    @jax.named_scope("optimizer")
    def update(
        grads: nnx.State,
        state: optax.OptState,
        params: nnx.State,
        learning_rate: jax.Array,
        fine: jax.Array | bool = True,
    ) -> tuple[nnx.State, optax.OptState, jax.Array]:
        trained, frozen = split(params)
        grads, average = masked(grads), average_of(state)
        grad_norm = optax.tree.norm(grads)
        fine = jnp.isfinite(grad_norm) & fine
        changes, state = chain.update(grads, state, trained, fine=fine)
        # Masked again: without a gradient a parameter would still decay.
        trained = jax.tree.map(
            lambda param, change: jnp.where(fine, param - learning_rate * change, param),
            trained,
            masked(changes),  # type: ignore
        )
        if average is not None:
            average = jax.tree.map(
                # In this form the average of what does not move keeps its bits.
                lambda mean, new: jnp.where(fine, mean + (1 - config.ema) * (new - mean), mean),
                average,
                trained,
            )
            state = {**cast(dict[str, Any], state), EMA: average}
        return nnx.merge_state(trained, frozen), state, grad_norm

    def init(params: nnx.State) -> optax.OptState:
        trained, _ = split(params)
        state = chain.init(trained)
        if not config.ema:
            return state
        # Copied: a step is donated both, which must not be one buffer.
        return {**cast(dict[str, Any], state), EMA: jax.tree.map(jnp.copy, trained)}

    return Optimizer(split, init, update)


def average_of(state: Any) -> nnx.State | None:
    """Returns the averages that an optimizer's state holds of the parameters that train, if any."""
    return state.get(EMA) if isinstance(state, dict) else None


def clip_by_global_norm(largest: float) -> optax.GradientTransformation:
    """Returns optax's, but with one factor for all elements. optax divides each by the norm, which
    XLA does only once on a CPU: it then writes the gradients again, and each moment reads both.
    """

    def clip(updates: Any, params: Any = None) -> Any:
        norm = optax.tree.norm(updates)
        factor = jnp.where(norm < largest, jnp.float32(1), largest / norm)
        return jax.tree.map(lambda update: update * factor, updates)

    return optax.stateless(clip)


def scale_by_adam(
    beta1: float, beta2: float, *, epsilon: float, moment_dtype: jnp.dtype
) -> optax.GradientTransformationExtraArgs:
    """Returns optax's Adam with both moments stored in `moment_dtype`, and an argument `fine` of
    its update: a bool scalar, whether the state changes.

    The arithmetic is float32. A moment is rounded (to nearest) only when it is stored; the update
    of the same step uses it unrounded. optax's own `mu_dtype` covers only the first moment.
    """
    adam = optax.scale_by_adam(b1=beta1, b2=beta2, eps=epsilon)

    def cast_moments(state: Any, dtype: jnp.dtype) -> Any:
        return state._replace(
            mu=optax.tree.cast(state.mu, dtype), nu=optax.tree.cast(state.nu, dtype)
        )

    def init(params: Any) -> optax.OptState:
        return cast_moments(adam.init(params), moment_dtype)

    def update(
        updates: Any, state: Any, params: Any = None, *, fine: jax.Array | bool = True, **_: Any
    ) -> tuple[Any, optax.OptState]:
        old = cast_moments(state, jnp.dtype("float32"))
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to its int32 count
            mu = optax.tree.update_moment(updates, old.mu, beta1, 1)
            nu = optax.tree.update_moment_per_elem_norm(updates, old.nu, beta2, 2)
            new = old._replace(count=optax.safe_increment(old.count), mu=mu, nu=nu)
            # Chosen before the update is computed from them: it then reads what is stored. Did it
            # need the old moments too, XLA would copy those on a CPU, twice the state each step.
            new = jax.tree.map(lambda new, old: jnp.where(fine, new, old), new, old)
            mu_hat = optax.tree.bias_correction(new.mu, beta1, new.count)
            nu_hat = optax.tree.bias_correction(new.nu, beta2, new.count)
            updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + epsilon), mu_hat, nu_hat)
        return updates, cast_moments(new, moment_dtype)

    return optax.GradientTransformationExtraArgs(
        init, cast(optax.TransformUpdateExtraArgsFn, update)
    )


def decay_mask(params: Any) -> Any:
    """Marks the parameters that decay: those with at least two dims besides the stacked layers.

    Args:
      params: nnx variables whose metadata `axes` names each dim.

    Raises:
      ValueError: a parameter declares no axes.
    """

    def decays(path: Any, variable: nnx.Variable) -> bool:
        axes = variable.get_metadata("axes", None) if isinstance(variable, nnx.Variable) else None
        if axes is None:
            raise ValueError(
                f"parameter {jax.tree_util.keystr(path)} has no metadata 'axes', which "
                "decides whether it decays; declare it with its logical axes"
            )
        # A stack's leading dimension does not make a norm a matrix.
        return sum(axis not in LAYER_AXES for axis in axes) >= 2

    return jax.tree_util.tree_map_with_path(
        decays, params, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )
