"""A small model cut into stages, run through a pipeline and, as the reference, without one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from dsjax.parallel import pipeline, schedules
from dsjax.parallel.mesh import make_mesh
from dsjax.parallel.stages import PIPE

BATCH = 3


def enter(outer, inputs):
    x = jnp.tanh(inputs["x"] @ outer["w_in"])
    return x, inputs["scale"] * jnp.square(x - 0.5).mean()


def stage(params, present, x, inputs):
    """Walks layers; one that is not present must not count."""

    def layer(x, layer):
        params, present = layer
        y = x + jax.nn.gelu(x @ params["w_up"]) @ params["w_down"]
        penalty = inputs["scale"] * jnp.square(y).mean()
        rows = jnp.int32(y.shape[0]) * inputs["number"]
        report = {"penalty": penalty, "rows": rows}
        if present is None:
            return y, report
        return jnp.where(present, y, x), jax.tree.map(lambda r: jnp.where(present, r, 0), report)

    x, report = jax.lax.scan(layer, x, (params, present))
    return x, report["penalty"].sum(), report


def leave(outer, y, inputs):
    loss = jnp.square(y @ outer["w_out"] @ outer["w_in"].T - inputs["target"]).mean()
    return loss * 2.0, {"loss": loss, "number": inputs["number"]}


PIECES = pipeline.Pieces(enter, stage, leave)


def arrays(n_layers, n_microbatches, width=16, rows=BATCH, seed=0):
    """Parameters and inputs: layers, outer, inputs."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(0, width**-0.5, shape), jnp.float32)

    layers = {
        "w_up": normal(n_layers, width, width),
        "w_down": normal(n_layers, width, width),
    }
    outer = {"w_in": normal(width, width), "w_out": normal(width, width)}
    inputs = {
        "x": normal(n_microbatches, rows, width),
        "target": normal(n_microbatches, rows, width),
        "scale": jnp.arange(1, n_microbatches + 1, dtype=jnp.float32) / n_microbatches,
        "number": jnp.arange(n_microbatches, dtype=jnp.int32) + 1,
    }
    return layers, outer, inputs


# Without any optimisation, the other tests' way, the compiler adds up in an order that depends on
# the program around it.
_compile = functools.partial(
    jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 1}
)


def build(name, ranks, microbatches):
    return schedules.build(name, ranks * schedules.stages_per_rank(name), microbatches)


def run(schedule, *args, pieces=PIECES):
    with jax.set_mesh(make_mesh({"pipe": schedule.n_ranks}, schedule.n_ranks)):
        return jax.device_get(_run(pieces, schedule, *args))


@functools.partial(_compile, static_argnums=(0, 1))
def _run(pieces, schedule, *args):
    return pipeline.run(schedule, pieces, *args, specs(*args[:2], schedule.n_ranks))


def specs(layers, outer, n_ranks):
    """Splits the last dimension where it divides, as the widths here do over some of the ranks."""

    def last(x):
        entry = PIPE if n_ranks > 1 and x.shape[-1] % n_ranks == 0 else None
        return PartitionSpec(*(None,) * (x.ndim - 1), entry)

    return jax.tree.map(last, layers), jax.tree.map(last, outer)


@_compile
def reference(pieces, layers, outer, inputs):
    """The same by autodiff of the whole, micro-batch after micro-batch."""

    def objective(layers, outer, inputs):
        x, entered = pieces.enter(outer, inputs)
        y, total, layer_reports = pieces.stage(layers, None, x, inputs)
        loss, report = pieces.leave(outer, y, inputs)
        return total + loss + entered, (layer_reports, entered, report)

    def add(sums, inputs):
        (_, (*added, report)), grads = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(
            layers, outer, inputs
        )
        return jax.tree.map(jnp.add, sums, (*grads, *added)), report

    shapes = jax.eval_shape(
        lambda inputs: objective(layers, outer, inputs)[1][:2],
        jax.tree.map(lambda x: x[0], inputs),
    )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (layers, outer, *shapes))
    (d_layers, d_outer, layer_reports, entered), reports = jax.lax.scan(add, zeros, inputs)
    return pipeline.Result(d_layers, d_outer, layer_reports, reports, entered)
