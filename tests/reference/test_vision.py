"""Models that see and draw against transformers, on random checkpoints that nobody has looked at.
Set DSJAX_REFERENCE_SEED to try others."""

from __future__ import annotations

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from dsjax.checkpoint.eyes import load_eyes
from dsjax.checkpoint.load import load, open_checkpoint
from dsjax.generate.codes import Drawer
from dsjax.generate.engine import Engine
from dsjax.generate.request import Given, Request
from dsjax.generate.sampling import Sampling
from dsjax.model.transformer import Embeddings
from dsjax.vision import pictures
from tests.closeness import LOGITS, assert_close

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]
SEED = int(os.environ.get("DSJAX_REFERENCE_SEED", "100"))
PLACEHOLDER = 7


def drawn(seed, **changes):
    """A random shape of Janus, with every value of its weights random."""
    from transformers import JanusConfig, JanusForConditionalGeneration

    rng = np.random.default_rng(seed)

    def pick(*choices):
        return choices[int(rng.integers(len(choices)))]

    dim, grid = pick(48, 64), pick(4, 5)
    levels = pick((1, 2), (1, 1, 2), (2, 1))
    patch = pick(2 ** (len(levels) - 1), 4, 6)
    heads = pick(2, 4)
    text = {
        "model_type": "llama",
        "vocab_size": 97,
        "hidden_size": dim,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 256,
    }
    vision = {
        "hidden_size": pick(32, 40),
        "num_hidden_layers": pick(2, 3),
        "num_attention_heads": pick(2, 4),
        "mlp_ratio": pick(2.0, 3.75),
        "image_size": grid * patch + pick(0, 1),
        "patch_size": patch,
        "projection_dim": dim,
        "depth": pick(1, 2, 3),
        "num_image_tokens": grid**2,
        "hidden_act": pick("gelu", "gelu_pytorch_tanh"),
    }
    vq = {
        "embed_dim": pick(4, 8),
        "num_embeddings": pick(50, 96),
        "latent_channels": pick(16, 24),
        "base_channels": 32,
        "channel_multiplier": list(levels),
        "num_res_blocks": pick(1, 2),
        "num_patches": grid,
        "projection_dim": dim,
        "image_token_embed_dim": dim,
        "num_hidden_layers": pick(1, 2),
    }
    config = JanusConfig(
        text_config=text, vision_config=vision, vq_config=vq, image_token_id=PLACEHOLDER, **changes
    )
    return randomised(JanusForConditionalGeneration(config), seed)


def randomised(model, seed):
    """The model with every value of its weights random, none of them zero."""
    import torch

    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.copy_(torch.rand_like(weight) + (0.5 if "norm" in name else -0.5))
            elif "embed" not in name or "patch" in name:
                fan_in = weight[0].numel()
                weight.copy_(torch.randn_like(weight) * fan_in**-0.5)
            else:
                weight.copy_(torch.randn_like(weight))
    return model.eval()


@pytest.fixture(scope="module", params=[SEED, SEED + 1, SEED + 2])
def pair(request, tmp_path_factory):
    model = drawn(request.param, tie_word_embeddings=request.param % 2 == 0)
    folder = tmp_path_factory.mktemp("janus")
    model.save_pretrained(folder)
    return model, open_checkpoint(folder), folder


def pixels(model, n, seed=0):
    side = model.config.vision_config.image_size
    shape = (n, side, side, 3)
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def torch_pixels(array):
    import torch

    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()


def test_tower_and_aligner_equal_transformers(pair):
    import torch

    model, checkpoint, _ = pair
    eyes = load_eyes(checkpoint)
    seen = pixels(model, 2)
    with torch.no_grad():
        tower = model.model.vision_model(torch_pixels(seen)).last_hidden_state
        want = model.model.aligner(tower)
    assert_close(jax.jit(eyes.tower)(seen), tower.numpy(), LOGITS, "tower")
    assert_close(jax.jit(eyes)(seen), want.numpy(), LOGITS, "embeddings")


