"""Preferences in every published form become the right rows, or are refused by their line."""

import numpy as np
import pytest

from dsjax.posttrain.initial import open_initial
from dsjax.posttrain.pairs import ExampleRows, label_of, pair_of, read_examples
from dsjax.posttrain.rows import ShuffledRows
from tests.posttrain.toy import ASSISTANT, USER, write_hf, write_lines

BOS, EOS = 0, 1
USER_TURN = {"role": "user", "content": "hi"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("yes", "no"))


@pytest.fixture(scope="module")
def v3(tmp_path_factory):
    return open_initial(write_hf(tmp_path_factory.mktemp("v3") / "hf", control="V3"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return open_initial(write_hf(tmp_path_factory.mktemp("base") / "hf", control="base"))


def read(tmp_path, initial, records, *, labelled=False, longest=64):
    path = write_lines(tmp_path / "pairs.jsonl", records)
    return read_examples(
        str(path), initial.vocabulary, initial.chat, labelled=labelled, longest=longest
    )


def rows_of(examples):
    return [[array.tolist() for array in examples.row(row)] for row in range(2 * len(examples))]


def spelled(initial, text):
    return initial.vocabulary.coder.encode(text)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "hi", "chosen": "yes", "rejected": "no"},
        {"prompt": [USER_TURN], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER_TURN], "chosen": "yes", "rejected": "no"},
        {"chosen": [USER_TURN, GOOD], "rejected": [USER_TURN, BAD]},
        {"prompt": "hi", "chosen": [USER_TURN, GOOD], "rejected": [USER_TURN, BAD]},
    ],
    ids=["texts", "messages", "mixed", "implicit", "implicit beside a prompt"],
)
def test_every_form_of_a_pair_is_the_same_rows(record, v3, tmp_path):
    examples = read(tmp_path, v3, [record])
    before = [BOS, USER, *spelled(v3, "hi"), ASSISTANT]
    want = []
    for answer in ("yes", "no"):
        after = [*spelled(v3, answer), EOS]
        want.append([before + after, [False] * len(before) + [True] * len(after)])
    assert rows_of(examples) == want


def test_texts_that_hold_the_prompt_are_divided_at_a_word(base, tmp_path):
    chosen, rejected = "Q: 1+1? A: two indeed", "Q: 1+1? A: twelve"
    examples = read(tmp_path, base, [{"chosen": chosen, "rejected": rejected}])
    (ids, counted), (other, _) = rows_of(examples)
    prompt = spelled(base, "Q: 1+1? A: ")
    assert ids == [BOS, *prompt, *spelled(base, "two indeed"), EOS]
    assert other == [BOS, *prompt, *spelled(base, "twelve"), EOS]
    assert counted.index(True) == 1 + len(prompt)


@pytest.mark.parametrize("label", [True, 1, 1.0])
@pytest.mark.parametrize("names", [("completion", "label"), ("response", "is_safe")])
def test_labelled_answers_are_read(names, label, v3, tmp_path):
    answer, judged = names
    records = [{"prompt": "hi", answer: "yes", judged: label}]
    records += [{"prompt": "hi", answer: "no", judged: False}]
    examples = read(tmp_path, v3, records, labelled=True)
    assert len(examples) == 2 and examples.labels.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are equal.*leave the line out"),
        ({"prompt": "a", "chosen": "b", "reject": "c"}, "no 'rejected'.*mean 'reject'"),
        ({"prompt": "a"}, "no 'chosen' but 'prompt'"),
        ({"chosen": "yes", "rejected": "no"}, "no 'prompt', and .* share"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "no 'prompt', and .* share"),
        ({"chosen": "a b", "rejected": [USER_TURN, BAD]}, "not both texts or messages"),
        ({"chosen": [USER_TURN], "rejected": [USER_TURN, BAD]}, "only the beginning of the other"),
        ({"prompt": "a", "chosen": 3, "rejected": "no"}, "'chosen' is int"),
        ({"prompt": "a", "chosen": "b", "rejected": [{"role": "bot"}]}, "role 'bot'"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:20],
)
def test_bad_pairs_are_refused(record, says):
    with pytest.raises(ValueError, match=f"pairs.jsonl:7.*{says}"):
        pair_of(record, "pairs.jsonl:7")


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"prompt": "a", "completion": "b"}, "no 'label' but 'completion', 'prompt'"),
        ({"prompt": "a", "completion": "b", "label": "good"}, "'label' is 'good'.* true or 1"),
        ({"prompt": "a", "completion": "b", "label": 2}, "'label' is '2'"),
        ({"completion": "b", "label": True}, "no 'prompt'"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:20],
)
def test_bad_labels_are_refused(record, says):
    with pytest.raises(ValueError, match=f"x.jsonl:2.*{says}"):
        label_of(record, "x.jsonl:2")


