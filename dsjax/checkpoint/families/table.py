"""The rows of a family's table: what a field of config.json is in ModelConfig, and back.

A family lists `Row`s. Each reads its part of config.json into the values of a ModelConfig, and
writes it from one, so that what one direction understands the other cannot fail to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dsjax.config import ModelConfig

REQUIRED = object()
MAX_INTEGER = 2**31 - 1  # shapes are made of them
Values = dict[str, Any]  # of a ModelConfig, as far as read

_READERS = {"int": "integer", "float": "number", "bool": "flag"}


class Fields:
    """Reads fields of a JSON object, remembers which, and collects what is wrong with them.

    A field that is null counts as absent.
    """

    def __init__(self, values: Mapping[str, Any], place: str, problems: list[str]):
        self.values, self.place, self.problems = values, place, problems
        self.seen: set[str] = set()

    def _read(self, name: str, default: Any) -> Any:
        self.seen.add(name)
        if self.values.get(name) is not None:
            return self.values[name]
        if default is REQUIRED:
            self.problems.append(f"{self.place} lacks {name}")
            return None
        return default

    def _typed(
        self, name: str, default: Any, kinds: tuple[type, ...], wanted: str, blank: Any
    ) -> Any:
        value = self._read(name, default)
        if value is None:
            return blank
        if not isinstance(value, kinds) or (bool not in kinds and isinstance(value, bool)):
            self.problems.append(f"{self.place}.{name}={value!r} is not {wanted}")
            return blank
        return value

    def integer(self, name: str, default: Any = REQUIRED) -> int:
        value = self._typed(name, default, (int,), "an integer", 0)
        if not 0 <= value <= MAX_INTEGER:
            self.problems.append(
                f"{self.place}.{name}={value} is not between 0 and {MAX_INTEGER:,}"
            )
            return 0
        return value

    def number(self, name: str, default: Any = REQUIRED) -> float:
        value = self._typed(name, default, (int, float), "a number", 0.0)
        try:
            number = float(value)
        except OverflowError:  # an integer of hundreds of digits
            number = math.inf
        if not math.isfinite(number):
            self.problems.append(f"{self.place}.{name}={value!r} is not finite")
            return 0.0
        return number

    def flag(self, name: str, default: Any = REQUIRED) -> bool:
        return self._typed(name, default, (bool,), "true or false", False)

    def text(self, name: str, default: Any = REQUIRED) -> str:
        return self._typed(name, default, (str,), "a string", "")

    def block(self, name: str) -> tuple[int, int]:
        value = self._typed(name, REQUIRED, (list, tuple), "two integers greater than 0", (1, 1))
        if len(value) != 2 or not all(
            type(size) is int and 0 < size <= MAX_INTEGER for size in value
        ):
            self.problems.append(f"{self.place}.{name}={value!r} is not two integers above 0")
            return 1, 1
        return value[0], value[1]

    def fixed(self, name: str, *supported: Any) -> None:
        """Accepts a field only if it is absent, null or one of `supported`."""
        value = self._read(name, None)
        if value is not None and not any(
            value == choice and isinstance(value, bool) == isinstance(choice, bool)
            for choice in supported
        ):
            choices = " or ".join(repr(choice) for choice in supported)
            wanted = f", only {choices}" if supported else ""
            self.problems.append(f"{self.place}.{name}={value!r} is not supported{wanted}")

    def refuse_rest(self, neutral: frozenset[str] = frozenset()) -> None:
        """Refuses the fields that nothing has read and that switch something on.

        Null, false and what is empty switch nothing on. The few fields whose `false` changes the
        model (`is_causal`, `truncate`) have rows of their own.
        """
        unknown = sorted(
            name
            for name, value in self.values.items()
            if name not in self.seen | neutral
            and not (value is None or value is False or value in ("", [], {}))
        )
        if unknown:
            self.problems.append(
                f"{self.place} has {', '.join(unknown)}, unknown here, which may change what the "
                "model computes"
            )


class Row(NamedTuple):
    """A part of config.json, in both directions."""

    read: Callable[[Fields, Values], None]  # adds to the values of a ModelConfig
    write: Callable[[ModelConfig], dict[str, Any]]  # fields of config.json


def field(
    key: str,
    ours: str,
    default: Any = REQUIRED,
    *,
    alias: str = "",
    value: Callable[[ModelConfig], Any] | None = None,
) -> Row:
    """Returns the row of a field that says the same as one of ModelConfig's.

    Args:
      default: what an absent field means, or a function of the values read before.
      alias: another name of the field, read but not written.
      value: what to write, where that is not the very value.
    """
    kind = _READERS[ModelConfig.__dataclass_fields__[ours].type]

    def read(fields: Fields, values: Values) -> None:
        name = key
        if alias and fields.values.get(alias) is not None:
            fields.fixed(key, fields.values[alias])
            name = alias
        wanted = default(values) if callable(default) else default
        values[ours] = getattr(fields, kind)(name, wanted)

    return Row(read, lambda model: {key: value(model) if value else getattr(model, ours)})


def fixed(key: str, *supported: Any, ours: str = "", written: bool = True) -> Row:
    """Returns the row of a field that may be absent, null or one of the values supported.

    Args:
      supported: a value, or a function of the values read before; the first is written.
      ours: the field of ModelConfig to write instead, so that another value is refused by name.
      written: False: only read.
    """

    def read(fields: Fields, values: Values) -> None:
        fields.fixed(key, *(choice(values) if callable(choice) else choice for choice in supported))

    def write(model: ModelConfig) -> dict[str, Any]:
        if not written:
            return {}
        if ours:
            return {key: getattr(model, ours)}
        return {key: supported[0](vars(model)) if callable(supported[0]) else supported[0]}

    return Row(read, write)


def written(key: str, ours: str) -> Row:
    """Returns the row of a field that is written and does not come back."""
    return Row(
        lambda fields, values: fields.seen.add(key), lambda model: {key: getattr(model, ours)}
    )
