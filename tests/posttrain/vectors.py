"""Two groups of three outputs with the log-probabilities of four policies, and what losses they
have by formulas that were evaluated in float64 apart from this project.
"""

import numpy as np

LENGTHS = (3, 5, 2, 4, 1, 3)
REWARDS = ((1.0, 0.0, 0.0), (2.0, 1.0, 2.0))
_NUMBERS = {
    "new": """-0.622276 -1.411624 -0.936987 -1.431167 -0.24858 -0.209966 -0.545524 -1.025418
        -1.268613 -0.593858 -1.456135 -0.208314 -0.28184 -0.486254 -0.512345 -2.297956 -0.696983
        -1.83657""",
    "old": """-0.961712 -1.639363 -0.71919 -1.456769 -0.461234 -0.31643 -0.867115 -0.640475
        -1.714443 -1.099403 -1.593763 -0.34238 -0.169026 -0.586185 -0.099274 -1.999811 -0.572428
        -2.002082""",
    "ref": """-1.368894 -2.519412 -0.998104 -1.29735 -0.365864 -0.01 -1.551509 -0.505482 -1.347203
        -1.357275 -1.344841 -0.403751 -0.01 -0.503493 -0.317386 -1.892536 -0.698759 -1.616033""",
    "samp": """-0.945841 -1.573347 -0.720361 -1.377769 -0.583226 -1.51643 -0.881104 -0.616385
        -1.794563 -1.141453 -0.693763 -0.283235 -0.209079 -0.667049 -0.075025 -2.059348 -0.729266
        -1.95126""",
}
# Of the first case of `CASES`, in the order of the numbers above.
GRADIENT = """.001168963 .001488247 -.063059139 .023990551 .029302903 .025922907 .033356651
    -.000909227 .092281056 .099471799 -.03400618 -.033393883 -.026840227 -.032530678 -.001435074
    -.030267083 -.03467924 -.046902989"""
# name: (standard deviation, average, options, loss, norm of its gradient)
CASES = {
    "deepseek_math": (
        "population", "sequence", {"beta": 0.04}, 0.024395866, 0.184339565,
    ),
    "on_policy": ("population", "sequence", {"beta": 0.04}, 0.003516123, 0.301943018),
    "trl": ("sample", "sequence", {"beta": 0.04}, 0.020561410, 0.150774397),
    "unbiased_kl": (
        "sample", "sequence", {"beta": 0.04, "kl": "rho_k3"}, 0.021550407, 0.152323898,
    ),
    "dapo": ("sample", "token", {"epsilon_high": 0.28}, -0.109048320, 0.167167104),
    "dr_grpo": ("none", "constant", {}, -0.021728222, 0.031720294),
    "gspo": (
        "sample", "sequence",
        {"epsilon": 3e-4, "epsilon_high": 4e-4, "ratio": "sequence"}, 0.071902733, 0.129050927,
    ),
    "r1": ("population", "sequence", {"epsilon": 10.0, "beta": 0.001}, -0.034887520, 0.282642406),
    "v32": (
        "none", "token", {"epsilon_high": 0.28, "beta": 0.01, "kl": "rho_k3", "off_policy": 0.02},
        -0.091438664, 0.096652599,
    ),
    "tis": ("sample", "token", {"truncate": 2.0}, -0.035311765, 0.159795426),
    "icepop": ("sample", "token", {"keep": (0.5, 2.0)}, -0.091693639, 0.142199580),
}  # fmt: skip
LONGEST = 8  # of "dr_grpo"


def log_probabilities(name):
    """float64 [6, 5], 0 after the end of an output."""
    flat = iter(map(float, _NUMBERS[name].split()))
    rows = [[next(flat) for _ in range(length)] for length in LENGTHS]
    return np.array([row + [0.0] * (max(LENGTHS) - len(row)) for row in rows])


def mask():
    """bool [6, 5]."""
    return np.arange(max(LENGTHS))[None] < np.array(LENGTHS)[:, None]
