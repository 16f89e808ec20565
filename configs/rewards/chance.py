"""A reward that says nothing of an answer: the control of an experiment."""

import hashlib


def chance(completion: str, problem: dict) -> float:
    """Returns 1 for two fifths of all answers, whatever they say, else 0."""
    drawn = hashlib.sha256(f"{problem['prompt']}{completion}".encode()).digest()[0]
    return float(drawn < 0.4 * 256)
