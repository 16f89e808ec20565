"""Published rows of any range are put together from a file's tensors."""

import numpy as np
import pytest

from dsjax.checkpoint import names
from dsjax.checkpoint.families import family_for
from dsjax.checkpoint.gguf import layout
from dsjax.checkpoint.hf_config import from_hf
from tests.checkpoint.gguf.files import ARCHITECTURES, case_of, expected
from tests.checkpoint.hf_files import plain


@pytest.mark.parametrize("name", ["v3", "llama", "deepseek_moe", "qwen2", "qwen3"])
def test_rows_of_any_range_are_the_published_ones(name):
    model, tensors, stored = from_hf(case_of(name).config), plain(case_of(name)), expected(name)
    draw = np.random.default_rng(0)

    def read(key, start, stop):
        return np.atleast_2d(stored[key]).reshape(-1, stored[key].shape[-1])[start:stop]

    for tensor in names.tensors(model, family_for(model)):
        if tensor.is_copy:
            continue
        start, stop = sorted(draw.integers(0, tensor.shape[0] + 1, 2))
        for rows in (slice(0, tensor.shape[0]), slice(start, stop)):
            found = layout.published_rows(
                tensor, model, family_for(model), ARCHITECTURES[name], read, rows
            )
            np.testing.assert_array_equal(found, tensors[tensor.name][rows], tensor.name)


def test_groups_cover_every_matrix():
    model = from_hf(case_of("v3_mtp").config)
    groups: dict[str, set[str]] = {}
    for entry in layout.entries(model, "deepseek_v3", "deepseek2"):
        groups.setdefault(entry.group, set()).add(entry.name.split(".", 2)[-1])
    assert groups.keys() == {*layout.GROUPS, ""} - {"dense"}
    assert groups["experts"] == {f"ffn_{part}_exps.weight" for part in ("gate", "up", "down")}
    assert groups["shared"] == {f"ffn_{part}_shexp.weight" for part in ("gate", "up", "down")}
    assert groups["mtp"] == {"nextn.eh_proj.weight"}
    assert {"ffn_gate_inp.weight", "exp_probs_b.bias", "attn_norm.weight"} <= groups[""]
