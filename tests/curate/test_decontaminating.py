"""Quotes of evaluation files."""

import json

import numpy as np
import pytest

from dsjax.curate import deciding, decontaminating, reading, shards
from dsjax.data.documents import find_sources

LONG = "one two three four five six seven eight nine ten eleven twelve"
HAN = "\u4e00\u4e8c\u4e09\u56db\u4e94\u516d\u4e03\u516b\u4e5d\u5341" * 2


def known(tmp_path, *records):
    path = tmp_path / "test.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    folder = tmp_path / "index"
    folder.mkdir()
    found = decontaminating.index(find_sources(str(path)), folder, 0)
    return found, {int(path.stem): np.load(path) for path in folder.glob("*.npy")}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (f"He said: {LONG}.", True),
        ("x TWO, three four-five six; seven eight nine ten eleven y", True),
        ("one two three four five six seven eight nine x ten eleven twelve", False),
        ("so what is this thing here", True),
        ("what is x this thing", False),
        ("two words", False),
        (f"{HAN[2:18]}", True),
        (f"{HAN[2:10]}x{HAN[10:18]}", False),
        ("", False),
    ],
)
def test_quotes(text, answer, tmp_path):
    messages = [{"role": "system", "content": "x y z"}, {"role": "user", "content": HAN}]
    found, index = known(
        tmp_path,
        {"question": LONG, "answer": "four score and seven years"},
        {"prompt": "What is this thing?"},
        {"prompt": messages},
        {"text": "two words"},
    )
    assert found == {"texts": 4, "short": 1}
    assert decontaminating.quotes(text, index) is answer


def test_what_passed_the_rules_is_marked(tmp_path):
    known(tmp_path, {"text": LONG})
    paths = tmp_path / "documents.parquet", tmp_path / "verdicts.parquet"
    with (
        shards.Writer(paths[0], reading.SCHEMA) as texts,
        shards.Writer(paths[1], deciding.SCHEMA) as verdicts,
    ):
        for text, verdict in (("nothing", ""), (LONG, ""), (LONG, "words")):
            texts.add({"id": "", "source": "", "path": "", "text": text})
            verdicts.add({"verdict": verdict})
    job = decontaminating.Job(*paths, tmp_path / "index")
    assert decontaminating.mark(job, tmp_path, 4) == {"found": 1}
    found = [row["verdict"] for row in shards.rows(tmp_path / "00004.parquet")]
    assert found == ["", "contaminated", "words"]


def test_record_without_a_question_names_the_fields(tmp_path):
    with pytest.raises(ValueError, match=r"test\.jsonl:1: .*prompt, problem.*has frage"):
        known(tmp_path, {"frage": "Was?"})
