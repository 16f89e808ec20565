"""A model that names and draws coloured shapes, made from nothing.

    data/        pictures, questions, captions (`dsjax.janus.shapes`)
    autoencoder/, tokenizer/   the runs of the VQ tokenizer, first without codes, then with them
    tower/       the run of the tower, on pictures and captions, as SigLIP
    start/       a folder of Janus with that tokenizer, that tower and random weights else
    STAGE/       a run each, beginning where the last one ended; STAGE/model its result
    shapes.json  how many pictures are named and drawn rightly; drawn.png some drawings,
                 with the guidance that draws most of them rightly

Each run resumes where it was stopped, and what is done is skipped. A drawing is right if it agrees
with its prompt: once by the model's own eyes, once by rule (`shapes.named`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from dsjax import settings
from dsjax.checkpoint import families, load
from dsjax.checkpoint.eyes import load_eyes
from dsjax.checkpoint.hf_config import to_hf
from dsjax.checkpoint.sighted import write_sighted
from dsjax.config.coloured_shapes import ColouredShapes, PaintStage
from dsjax.files import publish, read_json, write_json
from dsjax.generate.codes import Drawer
from dsjax.generate.sampling import Sampling
from dsjax.infer.drawing import blanked, drawing_format, encode, write_picture, write_sheet
from dsjax.janus import contrasting, shapes, tokenizing, training
from dsjax.janus.examination import Examinee
from dsjax.janus.pairs import Picture
from dsjax.janus.questions import Asked
from dsjax.model.parameters import AnyModule, initialize
from dsjax.posttrain.evaluation import measure
from dsjax.precision.policy import Policy
from dsjax.text.tokenizer import BOS, EOS, PAD
from dsjax.train import workdir
from dsjax.vision.projector import STD
from dsjax.vision.sighted import Sighted
from dsjax.vision.vq import Vq

FAMILY = "janus"
REPORT, SHEET = "shapes.json", "drawn.png"
_SHOWN = 16  # drawings of the sheet
_STRIDE = 61  # captions from one to the next: prime, so that all shapes, colours and places come


def load_config(path: str | Path, *, seed: int | None = None) -> ColouredShapes:
    """Reads a toy from a config file.

    Args:
      seed: of the data and of every run, in place of the config's own.

    Raises:
      FileNotFoundError, ValueError: see `settings.load_config`.
    """
    path = settings.find(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no config {path}; the default is configs/pipelines/shapes_tiny.py"
        )
    config = settings.read_python(path, ColouredShapes)
    if seed is None:
        return config

    def seeded(own: Any) -> Any:
        return dataclasses.replace(own, train=dataclasses.replace(own.train, seed=seed))

    def seeded_stage(stage: PaintStage) -> PaintStage:
        janus = dataclasses.replace(stage.config.janus, seed=seed)
        own = seeded(dataclasses.replace(stage.config, janus=janus))
        return dataclasses.replace(stage, config=own)

    return dataclasses.replace(
        config,
        seed=seed,
        autoencoder=seeded(config.autoencoder),
        tokenizer=seeded(config.tokenizer),
        tower=seeded(config.tower) if config.tower else None,
        stages=tuple(map(seeded_stage, config.stages)),
    )


def run(config: ColouredShapes, folder: Path, *, command: str, console: Console) -> int:
    """Makes everything in `folder`, or what is left to make.

    Returns:
      the exit code: 0, or that of the run that a signal stopped.

    Raises:
      ValueError, OSError: a run fails as its own command would; or the folder holds a toy of
        other settings.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(workdir.locked(folder))
        _prepare(config, folder, console)
        if code := _train_tokenizer(config, folder, command, console):
            return code
        if code := _train_tower(config, folder, command, console):
            return code
        if not (folder / "start").is_dir():
            write_start(config, folder)
        init = folder / "start"
        for number, stage in enumerate(config.stages, 1):
            console.print(f"[bold]{number}/{len(config.stages)} {stage.name}[/bold]")
            own = placed(stage, folder, init)
            if code := training.train(own, folder / stage.name, command=command, console=console):
                return code
            init = folder / stage.name / training.MODEL
        if not (folder / REPORT).is_file():
            began = time.monotonic()
            report = judge(config, folder, init, console)
            towers = [config.tower] if config.tower else []
            runs = [config.autoencoder, config.tokenizer, *towers, *config.stages]
            summaries = [read_json(folder / each.name / "summary.json") for each in runs]
            trained = sum(summary["wall_seconds"] for summary in summaries)
            seconds = trained + time.monotonic() - began
            write_json(folder / REPORT, {**report, "seconds": seconds})
        _show(read_json(folder / REPORT), folder, console)
    return 0


