"""Checkpoints loaded straight into eight- and four-bit weights, and models that run with them."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import dsjax
from dsjax.checkpoint import small_weights
from dsjax.checkpoint.load import Checkpoint, load, open_checkpoint
from dsjax.checkpoint.small_weights import FP8, INT4, INT8, format_of, stored_bytes
from dsjax.generate.engine import Engine, Request
from dsjax.generate.sampling import Sampling
from dsjax.model.layers import Constant, Float32, declare
from dsjax.model.parameters import declarations
from dsjax.model.transformer import Transformer
from dsjax.parallel.mesh import make_mesh
from dsjax.parallel.sharding import generation_spec
from dsjax.precision.fp8 import BlockScaled, quantize_block
from dsjax.precision.policy import Policy
from dsjax.precision.small_weights import bits_per_weight
from tests.checkpoint import conversions, hf_files
from tests.closeness import EXACT, F32, LOGITS, assert_close, relative_l2
from tests.golden import checkpoint as golden
from tests.golden.cases import ORACLE_CASES

MTP = ORACLE_CASES["v3_mtp"]
SMALL_NAMES = {dtype: name for name, dtype in small_weights.SMALL.items()}
FLOAT32 = np.dtype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return hf_files.write(tmp_path_factory.mktemp("hf"), MTP.config, hf_files.plain(MTP))


def parameters(model):
    leaves = jax.tree_util.tree_leaves_with_path(
        model, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )
    return {jax.tree_util.keystr(keys)[1:]: variable.get_value() for keys, variable in leaves}


def widened(model):
    """The same model with plain arrays."""

    def widen(variable):
        value = variable.get_value()
        return variable.copy(value.dequantize() if isinstance(value, BlockScaled) else value)

    return jax.tree.map(widen, model, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


@functools.cache
def forward():
    return jax.jit(lambda model, tokens: model(tokens))


def tokens():
    return jnp.asarray(np.stack([golden.tokens(MTP, 24)] * 8))


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [("int8", 1e-3, 2e-2), ("int4", 1e-2, 2e-1), ("fp8", 1e-2, 5e-2)],
    ids=str,
)
def test_matrices_are_small_and_as_close_as_their_bits_allow(folder, dtype, low, high):
    loaded, whole = dsjax.load(folder, dtype=dtype), parameters(dsjax.load(folder))
    small = {name for name, value in parameters(loaded).items() if isinstance(value, BlockScaled)}
    kept = {name for name in whole if name not in small}
    stays = ("norm", "wkv_b", "gate.", "embed.", *(["head."] if dtype == "fp8" else []))
    assert not any(word in name for name in small for word in stays)
    assert all(any(word in name for word in stays) for name in kept), kept
    for name, value in parameters(loaded).items():
        want = np.asarray(whole[name])
        if name in kept:
            assert_close(value, want, EXACT, name)
            continue
        head = name.startswith("head.")
        assert value.dtype == (INT8 if head else small_weights.SMALL[dtype]), name
        assert value.shape == want.shape
        error = relative_l2(value.dequantize(), want)
        assert (1e-3 if head else low) < error < (2e-2 if head else high), (name, error)


@pytest.mark.parametrize("dtype", ["int8", "int4", pytest.param("fp8", marks=pytest.mark.heavy)])
def test_logits_are_those_of_the_widened_weights(folder, dtype):
    model = dsjax.load(folder, dtype=dtype)
    got = forward()(model, tokens())
    assert_close(got, forward()(widened(model), tokens()), F32, "logits")
    want = forward()(dsjax.load(folder), tokens())
    error = np.median(np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1))
    low, high = {"int8": (0.001, 0.05), "fp8": (0.005, 0.2), "int4": (0.02, 0.6)}[dtype]
    assert low < error < high, error


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", ["int8", "int4", "fp8"])
@pytest.mark.parametrize(
    "sizes", [{"expert": 2, "fsdp": 2, "tensor": 2}, {"pipe": 2, "context": 2, "data": 2}], ids=str
)
def test_a_mesh_gives_the_same_logits(folder, dtype, sizes):
    """Blocks end where a device's share does, so the small weights may differ from one device's."""
    mesh = make_mesh(sizes)
    model = dsjax.load(folder, mesh=mesh, dtype=dtype)
    with jax.set_mesh(mesh):
        got = forward()(model, tokens())
    assert_close(got, forward()(jax.device_get(widened(model)), tokens()), LOGITS, "logits")
    for name, value in parameters(model).items():
        if isinstance(value, BlockScaled):
            assert value.values.sharding.spec == value.scales.sharding.spec, name


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", ["int4", "fp8"])
def test_a_model_that_generates_scores_with_fewer_blocks_than_devices(folder, dtype):
    """As a server does for `echo`: what generation leaves whole has blocks of the whole."""
    mesh = make_mesh({"expert": 8})
    model = load(open_checkpoint(folder), mesh=mesh, dtype=dtype, look_up=generation_spec)
    small = [value for value in parameters(model).values() if isinstance(value, BlockScaled)]
    assert any(value.scales.shape[-2] < 8 for value in small)
    with jax.set_mesh(mesh):
        got = forward()(model, tokens())
    assert_close(got, forward()(jax.device_get(widened(model)), tokens()), LOGITS, "logits")


@pytest.mark.parametrize(
    ("dtype", "speculative"), [("int8", False), pytest.param("int4", True, marks=pytest.mark.heavy)]
)
def test_generation_is_that_of_the_widened_weights(folder, dtype, speculative):
    model = dsjax.load(folder, dtype=dtype)
    requests = [Request((5, 7, 9), 8, Sampling(temperature=0.0)) for _ in range(2)]
    tokens = [
        [part.tokens for part in Engine(each, speculative=speculative).complete(requests)]
        for each in (model, widened(model))
    ]
    assert tokens[0] == tokens[1] and len(tokens[0][0]) == 8


@pytest.mark.heavy
def test_four_bits_on_several_devices_of_a_cpu_generate(folder):
    """Of arrays in less than a byte jax does not tell the layout that its programs ask for."""
    mesh = make_mesh({"expert": 2, "tensor": 2}, n_devices=4)
    model = dsjax.load(folder, mesh=mesh, dtype="int4")
    requests = [Request((5, 7, 9), 8, Sampling(temperature=0.0)) for _ in range(2)]
    engine = Engine(model, streaming=False)
    tokens = [part.tokens for part in engine.complete(requests)]
    alone = Engine(jax.device_put(jax.device_get(widened(model))), streaming=False)
    assert tokens == [part.tokens for part in alone.complete(requests)]
    compiled = []

    def listen(event, _, **details):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    again = [part.tokens for part in engine.complete(requests)]
    jax.monitoring.unregister_event_duration_listener(listen)
    assert again == tokens and compiled == []


@pytest.mark.parametrize("dtype", [INT8, INT4, FP8], ids=SMALL_NAMES.get)
def test_bytes_are_counted_before_anything_is_loaded(folder, dtype):
    model = dsjax.load(folder, dtype=SMALL_NAMES[dtype])
    declared = Transformer(model.config, Policy(jnp.float32))
    bits = 0.0
    for value in parameters(model).values():
        small = isinstance(value, BlockScaled)
        each = bits_per_weight(value.dtype, value.block) if small else 8 * value.dtype.itemsize
        bits += np.prod(value.shape) * each
    assert stored_bytes(declared, dtype, FLOAT32) == int(bits / 8)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(model)) == int(bits / 8)
    whole = 4 * sum(parameter.count for parameter in declarations(declared))
    assert bits / 8 < 0.7 * whole  # the embedding alone is a fifth of this model


def test_no_more_than_a_band_is_ever_read_in_float32(folder, monkeypatch):
    """And bands give what whole matrices do."""
    want = parameters(dsjax.load(folder, dtype="int4"))
    largest, read = [0], Checkpoint.read

    def counted(self, path, index, dtype=None):
        part = read(self, path, index, dtype)
        if path[-1].startswith("w_") or path == ("head", "weight"):
            largest[0] = max(largest[0], part.nbytes)
        return part

    monkeypatch.setattr(Checkpoint, "read", counted)
    monkeypatch.setattr(small_weights, "_BAND_BYTES", 4096)
    got = parameters(dsjax.load(folder, dtype="int4"))
    for name, value in want.items():
        for mine, other in zip(jax.tree.leaves(got[name]), jax.tree.leaves(value), strict=True):
            assert_close(mine, other, EXACT, name)
    assert 0 < largest[0] <= 4096


def test_what_is_float32_in_every_model_stays():
    declared = declare((64, 64), ("latent", "norm"), Constant(0.0), Float32)
    assert format_of("ape", declared, INT8) is None
    assert format_of("w", declare((64, 64), ("latent", "norm"), Constant(0.0)), INT8)


def test_blocks_end_where_a_devices_share_does(folder):
    model = Transformer(open_checkpoint(folder).model, Policy(jnp.float32))
    w_down = model.moe_layers.ffn.experts.w_down
    depth = w_down.shape[-2]
    mesh = make_mesh({"tensor": 2}, n_devices=2)
    split = jax.NamedSharding(mesh, jax.P(None, None, "tensor", None))
    whole = format_of("w_down", w_down, INT8)
    assert whole == (INT8, (np.gcd(depth, 32), 1))
    assert format_of("w_down", w_down, INT8, split) == (INT8, (np.gcd(depth // 2, 32), 1))


def test_a_weight_that_is_not_finite_is_named(folder, tmp_path):
    tensors = hf_files.plain(MTP)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"  # of an MTP module
    tensors[name] = tensors[name].copy()
    tensors[name][3, 5] = np.nan
    hf_files.write(tmp_path, MTP.config, tensors)
    with pytest.raises(ValueError, match=r"^mtp\.layer\.ffn\.experts\.w_up: 1 of \d+ weights"):
        dsjax.load(tmp_path, dtype="int8")


def test_other_types_are_refused(folder):
    for dtype in ("int3", np.int16, ml_dtypes.int2):
        with pytest.raises(ValueError, match="its weights may be fp8, int8 or int4"):
            dsjax.load(folder, dtype=dtype)


def fp8_folder(folder, pow2=False):
    """A checkpoint as DeepSeek publishes them, with blocks of 16 x 16."""
    tensors = hf_files.in_fp8(MTP)
    for name in [name for name in tensors if pow2 and name.endswith("_scale_inv")]:
        tensors[name] = np.exp2(np.floor(np.log2(tensors[name])))
    config = MTP.config | {"quantization_config": hf_files.quantization()}
    return hf_files.write(folder, config, tensors), tensors


@pytest.mark.parametrize(
    ("sizes", "pow2", "imported"),
    [
        (None, False, False),
        (None, True, False),
        (None, False, True),
        ({"expert": 2, "fsdp": 2, "tensor": 2}, False, False),
    ],
    ids=str,
)
def test_an_fp8_checkpoint_keeps_its_numbers(tmp_path, sizes, pow2, imported):
    """On a mesh too, where a device's share may end within a block."""
    folder, tensors = fp8_folder(tmp_path / "hf", pow2)
    if imported:
        conversions.bring_in(folder, tmp_path / "own")
        folder = tmp_path / "own"
    mesh = make_mesh(sizes) if sizes else None
    found = parameters(dsjax.load(folder, mesh=mesh, dtype="fp8"))
    whole = parameters(dsjax.load(folder, dtype=np.float32))
    small = {name for name, value in found.items() if isinstance(value, BlockScaled)}
    assert small and not any("wkv_b" in name or "eh_proj" in name for name in small)
    for name, value in found.items():
        if name in small:
            assert value.values.dtype == FP8 and value.scales.dtype == np.float32
            assert min(value.block) >= 8, name
            value = value.dequantize()
        assert_close(value, whole[name], EXACT, name)
    own_EFD = jax.device_get(found["moe_layers.ffn.experts.w_down"].values)[0]
    layer = MTP.config["first_k_dense_replace"]
    for expert, values_FD in enumerate(own_EFD):
        want = tensors[f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"]
        assert_close(values_FD.T.view(np.uint8), want.view(np.uint8), EXACT)


def test_fp8_of_other_checkpoints_is_the_same_on_a_mesh(folder):
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    one = parameters(dsjax.load(folder, dtype="fp8"))
    many = parameters(dsjax.load(folder, mesh=mesh, dtype="fp8"))
    for name, value in one.items():
        if isinstance(value, BlockScaled):
            assert isinstance(many[name], BlockScaled), name
            assert_close(many[name].dequantize(), value.dequantize(), EXACT, name)
            whole = quantize_block(parameters(dsjax.load(folder))[name])
            assert_close(value.dequantize(), whole.dequantize(), EXACT, name)


def test_fp8_that_is_no_number_is_named(tmp_path):
    folder, tensors = fp8_folder(tmp_path)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"  # of an MTP module
    tensors[name] = tensors[name].copy()
    tensors[name].view(np.uint8)[3, 5] = 0x7F
    hf_files.write(folder, MTP.config | {"quantization_config": hf_files.quantization()}, tensors)
    with pytest.raises(
        ValueError, match=r"^mtp\.layer\.ffn\.experts\.w_up: 1 of \d+ weights are no"
    ):
        dsjax.load(folder, dtype="fp8")
