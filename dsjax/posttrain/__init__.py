"""Post-training: fine-tuning, preferences, distillation and reinforcement learning.

Every run begins with a checkpoint (`--init`) and is a run like any other: it resumes, scores,
generates and exports.

  initial.py      the checkpoint that a run begins with: shape, tokenizer, chat format, weights
"""
