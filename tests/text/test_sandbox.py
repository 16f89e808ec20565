"""Templates as programs: what they may use, and what stops the hostile ones."""

import json
import resource
import tempfile
from pathlib import Path

import pytest

from dsjax.text import sandbox
from dsjax.text.sandbox import try_tokenizer


def render(template, context):
    (text,) = sandbox.render(template, context)
    return text


def test_one_process_renders_many_contexts():
    contexts = [{"n": n} for n in range(300)]
    assert sandbox.render("{{ n }}", *contexts) == [str(n) for n in range(300)]


def test_templates_render_as_in_transformers():
    """Blocks leave no line of their own behind, and JSON is not escaped for HTML."""
    template = "{% for x in xs %}\n  {% if x == 3 %}{% break %}{% endif %}\n{{ x | tojson }},\n"
    template += "{%- endfor %}\n{{ none is none }}{% generation %}!{% endgeneration %}"
    assert render(template, {"xs": ["<\u00e9>", {"a": 1}, 3, 4]}) == '"<\u00e9>",{"a": 1},True!'
    assert render("{{ {'b': 1, 'a': [2]} | tojson(indent=1) }}", {}) == (
        '{\n "b": 1,\n "a": [\n  2\n ]\n}'
    )
    assert render("{{ strftime_now('%Y')|length }}", {}) == "4"
    assert render("{% set ns = namespace(n=1) %}{% set ns.n = 2 %}{{ ns.n }}", {}) == "2"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 'a' * 3000000000 }}", "needs more than 512 MB of memory"),
        ("{{ 'a'.center(4000000000) }}", "needs more than 512 MB of memory"),
        (
            "{% set ns = namespace(s='a') %}{% for _ in range(60) %}"
            "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
            "needs more than 512 MB of memory",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
        ("{{ raise_exception('roles must alternate') }}", "failed: roles must alternate"),
        ("{{ missing.field }}", "failed: 'missing' is undefined"),
        ("{% if %}", "has an error in line 1: Expected an expression"),
        ("a\n{% endfor %}", "has an error in line 2: "),
        ("{{ 1 / 0 }}", "failed: division by zero"),
        ("{{ range(100000000) }}", "failed: Range too big"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "failed: .*unsafe"),
        ("{% set _ = xs.append(1) %}", "failed: access to attribute 'append' .*unsafe"),
        ("{% include '/etc/passwd' %}", "failed: no loader"),
        ("{{ 'a' * 17000000 }}", "made a text of 17000000 characters"),
        ("x" * (sandbox.MAX_TEMPLATE + 1), "has 1048577 characters; at most 1048576 are allowed"),
    ],
    ids=[
        *("multiply", "center", "double", "recursion", "raise", "undefined", "syntax", "stray end"),
        *("division", "range", "escape", "mutation", "include", "output", "length"),
    ],
)
def test_templates_are_stopped(template, message):
    with pytest.raises(ValueError, match=f"the template {message}"):
        render(template, {"xs": []})


def test_endless_work_ends_at_the_limit_of_processor_time():
    loops = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with pytest.raises(ValueError, match="the template ran for more than 2 seconds"):
        render(loops, {})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert 1.5 < (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 4


def test_waiting_ends_at_the_limit_of_the_clock(monkeypatch):
    monkeypatch.setattr(sandbox, "CLOCK_SECONDS", 0.01)
    with pytest.raises(ValueError, match=r"the template ran for more than 0\.01 seconds"):
        render("x", {})


def test_a_dead_process_is_an_error(monkeypatch):
    monkeypatch.setattr(sandbox.sys, "executable", "false")
    with pytest.raises(ValueError, match="the template ended its process: exit code 1"):
        render("x", {})


LETTERS = {chr(code): code - 32 for code in range(32, 127)}
TOKENIZER = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": LETTERS}}
TOKENIZER["model"] |= {"merges": []}


def replacing(*pairs):
    steps = [{"type": "Replace", "pattern": {"String": a}, "content": b} for a, b in pairs]
    return {"normalizer": {"type": "Sequence", "normalizers": steps}}


def test_plain_tokenizer_is_tried_once(monkeypatch):
    data = json.dumps(TOKENIZER | replacing((" ", "_" * 8), ("_", "____"))).encode()
    try_tokenizer(data)
    monkeypatch.setattr(sandbox, "_ask", None)
    try_tokenizer(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replacing(*[("a", "a" * 1000)] * 4), "can make 1000000000000 characters of one"),
        (replacing(("xyzzy", "x" * 1000)), "can make 200 characters of one, and more than 64"),
        ({"pre_tokenizer": {"type": "Split", "behavior": "Isolated", "invert": False,
                            "pattern": {"Regex": "(a|a)*b"}}}, "the tokenizer failed: .*retry"),
        ({"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, "the tokenizer failed"),
        ({"decoder": {"type": "Replace"}}, "the tokenizer failed"),
    ],
    ids=["bomb", "rare bomb", "endless pattern", "negative id", "half a step"],
)  # fmt: skip
def test_hostile_tokenizers_end_in_a_message(change, message):
    with pytest.raises(ValueError, match=message):
        try_tokenizer(json.dumps(TOKENIZER | change).encode())


def test_tokenizer_that_aborts_takes_only_its_own_process_along(monkeypatch):
    """With the growth allowed, the library runs out of memory, and aborts."""
    bomb = json.dumps(TOKENIZER | replacing(*[("a", "a" * 1000)] * 4)).encode()
    source = Path(sandbox.__file__).read_text().replace("MAX_GROWTH = 64", "MAX_GROWTH = 1e99")
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(source)
        file.flush()
        monkeypatch.setattr(sandbox, "__file__", file.name)
        monkeypatch.setattr(sandbox, "TOKENIZER_MEMORY", 1 << 30)
        with pytest.raises(
            ValueError, match=r"the tokenizer (ended its process|ran for more|needs)"
        ):
            try_tokenizer(bomb)
