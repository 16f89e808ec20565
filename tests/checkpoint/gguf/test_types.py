"""Choices of types, by rule and by shape."""

import pytest

from dsjax.checkpoint.gguf import layout, types
from dsjax.checkpoint.hf_config import from_hf
from tests.checkpoint.families.published import RELEASES
from tests.checkpoint.gguf.files import case_of

V3 = from_hf(RELEASES["v3"])


def chosen(choice, model=None):
    model = model or from_hf(case_of("v3").config)
    entries = list(layout.entries(model, "deepseek_v3", "deepseek2"))
    kinds = types.choose(types.parse(choice), entries, choice)
    return {name: kind.name for name, kind in kinds.items()}


def test_first_rule_that_fits_holds():
    found = chosen("blk.1.*_exps*=Q4_0,experts=Q5_0,head=F16,*=Q8_0")
    assert found["blk.1.ffn_up_exps.weight"] == "Q4_0"
    assert found["blk.2.ffn_up_exps.weight"] == "Q5_0"
    assert found["output.weight"] == "F16"
    assert found["token_embd.weight"] == "Q8_0"
    assert found["blk.1.ffn_gate_inp.weight"] == found["output_norm.weight"] == "F32"
    assert found["blk.1.exp_probs_b.bias"] == "F32"


def test_rows_that_do_not_divide_get_smaller_blocks():
    found = chosen("Q4_K", V3)
    assert found["blk.5.attn_k_b.weight"] == "Q5_0"  # rows of 128
    assert found["blk.5.attn_v_b.weight"] == "Q4_K"  # of 512
    assert chosen("Q8_0")["blk.0.attn_k_b.weight"] == "F16"  # of 16


@pytest.mark.parametrize(("preset", "bits"), [("experts-4bit", 4.61), ("experts-2bit", 2.78)])
def test_presets_of_v3_have_the_bits_that_they_say(preset, bits):
    entries = list(layout.entries(V3, "deepseek_v3", "deepseek2"))
    kinds = types.choose(types.parse(preset), entries, preset)
    n_bytes = sum(types.n_bytes(entry.shape, kinds[entry.name]) for entry in entries)
    n_values = sum(types.n_bytes(entry.shape, types.GGMLQuantizationType.I8) for entry in entries)
    assert 8 * n_bytes / n_values == pytest.approx(bits, abs=0.02)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("Q9", "Q9 is not one of F32, F16"),
        ("", "nothing is not one of"),
        ("expert=Q4_0,*=Q8_0", "'expert' is not a group of tensors"),
        ("experts=Q4_0", "no rule fits token_embd"),
        ("blk.77.*=F16,*=Q8_0", "'blk.77.*' fits no tensor"),
    ],
)
def test_bad_choices_are_named(choice, message):
    with pytest.raises(ValueError, match=message):
        chosen(choice)


def test_file_type_is_that_of_most_weights():
    numbers = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32, "experts-4bit": 2, "Q4_K": 15}
    assert {choice: types.file_type(types.parse(choice)) for choice in numbers} == numbers
