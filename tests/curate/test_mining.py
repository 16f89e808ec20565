"""Mining finds what is like the seed, and learns from the domains where much of it is."""

import dataclasses
import json
import os
import sys

import pytest

from dsjax.curate import classifier, mining, shards
from dsjax.curate.mining import Mining

pytest.importorskip("floret")
SEED = [f"let x be an integer and prove that the sum of x and {n} is an integer" for n in range(12)]
COOKING = "chop the onion and fry it in oil for {} minutes then add salt and soup"
GEOMETRY = "the angle of a triangle in the circle with radius {} is a right angle"
SETTINGS = classifier.Settings(dim=8, epochs=40, rate=1.0, buckets=1000, least=1)


@pytest.fixture
def asked(tmp_path):
    """A pool of cooking, and of a domain where a third is like the seed and the rest geometry."""
    (tmp_path / "seed.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in SEED))
    pages = [("https://www.food.org/a", COOKING.format(n)) for n in range(60)]
    pages += [("http://maths.net:80/x", SEED[n].replace("sum", "product")) for n in range(10)]
    pages += [("maths.net/y", GEOMETRY.format(n)) for n in range(20)]
    pages += [("http://mixed.com", GEOMETRY.format(n + 50)) for n in range(5)]
    for name, part in (("a", pages[:50]), ("b", pages[50:]), ("c", [])):
        rows = [json.dumps({"url": url, "text": text}) + "\n" for url, text in part]
        (tmp_path / f"pool-{name}.jsonl").write_text("".join(rows))
    return Mining(
        seed=f"{tmp_path}/seed.jsonl",
        pool=f"{tmp_path}/pool-*.jsonl",
        url_field="url",
        keep=0.35,
        settings=SETTINGS,
    )


def mined(out):
    return [row for path in sorted(out.glob("text/*.parquet")) for row in shards.rows(path)]


def test_domains_teach_the_next_round(asked, tmp_path):
    report = mining.mine_into(asked, tmp_path / "out", 1)
    assert report["rounds"][0]["domains"] == ["maths.net"]
    assert report["rounds"][0]["examples"] == 12 < report["rounds"][1]["examples"] == 42
    assert report["rounds"][-1]["new"] == 0 and len(report["rounds"]) < 4
    rows = mined(tmp_path / "out")
    # Geometry of a domain that nothing else tells about is found too.
    assert sum("angle" in row["text"] for row in rows) > 20
    assert sum("product" in row["text"] for row in rows) == 10
    assert not any("onion" in row["text"] for row in rows)
    assert report["mined"] == [len(rows), sum(len(row["text"]) for row in rows)]
    assert report["pool"][0] == 95 and report["mined"][1] <= 0.35 * report["pool"][1]
    scores = [sample["score"] for sample in report["border"]]
    assert len(scores) == 20 and scores == sorted(scores, reverse=True)
    assert [sample["kept"] for sample in report["border"]] == [True] * 10 + [False] * 10


def test_result_is_the_same_when_resumed_and_another_share_keeps_the_first_model(asked, tmp_path):
    one = dataclasses.replace(asked, rounds=1)
    first = mining.mine_into(one, tmp_path / "out", 1)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    for name in ("work/1/score/00001.json", "work/1/train/00000.json", "text/00000.json"):
        (tmp_path / "out" / name).unlink()
    assert mining.mine_into(one, tmp_path / "out", 1) == first
    assert {path: path.read_bytes() for path in before} == before
    time = (tmp_path / "out/work/1/train/model.bin").stat().st_mtime_ns
    fewer = mining.mine_into(dataclasses.replace(one, keep=0.1), tmp_path / "out", 1)
    assert (tmp_path / "out/work/1/train/model.bin").stat().st_mtime_ns == time
    assert 0 < fewer["mined"][0] < first["mined"][0]


def test_texts_without_domains_are_mined_in_one_round(asked, tmp_path):
    report = mining.mine_into(dataclasses.replace(asked, url_field=""), tmp_path / "out", 1)
    assert len(report["rounds"]) == 1 and report["rounds"][0]["domains"] == []
    assert {row["id"].partition(":")[0] for row in mined(tmp_path / "out")} == {"pool-b.jsonl"}


def test_result_among_the_pool_is_not_its_own_input(asked, tmp_path):
    around = dataclasses.replace(asked, pool=f"{tmp_path}/**/[!s]*", url_field="")
    first = mining.mine_into(around, tmp_path / "out", 1)
    assert first["pool"][0] == 95 and mining.mine_into(around, tmp_path / "out", 1) == first


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://www.a.org/b?c=//d", "a.org"), ("A.org/b", "a.org"), ("//u@a.org:8", "a.org"),
        ("http://[bad", ""), ("", ""),
    ],
)  # fmt: skip
def test_domain(url, host):
    assert mining.domain(url) == host


def test_wrong_options_are_told(asked, tmp_path):
    with pytest.raises(ValueError, match=r"--keep 1\.5 must lie between 0 and 1"):
        dataclasses.replace(asked, keep=1.5)
    with pytest.raises(ValueError, match="--rounds 0 must be at least 1"):
        dataclasses.replace(asked, rounds=0)
    same = dataclasses.replace(asked, seed=asked.pool)
    with pytest.raises(ValueError, match="is of --seed and of --pool"):
        mining.mine_into(same, tmp_path / "out", 1)


@pytest.mark.skipif(sys.platform == "darwin", reason="names of files are UTF-8 there")
def test_names_of_files_may_be_no_text(asked, tmp_path):
    (tmp_path / "seed.jsonl").rename(tmp_path / os.fsdecode(b"seed-\xff.jsonl"))
    seed, pool = f"{tmp_path}/seed-*.jsonl", f"{tmp_path}/pool-a.jsonl"
    odd = dataclasses.replace(asked, seed=seed, pool=pool, url_field="")
    assert mining.mine_into(odd, tmp_path / "out", 1)["rounds"][0]["examples"] == 12
