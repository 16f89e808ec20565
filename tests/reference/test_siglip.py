"""The sigmoid loss against transformers' SigLIP, on a random model of a small shape."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from dsjax.vision.sigmoid_loss import sigmoid_loss
from tests.closeness import F32, assert_close

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]


def test_sigmoid_loss_and_its_gradients_equal_transformers():
    import torch
    from transformers import SiglipConfig, SiglipModel

    inside = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    inside |= {"num_attention_heads": 2}
    vision = inside | {"image_size": 8, "patch_size": 4}
    text = inside | {"vocab_size": 30, "max_position_embeddings": 6, "projection_size": 16}
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3)
        model.logit_scale.fill_(1.2)
        model.logit_bias.fill_(-0.7)
    said = model(
        input_ids=torch.randint(0, 30, (4, 6)),
        pixel_values=torch.randn(4, 3, 8, 8),
        return_loss=True,
    )
    learned = (said.image_embeds, said.text_embeds, model.logit_scale, model.logit_bias)
    gradients = torch.autograd.grad(said.loss, learned)
    pictures, texts, log_scale, bias = (each.detach().numpy() for each in learned)
    assert np.ptp(said.logits_per_image.detach().numpy()) > 0.5  # so that pairs do differ

    def loss(*learned):
        found = sigmoid_loss(*learned)
        return found.loss, found.logits_BB

    ours = (pictures, texts, log_scale.reshape(()), bias.reshape(()))
    (got, logits), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(
        *ours
    )
    assert_close(got, said.loss.detach().numpy(), F32, "loss")
    assert_close(logits, said.logits_per_image.detach().numpy(), F32, "logits")
    for name, one, other in zip(
        ("pictures", "texts", "scale", "bias"), grads, gradients, strict=True
    ):
        assert_close(one, other.numpy().reshape(one.shape), F32, name)
