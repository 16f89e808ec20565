"""Verdicts from tags."""

import numpy as np

from dsjax.curate import deciding, rules, shards, tagging

NAN = float("nan")
PASSING = {
    "a": ("pages", "en", 0.9, {"words": 60.0}),
    "short": ("pages", "en", 0.9, {"words": 10.0}),
    "unsure": ("pages", "en", 0.5, {"words": 60.0}),
    "french": ("pages", "fr", 0.9, {}),
    "chinese": ("pages", "zh", 0.9, {"words": 90.0}),
    "code": ("src", "any", 1.0, {"longest_line": 2000.0}),
}


def decide(tmp_path, languages, at_least=0.65):
    path = tmp_path / "00000-0000.parquet"
    with shards.Writer(path, tagging.SCHEMA) as writer:
        for name, (source, language, score, values) in PASSING.items():
            row = {"id": name, "source": source, "language": language, "score": score}
            row |= {"bytes": 1, "digest": bytes(16), "signature": b""} | dict.fromkeys(
                tagging.SIGNALS, NAN
            )
            writer.add(row | values)
    (tmp_path / "out").mkdir()
    kinds = {"pages": "web", "src": "code"}
    job = deciding.Job(path, kinds, languages, at_least, rules.STANDARD)
    found = deciding.decide(job, tmp_path / "out", 0)
    verdicts = [row["verdict"] for row in shards.rows(tmp_path / "out" / path.name)]
    assert found["languages"] == {"pages": {"en": 3, "fr": 1, "zh": 1}, "src": {"any": 1}}
    return dict(zip(PASSING, verdicts, strict=True)), found["distributions"]


def test_verdicts_and_distributions(tmp_path):
    verdicts, distributions = decide(tmp_path, ("en", "zh"))
    assert verdicts == {
        "a": "",
        "short": "words",
        "unsure": "language",
        "french": "language",
        "chinese": "",
        "code": "longest_line",
    }
    counts = np.array(distributions["web.en"]["words"])
    assert counts.sum() == 2 and counts[np.searchsorted(deciding.edges("words"), 60) - 1] == 1
    assert sum(distributions["code.any"]["longest_line"]) == 1


def test_languages_not_asked_for_are_removed(tmp_path):
    verdicts, distributions = decide(tmp_path, ("zh",))
    assert (verdicts["a"], verdicts["chinese"], verdicts["code"]) == (
        "language",
        "",
        "longest_line",
    )
    assert "web.en" in distributions


def test_score_of_a_language_at_the_bound_counts(tmp_path):
    assert decide(tmp_path, ("en",), 0.5)[0]["unsure"] == ""


def test_edges_rise():
    for name in tagging.SIGNALS:
        borders = deciding.edges(name)
        assert len(borders) == deciding.BINS + 1 and (np.diff(borders) > 0).all()
