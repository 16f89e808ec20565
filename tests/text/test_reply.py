"""Streaming: pieces add up to the whole, and show no half character and no stop string."""

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from dsjax.text.reply import Detokenizer, Piece, ReplyReader, StopStrings
from dsjax.text.tokenizer import Coder
from tests.text.released import EOS, R1, make_tokenizer

CODER = Coder(make_tokenizer(R1))
THINK_IDS = THINK, END_THINK = R1["<think>"], R1["</think>"]
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = PRINTABLE + [byte for byte in range(256) if byte not in PRINTABLE]


def ids_of(data):
    """Tokens of any bytes, also of such as are no UTF-8."""
    return [3 + BYTES.index(byte) for byte in data]


def chunks(items, sizes):
    start = 0
    for size in sizes:
        yield items[start : start + size]
        start += size
    yield items[start:]


SIZES = st.lists(st.integers(0, 5), max_size=20)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=30) | st.text(max_size=15).map(str.encode), SIZES)
def test_pieces_add_up_to_the_text_of_any_bytes(data, sizes):
    detokenizer = Detokenizer(CODER)
    text = "".join(detokenizer.push(part) for part in chunks(ids_of(data), sizes))
    assert text + detokenizer.flush() == data.decode(errors="replace")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([b"\xff", b"\xe4", b"\xb8", b"\xad", b"a"]), min_size=150), SIZES)
def test_pieces_add_up_where_most_bytes_are_no_characters(parts, sizes):
    data = bytes(100 * [255]) + b"".join(parts)
    detokenizer = Detokenizer(CODER)
    text = "".join(detokenizer.push([i]) for i in ids_of(data[:120]))
    text += "".join(detokenizer.push(part) for part in chunks(ids_of(data[120:]), sizes))
    assert text + detokenizer.flush() == data.decode(errors="replace")


def test_bytes_that_are_no_characters_cost_the_same_each(monkeypatch):
    detokenizer, decoded = Detokenizer(CODER), []
    decode = CODER.decode
    monkeypatch.setattr(CODER, "decode", lambda ids: decoded.append(len(ids)) or decode(ids))
    text = "".join(detokenizer.push(ids_of(b"\xff")) for _ in range(1000))
    assert text + detokenizer.flush() == 1000 * "\ufffd"
    assert max(decoded) < 100


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=15), SIZES)
def test_pieces_hold_whole_characters(text, sizes):
    detokenizer = Detokenizer(CODER)
    shown = "".join(detokenizer.push(part) for part in chunks(ids_of(text.encode()), sizes))
    assert text.startswith(shown)


def test_a_character_shows_with_its_last_byte():
    detokenizer = Detokenizer(CODER)
    assert [detokenizer.push([i]) for i in ids_of("a\U0001f600b".encode())] == [
        *("a", "", "", "", "\U0001f600", "b")
    ]
    assert [detokenizer.push([i]) for i in ids_of(b"\xf0\x9f")] == ["", ""]
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.push(ids_of(b"ok")) == "ok"


def test_a_long_reply_is_not_decoded_again_and_again():
    class Counting:
        longest = 0

        def decode(self, ids):
            self.longest = max(self.longest, len(ids))
            return CODER.decode(ids)

    coder = Counting()
    detokenizer = Detokenizer(coder)
    for token in ids_of(b"a" * 100):
        assert detokenizer.push([token]) == "a"
    assert coder.longest <= 2


def test_special_tokens_have_no_text():
    detokenizer = Detokenizer(CODER)
    assert detokenizer.push([0, *ids_of(b"a"), 1, *ids_of(b"b")]) == "ab"


def test_spaces_between_words_stay_where_the_decoder_drops_the_first():
    inner = tokenizers.Tokenizer(models.WordLevel({"\u2581a": 0, "\u2581b": 1}, unk_token=""))
    inner.decoder = decoders.Metaspace()
    detokenizer = Detokenizer(Coder(inner))
    assert [detokenizer.push([i]) for i in (0, 1, 1, 0)] == ["a", " b", " b", " a"]


@pytest.mark.parametrize(
    ("stops", "parts", "shown"),
    [
        (["END"], ["x E", "ND y"], ["x ", ""]),
        (["END"], ["x E", "Nd y"], ["x ", "ENd y"]),
        (["END"], ["xEEN", "D"], ["xE", ""]),
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", ""]),
        (["far", "ab"], ["xab far"], ["x"]),
        (["abc", "b"], ["ab"], ["a"]),
        (["\n\n"], ["a\n", "b\n", "\n"], ["a", "\nb", ""]),
    ],
)
def test_stop_strings_never_show_in_part(stops, parts, shown):
    reader = StopStrings(stops)
    assert [reader.push(part) for part in parts] == shown
    assert reader.stopped == (shown[-1] != parts[-1] and "d" not in shown[-1])
    if reader.stopped:
        assert reader.push("more") == "" and reader.flush() == ""


