"""Reads pictures as the published models were trained on them, to the last bit.

A picture is converted to RGB, resized so that its longer side is the tower's, and only then padded
to a square, centred, with the colour of the mean. Pillow resizes: its kernel has a = -0.5 and
rounds to 8 bits between its two passes, which nothing in JAX or torch does.

DeepSeek's code (Janus, DeepSeek-VL) cuts the shorter side to whole pixels where transformers rounds
it: 500 x 333 becomes 384 x 255 or 384 x 256. `Rules.cut` says which. A rotation that a camera only
notes (EXIF) is not applied, nor do they; of an animation the first picture is read.

Two towers (DeepSeek-VL 7B): the small picture is made from the large one, which has its border by
then. transformers resizes it as a picture again; DeepSeek's code resizes its numbers, in float32,
as torch does (`Rules.resampling`).

A file says how large its picture is before any of it is decoded, so a small file cannot fill the
memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from dsjax.files import disguise, read_json, read_regular

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_BYTES = 64 << 20  # of a file
MAX_PIXELS = 64_000_000  # a camera's largest pictures have 61 million; 4 bytes each while decoded
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_MOST_OBLONG = 32  # times the shorter side: what is enlarged of a thin picture that is cut anyway
RULES_FILE, TILES_FILE = "preprocessor_config.json", "processor_config.json"
_SCALE = 1 / 255
# Mean and deviation per channel by which DeepSeek-VL 7B's towers normalize, in their own code.
SAM_NORM = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIGLIP_NORM = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
Resampling = Literal["bicubic", "bilinear", "numbers"]
_RESAMPLING: dict[Any, Resampling] = {2: "bilinear", 3: "bicubic"}  # by Pillow's numbers


@dataclasses.dataclass(frozen=True)
class Rules:
    """How pictures become a tower's input; what preprocessor_config.json says.

    Attributes:
      size: side of the square, in pixels.
      least: the shorter side is at least this long before padding.
      mean, std: of each channel, on a scale from 0 to 1.
      fill: the mean whose colour fills the square; None: `mean`.
      resampling: how it is resized: by Pillow, or, "numbers", as the large picture's numbers are
        from which it is made: bilinearly with antialiasing, in float32.
      cut: whether a fraction of a pixel is cut off the shorter side, not rounded.
      high: how the picture for a second tower is made; this one is then made from it.
      resolutions: widths and heights of whole squares that larger pictures are cut into, as
        tiles.py does it; (): none is cut.
    """

    size: int = 384
    least: int = 14
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    fill: tuple[float, float, float] | None = None
    resampling: Resampling = "bicubic"
    cut: bool = True
    high: Rules | None = None
    resolutions: tuple[tuple[int, int], ...] = ()

    @property
    def border(self) -> tuple[int, ...]:
        """The colour that fills the square: the mean, cut to 8 bits."""
        return tuple(int(value * 255) for value in self.fill or self.mean)


class Picture(NamedTuple):
    """A picture as a model sees it."""

    squares: np.ndarray  # uint8 [squares, size, size, 3]; the first is the whole picture
    size: tuple[int, int]  # width and height of the file's picture
    grid: tuple[int, int] = (1, 1)  # tiles beside each other, rows of tiles


def require_package() -> None:
    """Raises ValueError, with what to install, if Pillow is missing."""
    if importlib.util.find_spec("PIL") is None:
        raise ValueError("reading pictures needs Pillow: pip install 'dsjax[vision]'")


def open_picture(path: Path) -> Image:
    """Reads a picture from a file, as RGB.

    Raises:
      ValueError: it is not a regular file, has more bytes or pixels than allowed, or is not a whole
        picture in one of FORMATS.
    """
    return decode(read_regular(path, MAX_BYTES), str(path))


def decode(data: bytes, place: str) -> Image:
    """Decodes a picture as RGB.

    Args:
      place: where the bytes are from, for messages.

    Raises:
      ValueError: see `open_picture`.
    """
    with _opened(data, place) as picture:
        try:
            return picture.convert("RGB")
        except Exception as error:
            raise ValueError(_damaged(place, error)) from error


def size_of(data: bytes, place: str) -> tuple[int, int]:
    """Returns the width and height of a picture, which is not decoded; see `decode`."""
    with _opened(data, place) as picture:
        return picture.size


@contextlib.contextmanager
def _opened(data: bytes, place: str) -> Iterator[Image]:
    """Opens a picture of allowed size."""
    require_package()
    import PIL.Image

    if len(data) > MAX_BYTES:
        raise ValueError(f"{place} has {len(data):,} bytes, more than the {MAX_BYTES:,} allowed")
    with warnings.catch_warnings():
        # Pillow warns of large pictures, and of metadata that nobody reads; the limit is ours.
        warnings.simplefilter("ignore")
        try:
            picture = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
        except PIL.UnidentifiedImageError:
            what = disguise(data[:512]) or (
                f"not a picture in {', '.join(FORMATS)}; save it as one of these"
            )
            raise ValueError(f"{place} is {what}") from None
        except PIL.Image.DecompressionBombError:  # Pillow's own limit is higher
            raise ValueError(
                f"{place} has far more than the {MAX_PIXELS:,} pixels that are decoded; make it "
                "smaller"
            ) from None
        except Exception as error:  # decoders raise whatever a damaged header makes them do
            raise ValueError(_damaged(place, error)) from error
        _check_size(picture.size, place)
        yield picture


def _damaged(place: str, error: Exception) -> str:
    return f"{place} is damaged or not supported: {error}; save the picture again, as PNG"


def _check_size(size: tuple[int, int], place: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ValueError(f"{place} is a picture of {width} x {height} pixels, so there is nothing")
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{place} is a picture of {width:,} x {height:,} pixels, more than the {MAX_PIXELS:,} "
            "that are decoded; make it smaller"
        )


def square(picture: Image, rules: Rules) -> np.ndarray:
    """Resizes and pads an RGB picture, uint8 [size, size, 3]."""
    import PIL.Image

    width, height = (_side(side, max(picture.size), rules) for side in picture.size)
    kernel = PIL.Image.Resampling[rules.resampling.upper()]
    resized = picture.resize((width, height), kernel)
    side = max(width, height)
    framed = PIL.Image.new("RGB", (side, side), rules.border)
    framed.paste(resized, ((side - width) // 2, (side - height) // 2))
    return np.asarray(framed)


def _side(side: int, longest: int, rules: Rules) -> int:
    """Returns the new length of a side. The order of the operations decides about the last pixel,
    and either reference has its own.
    """
    if rules.cut:
        return max(int(side / longest * rules.size), rules.least)
    return max(round(side * (rules.size / longest)), rules.least)


def cropped(picture: Image, size: int) -> np.ndarray:
    """Resizes an RGB picture so that its shorter side is `size`, and cuts the middle out, uint8
    [size, size, 3]: what a VQ tokenizer learns to draw has no borders.
    """
    import PIL.Image

    shortest = min(picture.size)
    picture = _middle(picture, _MOST_OBLONG * shortest)
    width, height = (max(round(side * size / shortest), size) for side in picture.size)
    resized = picture.resize((width, height), PIL.Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def _middle(picture: Image, most: int) -> Image:
    """Returns the middle of a picture of which a side is longer than `most`, else the picture."""
    width, height = (min(side, most) for side in picture.size)
    if (width, height) == picture.size:
        return picture
    left, top = (
        (side - kept) // 2 for side, kept in zip(picture.size, (width, height), strict=True)
    )
    return picture.crop((left, top, left + width, top + height))


def normalized(squares: np.ndarray, rules: Rules) -> np.ndarray:
    """Scales uint8 [..., 3] to the tower's numbers, float32: float64 up to 1, float32 from there,
    as the references.
    """
    return _standardized(_scaled(squares), rules)


def _scaled(squares: np.ndarray) -> np.ndarray:
    return (squares * _SCALE).astype(np.float32)


def _standardized(scaled: np.ndarray, rules: Rules) -> np.ndarray:
    return (scaled - np.asarray(rules.mean, np.float32)) / np.asarray(rules.std, np.float32)


def pixels(pictures: Sequence[Image], rules: Rules) -> np.ndarray:
    """Returns a tower's input, float32 [pictures, size, size, 3]."""
    return normalized(np.stack([square(picture, rules) for picture in pictures]), rules)


