"""transformers reads an exported run's tokenizer and generation settings as dsjax does."""

import importlib

import pytest

from dsjax.text.tokenizer import load_tokenizer, train_tokenizer
from tests.checkpoint.conversions import send_out
from tests.checkpoint.runs import write_run
from tests.golden.cases import CASES

pytestmark = [
    pytest.mark.torch,
    # transformers and torch deprecate faster than they release.
    pytest.mark.filterwarnings("ignore"),
]
TEXT = "The quick brown fox, 12345 times;\n    over the lazy dog: \u00fc\u4f60\u597d."


def test_transformers_reads_the_tokenizer(tmp_path):
    transformers = importlib.import_module("transformers")
    run, back = tmp_path / "run", tmp_path / "back"
    write_run(run, CASES["v3"], 1)
    train_tokenizer([TEXT] * 5, vocab_size=300).save(str(run))
    send_out(run, back, "bfloat16")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(back), load_tokenizer(str(run))
    assert theirs(TEXT, add_special_tokens=False)["input_ids"] == ours.encode(TEXT)
    assert theirs.decode(ours.encode(TEXT)) == TEXT
    special = ours.special
    ids = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ids == (special.bos, special.eos, special.pad)
    settings = transformers.GenerationConfig.from_pretrained(back)
    assert (settings.bos_token_id, settings.eos_token_id) == (special.bos, special.eos)
    config = transformers.AutoConfig.from_pretrained(back)
    assert (config.bos_token_id, config.eos_token_id) == (special.bos, special.eos)
