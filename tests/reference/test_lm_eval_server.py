"""EleutherAI's lm-evaluation-harness as a client of the server: it reports of a served model what
it reports of the same checkpoint in transformers."""

from __future__ import annotations

import json

import pytest

from dsjax.text.tokenizer import train_tokenizer
from tests.checkpoint import hf_files
from tests.closeness import F32, assert_close
from tests.golden.cases import LLAMA, Case
from tests.reference.test_lm_eval import DATA, PROMPTS, TASKS, TEMPLATE, TEXTS
from tests.serve.serving import serve

pytestmark = [
    pytest.mark.torch,
    # The harness and the datasets library deprecate faster than they release.
    pytest.mark.filterwarnings("ignore"),
]
CONFIG = LLAMA | {"vocab_size": 320, "num_hidden_layers": 2, "max_position_embeddings": 512}
LENGTH = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with a tokenizer and a template, and the tasks."""
    root = tmp_path_factory.mktemp("served")
    hf_files.write(root / "checkpoint", CONFIG, hf_files.plain(Case(CONFIG, seed=31)))
    train_tokenizer([*TEXTS, *PROMPTS] * 3, vocab_size=320).save(str(root / "checkpoint"))
    (root / "checkpoint" / "chat_template.jinja").write_text(TEMPLATE)
    for name, config in TASKS.items():
        data = root / f"{name}.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in DATA[name]))
        files = {"data_files": {"test": str(data)}}
        # JSON is YAML too.
        (root / f"{name}.yaml").write_text(json.dumps(config | {"dataset_kwargs": files}))
    return root


@pytest.fixture(scope="module")
def url(folder):
    few = ("--max-batch", "2", "--dtype", "float32", "--port", "0", "--no-warm")
    with serve(folder / "checkpoint", few=few) as (url, _):
        yield url


@pytest.fixture(scope="module")
def evaluate(folder):
    """Runs the harness and returns, by task, what each document was answered."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        patch.setenv("HF_HOME", str(folder / "cache"))
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        patch.setenv("OPENAI_API_KEY", "none")
        import lm_eval
        from lm_eval.tasks import TaskManager

        def evaluate(model, tasks, arguments, **options):
            results = lm_eval.simple_evaluate(
                model=model, model_args=arguments, tasks=tasks, bootstrap_iters=0,
                task_manager=TaskManager(include_path=str(folder)), **options,
            )  # fmt: skip
            return {
                name: [
                    each["filtered_resps"]
                    for each in sorted(samples, key=lambda each: each["doc_id"])
                ]
                for name, samples in results["samples"].items()
            }

        yield evaluate


def transformers_model(folder):
    return {"pretrained": str(folder / "checkpoint"), "dtype": "float32", "max_length": LENGTH,
            "device": "cpu", "add_bos_token": False}  # fmt: skip


def client(folder, address):
    return {
        "model": "checkpoint",
        "base_url": address,
        "tokenizer_backend": "huggingface",
        "tokenizer": str(folder / "checkpoint"),
        # The client sets aside one token to be generated, and one that begins a window.
        "max_length": LENGTH + 2,
        "max_gen_toks": 12,
    }


@pytest.mark.parametrize(("batch", "concurrent"), [(1, 4), (2, 1)])
def test_completions_report_what_transformers_does(folder, url, evaluate, batch, concurrent):
    tasks = list(TASKS)
    wanted = evaluate("hf", tasks, transformers_model(folder), batch_size=1)
    arguments = client(folder, f"{url}/v1/completions") | {"num_concurrent": concurrent}
    found = evaluate("local-completions", tasks, arguments, batch_size=batch)
    for want, got in zip(wanted["tiny_choice"], found["tiny_choice"], strict=True):
        for (value, greedy), (own, own_greedy) in zip(want, got, strict=True):
            assert_close(float(own), float(value), F32)
            assert bool(greedy) == bool(own_greedy)
    for (want,), (got,) in zip(wanted["tiny_rolling"], found["tiny_rolling"], strict=True):
        assert_close(float(got), float(want), F32)
    assert found["tiny_generate"] == wanted["tiny_generate"]


def test_chats_are_answered_as_transformers_does(folder, url, evaluate):
    options = {"apply_chat_template": True, "batch_size": 1}
    wanted = evaluate("hf", ["tiny_generate"], transformers_model(folder), **options)
    arguments = client(folder, f"{url}/v1/chat/completions")
    found = evaluate("local-chat-completions", ["tiny_generate"], arguments, **options)
    assert found == wanted and any(text for (text,) in found["tiny_generate"])
