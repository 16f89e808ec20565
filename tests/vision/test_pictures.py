"""Pictures of awkward sizes and kinds, and files that are none."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib

import numpy as np
import PIL.Image
import pytest

from dsjax.vision import pictures
from dsjax.vision.pictures import Rules, decode, normalized, open_picture, pixels, square

CUT, ROUNDED = Rules(), Rules(cut=False)


def noise(width, height, seed=0):
    shape = (height, width, 3)
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def encoded(picture, form="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def resampled(picture, size):
    """Bicubic resizing by the definition: Keys' kernel with a = -0.5, widened when shrinking,
    22-bit coefficients, horizontal first, rounded to 8 bits after each pass."""

    def kernel(x):
        x = np.abs(x)
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        return np.where(x < 1, near, np.where(x < 2, far, 0))

    def along(array, length):
        scale = array.shape[1] / length
        wide = max(scale, 1.0)
        out = np.empty((array.shape[0], length, 3), np.uint8)
        for i in range(length):
            center = (i + 0.5) * scale
            first = max(int(center - 2 * wide + 0.5), 0)
            last = min(int(center + 2 * wide + 0.5), array.shape[1])
            weights = kernel((np.arange(first, last) - center + 0.5) / wide)
            whole = weights / weights.sum() * (1 << 22)
            fixed = np.trunc(whole + np.where(whole < 0, -0.5, 0.5)).astype(np.int64)
            total = np.einsum("hwc,w->hc", array[:, first:last].astype(np.int64), fixed)
            out[:, i] = np.clip((total + (1 << 21)) >> 22, 0, 255)
        return out

    across = along(np.asarray(picture), size[0])
    return along(across.swapaxes(0, 1), size[1]).swapaxes(0, 1)


@pytest.mark.parametrize("size", [(517, 301), (301, 517), (20, 31), (64, 64), (1, 40)])
def test_square_is_the_definition_to_the_bit(size):
    rules = Rules(size=48)
    longest = max(size)
    width, height = (max(int(side / longest * 48), 14) for side in size)
    got = square(noise(*size), rules)
    top, left = (48 - height) // 2, (48 - width) // 2
    inside = (slice(top, top + height), slice(left, left + width))
    np.testing.assert_array_equal(got[inside], resampled(noise(*size), (width, height)))
    outside = np.ones((48, 48), bool)
    outside[inside] = False
    assert (got[outside] == 127).all()


@pytest.mark.parametrize(("rules", "rows"), [(CUT, 255), (ROUNDED, 256)])
def test_a_fraction_of_a_pixel_is_cut_or_rounded(rules, rows):
    got = square(PIL.Image.new("RGB", (500, 333), "white"), rules)
    assert (got == 255).all(axis=(1, 2)).sum() == rows
    assert (got[0] == 127).all() and (got[-1] == 127).all()


def test_odd_padding_is_less_above_than_below():
    got = square(PIL.Image.new("RGB", (500, 333), "white"), CUT)
    white = np.flatnonzero((got == 255).all(axis=(1, 2)))
    assert (white[0], 383 - white[-1]) == (64, 65)


def test_the_shorter_side_has_a_least_length():
    got = square(PIL.Image.new("RGB", (1, 5000), "white"), CUT)
    assert (got == 255).all(axis=(0, 2)).sum() == 14


def test_border_is_the_mean_cut_to_eight_bits():
    clip = Rules(mean=(0.48145466, 0.4578275, 0.40821073))
    assert clip.border == (122, 116, 104)


def test_numbers_are_float32_of_the_references():
    values = np.arange(256, dtype=np.uint8)[:, None].repeat(3, 1)
    rules = Rules(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26, 0.25, 0.27577711))
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    for channel in range(3):
        mean, std = np.float32(rules.mean[channel]), np.float32(rules.std[channel])
        want = np.array([(np.float32(x) - mean) / std for x in scaled])
        got = normalized(values, rules)[:, channel]
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, want)


def test_pixels_stack_pictures():
    got = pixels([noise(30, 20), noise(20, 30)], Rules(size=32))
    assert got.shape == (2, 32, 32, 3) and got.dtype == np.float32


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16"])
def test_other_kinds_become_rgb(mode):
    if mode == "I;16":
        picture = PIL.Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100)
    else:
        picture = noise(30, 20).convert(mode)
    form = "TIFF" if mode == "CMYK" else "PNG"
    got = decode(encoded(picture, form), "x")
    assert got.mode == "RGB" and got.size == (30, 20)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(picture.convert("RGB")))


def test_a_rotation_in_the_metadata_is_not_applied():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(noise(30, 20), exif=exif), "x").size == (30, 20)


def test_an_animation_shows_its_first_picture():
    first, second = (PIL.Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    data = encoded(first, "GIF", save_all=True, append_images=[second])
    assert decode(data, "x").getpixel((0, 0)) == (255, 0, 0)


def bomb(width, height):
    """A PNG that says it is this large."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (bomb(50_000, 50_000), "50,000 x 50,000 pixels, more than the 64,000,000"),
        (bomb(9_000, 9_000), "more than the 64,000,000"),
        (bomb(100, 100), "is damaged or not supported"),
        (encoded(noise(64, 64))[:-2000], "is damaged or not supported"),
        (b"", "is not a picture in PNG, JPEG"),
        (b"hello", "is not a picture in PNG, JPEG"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"<?xml version='1.0'?><svg/>", "is not a picture in PNG, JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "is not a picture in PNG, JPEG"),
    ],
)
def test_files_that_cannot_be_read_are_refused(data, said, monkeypatch):
    # Pillow's own limit is not what protects.
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ValueError, match=r"^x\.png ") as caught:
        decode(data, "x.png")
    assert said in str(caught.value)