def test_answers_that_are_the_same_tokens_are_refused(v3, tmp_path):
    record = {
        "prompt": "hi",
        "chosen": "yes",
        "rejected": [{"role": "assistant", "content": "yes"}],
    }
    with pytest.raises(ValueError, match=r"pairs\.jsonl:2.*the same to the model"):
        read(tmp_path, v3, [{"prompt": "hi", "chosen": "a", "rejected": "b"}, record])


def test_long_examples_are_dropped_whole_and_counted(v3, tmp_path):
    pairs = [{"prompt": "hi", "chosen": "a", "rejected": "b" * n} for n in (3, 40, 5)]
    examples = read(tmp_path, v3, pairs, longest=16)
    assert (len(examples), examples.dropped) == (2, 1)
    with pytest.raises(ValueError, match=r"none of the 1 examples.*sequence_length=16; raise it"):
        read(tmp_path, v3, pairs[1:2], longest=16)


@pytest.fixture
def rows(v3, tmp_path):
    pairs = [{"prompt": "p" * n, "chosen": "yes", "rejected": "never"} for n in range(1, 8)]
    examples = read(tmp_path, v3, pairs)
    return ExampleRows(examples, np.array([0, 2, 3, 5, 6]), sequence_length=20, pad=9)


def test_rows_are_the_answers_and_padding(rows):
    assert (len(rows), rows.examples) == (10, 5)
    row = rows[3]  # the rejected answer of example 2
    length = int(row["segment_ids"].sum())
    assert row["tokens"].shape == (21,) and (row["tokens"][length:] == 9).all()
    assert row["counted"].sum() == len("never") + 1
    assert row["counted"][length - 1] == 1 and not row["counted"][length:].any()
    assert "reference" not in row
    rows.reference = np.arange(10, dtype=np.float32)
    assert rows[3]["reference"] == 3 and rows.batch([3, 4])["reference"].tolist() == [3.0, 4.0]


def test_an_epoch_has_every_example_once_with_its_answers_side_by_side(rows):
    shuffled = ShuffledRows(rows, seed=3, together=2)
    rows.reference = np.arange(10, dtype=np.float32)
    epochs = [[float(shuffled[e * 10 + i]["reference"]) for i in range(10)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(10))
        assert all(b == a + 1 and a % 2 == 0 for a, b in zip(epoch[::2], epoch[1::2], strict=True))
    assert epochs[0] != epochs[1] and epochs[1] != epochs[2]
    assert ShuffledRows(rows, seed=4, together=2)[0]["reference"] != shuffled[0]["reference"] or (
        ShuffledRows(rows, seed=4, together=2)[2]["reference"] != shuffled[2]["reference"]
    )
    assert rows.spread(2) == [0, 1, 4, 5]


def test_identity_tells_examples_apart(v3, rows, tmp_path):
    other = read(tmp_path, v3, [{"prompt": "p", "chosen": "never", "rejected": "yes"}])
    first = read(tmp_path, v3, [{"prompt": "p", "chosen": "yes", "rejected": "never"}])
    cut = [ExampleRows(each, np.array([0]), sequence_length=20, pad=9) for each in (other, first)]
    assert cut[0].fingerprint != cut[1].fingerprint
    identity = ShuffledRows(rows, seed=3, together=2).identity
    assert identity == ShuffledRows(rows, seed=3, together=2).identity
    assert identity != ShuffledRows(rows, seed=4, together=2).identity


def test_examples_of_one_prompt_have_one_digest(v3, tmp_path):
    pairs = [{"prompt": p, "chosen": a, "rejected": b} for p, a, b in ["pab", "pcd", "qab"]]
    digests = read(tmp_path, v3, pairs).prompt_digests()
    assert digests[0] == digests[1] != digests[2]
