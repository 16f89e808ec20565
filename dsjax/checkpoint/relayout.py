"""Writes a model that sees in the other layout: DeepSeek's own as transformers', or the reverse.

`export` calls it for a published folder of Janus, which is not imported before. The numbers do not
change; names, orientation, and the tensors that hold queries, keys and values do. transformers'
layout has no place for what no model reads, a pooling head, idle norms and counts of codes: going
there leaves them out, and coming back does not bring them back (DeepSeek's code warns, and computes
the same).

config.json and preprocessor_config.json are written anew. In DeepSeek's preprocessing a fraction of
a pixel is cut, in transformers' it is rounded, so a few pictures end up a row taller. The smaller
picture of DeepSeek-VL 7B is made from the larger one's numbers in DeepSeek's, bicubically from the
picture in transformers'.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np

from dsjax import __version__
from dsjax.checkpoint import families, names
from dsjax.checkpoint.eyes import load_eyes, published
from dsjax.checkpoint.families import multi_modality
from dsjax.checkpoint.hf_config import to_hf
from dsjax.checkpoint.importing import copy_side_files, side_files
from dsjax.checkpoint.load import BFLOAT16, FLOAT32, Checkpoint
from dsjax.checkpoint.staging import Converted, Staging, check_space, fingerprint
from dsjax.checkpoint.tensor_files import plan_shards, write_index, write_shard
from dsjax.config.vision import VisionConfig
from dsjax.display import Transfer
from dsjax.files import write_json, writing
from dsjax.text.vocabulary import open_vocabulary
from dsjax.vision import pictures

DEEPSEEKS = multi_modality.MULTI_MODALITY.name
_PLACEHOLDER = "<image_placeholder>"
_WRITTEN = ("config.json", pictures.RULES_FILE)


def relayout(checkpoint: Checkpoint, target: Path, progress: Transfer) -> Converted:
    """Creates the folder `target`.

    Raises:
      ValueError: the other layout cannot describe the model, or the disk is too full.
      OSError: a file cannot be read or written.
    """
    started, hf = time.monotonic(), checkpoint.hf
    assert hf is not None and hf.beside is not None
    family, dtype = _other(hf.family, hf.beside.vision), _dtype(checkpoint)
    sight = families.find(family).sight
    assert sight is not None
    tokens = {} if family == DEEPSEEKS else {"image_token": _image_token(checkpoint)}
    config, vision = _described(checkpoint, family, hf.beside.vision, tokens, dtype)
    own = {(row.tensor.path, row.tensor.slot): row.tensor.name for row in hf.rows}
    sources = {
        tensor.name: own[tensor.path, tensor.slot] for tensor in names.tensors(hf.model, family)
    }
    small = [file for file in side_files(hf.path) if file.name not in _WRITTEN]
    shapes = {tensor.name: tensor.shape for tensor in names.tensors(hf.model, family)}
    parts = list(sight.parts(vision))
    shapes |= {part.name: part.shape for part in parts}
    shards = plan_shards((name, dtype, shape) for name, shape in shapes.items())
    total = sum(tensor.n_bytes for shard in shards for tensor in shard.tensors)
    check_space(target, total)
    identity = {
        "dsjax": __version__,
        "the source": str(hf.path),
        "the state of its files": fingerprint(list(hf.files.files)),
    }
    with Staging(target, identity, progress.say) as work, writing(work.content):
        left = [shard for shard in shards if shard.file_name not in work.finished]
        to_do = sum(tensor.n_bytes for shard in left for tensor in shard.tensors)
        progress.begin("exporting", total, total - to_do)
        seen = published(load_eyes(checkpoint, dtype=dtype), parts) if left else {}

        def produce(name: str) -> np.ndarray:
            array = seen[name] if name in seen else hf.files.read(sources[name])
            progress.advance(array.size * dtype.itemsize)
            return array.astype(dtype, copy=False)

        for shard in left:
            write_shard(work.content, shard, produce)
            work.finish(shard.file_name)
        progress.stop()
        write_index(work.content, shards)
        copy_side_files(small, work.content)
        write_json(work.content / pictures.RULES_FILE, _rules(checkpoint, family))
        write_json(work.content / "config.json", config)
        work.publish()
    return Converted(sum(len(shard.tensors) for shard in left), to_do, time.monotonic() - started)


def _dtype(checkpoint: Checkpoint) -> np.dtype:
    """Returns the dtype that holds every number of the folder: its own if all are bfloat16.

    Raises:
      ValueError: weights are in FP8.
    """
    assert checkpoint.hf is not None
    if checkpoint.has_fp8:
        raise ValueError(f"{checkpoint.path} is in FP8, which this layout's readers do not expect")
    stored = {info.dtype for info in checkpoint.hf.files.tensors.values()}
    return BFLOAT16 if stored == {BFLOAT16} else FLOAT32


def _other(family: str, vision: VisionConfig) -> str:
    """Returns the family of the other layout.

    Raises:
      ValueError: dsjax has but this one of the model.
    """
    if vision.flow or vision.tiles:
        raise ValueError(
            f"family {family} is the only layout that dsjax has of this model; name the folder as "
            "it is"
        )
    if family != DEEPSEEKS:
        return DEEPSEEKS
    if vision.high:
        return "deepseek_vl_hybrid"
    return "janus" if vision.vq else "deepseek_vl"


def _described(
    checkpoint: Checkpoint,
    family: str,
    vision: VisionConfig,
    tokens: dict[str, Any],
    dtype: np.dtype,
) -> tuple[dict[str, Any], VisionConfig]:
    """Returns the config.json, and the shape of what is written.

    Raises:
      ValueError: the layout cannot say it.
    """
    unread = family == DEEPSEEKS
    usage = multi_modality.VQ.usage if unread else 0
    vq = vision.vq and dataclasses.replace(vision.vq, usage=usage)
    tower = dataclasses.replace(vision.tower, pool=unread)
    idle = unread and vision.high is not None
    said = dataclasses.replace(
        vision, tower=tower, idle_norms=idle, vq=vq, **({"image_token": None} | tokens)
    )
    config = to_hf(checkpoint.model, family, dtype=dtype.name, vision=said)
    tower, vq = dataclasses.replace(tower, pool=False), vq and dataclasses.replace(vq, usage=0)
    return config, dataclasses.replace(said, tower=tower, idle_norms=False, vq=vq)


def _image_token(checkpoint: Checkpoint) -> int:
    folder = checkpoint.tokenizer_folder
    control = open_vocabulary(folder, checkpoint.model.vocab_size).coder.control
    if _PLACEHOLDER not in control:
        raise ValueError(
            f"{folder}: the tokenizer has no {_PLACEHOLDER}, which stands for a picture; copy it "
            "again from the release"
        )
    return control[_PLACEHOLDER]


def _rules(checkpoint: Checkpoint, family: str) -> dict[str, Any]:
    """Returns the preprocessor_config.json.

    Raises:
      ValueError: the layout cannot say how this model's pictures are read.
    """
    assert checkpoint.hf is not None and checkpoint.hf.beside is not None
    vision = checkpoint.hf.beside.vision
    low = vision.tower.image_size if vision.high else None
    rules = pictures.read_rules(checkpoint.path, low=low)
    if vision.high and not rules.high:
        raise ValueError(
            f"{checkpoint.path / pictures.RULES_FILE} has no high_res_size, the size of what the "
            "larger of two towers sees; copy the file again from the release"
        )
    if family == DEEPSEEKS:
        return _deepseeks_rules(rules)
    name = {
        "janus": "Janus",
        "deepseek_vl": "DeepseekVL",
        "deepseek_vl_hybrid": "DeepseekVLHybrid",
    }[family]
    if rules.high and rules.high.fill not in (None, rules.high.mean):
        raise ValueError(
            f"{checkpoint.path}: image_mean={list(rules.high.fill)} in {pictures.RULES_FILE} is "
            f"the colour of the border, which in this layout is {list(rules.high.mean)}"
        )
    high = rules.high and {
        f"high_res_{key}": value for key, value in _said(rules.high, squares=True).items()
    }
    return {
        **_said(rules, squares=True),
        **(high or {}),
        "image_processor_type": f"{name}ImageProcessor",
        "processor_class": f"{name}Processor",
        "do_resize": True,
        "do_rescale": True,
        "do_pad": True,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
        "min_size": rules.least,
    }


def _deepseeks_rules(rules: pictures.Rules) -> dict[str, Any]:
    """Returns the file that DeepSeek's code reads, whose two towers normalize themselves."""
    if rules.high:
        norms = (rules.high.mean, rules.high.std), (rules.mean, rules.std)
        if norms != (pictures.SAM_NORM, pictures.SIGLIP_NORM):
            raise ValueError(
                f"means and deviations of {norms} are not the {pictures.SAM_NORM}, "
                f"{pictures.SIGLIP_NORM} of DeepSeek-VL 7B, the only ones that its layout says"
            )
    return {
        **_said(rules.high or rules, squares=False),
        "image_processor_type": "VLMImageProcessor",
        "processor_class": "VLChatProcessor",
        "do_normalize": rules.high is None,
        "rescale_factor": 1 / 255,
        "min_size": rules.least,
    }


def _said(rules: pictures.Rules, *, squares: bool) -> dict[str, Any]:
    """Returns size, mean, deviation and border of one picture.

    Args:
      squares: the size is written as height and width.
    """
    size = {"height": rules.size, "width": rules.size}
    return {
        **({"size": size} if squares else {"image_size": rules.size}),
        "image_mean": list(rules.mean),
        "image_std": list(rules.std),
        "background_color": list(rules.border),
    }
