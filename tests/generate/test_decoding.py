"""What one decoding program does: steps, limits, stop ids and early return."""

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.generate import decoding
from dsjax.generate.sampling import Sampling, knobs
from tests.model.tiny import tiny_model

LENGTH = 64
PROMPTS = np.array([[3, 4, 5, 6], [50, 20, 80, 0]], np.int32)
LENGTHS = np.array([4, 3], np.int32)
START, EACH = np.zeros(2, np.int32), np.arange(2, dtype=np.int32)


def prefilled():
    carry = decoding.empty_carry(tiny_model(), batch=2, length=LENGTH, n_drafts=0)
    settings = knobs([Sampling(0.0)] * 2)
    padded = np.pad(PROMPTS, ((0, 0), (0, 12)))
    run = jax.jit(decoding.prefill)
    carry, (first, *_) = run(tiny_model(), carry, padded, START, LENGTHS, EACH, settings)
    return carry, first


decode = jax.jit(decoding.decode)


def decoded(left, steps, stop_ids=(-1, -1), enough=0):
    carry, first = prefilled()
    stops = np.array(stop_ids, np.int32)[:, None]
    carry, out = decode(
        tiny_model(), carry, LENGTHS, first[:, None], np.array(left, np.int32), stops,
        knobs([Sampling(0.0)] * 2), steps and np.int32(steps), np.int32(enough),
    )  # fmt: skip
    return carry, first, decoding.Decoded(*jax.device_get(out))


def tokens(out):
    return [new for new, _ in out.rows()]


def test_first_tokens_are_the_likeliest_after_each_prompt():
    _, first = prefilled()
    logits = np.asarray(tiny_model()(jnp.asarray(PROMPTS)))
    assert first.tolist() == [int(logits[0, 3].argmax()), int(logits[1, 2].argmax())]


def test_rows_take_their_own_number_of_steps():
    _, _, out = decoded(left=[5, 2], steps=9)
    assert int(out.n_steps) == 5  # none is left
    assert [len(row) for row in tokens(out)] == [5, 2]
    assert out.ran_NB[:6].tolist() == [[True] * 2] * 2 + [[True, False]] * 3 + [[False] * 2]
    assert out.position_B.tolist() == [9, 5] and out.left_B.tolist() == [0, 0]
    assert out.recent_BW[:, 0].tolist() == [row[-1] for row in tokens(out)]


def test_calls_with_fewer_steps_go_on_where_the_last_one_stopped():
    _, _, whole = decoded(left=[6, 6], steps=6)
    carry, _, out = decoded(left=[6, 6], steps=2)
    assert int(out.n_steps) == 2 and out.left_B.tolist() == [4, 4]
    _, rest = decode(
        tiny_model(), carry, *out[:3], np.full((2, 1), -1, np.int32),
        knobs([Sampling(0.0)] * 2), np.int32(4), np.int32(0),
    )  # fmt: skip
    rest = decoding.Decoded(*jax.device_get(rest))
    joined = [a + b for a, b in zip(tokens(out), tokens(rest), strict=True)]
    assert joined == tokens(whole)


def test_unattended_steps_add_what_rows_had_left():
    asked = [5, decoding.MAX_STEPS]
    _, _, out = decoded(asked, steps=None, enough=1)
    assert int(out.n_steps) == decoding.MAX_STEPS and out.left_B.tolist() == [0, 0]
    assert tokens(out) == tokens(decoded(asked, steps=decoding.MAX_STEPS)[2])


def test_unattended_steps_ask_nothing_of_the_host():
    carry, first = prefilled()

    def text(steps):
        return decode.lower(
            tiny_model(), carry, LENGTHS, first[:, None], LENGTHS, np.full((2, 1), -1, np.int32),
            knobs([Sampling(0.0)] * 2), steps, np.int32(0),
        ).as_text()  # fmt: skip

    assert "stablehlo.case" in text(np.int32(9))
    assert "stablehlo.case" not in text(None)


def test_finished_rows_stay_where_they_are():
    _, first, out = decoded(left=[3, 0], steps=3)
    assert tokens(out)[1] == [] and out.position_B[1] == LENGTHS[1]
    assert out.recent_BW[1].tolist() == [int(first[1])]


def test_stop_id_ends_a_row_after_it():
    whole = tokens(decoded(left=[6, 6], steps=6)[2])[0]
    _, _, out = decoded(left=[6, 6], steps=6, stop_ids=(whole[2], -1))
    end = whole.index(whole[2]) + 1
    assert tokens(out)[0] == whole[:end]
    assert out.left_B.tolist() == [0, 0] and out.ran_NB[:, 0].sum() == end


def test_decoding_returns_when_few_rows_are_unfinished():
    assert int(decoded(left=[2, 6], steps=6, enough=1)[2].n_steps) == 2
    assert int(decoded(left=[2, 6], steps=6)[2].n_steps) == 6


def test_inserted_rows_decode_as_where_they_came_from():
    """Into a longer cache, one of them to two rows; a row that goes outside is dropped."""
    carry, first = prefilled()
    wide = decoding.empty_carry(tiny_model(), batch=3, length=2 * LENGTH, n_drafts=0)
    others, places = np.array([0, 1, 0], np.int32), np.array([2, 3, 1], np.int32)
    wide = decoding.insert(tiny_model(), wide, carry, others, places)
    pick = np.array([1, 0, 0])  # the first of the three rows has nothing to go on with
    _, out = decode(
        tiny_model(), wide, LENGTHS[pick], np.asarray(first)[pick][:, None],
        np.array([0, 4, 5], np.int32), np.full((3, 1), -1, np.int32),
        knobs([Sampling(0.0)] * 3), np.int32(5), np.int32(0),
    )  # fmt: skip
    wanted = tokens(decoded(left=[5, 0], steps=5)[2])[0]
    assert tokens(decoding.Decoded(*jax.device_get(out))) == [[], wanted[:4], wanted]


def test_load_counts_the_tokens_of_requests_alone():
    class Redundant:
        redundant = True
        config = tiny_model().config

    n_experts = Redundant.config.n_routed_experts
    experts_LBTK = jnp.array([[[[0, 1], [2, 3]], [[1, 2], [3, 0]]]], jnp.int32)
    own_BT = jnp.array([[True, True], [True, False]])
    load_LE = decoding.load(Redundant, experts_LBTK, own_BT)  # type: ignore
    np.testing.assert_array_equal(load_LE, [[1, 2, 2, 1] + [0] * (n_experts - 4)])
