"""Makes janusflow.npz anew, with DeepSeek's own code.

Run: python -m tests.golden.make_janusflow JANUS    (JANUS: a copy of github.com/deepseek-ai/Janus)
Needs: torch, torchvision, transformers 4.38.2, tokenizers 0.15.2, huggingface_hub 0.25.2, diffusers
0.31.0, timm, einops, attrdict and six. Takes half a minute on two cores.
Expected: one file below 200 KB; the same numbers to float32 rounding on any machine.

Widths that the code spells out are replaced: SigLIP's in its table of shapes, the aligners' modules
by smaller ones. The drawing is the function `generate` of demo/app_janusflow.py with its sizes and
types replaced as `_REPLACED` lists, and with noise that we give.
"""

from __future__ import annotations

import argparse
import ast
import collections
import collections.abc
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tests.golden import janusflow as case

_SIDE, _TOKENS = 2 * case.GRID, case.GRID**2
_REPLACED = {
    ".cuda()": "",
    "torch.bfloat16": "torch.float32",
    "torch.randn((5, 4, 48, 48), dtype=torch.float32)": "noise",
    "inputs_embeds.shape[1]+577": f"inputs_embeds.shape[1]+{_TOKENS + 1}",
    "[:, -576:, :]": f"[:, -{_TOKENS}:, :]",
    "24, 24, 768": f"{case.GRID}, {case.GRID}, {case.CHANNELS}",
}


def channels_first(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.moveaxis(array, -1, 1).copy())


def channels_last(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(tensor.numpy(), 1, -1))


def import_janus(path: Path) -> Any:
    """Imports DeepSeek's modules, whose dependencies expect an older Python."""
    for name in ("Mapping", "MutableMapping", "Sequence"):
        setattr(collections, name, getattr(collections.abc, name))
    # torchvision's operators are compiled and not needed; their names must exist
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor a, Tensor b, float c) -> Tensor")
    sys.path.insert(0, str(path))
    from janus.janusflow.models import modeling_vlm, siglip_vit  # pyright: ignore

    siglip_vit.SigLIP_MODEL_CONFIG["siglip_large_patch16_384"].update(case.TOWER)
    return modeling_vlm


def filled(module: torch.nn.Module) -> torch.nn.Module:
    state = {
        name: torch.from_numpy(case.weight(name, tuple(tensor.shape)))
        for name, tensor in module.state_dict().items()
    }
    module.load_state_dict(state)
    return module.eval().requires_grad_(False)


def shapes(module: torch.nn.Module) -> np.ndarray:
    """Returns a line per tensor, its name and shape."""
    return np.array([f"{name} {[*each.shape]}" for name, each in module.state_dict().items()])


def build(modeling: Any) -> Any:
    D, C, width = case.DIM, case.CHANNELS, case.TOWER["width"]
    config = modeling.MultiModalityConfig(**case.CONFIG)
    config.language_config._attn_implementation = "eager"
    model = modeling.MultiModalityCausalLM(config)
    model.vision_und_enc_aligner = torch.nn.Linear(width, D)
    model.beg_of_und_embed = torch.nn.Parameter(torch.zeros(1, D))
    model.vision_gen_enc_aligner = torch.nn.Linear(C, D)
    model.vision_gen_dec_aligner_norm = modeling.LlamaRMSNorm(D, eps=1e-6)
    model.vision_gen_dec_aligner = torch.nn.Linear(D, C)
    return filled(model)


def demo(path: Path, vl_gpt: Any, vae: Any, noise: torch.Tensor) -> Any:
    """Returns the demo's `generate`, in small."""
    source = (path / "demo" / "app_janusflow.py").read_text()
    (function,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "generate"
    )
    text = ast.get_source_segment(source, function)
    assert text
    for old, new in _REPLACED.items():
        assert old in text, old
        text = text.replace(old, new)
    processor = SimpleNamespace(pad_id=case.PAD)
    names = {"torch": torch, "np": np, "vl_gpt": vl_gpt, "vae": vae, "noise": noise}
    names["vl_chat_processor"] = processor
    exec(text, names)
    return names["generate"]


class Recording:
    """A VAE that keeps the latents it is given."""

    def __init__(self, vae: Any):
        self.vae, self.config, self.seen = vae, vae.config, torch.empty(0)

    def decode(self, latents: torch.Tensor) -> Any:
        self.seen = latents
        return self.vae.decode(latents)


def understanding(model: Any, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    ids = torch.from_numpy(given["ids"])
    pixels = channels_first(given["pixels"])
    embeds = model.prepare_inputs_embeds(
        input_ids=ids.clone(),
        pixel_values=pixels[None],
        images_seq_mask=(ids == case.PLACEHOLDER) | (ids == case.BEGIN),
        images_emb_mask=torch.ones(1, 2, _TOKENS + 1, dtype=torch.bool),
    )
    return {
        "features": model.vision_und_enc_aligner(model.vision_und_enc_model(pixels)).numpy(),
        "logits": model.language_model(inputs_embeds=embeds).logits.numpy(),
    }


def drawing(model: Any, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    encoded, time, (skip,) = model.vision_gen_enc_model(
        channels_first(given["latents"]), torch.from_numpy(given["times"]) * 1000
    )
    states = model.vision_gen_dec_aligner_norm(torch.from_numpy(given["states"]))
    states = model.vision_gen_dec_aligner(states).reshape(3, case.GRID, case.GRID, case.CHANNELS)
    velocity = model.vision_gen_dec_model(states.permute(0, 3, 1, 2), [skip], time)
    return {
        "encoded": channels_last(encoded),
        "time": time.numpy(),
        "velocity": channels_last(velocity),
    }


@torch.no_grad()
def run(path: Path) -> dict[str, np.ndarray]:
    modeling = import_janus(path)
    from diffusers import AutoencoderKL  # pyright: ignore

    given = case.inputs()
    model = build(modeling)
    vae: Any = filled(AutoencoderKL.from_config(case.VAE_CONFIG))
    noise = channels_first(given["noise"])
    found = understanding(model, given) | drawing(model, given)
    found |= {"names": shapes(model), "vae_names": shapes(vae)}
    encoded = vae.encode(channels_first(given["pixels"])).latent_dist
    found |= {
        "vae_mean": channels_last(encoded.mean),
        "vae_std": channels_last(encoded.std),
        "vae_decoded": channels_last(vae.decode(noise[:2]).sample),
    }
    for name, guidance in (("guided", case.GUIDANCE), ("plain", 1.0)):
        recording = Recording(vae)
        generate = demo(path, model, recording, noise)
        pictures = generate(torch.tensor(case.PROMPT), guidance, case.STEPS)
        found |= {name: channels_last(recording.seen), f"{name}_pictures": pictures}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("janus", type=Path)
    found = run(parser.parse_args().janus)
    np.savez_compressed(case.GOLDEN, **found)  # pyright: ignore
    print(f"{case.GOLDEN.name}: {case.GOLDEN.stat().st_size / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
