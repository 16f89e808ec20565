"""EleutherAI's lm-evaluation-harness itself, on tasks made here: what it reports is what the
model's logits say."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import dsjax
from dsjax.infer import score
from dsjax.infer.score import Scorer
from dsjax.infer.windows import TextFiles, read_text
from dsjax.text.tokenizer import load_tokenizer, train_tokenizer
from tests.checkpoint import hf_files
from tests.closeness import F32, assert_close
from tests.golden.cases import LLAMA, Case

pytestmark = [
    pytest.mark.torch,
    # The harness and the datasets library deprecate faster than they release.
    pytest.mark.filterwarnings("ignore"),
]
ROOT = Path(__file__).parents[2]
CONFIG = LLAMA | {"vocab_size": 320, "num_hidden_layers": 2, "max_position_embeddings": 64}
LIMIT = 64
CHOICES = [
    {"question": "the sky is", "choices": ["blue", "some more text", "x"], "answer": 0},
    {"question": "some text to read, ", "choices": ["once", "twice"], "answer": 1},
    {"question": "long " * 80, "choices": ["the end", "a beginning"], "answer": 0},
]
TEXTS = ["some text to score, some more text", "the sky is blue\n", "long, longer; " * 90]
PROMPTS = ["some text", "the sky is", "and so on, " * 30]
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}>"


def task(name, kind, **fields):
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
        "test_split": "test",
        "output_type": kind,
        "doc_to_text": "{{question}}",
        **fields,
    }


TASKS = {
    "tiny_choice": task(
        "tiny_choice",
        "multiple_choice",
        doc_to_choice="{{choices}}",
        doc_to_target="{{answer}}",
        metric_list=[{"metric": "acc"}],
    ),
    "tiny_rolling": task(
        "tiny_rolling",
        "loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
    ),
    "tiny_generate": task(
        "tiny_generate",
        "generate_until",
        doc_to_target="x",
        generation_kwargs={"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
    ),
}
DATA = {
    "tiny_choice": CHOICES,
    "tiny_rolling": [{"text": text} for text in TEXTS],
    "tiny_generate": [{"question": prompt} for prompt in PROMPTS],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with a tokenizer and a template, and the tasks."""
    root = tmp_path_factory.mktemp("harness")
    case = Case(CONFIG, seed=31)
    hf_files.write(root / "checkpoint", CONFIG, hf_files.plain(case))
    train_tokenizer([*TEXTS, *PROMPTS] * 3, vocab_size=320).save(str(root / "checkpoint"))
    (root / "checkpoint" / "chat_template.jinja").write_text(TEMPLATE)
    for name, config in TASKS.items():
        lines = "".join(json.dumps(line) + "\n" for line in DATA[name])
        (root / f"{name}.jsonl").write_text(lines)
        files = {"data_files": {"test": str(root / f"{name}.jsonl")}}
        # JSON is YAML too.
        (root / f"{name}.yaml").write_text(json.dumps(config | {"dataset_kwargs": files}))
    return root


