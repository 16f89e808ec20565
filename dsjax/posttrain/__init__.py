"""Post-training: fine-tuning, preferences, distillation and reinforcement learning.

Every run begins with a checkpoint (`--init`) and is a run like any other: it resumes, scores,
generates and exports.

  initial.py      the checkpoint that a run begins with: shape, tokenizer, chat format, weights
  messages.py     conversations in everybody's forms, as tokens with what is trained
  rows.py         conversations packed into rows
  epochs.py       a run's length that is given in epochs
  supervised.py   the objective of fine-tuning
  esft.py         the choice of a task's experts, the only ones to train
  finetuning.py   a fine-tuning run: tools/sft.py
  distill.py      a teacher's distribution as the target: forward, reverse and top-k KL
  teacher.py      the objectives that compare with it, and what it says of rows
  on_policy.py    the student's own answers as the rows to train on
  teaching.py     what a fine-tuning run learns from: conversations, or a teacher as well
  pairs.py        preferences in everybody's forms, as rows
  preference.py   the losses of DPO and of reward models
  reward_model.py a score per answer in place of a vocabulary
  row_store.py    what a frozen model says of each row, kept on disk
  preferring.py   a preference run: tools/prefer.py
  advantages.py   rewards to advantages, and each token's weight in the loss
  problems.py     files of prompts with what their answers are judged by
  answer.py       the parts of a reply: thought, answer, box
  rewards/        what an answer is worth, by rule
  verify.py       the limited processes that judge
  execution.py confined.py   running code that a model wrote; the program in whose process it runs
  objective.py    the policy loss: GRPO and its relatives, a pure function of log-probabilities

  prompts.py      problems as the model reads them
  responses.py    answers of a checkpoint, drawn as one stream
  evaluation.py   tools/evaluate.py: pass@k, maj@k
  recall.py       tools/recall.py: facts found, by length and depth
  haystacks.py    texts with facts at given depths
  filters.py rejection.py   tools/sample.py: answers that become training data

Reinforcement learning (tools/grpo.py):

  questions.py      problems by number, in an order that the seed decides
  rollout.py        the model answers, on the devices and with the arrays that it trains on
  experience.py     the source of a run: questions, answers, verdicts, batches
  verdicts.py       what answers are worth, and the advantage of each of their tokens
  minibatches.py    answers packed into rows, with the loss's weights as data
  policy.py         the policy loss as a training objective, and log-probabilities alone
  updates.py        all minibatches of a step in one program, and the reference policy
  reinforcement.py  the run

R1 from start to end (tools/r1.py):

  stages.py         runs and judges one stage after the other
  stage_report.py   what came of them: r1.json, r1.png
  game.py           the countdown game: problems, demonstrations, texts, a tokenizer
"""
