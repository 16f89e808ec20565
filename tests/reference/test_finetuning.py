"""Loss and gradient of fine-tuning against transformers, which takes labels of -100 where a token
is not trained: two conversations packed in a row here, each alone there.
"""

import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dsjax
from dsjax.checkpoint import names
from dsjax.checkpoint.hf_config import family_of, from_hf
from dsjax.config import PrecisionConfig
from dsjax.config.finetuning import FineTuning, SftConfig
from dsjax.config.posttraining import TuningConfig
from dsjax.posttrain.initial import open_initial
from dsjax.posttrain.messages import read_conversations
from dsjax.posttrain.rows import ConversationRows
from dsjax.posttrain.supervised import supervised
from dsjax.train.step import split
from tests.closeness import Level, assert_close
from tests.posttrain.toy import write_hf, write_lines
from tests.train.objectives import sums_of

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]
TALKS = [
    {
        "messages": [
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "4, I say"},
        ]
    },
    {
        "messages": [
            {"role": "system", "content": "Add."},
            {"role": "user", "content": "3+4?"},
            {"role": "assistant", "content": "7"},
            {"role": "user", "content": "And 1?"},
            {"role": "assistant", "content": "8."},
        ]
    },
]


def reference(folder, conversations):
    """Summed loss over trained tokens, and its gradients by published name."""
    torch = importlib.import_module("torch")
    from tests.golden import transformers_reference

    model = transformers_reference.read(folder)
    total = 0.0
    for number in range(len(conversations)):
        ids, trained = (torch.from_numpy(x.copy())[None] for x in conversations.one(number))
        ids = ids.long()
        labels = torch.where(trained, ids, -100)
        count = int((labels[:, 1:] != -100).sum())
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss * count
        loss.backward()
        total += float(loss)
    return total, {
        name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("shape", ["V3", "V2", "Qwen2"])
def test_loss_and_gradient_are_those_of_transformers(shape, tmp_path):
    folder = write_hf(tmp_path / "hf", shape, "V3")
    initial = open_initial(folder)
    files = write_lines(tmp_path / "talks.jsonl", TALKS)
    talks = read_conversations(
        str(files), initial.vocabulary, initial.chat, longest=96, truncate=False
    )
    rows = ConversationRows(talks, np.arange(2), sequence_length=95, pad=2)
    assert len(rows) == 1
    batch = {name: jnp.asarray(x) for name, x in rows.batch([0]).items()}
    config = initial.fill(
        FineTuning(
            name="x",
            sft=SftConfig(sequence_length=95),
            train=TuningConfig(remat="none"),
            precision=PrecisionConfig(compute="float32"),
        )
    )
    structure, params, router = split(dsjax.load(folder, dtype="float32"))

    def total(params):
        model = nnx.merge(structure, params, router)
        return sums_of(supervised(config), model, batch)[0]["main"]

    loss, grads = jax.jit(jax.value_and_grad(total))(params)
    want_loss, want = reference(folder, talks)
    assert float(loss) == pytest.approx(want_loss, rel=1e-5)
    flat = {path: np.asarray(value[...]) for path, value in nnx.to_flat_state(grads)}
    published = json.loads((folder / "config.json").read_text())
    compared = 0
    for row in names.tensors(from_hf(published), family_of(published)):
        if row.is_copy or row.name not in want or row.path not in flat:
            continue
        got = flat[row.path][row.slot]
        assert_close(
            got.T if row.transpose else got, want[row.name], Level("gradient", 2e-4), row.name
        )
        compared += 1
    # experts are fused in transformers, under names of its own
    assert compared > 20
