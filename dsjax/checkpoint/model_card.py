"""README.md of an exported checkpoint: what the Hub and people read first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsjax import __version__
from dsjax.checkpoint.load import Checkpoint
from dsjax.files import read_json
from dsjax.model.flops import count_parameters
from dsjax.model.parameters import declarations
from dsjax.model.transformer import Transformer
from dsjax.precision.policy import Policy

_FACTS = {  # of a run's summary.json, as far as it has them
    "steps": ("optimizer steps", "{:,}"),
    "tokens": ("training tokens", "{:,}"),
    "loss": ("training loss, nats per token", "{:.4f}"),
    "eval_loss": ("held-out loss, nats per token", "{:.4f}"),
    "bits_per_byte": ("held-out bits per byte", "{:.4f}"),
    "eval_accuracy": ("held-out accuracy", "{:.1%}"),
    "eval_pass@1": ("held-out pass@1", "{:.1%}"),
}


def model_card(checkpoint: Checkpoint, name: str, dtype: str) -> str:
    """Writes the card of an export; the facts of its training come from the folder of a run.

    Args:
      name: of the model.
      dtype: of the exported weights.

    Raises:
      ValueError: the run's summary.json cannot be read.
    """
    model = checkpoint.model
    counts = count_parameters(declarations(Transformer(model, Policy())), model)
    rows = [
        ("architecture", checkpoint.family),
        ("parameters", f"{counts.total:,}"),
        ("activated per token", f"{counts.activated:,}"),
        ("in multi-token prediction modules", f"{counts.mtp:,}" if counts.mtp else ""),
        ("layers", f"{model.n_layers:,}"),
        ("width", f"{model.dim:,}"),
        ("routed experts", f"{model.n_routed_experts:,}" if model.n_routed_experts else ""),
        ("vocabulary", f"{model.vocab_size:,}"),
        ("context", f"{model.max_seq_len:,} tokens"),
        ("weights", dtype),
    ]
    sections = [
        _front(checkpoint.family),
        f"# {name}",
        _table(rows),
        _training(checkpoint.path),
        _usage(name),
        f"Exported with dsjax {__version__}.",
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _front(family: str) -> str:
    """Returns what the Hub reads. A licence is for the owner to choose, so there is none."""
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    return "\n".join(["---", *lines, "- dsjax", f"- {family}", "---"])


def _training(folder: Path) -> str:
    """Returns what a run tells of itself; nothing for other folders and unfinished runs."""
    path = folder / "summary.json"
    if not path.is_file():
        return ""
    summary: Mapping[str, Any] = read_json(path)
    rows = [
        (label, form.format(summary[key]))
        for key, (label, form) in _FACTS.items()
        if isinstance(summary.get(key), (int, float))
    ]
    return f"## Training\n\n{_table(rows)}" if rows else ""


def _usage(name: str) -> str:
    lines = [
        "## Use", "", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "", f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")', "```", "",
        "or, in JAX:", "", "```python", "import dsjax", "", f'model = dsjax.load("{name}")', "```",
    ]  # fmt: skip
    return "\n".join(lines)


def _table(rows: list[tuple[str, str]]) -> str:
    body = [f"| {label} | {value} |" for label, value in rows if value]
    return "\n".join(["| | |", "| --- | --- |", *body])
