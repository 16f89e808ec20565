"""Implements tools/draw.py: pictures of a prompt, as PNG files that say how they were made."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from dsjax import files
from dsjax.checkpoint import load
from dsjax.checkpoint.eyes import load_eyes
from dsjax.checkpoint.vae import WEIGHTS, VaeFolder, load_vae, open_vae
from dsjax.config.vision import FlowConfig, VisionConfig
from dsjax.display import Display
from dsjax.generate.codes import Drawer
from dsjax.generate.flow import Painter
from dsjax.generate.sampling import Sampling
from dsjax.infer.looking import open_format
from dsjax.infer.pictured import BEGIN, PicturedFormat
from dsjax.infer.weights import choose_dtype
from dsjax.model.cache import check_split
from dsjax.parallel.mesh import submesh
from dsjax.text.chat import Message
from dsjax.text.tokenizer import PAD
from dsjax.vision import pictures

SHEET = "sheet.png"
# What a kind of model is told, and what its authors choose.
CODES: dict[str, Any] = {"guidance": 5.0, "temperature": 1.0}
FLOW: dict[str, Any] = {"guidance": 2.0, "steps": 30, "vae": None}
DEFAULT_N = 4  # pictures
_MOST_GUIDANCE = 1000  # far below what float32 overflows with
_GAP = 8  # pixels between the pictures of a sheet


class Artist(Protocol):
    """What draws."""

    def __call__(self, seeds: Sequence[int], progress: Callable[[int, int], None]) -> np.ndarray:
        """Draws a picture per seed: uint8 [n, rows, columns, 3]."""
        ...


@dataclasses.dataclass(frozen=True)
class Order:
    """What to draw; a picture differs from the next in its seed alone.

    Attributes:
      temperature: of a model that draws codes.
      steps: of a model that draws by a flow.

    Raises:
      ValueError: a setting is out of range.
    """

    prompt: str
    n: int = DEFAULT_N
    guidance: float = 5.0
    temperature: float | None = None
    steps: int | None = None
    seed: int = 0
    at_once: int = 16

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError("the prompt is empty; say what to draw: --prompt 'a red circle'")
        if self.n < 1 or self.at_once < 1:
            raise ValueError(f"n={self.n} and max_batch={self.at_once} must be at least 1")
        if not 1 <= self.guidance <= _MOST_GUIDANCE:
            raise ValueError(
                f"guidance={self.guidance} must lie in [1, {_MOST_GUIDANCE}]; 1 follows the prompt "
                "without exaggeration, 5 is Janus' own, 2 JanusFlow's"
            )
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1; 30 is JanusFlow's own")
        for seed in self.seeds:
            self.sampling(seed)

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.n)

    def sampling(self, seed: int) -> Sampling:
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature, seed=seed
        )

    def settings(self, seed: int, model: str) -> dict[str, str]:
        """Returns what a picture's file says about it."""
        own = {"temperature": self.temperature, "steps": self.steps}
        return {
            "prompt": self.prompt,
            "model": model,
            "seed": str(seed),
            "guidance": str(self.guidance),
            **{name: str(value) for name, value in own.items() if value is not None},
            "software": "dsjax",
        }


def run(arguments: argparse.Namespace) -> None:
    """Runs tools/draw.py with its parsed arguments. Pictures that are there, made with the same
    settings, are not drawn again.

    Raises:
      ValueError: the checkpoint cannot draw, the prompt is too long, a setting is not of this kind
        of model, or the folder has pictures of other settings. All of this is checked before the
        weights are read.
    """
    pictures.require_package()
    checkpoint = load.open_checkpoint(arguments.checkpoint, dict(arguments.override))
    form = drawing_format(checkpoint)
    n = DEFAULT_N if arguments.n is None else arguments.n
    order = read_order(arguments, form.vision, prompt=arguments.prompt, n=n)
    vae = vae_of(arguments.vae, form.vision.flow) if form.vision.flow else None
    mesh = submesh(arguments.mesh)
    check_split(checkpoint.model, mesh)
    prompt = encode(checkpoint, form, order.prompt)
    out, name = arguments.out, checkpoint.path.resolve().name
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is not a folder, which --out names for the pictures of --prompt")
    paths = {seed: out / f"{seed}.png" for seed in order.seeds}
    left = [seed for seed in paths if not _is_drawn(paths[seed], order.settings(seed, name))]
    out.mkdir(parents=True, exist_ok=True)
    if left:
        artist = _open_artist(checkpoint, form, order, prompt, mesh, arguments.dtype, vae)
        _draw(artist, order, left, paths, name)
    if order.n > 1:
        write_sheet([*paths.values()], out / SHEET)
    print(f"{order.n} pictures, {len(left)} of them new: {out}", file=sys.stderr)


