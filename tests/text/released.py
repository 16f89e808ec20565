"""A small tokenizer whose control tokens have the names, ids and flags of the released ones.

Ids: tokenizer.json of DeepSeek-V3, R1 and V3.1. The bytes stand where the releases have them too,
3 to 258, so the id of a line break is theirs.
"""

import json

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

BOS, EOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
USER, ASSISTANT = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"
IDS = {
    BOS: 0,
    EOS: 1,
    "<\uff5c\u2581pad\u2581\uff5c>": 2,
    "<\uff5csearch\u2581begin\uff5c>": 128796,
    "<\uff5csearch\u2581end\uff5c>": 128797,
    "<think>": 128798,
    "</think>": 128799,
    USER: 128803,
    ASSISTANT: 128804,
}
LINE_BREAK = 201
VOCAB_SIZE = 129280
V3 = {key: i for key, i in IDS.items() if i < 3 or i > 128799}
R1 = {key: i for key, i in IDS.items() if i < 3 or i > 128797}
V3_1 = IDS


def make_tokenizer(control, merges=()):
    """Bytes, the given merges of them, and control tokens, of which only the first three are
    called special, as in the releases.
    """
    vocab = {byte: 3 + i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {left + right: 259 + i for i, (left, right) in enumerate(merges)}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab | control, merges=list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([name for name, i in control.items() if i < 3])
    inner.add_tokens([AddedToken(name, special=False) for name, i in control.items() if i > 2])
    assert {name: inner.token_to_id(name) for name in control} == control
    return inner


def write_checkpoint(folder, control=V3, merges=(), **configs):
    """Writes tokenizer.json, and JSON files by their names without the ending."""
    folder.mkdir(exist_ok=True)
    make_tokenizer(control, merges).save(str(folder / "tokenizer.json"))
    for name, content in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder
