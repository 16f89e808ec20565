"""How the prompts of newcomers are cut into chunks, and which of them share a row."""

import jax.numpy as jnp
import numpy as np

from dsjax.generate.decoding import Carry
from dsjax.generate.prompts import Prompts
from dsjax.generate.request import Given, Request
from dsjax.generate.rows import Open
from dsjax.model.cache import Cache

GIVEN = Given(np.array([14, 15, 16, 39]), np.arange(16, dtype=np.float32).reshape(4, 4))
LONG, SHORT = tuple(range(3, 43)), (7, 8)


def prompts(*asked, n_rows=2):
    slots = [Open(id, Request(prompt, 5)) if prompt else None for id, prompt in enumerate(asked)]
    return Prompts(slots, Carry(Cache(None, None, None), jnp.zeros((n_rows, 2, 4))), 64, n_drafts=1)


def test_equal_prompts_have_one_row():
    found = prompts(SHORT, LONG, SHORT, None)
    assert found.rows_X[:3].tolist() == [0, 1, 0] and found.shared
    assert not prompts(SHORT, LONG).shared


def test_chunks_follow_each_other_until_all_prompts_have_run():
    found = prompts(SHORT, LONG, SHORT)
    chunk = found.chunk(16)
    assert chunk.tokens_BX.shape == (2, 17)  # with the token that a draft is made from
    assert chunk.tokens_BX[0].tolist() == [7, 8, *[0] * 15]
    assert chunk.tokens_BX[1].tolist() == list(LONG[:17])
    assert found.advance(chunk) == {0: 2, 1: 16, 2: 2}
    assert found.ready() == [0, 2] and not found.done
    chunk = found.chunk(16)
    # What has run begins again with its own tokens, and ends nowhere.
    assert chunk.starts_B.tolist() == [0, 16] and chunk.lengths_B.tolist() == [0, 40]
    assert chunk.tokens_BX[0, :2].tolist() == [7, 8]
    assert found.advance(chunk) == {1: 16}
    chunk = found.chunk(512)
    assert chunk.tokens_BX.shape == (2, 17) and chunk.tokens_BX[1, :8].tolist() == list(LONG[32:])
    assert found.advance(chunk) == {1: 8} and found.done


def test_a_prompt_that_nobody_waits_for_does_not_run():
    found = prompts(SHORT, LONG, LONG)
    found.release(1)
    assert found.chunk(16).lengths_B.tolist() == [2, 40]
    found.release(2)
    assert found.chunk(16).lengths_B.tolist() == [2, 0] and found.n_open == 1


def test_chunks_end_within_the_cache_where_much_is_known():
    known = tuple(range(60))
    found = prompts(known, LONG)
    found.know(0, 48)
    chunk = found.chunk(512)
    assert chunk.tokens_BX.shape == (2, 17) and chunk.starts_B.tolist() == [48, 0]
    assert chunk.tokens_BX[0, :12].tolist() == list(known[48:])
    assert found.advance(chunk) == {0: 12, 1: 16} and found.ready() == [0]
    assert list(found.in_cache(0)) == list(known) and list(found.in_cache(1)) == list(LONG[:16])
    assert found.chunk(512).tokens_BX.shape == (2, 33)  # the rest at once


def pictured(*asked):
    """Prompts of pairs: ids, and what is given for some of them."""
    slots = [Open(i, Request(ids, 5, given=given)) for i, (ids, given) in enumerate(asked)]
    return Prompts(slots, Carry(Cache(None, None, None), jnp.zeros((3, 1, 4))), 64, n_drafts=0)


def test_what_is_given_follows_the_chunks():
    found = pictured((SHORT, None), (LONG, GIVEN))
    first = found.chunk(16)
    assert first.embeddings is not None
    given_BT, values_BTD, _ = first.embeddings
    assert given_BT.shape == (3, 16) and np.argwhere(given_BT).tolist() == [[1, 14], [1, 15]]
    np.testing.assert_array_equal(values_BTD[1, 14:], GIVEN.values[:2])
    found.advance(first)
    second = found.chunk(16)
    assert second.embeddings is not None
    assert np.argwhere(second.embeddings.given_BT).tolist() == [[1, 0]]
    np.testing.assert_array_equal(second.embeddings.values_BTD[1, 0], GIVEN.values[2])


def test_nothing_is_given_to_text_alone():
    assert pictured((SHORT, None), (LONG, None)).chunk(16).embeddings is None


def test_equal_ids_with_another_picture_are_another_prompt():
    same = Given(GIVEN.places, GIVEN.values.copy())
    other = Given(GIVEN.places, GIVEN.values + 1)
    found = pictured((LONG, GIVEN), (LONG, same), (LONG, other), (LONG, None))
    assert found.rows_X.tolist() == [0, 0, 1, 2]
