"""The config.json that we write, read by transformers: it computes what the published one does. And
published ones at the edge of what is legal, read by both."""

import dataclasses
import importlib

import jax
import numpy as np
import pytest

import dsjax
from dsjax.checkpoint.families import family_for
from dsjax.checkpoint.hf_config import from_hf, to_hf
from dsjax.model.transformer import Transformer
from tests.checkpoint.hf_files import plain, write
from tests.closeness import LOGITS, assert_close
from tests.golden import ours as golden_ours
from tests.golden.cases import CASES, LENGTH
from tests.golden.checkpoint import tokens

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]


def logits(folder, ids):
    torch = importlib.import_module("torch")
    import transformers

    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert not loading["mismatched_keys"]
    with torch.no_grad():
        return model(torch.from_numpy(ids[None].astype(np.int64))).logits.numpy()


@pytest.mark.parametrize("name", CASES)
def test_written_config_computes_what_the_published_one_does(tmp_path, name):
    case = CASES[name]
    ours = from_hf(case.config)
    ids = tokens(case, 150)
    tensors = plain(case)
    wanted = logits(write(tmp_path / "published", case.config, tensors), ids)
    written = to_hf(ours, family_for(ours), dtype="float32")
    np.testing.assert_array_equal(logits(write(tmp_path / "ours", written, tensors), ids), wanted)
    # The comparison can fail.
    other = to_hf(dataclasses.replace(ours, rope_theta=3e3), family_for(ours), dtype="float32")
    assert (logits(write(tmp_path / "other", other, tensors), ids) != wanted).any()


YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
LLAMA3 = CASES["llama"].config["rope_scaling"]
EDGES = {
    "equal betas": (
        "v3",
        CASES["v3"].config["rope_scaling"] | {"beta_fast": 1.0, "beta_slow": 1.0},
    ),
    "equal betas elsewhere": ("llama", YARN | {"beta_fast": 3.0, "beta_slow": 3.0}),
    "zero betas": ("llama", YARN | {"beta_fast": 0, "beta_slow": 0}),
    "factor below one": ("llama", YARN | {"factor": 0.5}),
    "null factor": ("qwen2", YARN | {"factor": None}),
    "attention factor": ("llama", YARN | {"attention_factor": 0.8}),
    "attention factor of qwen2": ("qwen2", YARN | {"attention_factor": 1.3}),
    "attention factor of one": ("qwen2", YARN | {"attention_factor": 1.0}),
    "attention factor beside mscales": (
        "v3",
        YARN | {"attention_factor": 1.2, "mscale": 0.9, "mscale_all_dim": 0.6},
    ),
    "attention factor alone": ("v2", YARN | {"attention_factor": 1.2}),
    "equal frequency factors": ("llama", LLAMA3 | {"low_freq_factor": 2, "high_freq_factor": 2}),
}


@pytest.mark.parametrize("edge", EDGES)
def test_rope_at_the_edge_computes_what_transformers_does(tmp_path, edge):
    name, scaling = EDGES[edge]
    case = CASES[name]
    folder = write(tmp_path, case.config | {"rope_scaling": scaling}, plain(case))
    ids = tokens(case, LENGTH)
    run = jax.jit(Transformer.__call__, compiler_options=golden_ours.QUICK)
    got = np.asarray(run(dsjax.load(folder), ids[None])[0])
    wanted = logits(folder, ids)[0]
    assert_close(got, wanted, LOGITS, edge)
    # Without the setting the logits are others.
    plain_scaling = write(tmp_path / "other", case.config | {"rope_scaling": None}, plain(case))
    other = np.asarray(run(dsjax.load(plain_scaling), ids[None])[0])
    with pytest.raises(AssertionError):
        assert_close(other, wanted, LOGITS, edge)


def test_kimi_k2_computes_what_transformers_does_as_deepseek_v3(tmp_path):
    """transformers has the architecture under V3's name alone."""
    case = CASES["v3"]
    kimi = case.config | {
        "model_type": "kimi_k2",
        "n_group": 1,
        "topk_group": 1,
        "rope_scaling": case.config["rope_scaling"] | {"beta_fast": 1.0, "beta_slow": 1.0},
    }
    ids = tokens(case, LENGTH)
    folder = write(tmp_path / "v3", kimi | {"model_type": "deepseek_v3"}, plain(case))
    run = jax.jit(Transformer.__call__, compiler_options=golden_ours.QUICK)
    got = np.asarray(run(dsjax.load(write(tmp_path / "kimi", kimi, plain(case))), ids[None])[0])
    assert_close(got, logits(folder, ids)[0], LOGITS, "logits")
