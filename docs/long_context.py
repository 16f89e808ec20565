"""Long context, proven in small: recall at 16 times the training length, with YaRN and with DSA.

Trains a small MLA model on texts of 32 and then of 256 tokens, extends it to 1,024 and to 4,096 in
V3's two phases, and gives it V3.2's indexer, whose 256 keys are 1/16 of those 4,096. Each stage is
a run of tools/train.py in a folder of RUNS, so the same command goes on where it was stopped; after
it, recall is measured as by `tools/recall.py --task tokens`. It draws long_context.png and prints
the table of long_context.md.

A text is pairs of words, a key and its value, each at least twice and in any order: from the second
time on the value is known. Any word can be either. Half of the keys come just twice, and of 4,096
tokens all but four, so that some answers are far away. Half of the texts of 32 tokens repeat their
pairs in one order.

Command: python docs/long_context.py RUNS [STAGE ...]     (what to train; all by default)
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from dsjax.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    PrecisionConfig,
    TrainConfig,
)
from dsjax.files import read_json, write
from dsjax.parallel import compilation
from dsjax.posttrain import recall
from dsjax.text.tokenizer import BOS, EOS, PAD
from dsjax.train import positions, pretraining
from dsjax.train.plots import new_figure
from dsjax.train.report import read_lines

FIRST = 32
SHORT, MIDDLE, LONG = LENGTHS = 256, 1024, 4096
WORDS, SEED, HELD_OUT = 64, 0, 32
DENSE = ModelConfig(
    vocab_size=3 + WORDS,
    dim=64,
    n_layers=2,
    n_dense_layers=2,
    n_heads=2,
    inter_dim=64,
    init_std=0.03,
    q_lora_rank=64,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    max_seq_len=LONG,
    rope_theta=1000.0,
)
YARN = dataclasses.replace(
    DENSE, rope_scaling="yarn", rope_factor=LONG / SHORT, original_seq_len=SHORT
)
SPARSE = dataclasses.replace(YARN, index_n_heads=8, index_head_dim=32, index_topk=LONG // 16)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A run. `start` names the stage that it begins with."""

    shows: str
    model: ModelConfig
    length: int
    steps: int
    batch_size: int
    learning_rate: float
    start: str = ""
    indexer: Literal["warmup", "sparse"] = "sparse"


STAGES = {
    "first": Stage("32 tokens", DENSE, FIRST, 400, 64, 3e-3),
    "short": Stage("256 tokens", DENSE, SHORT, 300, 16, 3e-3, "first"),
    "middle": Stage("YaRN, 1,024", YARN, MIDDLE, 100, 4, 2e-3, "short"),
    "long": Stage("YaRN, 4,096", YARN, LONG, 50, 2, 1e-3, "middle"),
    # The same texts and steps, with the rope of the beginning.
    "middle_plain": Stage("no YaRN, 1,024", DENSE, MIDDLE, 100, 4, 2e-3, "short"),
    # One step at a rate of nothing: the indexer stays as it is drawn.
    "random": Stage("DSA, random indexer", SPARSE, LONG, 1, 1, 1e-12, "long", "warmup"),
    "warmup": Stage("DSA, warm-up", SPARSE, LONG, 50, 1, 1e-2, "long", "warmup"),
    "sparse": Stage("DSA, sparse stage", SPARSE, LONG, 30, 2, 3e-4, "warmup"),
}


