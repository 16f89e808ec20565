"""Fields of a request's body, each checked for its type and range as it is taken.

A field that is null counts as absent. What nobody has taken at the end is refused, so that a field
which would change the text is never ignored in silence.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dsjax import files
from dsjax.serve.errors import ApiError

_LONGEST_SHOWN = 60


class Fields:
    """The fields of one JSON object.

    Args:
      place: its path in the body, such as `messages[0]`; empty for the body itself.

    Raises:
      ApiError: 422, it is not an object.
    """

    def __init__(self, values: Any, place: str = "") -> None:
        if not isinstance(values, dict):
            raise invalid(place or "body", f"must be an object, not {shown(values)}")
        self._values: Mapping[str, Any] = {k: v for k, v in values.items() if v is not None}
        self._place = f"{place}." if place else ""
        self._taken: set[str] = set()

    def path(self, name: str) -> str:
        """Returns the path of a field in the body."""
        return self._place + name

    def has(self, name: str) -> bool:
        return name in self._values

    def take(self, name: str, default: Any = None) -> Any:
        """Returns a field of any type."""
        self._taken.add(name)
        return self._values.get(name, default)

    def text(self, name: str, default: str | None = None, *, most: int | None = None) -> str:
        """Returns a text of at most `most` characters; required if it has no default."""
        value = self._required(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, "must be a text", value)
        if most is not None and len(value) > most:
            raise invalid(self.path(name), f"has {len(value)} characters; at most {most} may be")
        return value

    def choice(self, name: str, choices: Sequence[str], default: str | None = None) -> str:
        """Returns one of these texts."""
        value = self._required(name, default)
        if not isinstance(value, str) or value not in choices:
            raise self._wrong(name, f"must be one of {', '.join(choices)}", value)
        return value

    def boolean(self, name: str, default: bool = False) -> bool:
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, "must be true or false", value)
        return value

    def integer(self, name: str, default: int | None, low: int, high: int | None) -> int | None:
        """Returns a whole number in [low, high]; `high` None: no bound."""
        value = self.take(name, default)
        if value is None:
            return None
        whole = int(value) if isinstance(value, float) and value.is_integer() else value
        if type(whole) is int and low <= whole and (high is None or whole <= high):
            return whole
        between = f"of at least {low}" if high is None else f"between {low} and {high}"
        raise self._wrong(name, f"must be a whole number {between}", value)

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """Returns a number in [low, high]."""
        value = self.take(name, default)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not low <= value <= high:  # nan lies nowhere
            raise self._wrong(name, f"must be a number between {low:g} and {high:g}", value)
        return float(value)

    def items(self, name: str, *, most: int, default: Any = None) -> list[Any]:
        """Returns a list of at most `most` items of any type."""
        value = self._required(name, default)
        if not isinstance(value, list):
            raise self._wrong(name, "must be a list", value)
        if len(value) > most:
            raise invalid(self.path(name), f"has {len(value)} items; at most {most} may be")
        return value

    def finish(self, harmless: Collection[str] = ()) -> None:
        """Refuses fields that nobody has taken, except those that change nothing."""
        unknown = sorted(self._values.keys() - self._taken - set(harmless))
        if unknown:
            name = unknown[0][:_LONGEST_SHOWN]
            if not name.isidentifier():  # "" or "a b" would not be seen in a path
                place = self._place.removesuffix(".") or "body"
                what = f"has the key {files.shown(name)}, which this server does not know"
                raise invalid(place, f"{what}; leave it out", "unknown")
            raise invalid(
                self.path(name), "is not a field that this server knows; leave it out", "unknown"
            )

    def _required(self, name: str, default: Any) -> Any:
        value = self.take(name, default)
        if value is None:
            raise invalid(self.path(name), "is missing", "missing")
        return value

    def _wrong(self, name: str, rule: str, value: Any) -> ApiError:
        return invalid(self.path(name), f"{rule}, not {shown(value)}")


def invalid(path: str, what: str, code: str = "invalid") -> ApiError:
    """Returns the error for a field, 422."""
    return ApiError(422, f"{files.shown(path)[1:-1]} {what}", param=path, code=code)


def shown(value: Any) -> str:
    """Returns a value in few characters, for messages."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = "null" if value is None else str(value).lower() if value is True else repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."
