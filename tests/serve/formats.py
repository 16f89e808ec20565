"""Tokenizers that can chat in DeepSeek's formats, trained on a line of text."""

from tokenizers import AddedToken

from dsjax.text import dsml, tool_calls
from dsjax.text.chat import ASSISTANT, SEARCH, USER
from dsjax.text.tokenizer import train_tokenizer
from dsjax.text.vocabulary import END_THINK, THINK

TOOL_TOKENS = (
    tool_calls.CALLS, tool_calls.END_CALLS, tool_calls.CALL, tool_calls.END_CALL,
    tool_calls.SEPARATOR, tool_calls.RESULTS, tool_calls.END_RESULTS, tool_calls.RESULT,
    tool_calls.END_RESULT,
)  # fmt: skip
V3 = (USER, ASSISTANT, *TOOL_TOKENS)
R1 = (*V3, THINK, END_THINK)
V3_1 = (*R1, SEARCH)
V3_2 = (*V3_1, dsml.DSML)
VOCAB_SIZE = 640
TOOL = {
    "function": {"name": "get_weather", "description": "Gets.", "parameters": {"type": "object"}}
}
# The instructions for tools are long: as few tokens of them as may be.
TEXT = 'Some text to begin with, with \u00fcmlauts; {"a": 1}, [2] and more text.\n' * 6
TEXT += "".join(tool_calls.describe([TOOL], fenced=True)) * 3


def write_tokenizer(folder, control=V3_1):
    """Writes tokenizer.json and tokenizer_config.json; the control tokens come after the text's."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer([TEXT] * 3, vocab_size=VOCAB_SIZE - len(V3_2))
    tokenizer.inner.add_tokens([AddedToken(name, special=False) for name in control])
    tokenizer.save(str(folder))
    return folder
