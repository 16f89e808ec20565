"""Pictures of given prompt ids as arrays, against those of the same prompts as PNG files."""

import argparse

import numpy as np
import PIL.Image
import pytest

from dsjax.checkpoint import load
from dsjax.infer import drawing, drawn_tokens
from dsjax.infer.drawing import drawing_format, encode
from tests.checkpoint.test_vae import tensors as vae_tensors
from tests.checkpoint.test_vae import write as write_vae
from tests.vision import toy

PROMPTS = ("a cat", "a dog")


def options(folder, **given):
    return argparse.Namespace(
        checkpoint=folder, **{"guidance": None, "temperature": None, "seed": 7, "steps": None,
        "vae": None, "codes": None, "prompt": None, "n": None, "max_batch": 2, "mesh": {},
        "dtype": "float32", "override": []} | given,
    )  # fmt: skip


def write_ids(folder, path):
    checkpoint = load.open_checkpoint(folder)
    form = drawing_format(checkpoint)
    np.save(path, [encode(checkpoint, form, prompt) for prompt in PROMPTS])
    return path


def check_pngs(folder, drawn, out, **given):
    """The PNG of each prompt shows what was drawn for its ids."""
    for row, prompt in enumerate(PROMPTS):
        drawing.run(options(folder, prompt=prompt, out=out / prompt, n=1, seed=7 + row, **given))
        with PIL.Image.open(out / prompt / f"{7 + row}.png") as picture:
            np.testing.assert_array_equal(picture, ((drawn[row] + 1) / 2 * 255).astype(np.uint8))


def test_rows_are_drawn_as_their_prompts_are(tmp_path):
    folder = toy.write(tmp_path / "janus")
    out, codes = tmp_path / "O.npy", tmp_path / "C.npy"
    tokens = write_ids(folder, tmp_path / "T.npy")
    drawn_tokens.run(options(folder, tokens=tokens, out=out, codes=codes))
    drawn, found = np.load(out), np.load(codes)
    assert drawn.dtype == np.float32 and np.abs(drawn).max() <= 1
    assert found.dtype == np.int32 and found.shape == (2, 4)
    assert (found[0] != found[1]).any() and (drawn[0] != drawn[1]).any()
    check_pngs(folder, drawn, tmp_path)


@pytest.fixture
def flowing(tmp_path, monkeypatch):
    toy.shrink_deepseeks(monkeypatch)
    folder = toy.write(tmp_path / "flow", "multi_modality", toy.flowing())
    return folder, write_vae(tmp_path / "vae", vae_tensors())


def test_a_flow_draws_for_ids_too(flowing, tmp_path):
    folder, vae = flowing
    tokens = write_ids(folder, tmp_path / "T.npy")
    given = {"vae": vae, "steps": 2}
    drawn_tokens.run(options(folder, tokens=tokens, out=tmp_path / "O.npy", **given))
    check_pngs(folder, np.load(tmp_path / "O.npy"), tmp_path, **given)


def test_a_flow_has_no_codes_and_needs_the_begin_token(flowing, tmp_path):
    folder, vae = flowing
    tokens, out = write_ids(folder, tmp_path / "T.npy"), tmp_path / "O.npy"
    with pytest.raises(ValueError, match="--codes does not apply"):
        drawn_tokens.run(options(folder, tokens=tokens, out=out, vae=vae, codes=tmp_path / "C.npy"))
    np.save(tokens, np.load(tokens)[:, :-1])
    with pytest.raises(ValueError, match="ends with <begin_of_image>"):
        drawn_tokens.run(options(folder, tokens=tokens, out=out, vae=vae))


def test_ids_leave_room_for_a_picture(tmp_path):
    folder = toy.write(tmp_path / "janus")
    np.save(tmp_path / "T.npy", np.ones((1, 509), int))
    with pytest.raises(ValueError, match="a prompt of 509 tokens and a picture of 4 exceed"):
        drawn_tokens.run(options(folder, tokens=tmp_path / "T.npy", out=tmp_path / "O.npy"))


def test_a_prompt_of_one_token_has_no_text_to_blank_out(tmp_path):
    folder = toy.write(tmp_path / "janus")
    np.save(tmp_path / "T.npy", [[toy.CONTROL["<begin_of_image>"]]])
    given = {"tokens": tmp_path / "T.npy", "temperature": 0.0}
    drawn = []
    for guidance in (1.0, 5.0):  # both rows are the same, so guidance changes nothing
        out = tmp_path / f"{guidance}.npy"
        drawn_tokens.run(options(folder, out=out, guidance=guidance, **given))
        drawn.append(np.load(out))
    np.testing.assert_allclose(*drawn, atol=1e-5)
