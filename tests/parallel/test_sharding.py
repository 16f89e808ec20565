import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dsjax.axes import AXES
from dsjax.parallel.mesh import make_mesh
from dsjax.parallel.sharding import (
    AXIS_TABLE,
    constrain,
    divisible,
    gather_for_use,
    generation_spec,
    optimizer_spec,
    partition_spec,
    parts,
    reduce_to_shards,
    stored_spec,
)

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def test_partition_spec_looks_the_axes_up():
    spec = partition_spec(("layers", "embed", "heads"), (3, 8, 6), make_mesh(MESH), "wq")
    assert spec == PartitionSpec(None, ("fsdp",), ("tensor",))


def test_context_splits_sequences_and_weights():
    mesh = make_mesh({"fsdp": 2, "context": 2, "expert": 2})
    weight = partition_spec(("embed", "heads"), (16, 6), mesh, "wq")
    assert weight == PartitionSpec(("fsdp", "context", "expert"), None)
    experts = partition_spec(("experts", "expert_embed", "ffn"), (4, 16, 6), mesh, "w_up")
    assert experts == PartitionSpec(("expert",), ("fsdp", "context"), None)
    tokens = partition_spec(("batch", "length", "width"), (4, 8, 16), mesh, "x")
    assert tokens == PartitionSpec(("fsdp", "expert"), ("context",), None)


def test_axes_of_size_one_leave_no_trace():
    spec = partition_spec(("embed", "heads"), (7, 5), make_mesh({"data": 8}), "wq")
    assert spec == PartitionSpec(None, None)


@pytest.mark.parametrize(
    ("axes", "shape", "message"),
    [
        (
            ("embed", "heads"),
            (8, 5),
            r"attn\.wq: dimension heads=5 of shape \(8, 5\) does not divide over mesh\.tensor=2",
        ),
        (
            ("embed", "head"),
            (8, 4),
            r"attn\.wq: unknown logical axis 'head'; known: layers, end_layers, embed",
        ),
        (("embed", "embed"), (8, 4), r"attn\.wq: mesh axis .*fsdp.* is used twice"),
        (("embed",), (8, 4), r"attn\.wq: 1 logical axes"),
    ],
)
def test_partition_spec_rejects(axes, shape, message):
    with pytest.raises(ValueError, match=message):
        partition_spec(axes, shape, make_mesh(MESH), "attn.wq")


def test_optimizer_state_is_split_over_copies_where_the_width_divides():
    mesh = make_mesh(MESH)
    for axes, shape, want in [
        (("layers", "embed", "heads"), (3, 8, 6), (None, ("fsdp", "data"), ("tensor",))),
        (("heads", "embed"), (6, 6), (("tensor",), ("fsdp",))),  # 6 does not divide over 4
        (("norm",), (8,), (None,)),
    ]:
        assert optimizer_spec(axes, shape, mesh, "wq") == PartitionSpec(*want)
    alone = optimizer_spec(("embed", "heads"), (8, 6), make_mesh({"fsdp": 8}), "wq")
    assert alone == PartitionSpec(("fsdp",), None)


def test_generation_keeps_all_but_the_experts_whole_along_expert_and_context():
    mesh = make_mesh({"fsdp": 2, "context": 2, "expert": 2})
    for axes, want in (
        (("embed", "latent"), (("fsdp",), None)),
        (("router_embed", "norm"), (("fsdp",), None)),
        (("experts", "expert_embed"), (("expert",), ("fsdp", "context"))),
    ):
        assert generation_spec(axes, (16, 16), mesh, "w") == PartitionSpec(*want)
    mesh = make_mesh({"tensor": 2, "expert": 4})
    for axes, want in (
        (("latent", "latent_heads"), (None, ("tensor",))),
        (("embed", "latent"), (None, None)),
        (("experts", "expert_embed", "ffn"), (("expert",), None, ("tensor",))),
    ):
        assert generation_spec(axes, (16,) * len(axes), mesh, "w") == PartitionSpec(*want)


