"""Makes vl7b.npz anew, with DeepSeek's own code.

Run: PYTHONPATH=.:DeepSeek-VL python -m tests.golden.make_vl7b
Expected: vl7b.npz beside this file, below 200 KB, in half a minute on one core; the same numbers to
float32 rounding on any machine.

Needs the repository deepseek-ai/DeepSeek-VL (681bffb) and an environment of its own, since that
code fails with later versions: transformers 4.38.2, tokenizers 0.15.2, huggingface_hub 0.25.2,
timm, einops, attrdict, torch, torchvision and ml_dtypes. Widths and depths that the code spells out
are replaced in its tables of shapes.
"""

from __future__ import annotations

import collections
import collections.abc
from typing import Any

import numpy as np
import torch

from tests.golden import vl7b


def _modules() -> Any:
    """Imports DeepSeek's modules, whose dependencies expect an older Python."""
    for name in ("Mapping", "MutableMapping", "Sequence"):
        setattr(collections, name, getattr(collections.abc, name))
    # torchvision's operators are compiled and not needed; their names must exist
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor a, Tensor b, float c) -> Tensor")
    from deepseek_vl import models  # pyright: ignore
    from deepseek_vl.models import sam, siglip_vit  # pyright: ignore

    siglip_vit.SigLIP_MODEL_CONFIG["siglip_large_patch16_384"].update(vl7b.TOWER)
    sam.SAM_MODEL_CONFIG["sam_b_downsample"].update(vl7b.SAM)
    return models


def _model(models: Any) -> Any:
    from deepseek_vl.models.modeling_vlm import MultiModalityConfig  # pyright: ignore

    settings = {name: value for name, value in vl7b.CONFIG.items() if name != "architectures"}
    described = MultiModalityConfig(**settings)
    described.language_config._attn_implementation = "eager"
    model = models.MultiModalityCausalLM(described).eval().requires_grad_(False)
    state = {
        name: torch.from_numpy(vl7b.weight(name, tuple(tensor.shape)))
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(state, strict=True)
    return model


def _inputs(models: Any) -> Any:
    from transformers import LlamaTokenizerFast

    tokenizer = LlamaTokenizerFast(
        tokenizer_object=vl7b.tokenizer(), bos_token=vl7b.BOS, eos_token=vl7b.EOS, unk_token=None
    )
    said = {key: value for key, value in vl7b.PROCESSOR.items() if key != "image_processor_type"}
    processor = models.VLChatProcessor(models.VLMImageProcessor(**said), tokenizer)
    places = range(len(vl7b.SIZES))
    asked = "<image_placeholder>\n" * len(places) + vl7b.QUESTION
    turns = [{"role": "User", "content": asked}, {"role": "Assistant", "content": ""}]
    return processor(conversations=turns, images=[vl7b.picture(place) for place in places])


def _greedy(model: Any, x: torch.Tensor) -> dict[str, np.ndarray]:
    language, tokens, made = model.language_model, [], {}
    for _ in range(vl7b.NEW_TOKENS):
        logits = language(inputs_embeds=x, use_cache=False).logits
        if not tokens:
            made["logits"] = logits[0, -vl7b.POSITIONS :].numpy()
        tokens.append(int(logits[0, -1].argmax()))
        new = language.get_input_embeddings()(torch.tensor([tokens[-1:]]))
        x = torch.cat([x, new], dim=1)
    return made | {"tokens": np.array(tokens, np.int32)}


@torch.no_grad()
def run() -> dict[str, np.ndarray]:
    models = _modules()
    model = _model(models)
    inputs = _inputs(models)
    pixels = inputs.pixel_values[0]
    towers = model.vision_model
    high, low = towers(pixels)
    shrunk = towers.vision_tower_low.image_norm(towers.resize(pixels))
    large = towers.vision_tower_high.image_norm(pixels)
    some = slice(None, None, vl7b.EVERY)
    names = [f"{name} {[*each.shape]}" for name, each in model.state_dict().items()]
    features = model.aligner((high, low))
    return {
        "names": np.array(names),
        "ids": inputs.input_ids[0].numpy().astype(np.int32),
        "shrunk": shrunk[:, :, some].permute(0, 2, 3, 1).numpy(),
        "large": large[:, :, some, some].permute(0, 2, 3, 1).numpy(),
        "high": high[:, some].numpy(),
        "low": low[:, some].numpy(),
        "features": features[:, some].numpy(),
        **_greedy(model, model.prepare_inputs_embeds(**_embedded(inputs))),
    }


def _embedded(inputs: Any) -> dict[str, Any]:
    names = ("input_ids", "pixel_values", "images_seq_mask", "images_emb_mask")
    return {name: inputs[name] for name in names}


def main() -> None:
    torch.set_num_threads(1)
    found = run()
    import PIL
    import transformers

    versions = (
        f"DeepSeek-VL 681bffb, transformers {transformers.__version__}, torch "
        f"{torch.__version__}, Pillow {PIL.__version__}"
    )
    np.savez_compressed(vl7b.FILE, versions=np.array(versions), **found)  # pyright: ignore
    print(f"{vl7b.FILE.name}: {vl7b.FILE.stat().st_size / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
