"""What programs ask of cuDNN, read from programs lowered without a GPU; on a Hopper GPU the numbers
too: JAX_PLATFORMS=cuda python -m pytest -m "gpu or not gpu" tests/kernels/test_cudnn_attention.py
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.kernels import cudnn_attention as kernel
from dsjax.kernels.attention import causal_attention
from dsjax.kernels.target import HOPPER, Target
from tests.closeness import BF16, assert_close
from tests.oracles.kernels import reference_attention

SHAPES = (2, 64, 4, 192), (2, 64, 2, 192), (2, 64, 2, 128), (2, 64, 4, 128)


def value_and_gradients(attention, q, k, v, dout):
    out, backward = jax.vjp(lambda q, k, v: attention(q, k, v, scale=0.1), q, k, v)
    return out, *backward(dout.astype(out.dtype))


def calls():
    """Name, settings, and the line without them, of each call of a training step's attention."""
    operands = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in SHAPES]

    def attend(q, k, v, scale):
        return causal_attention(q, k, v, scale=scale, target=HOPPER)

    program = jax.jit(lambda *x: value_and_gradients(attend, *x)).trace(*operands)
    text = program.lower(lowering_platforms=("cuda",)).as_text()
    pattern = r"custom_call @(\S+)\((.*)backend_config = \"([^\"]*)\"(.*)"
    for name, start, config, end in re.findall(pattern, text):
        settings = json.loads(config.replace(r"\22", '"'))["cudnn_fmha_backend_config"]
        yield name, settings, start + end


def test_a_step_calls_forward_and_backward_with_their_operands():
    (forward, ahead, one), (backward, back, other) = calls()
    assert (forward, backward) == ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")
    q, k, v, dout = ("x".join(map(str, shape)) + "xbf16" for shape in SHAPES)
    takes = ", ".join(f"tensor<{x}>" for x in (q, k, v))
    assert f": ({takes}) -> (tensor<2x4x64x128xbf16>, tensor<2x4x64xf32>, tensor<0xui8>)" in one
    takes += f", tensor<2x4x64xf32>, tensor<{dout}>, tensor<{dout}>"
    gives = "tensor<2x4x64x192xbf16>, tensor<2x2x64x192xbf16>, tensor<2x2x64x128xbf16>"
    assert f": ({takes}) -> ({gives}, tensor<0xui8>)" in other
    for settings, line in ((ahead, one), (back, other)):
        assert "api_version = 2" in line
        # [B, N, T, X], stored as [B, T, N, X]
        assert "result_layouts = [dense<[3, 1, 2, 0]>" in line
        assert (settings["mask_type"], settings["fmha_scale"]) == ("CAUSAL", 0.1)
        assert settings["intermediate_tensor_shape"]["dimensions"] == ["2", "4", "64", "64"]
        assert settings["intermediate_tensor_shape"]["element_type"] == "BF16"


def test_products_are_those_of_attention_and_its_gradient():
    """Each product's dimension numbers, taken from the program, against its formula."""
    rng = np.random.default_rng(0)
    B, T, S, N, H = 2, 5, 7, 3, 4
    q, k, dout = (rng.normal(size=(B, length, N, H)) for length in (T, S, T))
    p = rng.normal(size=(B, N, T, S))
    formulas = {
        "bmm1": ("BTNH,BSNH->BNTS", q, k),
        "bmm2": ("BNTS,BSNH->BNTH", p, k),
        "bmm1_grad_gemm1": ("BNTS,BTNH->BNSH", p, q),
        "bmm1_grad_gemm2": ("BNTS,BSNH->BNTH", p, k),
        "bmm2_grad_gemm1": ("BNTS,BTNH->BNSH", p, dout),
        "bmm2_grad_gemm2": ("BTNH,BSNH->BNTS", dout, k),
    }
    found = {}
    for _, settings, _ in calls():
        for name, numbers in settings.items():
            if name.endswith("_dot_dimension_numbers"):
                found[name.removesuffix("_dot_dimension_numbers")] = numbers
    assert found.keys() == formulas.keys()
    for name, (formula, left, right) in formulas.items():
        dims = {kind: tuple(map(int, digits)) for kind, digits in found[name].items()}
        contracting, batch = (
            (dims[f"lhs_{kind}_dimensions"], dims[f"rhs_{kind}_dimensions"])
            for kind in ("contracting", "batch")
        )
        operands = left.astype(np.float32), right.astype(np.float32)
        got = jax.lax.dot_general(*operands, (contracting, batch))
        np.testing.assert_allclose(got, np.einsum(formula, left, right), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "widths", "taken"),
    [
        (jnp.bfloat16, (192, 128), True),
        (jnp.float16, (64, 64), True),
        (jnp.float32, (64, 64), False),
        (jnp.bfloat16, (576, 512), False),
        (jnp.bfloat16, (192, 100), False),
    ],
)
def test_takes_two_bytes_and_widths_of_eights_up_to_256(dtype, widths, taken):
    q, v = (jax.ShapeDtypeStruct((1, 4, 2, width), dtype) for width in widths)
    assert kernel.takes(q, v) is taken


@pytest.mark.gpu
def test_cudnn_attention_equals_reference_with_heads_as_mla_s():
    if not Target.here().is_hopper:
        pytest.skip("needs a Hopper GPU")
    rng = np.random.default_rng(0)
    shapes = (2, 1000, 4, 192), (2, 1000, 2, 192), (2, 1000, 2, 128), (2, 1000, 4, 128)
    *operands, dout = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)

    def cudnn(q, k, v, scale):
        return kernel.cudnn_attention(q, k, v, scale)

    got = jax.jit(lambda *x: value_and_gradients(cudnn, *x))(*operands, dout)
    wide = [x.astype(jnp.float32) for x in operands]
    want = jax.jit(lambda *x: value_and_gradients(reference_attention, *x))(*wide, dout)
    for name, g, w in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert_close(g.astype(jnp.float32), w, BF16, name)