def largest(picture: Image, rules: Rules) -> np.ndarray:
    """Returns the largest square that a model sees of a picture, uint8 [size, size, 3]."""
    return square(picture, rules.high or rules)


def views(squares: np.ndarray, rules: Rules) -> tuple[np.ndarray, ...]:
    """Returns what each tower sees, the second one last, from the largest squares, uint8: for
    training, where numbers that have been resized are rounded to 8 bits.
    """
    if rules.high is None:
        return (squares,)
    if rules.resampling == "numbers":
        small = np.rint(_resized(_scaled(squares), rules.size) / _SCALE)
        return small.astype(np.uint8), squares
    import PIL.Image

    small = [square(PIL.Image.fromarray(each), rules) for each in squares]
    return np.stack(small), squares


def inputs(squares: np.ndarray, rules: Rules) -> tuple[np.ndarray, ...]:
    """Returns the input of each tower, the second one's last, from the largest squares."""
    if rules.high and rules.resampling == "numbers":
        scaled = _scaled(squares)
        small = _standardized(_resized(scaled, rules.size), rules)
        return small, _standardized(scaled, rules.high)
    own = [rules, *([rules.high] if rules.high else [])]
    return tuple(map(normalized, views(squares, rules), own))


def _resized(scaled: np.ndarray, size: int) -> np.ndarray:
    """Resizes squares, float32 [n, side, side, 3], bilinearly with antialiasing: each new number is
    the mean of those less than a new pixel's width away, weighted by their nearness.
    """
    side = scaled.shape[1]
    centres = (np.arange(size) + 0.5) * side / size
    away = abs(np.arange(side)[None] + 0.5 - centres[:, None]) / max(side / size, 1)
    weights = np.maximum(1 - away, 0)
    weights = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    across = np.einsum("xw,nhwc->nhxc", weights, scaled, optimize=True)
    return np.einsum("yh,nhxc->nyxc", weights, across, optimize=True)


