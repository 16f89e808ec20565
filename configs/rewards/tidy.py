"""A taste of one's own as a reward: thoughts that try nothing twice."""


def tidy(completion: str, problem: dict) -> float:
    """Returns the share of a thought's tries that differ; 0 without a thought."""
    tries = [each for each in completion.split("</think>")[0].split(";") if "=" in each]
    return len(set(tries)) / len(tries) if tries else 0.0
