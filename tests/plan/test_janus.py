"""What the planned training of a model that sees and draws is given. Nothing is compiled."""

import math
from pathlib import Path

import jax
import pytest

from dsjax import settings
from dsjax.checkpoint.shape import with_shape
from dsjax.config.janus import Janus, JanusConfig
from dsjax.config.posttraining import TuningConfig
from dsjax.config.roots import PLANNED
from dsjax.config.train import PrecisionConfig
from dsjax.files import read_json, write_json
from dsjax.janus.rows import Shape, empty_row
from dsjax.kernels.target import Target
from dsjax.parallel.mesh import describe_mesh, make_mesh, resolve
from dsjax.plan import figures, janus, steps, topology
from tests.checkpoint.families import test_multi_modality
from tests.checkpoint.families.test_deepseek_towers import RELEASED as VL_7B
from tests.checkpoint.families.test_deepseek_vl_v2 import BASE as VL2_BASE
from tests.checkpoint.families.test_janusflow import RELEASED as JANUSFLOW
from tests.checkpoint.families.test_multi_modality import VL_1B
from tests.plan.test_steps import CONFIGS
from tests.vision import toy

JANUS_7B = Path(__file__).with_name("janus_pro_7b.json")
# With the record of used codes, which is kept beside the VQ tokenizer's weights.
PARAMETERS, TOWER, VQ = 7_420_368_523 + 65_536, 316_283_904, 71_948_939


def stage(init, *overrides):
    """Stage 2 of Janus-Pro 7B, begun with what a config.json describes."""
    config = settings.load_any(CONFIGS / "janus_pro_7b_stage2.py", PLANNED)
    return with_shape(settings.override(config, list(overrides)), str(init))


def test_7b_has_moments_of_what_trains_and_room_for_pictures():
    config = stage(JANUS_7B)
    mesh = describe_mesh(resolve(steps.mesh_sizes(config, "train"), 4))
    program = steps.build(config, "train", mesh, Target("tpu", (5,)))
    trained = PARAMETERS - TOWER - VQ
    pictures = 7 * 384 * 384 * 3  # of 578 tokens, in a row of 4,096
    batch = 520 * (pictures + 5 * 4 * 4097)
    # The VQ tokenizer lies whole on every device.
    held = (4 * (PARAMETERS - VQ) + 8 * trained + batch) / 4 + 4 * VQ
    assert held <= program.argument_bytes < 1.001 * held
    assert (program.tokens, program.tokens_per_pass) == (520 * 4096, 40 * 4096)


def test_weights_of_the_tower_are_split():
    """On both kinds of axes: what a device holds whole, but for the VQ tokenizer, is small."""
    config = stage(JANUS_7B, "mesh.fsdp=4", "mesh.tensor=2")
    mesh = describe_mesh(resolve(steps.mesh_sizes(config, "train"), 8))
    state, batch, _ = steps.build(config, "train", mesh, Target("tpu", (5,))).arguments
    whole = [
        (jax.tree_util.keystr(path), leaf.size)
        for path, leaf in jax.tree.leaves_with_path((state, batch))
        if leaf.sharding.is_fully_replicated
    ]
    assert sum(size for path, size in whole if "vq" in path) == VQ
    assert sum(size for path, size in whole if "vq" not in path) < 0.0005 * PARAMETERS
    assert batch["pictures"].sharding.spec[1] is not None  # rows, each with its pictures


def test_the_config_that_plans_begin_with_is_the_release():
    assert read_json(JANUS_7B) == test_multi_modality.JANUS_7B


@pytest.fixture
def small():
    """A stage of the toy, whose shapes need no file."""
    return Janus(
        name="toy",
        janus=JanusConfig(ratio=(1, 0, 1), trains=("language", "tower", "aligner", "drawing"),
                          sequence_length=20),
        train=TuningConfig(batch_size=8, micro_batch_size=4),
        precision=PrecisionConfig(compute="float32"),
        model=toy.LANGUAGE,
        vision=toy.VISION,
    )  # fmt: skip


