"""Answers arguments that a command does not have with the form that it does have.

People type what other projects take: `--train.steps 5`, `--steps 5`, `--lr 1e-3`, `train.steps=5`,
`--config X`, `--output-dir X`. Here config keys follow `--set`, and CONFIG stands by itself.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence

_FLAG = re.compile(r"--[A-Za-z][\w.-]*")
_CONFIG = ("config", "cfg", "config_file", "config_path", "config_name", "yaml", "recipe")
_NAMES = {  # what other projects call it -> a config key's last part, or a flag
    "lr": "learning_rate",
    "max_steps": "steps",
    "num_steps": "steps",
    "total_steps": "steps",
    "global_batch_size": "batch_size",
    "seq_len": "sequence_length",
    "max_length": "sequence_length",
    "block_size": "sequence_length",
    "save_every": "checkpoint_every",
    "dataset": "files",
    "output_dir": "--workdir",
    "out_dir": "--workdir",
    "run_dir": "--workdir",
    "resume_from": "--init",
    "checkpoint": "--init",
    "ckpt": "--init",
    "max_tokens": "--max-new-tokens",
}


def unknown(argv: Sequence[str], flags: Collection[str]) -> list[tuple[str, str | None]]:
    """Finds the flags of a command line that are not among `flags`, each with its value, if it has
    one.
    """
    found: list[tuple[str, str | None]] = []
    for place, word in enumerate(argv):
        if word == "--":
            break
        flag, equals, value = word.partition("=")
        if not _FLAG.fullmatch(flag) or flag in flags:
            continue
        rest = argv[place + 1 :]
        after = rest[0] if rest and not rest[0].startswith("--") else None
        found.append((flag, value if equals else after))
    return found


def answer(flag: str, value: str | None, flags: Collection[str], keys: Mapping[str, object]) -> str:
    """Says what to write in place of an argument that a command does not have.

    Args:
      flag: as it was typed, with or without its dashes.
      flags: those that the command has, with their dashes.
      keys: its config's; none if it takes no config.
    """
    said = f"unrecognized arguments: {flag}"
    name = flag.lstrip("-").replace("-", "_")
    if keys and name in _CONFIG:
        return f"{said}; the config stands by itself: write {value or 'CONFIG'}"
    wanted = _forms(name, flags, keys)
    if wanted and wanted[0].startswith("--"):
        return f"{said}; write {wanted[0]} {'VALUE' if value is None else value}"
    if wanted:
        forms = [f"--set {key}={'VALUE' if value is None else value}" for key in wanted]
        return f"{said}; keys of the config follow --set: write {' or '.join(forms)}"
    near = difflib.get_close_matches(flag, flags, n=1, cutoff=0.7)
    return f"{said}; did you mean {near[0]}?" if near else f"{said}; --help lists all"


def _forms(name: str, flags: Collection[str], keys: Mapping[str, object]) -> list[str]:
    """Returns the flag or the keys that a name means, several if their last parts are equal."""
    if name in keys:
        return [name]
    leaf = name.rpartition(".")[2]
    for meant in (leaf, _NAMES.get(leaf, leaf)):
        if meant in flags:  # only what _NAMES says: others would have been known
            return [meant]
        found = [key for key in keys if key.rpartition(".")[2] == meant]
        if found:
            return found[:3]
    return []
