import json

import pytest

from dsjax.text.added_tokens import IMAGE, MARKS, ROLES
from dsjax.text.tokenizer import PAD
from dsjax.text.vocabulary import open_vocabulary
from tests.text.released import BOS, EOS, write_checkpoint

PROCESSOR = {"processor_class": "DeepseekVLV2Processor"}
# As DeepSeek's processor says when it starts with the tokenizers of Tiny and Small, counted from
# the size of each.
CONTROL = {BOS: 0, EOS: 1, "<unused>": 2}


def opened(folder, **configs):
    write_checkpoint(folder, CONTROL, **configs)
    return open_vocabulary(folder, 300)


def test_ids_follow_the_tokenizers_in_the_processors_order(tmp_path):
    control = opened(tmp_path, processor_config=PROCESSOR).coder.control
    names = [PAD, IMAGE, *MARKS, *ROLES]
    assert [control[name] for name in names] == list(range(259, 268))


def test_padding_that_the_config_names_is_not_added(tmp_path):
    vocabulary = opened(
        tmp_path, processor_config=PROCESSOR, tokenizer_config={"pad_token": "<unused>"}
    )
    control = vocabulary.coder.control
    assert PAD not in control and control[IMAGE] == 259


@pytest.mark.parametrize("processor", [None, {"processor_class": "VLChatProcessor"}])
def test_other_tokenizers_stay_as_they_are(tmp_path, processor):
    configs = {"processor_config": processor} if processor else {}
    assert IMAGE not in opened(tmp_path, **configs).coder.control


def test_marks_are_shown_in_text_and_other_tokens_are_not(tmp_path):
    coder = opened(tmp_path, processor_config=PROCESSOR).coder
    ids = [coder.control[name] for name in (ROLES[0], *MARKS, IMAGE)]
    assert coder.decode(ids).replace(" ", "") == "".join(MARKS)
    assert coder.encode("<|det|>") != [coder.control["<|det|>"]]  # what a user spells is text


def test_a_saved_processor_has_the_same_tokens(tmp_path):
    """Its tokenizer.json has them all, marked special."""
    first = opened(tmp_path, processor_config=PROCESSOR).coder
    content = json.loads(first.inner.to_str())
    for token in content["added_tokens"]:
        token["special"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    again = open_vocabulary(tmp_path, 300).coder
    assert again.control == first.control
    assert "<|det|>" in again.decode([again.control["<|det|>"]])