def drawing_format(checkpoint: load.Checkpoint) -> PicturedFormat:
    """Returns the conversation format of a checkpoint that draws.

    Raises:
      ValueError: it cannot draw.
    """
    form = open_format(checkpoint)
    if form is None or not form.vision.draws:
        raise ValueError(
            f"{checkpoint.path} cannot draw; name a checkpoint of Janus, Janus-Pro or JanusFlow, "
            "in the folder that it was published in"
        )
    return form


def read_order(
    arguments: argparse.Namespace, vision: VisionConfig, *, prompt: str, n: int
) -> Order:
    """Reads how to draw n pictures, of what is not said as the model's authors do.

    Raises:
      ValueError: a setting is out of range or of the other kind of model, or a flow has no VAE.
    """
    kind, own, others = "draws codes", CODES, FLOW
    if vision.flow:
        kind, own, others = "draws by a flow", FLOW, CODES
    for name in others:
        if name != "guidance" and getattr(arguments, name) is not None:
            raise ValueError(f"--{name} does not apply to a model that {kind}; omit it")
    if vision.flow and arguments.vae is None:
        raise ValueError(
            "JanusFlow draws latents, and the VAE that makes pixels of them is not in its folder; "
            f"download config.json and {WEIGHTS} of stabilityai/sdxl-vae, and add --vae FOLDER"
        )
    given = {name: getattr(arguments, name) for name in own if name != "vae"}
    chosen = {name: own[name] if value is None else value for name, value in given.items()}
    return Order(
        prompt,
        n=n,
        seed=arguments.seed,
        at_once=arguments.max_batch,
        **chosen,
    )


def vae_of(path: Path, flow: FlowConfig) -> VaeFolder:
    """Opens the VAE of a flow.

    Raises:
      ValueError: see `open_vae`; or its latents are not those that the model draws.
    """
    folder = open_vae(path)
    if folder.config.latent_channels != flow.latent_channels:
        raise ValueError(
            f"{path} has {folder.config.latent_channels} numbers per latent, and the model draws "
            f"{flow.latent_channels}; JanusFlow was trained with stabilityai/sdxl-vae"
        )
    return folder


def encode(checkpoint: load.Checkpoint, form: PicturedFormat, text: str) -> list[int]:
    """Encodes what to draw.

    Raises:
      ValueError: the prompt leaves no room for a picture.
    """
    prompt = prompt_of(form, text)
    check_room(checkpoint, form, len(prompt))
    return prompt


def check_room(checkpoint: load.Checkpoint, form: PicturedFormat, length: int) -> None:
    """Raises ValueError if a prompt of this length leaves no room for a picture."""
    size, most = form.vision.code_grid**2, checkpoint.model.max_seq_len
    if length + size > most:
        raise ValueError(
            f"a prompt of {length} tokens and a picture of {size} exceed "
            f"model.max_seq_len={most}; shorten the prompt"
        )


def prompt_of(form: PicturedFormat, text: str) -> list[int]:
    """Encodes what to draw, up to the token that begins the picture."""
    messages = [Message("system", ""), Message("user", text)]
    return [*form.encode(messages), form.vocabulary.coder.control[BEGIN]]


def blanked(form: PicturedFormat, prompt: Sequence[int]) -> list[int]:
    """Blanks out a prompt's text: all but the first and the last token become padding (Janus'
    code).

    Raises:
      ValueError: the tokenizer has no padding.
    """
    pad = form.vocabulary.coder.control.get(PAD)
    if pad is None:
        raise ValueError(
            f"the tokenizer has no {PAD!a}, which stands for a prompt's text in guidance; copy it "
            "again from the release"
        )
    return [*prompt[:1], *[pad] * (len(prompt) - 2), *prompt[1:][-1:]]


