"""Everybody's conventions of conversations, and messages for what is none of them."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from dsjax.posttrain.messages import parse, read_conversations
from dsjax.text.conversation import choose_format
from dsjax.text.vocabulary import open_vocabulary
from tests.posttrain.toy import ASSISTANT, CONTROL, USER, VOCAB_SIZE, write_lines
from tests.text.released import write_checkpoint

A, B, EOS = 67, 68, 1
ASK = {"role": "user", "content": "a"}
SAY = {"role": "assistant", "content": "b"}


def shape(record):
    """Role, content and whether it is trained, turn by turn."""
    return [(turn.role, turn.content, turn.trained) for turn in parse(record, "x:1").turns]


@pytest.mark.parametrize(
    ("record", "want"),
    [
        ({"messages": [ASK, SAY]}, [("user", "a", True), ("assistant", "b", True)]),
        (
            {"messages": [ASK, SAY | {"weight": 0}, ASK, SAY | {"weight": 1}]},
            [
                ("user", "a", True),
                ("assistant", "b", False),
                ("user", "a", True),
                ("assistant", "b", True),
            ],
        ),
        (
            {"messages": [ASK | {"content": [{"type": "text", "text": "a"}] * 2}, SAY]},
            [("user", "aa", True), ("assistant", "b", True)],
        ),
        ({"prompt": "a", "completion": "b"}, [("user", "a", False), ("assistant", "b", True)]),
        ({"prompt": [ASK], "completion": [SAY]}, [("user", "a", False), ("assistant", "b", True)]),
        ({"prompt": [ASK], "completion": "b"}, [("user", "a", False), ("assistant", "b", True)]),
        # what is in the prompt is not trained
        (
            {"prompt": [ASK, SAY, ASK], "completion": [SAY]},
            [
                ("user", "a", False),
                ("assistant", "b", False),
                ("user", "a", False),
                ("assistant", "b", True),
            ],
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            [("user", "a", True), ("assistant", "b", True)],
        ),
        ({"conversations": [ASK, SAY]}, [("user", "a", True), ("assistant", "b", True)]),
        # a parquet file has every column in every row
        (
            {"messages": [ASK | {"weight": None}, SAY], "prompt": None, "id": 3},
            [("user", "a", True), ("assistant", "b", True)],
        ),
    ],
    ids=[
        *("messages", "weight", "parts", "texts", "both messages", "completion text", "context"),
        *("sharegpt", "conversations", "nulls"),
    ],
)
def test_every_form_is_read(record, want):
    assert shape(record) == want


def test_only_two_texts_are_plain():
    assert parse({"prompt": "a", "completion": "b"}, "").plain
    assert not parse({"prompt": [ASK], "completion": "b"}, "").plain


def test_tools_and_calls_are_kept_as_they_are():
    tool = {"type": "function", "function": {"name": "f"}}
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    said = {"role": "tool", "content": "c", "tool_call_id": "1"}
    record = {"messages": [ASK, call, said, SAY], "tools": json.dumps([tool])}
    conversation = parse(record, "")
    assert conversation.tools == (tool,)
    assert conversation.turns[1].fields == {"tool_calls": [{"id": "1"}], "content": None}
    assert conversation.turns[2].fields == {"tool_call_id": "1"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "x:1 has neither 'messages' nor 'prompt' and 'completion' but nothing; a line is"),
        ({"mesages": []}, r"but 'mesages' \(is 'mesages' meant as 'messages'\?\)"),
        ({"text": "a"}, r"neither 'messages' nor 'prompt' and 'completion' but 'text'; a line"),
        (
            {"prompt": "a", "completon": "b"},
            "has a prompt and no completion; did you mean 'complet",
        ),
        ({"completion": "b"}, "has a completion and no prompt"),
        ({"messages": "hi"}, "x:1: 'messages' is str, not a list of messages"),
        ({"messages": []}, "x:1: 'messages' is empty; leave the line out"),
        ({"messages": ["hi"]}, "x:1: 'messages': message 1 is str, not an object"),
        ({"messages": [ASK, {"content": "b"}]}, "message 2 has no role, none of system, user"),
        ({"conversations": [{"from": ["human"], "value": "a"}]}, "message 1 has the role .*human"),
        (
            {"messages": [ASK, {"role": "asistant", "content": "b"}]},
            "message 2 has the role 'asistant', none of .*; did you mean 'assistant'?",
        ),
        (
            {"messages": [{"role": "user", "contents": "a"}]},
            "no 'content'; did you mean 'contents'",
        ),
        ({"messages": [ASK | {"content": 3}]}, "message 1: 'content' is int, not text"),
        (
            {"messages": [ASK | {"content": [{"type": "image_url"}]}]},
            "a part 'image_url'; only texts",
        ),
        ({"messages": [SAY | {"weight": 0.5}]}, "message 1 has weight=0.5; it is 1, or 0"),
        ({"messages": [SAY | {"weight": True}]}, "message 1 has weight=True; it is 1, or 0"),
        ({"messages": [SAY | {"function_call": {"name": "f"}}]}, "'function_call', OpenAI's older"),
        ({"messages": [ASK, SAY], "tools": "f"}, "'tools' is a text that is not JSON"),
        ({"messages": [ASK, SAY], "tools": [3]}, "'tools' is not a list of objects"),
        ({"prompt": "a", "completion": "\ud800"}, "half of a surrogate pair at character 0"),
        ({"prompt": 3, "completion": "b"}, "x:1: 'prompt' is int, not a list of messages"),
    ],
    ids=str,
)
def test_what_is_no_conversation_is_named(record, message):
    with pytest.raises(ValueError, match=message):
        parse(record, "x:1")


@pytest.fixture(scope="module")
def form(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("messages") / "v3", CONTROL["V3"])
    return choose_format("V3", open_vocabulary(folder, VOCAB_SIZE))


def read(files, form, longest=64, truncate=False):
    return read_conversations(str(files), form.vocabulary, form, longest=longest, truncate=truncate)


def talk(*contents):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]}


def test_every_kind_of_file_gives_the_same_tokens(form, tmp_path):
    records = [talk("a", "b"), talk("a", "b", "a", "b")]
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    once = [0, USER, A, ASSISTANT, B, EOS]
    for path in sorted(tmp_path.iterdir()):
        found = read(path, form)
        assert len(found) == 2 and found.lengths.tolist() == [6, 11]
        assert found.one(0)[0].tolist() == once
        assert found.one(1)[0].tolist() == [*once, USER, A, ASSISTANT, B, EOS]
        assert found.one(1)[1].tolist() == [False] * 4 + [True] * 2 + [False] * 3 + [True] * 2


def test_long_conversations_are_dropped_or_cut_and_counted(form, tmp_path):
    untrained = talk("a", "b")
    untrained["messages"][1]["weight"] = 0
    records = [talk("a", "b"), talk("a", "bbbb"), talk("a" * 9, "b"), untrained]
    path = write_lines(tmp_path / "x.jsonl", records)
    found = read(path, form, longest=7)
    assert (len(found), found.dropped, found.truncated, found.untrained) == (1, 2, 0, 1)
    found = read(path, form, longest=7, truncate=True)
    assert (len(found), found.dropped, found.truncated, found.untrained) == (2, 0, 1, 2)
    ids, trained = found.one(1)
    assert ids.tolist() == [0, USER, A, ASSISTANT, B, B, B] and trained.sum() == 3


def test_many_conversations_are_read_in_order(form, tmp_path):
    records = [talk("a", chr(97 + i % 26)) for i in range(600)]
    seen = []
    path = write_lines(tmp_path / "x.jsonl", records)
    found = read_conversations(
        str(path), form.vocabulary, form, longest=9, truncate=False, progress=seen.append
    )
    assert [found.one(i)[0][4] for i in range(600)] == [A + i % 26 for i in range(600)]
    assert seen == [256, 512, 600]
    digests = found.digests()
    assert len(np.unique(digests)) == 26 and digests[0] == digests[26]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", r"sft\.files='.*' holds no conversation"),
        ('{"messages": []}\n', r"x\.jsonl:1: 'messages' is empty"),
        ('\n{"prompt": "a"\n', r"x\.jsonl line 2 is not JSON"),
        (
            json.dumps(talk("a", "b")) + "\n" + json.dumps(talk("a", "b", "c")),
            r"x\.jsonl:2: the turns are user, assistant, user; user and assistant must",
        ),
        (
            json.dumps(talk("a" * 99, "b")),
            r"none of the 1 conversations .* 1 have more than the 64 tokens .*sft\.longer=truncate",
        ),
    ],
    ids=["empty", "no messages", "no JSON", "turns", "long"],
)
def test_files_that_cannot_be_trained_on_are_refused(form, tmp_path, lines, message):
    (tmp_path / "x.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "x.jsonl", form)
