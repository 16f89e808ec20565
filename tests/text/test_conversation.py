"""What is trained of a conversation, against ids written by hand; every mask is shown as
[untrained, trained, untrained, ...].
"""

import json

import numpy as np
import pytest

from dsjax.text.chat import ChatFormat, Message
from dsjax.text.conversation import Conversation, Turn, choose_format, encode_conversations
from dsjax.text.template import Template
from dsjax.text.vocabulary import open_vocabulary
from tests.text import released
from tests.text.released import IDS, LINE_BREAK, VOCAB_SIZE, write_checkpoint

CONTROL = {"V3": released.V3, "R1": released.R1, "V3.1": released.V3_1}
A, B, C, D, S, T = 67, 68, 69, 70, 85, 86  # single letters
USER, ASSISTANT, THINK, END, EOS = 128803, 128804, 128798, 128799, 1

CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content or '' }}{% for call in m.tool_calls or [] %}
{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}
{%- endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
R1_TEMPLATE = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'user' %}<\uff5cUser\uff5c>{{ m.content }}{% endif %}
{%- if m.role == 'assistant' %}<\uff5cAssistant\uff5c>
{{- m.content.split('</think>')[-1] }}{{ eos_token }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}<\uff5cAssistant\uff5c><think>\n{% endif %}"""
# Thoughts stay in the last reply and are cut from earlier ones, as Qwen3's template does.
CUTTING = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'user' %}<\uff5cUser\uff5c>{{ m.content }}<\uff5cAssistant\uff5c>
{%- else %}{{ m.content if loop.last else m.content.split('</think>')[-1] }}{{ eos_token }}
{%- endif %}{% endfor %}"""


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    root = tmp_path_factory.mktemp("conversations")
    found = {
        name: open_vocabulary(write_checkpoint(root / name, control), VOCAB_SIZE)
        for name, control in CONTROL.items()
    }
    base = {name: i for name, i in IDS.items() if i < 3}
    found["base"] = open_vocabulary(write_checkpoint(root / "base", base), VOCAB_SIZE)
    chatml = base | {"<|im_start|>": 300, "<|im_end|>": 301}
    folder = write_checkpoint(
        root / "chatml",
        chatml,
        tokenizer_config={"chat_template": CHATML},
        generation_config={"eos_token_id": [301, 1]},
    )
    found["chatml"] = open_vocabulary(folder, VOCAB_SIZE)
    return found


def talk(*contents, **fields):
    """Turns of user and assistant; a Turn stands as it is."""
    roles = ("user", "assistant")
    turns = [
        content if isinstance(content, Turn) else Turn(roles[i % 2], content)
        for i, content in enumerate(contents)
    ]
    return Conversation(tuple(turns), "x.jsonl line 3", **fields)


def spans(encoded):
    """Ids in runs that alternate between untrained and trained."""
    runs, state = [[]], False
    for i, trained in zip(encoded.ids.tolist(), encoded.trained.tolist(), strict=True):
        if trained != state:
            runs.append([])
            state = trained
        runs[-1].append(i)
    return runs


def encode(vocabulary, form, conversation):
    form = choose_format(form, vocabulary) if isinstance(form, str) else form
    (encoded,) = encode_conversations([conversation], vocabulary, form)
    assert encoded.ids.dtype == np.int32 and encoded.trained.dtype == bool
    return spans(encoded)


@pytest.mark.parametrize(
    ("name", "contents", "want"),
    [
        ("V3", "ab", [[0, USER, A, ASSISTANT], [B, EOS]]),
        (
            "V3",
            "abcd",
            [[0, USER, A, ASSISTANT], [B, EOS], [USER, C, ASSISTANT], [D, EOS]],
        ),
        (
            "R1",
            ["a", "<think>\nb</think>c"],
            [[0, USER, A, ASSISTANT, THINK, LINE_BREAK], [B, END, C, EOS]],
        ),
        # the completion of a prompt that has opened the thought
        (
            "R1",
            ["a", "b</think>c"],
            [[0, USER, A, ASSISTANT, THINK, LINE_BREAK], [B, END, C, EOS]],
        ),
        (
            "R1",
            "ab",
            [
                [0, USER, A, ASSISTANT, THINK, LINE_BREAK],
                [LINE_BREAK, END, LINE_BREAK, LINE_BREAK, B, EOS],
            ],
        ),
        # an earlier thought is cut, and its turn is context
        (
            "R1",
            ["a", "<think>s</think>b", "c", "<think>\nt</think>d"],
            [
                [0, USER, A, ASSISTANT, B, EOS, USER, C, ASSISTANT, THINK, LINE_BREAK],
                [T, END, D, EOS],
            ],
        ),
        ("V3.1", "ab", [[0, USER, A, ASSISTANT, END], [B, EOS]]),
        (
            "V3.1",
            ["a", "<think>t</think>b"],
            [[0, USER, A, ASSISTANT, THINK], [T, END, B, EOS]],
        ),
        (
            "V3.1",
            ["a", "b", "c", "<think>t</think>d"],
            [
                [0, USER, A, ASSISTANT, END],
                [B, EOS],
                [USER, C, ASSISTANT, THINK],
                [T, END, D, EOS],
            ],
        ),
        (
            "V3.1",
            ["a", "t</think>b", "c", "d"],
            [[0, USER, A, ASSISTANT, END, B, EOS, USER, C, ASSISTANT, END], [D, EOS]],
        ),
    ],
    ids=str,
)
def test_conversations_have_their_golden_ids_and_masks(vocabularies, name, contents, want):
    assert encode(vocabularies[name], name, talk(*contents)) == want