def test_logits_after_pictures_equal_transformers(pair):
    import torch

    model, checkpoint, _ = pair
    eyes, language = load_eyes(checkpoint), load(checkpoint)
    n = checkpoint.hf.beside.vision.tower.n_tokens
    rng = np.random.default_rng(1)
    ids = rng.integers(8, 97, (1, 2 * n + 20)).astype(np.int32)
    ids[0, 5 : 5 + n] = ids[0, 9 + n : 9 + 2 * n] = PLACEHOLDER
    seen = pixels(model, 2)
    with torch.no_grad():
        want = model(
            input_ids=torch.from_numpy(ids).long(), pixel_values=torch_pixels(seen)
        ).logits.numpy()
    values = np.zeros((1, ids.shape[1], language.config.dim), np.float32)
    values[ids == PLACEHOLDER] = np.asarray(eyes(seen)).reshape(-1, values.shape[-1])
    embeddings = Embeddings(jnp.asarray(ids == PLACEHOLDER), jnp.asarray(values))
    hidden = language.hidden(jnp.asarray(ids), embeddings=embeddings).main_BTD
    assert_close(language.logits(hidden), want, LOGITS)


def test_drawing_parts_equal_transformers(pair):
    import torch

    model, checkpoint, _ = pair
    pencil = load_eyes(checkpoint).pencil
    rng, grid = np.random.default_rng(2), checkpoint.hf.beside.vision.code_grid
    codes = rng.integers(0, model.config.vq_config.num_embeddings, (2, grid**2)).astype(np.int32)
    states = rng.normal(size=(2, 3, model.config.text_config.hidden_size)).astype(np.float32)
    ids = torch.from_numpy(codes).long()
    with torch.no_grad():
        drawing = model.decode_image_tokens(ids).numpy()
        inputs = model.prepare_embeddings_for_image_generation(ids).numpy()
        logits = model.model.generation_head(torch.from_numpy(states)).numpy()
        # Its `encode` normalises neither side; what precedes that is the same.
        scale = 2 ** (len(model.config.vq_config.channel_multiplier) - 1)
        side = grid * scale
        shape = (1, side, side, 3)
        seen = rng.uniform(-1, 1, shape).astype(np.float32)
        vq = model.model.vqmodel
        latents = vq.quant_conv(vq.encoder(torch_pixels(seen)))
        z = torch.nn.functional.normalize(latents, dim=1).permute(0, 2, 3, 1)
        entries = torch.nn.functional.normalize(vq.quantize.embedding.weight, dim=1)
        nearest = torch.cdist(z.reshape(-1, z.shape[-1]), entries).argmin(-1).numpy()
    got = jax.jit(pencil.vq.decode)(codes.reshape(2, grid, grid))
    assert_close(got, drawing, LOGITS, "drawing")
    assert_close(pencil.embeddings(jnp.asarray(codes)), inputs, LOGITS, "inputs")
    assert_close(pencil.head(jnp.asarray(states)), logits, LOGITS, "head")
    ours = np.asarray(jax.jit(pencil.vq.encode)(seen))
    np.testing.assert_array_equal(ours.reshape(-1), nearest)


def test_greedy_answers_equal_transformers(pair):
    """Through the engine, in chunks that a picture does not fit into, in company."""
    import torch

    model, checkpoint, _ = pair
    n = checkpoint.hf.beside.vision.tower.n_tokens
    ids = np.random.default_rng(5).integers(8, 97, 2 * n + 9).astype(np.int32)
    ids[3 : 3 + n] = ids[6 + n : 6 + 2 * n] = PLACEHOLDER
    places = np.flatnonzero(ids == PLACEHOLDER).astype(np.int32)
    eyes, engine = load_eyes(checkpoint), Engine(load(checkpoint), prefill_chunk=16)
    requests, wanted = [], []
    for seed in (0, 1):
        seen = pixels(model, 2, seed)
        with torch.no_grad():
            said = model.generate(
                input_ids=torch.from_numpy(ids).long()[None],
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                pixel_values=torch_pixels(seen),
                max_new_tokens=12,
                do_sample=False,
                eos_token_id=None,
            )
        wanted.append(said[0, len(ids) :].tolist())
        values = np.asarray(eyes(seen)).reshape(-1, eyes.config.dim)
        given = Given(places, values)
        requests.append(Request(tuple(ids.tolist()), 12, Sampling(temperature=0.0), given=given))
    assert [output.tokens for output in engine.complete(requests)] == wanted


