"""All stages: the same result on any number of workers, resumed, and only what changed redone."""

import errno
import json
import os
import shutil

import pytest

from dsjax.curate import language, prepare, report, shards
from dsjax.curate.recipe import Recipe, Source
from dsjax.data.corpus import prepare_corpus
from dsjax.files import write_json

GOOD = (
    "The committee of {0} will meet again in the spring of next year, and nobody knows what is to "
    "be done with the old bridge. It was built by {1} people that came to the valley to look for "
    "work. They have left long ago.\nThe water of the river {2} has risen since, and the road to "
    "the village is closed on most days. Who will pay for it? That is the question."
)


@pytest.fixture
def texts(tmp_path, monkeypatch):
    monkeypatch.setattr(language, "identify", lambda text: ("en", 0.9))
    monkeypatch.setattr(language, "library", lambda: "a library 1")
    folder = tmp_path / "in"
    folder.mkdir()
    names = ["north", "south", "east", "west", "middle", "upper", "lower", "outer", "inner"]
    for number in range(36):
        text = GOOD.format(names[number % 9], number, names[number // 9]) + f" {number}." * 3
        (folder / f"{number:02}.txt").write_text("too short" if number % 6 == 5 else text)
    return folder


@pytest.fixture
def no_page(monkeypatch):
    """Leaves out the report's page, whose pictures take seconds."""
    monkeypatch.setattr(
        report, "save", lambda found, table, out: write_json(out / "report.json", found)
    )


def recipe(folder, **options):
    source = Source(name="s", files=f"{folder}/*.txt", kind="web")
    options = {
        "sources": (source,), "shard_bytes": 8192, "heldout_fraction": 0.2, "duplicates": "exact"
    } | options  # fmt: skip
    return Recipe(**options)


def content(out):
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def test_result_trains_and_is_the_same_when_resumed(texts, tmp_path, no_page):
    found = prepare.prepare(recipe(texts), tmp_path / "a", 1)
    source = found["sources"]["s"]
    assert source["read"][0] == 36 and source["removed"] == {"words": [6, 54]}
    assert source["train"][0] + source["heldout"][0] == 30
    before = content(tmp_path / "a")

    # A run that was stopped in the middle: some files of each stage are missing.
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for name in ("work/read/00001.json", "work/tag/00000.json", "text/00001.json", "report.json"):
        (tmp_path / "b" / name).unlink()
    (tmp_path / "b" / "work/read/00001-0000.parquet.partial").write_text("half")
    prepare.prepare(recipe(texts), tmp_path / "b", 1)
    (tmp_path / "b" / "work/read/00001-0000.parquet.partial").unlink(missing_ok=True)
    assert content(tmp_path / "b") == before

    corpus = prepare_corpus(
        files=f"{tmp_path}/a/text/train-*.parquet",
        heldout_files=f"{tmp_path}/a/text/heldout-*.parquet",
        vocab_size=300,
        cache_dir=str(tmp_path / "cache"),
    )
    assert (len(corpus.train), len(corpus.heldout)) == (source["train"][0], source["heldout"][0])


def test_full_disk_is_told_and_the_next_run_goes_on(texts, tmp_path, no_page, monkeypatch):
    prepare.prepare(recipe(texts), tmp_path / "whole", 1)
    synced, sync = [], os.fsync

    def fill(file):
        synced.append(file)
        if len(synced) == 13:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    monkeypatch.setattr(os, "fsync", fill)
    with pytest.raises(OSError, match="No space left on device"):
        prepare.prepare(recipe(texts), tmp_path / "out", 1)
    assert not list((tmp_path / "out").rglob("*.partial"))
    prepare.prepare(recipe(texts), tmp_path / "out", 1)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_changed_rule_repeats_later_stages_alone(texts, tmp_path, no_page):
    prepare.prepare(recipe(texts), tmp_path / "out", 1)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/work").rglob("*.parquet")}
    found = prepare.prepare(recipe(texts, rules=("web.en.words=1..",)), tmp_path / "out", 1)
    assert found["sources"]["s"]["removed"].get("words") is None
    redone = {path.parent.name for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert redone == {"rules", "duplicates"}


def test_folder_of_others_is_refused(texts, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds other files"):
        prepare.prepare(recipe(texts), tmp_path / "out", 1)
    assert (tmp_path / "out" / "letter.txt").read_text() == "dear"


def test_inputs_make_a_recipe_and_options_apply(texts, tmp_path):
    made = prepare.recipe_of(None, ["a.txt", "b.txt"], "math", ["languages=en", "seed=3"])
    assert made.sources == (Source(name="input", files="a.txt,b.txt", kind="math"),)
    assert (made.languages, made.seed) == (("en",), 3)
    (tmp_path / "r.py").write_text(
        "from dsjax.curate.recipe import Recipe, Source\n"
        "config = Recipe(sources=(Source(name='a', files='x'),), samples=2)\n"
    )
    assert prepare.recipe_of(str(tmp_path / "r.py"), [], "plain", ["samples=4"]).samples == 4
    with pytest.raises(ValueError, match="a config file alone can give"):
        prepare.recipe_of(None, ["a"], "plain", ["sources=x"])


def test_recipe_that_was_used_can_be_used_again(texts, tmp_path, no_page):
    prepare.prepare(recipe(texts), tmp_path / "out", 1)
    path = tmp_path / "out" / "recipe.json"
    assert prepare.recipe_of(str(path), [], "plain", []) == recipe(texts)
    assert json.loads(path.read_text())["shard_bytes"] == 8192


def test_near_duplicates_and_quotes_of_evaluation_files_are_removed(texts, tmp_path, no_page):
    pytest.importorskip("rensa")
    (tmp_path / "test.jsonl").write_text(
        json.dumps({"question": "Water of the river SOUTH has risen since, and the road?"})
    )
    options = {"duplicates": "near", "jaccard": 0.4, "decontaminate": f"{tmp_path}/test.jsonl"}
    found = prepare.prepare(recipe(texts, **options), tmp_path / "out", 1)
    assert found["sources"]["s"]["removed"].keys() >= {"near_duplicate", "words"}
    paths = (tmp_path / "out/text").glob("*.parquet")
    kept = "".join(row["text"] for path in paths for row in shards.rows(path))
    assert "the river" in kept and "river south" not in kept


@pytest.mark.parametrize("glob", ["", "/**/*"])
def test_result_among_its_globs_is_not_its_own_input(texts, tmp_path, no_page, glob):
    """A second call reads what the first did: no text of its own, and no .npy file of work/."""
    question = {"question": "Water of the river south has risen since, and the road?"}
    (tmp_path / "test.jsonl").write_text(json.dumps(question))
    source = Source(name="s", files=f"{texts}{glob}", kind="web")
    chosen = recipe(texts, decontaminate=f"{tmp_path}/**/*.json*", sources=(source,))
    out = texts / "out"
    found = prepare.prepare(chosen, out, 1)
    before = content(out)
    assert found["sources"]["s"]["read"][0] == 36 and "work/duplicates/verdicts.npy" in before
    assert prepare.prepare(chosen, out, 1) == found and content(out) == before
    source = Source(name="s", files=f"{out}/text/*.parquet")
    with pytest.raises(ValueError, match=r"only files in .*/out, where the result is written"):
        prepare.prepare(recipe(texts, sources=(source,)), out, 1)
