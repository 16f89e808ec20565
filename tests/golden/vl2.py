"""Small checkpoints of DeepSeek-VL2, pictures and conversations: what make_vl2.py gives DeepSeek's
code, and tests give ours.

The tower's picture leaves pixels over and its grid is odd, so that the projector pads. One case has
plain heads and experts by softmax, as Tiny; the other MLA and experts by biased sigmoid, as Base.
No weight is zero.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from dsjax.checkpoint import names
from dsjax.checkpoint.families import find
from dsjax.checkpoint.hf_config import from_hf, vision_of
from dsjax.files import write_json
from tests.checkpoint import hf_files
from tests.golden.checkpoint import normal_like, uniform
from tests.text.released import BOS, EOS, make_tokenizer

FILE = Path(__file__).parent / "vl2.npz"
FAMILY = "deepseek_vl_v2"
SIDE, PATCH = 22, 4
# Of the releases, in tiles: 23 grids in the order of their candidate_resolutions.
GRIDS = (
    (1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (4, 1), (2, 2), (1, 5), (5, 1), (1, 6), (6, 1),
    (2, 3), (3, 2), (1, 7), (7, 1), (1, 8), (8, 1), (2, 4), (4, 2), (1, 9), (9, 1), (3, 3),
)  # fmt: skip
# A reply that begins with "a" must not join the colon before it.
MERGES = ((":", "a"), ("\u0120", "a"), (":", "\u0120"))
CONTROL = {BOS: 0, EOS: 1, "<unused>": 2}
VOCABULARY = 280
POSITIONS, NEW_TOKENS = 12, 8  # the last whose logits are stored; tokens after them
_LANGUAGE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 56,
    "moe_intermediate_size": 20,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 1024,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": None,
    "model_type": "deepseek_v2",
}
_HEADS = {
    "use_mla": False, "num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": None,
    "qk_nope_head_dim": 0, "qk_rope_head_dim": 0, "v_head_dim": 0, "topk_method": "greedy",
    "lm_head": True,
}  # fmt: skip
_LATENT = {
    "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 24, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 12, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    "norm_topk_prob": True, "routed_scaling_factor": 2.0,
}  # fmt: skip


def resolutions(side: int) -> list[list[int]]:
    return [[wide * side, high * side] for wide, high in GRIDS]


def _config(language: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["DeepseekVLV2ForCausalLM"],
        "model_type": FAMILY,
        "candidate_resolutions": resolutions(SIDE),
        "global_view_pos": "head",
        "tile_tag": "2D",
        "torch_dtype": "float32",
        "language_config": _LANGUAGE | language,
        "projector_config": {"model_type": "mlp_projector", "n_embed": 32, "input_dim": 24},
        "vision_config": {
            "model_type": "vision", "image_size": SIDE, "patch_size": PATCH, "width": 24,
            "layers": 2, "heads": 3, "mlp_ratio": 3.7362,
        },
    }  # fmt: skip


CASES = {"heads": _config(_HEADS), "latent": _config(_LATENT)}
PROCESSOR = {
    "processor_class": "DeepseekVLV2Processor",
    "candidate_resolutions": resolutions(SIDE),
    "downsample_ratio": 2,
    "patch_size": PATCH,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "normalize": True,
    "image_token": "<image>",
    "pad_token": "<\uff5c\u2581pad\u2581\uff5c>",
    "sft_format": "deepseek",
}
# Role, text with its pictures where DeepSeek's processor wants them, sizes of the pictures.
CONVERSATIONS: dict[str, list[tuple[str, str, list[tuple[int, int]]]]] = {
    "one": [("user", "<image>\n<|ref|>the b<|/ref|>?", [(30, 75)])],
    "two": [
        ("user", " <image>\nWhat?", [(44, 20)]),
        ("assistant", "a cat", []),
        ("user", "First a, then <image>\n<|grounding|>b", [(67, 66)]),
    ],
    "three": [
        ("system", "Rhyme.\n", []),
        ("user", "<image>\n<image>\n<image>\nSo?", [(30, 75), (90, 20), (22, 22)]),
    ],
}
# Of pictures for the released tower: both orders, upscaled, one pixel, just beside whole tiles,
# thin, and where rounding and cutting differ.
AWKWARD = (
    (500, 333), (333, 500), (20, 31), (1, 1), (384, 384), (385, 383), (769, 384), (517, 301),
    (1300, 400), (40, 1300), (3, 700), (1151, 1153), (999, 1000),
)  # fmt: skip


def picture(size: tuple[int, int], seed: int = 0) -> PIL.Image.Image:
    """Noise of this width and height."""
    shape = (size[1], size[0], 3)
    return PIL.Image.fromarray(uniform(seed, f"{size}", shape, 0, 256).astype(np.uint8))


def sizes() -> np.ndarray:
    """Widths and heights [n, 2] for the choice of a grid: small numbers, where ties are, and
    large ones."""
    small = uniform(1, "small", (600, 2), 1, 60)
    large = np.exp(uniform(1, "large", (1400, 2), 3, 8.5))
    ties = [[384 * wide + more, 384 * high] for wide, high in GRIDS for more in (-1, 0, 1)]
    # Here a fraction of a pixel, rounded and not cut, would choose another grid.
    close = [(2546, 1697), (2546, 1698), (2548, 1698), (1700, 2549), (1701, 2551)]
    return np.concatenate([small, large, np.array(ties), np.array(close)]).astype(np.int32)


def digest(array: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=12).hexdigest()


def tokenizer() -> Any:
    """A tokenizer as released: without the tokens that the processor adds."""
    return make_tokenizer(CONTROL, MERGES)


def published(config: dict[str, Any], seed: int = 3) -> dict[str, np.ndarray]:
    """The checkpoint as DeepSeek stores it."""
    sight, vision = find(FAMILY).sight, vision_of(config)
    assert sight and vision
    shapes = {row.name: row.shape for row in names.tensors(from_hf(config), FAMILY)}
    shapes |= {part.name: part.shape for part in sight.parts(vision)}
    return {name: _weight(seed, name, shape) for name, shape in shapes.items()}


def _weight(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name.endswith("e_score_correction_bias"):
        return uniform(seed, name, shape, -0.3, 0.3)
    if name in ("image_newline", "view_seperator"):
        return normal_like(seed, name, shape)
    if len(shape) == 1:
        low = -0.8 if name.endswith("bias") else 0.5
        return uniform(seed, name, shape, low, low + 1)
    tables = ("embed_tokens.weight", "pos_embed", "latent")
    fan_in = 1 if name.endswith(tables) else math.prod(shape[1:])
    return normal_like(seed, name, shape, fan_in**-0.5)


def write(folder: Path, config: dict[str, Any]) -> Path:
    """Writes the checkpoint's folder."""
    hf_files.write(folder, config, published(config))
    tokenizer().save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"bos_token": BOS, "eos_token": EOS})
    write_json(folder / "processor_config.json", PROCESSOR)
    return folder
