"""What a step is given: shapes, places, bytes; and that a decoding step sends no weights."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dsjax import settings
from dsjax.kernels.target import Target
from dsjax.model.transformer import Transformer
from dsjax.parallel.mesh import describe_mesh, make_mesh, resolve
from dsjax.plan import collectives, programs
from dsjax.precision.policy import Policy
from tests.golden.ours import QUICK
from tests.model.tiny import TINY

ROOT = Path(__file__).parents[2]


def make(name, step, n_devices, *overrides):
    config = settings.override(settings.load_config(ROOT / f"configs/{name}.py"), list(overrides))
    mesh = describe_mesh(resolve(config.mesh.sizes, n_devices))
    return getattr(programs, step)(config, mesh, Target("tpu", (5,)))


def test_671b_is_split_over_all_chips():
    """Masters in float32 and two moments in bfloat16: 8 bytes a parameter; norms are whole."""
    program = make("v3_671b", "train", 512)
    even = 8 * (671_026_419_200 + 11_517_000_000) / 512
    assert even < program.argument_bytes < 1.01 * even
    assert program.tokens == 15360 * 4096
    assert program.tokens_per_pass == 512 * 4096


def test_warm_up_of_the_indexers_holds_moments_of_them_alone():
    program = make("v3_2_671b", "train", 512, "train.indexer=warmup")
    masters, moments = 4 * (671_877_944_064 + 11_517_000_000) / 512, 4 * 870_000_000 / 512
    assert masters + moments < program.argument_bytes < 1.01 * (masters + moments)


def test_decoding_holds_weights_in_bfloat16_and_the_cache():
    program = make("v2_lite", "decode", 16, "train.micro_batch_size=64", "train.batch_size=64")
    weights, cache = 2 * 15_706_484_224 / 16, 64 // 16 * 4096 * 27 * 576 * 2
    assert program.argument_bytes == pytest.approx(weights + cache, rel=0.02)
    assert program.tokens == 64


def test_decoding_over_experts_and_heads_gathers_no_weights():
    config, mesh = dataclasses.replace(TINY, dim=256), make_mesh({"expert": 4, "tensor": 2})
    declared = Transformer(config, Policy(jnp.float32, Target("cpu")))
    program = programs.decoding(declared, mesh, 4, 16, "rows")
    with jax.set_mesh(mesh):
        step = jax.jit(program.function, compiler_options=QUICK)
        text = step.lower(*program.arguments).compile().as_text()
    assert text
    (gathered,) = (item for item in collectives.parse(text) if item.kind == "all-gather")
    smallest = 4 * config.dim * (config.kv_lora_rank + config.qk_rope_head_dim)
    assert gathered.bytes < smallest / 10


@pytest.mark.parametrize("step", ["train", "decode"])
def test_sequences_that_do_not_divide_are_refused(step):
    batch = ("train.micro_batch_size=6", "train.batch_size=6")
    with pytest.raises(
        ValueError, match=r"train.micro_batch_size.* does not divide over mesh.fsdp"
    ):
        make("v2_lite", step, 16, *batch)


def test_mesh_that_does_not_fill_the_slice_is_refused():
    with pytest.raises(ValueError, match="does not fill the 48 devices"):
        make("v3_671b", "train", 48)
