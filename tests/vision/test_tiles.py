"""Tiles against DeepSeek's processor (tests/golden/vl2.npz), and against their definition."""

import numpy as np
import PIL.Image
import pytest

from dsjax.vision import pictures, tiles
from dsjax.vision.pictures import Picture, Rules
from tests.golden import vl2

RELEASED = tuple((wide, high) for wide, high in vl2.resolutions(384))
SMALL = Rules(size=4, resolutions=tuple((4 * wide, 4 * high) for wide, high in vl2.GRIDS))


@pytest.fixture(scope="module")
def golden():
    with np.load(vl2.FILE) as file:
        return dict(file)


def test_grids_are_deepseeks(golden):
    chosen = [tiles.resolution((int(w), int(h)), RELEASED) for w, h in vl2.sizes()]
    np.testing.assert_array_equal(np.array(chosen) // 384, golden["grids"])
    assert {tuple(grid) for grid in golden["grids"].tolist()} == set(vl2.GRIDS)


def test_of_equal_resolutions_the_first_is_chosen():
    wide, high = (4, 2), (2, 4)
    assert tiles.resolution((8, 8), (high, wide)) == high
    assert tiles.resolution((8, 8), (wide, high)) == wide
    assert tiles.resolution((8, 8), (wide, (2, 2))) == (2, 2)  # the least waste


@pytest.mark.parametrize("number", range(len(vl2.AWKWARD)), ids=map(str, vl2.AWKWARD))
def test_tiles_are_deepseeks_to_the_bit(golden, number):
    rules = Rules(resolutions=RELEASED)
    cut = tiles.cut(vl2.picture(vl2.AWKWARD[number]), rules, "x")
    wide, high, n_embeddings = golden["counts"][number].tolist()
    assert cut.grid == (wide, high) and cut.size == vl2.AWKWARD[number]
    assert tiles.n_embeddings(cut.grid, 14) == n_embeddings
    found = [vl2.digest(each) for each in pictures.normalized(cut.squares, rules)]
    wanted = [each for each in golden["tiles"][number].tolist() if each]
    # DeepSeek's code sees a single tile again, which is the same.
    assert found * (2 if cut.grid == (1, 1) else 1) == wanted


def test_tiles_are_cut_row_by_row():
    """Each tile of its own colour, so that none is resized."""
    shades = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    large = np.repeat(np.repeat(shades, 4, axis=0), 4, axis=1)
    picture = PIL.Image.fromarray(np.stack([large] * 3, axis=-1))
    cut = tiles.cut(picture, SMALL, "x")
    assert cut.grid == (3, 2) and cut.squares.shape == (7, 4, 4, 3)
    np.testing.assert_array_equal(cut.squares[1:], np.broadcast_to(
        shades.reshape(6, 1, 1, 1), (6, 4, 4, 3)
    ))  # fmt: skip


def test_of_three_pictures_none_is_cut():
    one, two = (Picture(np.full((n, 4, 4, 3), n, np.uint8), (9, 9), (n - 1, 1)) for n in (3, 4))
    assert tiles.uncut([one, two]) == [one, two]
    seen = tiles.uncut([one, two, one])
    assert [each.grid for each in seen] == [(1, 1)] * 3
    assert [len(each.squares) for each in seen] == [1] * 3 and seen[1].squares[0, 0, 0, 0] == 4


def test_a_picture_of_which_nothing_would_be_left_is_refused():
    with pytest.raises(ValueError, match=r"long\.png is a picture of 1 x 3,000 pixels, too thin"):
        tiles.cut(vl2.picture((1, 3000)), Rules(resolutions=RELEASED), "long.png")


@pytest.mark.parametrize("grid", [(1, 1), (3, 2), (1, 4)])
def test_embeddings_are_lines_across_tiles(grid):
    """Place by place, by the definition."""
    wide, high = grid
    side, D = 2, 3
    rng = np.random.default_rng(0)
    features = rng.normal(size=(1 + (wide * high if grid != (1, 1) else 0), side * side, D))
    newline, separator = rng.normal(size=(2, D))
    want = []
    for y in range(side):
        want += [features[0][y * side + x] for x in range(side)] + [newline]
    want.append(separator)
    local = features[1:] if grid != (1, 1) else features
    for y in range(high * side):
        for x in range(wide * side):
            tile = local[y // side * wide + x // side]
            want.append(tile[y % side * side + x % side])
        want.append(newline)
    got = tiles.arranged(list(features), grid, newline, separator)
    np.testing.assert_array_equal(got, np.stack(want))
    assert len(got) == tiles.n_embeddings(grid, side)


@pytest.mark.parametrize("size", [(30, 75), (44, 20), (67, 66), (22, 22), (5, 4)])
def test_outline_is_what_is_cut_without_pixels(size):
    rules = Rules(size=vl2.SIDE, resolutions=tuple(map(tuple, vl2.resolutions(vl2.SIDE))))
    whole = tiles.cut(vl2.picture(size), rules, "x")
    outline = tiles.outline(size, rules, "x")
    assert outline.grid == whole.grid and outline.size == whole.size
    assert len(outline.squares) == len(whole.squares) and not outline.squares.size
