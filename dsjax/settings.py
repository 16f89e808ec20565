"""Reads experiments: config files, `--set` assignments, and the JSON form that a run keeps.

An experiment is a frozen dataclass whose fields are values or groups, themselves dataclasses of
values: its root. `dsjax.config.Config` is the root of pre-training; another kind of experiment
brings another root, and every function here takes either. A config file is Python that assigns a
root to `config`; a run's config.json holds the same values. The types of all values come from the
dataclasses' annotations, so a key is declared once. Nothing here imports jax.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import json
import logging
import math
import sys
import traceback
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dsjax.config import Config
from dsjax.files import read_json

Root = TypeVar("Root")

_SWITCH = {"on": True, "true": True, "off": False, "false": False}
_KIND_NAMES = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}

_logger = logging.getLogger(__name__)


def load_config(path: str | Path, kind: type[Root] = Config) -> Root:
    """Reads a config file (.py), a run's config.json, or the folder of a run.

    Keys that an older version did not write take their defaults, and one line of the log names
    them.

    Args:
      kind: the root that the file must hold.

    Raises:
      FileNotFoundError: there is no such file; names the nearest ones.
      ValueError: the file is not such a config; names the file and, where there is one, the line.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"{path} is a folder without a config.json, so it is not the folder of a run; "
                "name a config file such as configs/tiny.py"
            )
        path = path / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"there is no config {path}{_nearest_files(path)}")
    if path.suffix == ".py":
        return _load_python(path, kind)
    if path.suffix == ".json":
        return from_dict(read_json(path), str(path), kind)
    raise ValueError(
        f"{path} is not a config: name a .py file, a config.json or the folder of a run"
    )


def override(config: Root, assignments: Sequence[str]) -> Root:
    """Returns `config` with `["train.steps=300", ...]` applied together, then checked once.

    Of two assignments to one key the later one holds.

    Raises:
      ValueError: an assignment names no key or its value is not of the key's type (all such are
        listed), or the result breaks a rule of the config.
    """
    kinds = field_types(type(config))
    changes: dict[str, dict[str, Any]] = {}
    problems = []
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            problems.append(f"--set takes KEY=VALUE, not {assignment!r}")
        elif key not in kinds:
            problems.append(f"{key} is not a config key{_nearest_keys(key, list(kinds))}")
        else:
            try:
                value = _parse(text.strip(), kinds[key])
            except ValueError as error:
                problems.append(f"{key}={text!r} {error}")
            else:
                group, _, name = key.rpartition(".")
                changes.setdefault(group, {})[name] = value
    if problems:
        raise ValueError("\n".join(problems))
    top = changes.pop("", {})
    groups = {
        group: dataclasses.replace(getattr(config, group), **values)
        for group, values in changes.items()
    }
    return dataclasses.replace(config, **groups, **top)  # pyright: ignore[reportArgumentType]


def to_dict(config: Any) -> dict[str, Any]:
    """Returns the config as nested dicts of what JSON can hold; `from_dict` reads it back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(
    values: Mapping[str, Any], place: str = "the config", kind: type[Root] = Config
) -> Root:
    """Builds a config from `to_dict`'s form, which may lack keys that have a default.

    Args:
      place: where the values came from, for messages.
      kind: the root to build; a group, such as ModelConfig, will do.

    Raises:
      ValueError: keys are unknown, missing without a default, or of the wrong type (all are
        listed), or a rule of the config is broken.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{place} must be an object of keys, not {values!r}")
    groups, kinds = _groups(kind), field_types(kind)
    flat: dict[str, Any] = {}
    problems = []
    for name, value in values.items():
        if name not in groups:
            flat[name] = value
        elif isinstance(value, Mapping):
            flat.update({f"{name}.{key}": inner for key, inner in value.items()})
        else:
            problems.append(f"{name} must be an object of keys, not {value!r}")
            flat.update({key: value for key in kinds if key.startswith(f"{name}.")})
    unknown = [key for key in flat if key not in kinds]
    problems += [f"{key} is not a config key{_nearest_keys(key, list(kinds))}" for key in unknown]
    settled = _defaults(kind)
    absent = [key for key in kinds if key not in flat]
    problems += [f"{key} is missing" for key in absent if key not in settled]
    for key in [] if problems else [key for key in kinds if key in flat]:
        try:
            settled[key] = _convert(flat[key], kinds[key])
        except ValueError as error:
            problems.append(f"{key}={flat[key]!r} {error}")
    if unknown:
        problems.append("a newer version of dsjax may have written the unknown keys")
    if problems:
        raise ValueError(f"{place}: " + "; ".join(problems))
    try:
        built = {
            name: group(**{key: settled[f"{name}.{key}"] for key in typing.get_type_hints(group)})
            for name, group in groups.items()
        }
        config = kind(**built, **{key: settled[key] for key in kinds if "." not in key})
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    if absent:
        _say_absent(place, tuple(absent))
    return config