def _prepare(config: ColouredShapes, folder: Path, console: Console) -> None:
    """Writes the data, or checks that it is this config's."""
    kept = folder / "pipeline.json"
    wanted = {"name": config.name, "config": settings.content_hash(config)}
    if kept.is_file() and read_json(kept) != wanted:
        raise ValueError(
            f"{folder} holds a toy of other settings; name another --workdir, or give the same "
            "config and --seed again"
        )
    if not (folder / "data" / "held_out.jsonl").is_file():
        console.print(f"drawing pictures in {folder / 'data'}")
        shapes.write_shapes(folder / "data", seed=config.seed, n_held_out=config.n_held_out)
    write_json(kept, wanted)


def placed(stage: PaintStage, folder: Path, init: Path) -> Any:
    """Returns a stage's config with its paths filled in."""
    text = json.dumps(settings.to_dict(stage.config))
    text = text.replace("{run}", json.dumps(str(folder))[1:-1])
    own = settings.from_dict(json.loads(text), f"stage {stage.name}", type(stage.config))
    return dataclasses.replace(own, init=str(init))


def _train_tokenizer(config: ColouredShapes, folder: Path, command: str, console: Console) -> int:
    """Trains the VQ tokenizer, first without codes on crowds, then with them also on pictures of
    one shape; returns the exit code.
    """
    crowds = [Picture(str(path)) for path in sorted((folder / "data" / shapes.CROWDS).iterdir())]
    # As many of each kind.
    mixed = [*crowds, *(picture for _, picture in _captioned(folder)[: len(crowds)])]

    def learned() -> Vq:
        return tokenizing.trained(config.autoencoder, folder / "autoencoder")

    for own, shown, init in (
        (config.autoencoder, crowds, None),
        (config.tokenizer, mixed, learned),
    ):
        console.print(f"[bold]{own.name}[/bold]")
        if code := tokenizing.train(
            own, shown, folder / own.name, command=command, console=console, init=init
        ):
            return code
    return 0


def _train_tower(config: ColouredShapes, folder: Path, command: str, console: Console) -> int:
    """Trains the tower on pictures and captions, if it is to be; returns the exit code."""
    if config.tower is None:
        return 0
    console.print(f"[bold]{config.tower.name}[/bold]")
    tokenizer, by_caption = shapes.tokenizer(), dict[str, list[Picture]]()
    for caption, picture in _captioned(folder):
        by_caption.setdefault(caption, []).append(picture)
    return contrasting.train(
        config.tower,
        {tuple(tokenizer.encode(each).ids): shown for each, shown in by_caption.items()},
        folder / config.tower.name,
        command=command,
        console=console,
        init=widened,
    )


def _captioned(folder: Path) -> list[tuple[str, Picture]]:
    """Returns the captions and the pictures to train on."""
    lines = map(json.loads, (folder / "data" / "draw.jsonl").read_text().splitlines())
    return [(each["caption"], Picture(str(folder / "data" / each["image"]))) for each in lines]


