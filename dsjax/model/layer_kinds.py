"""Which kind of layer each layer of DeepSeek-V4 is, and which patterns repeat along the depth."""

from __future__ import annotations

from typing import Literal, NamedTuple

from dsjax.config import ModelConfig

Kind = Literal["window", "sparse", "heavy"]


class LayerKind(NamedTuple):
    attention: Kind
    hashed: bool  # whether a table of tokens chooses the experts

    @property
    def stack(self) -> str:
        """Names the stack of such layers."""
        return f"{self.attention}_hash" if self.hashed else self.attention


class Run(NamedTuple):
    """Layers in which a pattern of kinds repeats."""

    pattern: tuple[LayerKind, ...]
    repeats: int


def kinds(config: ModelConfig) -> tuple[LayerKind, ...]:
    """Returns the kind of each layer."""
    hashed = set(config.hash_layers)
    return tuple(LayerKind(kind, layer in hashed) for layer, kind in enumerate(config.layer_types))


def runs(layers: tuple[LayerKind, ...]) -> list[Run]:
    """Cuts the layers into runs: from each place on the one that covers most layers, of those the
    one with the shortest pattern. A pattern that does not repeat is of one layer.
    """
    found, start = [], 0
    while start < len(layers):
        best = Run((layers[start],), 1)
        for size in range(1, (len(layers) - start) // 2 + 1):
            pattern, repeats = layers[start : start + size], 1
            while layers[start + repeats * size : start + (repeats + 1) * size] == pattern:
                repeats += 1
            if repeats > 1 and repeats * size > len(best.pattern) * best.repeats:
                best = Run(pattern, repeats)
        found.append(best)
        start += len(best.pattern) * best.repeats
    return found