def test_what_was_no_stop_string_shows_at_the_end():
    reader = StopStrings(["END"])
    assert (reader.push("the EN"), reader.flush(), reader.stopped) == ("the ", "EN", False)


@settings(max_examples=100, deadline=None)
@given(
    st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), SIZES
)
def test_stopping_does_not_depend_on_the_pieces(text, stops, sizes):
    """What shows is the text before the first stop string to be complete."""
    reader = StopStrings(stops)
    shown = "".join(reader.push(part) for part in chunks(text, sizes)) + reader.flush()
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert reader.stopped == bool(ends)
    if not ends:
        assert shown == text
    else:
        assert text.startswith(shown) and len(shown) in {text.find(s) for s in stops if s in text}


def test_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="a stop string is empty"):
        StopStrings(["ok", ""])


def read(reader, ids, size=1):
    pieces = [
        piece for start in range(0, len(ids), size) for piece in reader.push(ids[start:][:size])
    ]
    thought = "".join(piece.text for piece in pieces + reader.flush() if piece.thought)
    return thought, "".join(piece.text for piece in pieces if not piece.thought)


@pytest.mark.parametrize("size", [1, 4, 100])
def test_the_thought_is_apart_from_the_answer(size):
    ids = [*ids_of(b"so <think>"), END_THINK, *ids_of(b"\n\nyes </think>")]
    reader = ReplyReader(CODER, THINK_IDS, prompt=[0, THINK, *ids_of(b"\n")])
    assert read(reader, ids, size) == ("so <think>", "\n\nyes </think>")
    reader = ReplyReader(CODER, THINK_IDS, prompt=[0, *ids_of(b"hi"), END_THINK])
    assert read(reader, [THINK, *ids], size) == ("so <think>", "\n\nyes </think>")


def test_a_closed_thought_of_the_prompt_stays_closed():
    reader = ReplyReader(CODER, THINK_IDS, prompt=[THINK, *ids_of(b"x"), END_THINK])
    assert reader.push(ids_of(b"yes")) == [Piece("yes", False)]


def test_a_half_character_ends_with_the_thought():
    reader = ReplyReader(CODER, THINK_IDS, prompt=[THINK])
    pieces = reader.push([*ids_of(b"a\xf0\x9f"), END_THINK, *ids_of(b"b")])
    assert pieces == [Piece("a", True), Piece("\ufffd", True), Piece("b", False)]


def test_stop_strings_end_thought_and_answer():
    for prompt, thought in (([THINK], True), ([], False)):
        reader = ReplyReader(CODER, THINK_IDS, prompt, stops=["stop"])
        assert reader.push(ids_of(b"so st")) == [Piece("so ", thought)]
        assert not reader.stopped
        assert reader.push(ids_of(b"op it")) == [] and reader.stopped
        assert reader.push([END_THINK, *ids_of(b"on")]) == [] and reader.flush() == []


def test_a_model_without_think_tokens_answers_only():
    reader = ReplyReader(CODER, None, prompt=[THINK])
    text = "a</think>" + EOS
    assert reader.push(ids_of(text.encode())) == [Piece(text, False)]


@pytest.mark.parametrize("sizes", [[], [1] * 60, [3] * 20])
def test_calls_begin_at_a_mark_in_the_answer(sizes):
    """Not in the thought, and no stop string counts behind it."""
    reader = ReplyReader(CODER, THINK_IDS, [THINK], stops=["stop"], marks=["\n\n<c>", "<c>"])
    ids = [*ids_of(b"a<c>b"), END_THINK, *ids_of(b"said\n\n<d>\n\n<c> stop")]
    pieces, calls = [], ""
    for part in chunks(ids, sizes):
        pieces += reader.push(part)
        calls += reader.take_calls()
    pieces += reader.flush()
    assert "".join(text for text, thought in pieces if thought) == "a<c>b"
    assert "".join(text for text, thought in pieces if not thought) == "said\n\n<d>"
    assert calls + reader.take_calls() == "\n\n<c> stop" and not reader.stopped


def test_half_a_mark_is_text():
    reader = ReplyReader(CODER, marks=["\n\n<calls>"])
    pieces = [*reader.push(ids_of(b"x\n\n<ca")), *reader.flush()]
    assert "".join(piece.text for piece in pieces) == "x\n\n<ca" and not reader.take_calls()