def _open_artist(
    checkpoint: load.Checkpoint,
    form: PicturedFormat,
    order: Order,
    prompt: Sequence[int],
    mesh: Mesh | None,
    dtype: str | None,
    vae: VaeFolder | None,
) -> Artist:
    blank = [] if vae else blanked(form, prompt)  # raises before the weights are read
    model, guidance = open_model(checkpoint, form, mesh, dtype, vae), order.guidance
    if isinstance(model, Painter):
        painter, steps = model, order.steps
        assert steps is not None

        def paint(seeds: Sequence[int], progress: Callable[[int, int], None]) -> np.ndarray:
            noise = painter.noise(seeds)
            return painter.pixels(
                painter.latents(prompt, noise, guidance=guidance, steps=steps, progress=progress)
            )

        return paint
    drawer = model

    def draw(seeds: Sequence[int], progress: Callable[[int, int], None]) -> np.ndarray:
        samplings = [order.sampling(seed) for seed in seeds]
        return drawer.pixels(
            drawer.codes(prompt, blank, samplings, guidance=guidance, progress=progress)
        )

    return draw


def open_model(
    checkpoint: load.Checkpoint,
    form: PicturedFormat,
    mesh: Mesh | None,
    dtype: str | None,
    vae: VaeFolder | None,
) -> Drawer | Painter:
    """Reads the weights of what draws: with a VAE, by a flow."""
    chosen = choose_dtype(checkpoint, dtype)
    language = load.load(checkpoint, mesh=mesh, dtype=chosen)
    eyes = load_eyes(checkpoint, mesh=mesh, dtype=language.policy.compute)
    grid = form.vision.code_grid
    if vae:
        return Painter(language, eyes.brush, load_vae(vae, mesh=mesh), grid, mesh)
    return Drawer(language, eyes.pencil, grid, mesh)


def _draw(
    artist: Artist, order: Order, left: Sequence[int], paths: Mapping[int, Path], model: str
) -> None:
    with Display(Console(stderr=True)) as display:
        for first in range(0, len(left), order.at_once):
            some = left[first : first + order.at_once]
            what = f"pictures {first + 1} to {first + len(some)} of {len(left)}"
            drawn = artist(some, display.counting(what))
            for seed, pixels in zip(some, drawn, strict=True):
                write_picture(paths[seed], pixels, order.settings(seed, model))


def write_picture(path: Path, pixels: np.ndarray, settings: dict[str, str]) -> None:
    """Writes uint8 [rows, columns, 3] as a PNG that says how it was made."""
    import PIL.Image
    import PIL.PngImagePlugin

    said = PIL.PngImagePlugin.PngInfo()
    for key, value in settings.items():
        said.add_itxt(key, value)
    with files.replacing(path) as file:
        PIL.Image.fromarray(pixels).save(file, "PNG", pnginfo=said)


def _is_drawn(path: Path, settings: dict[str, str]) -> bool:
    """Tells whether a picture is there already.

    Raises:
      ValueError: there is another in its place.
    """
    import PIL.Image

    if not path.exists():
        return False
    try:
        with PIL.Image.open(path, formats=("PNG",)) as picture:
            found = {key: str(value) for key, value in picture.info.items() if key in settings}
    except Exception:  # whatever a damaged file makes a decoder raise
        found = {}
    if found != settings:
        raise ValueError(
            f"{path} is not the picture that would be drawn there: {found or 'not one of ours'}; "
            "choose another --out, or remove it"
        )
    return True


def write_sheet(paths: Sequence[Path], target: Path) -> None:
    """Writes all pictures side by side, in as many columns as rows or one more."""
    import PIL.Image

    shown = [pictures.open_picture(path) for path in paths]
    width, height = shown[0].size
    columns = math.ceil(math.sqrt(len(shown)))
    rows = math.ceil(len(shown) / columns)
    size = columns * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP
    sheet = PIL.Image.new("RGB", size, "white")
    for number, picture in enumerate(shown):
        row, column = divmod(number, columns)
        sheet.paste(picture, (column * (width + _GAP), row * (height + _GAP)))
    with files.replacing(target) as file:
        sheet.save(file, "PNG")
