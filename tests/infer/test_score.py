"""Scores equal those computed from the model's own logits, however the text is cut and packed."""

import argparse
import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.infer import score
from dsjax.infer.score import NO_OUTPUTS, Outputs, Score, Scorer
from dsjax.infer.windows import Text, Window
from dsjax.model.parameters import shardings
from dsjax.parallel.mesh import submesh
from tests.closeness import F32, assert_close
from tests.model.tiny import TINY, tiny_model, tokens

# Dense, since it compiles sooner.
DENSE = dataclasses.replace(TINY, n_layers=2, n_dense_layers=2, n_routed_experts=0)
IDS = np.asarray(tokens(3, 25, seed=4))


@pytest.fixture(scope="module")
def scorer():
    return Scorer(tiny_model(DENSE))


@pytest.fixture(scope="module")
def logits():
    """float64 [3, 25, V], what the model predicts."""
    return np.asarray(jax.jit(tiny_model(DENSE))(IDS), np.float64)


def nats(logits_TV, ids):
    """Of ids[1:], from the logits of the positions before them."""
    shifted = logits_TV - logits_TV.max(axis=-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return -np.take_along_axis(log_probabilities[:-1], ids[1:, None], axis=-1)[:, 0]


def test_windows_of_a_row_are_scored_apart(scorer, logits):
    """Three windows share a row; each counts from its own first prediction."""
    cut = [(0, 0, 25, 0), (1, 0, 10, 4), (2, 0, 25, 23)]
    given = [Window(row, IDS[row, start:end], first) for row, start, end, first in cut]
    scores = list(scorer.score(given, length=64))
    assert [one.owner for one in scores] == [0, 1, 2]
    for one, (row, _, end, first) in zip(scores, cut, strict=True):
        want = nats(logits[row, :end], IDS[row, :end])[first:]
        assert one.tokens == len(want)
        assert_close(one.nats, want.sum(), F32, "nats")


def test_window_is_greedy_when_every_scored_token_is_the_likeliest(scorer, logits):
    """Of the tokens before the last none is the likeliest."""
    best, second = (int(token) for token in logits[0, 9].argsort()[-1:-3:-1])
    assert (logits[0, :9].argmax(axis=-1) != IDS[0, 1:10]).all()
    for last, first, greedy in ((best, 9, True), (second, 9, False), (best, 8, False)):
        window = Window(0, np.append(IDS[0, :10], last).astype(np.int32), first)
        (one,) = scorer.score([window], length=64)
        assert one.greedy == greedy and one.tokens == 10 - first


def test_text_is_scored_with_half_a_window_of_context(scorer):
    """Each token against the model run on its own window alone."""
    length, document = 8, IDS[0]
    want = 0.0
    model = jax.jit(tiny_model(DENSE))
    for start, first, end in [(0, 1, 9), (4, 9, 13), (8, 13, 17), (12, 17, 21), (16, 21, 25)]:
        read = document[start:end]
        full = np.asarray(model(np.resize(read, (1, 9))), np.float64)[0, : len(read)]
        want += nats(full, read)[first - start - 1 :].sum()
    seen = []
    result = score.score_text(
        scorer, Text([document], 70), length=length, progress=lambda *counts: seen.append(counts)
    )
    assert result.tokens == 24 and seen[-1] == (24, 24)
    assert_close(result.nats, want, F32, "nats")


def test_text_score_does_not_depend_on_packing(scorer, monkeypatch):
    documents = [IDS[0], IDS[1, :7], IDS[2, :2], IDS[1, 7:], IDS[2]]
    whole = score.score_text(scorer, Text(documents, 1), length=70)
    alone = [score.score_text(scorer, Text([one], 1), length=70) for one in documents]
    assert whole.tokens == sum(one.tokens for one in alone) == 24 + 6 + 1 + 17 + 24
    assert_close(whole.nats, sum(one.nats for one in alone), F32, "nats")
    # logits in pieces, of which the last is filled up
    monkeypatch.setattr(score, "_LOGITS", 11 * TINY.vocab_size)
    pieces = score.score_text(Scorer(tiny_model(DENSE)), Text(documents, 1), length=70)
    assert_close(pieces.nats, whole.nats, F32, "nats")


def test_figures_are_those_of_their_definitions():
    figures = Score(nats=6.0, tokens=4, bytes=9).figures()
    assert figures["loss"] == 1.5 and figures["perplexity"] == math.exp(1.5)
    assert figures["bits_per_byte"] == pytest.approx(6 / 9 / 0.6931471805599453)
    assert (figures["tokens"], figures["bytes"]) == (4, 9)
    assert Score(4.0, 2).figures() == {"loss": 2.0, "perplexity": math.exp(2), "tokens": 2}
    assert Score(0.0, 0).figures() == {"tokens": 0}
    assert Score(2000.0, 2).figures()["perplexity"] == math.inf


def test_perplexity_beyond_all_numbers_is_null_in_json(monkeypatch, capsys):
    monkeypatch.setattr(score, "open_checkpoint", lambda path, overrides: None)
    monkeypatch.setattr(score, "score_files", lambda checkpoint, **_: Score(2000.0, 2))
    given = dict.fromkeys(
        "checkpoint text tokens image pixels high_pixels logits mtp_logits dtype".split()
    )
    score.run(argparse.Namespace(**given, override=[], mesh={}, sequence_length=0, json=True))
    figures = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert figures == {"loss": 1000.0, "perplexity": None, "tokens": 2}


def test_tokens_are_scored_and_their_logits_written(logits, tmp_path, monkeypatch):
    monkeypatch.setattr(score, "_ROW_TOKENS", 50)  # two rows a batch, so the last is filled up
    monkeypatch.setattr(score, "_LOGITS", 10 * TINY.vocab_size)
    outputs = Outputs(tmp_path / "L.npy", tmp_path / "M.npy")
    seen = []
    result = score.score_tokens(
        Scorer(tiny_model(DENSE)), IDS, outputs, progress=lambda *counts: seen.append(counts)
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    got, got_mtp = np.load(tmp_path / "L.npy"), np.load(tmp_path / "M.npy")
    assert got.dtype == got_mtp.dtype == np.float32
    assert_close(got, logits.astype(np.float32), F32, "logits")
    hidden = jax.jit(lambda model, ids: model.logits(model.hidden(ids).mtp_DBTD[0]))
    assert_close(got_mtp, np.asarray(hidden(tiny_model(DENSE), IDS))[:, :-1], F32, "MTP logits")
    assert result.tokens == 3 * 24
    want = sum(nats(*pair).sum() for pair in zip(logits, IDS, strict=True))
    assert_close(result.nats, want, F32, "nats")


def test_tokens_are_scored_without_files(scorer, logits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = score.score_tokens(scorer, IDS[:1], NO_OUTPUTS)
    assert_close(result.nats, nats(logits[0], IDS[0]).sum(), F32, "nats")
    assert not list(tmp_path.iterdir())
    assert score.score_tokens(scorer, IDS[:, :1]).figures() == {"tokens": 0}


def test_short_rows_are_scored_together_as_far_as_the_text_fills_them():
    assert score.rows_together(100_000, 256) == 16
    assert score.rows_together(700, 256) == 2
    assert score.rows_together(10, 256) == score.rows_together(100_000, 8192) == 1
    assert score.rows_together(100_000, 256, n_parts=4) == 4


@pytest.mark.heavy
@pytest.mark.parametrize("others", [{"tensor": 2}, {"context": 4}], ids=str)
def test_mesh_gives_the_same_scores(scorer, logits, tmp_path, others):
    """Three rows over data=2: the last batch is filled up, as are 25 tokens where four devices
    split them.
    """
    mesh = submesh({"data": 2, **others})
    split = Scorer(jax.device_put(scorer.model, shardings(scorer.model, mesh)), mesh)
    assert split.rows == 2
    score.score_tokens(split, IDS, Outputs(logits=tmp_path / "L.npy"))
    assert_close(np.load(tmp_path / "L.npy"), logits, F32, "logits")
    text = Text(list(IDS), 1)
    alone = score.score_text(scorer, text, length=20)
    assert_close(score.score_text(split, text, length=20).nats, alone.nats, F32, "nats")


def test_experts_take_no_notice_of_padding_and_neighbours():
    """A routed model scores a window the same whatever lies beside it."""
    scorer = Scorer(tiny_model())
    text = Text([IDS[0], IDS[1, :9]], 1)
    packed = score.score_text(scorer, text, length=40)
    alone = [score.score_text(scorer, Text([one], 1), length=40) for one in text.documents]
    assert_close(packed.nats, sum(one.nats for one in alone), F32, "nats")


def test_mtp_logits_need_a_module_and_two_tokens(tmp_path):
    with pytest.raises(ValueError, match=r"--mtp-logits needs a multi-token .*model\.n_mtp=0\)"):
        score.check_mtp(0, 25)
    with pytest.raises(ValueError, match="--mtp-logits needs rows of at least two tokens, not 1"):
        score.check_mtp(1, 1)
    outputs = Outputs(mtp_logits=tmp_path / "M.npy")
    with pytest.raises(ValueError, match="rows of at least two tokens"):
        score.score_tokens(Scorer(tiny_model(DENSE)), IDS[:, :1], outputs)


def test_logits_that_are_not_finite_are_an_error(scorer):
    weight = scorer.model.norm.weight
    broken = jax.tree.map(lambda leaf: leaf, scorer.model)
    broken.norm.weight = weight.copy(jnp.full_like(weight.get_value(), jnp.nan))
    with pytest.raises(ValueError, match="the loss of these tokens is nan: the model's logits"):
        score.score_text(Scorer(broken), Text([IDS[0]], 1), length=64)
    with pytest.raises(ValueError, match="the model's logits are not finite; check"):
        score.score_tokens(Scorer(broken), IDS[:1])