def text(generator: np.random.Generator, length: int) -> str:
    """Makes a text of length - 2 words: begin and end tokens come to it."""
    slots = (length - 2) // 2
    most = min(slots, WORDS) // 2
    count, common = int(np.exp(generator.uniform(np.log(2), np.log(most + 1)))), 0
    if length == LONG:  # otherwise hardly any answer is far away
        count, common = most, 4
    words = generator.permutation(WORDS)
    keys, values = words[:count], generator.choice(words[WORDS // 2 :], count)
    if length == FIRST and generator.random() < 0.5:
        order = np.resize(np.arange(count), slots)
    else:
        again = generator.integers(common or -(-count // 2), size=slots - 2 * count)
        order = generator.permutation([*range(count), *range(count), *again])
    return " ".join(f"w{word}" for pair in order for word in (keys[pair], values[pair]))


def write_texts(folder: Path) -> None:
    """Writes a tokenizer, and texts to train on and to hold out of each length."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [BOS, EOS, PAD, *(f"w{word}" for word in range(WORDS))]
    words = models.WordLevel({name: id for id, name in enumerate(names)}, unk_token=PAD)
    coder = tokenizers.Tokenizer(words)
    coder.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    coder.add_special_tokens([BOS, EOS, PAD])
    write(folder / "tokenizer.json", coder.to_str())
    for length in (FIRST, *LENGTHS):
        most = max(
            stage.steps * stage.batch_size for stage in STAGES.values() if stage.length == length
        )
        for name, number, seed in (("train", most + 1, SEED), ("heldout", HELD_OUT, SEED + 1)):
            generator = np.random.default_rng([seed, length])
            lines = (json.dumps({"text": text(generator, length)}) for _ in range(number))
            write(folder / f"{name}_{length}.jsonl", "".join(f"{line}\n" for line in lines))


def config_of(name: str, runs: Path) -> Config:
    stage, texts = STAGES[name], runs / "texts"
    return Config(
        name=name,
        init=str(runs / stage.start) if stage.start else "",
        model=stage.model,
        data=DataConfig(
            files=str(texts / f"train_{stage.length}.jsonl"),
            heldout_files=str(texts / f"heldout_{stage.length}.jsonl"),
            tokenizer=str(texts / "tokenizer.json"),
            sequence_length=stage.length,
            fim_rate=0.0,
            cache_dir=str(runs / "cache"),
        ),
        train=TrainConfig(
            steps=stage.steps,
            batch_size=stage.batch_size,
            indexer=stage.indexer,
            remat="none",
            log_every=10,
            eval_every=0,
            checkpoint_every=300,
            sample_tokens=0,
            tensorboard=False,
            seed=SEED,
        ),
        optim=OptimConfig(
            learning_rate=stage.learning_rate,
            schedule="cosine",
            warmup_steps=stage.steps // 10,
            weight_decay=0.0,
        ),
        precision=PrecisionConfig(compute="float32"),
    )


def measure(runs: Path, name: str, n: int) -> None:
    """Measures a stage's recall, unless it is known."""
    path = runs / f"{name}.json"
    if not path.is_file():
        asked = recall.Search(
            checkpoint=runs / name, task="tokens", lengths=LENGTHS, depths=11, n=n, seed=SEED + 2,
            json=str(path), png=runs / f"{name}.png",
        )  # fmt: skip
        recall.run(asked)


def report(runs: Path) -> None:
    """Draws the heat maps and the loss by position, and prints the table, of the stages so far."""
    names = [name for name in STAGES if (runs / f"{name}.json").is_file()]
    figure = new_figure(2.2 * len(names), 8)
    above, below = figure.subfigures(2, 1)
    maps = above.subplots(1, len(names), sharey=True, squeeze=False)[0]
    print(f"| after | {' | '.join(f'{length:,}' for length in LENGTHS)} |\n|---|{'---|' * 3}")
    curves = below.subplots()
    for axes, name in zip(maps, names, strict=True):
        found = read_json(runs / f"{name}.json")
        draw_map(axes, found, STAGES[name].shows)
        print(f"| {name} | {' | '.join(f'{100 * share:.1f} %' for share in found['recall'])} |")
        lines = [line for line in read_lines(runs / name / "metrics.jsonl") if "eval_loss" in line]
        by_position = {
            positions.position_of(key) + 1: loss
            for key, loss in lines[-1].items()
            if positions.is_by_position(key)
        }
        curves.plot([*by_position], [*by_position.values()], "o-", label=STAGES[name].shows)
    maps[0].set(xlabel="tokens of the text", ylabel="depth of the fact")
    curves.set_xscale("log", base=2)
    curves.set(xlabel="position (upper end of its group)", ylabel="held-out loss, nats per token")
    curves.grid(alpha=0.3)
    curves.legend(fontsize=8)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


def draw_map(axes: Any, found: dict[str, Any], title: str) -> None:
    shares = np.asarray(found["recall_by_depth"]).T
    axes.imshow(shares, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    axes.set_title(title, fontsize=9)
    axes.set_xticks(range(len(LENGTHS)), LENGTHS)
    axes.set_yticks(range(len(shares)), [f"{depth:.0%}" for depth in found["depths"]])
    for (depth, place), share in np.ndenumerate(shares):
        axes.text(place, depth, f"{share:.0%}", ha="center", va="center", fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(STAGES)}")
    parser.add_argument("--n", type=int, default=20, help="texts of each length to search")
    arguments = parser.parse_args()
    runs, names = arguments.runs, arguments.stages or [*STAGES]
    compilation.use_persistent_cache(str(runs / "cache"))
    write_texts(runs / "texts")
    for name in names:
        command = f"python {__file__} {runs}"
        if code := pretraining.train(config_of(name, runs), runs / name, command=command):
            raise SystemExit(code)
        if STAGES[name].length in LENGTHS:
            measure(runs, name, arguments.n)
            report(runs)


if __name__ == "__main__":
    main()
