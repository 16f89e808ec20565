"""Makes vl2.npz anew, with DeepSeek's own code.

Run: PYTHONPATH=.:DeepSeek-VL2 python -m tests.golden.make_vl2
Expected: vl2.npz beside this file, below 200 KB, in a minute on one core; the same numbers to
float32 rounding on any machine.

Needs the repository deepseek-ai/DeepSeek-VL2 (ef9f91e) and an environment of its own, since that
code fails with later versions: transformers 4.38.2, tokenizers 0.15.2, huggingface_hub 0.25.2,
timm 1.0.12, einops, attrdict, torch, torchvision and ml_dtypes. Its one call of
xformers is torch's attention here, which is the same function.
"""

from __future__ import annotations

import collections
import collections.abc
import sys
import types
from typing import Any

import numpy as np
import torch

from tests.golden import vl2


def _stand_in() -> None:
    """Provides what DeepSeek's code imports and CPUs or new Pythons lack."""
    for name in ("Mapping", "MutableMapping", "Sequence"):
        setattr(collections, name, getattr(collections.abc, name))

    def attention(q: Any, k: Any, v: Any, p: float) -> Any:
        assert p == 0
        heads_first = (each.transpose(1, 2) for each in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)

    ops: Any = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = attention
    sys.modules |= {"xformers": types.ModuleType("xformers"), "xformers.ops": ops}


def _processor(side: int, patch: int) -> Any:
    from deepseek_vl2.models.processing_deepseek_vl_v2 import (  # pyright: ignore
        DeepseekVLV2Processor,
    )
    from transformers import LlamaTokenizerFast

    tokenizer = LlamaTokenizerFast(
        tokenizer_object=vl2.tokenizer(), bos_token=vl2.BOS, eos_token=vl2.EOS, unk_token=None
    )
    sizes = tuple((wide, high) for wide, high in vl2.resolutions(side))
    return DeepseekVLV2Processor(tokenizer, sizes, patch_size=patch, downsample_ratio=2)


def _grids() -> dict[str, np.ndarray]:
    from deepseek_vl2.models.processing_deepseek_vl_v2 import (  # pyright: ignore
        select_best_resolution,
    )

    sizes = [tuple(map(int, size)) for size in vl2.sizes()]
    chosen = [select_best_resolution(size, vl2.resolutions(384)) for size in sizes]
    return {"grids": (np.array(chosen) // 384).astype(np.int8)}


def _pictures() -> dict[str, np.ndarray]:
    processor = _processor(384, 14)
    digests, counts = [], []
    for size in vl2.AWKWARD:
        _, tiles, _, grid, count = processor.tokenize_with_images("<image>", [vl2.picture(size)])
        digests.append([vl2.digest(tile.permute(1, 2, 0).numpy()) for tile in tiles])
        counts.append([*grid[0], *count])
    most = max(map(len, digests))
    padded = [some + [""] * (most - len(some)) for some in digests]
    return {"tiles": np.array(padded), "counts": np.array(counts, np.int16)}


def _outputs(case: str, config: dict[str, Any]) -> dict[str, np.ndarray]:
    from deepseek_vl2.models.modeling_deepseek_vl_v2 import (  # pyright: ignore
        DeepseekVLV2Config,
        DeepseekVLV2ForCausalLM,
    )

    settings = {name: value for name, value in config.items() if name != "architectures"}
    described = DeepseekVLV2Config(**settings)
    described.language_config._attn_implementation = "eager"
    model = DeepseekVLV2ForCausalLM(described).eval()
    weights = {name: torch.from_numpy(each) for name, each in vl2.published(config).items()}
    model.load_state_dict(weights, strict=True)
    processor = _processor(vl2.SIDE, vl2.PATCH)
    made: dict[str, np.ndarray] = {}
    for name, turns in vl2.CONVERSATIONS.items():
        shown = [vl2.picture(size) for _, _, sizes in turns for size in sizes]
        messages = [{"role": role, "content": text} for role, text, _ in turns]
        inputs = processor(
            conversations=[*messages, {"role": "<|Assistant|>", "content": ""}], images=shown
        )
        mask = inputs.images_seq_mask[0]
        with torch.no_grad():
            x = model.prepare_inputs_embeds(
                inputs.input_ids, inputs.images, inputs.images_seq_mask, inputs.images_spatial_crop
            )
            made[f"{case}/{name}/embeddings"] = x[0, mask].numpy()
            tokens: list[int] = []
            for _ in range(vl2.NEW_TOKENS):
                logits = model.language(inputs_embeds=x, use_cache=False).logits
                if not tokens:
                    made[f"{case}/{name}/logits"] = logits[0, -vl2.POSITIONS :].numpy()
                tokens.append(int(logits[0, -1].argmax()))
                new = model.language.get_input_embeddings()(torch.tensor([tokens[-1:]]))
                x = torch.cat([x, new], dim=1)
        made[f"{case}/{name}/tokens"] = np.array(tokens, np.int32)
        made[f"{name}/ids"] = inputs.input_ids[0].numpy().astype(np.int32)
    return made


def main() -> None:
    torch.set_num_threads(1)
    _stand_in()
    import PIL
    import transformers

    made = _grids() | _pictures()
    for case, config in vl2.CASES.items():
        made |= _outputs(case, config)
    versions = (
        f"DeepSeek-VL2 ef9f91e, transformers {transformers.__version__}, torch "
        f"{torch.__version__}, Pillow {PIL.__version__}"
    )
    np.savez_compressed(vl2.FILE, versions=np.array(versions), **made)  # pyright: ignore
    print(f"{vl2.FILE.name}: {vl2.FILE.stat().st_size / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
