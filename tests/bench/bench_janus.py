"""A model that sees and draws against transformers' `janus`, on this machine, in one run.

The towers, the aligners and the VQ tokenizer of Janus-Pro 1B with a language model of 8 layers of
1,024 in place of 24 of 2,048: 530M parameters, random, float32, the same on both sides. A question
of 32 tokens about one picture (576 embeddings) is answered with 32 tokens; one picture is drawn
from a prompt of 16 tokens, 576 codes with guidance 5, and decoded. Both are greedy, since
transformers' sampler differs; it is printed whether the sides agree. They take turns; the ratio of
medians is printed.

Run: python -m tests.bench.bench_janus, after `pip install -e '.[reference]'`.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from dsjax.checkpoint.eyes import load_eyes
from dsjax.checkpoint.load import load, open_checkpoint
from dsjax.generate.codes import Drawer
from dsjax.generate.engine import Engine
from dsjax.generate.request import Given, Request
from dsjax.generate.sampling import Sampling
from tests.bench.sides import machine, seconds

ROUNDS, NEW, TEXT, PROMPT, GUIDANCE = 3, 32, 32, 16, 5.0
BOS, PAD, BEGIN, END, PLACEHOLDER = range(5)
GREEDY = Sampling(temperature=0.0)


class Side(NamedTuple):
    answer: Callable[[], list[int]]
    draw: Callable[[], np.ndarray]  # codes


def transformers_model() -> Any:
    try:
        from transformers import JanusConfig, JanusForConditionalGeneration
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is not installed; first: pip install -e '.[reference]'")
    dim = 1024
    text = {
        "model_type": "llama",
        "vocab_size": 16384,
        "hidden_size": dim,
        "intermediate_size": 2816,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 2048,
    }
    vision = {"projection_dim": dim, "hidden_act": "gelu"}
    vq = {"projection_dim": dim, "image_token_embed_dim": dim}
    return JanusForConditionalGeneration(
        JanusConfig(
            text_config=text, vision_config=vision, vq_config=vq, image_token_id=PLACEHOLDER
        )
    ).eval()


def prompts() -> tuple[list[int], list[int], np.ndarray]:
    """Returns a question about a picture, what to draw, and the picture, float32 [Y, X, 3]."""
    draw = np.random.default_rng(0)
    question = [BOS, BEGIN, *[PLACEHOLDER] * 576, END, *draw.integers(5, 16384, TEXT).tolist()]
    prompt = [BOS, *draw.integers(5, 16384, PROMPT - 2).tolist(), BEGIN]
    return question, prompt, draw.normal(size=(384, 384, 3)).astype(np.float32)


def transformers_side(model: Any) -> Side:
    import torch
    from transformers import GenerationConfig

    question, prompt, picture = prompts()
    ids, drawn = torch.tensor([question]), torch.tensor([prompt])
    pixels = torch.tensor(picture).permute(2, 0, 1)[None]
    config = GenerationConfig(
        do_sample=False, guidance_scale=GUIDANCE, bos_token_id=BOS, pad_token_id=PAD,
        max_length=1024,
    )  # fmt: skip
    config.generation_kwargs = {"boi_token_id": BEGIN}

    def answer() -> list[int]:
        with torch.no_grad():
            found = model.generate(
                ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), do_sample=False,
                min_new_tokens=NEW, max_new_tokens=NEW, pad_token_id=PAD, generation_mode="text",
            )  # fmt: skip
        return found[0, -NEW:].tolist()

    def draw() -> np.ndarray:
        with torch.no_grad():
            codes = model.generate(
                drawn, attention_mask=torch.ones_like(drawn), generation_config=config,
                generation_mode="image",
            )  # fmt: skip
            model.decode_image_tokens(codes)
        return codes.numpy().ravel()

    return Side(answer, draw)


def dsjax_side(folder: str) -> Side:
    checkpoint = open_checkpoint(folder)
    language, eyes = load(checkpoint), load_eyes(checkpoint)
    engine, drawer = Engine(language), Drawer(language, eyes.pencil, eyes.config.code_grid)
    look = jax.jit(lambda eyes, pixels: eyes(pixels))
    question, prompt, picture = prompts()
    places = np.flatnonzero(np.array(question) == PLACEHOLDER).astype(np.int32)

    def answer() -> list[int]:
        given = Given(places, np.asarray(look(eyes, picture[None])[0]))
        (output,) = engine.complete([Request(tuple(question), NEW, GREEDY, given=given)])
        return output.tokens

    def draw() -> np.ndarray:
        blank = [BOS, *[PAD] * (PROMPT - 2), BEGIN]
        codes = drawer.codes(prompt, blank, [GREEDY], guidance=GUIDANCE)
        drawer.pixels(codes)
        return codes.ravel()

    return Side(answer, draw)


def main() -> None:
    print(machine())
    model = transformers_model()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        sides = {"dsjax": dsjax_side(folder), "transformers": transformers_side(model)}
        for what in Side._fields:
            runs = {name: getattr(side, what) for name, side in sides.items()}
            ours, theirs = (np.asarray(run()) for run in runs.values())  # ours compiles
            print(f"{what}: {np.mean(ours == theirs):.1%} of {ours.size} places are equal")
            times: dict[str, list[float]] = {name: [] for name in runs}
            for _ in range(ROUNDS):
                for name, run in runs.items():
                    times[name].append(seconds(run))
            median = {name: statistics.median(taken) for name, taken in times.items()}
            for name, taken in median.items():
                print(f"  {name:13} {taken:.2f} s")
            print(f"  dsjax / transformers: {median['transformers'] / median['dsjax']:.2f}x")


if __name__ == "__main__":
    main()
