"""Which type each tensor of a GGUF file gets: `--type`.

A choice is a type, a preset, or rules by tensor such as `experts=Q4_0,*=Q8_0`, of which the first
that fits a tensor holds. A rule names a group of tensors (`layout.GROUPS`) or a pattern of names,
as in a shell: `blk.0.*`, `*attn_v*`.

Norms, biases and the router are always float32. A tensor whose rows do not divide into a type's
blocks is stored in the next type with smaller blocks, or else in F16, as llama.cpp does.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import NamedTuple

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from dsjax.checkpoint.gguf.layout import GROUPS, Entry

# What the package gguf quantizes.
OWN = (
    "F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "MXFP4", "TQ2_0", "TQ1_0",
)  # fmt: skip
# What llama.cpp's program `llama-quantize` makes besides, without a matrix of importance.
BY_LLAMA = ("Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ4_NL", "IQ4_XS", "IQ3_S")
# Experts low, the rest high: attention, shared experts, embedding and head are a few hundredths of
# a large mixture's weights and most of what low types cost in quality.
PRESETS = {
    "experts-4bit": "experts=Q4_0,*=Q8_0",  # V3: 4.6 bits per weight
    "experts-2bit": "experts=Q2_K,*=Q8_0",  # V3: 2.8 bits per weight
}
_F32, _F16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16
# For rows that do not divide into blocks of 256: the next type with blocks of 32.
_SMALLER = {
    "TQ1_0": "Q4_0", "TQ2_0": "Q4_0", "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0",
    "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL", "IQ3_S": "IQ4_NL",
}  # fmt: skip
# How `general.file_type` names a file by the type of most of its weights.
_FILE_TYPES = {
    "F32": "ALL_F32", "Q2_K": "MOSTLY_Q2_K", "Q3_K": "MOSTLY_Q3_K_M", "Q4_K": "MOSTLY_Q4_K_M",
    "Q5_K": "MOSTLY_Q5_K_M", "MXFP4": "MOSTLY_MXFP4_MOE",
}  # fmt: skip


class Rule(NamedTuple):
    """A type for the tensors that a group's name or a pattern of names fits."""

    pattern: str
    type: GGMLQuantizationType

    def fits(self, entry: Entry) -> bool:
        if self.pattern in GROUPS:
            return entry.group == self.pattern
        return fnmatch.fnmatchcase(entry.name, self.pattern)


def parse(choice: str) -> list[Rule]:
    """Reads a choice.

    Raises:
      ValueError: it names no type, group or preset; says which there are.
    """
    rules = []
    for part in PRESETS.get(choice.lower(), choice).split(","):
        pattern, separator, name = part.strip().rpartition("=")
        pattern = pattern.strip() if separator else "*"
        name = name.strip().upper()
        if name not in OWN + BY_LLAMA:
            raise ValueError(
                f"--type {choice}: {name or 'nothing'} is not one of {', '.join(OWN)}, nor, through"
                f" llama-quantize, {', '.join(BY_LLAMA)}, nor a preset ({', '.join(PRESETS)})"
            )
        if pattern not in GROUPS and not any(letter in pattern for letter in "*?[."):
            raise ValueError(
                f"--type {choice}: {pattern!r} is not a group of tensors ({', '.join(GROUPS)}) nor "
                "a pattern of names such as 'blk.0.*'"
            )
        rules.append(Rule(pattern, GGMLQuantizationType[name]))
    return rules


def choose(
    rules: list[Rule], entries: Iterable[Entry], choice: str
) -> dict[str, GGMLQuantizationType]:
    """Chooses a type per tensor, by name.

    Raises:
      ValueError: no rule fits a tensor, or a rule fits none.
    """
    types, unused = {}, set(range(len(rules)))
    for entry in entries:
        if not entry.group:
            types[entry.name] = _F32
            continue
        number = next((n for n, rule in enumerate(rules) if rule.fits(entry)), None)
        if number is None:
            raise ValueError(
                f"--type {choice}: no rule fits {entry.name} ({entry.group}); end with '*=TYPE' "
                "for the rest"
            )
        unused.discard(number)
        types[entry.name] = _fitting(rules[number].type, entry)
    for number in sorted(unused):
        pattern = rules[number].pattern
        # Presets and the rest may fit nothing; a pattern that fits nothing is a mistake.
        if pattern not in (*GROUPS, "*"):
            raise ValueError(
                f"--type {choice}: {pattern!r} fits no tensor that an earlier rule leaves; "
                "tools/convert.py inspect lists the names"
            )
    return types


def _fitting(kind: GGMLQuantizationType, entry: Entry) -> GGMLQuantizationType:
    smaller = GGMLQuantizationType[_SMALLER.get(kind.name, kind.name)]
    for choice in (kind, smaller):
        if entry.shape[-1] % GGML_QUANT_SIZES[choice][0] == 0:
            return choice
    return _F16


def file_type(rules: list[Rule]) -> int:
    """Returns `general.file_type` for rules: that of the lowest type, which most weights have."""
    lowest = min(rules, key=lambda rule: bits(rule.type)).type.name
    return LlamaFileType[_FILE_TYPES.get(lowest, f"MOSTLY_{lowest}")].value


def bits(kind: GGMLQuantizationType) -> float:
    """Returns the bits per weight of a type, scales included."""
    block, n_bytes = GGML_QUANT_SIZES[kind]
    return 8 * n_bytes / block


def n_bytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    """Returns the bytes of a tensor."""
    block, size = GGML_QUANT_SIZES[kind]
    count = 1
    for width in shape:
        count *= width
    return count // block * size
