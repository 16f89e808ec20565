"""Attention within documents for Hopper GPUs against the whole score matrix.

On a GPU: JAX_PLATFORMS=cuda,cpu python -m pytest tests/kernels/test_hopper_attention.py
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from dsjax.kernels import attention, hopper_attention
from dsjax.kernels.target import HOPPER, Target
from dsjax.parallel.mesh import make_mesh
from dsjax.parallel.sharded_attention import sharded_attention
from tests.closeness import BF16, F32, assert_close
from tests.kernels.hopper import INTERPRETED
from tests.oracles.kernels import reference_attention

# Documents of two rows of 384 tokens. A program owns 128 and reads 64 at once; documents end inside
# such blocks and with them, span several, and have a single token.
ROWS = [70, 58, 1, 191, 64], [384]


def ids_of(*rows):
    return jnp.asarray([np.repeat(1 + np.arange(len(row)), row) for row in rows], jnp.int32)


def inputs(segments, heads=(2, 2), widths=(32, 16), dtype=jnp.float32):
    """Queries, keys, values and the output's gradient."""
    (N, P), (H, W), rng = heads, widths, np.random.default_rng(0)
    shapes = (N, H), (P, H), (P, W), (N, W)
    return [jnp.asarray(rng.normal(size=(*segments.shape, *shape)), dtype) for shape in shapes]


def kernel(q, k, v, *, scale, segment_ids_BT):
    return hopper_attention.document_attention(q, k, v, segment_ids_BT, scale, INTERPRETED)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(attend, segments, *inputs):
    *operands, dout = inputs
    attended = functools.partial(attend, scale=0.3, segment_ids_BT=segments)
    out, backward = jax.vjp(attended, *operands)
    return out, *backward(dout.astype(out.dtype))


def check(segments, level, *inputs):
    got = value_and_gradients(kernel, segments, *inputs)
    wide = [x.astype(jnp.float32) for x in inputs]
    want = value_and_gradients(reference_attention, segments, *wide)
    for name, one, other in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert one.dtype == inputs[0].dtype
        assert_close(one, other, level, name)


@pytest.mark.parametrize(("dtype", "level"), [(jnp.float32, F32), (jnp.bfloat16, BF16)])
def test_attention_equals_definition_in_value_and_gradient(dtype, level):
    segments = ids_of(*ROWS)
    check(segments, level, *inputs(segments, dtype=dtype))


@pytest.mark.parametrize("widths", [(48, 16), (16, 112)])
def test_widths_are_taken_in_pieces_and_query_heads_share_keys(widths):
    segments = ids_of([100, 28])
    check(segments, F32, *inputs(segments, heads=(4, 2), widths=widths))


def test_ids_may_be_any():
    """Falling, of tokens that their document does not see (-s), and that come back later."""
    falling = [900] * 100 + [7] * 92 + [-7] * 192
    back = [3] * 60 + [5] * 70 + [-3] * 70 + [3] * 184
    segments = jnp.asarray([falling, back], jnp.int32)
    check(segments, F32, *inputs(segments))


def test_blocks_of_other_documents_are_not_read():
    """A weight of zero times NaN would be NaN."""
    segments = ids_of([128, 256], [128, 256])
    q, k, v, dout = inputs(segments)
    is_first = (jnp.arange(384) < 128)[None, :, None, None]
    absent = jnp.where(is_first, jnp.nan, v)
    out, dq, dk, dv = value_and_gradients(kernel, segments, q, k, absent, dout)
    assert all(jnp.isfinite(x[:, 128:]).all() for x in (out, dq, dk, dv))
    absent = jnp.where(is_first, dout, jnp.nan)
    _, dq, dk, dv = value_and_gradients(kernel, segments, q, k, v, absent)
    assert all(jnp.isfinite(x[:, :128]).all() for x in (dq, dk, dv))


