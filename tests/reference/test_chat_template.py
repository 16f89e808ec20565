"""Templates and tokenizers as transformers applies them, on text without control tokens."""

import pytest

from dsjax.text.chat import Message, find_format
from dsjax.text.vocabulary import open_vocabulary
from tests.text.released import BOS, EOS, R1, VOCAB_SIZE, write_checkpoint

pytestmark = pytest.mark.torch

# What templates in the wild use: namespaces, loop variables, filters, whitespace control.
TEMPLATES = {
    "users": """{{ bos_token }}{% for m in messages %}
    {% if m['role'] == 'user' %}
{{ 'User: ' + m['content'] + '\n\n' }}
    {%- elif m['role'] == 'assistant' %}
{{ 'Assistant: ' + m['content'] | trim + eos_token }}
    {%- else %}
{{ m['content'] + '\n\n' }}
    {%- endif %}
{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}""",
    "thinking": """{%- set ns = namespace(system='', last=false) -%}
{%- for m in messages if m.role == 'system' %}
  {%- set ns.system = ns.system ~ m.content -%}
{%- endfor -%}
{{ bos_token }}{{ ns.system }}{% for m in messages %}
  {%- if m.role == 'user' -%}<\uff5cUser\uff5c>{{ m.content }}{%- set ns.last = true -%}
  {%- elif m.role == 'assistant' -%}
    <\uff5cAssistant\uff5c>{{ m.content.split('</think>')[-1] }}{{ eos_token }}
  {%- endif -%}
{%- endfor -%}
{%- if ns.last and add_generation_prompt -%}<\uff5cAssistant\uff5c>
{{- '<think>' if thinking is defined and thinking else '</think>' }}{%- endif -%}""",
    "json": "{{ messages | tojson }}\n{{ messages[0] | tojson(indent=2) }}{{ tools is none }}",
}
TURNS = [
    ("system", "Be <b>kind</b> & brief."),
    ("user", "na\u00efve \u4f60\u597d\n\n  indented "),
    ("assistant", "<think>so</think>\n\n Yes. "),
    ("user", "9.11 or 9.8?"),
]


# Where a template does not read `thinking`, transformers drops it in silence and we refuse it.
@pytest.mark.parametrize(
    ("name", "thinking"),
    [*((name, None) for name in TEMPLATES), ("thinking", True), ("thinking", False)],
)
def test_ids_equal_transformers(tmp_path, name, thinking):
    from transformers import PreTrainedTokenizerFast

    merges = [("U", "s"), ("e", "r"), ("Us", "er"), (":", "\u0120"), ("\u010a", "\u010a")]
    config = {"bos_token": BOS, "eos_token": EOS, "chat_template": TEMPLATES[name]}
    write_checkpoint(tmp_path, R1, merges, tokenizer_config=config)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    options = {} if thinking is None else {"thinking": thinking}
    turns = [{"role": role, "content": content} for role, content in TURNS]
    want = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=False, **options
    )
    form = find_format(tmp_path, open_vocabulary(tmp_path, VOCAB_SIZE))
    found = form.encode([Message(*turn) for turn in TURNS], thinking=thinking)
    assert found == want and len(found) > 60
