"""A reward model's score, as tools/prefer.py trains one: `model:RUN`.

Any number: the score of the answer after the thought, the prompt before it, at its end token. R1's
helpfulness reward reads the final answer alone, "minimizing interference with the underlying
reasoning process" (arXiv:2501.12948, section 2.3.4). An answer that never comes is judged as an
empty one; one too long for the model cannot be judged. The model stands on the trainer's mesh.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsjax.files import read_json
from dsjax.posttrain.answer import split
from dsjax.posttrain.verify import Outcome

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from dsjax.posttrain.reward_model import Scorer

_TOGETHER = 16  # answers that are scored at the same time


def require(argument: str) -> None:
    """Checks that the run is there and trained a reward model, as its config.json says. Its
    weights are read when there are answers to judge.

    Raises:
      ValueError: it is not, or did not.
    """
    folder = Path(argument)
    if not folder.is_dir():
        raise ValueError(
            f"reward 'model:{argument}': there is no folder {argument} (from {Path.cwd()}); train "
            "a reward model with tools/prefer.py"
        )
    run = folder.parent.parent if folder.name.isdecimal() else folder  # checkpoints/STEP
    config = read_json(run / "config.json") if (run / "config.json").is_file() else {}
    if config.get("preference", {}).get("kind") not in ("bradley_terry", "pointwise"):
        raise ValueError(
            f"reward 'model:{argument}': {argument} is not the run of a reward model; train one "
            "from it with tools/prefer.py --set preference.kind=bradley_terry"
        )


def complaint(problem: Mapping[str, Any], argument: str) -> str | None:
    """Says why the rule cannot judge answers to a problem; None if it can: always."""
    del problem, argument
    return None


def hold(argument: str, mesh: Mesh | None) -> ModelJudge:
    """Loads the reward model.

    Raises:
      ValueError: the folder is no run of a reward model.
    """
    from dsjax.posttrain.reward_model import load_reward_model

    return ModelJudge(load_reward_model(argument, mesh=mesh))


class ModelJudge:
    """A reward model that judges answers."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    def grade(
        self, completions: Sequence[str], problems: Sequence[Mapping[str, Any]]
    ) -> list[Outcome]:
        """Scores the answers, those of like lengths together."""
        rows = [
            self._ids(completion, problem)
            for completion, problem in zip(completions, problems, strict=True)
        ]
        outcomes = [
            Outcome(error=f"the answer has {len(ids)} tokens with its prompt, too many to judge")
            for ids in rows
        ]
        most = self._scorer.longest
        order = sorted(
            (n for n, ids in enumerate(rows) if len(ids) <= most), key=lambda n: len(rows[n])
        )
        for start in range(0, len(order), _TOGETHER):
            numbers = order[start : start + _TOGETHER]
            # A batch of always as many rows: one program serves all.
            filled = [*numbers, *[numbers[0]] * (_TOGETHER - len(numbers))]
            scores = self._scorer.many([rows[number] for number in filled])
            for number, score in zip(numbers, scores, strict=False):
                outcomes[number] = Outcome(score)
        return outcomes

    def _ids(self, completion: str, problem: Mapping[str, Any]) -> list[int]:
        from dsjax.text.conversation import Conversation, Turn, encode_conversations

        answer, prompt = split(completion, problem)[1] or "", problem["prompt"]
        plain = isinstance(prompt, str)
        given = [{"role": "user", "content": prompt}] if plain else prompt
        turns = [Turn(turn["role"], turn["content"]) for turn in given]
        conversation = Conversation((*turns, Turn("assistant", answer.strip())), "", plain=plain)
        scorer = self._scorer
        (encoded,) = encode_conversations([conversation], scorer.vocabulary, scorer.chat)
        return encoded.ids.tolist()
