"""Recipes that configs share say what the papers say."""

from dsjax.config import recipes, shapes


def test_r1_distillation_follows_the_paper():
    config = recipes.r1_distillation("example", shapes.QWEN_7B, learning_rate=8e-5)
    assert (config.name, config.model) == ("example", shapes.QWEN_7B)
    assert (config.data.sequence_length, config.train.batch_size) == (32768, 64)
    assert config.data.isolate_documents and config.data.fim_rate == 0
    optim = config.optim
    assert (optim.learning_rate, optim.schedule, optim.warmup_steps) == (8e-5, "v3", 0)
    # the cosine runs from the first step to the last, to a tenth of the rate
    assert (optim.decay_points, optim.decay_ratios) == ((0.0, 1.0, 1.0), (0.1, 0.1))
