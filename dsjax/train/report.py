"""The numbers of a run: metrics.jsonl, TensorBoard and W&B, and how the console shows them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsjax import settings
from dsjax.config import Config
from dsjax.files import write, writing


class Metrics:
    """Sinks of the logged numbers; pictures and summary come from one of them, metrics.jsonl."""

    def __init__(self, workdir: Path, config: Config, *, first_step: int):
        """Opens the sinks of a run that continues after `first_step` steps.

        Lines of later steps, left by a run that ended after its last checkpoint, are dropped: they
        will be written again.

        Raises:
          ValueError: wandb is asked for and not installed.
          OSError: the files cannot be written.
        """
        self.path = workdir / "metrics.jsonl"
        self._keep_until(first_step)
        self._tensorboard = (
            _open_tensorboard(workdir, first_step) if config.train.tensorboard else None
        )
        self._wandb = _open_wandb(workdir, config) if config.train.wandb_project else None
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends one object; it has `step`, and numbers."""
        with writing(self.path):
            self._file.write(json.dumps(line) + "\n")
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
        """All objects written so far, also before a resume."""
        return read_lines(self.path)

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _keep_until(self, step: int) -> None:
        kept = [line for line in read_lines(self.path) if line["step"] <= step]
        write(self.path, "".join(json.dumps(line) + "\n" for line in kept))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl; a last line that a crash cut short is left out."""
    lines = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                break
    return lines


def _group(key: str) -> str:
    if key in ("eval_loss", "bits_per_byte"):
        return "eval"
    return "speed" if key in ("tokens_per_second", "step_seconds", "mfu") else "train"


def _open_tensorboard(workdir: Path, first_step: int) -> Any:
    from tensorboardX import SummaryWriter

    return SummaryWriter(
        str(workdir / "tensorboard"), purge_step=first_step + 1 if first_step else None
    )


def _open_wandb(workdir: Path, config: Config) -> Any:
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


def described(line: Mapping[str, Any]) -> tuple[str, str]:
    """A line of training metrics for the console: in short, and in full."""
    return (
        f"loss {line['loss']:.3f}  {line['tokens_per_second']:,.0f} tokens/s",
        f"loss {line['loss']:.4f}  "
        f"mtp {line['mtp_loss']:.4f}  grad_norm {line['grad_norm']:.3f}  "
        f"lr {line['learning_rate']:.3g}  max_violation {line['max_violation']:.2f}  "
        f"{line['tokens_per_second']:,.0f} tokens/s  mfu {100 * line['mfu']:.1f}%",
    )
