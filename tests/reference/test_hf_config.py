"""The config.json that we write, read by transformers: it computes what the published one does."""

import dataclasses

import numpy as np
import pytest

from dsjax.checkpoint.families import family_for
from dsjax.checkpoint.hf_config import from_hf, to_hf
from tests.checkpoint.hf_files import plain, write
from tests.golden.cases import CASES
from tests.golden.checkpoint import tokens

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]


def logits(folder, ids):
    torch = pytest.importorskip("torch")
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
