"""One module has the parameters of both, each under the name that it has alone."""

import jax.numpy as jnp

from dsjax.model.parameters import declarations
from dsjax.model.transformer import Transformer
from dsjax.precision.policy import Policy
from dsjax.vision.eyes import Eyes
from dsjax.vision.sighted import Sighted
from tests.vision import toy


def test_parameters_are_those_of_language_model_and_eyes():
    policy = Policy(jnp.dtype("float32"))
    found, language, eyes = (
        {each.path: each.shape for each in declarations(module)}
        for module in (
            Sighted(toy.LANGUAGE, toy.VISION, policy),
            Transformer(toy.LANGUAGE, policy),
            Eyes(toy.VISION, policy),
        )
    )
    assert found == language | {f"eyes.{path}": shape for path, shape in eyes.items()}
