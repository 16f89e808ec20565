"""Held-out rows are scored once each, and padding counts nowhere."""

import math

import jax
import numpy as np
import pytest

from dsjax.config import Config, DataConfig, ModelConfig, PrecisionConfig
from dsjax.data.corpus import TokenizedDocuments
from dsjax.data.packing import heldout_sequences
from dsjax.parallel.compilation import Compiled
from dsjax.parallel.mesh import make_mesh
from dsjax.text.tokenizer import SpecialTokens
from dsjax.train.batches import place_all
from dsjax.train.evaluate import Evaluation, evaluate, scorer
from dsjax.train.loss import pretraining
from dsjax.train.optimizer import adamw
from dsjax.train.step import declared_model, initial_state


@pytest.fixture
def heldout():
    """Three documents of 5, 9 and 2 tokens and 4 bytes a token, in rows of 4 predicted tokens."""
    lengths = np.array([5, 9, 2])
    documents = TokenizedDocuments(
        tokens=np.arange(10, 26, dtype=np.uint16),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        byte_counts=(4 * lengths).astype(np.int64),
        fingerprint="none",
    )
    return heldout_sequences(documents, SpecialTokens(bos=0, eos=1, pad=2), sequence_length=4)


def score(batch):
    """A model that spends 2 nats on each target."""
    assert batch["tokens"].shape == (4, 5)
    targets = np.array([(batch["segment_ids"][:, 1:] > 0).sum(), 0])  # none in the second group
    return 2.0 * targets, targets


def test_evaluation_of_all_rows_is_exact(heldout):
    result = evaluate(score, heldout, range(len(heldout)), batch_size=4)
    targets = 16 + 3  # every token and the end of each document
    bits = pytest.approx(2.0 * targets / math.log(2) / 64)
    assert result == Evaluation(2.0, bits, pytest.approx((2.0, math.nan), nan_ok=True))


def test_evaluation_of_some_rows_uses_their_own_bytes(heldout):
    result = evaluate(score, heldout, [0], batch_size=4)
    assert result is not None
    assert result[:2] == (2.0, pytest.approx(2.0 * 4 / math.log(2) / (20 * 4 / 6)))


MODEL = ModelConfig(
    vocab_size=50,
    dim=16,
    n_layers=1,
    n_dense_layers=1,
    n_heads=2,
    inter_dim=16,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    max_seq_len=96,
    init_std=0.3,
)


@pytest.mark.parametrize("context", [1, 2])
def test_loss_by_position_is_that_of_a_token_in_its_document(context):
    """Two packed, isolated documents lose what each loses alone, position for position, also where
    sequences are split over devices.
    """
    data = DataConfig(sequence_length=96, isolate_documents=True)
    config = Config(name="small", model=MODEL, data=data)
    declared = declared_model(MODEL, PrecisionConfig(compute="float32"))
    mesh = make_mesh({"data": 2, "context": context}, n_devices=2 * context)
    state = initial_state(declared, adamw(config.optim), mesh, 0)
    score = Compiled(jax.jit(scorer(declared, pretraining(config), chunk=64)), mesh)
    tokens = np.random.default_rng(0).integers(0, 50, (2, 97)).astype(np.int32)

    def scored(segments):
        batch = {"tokens": tokens, "segment_ids": np.stack([segments] * 2).astype(np.int32)}
        return [np.asarray(sums) for sums in score(state, place_all(batch, mesh))]

    packed = np.repeat([1, 2], [70, 27])
    nats, targets = scored(packed)
    assert targets.tolist() == [2 * (32 + 26), 2 * 32, 2 * 5]
    # Segment 0 is padding: one document of each row is left.
    (first, _), (second, _) = (scored(np.where(packed == kept, 1, 0)) for kept in (1, 2))
    np.testing.assert_allclose(nats, first + second, rtol=1e-5)
    assert second[0] > 0 and not second[1:].any()


def test_evaluation_ends_when_interrupted(heldout):
    asked = []
    assert (
        evaluate(
            score,
            heldout,
            range(6),
            batch_size=4,
            interrupted=lambda: bool(asked) or asked.append(1),
        )
        is None
    )
