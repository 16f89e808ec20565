"""What post-training's programs are given: the batches that the runs make, and the bytes that lie
in memory beside them. Nothing is compiled.
"""

import jax
import numpy as np
import pytest

from dsjax import settings
from dsjax.checkpoint.shape import with_shape
from dsjax.config.roots import ROOTS
from dsjax.kernels.target import Target
from dsjax.model.token_sets import n_words
from dsjax.parallel.mesh import describe_mesh, make_mesh, resolve
from dsjax.plan import steps
from dsjax.posttrain.minibatches import Layout, Sample, pack
from dsjax.posttrain.rollout import Answer
from tests.plan.test_steps import CONFIGS

MAIN, MTP = 671_026_419_200, 11_517_000_000
PARAMETERS = MAIN + MTP
ONE_MESH = ("rollout_mesh.data=0", "rollout_mesh.expert=0", "rollout_mesh.tensor=0")


def load(name, init, *overrides):
    config = settings.override(settings.load_any(CONFIGS / f"{name}.py", ROOTS), list(overrides))
    return with_shape(config, str(CONFIGS / f"{init}.py"))


def make(name, step, init, n_devices, *overrides):
    config = load(name, init, *overrides)
    mesh = describe_mesh(resolve(steps.mesh_sizes(config, step), n_devices))
    return config, steps.build(config, step, mesh, Target("tpu", (5,)))


def test_671b_updates_with_its_reference():
    """Masters, two moments in bfloat16 of what trains, and a reference in bfloat16."""
    config, program = make("r1_zero_v3", "train", "v3_671b", 512)
    per_token = 7 + config.shape.n_moe_layers * 8  # numbers of 4 bytes
    batch = 16 * 36865 * per_token * 4
    even = (6 * PARAMETERS + 4 * MAIN) / 512 + batch
    assert even < program.argument_bytes < 1.01 * even
    assert (program.updates, program.mtp, program.beside) == (16, False, 0)
    assert program.tokens == 16 * program.tokens_per_pass == 16 * 128 * 36864


def test_671b_scores_beside_the_state_that_trains():
    _, update = make("r1_zero_v3", "train", "v3_671b", 512)
    _, program = make("r1_zero_v3", "score", "v3_671b", 512)
    assert program.beside == pytest.approx(10 * PARAMETERS / 512, rel=0.01)
    assert program.tokens == update.tokens
    assert program.argument_bytes < update.argument_bytes - 7 * PARAMETERS / 512


def test_671b_answers_with_a_cache_as_long_as_a_row():
    cache = 2048 // 128 * 36864 * 61 * 576 * 2
    experts = (58 + 1) * 256 * 3 * 7168 * 2048
    narrow = 62 * 7168 * (1536 + 512 + 64) + 59 * 7168 * 256 + 2 * 7168 * 7168  # without heads
    own = experts / 256 + (PARAMETERS - experts - narrow) / 4 + narrow
    for changes, weights, context in ((), own, 1), (ONE_MESH, PARAMETERS / 512, 4):
        _, program = make("r1_zero_v3", "decode", "v3_671b", 512, *changes)
        held = 2 * weights + cache / context
        assert program.argument_bytes == pytest.approx(held, rel=0.02)
        assert program.tokens == 2048
        state = (6 * PARAMETERS + 4 * MAIN) / 512
        cast = 0 if changes else 2 * PARAMETERS / 512
        assert program.beside == pytest.approx(state + cast, rel=0.01)


def test_without_a_reference_none_is_kept_and_nothing_is_scored_against_it():
    changes = "rl.beta=0", "rl.reference_every=0", "rl.minibatches=1"
    _, program = make("r1_zero_v3", "train", "v3_671b", 512, *changes)
    state, batch, _ = program.arguments
    assert state.reference is None and not {"old", "ref"} & set(batch)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_planned_answers_are_as_a_run_packs_them(top_p):
    config, program = make("grpo_countdown", "train", "tiny", 4, f"rl.top_p={top_p}")
    _, planned, _ = program.arguments
    model = config.shape
    experts = np.zeros((4, model.n_moe_layers, model.n_activated_experts), np.int32)
    kept = np.zeros((3, n_words(model.vocab_size)), np.uint32) if top_p < 1 else None
    answer = Answer((5, 6, 7), np.zeros(3, np.float32), experts, True, kept)
    length = planned["tokens"].shape[-1]
    layout = Layout(
        length, config.train.batch_size, config.micro_batch_size, 0, model.n_routed_experts
    )
    packed = pack([[Sample((3, 4), answer, 1.0)]] * config.rl.minibatches, layout, "token", 9)
    scored = {name: planned[name] for name in ("old", "ref") if name in planned}
    assert set(planned) == set(packed) | set(scored)
    for name, array in packed.items():
        assert (planned[name].shape, planned[name].dtype) == (array.shape, array.dtype), name


@pytest.mark.parametrize(
    ("name", "overrides", "per_sequence"),
    [
        ("sft_tiny", (), set()),
        ("dpo_tiny", (), {"reference"}),
        ("dpo_tiny", ("preference.kind=pointwise",), {"label"}),
        ("dpo_tiny", ("preference.kind=bradley_terry",), set()),
    ],
)
def test_steps_of_tuning_can_be_traced(name, overrides, per_sequence):
    mesh = make_mesh({"data": 2, "expert": 2, "context": 2})
    program = steps.build(load(name, "tiny", *overrides), "train", mesh, Target("cpu"))
    _, batch, _ = program.arguments
    assert {key for key, leaf in batch.items() if leaf.ndim == 2} == per_sequence
    with jax.set_mesh(mesh):
        state, metrics = jax.eval_shape(program.function, *program.arguments)
    assert metrics["loss"].shape == ()
    assert jax.tree.structure(state) == jax.tree.structure(program.arguments[0])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["esft.score=gate"], r"esft\.score=gate depends on .* --set esft\.score=off"),
        (
            ["distill.kind=logits", "distill.teacher=base"],
            r"distill\.kind=logits depends on .* --set distill\.kind=samples distill\.teacher=$",
        ),
    ],
)
def test_what_depends_on_data_is_not_planned(overrides, message):
    with pytest.raises(ValueError, match=message):
        make("sft_tiny", "train", "tiny", 8, *overrides)


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"does not divide over mesh\.fsdp=2 x mesh\.expert=64"):
        make("r1_zero_v3", "train", "v3_671b", 512, "train.batch_size=96")