@functools.cache  # so that a file that is read twice is mentioned once
def _say_absent(place: str, absent: tuple[str, ...]) -> None:
    _logger.warning(
        "%s comes from an older version and lacks %s; defaults are used", place, ", ".join(absent)
    )


def content_hash(config: Any) -> str:
    """Returns the SHA-256, in hexadecimal, of the config's canonical JSON."""
    text = json.dumps(to_dict(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def field_types(root: type[Any] = Config) -> dict[str, Any]:
    """Returns every dotted key with its type, in the order of declaration."""
    kinds: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(root).items():
        if dataclasses.is_dataclass(kind):
            kinds |= {f"{name}.{key}": hint for key, hint in typing.get_type_hints(kind).items()}
        else:
            kinds[name] = kind
    return kinds


def _groups(root: type[Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(root)
    return {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}


def _defaults(root: type[Any]) -> dict[str, Any]:
    """Returns the default of every dotted key that has one."""
    found: dict[str, Any] = {}
    groups = _groups(root)
    for field in dataclasses.fields(root):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if field.name in groups:
            # What a root says of a group goes before the group's own defaults.
            given = default is not dataclasses.MISSING
            inside = vars(default) if given else _defaults(groups[field.name])
            found |= {f"{field.name}.{key}": value for key, value in inside.items()}
        elif default is not dataclasses.MISSING:
            found[field.name] = default
    return found


def _load_python(path: Path, kind: type[Root]) -> Root:
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    except SyntaxError as error:
        raise ValueError(f"{path} line {error.lineno}: syntax error: {error.msg}") from error
    except Exception as error:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == str(path)
        ]
        at = f" line {lines[-1]}" if lines else ""
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}{at}: {reason}") from error
    config = getattr(module, "config", None)
    if not isinstance(config, kind):
        found = (
            "assigns no `config`"
            if config is None
            else f"assigns a {type(config).__name__} to `config`"
        )
        raise ValueError(
            f"{path} {found}; a config file of this command ends with "
            f"`config = {kind.__name__}(...)`"
        )
    # Values that are not of their annotated type are named here, not where they do harm.
    return from_dict(dataclasses.asdict(config), str(path), kind)  # pyright: ignore[reportArgumentType]


def _parse(text: str, kind: Any) -> Any:
    """Reads a command-line value; the ValueError completes the sentence `key='text' ...`."""
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return tuple(_parse(part.strip(), item) for part in text.split(",") if part.strip())
    if kind is bool:
        if text.lower() not in _SWITCH:
            raise ValueError("must be on or off (or true or false)")
        return _SWITCH[text.lower()]
    if kind is int:
        with contextlib.suppress(ValueError):
            return int(text)
    if kind is int or kind is float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        return int(number) if kind is int and number.is_integer() else _convert(number, kind)
    return _convert(text, kind)


def _convert(value: Any, kind: Any) -> Any:
    """Checks a value against a field's type; the ValueError completes `key=value ...`."""
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"must be a list, each item {_KIND_NAMES[typing.get_args(kind)[0]]}")
        return tuple(_convert(item, typing.get_args(kind)[0]) for item in value)
    if isinstance(value, bool) != (kind is bool):
        raise ValueError(f"must be {_KIND_NAMES[kind]}")
    if kind is float and isinstance(value, (int, float)) and abs(value) <= sys.float_info.max:
        return float(value)
    if kind is not float and isinstance(value, kind):
        return value
    raise ValueError(f"must be {_KIND_NAMES[kind]}")


def _nearest_keys(key: str, keys: Sequence[str]) -> str:
    """Returns the end of the message about an unknown key: the keys that it may have meant."""
    inside = [known for known in keys if known.startswith(f"{key}.")]
    if inside:
        return f" but a group of keys such as {inside[0]}"

    def likeness(known: str) -> float:
        # A key named without its group, or with the wrong one, is as near as one that is misspelt
        # by a letter.
        leaves = key.rpartition(".")[2], known.rpartition(".")[2]
        return max(_likeness(key, known), _likeness(*leaves) - 0.01)

    best = max(likeness(known) for known in keys)
    near = [known for known in keys if likeness(known) >= max(best - 0.02, 0.7)]
    return f"; did you mean {' or '.join(near)}?" if near else "; tools/show.py prints all keys"


def _likeness(left: str, right: str) -> float:
    return difflib.SequenceMatcher(None, left, right).ratio()


def _nearest_files(path: Path) -> str:
    names = [
        str(entry) for folder in (path.parent, Path("configs")) for entry in folder.glob("*.py")
    ]
    near = difflib.get_close_matches(str(path), names, n=1, cutoff=0.7)
    near = near or [name for name in names if Path(name).stem == path.stem]
    return f"; did you mean {near[0]}?" if near else ""