@pytest.fixture(scope="module")
def environment(folder):
    offline = {name: "1" for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")}
    return offline | {"HF_HOME": str(folder / "cache"), "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="module")
def results(folder, environment):
    """The harness's report on all three tasks, batches of two rows."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        import lm_eval
        from lm_eval.tasks import TaskManager

        import dsjax.infer.harness  # noqa: F401  (registers the model)

        return lm_eval.simple_evaluate(
            model="dsjax",
            model_args=f"pretrained={folder / 'checkpoint'},dtype=float32",
            tasks=list(TASKS),
            task_manager=TaskManager(include_path=str(folder)),
            batch_size=2,
            bootstrap_iters=0,
        )


@pytest.fixture(scope="module")
def model(folder):
    return dsjax.load(folder / "checkpoint", dtype="float32")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(str(folder / "checkpoint"))


@pytest.fixture(scope="module")
def log_probabilities(model):
    """float64 [n, V] of up to 64 tokens, each row of the token that follows."""
    run = jax.jit(model)

    def compute(ids):
        filled = np.resize(np.array(ids, np.int32), (1, LIMIT))
        logits = np.asarray(run(filled)[0, : len(ids)], np.float64)
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    return compute


def responses(results, name):
    """Of each document in the data's order: what the model answered."""
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"] for sample in samples]


def test_choices_have_the_log_likelihood_of_their_tokens(results, tokenizer, log_probabilities):
    """The blank before a choice goes with it, wherever it stood; a long question loses its
    beginning."""
    right = 0
    for line, answers in zip(CHOICES, responses(results, "tiny_choice"), strict=True):
        values = []
        for choice, (value, greedy) in zip(line["choices"], answers, strict=True):
            context = [tokenizer.special.bos, *tokenizer.encode(line["question"].rstrip())]
            blank = line["question"][len(line["question"].rstrip()) :] + " "
            whole = [tokenizer.special.bos]
            whole += tokenizer.encode(line["question"].rstrip() + blank + choice)
            count = len(whole) - len(context)
            ids = whole[-(LIMIT + 1) :]
            found = log_probabilities(ids[:-1])[-count:]
            want = np.take_along_axis(found, np.array(ids[-count:])[:, None], axis=1).sum()
            assert_close(float(value), want, F32, choice)
            assert bool(greedy) == (found.argmax(axis=1) == ids[-count:]).all()
            values.append(want)
        right += int(np.argmax(values)) == line["answer"]
    assert results["results"]["tiny_choice"]["acc,none"] == right / len(CHOICES)


def test_rolling_predicts_every_token_once(results, tokenizer, log_probabilities):
    """Windows of 64 that overlap no more than the last one has to: the harness's own rule."""
    from lm_eval.utils import get_rolling_token_windows

    assert len(tokenizer.encode(TEXTS[-1])) > 2.5 * LIMIT
    total = 0.0
    for text, value in zip(TEXTS, responses(results, "tiny_rolling"), strict=True):
        want = 0.0
        ids = tokenizer.encode(text)
        for read, predicted in get_rolling_token_windows(ids, tokenizer.special.bos, LIMIT, 1):
            found = log_probabilities(read)[-len(predicted) :]
            want += np.take_along_axis(found, np.array(predicted)[:, None], axis=1).sum()
        (got,) = value
        assert_close(float(got), want, F32, text[:20])
        total += want
    n_bytes = sum(len(text.encode()) for text in TEXTS)
    got = results["results"]["tiny_rolling"]["bits_per_byte,none"]
    assert_close(got, -total / math.log(2) / n_bytes, F32, "bits per byte")


def test_bits_per_byte_are_those_of_the_scoring_command(results, folder, model, tmp_path):
    """On texts that fit one window, where both rules are one."""
    values = responses(results, "tiny_rolling")[:2]
    (tmp_path / "short.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in TEXTS[:2])
    )
    files = TextFiles([str(tmp_path / "short.jsonl")])
    text = read_text(files, folder / "checkpoint", 320)
    scored = score.score_text(Scorer(model), text, length=LIMIT)
    assert_close(-sum(float(value[0]) for value in values), scored.nats, F32, "nats")


def test_generation_is_greedy_and_stops(results, tokenizer, log_probabilities):
    for prompt, (text,) in zip(PROMPTS, responses(results, "tiny_generate"), strict=True):
        ids = [tokenizer.special.bos, *tokenizer.encode(prompt)][-(LIMIT - 12) :]
        new: list[int] = []
        while len(new) < 12 and tokenizer.special.eos not in new:
            new.append(int(log_probabilities(ids + new)[-1].argmax()))
        want = tokenizer.decode([i for i in new if i != tokenizer.special.eos]).split("\n\n")[0]
        assert text == want


def generate(harness, prompt, **settings):
    from lm_eval.api.instance import Instance

    request = Instance("generate_until", doc={}, arguments=(prompt, settings), idx=0)
    return harness.generate_until([request], disable_tqdm=True)[0]


@pytest.fixture(scope="module")
def harness(folder):
    from dsjax.infer.harness import DsjaxLM

    return DsjaxLM(str(folder / "checkpoint"), dtype="float32", max_batch_size=None, device="cpu")


def test_generation_stops_before_a_stop_string(harness):
    whole = generate(harness, "some text", max_gen_toks=12)
    stop = whole[3:5]
    assert generate(harness, "some text", max_gen_toks=12, until=[stop]) == whole.split(stop)[0]
    assert generate(harness, "some text", max_new_tokens=12, until=stop) == whole.split(stop)[0]


def test_sampled_generation_has_a_seed_for_each_request(harness):
    from lm_eval.api.instance import Instance

    settings = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 8}
    requests = [Instance("generate_until", {}, ("some text", settings), i) for i in range(3)]
    texts = harness.generate_until(requests, disable_tqdm=True)
    assert len(set(texts)) > 1 and harness.generate_until(requests, disable_tqdm=True) == texts


def test_settings_of_tasks_are_read():
    from dsjax.infer.harness import read_settings

    def read(**settings):
        return read_settings(settings, max_gen_toks=256, seed=3)

    stops, count, sampling = read(until="a", do_sample=False, temperature=0.7, num_beams=1)
    assert (stops, count, sampling.temperature, sampling.seed) == (["a"], 256, 0.0, 3)
    stops, count, sampling = read(until=["a", "", "b"], max_tokens=7, temperature=0.6, top_p=0.9)
    assert (stops, count, sampling.temperature, sampling.top_p) == (["a", "b"], 7, 0.6, 0.9)
    assert read(do_sample=True)[2].temperature == 1.0
    assert read()[2].temperature == 0.0
    with pytest.raises(ValueError, match=r"generation_kwargs num_beams=4, length_penalty=2: dsjax"):
        read(num_beams=4, length_penalty=2)


def test_arguments_are_checked(folder):
    from dsjax.infer.harness import DsjaxLM

    path = str(folder / "checkpoint")
    with pytest.raises(ValueError, match="--model_args trust_remote_code: unknown to model dsjax"):
        DsjaxLM(path, trust_remote_code=True)
    with pytest.raises(ValueError, match="max_length=65 is not between 2 and the model's 64"):
        DsjaxLM(path, max_length=65)
    with pytest.raises(ValueError, match="batch_size='many' is neither a whole number above 0 nor"):
        DsjaxLM(path, batch_size="many")


def test_generation_needs_room_for_a_prompt(harness):
    with pytest.raises(ValueError, match="max_gen_toks=64 leaves no room for a prompt in max_len"):
        generate(harness, "some text", max_gen_toks=64)


def test_chat_template_is_applied_and_its_begin_token_is_one(harness, tokenizer):
    turns = [{"role": "user", "content": "some text"}]
    begun = [*turns, {"role": "assistant", "content": "the sky"}]
    text = harness.apply_chat_template(turns)
    assert text.endswith("[user]some text>") and harness.encode(text)[0] == tokenizer.special.bos
    assert tokenizer.special.bos not in harness.encode(text)[1:]
    assert harness.apply_chat_template(begun, add_generation_prompt=False) == text + "the sky"
    assert harness.chat_template(True) == TEMPLATE and harness.chat_template(False) is None
    assert "/" not in harness.tokenizer_name


def test_base_model_has_no_chat_template(harness, monkeypatch):
    monkeypatch.setattr(harness, "form", None)
    with pytest.raises(ValueError, match=r"has no chat template .* run without --apply_chat_templ"):
        harness.apply_chat_template([{"role": "user", "content": "x"}])
    assert harness.chat_template(True) is None


def test_empty_context_and_continuation(harness, tokenizer, log_probabilities):
    from lm_eval.api.instance import Instance

    pairs = [("", "some text"), ("some text", "")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    (value, _), nothing = harness.loglikelihood(requests, disable_tqdm=True)
    ids = [tokenizer.special.bos, *tokenizer.encode("some text")]
    found = log_probabilities(ids[:-1])
    assert_close(value, np.take_along_axis(found, np.array(ids[1:])[:, None], axis=1).sum(), F32)
    assert nothing == (0.0, True)


def test_white_space_alone_is_scored_after_the_first_token(
    harness, tokenizer, log_probabilities, monkeypatch
):
    """As an empty context is, whether or not the tokenizer asks for a begin token. (Without one
    the harness's own model has nothing to predict from, and fails.)
    """
    from lm_eval.api.instance import Instance

    for begins, first in ((True, tokenizer.special.bos), (False, tokenizer.special.eos)):
        vocabulary = dataclasses.replace(harness.vocabulary, begins=begins)
        monkeypatch.setattr(harness, "vocabulary", vocabulary)
        request = Instance("loglikelihood", {}, (" \n", "some text"), 0)
        ((value, _),) = harness.loglikelihood([request], disable_tqdm=True)
        ids = [first, *tokenizer.encode(" \nsome text")]
        found = log_probabilities(ids[:-1])
        want = np.take_along_axis(found, np.array(ids[1:])[:, None], axis=1).sum()
        assert_close(value, want, F32, f"begins: {begins}")


def test_command_line_finds_the_model(folder, environment):
    """As the README has it, in a process of its own."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "dsjax.infer.harness", "run", "--model", "dsjax"),
            *("--model_args", f"pretrained={folder / 'checkpoint'},dtype=float32"),
            *("--tasks", "tiny_rolling", "--include_path", str(folder), "--limit", "1"),
        ],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "bits_per_byte" in done.stdout and "tiny_rolling" in done.stdout
