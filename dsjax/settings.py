"""Reads experiments: config files, `--set` overrides, and the JSON form that a run keeps.

A config file is Python that assigns one `Config` to `config`; a run's `config.json` is the same
values as JSON. The types of both, and of overrides, come from the dataclasses' annotations, so a
key is declared once. Nothing here imports jax.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import json
import math
import sys
import traceback
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsjax.config import Config

_SWITCH = {"on": True, "true": True, "off": False, "false": False}
_KIND_NAMES = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}


def load_config(path: str | Path) -> Config:
    """Reads a config file (.py), a run's config.json, or the folder of a run.

    Raises:
      FileNotFoundError: there is no such file; names the nearest ones.
      ValueError: the file is not a config; names the file and, where there is one, the line.
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
        return _load_python(path)
    if path.suffix == ".json":
        return _load_json(path)
    raise ValueError(
        f"{path} is not a config: name a .py file, a config.json or the folder of a run"
    )


def override(config: Config, assignments: Sequence[str]) -> Config:
    """Returns `config` with `["train.steps=300", ...]` applied together, then checked once.

    Where a key appears twice, the later value holds.

    Raises:
      ValueError: an assignment names no key or its value is not of the key's type (all such are
        listed), or the result breaks a rule of the config.
    """
    kinds = field_types()
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
    return dataclasses.replace(config, **groups, **top)


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the config as nested dicts of what JSON can hold; `from_dict` reads it back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: Mapping[str, Any], place: str = "the config") -> Config:
    """Builds a config from `to_dict`'s form; `place` says in errors where the values came from.

    Raises:
      ValueError: keys are unknown, missing or of the wrong type (all are listed), or a rule of the
        config is broken.
    """
    groups = _groups()
    flat: dict[str, Any] = {}
    problems = []
    for name, value in values.items():
        if name not in groups:
            flat[name] = value
        elif isinstance(value, Mapping):
            flat.update({f"{name}.{key}": inner for key, inner in value.items()})
        else:
            problems.append(f"{name} must be an object of keys, not {value!r}")
            flat.update({key: value for key in field_types() if key.startswith(f"{name}.")})
    kinds = field_types()
    typed: dict[str, dict[str, Any]] = {group: {} for group in ("", *groups)}
    problems += [
        f"{key} is not a config key{_nearest_keys(key, list(kinds))}"
        for key in flat
        if key not in kinds
    ]
    problems += [f"{key} is missing" for key in kinds if key not in flat]
    if not problems:
        for key, kind in kinds.items():
            group, _, name = key.rpartition(".")
            try:
                typed[group][name] = _convert(flat[key], kind)
            except ValueError as error:
                problems.append(f"{key}={flat[key]!r} {error}")
    if problems:
        raise ValueError(f"{place}: " + "; ".join(problems))
    try:
        return Config(
            **{group: kind(**typed[group]) for group, kind in groups.items()}, **typed[""]
        )
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def content_hash(config: Config) -> str:
    """Returns the SHA-256, in hexadecimal, of the config's canonical JSON."""
    text = json.dumps(to_dict(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def field_types() -> dict[str, Any]:
    """Returns every dotted key with its type, in the order of declaration."""
    kinds: dict[str, Any] = {}
    groups = _groups()
    for name, kind in typing.get_type_hints(Config).items():
        if name in groups:
            kinds |= {f"{name}.{key}": hint for key, hint in typing.get_type_hints(kind).items()}
        else:
            kinds[name] = kind
    return kinds


def _groups() -> dict[str, Any]:
    return {
        name: kind
        for name, kind in typing.get_type_hints(Config).items()
        if dataclasses.is_dataclass(kind)
    }


def _load_python(path: Path) -> Config:
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
    if not isinstance(config, Config):
        found = (
            "assigns no `config`"
            if config is None
            else f"assigns a {type(config).__name__} to `config`"
        )
        raise ValueError(
            f"{path} {found}; a config file ends with `config = Config(...)` of dsjax.config"
        )
    return from_dict(dataclasses.asdict(config), str(path))


def _load_json(path: Path) -> Config:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} line {error.lineno}: not JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"{path}: holds a {type(values).__name__}, not the object that a run's config.json is"
        )
    return from_dict(values, str(path))


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
            raise ValueError("must be a list of numbers")
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
