"""The numbers of a run: metrics.jsonl, TensorBoard and W&B, and how the console shows them."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsjax import settings
from dsjax.files import finite, write, writing
from dsjax.train.throughput import TIMED
from dsjax.train.workdir import RunConfig

_SHOWN = {  # on the console, of a step's numbers, in this order
    "reward": "reward {:.3f}",
    "right": "right {:.1%}",
    "length": "length {:.0f}",
    "entropy": "entropy {:.3f}",
    "kl": "kl {:.4f}",
    "loss": "loss {:.4f}",
    "mtp_loss": "mtp {:.4f}",
    "accuracy": "accuracy {:.1%}",
    "grad_norm": "grad_norm {:.3f}",
    "learning_rate": "lr {:.3g}",
    "max_violation": "max_violation {:.2f}",
    "rollout_seconds": "seconds: rollout {:.2f}",
    "grade_seconds": "grade {:.2f}",
    "old_seconds": "old {:.2f}",
    "update_seconds": "update {:.2f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "mfu {:.1%}",
}
_IN_SHORT = ("reward", "right", "loss", "tokens_per_second")  # beside a progress bar
_TAIL = 1 << 16  # bytes, more than most lines have
# Rewards tell how a run fares that has them; its loss is near 0 by construction.
_HIDDEN_BY_REWARDS = ("loss", "max_violation", "mfu")


class Metrics:
    """The sinks of logged numbers. Pictures and report are made from one, metrics.jsonl."""

    def __init__(self, workdir: Path, config: RunConfig, *, first_step: int):
        """Opens the sinks of a run that continues after `first_step` steps.

        Lines of later steps are dropped: the run went on after its last checkpoint, and these steps
        will be repeated.

        Raises:
          ValueError: wandb is requested but not installed.
          OSError: the files cannot be written.
        """
        self.path = workdir / "metrics.jsonl"
        drop_later(self.path, first_step)
        self._tensorboard = (
            _open_tensorboard(workdir, first_step) if config.train.tensorboard else None
        )
        self._wandb = _open_wandb(workdir, config) if config.train.wandb_project else None
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends a line: `step`, and numbers by name. One that is not finite, such as the held-out
        loss of a run gone wrong, is null in the file.
        """
        with writing(self.path):
            self._file.write(json.dumps(finite(line)) + "\n")
            self._file.flush()
        values = {key: value for key, value in line.items() if key != "step"}
        if self._tensorboard is not None:
            for key, value in values.items():
                self._tensorboard.add_scalar(f"{_group(key)}/{key}", value, line["step"])
        if self._wandb is not None:
            self._wandb.log(
                {f"{_group(key)}/{key}": value for key, value in values.items()}, step=line["step"]
            )

    def lines(self) -> list[dict[str, Any]]:
        """Returns all lines so far, earlier sessions included."""
        return read_lines(self.path)

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics.jsonl, without a last one that a crash cut short."""
    lines = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                break
    return lines


def newest_line(path: Path) -> dict[str, Any] | None:
    """Returns the last line of a file like metrics.jsonl that no crash cut short, None if there is
    none. However large the file is, only its end is read.
    """
    size, read = path.stat().st_size if path.is_file() else 0, _TAIL
    while size:
        with path.open("rb") as file:
            file.seek(max(size - read, 0))
            lines = file.read().split(b"\n")
        # The first may have begun before what was read.
        for text in reversed(lines if read >= size else lines[1:]):
            with contextlib.suppress(ValueError):
                return json.loads(text)
        if read >= size:
            break
        read *= 8
    return None


def drop_later(path: Path, step: int) -> None:
    """Drops the lines of steps after `step` from a file like metrics.jsonl, if there is one."""
    if path.is_file():
        kept = [line for line in read_lines(path) if line["step"] <= step]
        write(path, "".join(json.dumps(finite(line)) + "\n" for line in kept))


def thinned(items: Sequence[Any], most: int) -> list[Any]:
    """Returns at most `most` items, evenly spaced, the newest among them."""
    count = min(len(items), most)
    return [items[-1 - index * len(items) // count] for index in reversed(range(count))]


def _group(key: str) -> str:
    if key.startswith("eval_") or key == "bits_per_byte":
        return "eval"
    return "speed" if key in TIMED else "train"


def _open_tensorboard(workdir: Path, first_step: int) -> Any:
    with _without("torch"):
        from tensorboardX import SummaryWriter

    return SummaryWriter(
        str(workdir / "tensorboard"), purge_step=first_step + 1 if first_step else None
    )


@contextlib.contextmanager
def _without(module: str) -> Iterator[None]:
    """Lets what is imported inside not find a module, unless that is imported already.

    tensorboardX would import PyTorch wherever it is installed, which takes two seconds, to accept
    its tensors.
    """
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore
    try:
        yield
    finally:
        del sys.modules[module]


def _open_wandb(workdir: Path, config: RunConfig) -> Any:
    try:
        wandb = importlib.import_module("wandb")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"train.wandb_project={config.train.wandb_project} needs the package wandb; "
            "install it (pip install wandb), or leave train.wandb_project empty"
        ) from error
    return wandb.init(
        project=config.train.wandb_project,
        name=config.name,
        dir=str(workdir),
        config=settings.to_dict(config),
        id=workdir.absolute().as_posix().replace("/", "-").strip("-")[-64:],
        resume="allow",
    )


def described(numbers: Mapping[str, Any]) -> tuple[str, str]:
    """Returns what the console shows of a step's numbers, in short and in full; no MTP loss where
    no MTP module is trained.
    """
    hidden = _HIDDEN_BY_REWARDS if "reward" in numbers else ()
    hidden = hidden if numbers.get("mtp_loss") else (*hidden, "mtp_loss")
    shown = [key for key in _SHOWN if key in numbers and key not in hidden]
    texts = {key: _SHOWN[key].format(numbers[key]) for key in shown}
    return "  ".join(texts[key] for key in _IN_SHORT if key in texts), "  ".join(texts.values())