def test_tables_name_the_first_and_last_blocks_of_documents():
    rng = np.random.default_rng(0)
    tables = jax.jit(
        lambda ids: (hopper_attention._first_blocks(ids), hopper_attention._last_blocks(ids))
    )
    for _ in range(30):
        ends = np.sort(rng.choice(np.arange(1, 640), 6, replace=False))
        ids = 1 + np.searchsorted(ends, np.arange(640), side="right")
        # A token of -s lies in document s.
        signed = ids * rng.choice([-1, 1], 640)
        first, last = (np.asarray(x)[0] for x in tables(jnp.asarray(signed[None], jnp.int32)))
        for block, own in enumerate(ids.reshape(-1, 128)):
            (places,) = np.nonzero((ids >= own[0]) & (ids <= own[-1]))
            assert first[block] == places[0] // 64
            assert last[block] == places[-1] // 64 + 1


def test_kernels_lower_for_a_gpu_with_mla_s_widths():
    """No GPU is needed for it."""
    segments = ids_of([100, 156])
    operands = inputs(segments, widths=(192, 128), dtype=jnp.bfloat16)

    def step(*operands):
        attend = functools.partial(hopper_attention.document_attention, scale=0.3)
        out, backward = jax.vjp(lambda q, k, v: attend(q, k, v, segments), *operands[:3])
        return out, *backward(operands[3])

    # jax 0.12 asks what it lowers for.
    device = AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device)):
        text = jax.jit(step).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    for name in ("document_attention", "document_attention_queries", "document_attention_keys"):
        assert f'name = "{name}"' in text


def shapes_of(length=256, widths=(192, 128), dtype=jnp.bfloat16):
    return [jax.ShapeDtypeStruct((1, length, 2, width), dtype) for width in widths]


@pytest.mark.parametrize(
    ("shapes", "target", "taken"),
    [
        (shapes_of(), HOPPER, True),
        (shapes_of(dtype=jnp.float16), HOPPER, True),
        (shapes_of(), Target("gpu", (8, 0)), False),
        (shapes_of(dtype=jnp.float32), HOPPER, False),
        (shapes_of(length=192), HOPPER, False),
        (shapes_of(widths=(24, 128)), HOPPER, False),
        (shapes_of(widths=(192, 192)), HOPPER, False),
        (shapes_of(widths=(256, 128)), HOPPER, False),
    ],
)
def test_fits_two_bytes_whole_blocks_and_widths_of_sixteens(shapes, target, taken):
    q, v = shapes
    assert hopper_attention.fits(q, v, target) is taken
    with jax.set_mesh(make_mesh({"data": -1})):
        assert not hopper_attention.fits(q, v, target)


@pytest.fixture
def interpreted(monkeypatch):
    """Where a program for Hopper takes the kernels, they are interpreted; lists the rows."""
    taken = []
    original = hopper_attention.document_attention

    def attend(q, k, v, segments, scale):
        taken.append(len(q))
        return original(q, k, v, segments, scale, True)

    monkeypatch.setattr(hopper_attention, "document_attention", attend)
    return taken


@pytest.mark.parametrize("axes", [{"data": 1}, {"data": 2}, {"data": 1, "tensor": 2}])
def test_hopper_takes_the_kernels_on_each_devices_shard(interpreted, axes):
    segments = ids_of([100, 156], [256])
    q, k, v, _ = inputs(segments, dtype=jnp.bfloat16)
    attend = functools.partial(sharded_attention, scale=0.3, target=HOPPER)
    n_devices = math.prod(axes.values())
    with jax.set_mesh(make_mesh(axes, devices=jax.devices()[:n_devices])):
        got = jax.jit(attend)(q, k, v, segments)
    assert interpreted == [1 if axes["data"] == 2 else 2]
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    assert_close(got, reference_attention(*wide, scale=0.3, segment_ids_BT=segments), BF16, "out")


def test_hopper_leaves_other_operands_to_xla(interpreted, monkeypatch):
    monkeypatch.setattr(attention, "tokamax", lambda: None)
    segments = ids_of([100, 156])
    q, k, v, _ = inputs(segments)
    attend = functools.partial(attention.causal_attention, scale=0.3, target=HOPPER)
    got = jax.jit(attend)(q, k, v, segment_ids_BT=segments)
    assert not interpreted
    assert_close(got, reference_attention(q, k, v, scale=0.3, segment_ids_BT=segments), F32, "out")
