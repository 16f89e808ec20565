"""Replaces what identifies or unlocks: e-mail addresses, public IPv4 addresses, keys and tokens.

Replacements are reserved for examples (RFC 2606, RFC 5737), so that a model learns the form and
nobody is written to. Which addresses are public: the `ipaddress` of the standard library.
"""

from __future__ import annotations

import ipaddress
import re

EMAIL, ADDRESS, KEY = "name@example.com", "192.0.2.1", "REMOVED-KEY"

# Most begin with what is rare, which `re` finds fast, and look back from there.
_EMAIL = re.compile(
    r"(?<![\w.+-])[A-Za-z0-9](?:[\w.+-]{0,62}[\w+-])?@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}\b"
)
_DOMAIN = re.compile(r"@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}\b")
_EXAMPLE = re.compile(r"@(?:[\w-]+\.)*(?:example\.(?:com|org|net)|example|invalid|test)$", re.I)
_ADDRESS = re.compile(r"\d(?<![\w.-].)\d{0,2}\.\d{1,3}\.\d{1,3}\.\d{1,3}(?![\w-]|\.\d)")
# As their issuers document them: a fixed beginning, then a fixed kind of characters.
_KEYS = [
    re.compile(pattern)
    for pattern in (
        r"A[KS]IA(?<!\w....)[A-Z0-9]{16}\b",  # AWS
        r"gh[pousr]_(?<!\w....)[A-Za-z0-9]{36,}\b",  # GitHub
        r"github_pat_(?<!\w...........)\w{60,}",
        r"glpat-(?<!\w......)[\w-]{20,}",  # GitLab
        r"sk-(?<!\w...)[A-Za-z0-9_-]{32,}",  # OpenAI, Anthropic, DeepSeek
        r"hf_(?<!\w...)[A-Za-z0-9]{30,}\b",  # Hugging Face
        r"xox[abpr]-(?<!\w.....)[\w-]{20,}",  # Slack
        r"AIza(?<!\w....)[\w-]{35}",  # Google
    )
]
_BLOCK = re.compile(
    r"(-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----).*?(-----END (?:[A-Z]+ )*PRIVATE KEY-----)", re.S
)


def replace(text: str) -> str:
    """Returns a text with e-mail addresses, public IPv4 addresses and keys replaced."""
    if _DOMAIN.search(text):
        text = _EMAIL.sub(lambda match: match[0] if _EXAMPLE.search(match[0]) else EMAIL, text)
    if "-----BEGIN" in text:
        text = _BLOCK.sub(rf"\1\n{KEY}\n\2", text)
    for key in _KEYS:
        text = key.sub(KEY, text)
    return _ADDRESS.sub(lambda match: ADDRESS if _is_public(match[0]) else match[0], text)


def _is_public(text: str) -> bool:
    try:
        return ipaddress.IPv4Address(text).is_global
    except ValueError:
        return False  # a part above 255, or with a leading zero
