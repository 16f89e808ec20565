"""DPO and the reward model's loss against TRL's own, live: from pairs of texts through a model that
transformers runs, to the loss, its gradient and the metrics.
"""

import collections
import importlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsjax
from dsjax.config.posttraining import TuningConfig
from dsjax.config.preference import Preference, PreferenceConfig
from dsjax.posttrain.initial import open_initial
from dsjax.posttrain.pairs import ExampleRows, read_examples
from dsjax.posttrain.preference import answer_logp, pair_loss, preference
from dsjax.train.objective import read_batch
from tests.closeness import LOGITS, assert_close
from tests.posttrain.toy import write_hf, write_lines
from tests.train.objectives import sums_of

pytestmark = [
    pytest.mark.torch,
    # transformers and torch deprecate faster than they release.
    pytest.mark.filterwarnings("ignore"),
]
PAIRS = [
    {"prompt": "two and two?", "chosen": "four", "rejected": "twenty-two"},
    {"prompt": "name a colour", "chosen": "green, say", "rejected": "no"},
    {"prompt": "hi", "chosen": "hello", "rejected": "what?"},
]
BETA = 0.3


@pytest.fixture(scope="module", params=["Qwen2", "V3"])
def setting(request, tmp_path_factory):
    """A checkpoint, rows of pairs, and what another checkpoint, the reference, says of them."""
    root = tmp_path_factory.mktemp("trl")
    base = write_hf(root / "base", request.param, control="V3", num_hidden_layers=2)
    initial = open_initial(base)
    path = write_lines(root / "pairs.jsonl", PAIRS)
    examples = read_examples(
        str(path), initial.vocabulary, initial.chat, labelled=False, longest=32
    )
    rows = ExampleRows(examples, np.arange(len(PAIRS)), sequence_length=32, pad=1)
    config = initial.fill(
        Preference(
            name="trl",
            preference=PreferenceConfig(beta=BETA, sequence_length=32),
            train=TuningConfig(batch_size=len(PAIRS), loss_chunk=64, remat="none"),
        )
    )
    batch = {name: jnp.asarray(x) for name, x in rows.batch(range(len(rows))).items()}
    # Any other model will do: this one with its layers' norms doubled.
    model = dsjax.load(base, dtype="float32")
    other = jax.tree.map(lambda x: x, model)
    other.norm.weight[...] = 2 * other.norm.weight[...]
    batch["reference"] = sums_of(answer_logp(config), other, batch)[0]["logp"]
    return base, config, model, batch


def ours(config, model, batch):
    """The loss, its gradient by the embedding, and the metrics."""
    objective = preference(config)
    micro_batches = {name: array[None] for name, array in batch.items()}

    def loss(embedding):
        changed = jax.tree.map(lambda x: x, model)
        changed.embed.weight[...] = embedding
        inputs, targets = read_batch(objective, model, micro_batches)
        factor = objective.weights(targets, {}).sums["loss"][0]
        inputs, targets = jax.tree.map(lambda x: x[0], (inputs, targets))
        sums = objective.sums(changed, changed.forward(inputs), targets, {})
        return factor * sums["loss"], objective.metrics(sums)

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(model.embed.weight[...])
    return value, gradient, metrics


def theirs(base, batch):
    """The same by TRL; of its trainer only the method that computes the loss runs."""
    torch = importlib.import_module("torch")
    trainer = importlib.import_module("trl.trainer.dpo_trainer").DPOTrainer
    from tests.golden import transformers_reference

    model = transformers_reference.read(base)
    # TRL has the chosen answers first, then the rejected ones.
    order = [*range(0, 2 * len(PAIRS), 2), *range(1, 2 * len(PAIRS), 2)]
    ids, counted, mask = (
        torch.tensor(np.asarray(batch[name])[order])
        for name in ("tokens", "counted", "segment_ids")
    )
    reference = torch.tensor(np.asarray(batch["reference"], np.float64)[order])

    def run(input_ids, attention_mask, labels, **settings):
        logp = model(input_ids=input_ids, attention_mask=attention_mask).logits.log_softmax(-1)
        own = logp[:, :-1].gather(-1, input_ids[:, 1:, None])[..., 0]
        own = torch.where(labels[:, 1:] == -100, 0.0, own)
        blank = torch.zeros_like(own)
        return types.SimpleNamespace(
            log_probs=own, entropy=blank, mean_logits=blank, is_top1=blank.bool()
        )

    metrics = {"train": collections.defaultdict(list)}
    stand_in = types.SimpleNamespace(
        model=types.SimpleNamespace(training=True),
        accelerator=types.SimpleNamespace(
            device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True,
        f_divergence_type="reverse_kl", loss_types=["sigmoid"], loss_weights=[1.0], beta=BETA,
        use_weighting=False, label_smoothing=0.0, _metrics=metrics, _total_train_tokens=0,
        _tp_size=1,
    )  # fmt: skip
    chosen, rejected = reference.chunk(2)
    inputs = {
        "input_ids": ids.long(), "attention_mask": mask.long(), "completion_mask": counted.long(),
        "ref_chosen_logps": chosen, "ref_rejected_logps": rejected,
    }  # fmt: skip
    loss = trainer._compute_loss(stand_in, run, inputs, False)
    loss.backward()
    gradient = model.get_input_embeddings().weight.grad.numpy()
    return loss.item(), gradient, {name: values[-1] for name, values in metrics["train"].items()}


def test_dpo_is_trls(setting):
    base, config, model, batch = setting
    loss, gradient, metrics = ours(config, model, batch)
    want, want_gradient, want_metrics = theirs(base, batch)
    assert_close(loss, want, LOGITS, "loss")
    assert_close(gradient, want_gradient, LOGITS, "gradient")
    names = {"margin": "margins", "chosen_reward": "chosen", "rejected_reward": "rejected"}
    for own, their in (names | {"accuracy": "accuracies"}).items():
        assert_close(metrics[own], want_metrics[f"rewards/{their}"], LOGITS, own)
    assert abs(float(metrics["margin"])) > 0.05  # the reference is another model


def test_reward_models_loss_is_trls():
    torch = importlib.import_module("torch")
    trainer = importlib.import_module("trl.trainer.reward_trainer").RewardTrainer
    scores = np.random.default_rng(0).normal(size=(2, 5))
    logits = torch.tensor(scores.reshape(10, 1), requires_grad=True)
    stand_in = types.SimpleNamespace(
        model=types.SimpleNamespace(training=True),
        accelerator=types.SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        args=types.SimpleNamespace(center_rewards_coefficient=None),
        _metrics={"train": collections.defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    run = lambda **inputs: types.SimpleNamespace(logits=logits)  # noqa: E731
    loss = trainer.compute_loss(stand_in, run, {"attention_mask": torch.ones(10, 1)})
    loss.backward()
    with jax.enable_x64(True):
        value, gradient = jax.value_and_grad(lambda s: pair_loss(s[0], s[1]).mean())(
            jnp.asarray(scores)
        )
        np.testing.assert_allclose(value, loss.item(), rtol=1e-12)
        np.testing.assert_allclose(gradient, logits.grad.numpy().reshape(2, 5), rtol=1e-10)
