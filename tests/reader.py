"""What someone who reads the docs has at hand, in small: text, problems, and checkpoints under the
names that the pages use.

A checkpoint is made when a command first reads it, unless an earlier command of the page made it.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

from dsjax.checkpoint import names
from dsjax.checkpoint.hf_config import from_hf
from dsjax.text.tokenizer import FIM_BEGIN, FIM_END, FIM_HOLE
from tests.checkpoint import hf_files
from tests.checkpoint.gguf.files import write_tokenizer
from tests.golden import vl2
from tests.golden.cases import QWEN3, V3, Case
from tests.golden.checkpoint import normal_like
from tests.janus.toy import write_pairs
from tests.posttrain import toy
from tests.text import released
from tests.vision import toy as janus

ROOT = Path(__file__).parents[1]
LONG = 2048  # tokens, for those in which something is looked for
# What pages call runs; all are copies of one.
RUNS = ("tiny", "small", "large", "chat", "sft", "rl", "cold_start", "indexer", "nsa_tiny")
_WORDS = (
    "the a of to and in that have with from for be is was not on by as this which all one time day "
    "year way thing man world life hand part child eye place work week case point company number "
    "river stone light house water road letter music garden table winter summer morning evening"
).split()


def furnish(folder: Path) -> None:
    """Puts text, problems and pictures into a folder, and the repository's own files."""
    for name in ("tools", "configs", "docs"):
        (folder / name).symlink_to(ROOT / name)
    draw = random.Random(0)
    pages = [{"title": prose(draw, 1), "text": prose(draw), "url": _url(n)} for n in range(60)]
    lines = "".join(json.dumps(page) + "\n" for page in pages).encode()
    table = "title,body\n" + "".join(f'"{row["title"]}","{row["text"]}"\n' for row in pages)
    columns = pa.table({"text": [page["text"] for page in pages]})
    written = {
        "text/a.jsonl.gz": gzip.compress(lines),
        "pages/a.jsonl.gz": gzip.compress(lines),
        "web/a.jsonl.gz": gzip.compress(lines),
        "math/a.jsonl": lines,
        "news/a.csv.xz": lzma.compress(table.encode()),
        "books/a.txt": prose(draw, 200).encode(),
        "books/b.txt.bz2": bz2.compress(prose(draw, 200).encode()),
        "notes.txt": prose(draw).encode(),
        "book.txt": prose(draw).encode(),
        "long.txt": prose(draw, 3).encode(),
        "mine.py": b"def right(completion, problem):\n    return float(len(completion) % 2)\n",
    }
    written |= {f"doc/{n}/README.txt": row["text"].encode() for n, row in enumerate(pages)}
    for n in range(40):
        written[f"python/module{n}.py"] = _program(draw).encode()
    for name, content in written.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / "code").mkdir()
    pq.write_table(columns, folder / "code/a.parquet")
    for name in ("a.png", "cat.png"):
        PIL.Image.new("RGB", (20, 12), (200, 30, 30)).save(folder / name)
    _ask(folder, draw)


def _ask(folder: Path, draw: random.Random) -> None:
    """Writes conversations, pairs and problems."""
    problems, chats, pairs = [], [], []
    for _ in range(40):
        numbers = [draw.randint(1, 14) for _ in range(3)]
        prompt = f"{' '.join(map(str, numbers))}:{sum(numbers)}"
        answer = f"<think></think><answer>{'+'.join(map(str, numbers))}</answer>"
        problems.append({"prompt": prompt, "numbers": numbers, "target": sum(numbers)})
        chats.append({"prompt": prompt, "completion": answer})
        pairs.append({"prompt": prompt, "chosen": answer, "rejected": "no"})
    for name in ("train", "test", "problems", "held_out", "countdown/train", "countdown/test"):
        (folder / name).parent.mkdir(exist_ok=True)
        toy.write_lines(folder / f"{name}.jsonl", problems)
    for name, records in {"chats/a": chats, "pairs/a": pairs}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        toy.write_lines(folder / f"{name}.jsonl", records)
    for name in ("law", "demonstrations"):
        toy.write_lines(folder / f"{name}.jsonl", chats)


def prose(draw: random.Random, sentences: int = 12) -> str:
    """Returns English of a kind, of which no two texts are alike and which the rules keep."""
    made = (" ".join(draw.choices(_WORDS, k=draw.randint(8, 14))) for _ in range(sentences))
    return "\n\n".join(sentence.capitalize() + "." for sentence in made)


def _program(draw: random.Random) -> str:
    names = draw.sample(_WORDS, 6)
    functions = (f"def {a}_{b}(x):\n    # {prose(draw, 1)}\n    return x + {draw.randint(0, 999)}\n"
                 for a in names for b in names[:3])  # fmt: skip
    return "\n\n".join(functions)


def _url(number: int) -> str:
    return f"https://{number % 3}.example.com/{number}"


def _chat(shape: str, **changes: Any) -> Callable[[Path], object]:
    return lambda folder: toy.write_hf(folder, shape, **changes)


