"""What transformers saves is opened, and what we write is opened by the safetensors library."""

import importlib

import ml_dtypes
import numpy as np
import pytest

from dsjax.checkpoint.hf_folder import open_hf
from tests.checkpoint.hf_files import in_fp8, plain, quantization, write
from tests.golden.cases import CASES, ORACLE_CASES

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["v3", "v2_lite", "llama", "llama_linear", "qwen2", "qwen3"])
def test_saved_model_is_opened(tmp_path, name, dtype):
    torch = importlib.import_module("torch")
    import transformers

    case = CASES[name]
    tensors = plain(case, ml_dtypes.bfloat16)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        write(tmp_path / "published", case.config, tensors), dtype=getattr(torch, dtype)
    )
    if name == "v3":
        model.config.num_nextn_predict_layers = 1  # transformers drops the tensors of V3's
    model.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    folder = open_hf(tmp_path / "saved")
    assert folder.model == open_hf(tmp_path / "published").model
    assert name != "v3" or folder.config["num_nextn_predict_layers"] == 1
    assert {row.tensor.name for row in folder.rows} == tensors.keys()
    assert len(folder.files.files) > 1
    for row in folder.rows:
        read = folder.files.read(row.tensor.name).astype(np.float32)
        np.testing.assert_array_equal(read, tensors[row.tensor.name].astype(np.float32), str(row))


def test_fp8_files_are_opened_by_torch(tmp_path):
    torch = importlib.import_module("torch")
    import safetensors

    case = ORACLE_CASES["v3_mtp"]
    tensors = in_fp8(case)
    write(tmp_path, case.config | {"quantization_config": quantization()}, tensors, 10**5)
    seen = {}
    for file in tmp_path.glob("*.safetensors"):
        with safetensors.safe_open(file, framework="pt") as opened:
            seen |= {name: opened.get_tensor(name) for name in opened.keys()}
    assert seen.keys() == tensors.keys()
    for name, tensor in seen.items():
        assert str(tensor.dtype) == f"torch.{tensors[name].dtype}"
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        assert raw == tensors[name].tobytes(), name
