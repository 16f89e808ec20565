"""Rows are of their kind in exact ratios, of whole examples, and the same ones every time."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from dsjax.infer.drawing import blanked, prompt_of
from dsjax.janus import training
from dsjax.janus.rows import ExampleRows, MixedKinds, Shape
from tests.janus import toy


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    config = toy.write(tmp_path_factory.mktemp("janus"))
    checkpoint, form = training.open_initial(config)
    return dataclasses.replace(config, model=checkpoint.model), checkpoint, form


@pytest.fixture(scope="module")
def data(opened):
    return training.read_data(*opened, lambda text: None)


class Numbered(ExampleRows):
    """Rows that tell which they are."""

    kind: int
    fingerprint = ""

    def row(self, number, shape):
        return {"tokens": np.array([self.kind, number])}


def numbered(kind, count):
    rows = Numbered.__new__(Numbered)
    rows.kind, rows.bins, rows.most_pictures = kind, [[0]] * count, 0
    return rows


@pytest.mark.parametrize("counts", [(1, 0, 3), (2, 3, 5), (5, 1, 4)])
def test_every_micro_batch_has_the_ratio_and_every_row_is_read_in_turn(counts):
    parts = [numbered(kind, 7) if count else None for kind, count in enumerate(counts)]
    rows = MixedKinds(parts, counts, Shape(2, 0, 1), seed=0, blank=0.0)
    whole, seen = sum(counts), {kind: [] for kind in range(3)}
    for micro_batch in range(6):
        found = [rows[whole * micro_batch + place]["tokens"].tolist() for place in range(whole)]
        kinds = [kind for kind, _ in found]
        assert kinds == sorted(kinds)
        assert tuple(kinds.count(kind) for kind in range(3)) == counts
        for kind, number in found:
            seen[kind].append(number)
    assert all(numbers == list(range(len(numbers))) for numbers in seen.values())
    assert rows.epochs(whole * 7) == max(counts)  # 7 rows of each kind


def test_an_epoch_has_every_example_once_with_its_own_picture_and_codes(opened, data):
    _, _, form = opened
    for kind in (0, 2):
        part = data.training._parts[kind]
        rows = [part.row(number, data.training.shape) for number in range(len(part))]
        texts = []
        for row in rows:
            for segment in range(1, row["segment_ids"].max() + 1):
                here = row["segment_ids"] == segment
                if kind == 0:
                    answer = row["tokens"][here & (row["weights"] > 0)]
                    texts.append(form.vocabulary.coder.decode(answer.tolist()))
                else:
                    texts.append(row["codes"][here & (row["codes"] >= 0)].tobytes())
        kept = toy.COUNT - round(0.25 * toy.COUNT)
        assert len(set(texts)) == kept, texts


def test_features_of_a_rows_pictures_are_numbered_through(opened, data):
    part, shape = data.training._parts[0], data.training.shape
    assert shape.n_pictures == 2
    rows = [part.row(number, shape) for number in range(len(part))]
    row = next(each for each in rows if each["segment_ids"].max() > 1)
    places = row["features"][row["features"] >= 0]
    assert places.tolist() == list(range(2 * opened[2].vision.tower.n_tokens))
    assert len({picture.tobytes() for picture in row["pictures"]}) == 2


def test_prompts_are_blanked_out_for_their_share_and_anew_in_every_epoch(opened, data):
    _, _, form = opened
    part, shape = data.training._parts[2], data.training.shape

    def blanks(epoch):
        found = {}
        for number in range(len(part)):
            row = part.row(epoch * len(part) + number, shape)
            for segment in range(1, row["segment_ids"].max() + 1):
                here = row["segment_ids"] == segment
                codes = row["codes"][here & (row["codes"] >= 0)].tobytes()
                prompt = row["tokens"][here & (row["codes"] < 0)].tolist()
                found[codes] = prompt == blanked(form, prompt)
        return [found[codes] for codes in sorted(found)]

    epochs = [blanks(epoch) for epoch in range(24)]
    assert epochs == [blanks(epoch) for epoch in range(24)]
    assert len({tuple(each) for each in epochs}) > 12
    assert 0.38 < np.mean(epochs) < 0.62  # asked: 0.5, of 168
    assert blanked(form, prompt_of(form, "x"))[0] == prompt_of(form, "x")[0]


def test_bad_picture_is_named_when_its_row_is_read(opened, data):
    part, shape = data.training._parts[0], data.training.shape
    path = Path(part._examples.pictures[int(part._numbers[part.bins[0][0]])].path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    try:
        with pytest.raises(ValueError, match=f"{path.name} is damaged"):
            for number in range(len(part)):
                part.row(number, shape)
    finally:
        path.write_bytes(whole)