def test_greedy_drawings_equal_transformers(pair):
    import torch
    from transformers import GenerationConfig

    model, checkpoint, _ = pair
    vision = checkpoint.hf.beside.vision
    bos, pad, boi = 0, 1, 2
    prompt = [bos, 30, 40, 50, 60, boi]
    config = GenerationConfig(
        do_sample=False, guidance_scale=5.0, bos_token_id=bos, pad_token_id=pad, max_length=200
    )
    config.generation_kwargs = {"boi_token_id": boi}
    ids = torch.tensor([prompt])
    with torch.no_grad():
        wanted = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            generation_mode="image",
        ).numpy()
    grid, pencil = vision.code_grid, load_eyes(checkpoint).pencil
    got = Drawer(load(checkpoint), pencil, grid).codes(
        prompt, [bos, *[pad] * 4, boi], [Sampling(temperature=0.0)], guidance=5.0
    )
    np.testing.assert_array_equal(got.reshape(1, -1), wanted)


def test_deepseek_vl_equals_transformers(tmp_path):
    """With a pooling head, which is left out, and SigLIP's usual GELU in the tower alone."""
    import torch
    from transformers import DeepseekVLConfig, DeepseekVLForConditionalGeneration

    text = {
        "model_type": "llama", "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "max_position_embeddings": 256,
    }  # fmt: skip
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 70,
        "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 21, "patch_size": 4,
    }  # fmt: skip
    config = DeepseekVLConfig(text_config=text, vision_config=vision, image_token_id=PLACEHOLDER)
    model = randomised(DeepseekVLForConditionalGeneration(config), SEED)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    eyes, language = load_eyes(checkpoint), load(checkpoint)
    assert eyes.config.tower.activation == "gelu_tanh"
    ids = np.random.default_rng(1).integers(8, 97, (1, 40)).astype(np.int32)
    ids[0, 5:30] = PLACEHOLDER
    seen = pixels(model, 1)
    with torch.no_grad():
        want = model(
            input_ids=torch.from_numpy(ids).long(), pixel_values=torch_pixels(seen)
        ).logits.numpy()
    values = np.zeros((1, 40, 48), np.float32)
    values[ids == PLACEHOLDER] = np.asarray(eyes(seen)).reshape(-1, 48)
    embeddings = Embeddings(jnp.asarray(ids == PLACEHOLDER), jnp.asarray(values))
    hidden = language.hidden(jnp.asarray(ids), embeddings=embeddings).main_BTD
    assert_close(language.logits(hidden), want, LOGITS)


def test_deepseek_vl_hybrid_equals_transformers(tmp_path):
    """Windows that do not divide the picture, and a factor that is not zero."""
    import torch
    from transformers import DeepseekVLHybridConfig, DeepseekVLHybridForConditionalGeneration

    text = {
        "model_type": "llama", "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "max_position_embeddings": 256,
    }  # fmt: skip
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 70,
        "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 20, "patch_size": 4,
        "hidden_act": "gelu", "vision_use_head": False,
    }  # fmt: skip
    high = {
        "model_type": "sam_vision_model", "hidden_size": 24, "num_hidden_layers": 4,
        "num_attention_heads": 3, "mlp_dim": 50, "image_size": 64, "patch_size": 8,
        "window_size": 3, "global_attn_indexes": [1, 3], "output_channels": 10,
    }  # fmt: skip
    config = DeepseekVLHybridConfig(
        text_config=text,
        vision_config=vision,
        high_res_vision_config=high,
        image_token_id=PLACEHOLDER,
    )
    model = randomised(DeepseekVLHybridForConditionalGeneration(config), SEED)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    eyes, language = load_eyes(checkpoint), load(checkpoint)
    ids = np.random.default_rng(1).integers(8, 97, (1, 40)).astype(np.int32)
    ids[0, 5:30] = PLACEHOLDER
    rng = np.random.default_rng(2)
    low, large = (rng.uniform(-1, 1, (1, n, n, 3)).astype(np.float32) for n in (20, 64))
    with torch.no_grad():
        found = model.model.get_image_features(torch_pixels(low), torch_pixels(large))
        want = model(
            input_ids=torch.from_numpy(ids).long(),
            pixel_values=torch_pixels(low),
            high_res_pixel_values=torch_pixels(large),
        ).logits.numpy()
    tower = found.high_res_vision_last_hidden_state.numpy()
    assert_close(jax.jit(eyes.high)(large), tower, LOGITS, "SAM")
    values = np.zeros((1, 40, 48), np.float32)
    values[ids == PLACEHOLDER] = np.asarray(eyes(low, large)).reshape(-1, 48)
    embeddings = Embeddings(jnp.asarray(ids == PLACEHOLDER), jnp.asarray(values))
    hidden = language.hidden(jnp.asarray(ids), embeddings=embeddings).main_BTD
    assert_close(language.logits(hidden), want, LOGITS)


