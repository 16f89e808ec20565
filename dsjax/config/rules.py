"""Checks of config values. Each message names the key, its value and the rule."""

from __future__ import annotations

MOST_LAYERS = 10_000  # of one kind


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def require_positive(group: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{group}.{name}={value} must be greater than 0")


def require_few(group: str, config: object, *names: str) -> None:
    """Requires numbers of layers that a model may have. Files hold any number, and all tensors are
    listed layer by layer.
    """
    for name in names:
        value = getattr(config, name)
        require(
            value <= MOST_LAYERS,
            f"{group}.{name}={value} exceeds {MOST_LAYERS:,}, more layers than any model has; "
            "correct it",
        )


def require_not_negative(group: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value >= 0, f"{group}.{name}={value} must not be negative")


def require_fraction(group: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(0 <= value <= 1, f"{group}.{name}={value} must lie between 0 and 1")


def require_at_most(group: str, config: object, name: str, limit: str) -> None:
    value, most = getattr(config, name), getattr(config, limit)
    require(value <= most, f"{group}.{name}={value} exceeds {group}.{limit}={most}")