def _filling(folder: Path) -> None:
    """Writes one that was trained to fill in."""
    toy.write_hf(folder, "V3", max_position_embeddings=LONG)
    fim = (FIM_BEGIN, FIM_HOLE, FIM_END)
    released.make_tokenizer(
        toy.CONTROL["R1"] | {name: 265 + place for place, name in enumerate(fim)}
    ).save(str(folder / "tokenizer.json"))


def _v3(folder: Path) -> None:
    """Writes one whose tokenizer cuts text in a way that llama.cpp knows."""
    case = Case(V3 | toy.NARROW | {"vocab_size": 304}, seed=5)
    hf_files.write(folder, case.config, hf_files.plain(case))
    write_tokenizer(folder)


def _qwen3(folder: Path) -> None:
    case = Case(QWEN3 | toy.NARROW | {"max_position_embeddings": 32768}, seed=5)
    hf_files.write(folder, case.config, hf_files.plain(case))
    released.write_checkpoint(folder, toy.CONTROL["R1"])


def _v4(folder: Path) -> None:
    from tests.checkpoint.families.test_deepseek_v4 import CONFIG

    config = CONFIG | {"vocab_size": toy.VOCAB_SIZE}
    tensors = {}
    for row in names.tensors(from_hf(config), "deepseek_v4"):
        if row.integer:
            tensors[row.name] = np.arange(np.prod(row.shape)).reshape(row.shape) % 4
        else:
            tensors[row.name] = normal_like(5, row.name, row.shape, 0.2)
    hf_files.write(folder, config, tensors)
    released.write_checkpoint(folder, toy.CONTROL["base"])


CHECKPOINTS: dict[str, Callable[[Path], object]] = {
    "CKPT": _filling,
    "DeepSeek-V2": _chat("V2", n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=2),
    "DeepSeek-V2-Lite": _chat("V2", max_position_embeddings=LONG),
    "DeepSeek-V2-Lite-Chat": _chat("V2"),
    "DeepSeek-V3": _v3,
    "DeepSeek-R1-Distill-Qwen-1.5B": _chat("Qwen2", max_position_embeddings=LONG),
    "DeepSeek-R1-0528-Qwen3-8B": _qwen3,
    "Janus-Pro-1B": janus.write,
    "checkpoints/v4": _v4,
    "deepseek-vl2-tiny": lambda folder: vl2.write(folder, vl2.CASES["heads"]),
}


def _pairs(folder: Path) -> None:
    """Writes pictures with texts, in place of pairs of answers."""
    shutil.rmtree(folder / "pairs")
    write_pairs(folder / "pairs")


def _text(folder: Path) -> None:
    toy.write_lines(folder / "text/b.jsonl", [{"text": prose(random.Random(1))}] * 40)


def _asked(folder: Path) -> None:
    asked = {"image": "a.png", "question": "What is this?", "answer": "red"}
    toy.write_lines(folder / "asked.jsonl", [asked | {"answer": f"red {n}"} for n in range(40)])


def _shards(folder: Path) -> None:
    (folder / "shards").mkdir()
    with tarfile.open(folder / "shards/a.tar", "w") as tar:
        for n in range(40):
            for ending, data in (
                ("png", (folder / "a.png").read_bytes()),
                ("txt", f"red {n}".encode()),
            ):
                member = tarfile.TarInfo(f"{n}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _mmmu(folder: Path) -> None:
    image = {"bytes": (folder / "a.png").read_bytes(), "path": None}
    row = {
        "question": "What is <image 1>?",
        "image_1": image,
        "options": "['a', 'b']",
        "answer": "A",
    }
    (folder / "MMMU/Art").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([row]), folder / "MMMU/Art/validation-0.parquet")


def _gqa(folder: Path) -> None:
    (folder / "images").mkdir()
    PIL.Image.open(folder / "a.png").save(folder / "images/7.jpg")
    asked = {"1": {"imageId": "7", "question": "What colour?", "answer": "red"}}
    (folder / "testdev_balanced_questions.json").write_text(json.dumps(asked))


# What is written when a command first reads it, by the name that it is read by.
FILES: dict[str, Callable[[Path], object]] = {
    "pairs/": _pairs,
    "text/*.jsonl": _text,
    "asked.jsonl": _asked,
    "shards/*.tar": _shards,
    "MMMU/*/validation*.parquet": _mmmu,
    "testdev_balanced_questions.json": _gqa,
}


def provide(folder: Path, words: Sequence[str], run: Path) -> None:
    """Makes the checkpoints that a command reads, unless they are there.

    Args:
      words: of the command, without what it writes.
      run: the folder of a run, to be copied.
    """
    for word in (part.partition("=")[2] or part for part in words):
        path = folder / word
        if word in CHECKPOINTS and not path.exists():
            path.parent.mkdir(exist_ok=True)
            CHECKPOINTS[word](path)
        elif word in FILES and (word == "pairs/" or not any(folder.glob(word))):
            FILES[word](folder)
        elif word in {f"runs/{name}" for name in RUNS} and not path.exists():
            shutil.copytree(run, path)
