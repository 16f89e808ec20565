"""The policy loss against TRL's own, live: values and gradients in float64."""

import collections
import contextlib
import importlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.posttrain.advantages import outcome_advantages, token_weights
from dsjax.posttrain.objective import PolicyOptions, policy_loss
from tests.posttrain import vectors

pytestmark = pytest.mark.torch
# TRL's settings of each case; it has no other names for these.
THEIRS = {
    "trl": {"beta": 0.04},
    "deepseek_math": {"beta": 0.04},
    "unbiased_kl": {"beta": 0.04, "use_bias_correction_kl": True},
    "on_policy": {"beta": 0.04},
    "dapo": {"epsilon_high": 0.28, "loss_type": "dapo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "gspo": {"epsilon_low": 3e-4, "epsilon_high": 4e-4, "importance_sampling_level": "sequence"},
    "r1": {"beta": 0.001, "epsilon_low": 10.0, "epsilon_high": 10.0},
    "v32": {
        "epsilon_high": 0.28, "beta": 0.01, "use_bias_correction_kl": True, "loss_type": "dapo",
        "off_policy_mask_threshold": 0.02,
    },
    "tis": {"loss_type": "dapo", "truncate": 2.0},
}  # fmt: skip


def loss_by_trl(new, old, ref, samp, advantages, mask, **settings):
    """Returns TRL's loss and its gradient by `new`; nothing of a trainer but this method runs."""
    torch = importlib.import_module("torch")
    trainer = importlib.import_module("trl.trainer.grpo_trainer").GRPOTrainer
    truncate = settings.pop("truncate", None)
    options = {
        "beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.2, "loss_type": "grpo",
        "importance_sampling_level": "token", "off_policy_mask_threshold": None,
    }  # fmt: skip
    bias = settings.pop("use_bias_correction_kl", False)
    new, old, ref, samp, advantages = (
        torch.tensor(np.array(x), dtype=torch.float64) for x in (new, old, ref, samp, advantages)
    )
    mask = torch.tensor(mask.astype(np.float64))
    new.requires_grad_(True)
    metrics = {"train": collections.defaultdict(list)}
    stand_in = types.SimpleNamespace(
        **options | settings,
        _get_per_token_logps_and_entropies=lambda *a, **k: (new, torch.zeros_like(new), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        args=types.SimpleNamespace(use_bias_correction_kl=bias, delta=None, steps_per_generation=1),
        use_vllm=truncate is not None,
        vllm_importance_sampling_correction=truncate is not None,
        model=types.SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=vectors.LONGEST,
        accelerator=types.SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        _entropy_bonus_enabled=False,
        _metrics=metrics,
        get_off_policy_mask=trainer.get_off_policy_mask,
    )
    inputs = {
        "prompt_ids": mask.long(), "prompt_mask": mask.long(), "completion_ids": mask.long(),
        "completion_mask": mask, "advantages": advantages, "old_per_token_logps": old,
        "ref_per_token_logps": ref, "sampling_per_token_logps": samp,
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    if truncate is not None:
        inputs["importance_sampling_ratio"] = torch.exp(old - samp).clamp(max=truncate)
    loss = trainer._compute_loss(stand_in, None, inputs)
    loss.backward()
    return float(loss.detach()), new.grad.numpy()


def compare(name, new, old, ref, samp, rewards, lengths):
    scale, average, options, *_ = vectors.CASES[name]
    options = PolicyOptions(**options)
    mask = np.arange(new.shape[1])[None] < np.asarray(lengths)[:, None]
    advantages = outcome_advantages(rewards, scale).reshape(-1)
    old = new if name == "on_policy" else old
    theirs, gradient = loss_by_trl(new, old, ref, samp, advantages, mask, **THEIRS[name])
    weights = token_weights(lengths, average, vectors.LONGEST)[:, None] * mask
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else contextlib.nullcontext():

        def loss(new):
            needs = options.truncate or options.off_policy
            return policy_loss(
                new,
                jnp.asarray(old),
                jnp.asarray(advantages[:, None] * mask),
                jnp.asarray(weights),
                options,
                ref=jnp.asarray(ref) if options.beta else None,
                samp=jnp.asarray(samp) if needs else None,
            ).loss

        ours, own_gradient = jax.value_and_grad(loss)(jnp.asarray(new))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
    np.testing.assert_allclose(own_gradient, gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", THEIRS)
def test_loss_and_gradient_are_trls_on_the_vectors(name):
    arrays = map(vectors.log_probabilities, ("new", "old", "ref", "samp"))
    compare(name, *arrays, vectors.REWARDS, vectors.LENGTHS)


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_are_trls_on_random_groups(name, seed):
    rng = np.random.default_rng(seed)
    groups, size, longest = 3, 4, vectors.LONGEST
    lengths = rng.integers(1, longest + 1, groups * size)
    mask = np.arange(longest)[None] < lengths[:, None]
    old = -rng.exponential(1.0, mask.shape) * mask
    others = [(old + 0.3 * rng.normal(size=mask.shape)) * mask for _ in range(3)]
    rewards = rng.integers(0, 3, (groups, size)).astype(float)
    rewards[0] = 1.0  # a group of equal rewards
    new, ref, samp = others
    compare(name, new, old, ref, samp, rewards, lengths)
