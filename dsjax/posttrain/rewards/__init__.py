"""Rewards by rule: what an answer is worth, judged in limited processes.

  registry.py    names to rules
  grader.py      `score` judges one completion, `Grader` many
  worth.py       a verdict: a number, or one for each step
  math.py countdown.py format.py language.py code.py      rules on their own
  user.py        a function of the user's, `path.py:name`
  prover.py      a program's verdict
  held.py model.py judge.py      what is held here: a reward model, a model or service that is asked

A rule returns a number, one for each step, or None for "cannot judge"; what it holds right and
wrong is written in its file. docs/rewards.md tells how to bring one's own.
"""

from dsjax.posttrain.rewards.grader import Grader, score

__all__ = ["Grader", "score"]