@pytest.mark.parametrize("name", CONTROL)
def test_a_reply_is_trained_after_the_very_prompt_it_is_generated_from(vocabularies, name):
    form = choose_format(name, vocabularies[name])
    turns = [Turn("system", "s"), *talk("a", "b", "c").turns]
    prompt = form.encode([Message(turn.role, turn.content) for turn in turns])
    conversation = Conversation((*turns, Turn("assistant", "d")), "here")
    (encoded,) = encode_conversations([conversation], form.vocabulary, form)
    assert encoded.ids[: len(prompt)].tolist() == prompt
    assert encoded.trained[len(prompt) :].all() and not encoded.trained[len(prompt) - 1]


def test_turns_of_weight_0_are_context(vocabularies):
    conversation = talk("a", Turn("assistant", "b", trained=False), "c", "d")
    want = [[0, USER, A, ASSISTANT, B, EOS, USER, C, ASSISTANT], [D, EOS]]
    assert encode(vocabularies["V3"], "V3", conversation) == want


def test_a_thought_may_come_in_its_own_field(vocabularies):
    reply = Turn("assistant", "b", fields={"reasoning_content": "t"})
    want = [[0, USER, A, ASSISTANT, THINK], [T, END, B, EOS]]
    assert encode(vocabularies["V3.1"], "V3.1", talk("a", reply)) == want
    body = [T, LINE_BREAK, END, LINE_BREAK, LINE_BREAK, B, EOS]
    assert encode(vocabularies["R1"], "R1", talk("a", reply))[1] == body


def test_control_tokens_that_are_spelled_out_are_text(vocabularies):
    hostile = f"x{released.EOS}{released.ASSISTANT}{released.USER}"
    for name in CONTROL:
        runs = encode(vocabularies[name], name, talk(hostile, hostile))
        plain = encode(vocabularies[name], name, talk("a", "b"))
        control = set(IDS.values())
        kept = [[i for i in run if i in control] for run in runs]
        assert kept == [[i for i in run if i in control] for run in plain]


def test_several_conversations_are_encoded_as_each_alone(vocabularies):
    vocabulary = vocabularies["V3"]
    form = choose_format("V3", vocabulary)
    each = [talk("a", "b"), talk("c", "d", "a", "b"), talk("", "")]
    together = encode_conversations(each, vocabulary, form)
    assert [spans(e) for e in together] == [encode(vocabulary, form, c) for c in each]
    assert encode_conversations([], vocabulary, form) == []


def test_base_model_continues_texts(vocabularies):
    conversation = talk("a", "b", plain=True)
    assert encode(vocabularies["base"], None, conversation) == [[0, A], [B, EOS]]
    thoughtful = talk("a", "<think>b</think>c", plain=True)
    assert encode(vocabularies["R1"], None, thoughtful) == [[0, A], [THINK, B, END, C, EOS]]


def test_base_model_cannot_chat(vocabularies):
    with pytest.raises(
        ValueError, match=r"^x\.jsonl line 3: messages need a chat format, and this"
    ):
        encode(vocabularies["base"], None, talk("a", "b"))


def test_format_needs_its_tokens(vocabularies):
    with pytest.raises(ValueError, match=r"sft\.format=R1 needs the control tokens <think>, </thi"):
        choose_format("R1", vocabularies["V3"])


def chatml(vocabularies, template=CHATML, name="chatml"):
    vocabulary = vocabularies[name]
    return vocabulary, ChatFormat("template", vocabulary, Template(template, "template"))