def write_start(config: ColouredShapes, folder: Path) -> None:
    """Writes the folder that the first stage begins with: the trained tokenizer and tower, random
    weights else.
    """
    declared = Sighted(config.model, config.vision, Policy(jnp.dtype(jnp.float32)))
    model = initialize(declared, jax.random.key(config.seed))
    model.eyes = widened(model.eyes)
    model.eyes.pencil.vq = tokenizing.trained(config.tokenizer, folder / "tokenizer")
    if config.tower:
        model.eyes.tower = contrasting.trained(config.tower, folder / config.tower.name)
    sight = families.find(FAMILY).sight
    assert sight is not None
    partial = folder / "start.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    shapes.tokenizer().save(str(partial / "tokenizer.json"))
    write_json(
        partial / "tokenizer_config.json", {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    )
    size = config.vision.tower.image_size
    write_json(
        partial / "preprocessor_config.json",
        {
            "size": {"height": size, "width": size},
            "min_size": 1,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        },
    )
    described = to_hf(config.model, FAMILY, dtype="float32", vision=config.vision)
    dtype = np.dtype(np.float32)
    write_sighted(partial, model, FAMILY, list(sight.parts(config.vision)), described, dtype)
    publish(partial, folder / "start")


def widened(eyes: AnyModule) -> AnyModule:
    """Scales random weights to a standard deviation of 1 / sqrt(inputs). The published one, 0.02,
    suits widths of a thousand; a small tower that begins with it learns to see very slowly.
    """

    def scaled(path: Any, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        others = ("norm", "bqkv", ".vq", ".embed")
        if leaf.ndim < 2 or any(other in name for other in others):
            return leaf
        n_inputs = leaf.shape[-2]
        if "patch" in name:
            n_inputs = np.prod(leaf.shape[:-1])
        elif "positions" in name:  # as large as an embedded patch
            n_inputs = leaf.shape[-1]
        return leaf * (n_inputs**-0.5 / STD)

    return jax.tree_util.tree_map_with_path(scaled, eyes)


def judge(config: ColouredShapes, folder: Path, model: Path, console: Console) -> Mapping[str, Any]:
    """Asks for the captions of held-out pictures, and for drawings of all captions."""
    checkpoint = load.open_checkpoint(model)
    examinee = Examinee(checkpoint, None, "float32", max_batch=64)
    lines = (folder / "data" / "held_out.jsonl").read_text().splitlines()
    held_out = [json.loads(line) for line in lines]
    asked = [
        Asked(each["image"], ((folder / "data" / each["image"]).read_bytes(),), shapes.QUESTION)
        for each in held_out
    ]
    console.print(f"naming {len(asked)} held-out pictures")
    named = examinee.answers(asked, max_new_tokens=12)
    right = [reply == each["answer"] for reply, each in zip(named, held_out, strict=True)]
    report: dict[str, Any] = {"name": config.name, "captions": _share(right)}
    report["drawings"], written = {}, {}
    language = load.load(checkpoint, dtype=np.float32)
    pencil = load_eyes(checkpoint, dtype=np.float32).pencil
    drawer = Drawer(language, pencil, config.vision.code_grid)
    wanted = [shapes.EVERY[n % len(shapes.EVERY)] for n in range(config.n_drawings)]
    for guidance in config.guidances:
        console.print(f"drawing {len(wanted)} pictures with guidance {guidance:g}")
        drawn = _drawings(drawer, checkpoint, wanted, guidance)
        said = examinee.answers(
            [Asked("a drawing", (_png(pixels),), shapes.QUESTION) for pixels in drawn],
            max_new_tokens=12,
        )
        report["drawings"][f"{guidance:g}"] = {
            "by the model": _share(
                [reply == each.caption for reply, each in zip(said, wanted, strict=True)]
            ),
            "by rule": _share(
                [shapes.named(pixels) == each for pixels, each in zip(drawn, wanted, strict=True)]
            ),
        }
        written[f"{guidance:g}"] = _write_some(folder, wanted, drawn, guidance)
    best = max(written, key=lambda each: report["drawings"][each]["by rule"]["value"])
    write_sheet(written[best], folder / SHEET)
    return report


def _drawings(
    drawer: Drawer, checkpoint: load.Checkpoint, wanted: Sequence[shapes.Drawn], guidance: float
) -> list[np.ndarray]:
    """Draws pictures, uint8 [48, 48, 3] each; the same caption comes with another seed."""
    form = drawing_format(checkpoint)
    drawn: dict[int, np.ndarray] = {}
    for each in dict.fromkeys(wanted):
        prompt = encode(checkpoint, form, each.caption)
        numbers = [number for number, other in enumerate(wanted) if other == each]
        samplings = [Sampling(temperature=1.0, seed=number) for number in numbers]
        codes = drawer.codes(prompt, blanked(form, prompt), samplings, guidance=guidance)
        drawn |= dict(zip(numbers, drawer.pixels(codes), strict=True))
    return [drawn[number] for number in range(len(wanted))]


def _png(pixels: np.ndarray) -> bytes:
    import PIL.Image

    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _share(right: Sequence[bool]) -> dict[str, float]:
    """Returns a share with its 95 % interval."""
    found = measure([float(each) for each in right])
    return {"value": found.value, "low": found.low, "high": found.high}


def _write_some(
    folder: Path, wanted: Sequence[shapes.Drawn], drawn: Sequence[np.ndarray], guidance: float
) -> list[Path]:
    """Writes some drawings of every shape, colour and place; returns their files."""
    (folder / "drawn").mkdir(exist_ok=True)
    paths = []
    for number in sorted({index * _STRIDE % len(wanted) for index in range(_SHOWN)}):
        paths.append(folder / "drawn" / f"{number}_guidance_{guidance:g}.png")
        said = {"prompt": wanted[number].caption, "guidance": f"{guidance:g}"}
        write_picture(paths[-1], drawn[number], said)
    return paths


def _show(report: Mapping[str, Any], folder: Path, console: Console) -> None:
    def shown(share: Mapping[str, float]) -> str:
        return f"{share['value']:.1%} ({share['low']:.1%} to {share['high']:.1%})"

    lines = [f"named rightly: {shown(report['captions'])}"]
    for guidance, found in report["drawings"].items():
        by = "; ".join(f"{judge} {shown(share)}" for judge, share in found.items())
        lines.append(f"drawn rightly, guidance {guidance}: {by}")
    lines.append(f"{report['seconds'] / 60:.1f} minutes; {folder / SHEET}")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
