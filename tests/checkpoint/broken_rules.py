"""Breaks the rules of our configs by way of a config.json, number by number."""

from __future__ import annotations

import copy
import functools
import itertools
import re
from collections.abc import Iterator
from typing import Any

from dsjax.checkpoint.hf_config import from_hf

# What a family fixes, its kind of attention or a tower's patches, is not a field of the file.
_OURS = re.compile(r"\b(model|tower|sam|vq|flow|vision|tiles)\.(?!attention\b|patch_size\b)\w+")


def changed(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The config with another value under a dotted name."""
    config = copy.deepcopy(config)
    *outer, last = key.split(".")
    functools.reduce(dict.__getitem__, outer, config)[last] = value
    return config


def numbers(config: dict[str, Any], inside: str = "") -> Iterator[str]:
    """The dotted name of every number in a config."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{inside}{name}.")
        elif type(value) in (int, float):
            yield f"{inside}{name}"


def refused(config: dict[str, Any]) -> set[str]:
    """The numbers that some other value makes a config refused for; checks that no message has our
    names.
    """
    from_hf(config)
    found = set()
    for key, value in itertools.product(numbers(config), (0, 3, 10**6 + 1, -2.5)):
        try:
            from_hf(changed(config, key, value))
        except ValueError as error:
            assert not _OURS.search(str(error)), f"{key}={value}: {error}"
            found.add(key)
    return found
