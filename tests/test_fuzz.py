"""Every parser of files that strangers write: what it does not like is a ValueError that names the
file, whatever the bytes; never another exception, a hang, or memory without bound.

The default run draws a seeded few; `-m slow` draws 10,000 for each parser.
"""

import contextlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsjax import files
from dsjax import settings as configs
from dsjax.checkpoint import manifest, vae
from dsjax.checkpoint.hf_config import to_hf
from dsjax.checkpoint.inspection import summarize
from dsjax.checkpoint.load import open_checkpoint
from dsjax.checkpoint.tensor_files import open_folder
from dsjax.infer.answers import default_sampling
from dsjax.infer.token_files import read_tokens
from dsjax.janus.pairs import read_pairs
from dsjax.janus.questions import read_questions
from dsjax.vision.pictures import read_rules
from tests.checkpoint.conversions import seal
from tests.golden import janusflow, vl2
from tests.golden.cases import CASES
from tests.vision import toy

FEW, MANY = 15, 10_000

WORDS = st.sampled_from(
    ["__metadata__", "dtype", "shape", "data_offsets", "weight_map", "model_type", "auto_map"]
)
NUMBERS = (
    st.integers(-(2**65), 2**65) | st.floats() | st.sampled_from([0, -1, 2**31 - 1, 2**63, 1e308])
)
LEAVES = st.none() | st.booleans() | NUMBERS | st.text(max_size=8) | WORDS | st.just("../../x")
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(WORDS | st.text(), inner, max_size=4)
    ),
    max_leaves=12,
)


@st.composite
def changed(draw, original):
    """An object with some of its values exchanged, however deep, dropped or made twice."""
    values = json.loads(json.dumps(original))
    for _ in range(draw(st.integers(1, 3))):
        node = values
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(node[key], dict | list) and node[key] and draw(st.booleans()):
                node = node[key]
                continue
            if isinstance(node, dict) and draw(st.integers(0, 3)) == 0:
                del node[key]
            else:
                node[key] = draw(VALUES)
            break
    return json.dumps(values).encode()


@st.composite
def damaged(draw, original):
    """Bytes with some of them changed, cut out, or put in."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data)))
        piece = draw(st.binary(max_size=9))
        data[place : place + draw(st.integers(0, 9))] = piece
    return bytes(data)


def either(values):
    return changed(values) | damaged(json.dumps(values).encode()) | st.binary(max_size=64)


def npy():
    with tempfile.TemporaryFile() as file:
        np.save(file, np.arange(12, dtype=np.int32).reshape(2, 6))
        file.seek(0)
        return file.read()


def safetensors():
    entries = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + bytes(24)


def sealed(folder):
    """A manifest that is in order, for some files."""
    (folder / "a").write_bytes(b"12")
    manifest.write(folder, manifest.Manifest({"step": 1}, {}, manifest.hash_files(folder, ["a"])))
    return (folder / manifest.NAME).read_bytes()


def index(folder):
    (folder / "model-1.safetensors").write_bytes(safetensors())
    open_folder(folder)


def converted(folder):
    (folder / "weights").mkdir()
    seal(folder)
    open_checkpoint(folder)


def implied(folder):
    """What tools/convert.py inspect --expect makes of a config: all tensors that it implies."""
    summarize(folder / "config.json", expect=True)


def asked(folder):
    (folder / "0.png").touch()
    read_questions(str(folder / "asked.json"))


def paired(folder):
    (folder / "0.png").touch()
    list(read_pairs(str(folder / "pairs.json"), folder, key="janus.see"))


MANIFEST = sealed(Path(tempfile.mkdtemp()))
V3 = CASES["v3"].config
RUN = configs.to_dict(configs.load_config(Path(__file__).parents[1] / "configs" / "tiny.py"))
GENERATION = {"temperature": 0.6, "top_p": 0.95, "eos_token_id": [1, 2], "do_sample": True}
INDEX = {"metadata": {"total_size": 24}, "weight_map": {"a": "model-1.safetensors"}}
JANUS = to_hf(toy.LANGUAGE, "janus", dtype="float32", vision=toy.VISION)
RULES = {
    "image_size": 9, "size": {"height": 9, "width": 9}, "min_size": 2, "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3, "resample": 3, "do_normalize": True, "high_res_size": None,
}  # fmt: skip
ASKED = [
    {"image": "0.png", "question": "?", "answer": ["x", "y"]},
    {"image": "0.png", "question": "?", "answer": "A", "options": "['x', 'y']"},
]
PAIRS = [
    {"image": "0.png", "caption": "x"},
    {"image": "0.png", "question": "?", "answer": "x"},
]
CONVERTED = {"dsjax": "0", "family": "deepseek_v3", "model": RUN["model"]}

# What is read, from a file of which name, by whom, and what is drawn for it.
PARSERS = {
    "json": ("x.json", lambda folder: files.read_json(folder / "x.json"), either(V3)),
    "safetensors": ("model.safetensors", open_folder, damaged(safetensors())),
    "index": ("model.safetensors.index.json", index, either(INDEX)),
    "hf_config": ("config.json", implied, either(V3)),
    "janus": ("config.json", implied, changed(JANUS)),
    "vl2": ("config.json", implied, changed(vl2.CASES["latent"])),
    "vae": (
        "config.json",
        lambda folder: vae.read(files.read_json(folder / "config.json")),
        either(janusflow.VAE_CONFIG),
    ),
    "rules": ("preprocessor_config.json", read_rules, either(RULES)),
    "tiles": (
        "processor_config.json",
        lambda folder: read_rules(folder, tiles=True),
        either(vl2.PROCESSOR),
    ),
    "questions": ("asked.json", asked, either(ASKED)),
    "pairs": ("pairs.json", paired, either(PAIRS)),
    "run_config": ("config.json", configs.load_config, either(RUN)),
    "converted": ("config.json", converted, either(CONVERTED)),
    "manifest": ("manifest.json", manifest.verify, damaged(MANIFEST)),
    "generation_config": ("generation_config.json", default_sampling, either(GENERATION)),
    "tokens": (
        "t.npy",
        lambda folder: read_tokens(folder / "t.npy", 100, max_length=8),
        damaged(npy()),
    ),
}


def survive(name, count):
    file, read, drawn = PARSERS[name]

    @settings(
        max_examples=count,
        derandomize=count == FEW,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(drawn)
    def parse(data):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / file).write_bytes(data)
            with contextlib.suppress(ValueError):
                read(folder)
            made = {file, "weights", "manifest.json", "model-1.safetensors", "0.png"}
            assert set(os.listdir(folder)) <= made

    parse()


@pytest.mark.parametrize("name", PARSERS)
def test_parser_reads_or_refuses(name):
    survive(name, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("name", PARSERS)
def test_parser_reads_or_refuses_ten_thousand(name):
    survive(name, MANY)
