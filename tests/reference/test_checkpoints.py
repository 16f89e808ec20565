"""Whole checkpoints on disk, from transformers to dsjax and back.

`save_pretrained` writes a random checkpoint of each family that transformers has; FP8, multi-token
prediction and DeepSeekMoE, which it has not, are written in the published layout. Each is loaded,
run, imported and exported; what comes out again transformers must read as the same model.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from rich.console import Console

import dsjax
from dsjax.checkpoint.exporting import export_checkpoint
from dsjax.checkpoint.hf_folder import scale_name
from dsjax.checkpoint.importing import import_checkpoint
from dsjax.checkpoint.load import open_checkpoint
from dsjax.checkpoint.tensor_files import open_folder
from dsjax.display import Transfer
from dsjax.generate.engine import Engine, Request
from dsjax.generate.sampling import Sampling
from dsjax.model.transformer import Transformer
from tests.checkpoint import hf_files
from tests.closeness import EXACT, F32, LOGITS, assert_close
from tests.golden import checkpoint, compare, ours
from tests.golden.cases import LENGTH, LLAMA, ORACLE_CASES, QWEN2, QWEN3, V2, V2_LITE, V3, Case

pytestmark = [
    pytest.mark.torch,
    # transformers and torch deprecate faster than they release.
    pytest.mark.filterwarnings("ignore"),
]

_SIZE = {
    "vocab_size": 509,
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
}
_FEWER = {"n_routed_experts": 16, "num_experts_per_tok": 4}  # transformers walks them one by one
CASES = {
    "v3": Case(V3 | _SIZE | _FEWER | {"first_k_dense_replace": 2}, seed=21, bias=(-2.0, -1.1)),
    "v2": Case(V2 | _SIZE | _FEWER, seed=22),
    "v2_lite": Case(V2_LITE | _SIZE | _FEWER, seed=23),
    "llama": Case(LLAMA | _SIZE | {"num_key_value_heads": 2}, seed=24),
    "qwen2": Case(QWEN2 | _SIZE | {"num_key_value_heads": 3}, seed=25),
    "qwen3": Case(QWEN3 | _SIZE | {"num_key_value_heads": 3}, seed=28),
}
# Widths that are no multiples of the block, with one of more blocks than one: 5 x 3 of 640 x 320.
FP8 = Case(
    V3
    | {
        "vocab_size": 509,
        "hidden_size": 320,
        "intermediate_size": 192,
        "moe_intermediate_size": 144,
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 3,
        "kv_lora_rank": 144,
        "qk_nope_head_dim": 128,
        "num_nextn_predict_layers": 1,
        "quantization_config": hf_files.quantization((128, 128)),
    },
    seed=26,
)
MTP = Case(
    V3 | _FEWER | {"vocab_size": 509, "num_hidden_layers": 2, "num_nextn_predict_layers": 1},
    seed=27,
)
NEW_TOKENS = 64


class Saved(NamedTuple):
    case: Case
    folder: Path
    logits_TV: np.ndarray
    greedy: list[list[int]]  # after each of the prompts


class Quantized(NamedTuple):
    folder: Path
    dequantized: Path
    logits_TV: np.ndarray


@pytest.fixture(scope="module")
def reference():
    from tests.golden import transformers_reference

    return transformers_reference


@pytest.fixture(scope="module", params=CASES)
def saved(request, reference, tmp_path_factory):
    """A checkpoint that transformers has written, in several files, and what it makes of it."""
    case = CASES[request.param]
    folder = tmp_path_factory.mktemp("saved") / request.param
    model = reference.load(case)
    model.save_pretrained(folder, max_shard_size="300KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return Saved(case, folder, reference_logits(model, case), reference_greedy(model, case))


@pytest.fixture(scope="module")
def fp8(reference, tmp_path_factory):
    """An FP8 checkpoint in the published layout, and what transformers makes of its weights as
    plain float32."""
    tensors = hf_files.in_fp8(FP8, (128, 128))
    rng = np.random.default_rng(FP8.seed)
    for name, value in tensors.items():
        if name.endswith("_scale_inv"):  # blocks differ in size by a factor of a thousand
            tensors[name] = (1e-4 * 10 ** rng.uniform(0, 3, value.shape)).astype(np.float32)
    root = tmp_path_factory.mktemp("fp8")
    folder = hf_files.write(root / "fp8", FP8.config, tensors, max_bytes=10**6)
    config = {key: value for key, value in FP8.config.items() if key != "quantization_config"}
    plain = hf_files.write(root / "plain", config, _dequantized(tensors))
    return Quantized(folder, plain, reference_logits(reference.read(plain), FP8))


def _dequantized(tensors):
    plain = {}
    for name, values in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        plain[name] = values.astype(np.float32)
        if scale_name(name) in tensors:
            scales = tensors[scale_name(name)].repeat(128, axis=0).repeat(128, axis=1)
            plain[name] *= scales[: values.shape[0], : values.shape[1]]
    return plain


def reference_logits(model, case: Case) -> np.ndarray:
    """[600, V] of transformers."""
    import torch

    ids = torch.from_numpy(checkpoint.tokens(case, LENGTH)).long()[None]
    with torch.no_grad():
        return model(ids, use_cache=False).logits[0].numpy()


def prompts(case: Case) -> list[list[int]]:
    """Of lengths that share nothing."""
    return [checkpoint.tokens(case, length, seed=length).tolist() for length in (5, 97)]


def reference_greedy(model, case: Case) -> list[list[int]]:
    """64 new tokens of transformers after each prompt, on its own."""
    import torch

    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    runs = []
    for prompt in prompts(case):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            whole = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        runs.append(whole[0, len(prompt) :].tolist())
    return runs


def greedy(model: Transformer, case: Case, *, speculative: bool = False) -> list[list[int]]:
    """64 new tokens of ours after each prompt, in one batch."""
    sampling = Sampling(temperature=0.0)
    requests = [Request(tuple(prompt), NEW_TOKENS, sampling) for prompt in prompts(case)]
    rows: list[list[int]] = [[] for _ in requests]
    for new in Engine(model, speculative=speculative, prefill_chunk=64).generate(requests):
        for row, tokens in zip(rows, new, strict=True):
            row += tokens
    return rows


def logits(model: Transformer, case: Case) -> np.ndarray:
    """[600, V] of ours."""
    run = jax.jit(Transformer.__call__, compiler_options=ours.QUICK)
    return np.asarray(run(model, checkpoint.tokens(case, LENGTH)[None])[0])


def convert_and_back(folder: Path, root: Path, dtype: str = "keep") -> tuple[Path, Path]:
    """Imports and exports; returns the converted and the exported folder."""
    silent = Transfer(Console(file=io.StringIO()))
    import_checkpoint(folder, root / "converted", dtype=dtype, progress=silent)
    export_checkpoint(root / "converted", root / "exported", dtype="keep", progress=silent)
    return root / "converted", root / "exported"


def assert_same_tensors(got: Path, want: Path) -> None:
    """Name by name and bit by bit."""
    files = [open_folder(folder) for folder in (got, want)]
    assert files[0].tensors.keys() == files[1].tensors.keys()
    for name in files[1].tensors:
        assert_close(files[0].read(name), files[1].read(name), EXACT, name)


def assert_same_parameters(got: Transformer, want: Transformer) -> None:
    pairs = zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True)
    for (path, one), other in pairs:
        assert_close(one, other, EXACT, jax.tree_util.keystr(path))


def test_saved_checkpoint_equals_transformers(saved):
    got = logits(dsjax.load(saved.folder), saved.case)
    assert_close(got, saved.logits_TV, LOGITS, "logits")


def test_saved_checkpoint_generates_as_transformers_does(saved):
    assert greedy(dsjax.load(saved.folder), saved.case) == saved.greedy


def test_saved_checkpoint_survives_conversion(saved, reference, tmp_path):
    converted, exported = convert_and_back(saved.folder, tmp_path)
    assert_same_tensors(exported, saved.folder)
    assert_same_parameters(dsjax.load(converted), dsjax.load(saved.folder))
    got = reference_logits(reference.read(exported), saved.case)
    assert_close(got, saved.logits_TV, F32, "logits")


def test_bfloat16_checkpoint_equals_transformers(reference, tmp_path):
    """Saved in bfloat16, and run in float32 by both."""
    import torch

    case, folder = CASES["v2"], tmp_path / "saved"
    reference.load(case).to(torch.bfloat16).save_pretrained(folder)
    assert open_checkpoint(folder).dtype == "bfloat16"
    got = logits(dsjax.load(folder, dtype="float32"), case)
    assert_close(got, reference_logits(reference.read(folder), case), LOGITS, "logits")
    _, exported = convert_and_back(folder, tmp_path)
    assert_same_tensors(exported, folder)


def test_fp8_checkpoint_equals_transformers(fp8):
    got = logits(dsjax.load(fp8.folder, dtype="float32"), FP8)
    assert_close(got, fp8.logits_TV, LOGITS, "logits")


def test_fp8_checkpoint_survives_conversion(fp8, tmp_path):
    """Values and scales are untouched, MTP layer included."""
    converted, exported = convert_and_back(fp8.folder, tmp_path)
    assert_same_tensors(exported, fp8.folder)
    assert_same_parameters(dsjax.load(converted), dsjax.load(fp8.folder))


def test_fp8_checkpoint_is_read_by_transformers_once_dequantized(fp8, reference, tmp_path):
    _, exported = convert_and_back(fp8.folder, tmp_path, dtype="float32")
    assert_same_tensors(exported, fp8.dequantized)
    got = reference_logits(reference.read(exported), FP8)
    assert_close(got, fp8.logits_TV, F32, "logits")


def test_mtp_checkpoint_equals_transformers_and_survives_conversion(reference, tmp_path):
    """transformers leaves the MTP layer aside; its tensors come back all the same."""
    folder = hf_files.write(tmp_path / "mtp", MTP.config, hf_files.plain(MTP))
    model = dsjax.load(folder)
    assert model.config.n_mtp == 1
    transformers_model = reference.read(folder)
    want = reference_logits(transformers_model, MTP)
    assert_close(logits(model, MTP), want, LOGITS, "logits")
    assert greedy(model, MTP, speculative=True) == reference_greedy(transformers_model, MTP)
    _, exported = convert_and_back(folder, tmp_path)
    assert_same_tensors(exported, folder)
    assert_close(reference_logits(reference.read(exported), MTP), want, F32, "logits")


@pytest.mark.parametrize("name", ORACLE_CASES)
def test_checkpoint_that_transformers_lacks_equals_oracle(name, tmp_path):
    """DeepSeekMoE, and two MTP modules, loaded from the disk before and after conversion."""
    case, want = ORACLE_CASES[name], compare.oracle(name, isolated=False)
    folder = hf_files.write(tmp_path / name, case.config, hf_files.plain(case))
    tokens = checkpoint.tokens(case, compare.ROW)[None]

    def forward(model, tokens):
        hidden = model.hidden(tokens)
        mtp = () if hidden.mtp_DBTD is None else hidden.mtp_DBTD
        return [model.logits(state)[0] for state in (hidden.main_BTD, *mtp)]

    model = dsjax.load(folder)
    outputs = jax.jit(forward, compiler_options=ours.QUICK)(model, tokens)
    for depth, (got, expected) in enumerate(
        zip(outputs, [want.logits_TV, *want.mtp_logits], strict=True)
    ):
        assert_close(np.asarray(got)[: compare.ROW - depth], expected, LOGITS, f"depth {depth}")
    converted, exported = convert_and_back(folder, tmp_path)
    assert_same_tensors(exported, folder)
    assert_same_parameters(dsjax.load(converted), model)
