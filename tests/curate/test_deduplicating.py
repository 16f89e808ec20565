"""Duplicates across shards and sources."""

import numpy as np
import pytest

from dsjax.curate import deciding, deduplicating, reading, shards, shingles, tagging, words
from dsjax.data import splitting

NAN = float("nan")
TEXT = " ".join(f"word{number}" for number in range(120))
# Per shard: source, text, verdict. What is better comes later, to be found across shards.
SHARDS = [
    [("b", TEXT, ""), ("b", TEXT + " and more", ""), ("b", "other words altogether", "")],
    [("a", TEXT + " , ", ""), ("b", TEXT + " and", ""), ("b", TEXT, "words")],
]


@pytest.fixture
def stage_files(tmp_path):
    pytest.importorskip("rensa")
    folders = {name: tmp_path / name for name in ("read", "tag", "rules", "buckets", "cut", "out")}
    for folder in folders.values():
        folder.mkdir()
    for number, rows in enumerate(SHARDS):
        name = f"{number:05}-0000.parquet"
        with (
            shards.Writer(folders["read"] / name, reading.SCHEMA) as texts,
            shards.Writer(folders["tag"] / name, tagging.SCHEMA) as tags,
            shards.Writer(folders["rules"] / name, deciding.SCHEMA) as verdicts,
        ):
            for place, (source, text, verdict) in enumerate(rows):
                row = {"id": f"{number}.{place}", "source": source, "path": "", "text": text}
                texts.add(row)
                signature = shingles.signatures(*shingles.shingles(words.cut([text]))).tobytes()
                row |= {"language": "en", "score": 1.0, "bytes": len(text)}
                row |= {
                    "digest": splitting.digest_bytes(text, tagging.DIGEST),
                    "signature": signature,
                }
                row |= dict.fromkeys(tagging.SIGNALS, NAN)
                tags.add({key: row[key] for key in tagging.SCHEMA.names})
                verdicts.add({"verdict": verdict})
    return folders


def run(folders, threshold, sources=("a", "b")):
    names = [f"{number:05}-0000.parquet" for number in range(2)]
    tags, verdicts = (tuple(folders[key] / name for name in names) for key in ("tag", "rules"))
    gathering = deduplicating.Gathering(tags, verdicts, sources, threshold)
    deduplicating.gather(gathering, folders["buckets"], 0)
    for number, name in enumerate(names):
        job = deduplicating.Cutting(folders["read"] / name, folders["buckets"], 3 * number, 3)
        deduplicating.cut(job, folders["cut"], number)
    comparing = deduplicating.Comparing(tags, (0, 3), folders["buckets"], folders["cut"], threshold)
    counts = deduplicating.compare(comparing, folders["out"], 0)
    found = list(shards.rows(folders["out"] / "duplicates.parquet"))
    return counts, np.load(folders["out"] / "verdicts.npy").tolist(), found


def test_earlier_source_and_longer_text_stay(stage_files):
    counts, verdicts, found = run(stage_files, 0.9)
    assert counts == {"exact": 0, "near": 3, "groups": {"4": 1}}
    # 1.2 fails a rule and takes no part.
    assert verdicts == [2, 2, 0, 0, 2, 0]
    assert {row["id"]: row["keeper"] for row in found} == {"0.0": "1.0", "0.1": "1.0", "1.1": "1.0"}
    assert all(0.9 <= row["jaccard"] <= 1 for row in found)


def test_longest_of_the_first_source_stays(stage_files):
    _, verdicts, found = run(stage_files, 0.9, ("b", "a"))
    assert verdicts == [2, 0, 0, 2, 2, 0]
    assert {row["keeper"] for row in found} == {"0.1"}


def test_exact_duplicates_alone(stage_files):
    counts, verdicts, found = run(stage_files, None)
    assert (counts, found) == ({"exact": 0, "near": 0, "groups": {}}, []) and verdicts == [0] * 6


def test_high_threshold_keeps_what_differs_by_a_word(stage_files):
    _, verdicts, found = run(stage_files, 1.0)
    assert verdicts == [2, 0, 0, 0, 0, 0] and found[0]["jaccard"] == 1
