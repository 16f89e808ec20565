"""Grammars that a reply must follow: JSON, JSON schemas, regular expressions and Lark grammars, by
the library llguidance.

The library says for each place of a reply which tokens may come, the end among them where the text
is complete. Its own limits bound the time and memory that a grammar takes; a schema that asks for
more is refused.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Mapping
from typing import Any

import llguidance.numpy
import numpy as np
from llguidance import LLMatcher, LLTokenizer

from dsjax.serve.fields import invalid
from dsjax.text.tokenizer import Coder

# Enough for any layout, and an end to a model that would write spaces forever.
OPTIONS: Any = {"whitespace_pattern": "[ \\n]{1,64}"}
LARGEST = 1 << 17  # characters of a schema or grammar


class Grammars:
    """Makes the grammars of a tokenizer, which takes seconds to read, once it is first needed."""

    def __init__(self, coder: Coder, vocab_size: int, stop_ids: Collection[int]) -> None:
        self._coder, self._vocab_size = coder, vocab_size
        self._stop_ids = sorted(stop_ids)
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None

    def read(self) -> LLTokenizer:
        """Returns the library's view of the tokenizer."""
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = LLTokenizer(
                    self._coder.inner.to_str(),
                    n_vocab=self._vocab_size,
                    eos_token=self._stop_ids or None,
                )
            return self._tokenizer

    def json_object(self, path: str) -> Matcher:
        """Returns the grammar of any JSON object."""
        return self.schema({"type": "object"}, path)

    def schema(self, schema: Any, path: str) -> Matcher:
        """Returns the grammar of values that a JSON schema admits.

        Raises:
          ApiError: 422, the schema is none or too complex; `path` is its field.
        """
        return self._matcher(schema_grammar(schema, path), path)

    def regex(self, pattern: str, path: str) -> Matcher:
        return self._matcher(LLMatcher.grammar_from_regex(pattern), path)

    def lark(self, grammar: str, path: str) -> Matcher:
        """Returns the grammar given in Lark's notation."""
        return self._matcher(LLMatcher.grammar_from_lark(grammar), path)

    def _matcher(self, grammar: str, path: str) -> Matcher:
        if len(grammar) > LARGEST:
            raise invalid(path, f"has {len(grammar)} characters; at most {LARGEST} may be")
        tokenizer = self.read()
        matcher = LLMatcher(tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise invalid(path, f"cannot be followed: {matcher.get_error()[:500]}")
        return Matcher(matcher, self._vocab_size)


def schema_grammar(schema: Any, path: str) -> str:
    """Returns the library's grammar for a JSON schema.

    Raises:
      ApiError: 422, the schema is none.
    """
    if not isinstance(schema, Mapping):
        raise invalid(path, "must be an object that holds a JSON schema")
    text = json.dumps(schema)
    if len(text) > LARGEST:
        raise invalid(path, f"has {len(text)} characters; at most {LARGEST} may be")
    try:
        return LLMatcher.grammar_from_json_schema(text, defaults=OPTIONS)
    except ValueError as error:
        raise invalid(path, f"is not a JSON schema: {str(error)[:500]}") from error


class Matcher:
    """A grammar and how far a reply has followed it."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._mask = llguidance.numpy.allocate_token_bitmask(1, vocab_size)

    def allowed(self) -> np.ndarray | None:
        """Returns which tokens may come next, bool [V]; None if the library has given up, so that
        anything may.
        """
        if self._matcher.is_error():
            return None
        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._mask, 0)
        bits = np.unpackbits(self._mask[0].view(np.uint8), bitorder="little")
        allowed = bits[: self._vocab_size].astype(bool)
        return allowed if allowed.any() else None

    def push(self, token: int) -> None:
        self._matcher.consume_token(token)