def test_stored_parameters_are_split_over_ranks_of_a_pipeline_but_not_by_layer():
    mesh = make_mesh({"pipe": 2, "fsdp": 2, "tensor": 2})
    for axes, shape, want in [
        (("layers", "embed", "heads"), (4, 8, 6), (None, ("fsdp", "pipe"), "tensor")),
        (("layers", "heads", "embed"), (3, 6, 8), (None, "tensor", ("fsdp", "pipe"))),
        # 6 does not divide over 4, the other does
        (("layers", "embed", "heads"), (3, 6, 8), (None, "fsdp", ("tensor", "pipe"))),
        (("end_layers", "norm"), (2, 3), (None, None)),
        (("norm",), (8,), ("pipe",)),
    ]:
        assert stored_spec(axes, shape, mesh, "w") == PartitionSpec(*want)
        one_device_a_rank = make_mesh({"data": 8})
        assert stored_spec(axes, shape, one_device_a_rank, "w") == partition_spec(
            axes, shape, one_device_a_rank, "w"
        )
    with_copies = make_mesh({"pipe": 2, "data": 2, "fsdp": 2})
    moments = optimizer_spec(("layers", "embed"), (3, 8), with_copies, "w")
    assert moments == PartitionSpec(None, ("fsdp", "pipe", "data"))


def test_parts_multiply_the_axes_of_a_dimension():
    mesh = make_mesh({"data": 2, "fsdp": 2, "expert": 2})
    found = [parts(axis, mesh) for axis in ("batch", "embed", "experts", "heads", "width")]
    assert found == [8, 4, 2, 1, 1]


def test_table_names_real_mesh_axes():
    assert {axis for axes in AXIS_TABLE.values() for axis in axes} <= set(AXES)


def test_constrain_splits_under_a_mesh_and_is_nothing_without():
    x = jnp.zeros((8, 4, 2))
    assert constrain(x, "batch", "length", "width") is x
    with jax.set_mesh(make_mesh(MESH)):
        placed = jax.jit(lambda x: constrain(x, "batch", "length", "width"))(x)
    assert placed.sharding.shard_shape(x.shape) == (2, 4, 2)


@pytest.mark.parametrize("other", ["fsdp", "context"])
def test_a_weight_is_put_together_in_two_steps_and_its_gradient_summed_in_them(other):
    mesh = make_mesh({other: 2, "expert": 4})
    rng = np.random.default_rng(0)
    w, x = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((16, 6), (8, 16)))
    axes = ("embed", "heads")

    def loss(w, x):
        x = constrain(x, "batch", "width")
        return jnp.square(x @ gather_for_use(w, axes, jnp.bfloat16)).sum()

    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(loss))
        got = gradient(w, x)
        text = gradient.lower(w, x).as_text()
        summed = jax.jit(lambda dw: reduce_to_shards(dw, *axes))(w)
    want = jax.grad(lambda w: jnp.square(x @ w).sum())(w.astype(jnp.bfloat16).astype(w.dtype))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_array_equal(summed, w)
    for gradient in got, summed:
        assert gradient.sharding.spec[0] == (other, "expert")
    # It lies as declared, then split over the other alone; the first travels as bfloat16.
    steps = [line for line in text.splitlines() if "sharding_constraint" in line and "16x6" in line]
    assert ["expert" in line for line in steps] == [True, False, False, True]
    assert ["bf16" in line for line in steps] == [True, True, False, False]


def test_a_weight_that_one_axis_splits_keeps_its_type():
    w = jnp.full((16, 6), 1 + 2**-20, jnp.float32)
    for sizes in {"fsdp": 8}, {"expert": 8}:
        with jax.set_mesh(make_mesh(sizes)):
            axes = ("embed", "heads")
            np.testing.assert_array_equal(
                jax.jit(lambda w, a=axes: gather_for_use(w, a, jnp.bfloat16))(w), w
            )


def test_a_batch_is_filled_up_until_it_divides():
    x = jnp.arange(15, dtype=jnp.float32).reshape(5, 3) + 1
    assert divisible(x).shape == (5, 3)
    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        filled = jax.jit(divisible)(x)
        assert jax.jit(divisible)(x[:4]).shape == (4, 3)
    assert filled.shape == (8, 3)
    np.testing.assert_array_equal(filled, np.pad(np.asarray(x), ((0, 3), (0, 0))))
