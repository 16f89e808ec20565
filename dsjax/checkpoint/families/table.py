"""Rows of a family's table, each of which relates fields of config.json to fields of ModelConfig.

A row both reads its part of config.json into the values of a ModelConfig and writes it from a
ModelConfig, so that the two directions cannot diverge.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from dsjax.config import ModelConfig

Config = TypeVar("Config")
REQUIRED = object()
MAX_INTEGER = 2**31 - 1  # integers become shapes
MAX_LISTED = 10_000  # entries of what a list of layers must be: their number may be nonsense

# For each type of field: the JSON types it accepts, their description, and the value used in place
# of an invalid one, so that reading can go on to find all problems.
_KINDS: dict[str, tuple[tuple[type, ...], str, Any]] = {
    "int": ((int,), "an integer", 0),
    "float": ((int, float), "a number", 0.0),
    "bool": ((bool,), "true or false", False),
    "str": ((str,), "a string", ""),
}


class Fields:
    """Reads fields of a JSON object, records which were read, and collects problems.

    A field that is null counts as absent.
    """

    def __init__(self, values: Mapping[str, Any], place: str, problems: list[str]):
        self.values, self.place, self.problems = values, place, problems
        self.seen: set[str] = set()

    def read(self, name: str, kind: str, default: Any = REQUIRED) -> Any:
        """Reads a field of kind int (not negative), float (finite), bool or str."""
        self.seen.add(name)
        value: Any = self.values.get(name)
        if value is None and default is not REQUIRED:
            return default
        types, wanted, blank = _KINDS[kind]
        problem = ""
        if value is None:
            problem = f"{self.place} lacks {name}"
        elif not isinstance(value, types) or (kind != "bool" and isinstance(value, bool)):
            problem = f"{self.place}.{name}={value!r} is not {wanted}"
        elif kind == "int" and not 0 <= value <= MAX_INTEGER:
            problem = f"{self.place}.{name}={value} is not between 0 and {MAX_INTEGER:,}"
        elif kind == "float" and not abs(value) <= sys.float_info.max:
            problem = f"{self.place}.{name}={value!r} is not finite"
        if problem or value is None:
            self.problems.append(problem)
            return blank
        return float(value) if kind == "float" else value

    def times(self, name: str, size: int, default: float) -> int:
        """Reads a factor, and returns it times a size, rounded down."""
        found = size * self.read(name, "float", default)
        if not abs(found) <= MAX_INTEGER:
            self.problems.append(f"{self.place}.{name} times {size} exceeds {MAX_INTEGER:,}")
            return 0
        return int(found)

    def fixed(self, name: str, *supported: Any) -> None:
        """Accepts a field only if it is absent, null or one of `supported`."""
        self.seen.add(name)
        value = self.values.get(name)
        if value is not None and not any(
            value == choice and isinstance(value, bool) == isinstance(choice, bool)
            for choice in supported
        ):
            choices = " or ".join(repr(choice)[:80] for choice in supported)
            self.problems.append(
                f"{self.place}.{name}={repr(value)[:80]} is not supported, only {choices}"
            )

    def refuse_rest(self, neutral: frozenset[str] = frozenset()) -> None:
        """Refuses fields that have not been read and that switch something on.

        Null, false and empty values switch nothing on. The few fields whose `false` does change the
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


class Values(dict[str, Any]):
    """Fields of a config of ours that have been read, and where each was.

    Attributes:
      places: what the file calls a field: `config.json.hidden_size` for `dim`.
    """

    def __init__(self, constants: Mapping[str, Any]):
        super().__init__(constants)
        self.places: dict[str, str] = {}

    def take(
        self, ours: str, fields: Fields, name: str, kind: str, default: Any = REQUIRED
    ) -> None:
        """Reads a field as `Fields.read` does."""
        self[ours] = fields.read(name, kind, default)
        self.places[ours] = f"{fields.place}.{name}"

    def take_all(self, fields: Fields, rows: Iterable[tuple[str, str, str, Any]]) -> None:
        """Reads fields, each given by our name, the file's, its kind and its default."""
        for ours, *theirs in rows:
            self.take(ours, fields, *theirs)

    def build(self, kind: type[Config], *groups: str) -> Config:
        """Returns the config.

        Args:
          groups: what the rules of the config call it, and others that they compare with it.

        Raises:
          ValueError: a rule is broken; fields have their names in the file.
        """
        try:
            return kind(**self)
        except ValueError as error:
            ours = rf"\b(?:{'|'.join(groups)})\.(\w+)"
            text = re.sub(ours, lambda found: self.places.get(found[1], found[0]), str(error))
            raise ValueError(text) from None


class Row(NamedTuple):
    """A two-way relation between fields of config.json and of ModelConfig."""

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
    """Returns the row of a field that corresponds to one field of ModelConfig.

    Args:
      default: value if the field is absent, or a function of the values read so far.
      alias: another name of the field, read but not written.
      value: returns what to write, if not the value itself.
    """
    kind = str(ModelConfig.__dataclass_fields__[ours].type)

    def read(fields: Fields, values: Values) -> None:
        name = key
        if alias and fields.values.get(alias) is not None:
            fields.fixed(key, fields.values[alias])
            name = alias
        wanted = default(values) if callable(default) else default
        values.take(ours, fields, name, kind, wanted)

    return Row(read, lambda model: {key: value(model) if value else getattr(model, ours)})


def fixed(key: str, *supported: Any, ours: str = "", written: bool = True) -> Row:
    """Returns the row of a field that must be absent, null or one of the supported values.

    Args:
      supported: values, or functions of the values read so far; the first is written.
      ours: field of ModelConfig to write instead, so that an unsupported value is refused by name
        when it is read back.
      written: False: the field is only read.
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