def test_what_pillow_does_not_open_for_its_size_is_too_large_too():
    with pytest.raises(ValueError, match=r"^x\.png .*more than the 64,000,000 .*smaller$"):
        decode(bomb(20_000, 20_000), "x.png")


def test_a_picture_of_one_pixel_is_read():
    got = pixels([decode(encoded(PIL.Image.new("RGB", (1, 1), "white"), "JPEG"), "x")], CUT)
    np.testing.assert_array_equal(got, np.ones_like(got))


def test_paths_are_regular_files_of_limited_size(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(noise(5, 5)))
    (tmp_path / "link.png").symlink_to(path)
    assert open_picture(tmp_path / "link.png").size == (5, 5)
    (tmp_path / "nowhere.png").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "fifo.png")
    for name in ("nowhere.png", "fifo.png", "missing.png"):
        with pytest.raises(ValueError, match=name):
            open_picture(tmp_path / name)
    monkeypatch.setattr(pictures, "MAX_BYTES", 10)
    with pytest.raises(ValueError, match="more than the 10 allowed"):
        open_picture(path)


DEEPSEEK = {
    "image_size": 384,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "min_size": 14,
    "rescale_factor": 0.00392156862745098,
    "do_normalize": True,
}
TRANSFORMERS = {**DEEPSEEK, "image_size": None, "size": {"height": 256, "width": 256}}


def test_rules_are_read_as_either_writes_them(tmp_path):
    (tmp_path / pictures.RULES_FILE).write_text(json.dumps(DEEPSEEK))
    assert pictures.read_rules(tmp_path) == Rules()
    assert pictures.rules_of(TRANSFORMERS, "x") == Rules(size=256, cut=False)


def test_a_second_tower_has_rules_of_its_own():
    high = {"high_res_size": {"height": 64, "width": 64}, "high_res_image_mean": [0.25] * 3}
    rules = pictures.rules_of(TRANSFORMERS | high, "x")
    assert rules.size == 256 and rules.high and rules.high.size == 64
    assert rules.high.mean == (0.25,) * 3 and rules.high.std == (0.5,) * 3
    picture = noise(30, 20)
    largest = pictures.largest(picture, rules)
    np.testing.assert_array_equal(largest, square(picture, rules.high))
    low, large = pictures.inputs(largest[None], rules)
    np.testing.assert_array_equal(large, pixels([picture], rules.high))
    np.testing.assert_array_equal(low, pixels([PIL.Image.fromarray(largest)], rules))
    (alone,) = pictures.inputs(largest[None], Rules())
    np.testing.assert_array_equal(alone, normalized(largest[None], Rules()))


def test_deepseeks_two_towers_have_one_file():
    """Its mean is the border's alone: the towers normalize."""
    said = DEEPSEEK | {"image_size": 1024, "image_mean": [0.25] * 3, "do_normalize": False}
    rules = pictures.two_rules_of(said, "x", 384)
    assert rules.high and (rules.size, rules.high.size) == (384, 1024)
    assert rules.mean == (0.5,) * 3 and rules.high.mean[0] == 0.48145466
    assert rules.high.std[0] == 0.26862954 and rules.high.border == (63,) * 3
    with pytest.raises(ValueError, match="do_normalize=True, and this model's towers normalize"):
        pictures.two_rules_of(DEEPSEEK, "x", 384)


def test_the_files_layout_says_how_the_smaller_picture_is_made(tmp_path):
    large = {"high_res_size": {"height": 1024, "width": 1024}}
    file = tmp_path / pictures.RULES_FILE
    for said, how in (
        (DEEPSEEK | {"image_size": 1024, "do_normalize": False}, "numbers"),
        (TRANSFORMERS | large, "bicubic"),
        (TRANSFORMERS | large | {"resample": 2, "high_res_resample": 3}, "bilinear"),
    ):
        file.write_text(json.dumps(said))
        rules = pictures.read_rules(tmp_path, low=384)
        assert rules.resampling == how and rules.high and rules.high.resampling == "bicubic"


def test_what_training_sees_of_resized_numbers_is_rounded():
    said = DEEPSEEK | {"image_size": 64, "do_normalize": False}
    rules = pictures.two_rules_of(said, "x", 24)
    squares = pictures.largest(noise(64, 40), rules)[None]
    views, exact = pictures.views(squares, rules), pictures.inputs(squares, rules)
    assert rules.high and [view.dtype for view in views] == [np.uint8] * 2
    np.testing.assert_array_equal(normalized(views[1], rules.high), exact[1])
    away = abs(normalized(views[0], rules) - exact[0])
    assert 0 < away.max() <= 0.5 / 255 / 0.5 + 1e-6