def read_rules(folder: Path, *, tiles: bool = False, low: int | None = None) -> Rules:
    """Reads a checkpoint's preprocessor_config.json, as DeepSeek or transformers writes it.

    Args:
      tiles: the model sees tiles, whose rules are in processor_config.json.
      low: of a model with two towers, the size of the smaller picture, which DeepSeek's file does
        not give; None: the model has one tower.

    Raises:
      ValueError: it is missing, or asks for what is not done here.
    """
    path = folder / (TILES_FILE if tiles else RULES_FILE)
    if not path.is_file():
        raise ValueError(f"{folder} has no {path.name}, which says how pictures are read")
    values = read_json(path)
    if tiles:
        return tile_rules_of(values, str(path))
    if low is not None and values.get("image_size") is not None:
        return two_rules_of(values, str(path), low)
    return rules_of(values, str(path))


def two_rules_of(values: Mapping[str, Any], place: str, low: int) -> Rules:
    """Reads the contents of DeepSeek-VL 7B's preprocessor_config.json; see `read_rules`."""
    if values.get("do_normalize") is not False:
        raise ValueError(
            f"{place}: do_normalize={values.get('do_normalize')!r}, and this model's towers "
            "normalize themselves; copy the file again from the release, which has false"
        )
    large = rules_of({**values, "do_normalize": True}, place)
    high = dataclasses.replace(large, mean=SAM_NORM[0], std=SAM_NORM[1], fill=large.mean)
    mean, std = SIGLIP_NORM
    return Rules(size=low, least=large.least, mean=mean, std=std, resampling="numbers", high=high)