@pytest.mark.parametrize("resample", [2, 3])  # bilinear, which their conversion asks for
def test_both_pictures_equal_transformers_to_the_bit(resample):
    from transformers.models.deepseek_vl_hybrid import image_processing_pil_deepseek_vl_hybrid

    kind = image_processing_pil_deepseek_vl_hybrid.DeepseekVLHybridImageProcessorPil
    processor = kind(image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=resample)
    rules = pictures.rules_of(json.loads(processor.to_json_string()), "x")
    for picture in awkward()[:4]:
        want = processor(picture)
        got = pictures.inputs(pictures.largest(picture, rules)[None], rules)
        for name, own in zip(("pixel_values", "high_res_pixel_values"), got, strict=True):
            other = np.asarray(want[name][0]).transpose(1, 2, 0)
            np.testing.assert_array_equal(own[0], other, err_msg=name)


def awkward():
    rng = np.random.default_rng(3)

    def noise(width, height):
        return PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))

    sizes = [(500, 333), (333, 500), (1, 300), (300, 1), (20, 31), (517, 301), (384, 384), (7, 7)]
    return [noise(*size) for size in sizes]


@pytest.mark.parametrize("mean", [(0.5, 0.5, 0.5), (0.48145466, 0.4578275, 0.40821073)])
def test_pixels_equal_transformers_to_the_bit(mean):
    from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

    processor = JanusImageProcessorPil(image_mean=list(mean), image_std=[0.5, 0.26, 0.27])
    said = json.loads(processor.to_json_string())
    rules = pictures.rules_of(said, "x")
    assert not rules.cut
    for picture in awkward():
        want = np.asarray(processor(picture)["pixel_values"][0]).transpose(1, 2, 0)
        got = pictures.pixels([picture], rules)[0]
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


def deepseek_pixels(picture, size=384, least=14, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)):
    """What Janus' own processor does, step by step, with transformers' functions."""
    from transformers.image_transforms import normalize, rescale

    longest = max(picture.size)
    width, height = (max(int(side / longest * size), least) for side in picture.size)
    small = np.asarray(picture.resize((width, height), PIL.Image.Resampling.BICUBIC))
    side = max(width, height)
    framed = np.empty((side, side, 3), np.uint8)
    framed[:] = [int(x * 255) for x in mean]
    top, left = (side - height) // 2, (side - width) // 2
    framed[top : top + height, left : left + width] = small
    scaled = rescale(framed.transpose(2, 0, 1), 0.00392156862745098)
    return normalize(scaled, list(mean), list(std)).transpose(1, 2, 0)


def test_pixels_equal_deepseeks_to_the_bit():
    for picture in awkward():
        got = pictures.pixels([picture], pictures.Rules())[0]
        np.testing.assert_array_equal(got, deepseek_pixels(picture))


def test_a_saved_config_is_read_and_written_again(pair):
    from transformers import JanusConfig

    from dsjax.checkpoint.families import find
    from dsjax.checkpoint.hf_config import to_hf, vision_of

    model, checkpoint, folder = pair
    vision = checkpoint.hf.beside.vision
    config = to_hf(checkpoint.model, "janus", dtype="float32", vision=vision)
    assert vision_of(config) == dataclasses.replace(vision)
    again = JanusConfig.from_dict(config)
    for part in ("text_config", "vision_config", "vq_config"):
        ours, theirs = (getattr(each, part).to_dict() for each in (again, model.config))
        same = {key for key in theirs if ours.get(key) == theirs[key]}
        left = set(theirs) - same - {"dtype", "initializer_range", "rms_norm_eps"}
        assert not left - {"head_dim", "pad_token_id", "bos_token_id", "eos_token_id"}, left
    assert find("janus").sight is not None and folder.is_dir()
