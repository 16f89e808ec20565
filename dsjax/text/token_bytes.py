"""The bytes that a token stands for, which may be part of a character."""

from __future__ import annotations

import re

from tokenizers import pre_tokenizers

from dsjax.text.tokenizer import Coder

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"


def _byte_characters() -> dict[str, int]:
    """Returns the byte for each character in which byte-level tokenizers spell their tokens: a
    printable one stands for itself, the others follow from U+0100 on.
    """
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    shifted = iter(range(256, 512))
    return {chr(b) if chr(b) in alphabet else chr(next(shifted)): b for b in range(256)}


_BYTES = _byte_characters()


class TokenBytes:
    """Looks up the bytes of tokens, of byte-level tokenizers and of SentencePiece's."""

    def __init__(self, coder: Coder) -> None:
        self._coder = coder
        self._names = {i: name for name, i in coder.control.items()}
        vocabulary = coder.inner.get_vocab(with_added_tokens=False)
        self._byte_level = vocabulary.keys() >= _BYTES.keys()

    def of(self, token: int) -> bytes:
        """Returns the bytes of a token; the name of a control token; b"" for an unused id."""
        name = self._names.get(token)
        if name is None:
            spelled = self._coder.inner.id_to_token(token)
            return b"" if spelled is None else self._spelled(spelled)
        return name.encode()

    def _spelled(self, token: str) -> bytes:
        if self._byte_level:
            if all(character in _BYTES for character in token):
                return bytes(_BYTES[character] for character in token)
            return token.encode()  # an added token is spelled as it is
        if found := _BYTE.fullmatch(token):
            return bytes([int(found[1], 16)])
        return token.replace(_SPACE, " ").encode()
