"""What a user sees of a reply, and what of it stays in a conversation; the engine is scripted."""

import argparse
import dataclasses
import io
import json
import sys
import types
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from dsjax.generate.sampling import Sampling
from dsjax.infer import console
from dsjax.infer.console import Screen, answer, chat, describe
from dsjax.text.reply import Piece
from dsjax.text.vocabulary import open_vocabulary
from tests.golden import vl2
from tests.infer.scripted import CODER, SPEED, ScriptedEngine, ids
from tests.text import released
from tests.text.released import R1, VOCAB_SIZE, write_checkpoint

THINK, END_THINK = R1["<think>"], R1["</think>"]
SPEED_LINE = "prompt: 10 tokens (20.0/s); reply: 7 tokens (3.0/s)\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def typed(monkeypatch, lines):
    """The lines come from a terminal; an exception among them is raised at its place."""
    script = iter(lines)

    def read(prompt):
        line = next(script, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(sys, "stdout", Terminal())


def test_answer_marks_the_thought_in_a_file(make, capsys):
    _, generator = make("so\nhm</think>\n\nyes" + released.EOS)
    answer(generator, [0, THINK])
    output = capsys.readouterr()
    assert output.out == "<think>\nso\nhm\n</think>\nyes\n"
    assert output.err == SPEED_LINE


def test_answer_is_verbatim_without_a_thought(make, capsys):
    _, generator = make("\n x\x1b")
    answer(generator, [0])
    assert capsys.readouterr().out == "\n x\x1b\n"


def test_a_terminal_shows_the_thought_dim_and_no_control_characters():
    screen = Screen(stream := Terminal())
    for piece in (Piece("\nso", True), Piece(" \x1b]0;x\x07", True), Piece("\nyes\t\n.", False)):
        screen.show(piece)
    screen.end()
    assert stream.getvalue() == "\x1b[2mso \ufffd]0;x\ufffd\x1b[0m\nyes\t\n.\n"


def test_a_stopped_thought_is_closed(make, capsys):
    _, generator = make([*ids("so"), KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        answer(generator, [0, THINK])
    assert capsys.readouterr().out == "<think>\nso\n</think>\n\n"


def test_chat_through_a_pipe_keeps_answers_and_drops_thoughts(make, r1, monkeypatch, capsys):
    engine, generator = make("hm</think>\n1", "</think>2", "</think>3", "never")
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\n\n  b \n/reset\nc\n/exit\nd\n"))
    chat(generator, r1[1])
    output = capsys.readouterr()
    assert output.out == "<think>\nhm\n</think>\n1\n2\n3\n"
    assert output.err == SPEED_LINE * 3
    user, assistant = released.USER, released.ASSISTANT
    start = released.BOS + user
    think = assistant + "<think>\n"
    assert [request.prompt for request in engine.requests] == [
        tuple(ids(text))
        for text in (
            f"{start}a{think}",
            f"{start}a{assistant}\n1{released.EOS}{user}b{think}",
            f"{start}c{think}",
        )
    ]


def test_chat_ends_with_the_input(make, r1, monkeypatch, capsys):
    typed(monkeypatch, [])
    chat(make()[1], r1[1])
    assert "/reset forgets the conversation" in capsys.readouterr().err


def test_ctrl_c_stops_a_reply_and_the_next_one_the_chat(make, r1, monkeypatch):
    stopped = [*ids("</think>ab"), KeyboardInterrupt(), *ids("c")]
    silent = [*ids("hm"), KeyboardInterrupt()]
    engine, generator = make(stopped, silent, "</think>d")
    typed(monkeypatch, ["1", "2", "3", KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        chat(generator, r1[1])
    prompts = [CODER.decode(request.prompt, skip_special=False) for request in engine.requests]
    user, reply = released.USER, f"{released.ASSISTANT}ab{released.EOS}"
    # What was said stays; a turn without an answer is forgotten.
    assert prompts[1].startswith(f"{released.BOS}{user}1{reply}{user}2")
    assert prompts[2].startswith(f"{released.BOS}{user}1{reply}{user}3")


def test_ctrl_c_ends_a_chat_through_a_pipe(make, r1, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\n"))
    with pytest.raises(KeyboardInterrupt):
        chat(make([*ids("</think>x"), KeyboardInterrupt()])[1], r1[1])


def test_a_full_conversation_can_be_reset(make, r1, monkeypatch, capsys):
    _, generator = make("</think>x", context=8)
    typed(monkeypatch, ["far too long", "/reset", "a"])
    chat(generator, r1[1])
    assert (
        "error: the prompt has 17 tokens, which fill the model's context of 8"
        in capsys.readouterr().err
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("far too long\n"))
    with pytest.raises(ValueError, match="the prompt has 17 tokens"):
        chat(generator, r1[1])


def test_statistics_in_a_line():
    assert describe(SPEED) + "\n" == SPEED_LINE
    drafted = dataclasses.replace(SPEED, drafted=6, accepted=3, prefill_seconds=0.0)
    assert describe(drafted) == (
        "prompt: 10 tokens; reply: 7 tokens (4.5/s); 50% of drafts accepted, 1.50 tokens per step"
    )


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """Runs generate.py's work on a checkpoint whose model is scripted."""

    def make(*replies, **configs):
        write_checkpoint(tmp_path, configs.pop("control", R1), **configs)
        opened = types.SimpleNamespace(
            tokenizer_folder=tmp_path,
            hf=None,
            model=types.SimpleNamespace(vocab_size=VOCAB_SIZE, max_seq_len=500, n_mtp=0),
        )
        engine = ScriptedEngine(*replies)
        monkeypatch.setattr(console.load, "open_checkpoint", lambda path, overrides: opened)
        monkeypatch.setattr(console, "load_weights", lambda *arguments: arguments)
        monkeypatch.setattr(console, "Engine", lambda model, **options: engine)
        return engine

    return make


def run(**options):
    options = {"checkpoint": Path("x")} | options
    defaults = dict.fromkeys(
        "prompt tokens out max_new_tokens temperature top_k top_p min_p stop dtype thinking "
        "image boxes".split()
    )
    flags = {"raw": False, "no_bos": False, "speculative": False, "seed": 0, "mesh": {}}
    flags["override"] = []
    console.run(argparse.Namespace(**defaults | flags | options))


def test_prompt_is_a_turn_where_the_checkpoint_can_chat(checkpoint, capsys):
    engine = checkpoint(ids("</think>ok"), generation_config={"temperature": 0.6, "top_p": 0.95})
    run(prompt="a", seed=5, top_p=0.5, stop=["k"], max_new_tokens=9)
    assert capsys.readouterr().out == "o\n"
    (request,) = engine.requests
    assert request.prompt == (0, 128803, 67, 128804, THINK, released.LINE_BREAK)
    assert request.sampling == Sampling(temperature=0.6, top_p=0.5, seed=5)
    assert request.max_new_tokens == 9


def test_prompt_is_continued_when_asked_and_by_base_models(checkpoint):
    engine = checkpoint(ids("b"))
    run(prompt="a", raw=True)
    assert engine.requests[0].prompt == (0, 67) and engine.requests[0].max_new_tokens == 498
    engine = checkpoint(ids("b"), control={key: i for key, i in R1.items() if i < 3})
    run(prompt="a", temperature=0.0)
    assert engine.requests[0].prompt == (0, 67)
    assert engine.requests[0].sampling == Sampling(temperature=0)


def test_a_text_can_be_continued_without_the_begin_token(checkpoint):
    engine = checkpoint(ids("b"))
    run(prompt="a", raw=True, no_bos=True)
    assert engine.requests[0].prompt == (67,)
    with pytest.raises(ValueError, match="--no-bos applies to continued text, and this is a chat"):
        run(prompt="a", no_bos=True)


def test_thinking_reaches_the_template(checkpoint):
    template = "{{ 'T' if thinking is defined and thinking else 'N' }}"
    for flag, letter in ((True, "T"), (False, "N")):
        engine = checkpoint(ids("b"), tokenizer_config={"chat_template": template})
        run(prompt="a", thinking=flag)
        assert engine.requests[0].prompt == tuple(ids(letter))


def test_tokens_go_from_file_to_file_without_a_tokenizer(checkpoint, tmp_path, capsys):
    engine = checkpoint([1, 2], [3, 4])
    (tmp_path / "tokenizer.json").unlink()
    np.save(tmp_path / "p.npy", np.asarray([[5, 6], [7, 8]]))
    run(tokens=tmp_path / "p.npy", out=tmp_path / "o.npy", max_new_tokens=2, temperature=0.0)
    new = np.load(tmp_path / "o.npy")
    assert new.dtype == np.int32 and new.tolist() == [[1, 2], [3, 4]]
    assert [request.prompt for request in engine.requests] == [(5, 6), (7, 8)]
    assert capsys.readouterr().err == SPEED_LINE


def test_tokens_fill_the_context_without_a_number(checkpoint, tmp_path):
    engine = checkpoint([1] * 2)
    np.save(tmp_path / "p.npy", np.full((1, 498), 5))
    run(tokens=tmp_path / "p.npy", out=tmp_path / "o.npy")
    assert engine.requests[0].max_new_tokens == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "as a base model's; give a --prompt to continue"),
        ({"prompt": "a", "thinking": True}, "--thinking needs a chat format"),
        ({"prompt": "", "no_bos": True}, "there is no begin token to start from; give some text"),
        ({"prompt": "a", "top_p": 7.0}, r"top_p=7.0 must lie in \(0, 1\]"),
        ({"prompt": "a", "speculative": True}, "this model has none"),
        ({"prompt": "a", "stop": ["x", ""]}, "a stop string is empty"),
        ({"prompt": "a" * 500}, "the prompt has 501 tokens, which fill the model's context of 500"),
        ({"tokens": Path("none.npy"), "out": Path("o.npy")}, "No such file or directory"),
    ],
    ids=["chat", "thinking", "no bos", "top_p", "drafts", "stop", "long", "tokens"],
)
def test_run_refuses_before_it_reads_weights(checkpoint, monkeypatch, options, message):
    checkpoint(control={key: i for key, i in R1.items() if i < 3})

    def load_weights(*arguments):
        raise AssertionError("weights were read")

    monkeypatch.setattr(console, "load_weights", load_weights)
    with pytest.raises((ValueError, OSError), match=message):
        run(**options)


def test_rows_without_room_are_one_message_before_weights_are_read(
    checkpoint, monkeypatch, tmp_path
):
    checkpoint()
    monkeypatch.setattr(console, "load_weights", lambda *_: pytest.fail("weights were read"))
    rows, out = tmp_path / "p.npy", tmp_path / "o.npy"
    for length, asked, said in ((498, 3, 3), (500, None, 1)):
        np.save(rows, np.full((2, length), 5))
        message = f"rows of {length} tokens and --max-new-tokens {said} exceed .* of 500"
        with pytest.raises(ValueError, match=message) as refused:
            run(tokens=rows, out=out, max_new_tokens=asked)
        assert "\n" not in str(refused.value)


def test_config_of_a_mesh_reaches_the_weights(checkpoint, monkeypatch):
    checkpoint(ids("b"))
    seen = {}
    monkeypatch.setattr(
        console, "load_weights", lambda _, mesh, dtype: seen.update(mesh=mesh, dtype=dtype)
    )
    run(prompt="a", mesh={"tensor": 2}, dtype="float32")
    assert seen["mesh"].shape["tensor"] == seen["mesh"].size == 2
    assert seen["dtype"] == "float32"


def test_generation_defaults_can_be_overridden_by_zero(checkpoint):
    engine = checkpoint(ids("b"), generation_config=json.loads('{"top_k": 50, "min_p": 0.1}'))
    run(prompt="a", top_k=0, min_p=0.0)
    assert engine.requests[0].sampling == Sampling()


def test_boxes_need_a_model_that_says_where_things_are(checkpoint, tmp_path):
    checkpoint(ids("b"))
    with pytest.raises(ValueError, match="draws places that a reply names in a picture; add"):
        run(prompt="a", boxes=tmp_path / "b.png")
    with pytest.raises(
        ValueError, match=r"only a conversation \(no --raw\) with a model that sees"
    ):
        run(prompt="a", image=[tmp_path / "a.png"], boxes=tmp_path / "b.png")


def test_places_in_a_reply_are_shown_and_drawn(monkeypatch, tmp_path, capsys):
    """In the last picture; after a prompt, and in a chat."""
    folder = vl2.write(tmp_path / "vl2", vl2.CASES["heads"])
    reply = "here: <|ref|>a cat<|/ref|><|det|>[[0, 0, 500, 999]]<|/det|>"
    tokens = open_vocabulary(folder, vl2.VOCABULARY).coder.encode_control(reply)
    engine = ScriptedEngine(tokens, tokens, tokens)
    monkeypatch.setattr(console, "load_weights", lambda *arguments: arguments)
    monkeypatch.setattr(console, "Engine", lambda model, **options: engine)
    first, last, target = (tmp_path / f"{name}.png" for name in ("a", "b", "boxes"))
    PIL.Image.new("RGB", (30, 30)).save(first)
    PIL.Image.new("RGB", (44, 22)).save(last)
    say = {"checkpoint": folder, "image": [first, last], "boxes": target, "dtype": "float32"}
    run(prompt="where?", **say)
    out, shown = capsys.readouterr()
    assert out == reply + "\n" and engine.requests[0].given is not None
    assert next(line.split() for line in shown.splitlines() if "cat" in line)[-2:] == ["22", "22"]
    drawn = np.asarray(PIL.Image.open(target))
    assert drawn.shape == (22, 44, 3) and (drawn[10, 0] == (255, 0, 0)).all()
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/image {last}\nwhere?\nand now?\n"))
    run(checkpoint=folder, dtype="float32")
    assert capsys.readouterr().err.count("a cat") == 2


def test_a_picture_in_a_chat_is_named_as_in_a_shell(monkeypatch, tmp_path):
    folder = vl2.write(tmp_path / "vl2", vl2.CASES["heads"])
    engine = ScriptedEngine([65])
    monkeypatch.setattr(console, "load_weights", lambda *arguments: arguments)
    monkeypatch.setattr(console, "Engine", lambda model, **options: engine)
    monkeypatch.setenv("HOME", str(tmp_path))
    PIL.Image.new("RGB", (22, 22)).save(tmp_path / "a cat.png")
    monkeypatch.setattr(sys, "stdin", io.StringIO("/image ~/a cat.png\nwhat?\n/image\nwhat?\n"))
    with pytest.raises(ValueError, match=r"^/image names no picture; write /image PATH$"):
        run(checkpoint=folder, dtype="float32")
    (request,) = engine.requests
    assert request.given is not None


def test_a_reply_without_places_leaves_no_drawing(monkeypatch, tmp_path):
    folder = vl2.write(tmp_path / "vl2", vl2.CASES["heads"])
    monkeypatch.setattr(console, "load_weights", lambda *arguments: arguments)
    monkeypatch.setattr(console, "Engine", lambda model, **options: ScriptedEngine([65]))
    picture, target = tmp_path / "a.png", tmp_path / "b.png"
    PIL.Image.new("RGB", (22, 22)).save(picture)
    with pytest.raises(ValueError, match="the reply names no place"):
        run(checkpoint=folder, prompt="a", image=[picture], boxes=target, dtype="float32")
    assert not target.exists()