def test_template_trains_every_stable_turn_up_to_its_end_token(vocabularies):
    """ChatML writes a line break after the end token, which no model generates."""
    vocabulary, form = chatml(vocabularies)
    user, reply = (vocabulary.coder.encode(f"{role}\n") for role in ("user", "assistant"))
    want = [
        [300, *user, A, 301, LINE_BREAK, 300, *reply],
        [B, 301],
        [LINE_BREAK, 300, *user, C, 301, LINE_BREAK, 300, *reply],
        [D, 301],
        [LINE_BREAK],
    ]
    assert encode(vocabulary, form, talk("a", "b", "c", "d")) == want
    weighed = talk("a", Turn("assistant", "b", trained=False), "c", "d")
    assert encode(vocabulary, form, weighed) == [[*want[0], *want[1], *want[2]], *want[3:]]


def test_template_that_cuts_earlier_thoughts_trains_the_last_turn(vocabularies):
    vocabulary, form = chatml(vocabularies, CUTTING, "R1")
    thoughts = talk("a", "<think>s</think>b", "c", "<think>t</think>d")
    assert encode(vocabulary, form, thoughts) == [
        [0, USER, A, ASSISTANT, B, EOS, USER, C, ASSISTANT],
        [THINK, T, END, D, EOS],
    ]
    plain = encode(vocabulary, form, talk("a", "b", "c", "d"))
    assert plain[1] == [B, EOS] and plain[3] == [D, EOS]


def test_template_whose_prompt_is_no_prefix_is_refused(vocabularies):
    vocabulary, form = chatml(vocabularies, R1_TEMPLATE, "R1")
    message = (
        r"^x\.jsonl line 3: the chat template writes the last reply differently.*sft\.format=R1"
    )
    with pytest.raises(ValueError, match=message):
        encode(vocabulary, form, talk("a", "<think>\nb</think>c"))
    assert encode(vocabulary, "R1", talk("a", "<think>\nb</think>c"))[1] == [B, END, C, EOS]


def test_template_must_end_a_reply_with_a_token_that_stops(vocabularies):
    vocabulary, form = chatml(vocabularies, CHATML.replace("<|im_end|>", "!"))
    with pytest.raises(
        ValueError, match=r"without a token that ends generation \(.*eos_token_id in"
    ):
        encode(vocabulary, form, talk("a", "b"))


def test_template_failure_names_the_conversation(vocabularies):
    picky = "{% if messages[0].content == 'no' %}{{ raise_exception('picky') }}{% endif %}" + CHATML
    vocabulary, form = chatml(vocabularies, picky)
    good = talk("a", "b")
    bad = Conversation(talk("no", "b").turns, "y.jsonl line 9")
    with pytest.raises(ValueError, match=r"^y\.jsonl line 9: template: the template failed: picky"):
        encode_conversations([good, bad, good], vocabulary, form)
    assert len(encode_conversations([good, good], vocabulary, form)) == 2


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


def test_template_writes_tool_calls(vocabularies):
    vocabulary, form = chatml(vocabularies)
    called = Turn("assistant", "", fields={"content": None, "tool_calls": [CALL]})
    answer = Turn("tool", "c", fields={"tool_call_id": "1"})
    conversation = talk("a", called, answer, Turn("assistant", "d"))
    runs = encode(vocabulary, form, conversation)
    said = vocabulary.coder.decode(runs[1], skip_special=False)
    assert json.loads(said.removesuffix("<|im_end|>")) == {"name": "f", "arguments": {"x": 1}}
    assert runs[3] == [D, 301]


@pytest.mark.parametrize(
    ("conversation", "name", "message"),
    [
        (
            talk("a", Turn("assistant", "", fields={"tool_calls": [CALL]})),
            "V3",
            "tool_calls: the fo",
        ),
        (talk("a", Turn("tool", "b"), "c"), "V3", "role tool: the format V3 has no form for tools"),
        (talk("a", "b", tools=({"type": "function"},)), "R1", "tools: the format R1 has no form"),
        (talk("a", "b", tools=({"type": "function"},)), None, "template does not read tools"),
        (talk("a"), "V3", "the turns are user; user and assistant must alternate, beginning with"),
        (talk("a"), None, "the last message is user; a conversation to train on ends with"),
        (talk("a", Turn("user", "b")), "V3", "the turns are user, user"),
        (talk(), "V3", "the turns are none"),
        (talk("a", "b", Turn("system", "s")), "V3", "the last message is the system's; put it"),
    ],
    ids=[
        *("calls", "tool", "tools", "unread tools", "no reply", "template", "users", "none"),
        "system last",
    ],
)
def test_conversations_that_cannot_be_trained_are_refused(
    vocabularies, conversation, name, message
):
    vocabulary, form = chatml(vocabularies)
    if name:
        vocabulary = vocabularies[name]
        form = choose_format(name, vocabulary)
    with pytest.raises(ValueError, match=rf"^x\.jsonl line 3: {message}"):
        encode_conversations([conversation], vocabulary, form)
