"""A Modelfile, with which ollama takes in a GGUF file: `ollama create NAME -f Modelfile`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from dsjax.checkpoint.gguf.vocabulary import sampling
from dsjax.files import write

# ollama's own default, whatever the model's; a longer context takes memory at once.
_CONTEXT = 4096


def place_for(target: Path) -> Path:
    """Returns where to write the Modelfile of a GGUF file: `Modelfile`, unless there is one."""
    first = target.with_name("Modelfile")
    return target.with_name(f"{target.stem}.Modelfile") if first.exists() else first


def content(target: Path, context: int, stops: Sequence[str], settings: dict[str, float]) -> str:
    """Returns the text of a Modelfile. Template and tokenizer are in the GGUF file.

    Args:
      context: tokens that the model was made for.
      stops: names of the tokens that end a reply.
      settings: of sampling.
    """
    lines = [f"FROM ./{target.name}", f"PARAMETER num_ctx {min(context, _CONTEXT)}"]
    lines += [f"PARAMETER {name} {value:g}" for name, value in settings.items()]
    lines += [f'PARAMETER stop "{name}"' for name in stops]
    return "\n".join(lines) + "\n"


def write_beside(
    target: Path,
    tokenizer_folder: Path,
    context: int,
    stops: Sequence[str],
    say: Callable[[str], None],
) -> None:
    """Writes the Modelfile of a GGUF file beside it, and says how to use it."""
    path = place_for(target)
    text = content(target, context, stops, sampling(tokenizer_folder))
    write(path, text.encode())
    say(f"for ollama: ollama create {target.stem.lower()} -f {path.name}, in {path.parent}")
