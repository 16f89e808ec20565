"""The countdown game as data: problems, demonstrations, a base model's texts and a tokenizer.

A problem gives three numbers and a target; the answer is a sum or difference that uses each number
once and has the target as its value:

  prompt      4 17 9:12
  completion  <think>17-4=13-9=4:12, no;17+4=21-9=12:12, yes;</think><answer>17+4-9</answer>

A thought is a list of tries, each worked out step by step and compared with the target. The
demonstrator tries without aim: it draws an order and signs at random, stops as soon as a try hits
the target, and otherwise gives up after a limit of its own and answers its last try. So it shows
how to think, and is often wrong. What reinforcement learning can find beyond it: go on trying, and
aim.

Everything follows from a seed. Whether a problem is held out depends on the problem alone, so no
stage of a run can meet a held-out one, whatever its seed.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from dsjax.files import write, write_json
from dsjax.text.tokenizer import BOS, EOS, PAD

MOST = 14  # numbers are 1 to MOST
N_NUMBERS = 3
LARGEST_VALUE = 99  # of a target and of each step on the way
HELD_OUT = 0.28  # share of all problems that no stage trains on
# Chance to go on after each try that missed: of the demonstrator, and of the games that the base
# model reads; and the most tries that either makes.
PATIENCE, LITTLE_PATIENCE = 0.5, 0.1
MOST_TRIES = 8

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
VERDICTS = MISS, HIT = ", no;", ", yes;"
CHARACTERS = "+-=;: \n"
NUMBERS = tuple(map(str, range(LARGEST_VALUE + 1)))
VOCAB_SIZE = 3 + len(TAGS) + len(VERDICTS) + len(CHARACTERS) + len(NUMBERS)


class Problem(NamedTuple):
    """Numbers in ascending order, and the target."""

    numbers: tuple[int, ...]
    target: int

    @property
    def listed(self) -> str:
        """The numbers, such as 4 9 17."""
        return " ".join(map(str, self.numbers))

    @property
    def prompt(self) -> str:
        return f"{self.listed}:{self.target}\n"

    @property
    def is_held_out(self) -> bool:
        return _share(f"{self.numbers} {self.target}") < HELD_OUT


class Try(NamedTuple):
    """An attempt: numbers in the order of their use, and the signs between them."""

    numbers: tuple[int, ...]
    signs: tuple[str, ...]

    @property
    def values(self) -> list[int]:
        """The values after each step; the last is that of the whole."""
        values = [self.numbers[0]]
        for number, sign in zip(self.numbers[1:], self.signs, strict=True):
            values.append(values[-1] + (number if sign == "+" else -number))
        return values

    @property
    def expression(self) -> str:
        """Such as 17+4-9."""
        rest = zip(self.signs, self.numbers[1:], strict=True)
        return f"{self.numbers[0]}" + "".join(f"{sign}{number}" for sign, number in rest)

    @property
    def worked(self) -> str:
        """Such as 17+4=21-9=12."""
        rest = zip(self.signs, self.numbers[1:], self.values[1:], strict=True)
        return f"{self.numbers[0]}" + "".join(f"{s}{number}={value}" for s, number, value in rest)


@functools.cache
def tries(numbers: tuple[int, ...]) -> list[Try]:
    """Returns every attempt whose steps stay between 0 and LARGEST_VALUE."""
    every = itertools.product(
        sorted(set(itertools.permutations(numbers))),
        itertools.product("+-", repeat=len(numbers) - 1),
    )
    found = (Try(*each) for each in every)
    return [each for each in found if all(0 <= v <= LARGEST_VALUE for v in each.values)]


def all_problems() -> list[Problem]:
    """Returns every problem that has an answer, each once."""
    chosen = itertools.combinations_with_replacement(range(1, MOST + 1), N_NUMBERS)
    return [
        Problem(numbers, target)
        for numbers in chosen
        for target in sorted({each.values[-1] for each in tries(numbers)} - {0})
    ]


def demonstrate(problem: Problem, rng: random.Random, patience: float = PATIENCE) -> str:
    """Returns the completion of a demonstrator that tries without aim."""
    possible = tries(problem.numbers)
    made: list[Try] = []
    while True:
        made.append(rng.choice(possible))
        hit = made[-1].values[-1] == problem.target
        if hit or rng.random() >= patience or len(made) == MOST_TRIES:
            break
    *missed, last = (f"{each.worked}:{problem.target}" for each in made)
    thought = "".join(each + MISS for each in missed) + last + (HIT if hit else MISS)
    return f"<think>{thought}</think><answer>{made[-1].expression}</answer>"


def base_texts(problems: Sequence[Problem], n: int, rng: random.Random) -> Iterator[str]:
    """Yields what the base model reads: sums of given numbers, comparisons, and games with a
    thought of one or two aimless tries, as a web page might have them.
    """
    for _ in range(n):
        problem, kind = rng.choice(problems), rng.random()
        if kind < 0.3:
            some = rng.choices(tries(problem.numbers), k=4)
            yield f"{problem.listed}\n" + ";".join(each.worked for each in some)
        elif kind < 0.5:
            yield "".join(_comparison(rng) for _ in range(8))
        else:
            yield problem.prompt + demonstrate(problem, rng, LITTLE_PATIENCE)


def _comparison(rng: random.Random) -> str:
    """Returns two numbers and a verdict; they are equal half of the time."""
    one = rng.randint(0, N_NUMBERS * MOST)
    other = one if rng.random() < 0.5 else rng.randint(0, N_NUMBERS * MOST)
    return f"{one}:{other}{HIT if one == other else MISS}"


def tokenizer() -> tokenizers.Tokenizer:
    """Makes the game's tokenizer: one id per number of at most two digits, per sign and per tag, so
    that a model learns sums as facts about numbers, not by carrying digits.

    The tags are ordinary tokens, not control tokens: a model writes them as text, as R1-Zero did.
    """
    names = [BOS, EOS, PAD, *TAGS, *VERDICTS, *CHARACTERS, *NUMBERS]
    inner = tokenizers.Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, PAD))
    piece = "|".join((*TAGS, *VERDICTS, r"[1-9]\d|\d", r"[\s\S]"))
    inner.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(piece), "isolated")
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens([BOS, EOS, PAD])
    return inner


def write_game(folder: Path, *, seed: int, n_texts: int, n_cold: int, n_held_out: int) -> None:
    """Writes what the stages of a run read.

    tokenizer.json, tokenizer_config.json
    base.jsonl        {"text"}: what the base model reads
    cold_start.jsonl  {"prompt", "completion"}: demonstrations
    problems.jsonl    {"prompt", "numbers", "target"}: problems to train on by rewards
    held_out.jsonl    the same: problems that nothing above has
    """
    rng = random.Random(seed)
    problems = all_problems()
    rng.shuffle(problems)
    train = [each for each in problems if not each.is_held_out]
    held_out = [each for each in problems if each.is_held_out][:n_held_out]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer().save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "add_bos_token": True},
    )
    _write_lines(folder / "base.jsonl", ({"text": t} for t in base_texts(train, n_texts, rng)))
    shown = (rng.choice(train) for _ in range(n_cold))
    demonstrations = ({"prompt": p.prompt, "completion": demonstrate(p, rng)} for p in shown)
    _write_lines(folder / "cold_start.jsonl", demonstrations)
    for name, chosen in (("problems", train), ("held_out", held_out)):
        lines = ({"prompt": p.prompt, "numbers": p.numbers, "target": p.target} for p in chosen)
        _write_lines(folder / f"{name}.jsonl", lines)


def _write_lines(path: Path, objects: Iterable[Mapping[str, object]]) -> None:
    write(path, "".join(json.dumps(each) + "\n" for each in objects))


def _share(text: str) -> float:
    """Returns a number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
