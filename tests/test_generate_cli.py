"""tools/generate.py as a user runs it, on checkpoints as Hugging Face publishes them."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax import load
from dsjax.text.tokenizer import train_tokenizer
from tests.checkpoint import hf_files
from tests.golden.cases import LLAMA, V3, Case

ROOT = Path(__file__).parents[1]
VOCABULARY = 300
DENSE = LLAMA | {"vocab_size": VOCABULARY, "num_hidden_layers": 1}
CONFIG = V3 | {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 2,
    "num_nextn_predict_layers": 1,
}
TEXT = "Some text to begin with, with \u00fcmlauts; some more text.\n" * 6


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate") / "dense"
    hf_files.write(folder, DENSE, hf_files.plain(Case(DENSE, seed=5)))
    train_tokenizer([TEXT] * 3, vocab_size=VOCABULARY).save(str(folder))
    return folder


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, "tools/generate.py", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        **options,
    )


def likeliest(model, prompts, n_tokens):
    """Greedy continuations by running the whole text again for each token."""
    length = prompts.shape[1]
    tokens = jnp.zeros((len(prompts), length + n_tokens), jnp.int32).at[:, :length].set(prompts)

    @jax.jit
    def step(model, tokens, at):
        return tokens.at[:, at].set(jnp.argmax(model(tokens)[:, at - 1], axis=-1).astype(jnp.int32))

    for at in range(length, length + n_tokens):
        tokens = step(model, tokens, at)
    return np.asarray(tokens[:, length:])


@pytest.mark.heavy
def test_tokens_continue_as_the_whole_model_says(tmp_path):
    """Also when drafted by the MTP module, and on a mesh; and no tokenizer is needed."""
    checkpoint = hf_files.write(tmp_path / "v3", CONFIG, hf_files.plain(Case(CONFIG, seed=5)))
    prompts = np.random.default_rng(0).integers(0, VOCABULARY, (2, 9))
    np.save(tmp_path / "P.npy", prompts)
    files = ["--tokens", tmp_path / "P.npy", "--out", tmp_path / "O.npy", "--max-new-tokens", "12"]
    greedy = ["--temperature", "0", "--dtype", "float32"]
    done = run(checkpoint, *files, *greedy, "--speculative", "--mesh", "tensor=2")
    assert done.returncode == 0, done.stderr
    new = np.load(tmp_path / "O.npy")
    assert new.dtype == np.int32
    np.testing.assert_array_equal(new, likeliest(load(checkpoint, dtype="float32"), prompts, 12))
    assert "prompt: 18 tokens (" in done.stderr and "% of drafts accepted, " in done.stderr


@pytest.mark.heavy
def test_chat_through_a_pipe(dense, tmp_path):
    folder = shutil.copytree(dense, tmp_path / "chat")
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role[0] + ': ' + m.content }}{% endfor %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    options = ["--max-new-tokens", "4", "--seed", "1"]
    done = run(folder, *options, input="Some text\n/reset\nSome text\n/exit\nunread\n")
    assert done.returncode == 0, done.stderr
    half = len(done.stdout) // 2
    assert done.stdout[:half] == done.stdout[half:] != "\n"
    assert done.stderr.count("reply: 4 tokens") == 2


@pytest.mark.heavy
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -15)])
def test_signal_ends_generation_at_once(dense, number, code):
    """Once it writes; what was written stays whole, and nothing else has to be saved."""
    arguments = [dense, "--raw", "--prompt", "Some text", "--max-new-tokens", "1900"]
    process = subprocess.Popen(
        [sys.executable, "tools/generate.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stdout.read(1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code and b"Traceback" not in errors


def test_base_model_does_not_chat(dense):
    done = run(dense, input="hi\n")
    assert done.returncode == 1 and done.stdout == ""
    assert "has no chat template" in done.stderr and "give a --prompt" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "P.npy", "--prompt", "a"], "not allowed with argument"),
        (["--tokens", "P.npy"], "--tokens P.npy and --out O.npy go together"),
        (["--prompt", "a", "--out", "O.npy"], "--tokens P.npy and --out O.npy go together"),
        (["--tokens", "P", "--out", "O", "--stop", "x"], "are for text, not for --tokens"),
        (["--raw"], "--raw needs a --prompt to continue"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0 is not at least 1"),
        (["--temperature", "hot"], "invalid float value: 'hot'"),
    ],
    ids=["both", "no out", "no tokens", "stop", "raw", "none", "temperature"],
)
def test_wrong_usage_exits_2_without_jax(arguments, message):
    done = run("checkpoint", *arguments)
    assert done.returncode == 2 and message in done.stderr


def test_help_needs_no_jax():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "tools/generate.py", "--help"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    for module in ("jax", "numpy", "jinja2", "tokenizers"):
        assert f" {module}\n" not in done.stderr