def tile_rules_of(values: Mapping[str, Any], place: str) -> Rules:
    """Reads the contents of DeepSeek-VL2's processor_config.json; see `read_rules`."""
    if values.get("normalize") is False:
        raise ValueError(f"{place}: normalize=false, and pictures are always normalized here")
    sizes = sizes_of(values.get("candidate_resolutions"))
    if sizes is None:
        raise ValueError(
            f"{place}: candidate_resolutions={values.get('candidate_resolutions')!r} is not a list "
            "of widths and heights"
        )
    half = [0.5] * 3
    mean, std = (
        _channels({name: half} | dict(values), name, place) for name in ("image_mean", "image_std")
    )
    if not all(std):
        raise ValueError(f"{place}: image_std={list(std)} divides by 0")
    return Rules(size=sizes[0][0], mean=mean, std=std, resolutions=sizes)


def sizes_of(found: Any) -> tuple[tuple[int, int], ...] | None:
    """Reads a JSON list of widths and heights; None if it is none."""
    if not isinstance(found, list) or not found:
        return None
    if not all(isinstance(pair, list) and [*map(type, pair)] == [int, int] for pair in found):
        return None
    return tuple((first, second) for first, second in found) if min(map(min, found)) > 0 else None


def rules_of(values: Mapping[str, Any], place: str) -> Rules:
    """Reads the contents of a preprocessor_config.json; see `read_rules`."""
    size: Any = values.get("image_size")
    cut = True
    if size is None:  # transformers'
        sides = values.get("size") or {}
        size, cut = sides.get("height") if isinstance(sides, Mapping) else sides, False
        if isinstance(sides, Mapping) and sides.get("width") != size:
            raise ValueError(f"{place}: size={sides!r} is not a square")
    least = values.get("min_size", Rules.least)
    for name, value in (("size", size), ("min_size", least)):
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 4096:
            raise ValueError(f"{place}: {name}={value!r} is not an integer from 1 to 4096")
    for name in ("do_resize", "do_rescale", "do_normalize", "do_pad"):
        if values.get(name) is False:
            raise ValueError(f"{place}: {name}=false, and pictures are always prepared here")
    resample = values.get("resample", 3)
    resampling = _RESAMPLING.get(resample) if isinstance(resample, int) else None
    if resampling is None:
        raise ValueError(f"{place}: resample={resample!r} is neither 2, bilinear, nor 3, bicubic")
    factor = values.get("rescale_factor", _SCALE)
    if factor != _SCALE:
        raise ValueError(f"{place}: rescale_factor={factor!r} is not 1/255")
    mean, std = (_channels(values, name, place) for name in ("image_mean", "image_std"))
    if not all(std):
        raise ValueError(f"{place}: image_std={list(std)} divides by 0")
    high = None
    if values.get("high_res_size"):
        found = {key.removeprefix("high_res_"): value for key, value in values.items()
                 if key.startswith("high_res_")}  # fmt: skip
        high = rules_of({**values, **found, "high_res_size": None}, place)
    return Rules(
        size=size, least=least, mean=mean, std=std, resampling=resampling, cut=cut, high=high
    )


def _channels(values: Mapping[str, Any], name: str, place: str) -> tuple[float, float, float]:
    found = values.get(name)
    if (
        not isinstance(found, list)
        or len(found) != 3
        or any(isinstance(each, bool) or not isinstance(each, int | float) for each in found)
        or not all(0 <= each <= 1 for each in found)
    ):
        raise ValueError(f"{place}: {name}={found!r} is not three numbers from 0 to 1")
    return (float(found[0]), float(found[1]), float(found[2]))