@pytest.mark.parametrize(("side", "size"), [(16, 6), (9, 9), (5, 8)])
def test_numbers_are_resized_by_the_kernels_definition(side, size):
    numbers = np.random.default_rng(0).uniform(size=(2, side, side, 3)).astype(np.float32)
    wanted = np.zeros((2, size, size, 3))
    scale = side / size
    for y in range(size):
        for x in range(size):
            total = 0.0
            for row in range(side):
                for column in range(side):
                    near = [
                        1 - abs(there + 0.5 - (here + 0.5) * scale) / max(scale, 1)
                        for here, there in ((y, row), (x, column))
                    ]
                    if min(near) > 0:
                        total += near[0] * near[1]
                        wanted[:, y, x] += near[0] * near[1] * numbers[:, row, column]
            wanted[:, y, x] /= total
    got = pictures._resized(numbers, size)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_size": 0}, "size=0 is not an integer from 1 to 4096"),
        ({"image_size": None}, "size=None"),
        ({"image_mean": [0.5]}, "image_mean=[0.5] is not three numbers"),
        ({"image_std": [0, 0.5, 0.5]}, "divides by 0"),
        ({"do_normalize": False}, "do_normalize=false"),
        ({"rescale_factor": 1.0}, "rescale_factor=1.0 is not 1/255"),
        ({"resample": 1}, "resample=1 is neither 2, bilinear, nor 3, bicubic"),
        ({"image_size": None, "size": {"height": 3, "width": 4}}, "is not a square"),
    ],
)
def test_other_rules_are_refused(changes, said):
    with pytest.raises(ValueError) as caught:
        pictures.rules_of(DEEPSEEK | changes, "x")
    assert said in str(caught.value)


def test_rules_are_needed(tmp_path):
    with pytest.raises(ValueError, match=r"has no preprocessor_config\.json"):
        pictures.read_rules(tmp_path)


TILED = {"candidate_resolutions": [[28, 28], [56, 28]], "patch_size": 14, "downsample_ratio": 2}


def test_rules_for_tiles_are_read(tmp_path):
    (tmp_path / "processor_config.json").write_text(json.dumps(TILED | {"image_std": [0.4] * 3}))
    rules = pictures.read_rules(tmp_path, tiles=True)
    assert (rules.size, rules.resolutions) == (28, ((28, 28), (56, 28)))
    assert (rules.mean, rules.std, rules.border) == ((0.5,) * 3, (0.4,) * 3, (127,) * 3)
    with pytest.raises(ValueError, match=r"has no preprocessor_config\.json"):
        pictures.read_rules(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"candidate_resolutions": []}, "candidate_resolutions=[] is not a list of widths"),
        ({"candidate_resolutions": [[28, -1]]}, "is not a list of widths and heights"),
        ({"candidate_resolutions": [[28, 28.0]]}, "is not a list of widths and heights"),
        ({"normalize": False}, "normalize=false, and pictures are always normalized"),
        ({"image_std": [0.5, 0.5, 0]}, "divides by 0"),
        ({"image_mean": 0.5}, "image_mean=0.5 is not three numbers"),
    ],
)
def test_rules_for_tiles_that_are_not_followed_are_refused(changes, said):
    with pytest.raises(ValueError) as caught:
        pictures.tile_rules_of(TILED | changes, "x")
    assert str(caught.value).startswith("x: ") and said in str(caught.value)


def test_of_a_thin_picture_the_middle_alone_is_enlarged(monkeypatch):
    """Whole, a file of a few kilobytes would be enlarged to gigabytes."""
    asked, own = [], PIL.Image.Image.resize

    def resize(picture, size, kernel):
        asked.append(size)
        return own(picture, size, kernel)

    monkeypatch.setattr(PIL.Image.Image, "resize", resize)
    picture = PIL.Image.new("RGB", (1, 1000))
    picture.paste("red", (0, 400, 1, 600))
    found = pictures.cropped(picture, 8)
    assert found.shape == (8, 8, 3) and (found == [255, 0, 0]).all()
    assert asked == [(8, 8 * 32)]


def test_a_picture_is_cropped_to_its_middle_square():
    picture = noise(20, 12)
    resized = picture.resize((10, 6), PIL.Image.Resampling.BICUBIC)
    assert (pictures.cropped(picture, 6) == np.asarray(resized)[:, 2:8]).all()


def test_size_is_known_without_decoding():
    data = io.BytesIO()
    PIL.Image.new("RGB", (300, 7)).save(data, "PNG")
    cut = data.getvalue()[:60]  # the header
    assert pictures.size_of(cut, "x") == (300, 7)
    with pytest.raises(ValueError, match="x is damaged"):
        decode(cut, "x")
    with pytest.raises(ValueError, match="x is not a picture in PNG"):
        pictures.size_of(b"no", "x")
