"""Few sizes, and every move between them known beforehand."""

import dataclasses
import functools

from dsjax.generate.shapes import cache_length, few_shapes, fewer_rows, fit
from tests.model.tiny import TINY


def shapes(length, **options):
    options = {"max_batch": 16, "batch_parts": 1, "chunk": 256, "n_drafts": 0} | options
    return few_shapes(dataclasses.replace(TINY, max_seq_len=length), **options)


def test_cache_fits_the_request_in_few_sizes():
    """Powers of two from 256 on, and never more than what the model's longest text needs."""
    length = functools.partial(cache_length, TINY, chunk=16)
    assert [length(n, n_drafts=0, streaming=False) for n in (20, 129)] == [128, 256]
    lengths = [length(needed, n_drafts=0) for needed in (3, 256, 257, 2048, 2049, 4096)]
    assert lengths == [256, 256, 512, 2048, 4096, 4096]
    assert length(4096, n_drafts=2) == 4096 + 16  # drafts stand beyond the end


def test_few_shapes_hold_the_longest_text_in_whole_chunks():
    found = shapes(4096)
    assert (found.rows, found.newcomers) == ((1, 4, 16), (1, 4))
    assert (found.lengths, found.chunks) == ((512, 4096), (64, 256))
    assert shapes(4096, n_drafts=1).lengths == (768, 4352)
    assert shapes(8192).lengths == (1024, 8192)
    assert shapes(131_072).lengths == (512, 2048, 16_384, 131_072)
    assert shapes(10_000, chunk=1024).lengths == (2048, 10_240)
    assert shapes(10_000, chunk=8192).lengths == (16_384,)
    assert shapes(10_000, chunk=1024).chunks == (64, 256, 1024)
    assert shapes(100, chunk=16, max_batch=6) == ((1, 4, 6), (1, 4), (112,), (16,))


def test_few_shapes_divide_over_the_parts_of_a_batch():
    found = shapes(512, max_batch=3, batch_parts=2)
    assert found.rows == found.newcomers == (2, 4)
    assert shapes(512, max_batch=16, batch_parts=8).newcomers == (8,)
    assert [fit(needed, (4, 16)) for needed in (1, 4, 5, 17)] == [4, 4, 16, 16]


def test_a_batch_of_few_shapes_shrinks_with_room_for_a_newcomer():
    found = shapes(512)
    assert [found.shrunk(16, n_open) for n_open in (1, 2, 3, 8, 9, 16)] == [1, 4, 16, 16, 16, 16]
    assert [found.shrunk(4, n_open) for n_open in (1, 2, 3)] == [1, 4, 4]


def test_sources_are_newcomers_and_batches_that_grow_or_shrink():
    found = shapes(4096)
    assert set(found.sources(1, 512)) == {(4, 512), (16, 512)}
    assert set(found.sources(16, 512)) == {(1, 512), (4, 512)}
    every = {(rows, length) for rows in (1, 4, 16) for length in (512, 4096)}
    assert set(found.sources(4, 4096)) == every
    assert set(found.sources(16, 4096)) == every - {(16, 4096)}


def test_a_closed_batch_goes_on_in_three_quarters_or_two_thirds():
    assert [fewer_rows(n_rows, 1) for n_rows in (128, 96, 64, 48, 32)] == [96, 64, 48, 32, 0]
    assert fewer_rows(100, 1) == 64 and fewer_rows(48, 3) == 33