def test_planned_rows_are_as_a_run_packs_them(small):
    mesh = describe_mesh({"data": 2})
    _, batch, knobs = steps.build(small, "train", mesh, Target("cpu")).arguments
    assert batch["pictures"].shape[2] == 3  # each is 4 features between two tokens
    row = empty_row(Shape(21, 3, toy.VISION.tower.image_size), 0)
    assert {name: (2, 4, *array.shape) for name, array in row.items()} == {
        name: array.shape for name, array in batch.items()
    }
    assert all(batch[name].dtype == array.dtype for name, array in row.items())
    assert set(knobs) == {"learning_rate", "bias_update_speed"}


def test_the_planned_step_is_one_that_runs(small):
    mesh = make_mesh({"data": 2, "tensor": 2}, n_devices=4)
    program = steps.build(small, "train", mesh, Target("cpu"))
    with jax.set_mesh(mesh):
        state, metrics = jax.eval_shape(program.function, *program.arguments)
    assert {"see_loss", "draw_loss", "loss", "skipped"} <= set(metrics)
    for new, old in zip(jax.tree.leaves(state), jax.tree.leaves(program.arguments[0]), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)


def test_alignment_and_average_of_a_flow_are_planned(tmp_path):
    """An average lies as the weights that train, what projects among them, and rows have the
    pictures that they draw.
    """
    write_json(tmp_path / "config.json", JANUSFLOW)
    config = settings.load_any(CONFIGS / "janusflow_1b_stage2.py", PLANNED)
    mesh = describe_mesh(resolve(steps.mesh_sizes(config, "train"), 2))

    def built(*overrides):
        planned = with_shape(settings.override(config, list(overrides)), str(tmp_path))
        return steps.build(planned, "train", mesh, Target("tpu", (5,)))

    whole, bare = built(), built("janus.align=0")
    state, batch, _ = whole.arguments
    assert batch["drawn"].shape == (5, 100, 7, 384, 384, 3)
    assert "drawn" not in bare.arguments[1] and "alignment" not in bare.arguments[0].params
    average, projects = state.optimizer["ema"], state.params["alignment"]
    assert sum(leaf.size for leaf in jax.tree.leaves(projects)) == (
        2 * (2048 * 2048 + 2048) + 1024 * (2048 + 1)
    )
    assert set(average) == {"alignment", "dense_layers", "embed", "eyes", "head", "norm"}
    assert "tower" not in average["eyes"]
    for mean, weight in zip(
        *map(jax.tree.leaves, (average["head"], state.params["head"])), strict=True
    ):
        assert mean.sharding == weight.sharding
    held = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * 4 for leaf in jax.tree.leaves(average)
    )
    assert whole.argument_bytes - built("optim.ema=0").argument_bytes == held


def test_an_estimate_leaves_out_gradients_of_what_is_frozen():
    def gradients(*overrides):
        config, slice_ = stage(JANUS_7B, *overrides), topology.parse("v5p:2x2x1")
        return figures.make(config, slice_, "train", compiled=False)["estimated_parts"]["gradients"]

    assert gradients() == pytest.approx(8 * (PARAMETERS - TOWER - VQ) / 4, rel=0.001)
    assert gradients("janus.trains=aligner") == pytest.approx(8 * 20_979_712 / 4, rel=0.002)


def test_models_that_do_not_draw_are_refused(tmp_path):
    write_json(tmp_path / "config.json", VL_1B)
    with pytest.raises(ValueError, match="sees and does not draw; set janus"):
        steps.build(stage(tmp_path), "train", describe_mesh({"fsdp": 4}), Target("cpu"))


def test_rows_are_as_full_as_they_get(tmp_path):
    def of(config, *overrides):
        write_json(tmp_path / "config.json", config)
        return janus.fullest(stage(tmp_path, *overrides))

    sees = "janus.ratio=1,0,0", "janus.trains=language,aligner"
    assert of(VL_7B, *sees) == Shape(4097, 7, 384, large=1024)
    # Two pictures of nine tiles and their wholes take 4,034 tokens.
    assert of(VL2_BASE, *sees) == Shape(4097, 20, 384)
    flow = of(JANUSFLOW)
    assert (flow.n_drawings, flow.latents) == (7, (48, 48, 4))
    assert of(JANUSFLOW, "janus.ratio=1,1,0").latents == ()
