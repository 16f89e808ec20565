"""Reads experiments: config files, `--set` assignments, and the JSON form that a run keeps.

The root of an experiment is a frozen dataclass whose fields are values or groups, and a group is a
frozen dataclass of values. A group that may be None, such as the model of a post-training run,
comes from elsewhere (a checkpoint): it is read and written whole, and `--set` does not reach into
it. A tuple of dataclasses, such as the sources of a recipe, is read and written whole as well.
`dsjax.config.Config` is the root for pre-training; another kind of
experiment brings its own, and every function here accepts any root. A config file is Python that
assigns a root to `config`; a run's config.json holds the same values. All types come from the
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
import sys
import traceback
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dsjax.config import Config
from dsjax.config.roots import PLANNED
from dsjax.files import read_json

Root = TypeVar("Root")

_SWITCH = {"on": True, "true": True, "off": False, "false": False}
_KIND_NAMES = {
    int: "a whole number",
    float: "a finite number",
    bool: "on or off (true or false)",
    str: "text",
}

_logger = logging.getLogger(__name__)


class WrongAssignment(ValueError):
    """An assignment of a command line that no config could take, or that this one cannot."""


def load_config(path: str | Path, kind: type[Root] = Config) -> Root:
    """Reads a config file (.py), a run's config.json, or the folder of a run.

    Keys that a JSON file lacks take their defaults; a warning names them.

    Args:
      kind: the root that the file must hold.

    Raises:
      FileNotFoundError: the file does not exist; suggests the most similar one.
      ValueError: the file does not hold a valid config; names the file and the line, if there is
        one, or the tool that takes it.
    """
    return load_any(path, (kind,))


def find(path: str | Path) -> Path:
    """Returns a file or folder as it is named, or if there is none, the config that comes with the
    package: `tiny` and configs/tiny.py name the same one.
    """
    path = Path(path)
    if path.exists() or path.is_absolute() or path.suffix not in ("", ".py"):
        return path
    parts = path.parts[path.parts[:1] == ("configs",) :]
    return packaged(Path("configs", *parts).with_suffix(".py")) or path if parts else path


def packaged(path: Path) -> Path | None:
    """Finds a file of `configs/` or `tools/`, which lie inside an installed package, and beside it
    in a checkout; None if there is none.
    """
    here = Path(__file__).parent
    return next((found for place in (here, here.parent) if (found := place / path).is_file()), None)


def load_any(path: str | Path, kinds: Sequence[type[Root]]) -> Root:
    """Does what `load_config` does for a file that holds any of several roots. Of a JSON file, the
    root is the one that has its groups.
    """
    path = find(path)
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
        return checked(read_python(path, *kinds), str(path))
    if path.suffix == ".json":
        values = read_json(path)
        if is_checkpoint(values):
            raise ValueError(
                f"{path} describes a checkpoint, not a run; name a config such as configs/tiny.py, "
                "and the checkpoint as --init CKPT, where the config begins with one "
                "(tools/convert.py inspect CKPT says what it is)"
            )
        fitting = next((kind for kind in kinds if set(values) <= set(_hints(kind))), None)
        other = next((kind for kind in PLANNED if set(values) <= set(_hints(kind))), None)
        if fitting is None and other is not None:
            raise ValueError(_of_another_tool(path, other, kinds))
        return from_dict(values, str(path), fitting or kinds[0])
    raise ValueError(
        f"{path} is not a config: name a .py file, a config.json or the folder of a run"
    )


def is_checkpoint(values: Mapping[str, Any]) -> bool:
    """Tells whether the values of a config.json are a checkpoint's, as published or converted, and
    not a run's.
    """
    return "model_type" in values or "family" in values


def override(config: Root, assignments: Sequence[str]) -> Root:
    """Returns `config` with assignments such as `train.steps=300` applied, then checked.

    The rules of the config apply to the result, not to each assignment. The last assignment to a
    key wins.

    Raises:
      WrongAssignment: an assignment names no key or has a value of the wrong type (all such are
        listed), or the result breaks a rule of the config.
    """
    kinds, values = field_types(type(config)), flatten(config)
    problems = []
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            problems.append(f"--set takes KEY=VALUE, not {assignment!r}")
        elif _whole_group(kinds.get(key.partition(".")[0])) is not None:
            problems.append(
                f"{key} cannot be set: {key.partition('.')[0]} comes whole, with the checkpoint"
            )
        elif key not in kinds:
            problems.append(f"{key} is not a config key{_nearest_keys(key, list(kinds))}")
        else:
            try:
                values[key] = _parse(text.strip(), kinds[key])
            except ValueError as error:
                problems.append(f"{key}={text!r} {error}")
    if problems:
        raise WrongAssignment("\n".join(problems))
    try:
        return _build(type(config), values)
    except ValueError as error:
        raise WrongAssignment(str(error)) from error


def to_dict(config: Any) -> dict[str, Any]:
    """Returns the config as nested dicts of JSON values; `from_dict` reads them back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(
    values: Mapping[str, Any], place: str = "the config", kind: type[Root] = Config
) -> Root:
    """Builds a config from the output of `to_dict`; keys that are absent take their defaults.

    Args:
      place: the source of the values, for messages.
      kind: the root to build; a group such as ModelConfig works too.

    Raises:
      ValueError: keys are unknown, absent without a default, or of the wrong type (all are listed),
        or a rule of the config is broken.
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
        group = _whole_group(kinds[key])
        if group is not None and isinstance(flat[key], Mapping):
            settled[key] = from_dict(flat[key], f"{place}: {key}", group)
            continue
        try:
            settled[key] = _convert(flat[key], kinds[key])
        except ValueError as error:
            problems.append(f"{key}={flat[key]!r} {error}")
    if unknown:
        problems.append("a newer version of dsjax may have written the unknown keys")
    if problems:
        raise ValueError(f"{place}: " + "; ".join(problems))
    try:
        config = _build(kind, settled)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    if absent:
        _say_absent(place, tuple(absent))
    return config


@functools.cache  # warns once about a file that is read twice
def _say_absent(place: str, absent: tuple[str, ...]) -> None:
    _logger.warning(
        "%s comes from an older version and lacks %s; defaults are used", place, ", ".join(absent)
    )


def content_hash(config: Any) -> str:
    """Returns the SHA-256, in hexadecimal, of the config's canonical JSON."""
    text = json.dumps(to_dict(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _hints(root: Any) -> dict[str, Any]:
    """Returns the types of a dataclass's fields; what belongs to the class is none of them."""
    hints = typing.get_type_hints(root)
    return {field.name: hints[field.name] for field in dataclasses.fields(root)}


def field_types(root: type[Any] = Config) -> dict[str, Any]:
    """Returns every dotted key with its type, in the order of declaration."""
    kinds: dict[str, Any] = {}
    for name, kind in _hints(root).items():
        if dataclasses.is_dataclass(kind):
            kinds |= {f"{name}.{key}": hint for key, hint in _hints(kind).items()}
        else:
            kinds[name] = kind
    return kinds


def flatten(config: Any) -> dict[str, Any]:
    """Returns every dotted key of a config with its value."""
    keys = field_types(type(config))
    return {key: functools.reduce(getattr, key.split("."), config) for key in keys}


def _build(root: type[Root], values: Mapping[str, Any]) -> Root:
    groups = {
        name: kind(**{key: values[f"{name}.{key}"] for key in _hints(kind)})
        for name, kind in _groups(root).items()
    }
    return root(**groups, **{key: value for key, value in values.items() if "." not in key})


def _groups(root: type[Any]) -> dict[str, Any]:
    hints = _hints(root)
    return {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}


def _whole_group(kind: Any) -> Any:
    """Returns the dataclass of a group that may be None; None for any other type."""
    inner = [arm for arm in typing.get_args(kind) if arm is not types.NoneType]
    optional = isinstance(kind, types.UnionType) and len(inner) == 1
    return inner[0] if optional and dataclasses.is_dataclass(inner[0]) else None


def _defaults(root: type[Any]) -> dict[str, Any]:
    """Returns the default of every dotted key that has one."""
    found: dict[str, Any] = {}
    groups = _groups(root)
    for field in dataclasses.fields(root):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if field.name in groups:
            # A root's default for a group takes precedence over the group's own defaults.
            given = default is not dataclasses.MISSING
            inside = flatten(default) if given else _defaults(groups[field.name])
            found |= {f"{field.name}.{key}": value for key, value in inside.items()}
        elif default is not dataclasses.MISSING:
            found[field.name] = default
    return found


def read_python(path: Path, *kinds: type[Root]) -> Root:
    """Returns what a config file assigns to `config`, its types unchecked; it is of one of `kinds`.

    Raises:
      ValueError: the file fails, or assigns something else; names the file and the line.
    """
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
    if not isinstance(config, kinds):
        if hasattr(config, "tool"):
            raise ValueError(_of_another_tool(path, type(config), kinds))
        found = "nothing" if config is None else f"an object of type {type(config).__name__}"
        endings = " or ".join(f"`config = {kind.__name__}(...)`" for kind in kinds)
        raise ValueError(
            f"{path} assigns {found} to `config`; a config file for this command ends with "
            f"{endings}"
        )
    return config


def _of_another_tool(path: Path, found: Any, kinds: Sequence[Any]) -> str:
    names = " or ".join(kind.__name__ for kind in kinds)
    return (
        f"{path} is a config ({found.__name__}) that {found.tool} takes, and this command takes "
        f"another kind ({names}); run {found.tool} with it"
    )


def checked(config: Root, place: str) -> Root:
    """Returns the config with its types checked, which dataclasses do not: a wrong one is named
    here rather than far from its cause.

    Raises:
      ValueError: a value is of the wrong type; `place` begins the message.
    """
    return from_dict(dataclasses.asdict(config), place, type(config))  # pyright: ignore[reportArgumentType]


def _parse(text: str, kind: Any) -> Any:
    """Parses a command-line value; the ValueError completes the sentence `key='text' ...`."""
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        try:
            return tuple(_parse(part.strip(), item) for part in text.split(",") if part.strip())
        except ValueError as error:
            raise ValueError(f"{error}, or several separated by commas") from error
    value: Any = text
    if kind is bool:
        value = _SWITCH.get(text.lower())
    elif kind is int or kind is float:
        with contextlib.suppress(ValueError):
            value = float(text)
            if kind is int and value.is_integer():
                value = int(value)
        if kind is int:
            with contextlib.suppress(ValueError):
                value = int(text)  # not by way of a float, which has no room for all digits
    return _convert(value, kind)


def _convert(value: Any, kind: Any) -> Any:
    """Checks a value against a field's type; the ValueError completes `key=value ...`."""
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return value
    if (group := _whole_group(kind)) is not None:
        if value is None or isinstance(value, group):
            return value
        raise ValueError("must be an object of keys")
    if origin is tuple:
        item = typing.get_args(kind)[0]
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"must be a list, each item {_KIND_NAMES.get(item, 'an object')}")
        return tuple(_convert(part, item) for part in value)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if isinstance(value, Mapping):
            return from_dict(value, f"an item ({kind.__name__})", kind)
        if isinstance(value, kind):
            return value
        raise ValueError("is a list of objects, which a config file alone can give")
    if isinstance(value, bool) != (kind is bool):
        raise ValueError(f"must be {_KIND_NAMES[kind]}")
    if kind is float and isinstance(value, (int, float)) and abs(value) <= sys.float_info.max:
        return float(value)
    if kind is not float and isinstance(value, kind):  # pyright: ignore[reportArgumentType]
        return value
    raise ValueError(f"must be {_KIND_NAMES[kind]}")


def _nearest_keys(key: str, keys: Sequence[str]) -> str:
    """Completes the message about an unknown key with the keys that may have been meant."""
    inside = [known for known in keys if known.startswith(f"{key}.")]
    if inside:
        return f" but a group of keys such as {inside[0]}"

    def likeness(known: str) -> float:
        # The right name in the wrong group, or in none, counts almost as much as a misspelt key.
        leaves = key.rpartition(".")[2], known.rpartition(".")[2]
        return max(_likeness(key, known), _likeness(*leaves) - 0.01)

    best = max(likeness(known) for known in keys)
    near = [known for known in keys if likeness(known) >= max(best - 0.02, 0.7)]
    if near:
        return f"; did you mean {' or '.join(near)}?"
    group = key.partition(".")[0]
    found = [known for known in keys if known.startswith(f"{group}.")]
    names = found or dict.fromkeys(known.partition(".")[0] for known in keys)
    return f"; {'keys of this group' if found else 'keys and groups'} are {', '.join(names)}"


def _likeness(left: str, right: str) -> float:
    return difflib.SequenceMatcher(None, left, right).ratio()


def _nearest_files(path: Path) -> str:
    names = [
        str(entry) for folder in (path.parent, Path("configs")) for entry in folder.glob("*.py")
    ]
    near = difflib.get_close_matches(str(path), names, n=1, cutoff=0.7)
    near = near or [name for name in names if Path(name).stem == path.stem]
    # A packaged config goes by its name in any folder.
    example = packaged(Path("configs", "tiny.py"))
    stems = [entry.stem for entry in example.parent.glob("*.py")] if example else []
    near = near or difflib.get_close_matches(path.stem, stems, n=1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else ""
